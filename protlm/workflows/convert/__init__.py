"""`protlm convert`."""
