"""Proteins on disk and on their way into the model: file formats, datasets, splits, masking, batches, embeddings."""
