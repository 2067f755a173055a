"""The first run on a GPU, in parts that stand alone."""
