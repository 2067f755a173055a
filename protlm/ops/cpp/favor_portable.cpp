// The kernel for any processor: vectors that SSE2 and NEON have. setup.py compiles this file for such a machine, and nothing else.

#define PROTLM_LANES 4
#define PROTLM_NAMESPACE favor_portable

#include "heads.h"
#include "local.h"
#include "near_far.h"
#include "run.h"

using namespace PROTLM_NAMESPACE;

extern "C" {

std::int64_t protlm_favor_portable_workspace(const FavorCall* call) { return Workspace::floats(*call); }
void protlm_favor_portable_forward(const FavorCall* call) { run(*call, Task::kForward); }
void protlm_favor_portable_backward(const FavorCall* call) { run(*call, Task::kBackward); }
void protlm_favor_portable_fold(const FavorCall* call) { run(*call, Task::kFold); }
void protlm_favor_portable_read(const FavorCall* call) { run(*call, Task::kRead); }
void protlm_favor_portable_query_gradients(const FavorCall* call) { run(*call, Task::kQueryGradients); }
void protlm_favor_portable_key_gradients(const FavorCall* call) { run(*call, Task::kKeyGradients); }

std::int64_t protlm_local_portable_workspace(const LocalCall* call) { return local_workspace(*call); }
void protlm_local_portable_forward(const LocalCall* call) { run_local(*call, false); }
void protlm_local_portable_backward(const LocalCall* call) { run_local(*call, true); }

std::int64_t protlm_near_far_portable_workspace(const NearFarCall* call) { return near_far_workspace(*call); }
void protlm_near_far_portable_forward(const NearFarCall* call) { run_near_far(*call); }
void protlm_near_far_portable_backward(const NearFarCall* call) { run_near_far(*call); }

void protlm_heads_portable_forward(const HeadsCall* call) { run_prepare(*call, false); }
void protlm_heads_portable_backward(const HeadsCall* call) { run_prepare(*call, true); }

}  // extern "C"
