"""Proteins on disk and on their way to the model: formats, shards, splits, masking, batches. No Lightning, no CLI."""
