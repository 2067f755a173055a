// The kernel for x86 with AVX-512. setup.py compiles this file for such a machine, and nothing else.

#define PROTLM_LANES 16
#define PROTLM_BFLOAT16 0
#define PROTLM_AMX 0
#define PROTLM_NAMESPACE favor_avx512

#include "heads.h"
#include "local.h"
// Without AVX-512 itself, as in a test on older machines, its vectors are taken apart; the kernel of rows cannot be.
#if defined(__AVX512F__)
#include "local_rows.h"
#endif
#include "near_far.h"
#include "run.h"

using namespace PROTLM_NAMESPACE;

extern "C" {

std::int64_t protlm_favor_avx512_workspace(const FavorCall* call) { return Workspace::floats(*call); }
void protlm_favor_avx512_forward(const FavorCall* call) { run(*call, Task::kForward); }
void protlm_favor_avx512_backward(const FavorCall* call) { run(*call, Task::kBackward); }
void protlm_favor_avx512_fold(const FavorCall* call) { run(*call, Task::kFold); }
void protlm_favor_avx512_read(const FavorCall* call) { run(*call, Task::kRead); }
void protlm_favor_avx512_query_gradients(const FavorCall* call) { run(*call, Task::kQueryGradients); }
void protlm_favor_avx512_key_gradients(const FavorCall* call) { run(*call, Task::kKeyGradients); }

#if defined(__AVX512F__)
std::int64_t protlm_local_avx512_workspace(const LocalCall* call) {
    return call->is_backward ? local_workspace(*call) : row_local_workspace<float>(*call);
}
void protlm_local_avx512_forward(const LocalCall* call) { run_row_local<float>(*call); }
#else
std::int64_t protlm_local_avx512_workspace(const LocalCall* call) { return local_workspace(*call); }
void protlm_local_avx512_forward(const LocalCall* call) { run_local(*call, false); }
#endif
void protlm_local_avx512_backward(const LocalCall* call) { run_local(*call, true); }

std::int64_t protlm_near_far_avx512_workspace(const NearFarCall* call) { return near_far_workspace(*call); }
void protlm_near_far_avx512_forward(const NearFarCall* call) { run_near_far(*call); }
void protlm_near_far_avx512_backward(const NearFarCall* call) { run_near_far(*call); }

void protlm_heads_avx512_forward(const HeadsCall* call) { run_prepare(*call, false); }
void protlm_heads_avx512_backward(const HeadsCall* call) { run_prepare(*call, true); }

}  // extern "C"
