// The kernel for any processor: vectors that SSE2 and NEON have. setup.py compiles this file for such a machine, and nothing else.

#define PROTLM_LANES 4
#define PROTLM_NAMESPACE favor_portable

#include "run.h"

extern "C" {

std::int64_t protlm_favor_portable_workspace(const FavorCall* call) { return favor_portable::Workspace::floats(*call); }
void protlm_favor_portable_forward(const FavorCall* call) { favor_portable::run<false>(*call); }
void protlm_favor_portable_backward(const FavorCall* call) { favor_portable::run<true>(*call); }

}  // extern "C"
