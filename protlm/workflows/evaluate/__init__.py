"""`protlm eval`: from a model and a split to a report."""
