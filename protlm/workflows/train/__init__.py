"""protlm train: a dataset to a run and its model."""
