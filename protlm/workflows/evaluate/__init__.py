"""protlm eval: a model and a split to a report."""
