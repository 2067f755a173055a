"""A trained model on proteins: scores and embeddings as arrays; no files, no progress bars."""
