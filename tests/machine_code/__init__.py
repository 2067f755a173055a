"""Compiles the Triton kernels for GPUs that need not be there, and reads the machine code."""
