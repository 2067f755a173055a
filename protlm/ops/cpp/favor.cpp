// Which of the compiled kernels this machine can run. favor_cpp.py finds the functions of a kernel by its name.

#include "call.h"

#if defined(__x86_64__) && defined(__linux__) && !defined(PROTLM_WITHOUT_BFLOAT16)
#define PROTLM_HAS_BFLOAT16 1
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#define PROTLM_HAS_BFLOAT16 0
#endif

extern "C" {

// Python compares these with its own values: after an update an older library may still be in place. Raise the version
// when the meaning of a member changes and the size does not.
std::int64_t protlm_favor_version() { return 7; }
std::int64_t protlm_favor_call_bytes() { return sizeof(FavorCall); }
std::int64_t protlm_local_call_bytes() { return sizeof(LocalCall); }
std::int64_t protlm_near_far_call_bytes() { return sizeof(NearFarCall); }
std::int64_t protlm_heads_call_bytes() { return sizeof(HeadsCall); }

const char* protlm_favor_best_kernel() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq")) return "avx512";
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return "avx2";
#endif
    return "portable";
}

// Which kernel of bfloat16, empty for none: where the processor would only emulate it, float32 is faster.
const char* protlm_favor_best_half_kernel() {
#if PROTLM_HAS_BFLOAT16
    __builtin_cpu_init();
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                            __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    if (!has_avx512 || !__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) || !(eax & 1u << 5)) return "";
    constexpr unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24;
    __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx);
    // Linux gives a process the tiles only where it asks for them.
    constexpr long request_permission = 0x1023, tile_data = 18;
    if (edx & amx_bf16 && edx & amx_tile && syscall(SYS_arch_prctl, request_permission, tile_data) == 0) return "amx";
    return "avx512bf16";
#else
    return "";
#endif
}

}  // extern "C"
