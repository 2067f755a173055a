// The kernel for x86 with AVX2 and FMA. setup.py compiles this file for such a machine, and nothing else.

#define PROTLM_LANES 8
#define PROTLM_NAMESPACE favor_avx2

#include "run.h"

extern "C" {

std::int64_t protlm_favor_avx2_workspace(const FavorCall* call) { return favor_avx2::Workspace::floats(*call); }
void protlm_favor_avx2_forward(const FavorCall* call) { favor_avx2::run<false>(*call); }
void protlm_favor_avx2_backward(const FavorCall* call) { favor_avx2::run<true>(*call); }

}  // extern "C"
