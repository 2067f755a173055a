"""protlm prep: files to a dataset."""
