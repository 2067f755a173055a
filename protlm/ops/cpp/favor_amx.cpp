// The kernels of bfloat16 for x86 with AMX-BF16. setup.py compiles this file for such a machine, and nothing else.

#define PROTLM_LANES 16
#define PROTLM_BFLOAT16 1
#define PROTLM_AMX 1
#define PROTLM_NAMESPACE favor_amx

#include "favor_bfloat16_gradients.h"
#include "local_bfloat16_gradients.h"

using namespace PROTLM_NAMESPACE;

extern "C" {

std::int64_t protlm_favor_amx_workspace(const FavorCall* call) { return half_workspace(*call); }
void protlm_favor_amx_forward(const FavorCall* call) { run_half_forward(*call); }
void protlm_favor_amx_backward(const FavorCall* call) { run_half_backward(*call); }

std::int64_t protlm_local_amx_workspace(const LocalCall* call) {
    return call->is_backward ? local_gradient_workspace(*call) : row_local_workspace<Half>(*call);
}
void protlm_local_amx_forward(const LocalCall* call) { run_row_local<Half>(*call); }
void protlm_local_amx_backward(const LocalCall* call) { run_local_gradients(*call); }

}  // extern "C"
