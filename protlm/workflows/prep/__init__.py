"""`protlm prep`: from protein files to a dataset."""
