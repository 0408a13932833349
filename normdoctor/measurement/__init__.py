"""What the norms of a model really see on the user's data."""
