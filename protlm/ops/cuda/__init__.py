"""The Triton kernels of the attention op, each in a file of its name, with its float64 twin in a file beside it."""
