"""From a dataset to batches: which record is drawn when, what is hidden, what shares a row."""
