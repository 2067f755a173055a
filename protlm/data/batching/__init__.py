"""From a dataset to batches: the order of draws, the masking of residues, and the packing of proteins into rows."""
