"""protlm embed: a model and proteins to embeddings in a layout."""
