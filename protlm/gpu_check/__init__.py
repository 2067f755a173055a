"""`python -m protlm.gpu_check`: whether the CUDA kernels are right and fast on the GPU at hand, told in a JSON."""
