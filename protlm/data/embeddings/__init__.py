"""Embeddings on disk: their kinds, their layouts, and the file that is read by record id."""
