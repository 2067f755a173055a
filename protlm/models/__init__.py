"""The models that are part of protlm: data, read by `pretrained/model_files.py`."""
