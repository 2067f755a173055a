"""`protlm train`: from datasets to a run directory and its model."""
