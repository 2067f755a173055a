"""`python -m protlm.gpu_check`: checks and times the CUDA kernels on a GPU, and writes a JSON report."""
