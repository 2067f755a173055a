// Which of the compiled kernels this machine can run. favor_cpp.py finds the functions of a kernel by its name.

#include "call.h"

extern "C" {

// Python compares these with its own values: after an update an older library may still be in place. Raise the version
// when the meaning of a member changes and the size does not.
std::int64_t protlm_favor_version() { return 5; }
std::int64_t protlm_favor_call_bytes() { return sizeof(FavorCall); }
std::int64_t protlm_local_call_bytes() { return sizeof(LocalCall); }
std::int64_t protlm_near_far_call_bytes() { return sizeof(NearFarCall); }

const char* protlm_favor_best_kernel() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq")) return "avx512";
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return "avx2";
#endif
    return "portable";
}

}  // extern "C"
