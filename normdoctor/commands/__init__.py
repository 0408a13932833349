"""Commands with so many options that each has a file of its own, and what all commands share."""
