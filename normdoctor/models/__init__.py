"""A path (and an architecture) → something that runs. torch comes in only through `with_torch`."""
