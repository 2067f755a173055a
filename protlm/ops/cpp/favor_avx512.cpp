// The kernel for x86 with AVX-512. setup.py compiles this file for such a machine, and nothing else.

#define PROTLM_LANES 16
#define PROTLM_NAMESPACE favor_avx512

#include "run.h"

extern "C" {

std::int64_t protlm_favor_avx512_workspace(const FavorCall* call) { return favor_avx512::Workspace::floats(*call); }
void protlm_favor_avx512_forward(const FavorCall* call) { favor_avx512::run<false>(*call); }
void protlm_favor_avx512_backward(const FavorCall* call) { favor_avx512::run<true>(*call); }

}  // extern "C"
