"""From parsed records to a dataset: selection, splits, shards, and the leakage between splits."""
