"""Embeddings on disk: their kinds, the layouts they are written in, and the reader of layout `protlm`."""
