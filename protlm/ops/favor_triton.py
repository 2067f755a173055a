"""FAVOR on a GPU by Triton kernels: which calls they can compute, and the order in which they run.

A unit is a run of consecutive tokens of one segment. Keys are folded unit by unit, the partial states of a segment are
merged in their order, and queries read the state; gradients take the reverse path. Short segments are computed whole,
by one kernel forward and one backward, if their state fits on the chip. No sum depends on which program ends first, so
equal calls give equal bits.

The kernels and their launches are in `protlm.ops.cuda`, which needs Triton.
"""

import functools
import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from protlm.ops import units_triton
from protlm.ops.cuda.launch import IS_INTERPRETED, capability_of, is_wide
from protlm.ops.cuda.tiles import MAX_DIM, MIN_CAPABILITY, padded_dim, padded_features
from protlm.ops.cuda.units import state_dtype
from protlm.ops.inputs import AttentionInputs, check_bounds, result_like

if TYPE_CHECKING:
    from protlm.ops.cuda.call import Call

LOG_BASE = 2.0
"""Base of the references and query sums of exponential maps."""

# References of features without a key, as in favor_torch.
_LOG_ZERO = -1e30


def why_not() -> str | None:
    """Returns the reason why the kernels cannot be used here, None if they can.

    One GPU that is new enough suffices; `covers` refuses the others.
    """
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; it comes with the CUDA builds of PyTorch"
    return None if _is_interpreted() else _why_no_gpu()


@functools.cache
def _why_no_gpu() -> str | None:
    """Returns the fault of the GPUs or of the tools that start kernels on them; it stays the same for a process."""
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    if torch.version.hip is not None:
        return "the kernels are made for NVIDIA's GPUs"
    try:
        capabilities = [capability_of(index) for index in range(torch.cuda.device_count())]
    except RuntimeError as error:
        return f"the CUDA device does not answer: {str(error).splitlines()[0]}"
    if all(capability < MIN_CAPABILITY for capability in capabilities):
        return f"the kernels need compute capability {MIN_CAPABILITY / 10}, Ampere or later"
    return _why_triton_starts_nothing()


def _why_triton_starts_nothing() -> str | None:
    """Returns the tool that Triton lacks to build the small C extension by which it starts kernels, None if none."""
    if "CC" not in os.environ and shutil.which("gcc") is None and shutil.which("clang") is None:
        return "Triton finds no C compiler, by which it starts kernels; install gcc or clang, or name one in CC"
    # Debian's scheme for packages that users install has another folder; Triton replaces it in the same way.
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    header = Path(sysconfig.get_path("include", scheme)) / "Python.h"
    return None if header.is_file() else f"Triton needs {header}; install the headers of Python (python3-dev)"


def covers(inputs: AttentionInputs) -> bool:
    """Returns whether the kernels can compute a call; the others go to `favor_torch`, on the same device."""
    return (
        covers_tensor(inputs.q)
        and "triton" in inputs.map_definition.backends
        # Features that are not exponentials have no bound, and would leave the range of float16.
        and (inputs.is_exponential or inputs.q.dtype != torch.float16)
        and not (inputs.causal and not inputs.near_block and is_wide(inputs.q))
        # Ranks hand on states of causal attention in another form.
        and not (inputs.causal and inputs.group_name)
    )


def covers_tensor(q: Tensor) -> bool:
    """Returns whether there are kernels for the device, dtype and head_dim of a tensor."""
    device = q.device
    if device.type != "cuda" and not _is_interpreted():
        return False
    if device.type == "cuda" and capability_of(device.index) < MIN_CAPABILITY:
        return False
    return q.dtype in (torch.bfloat16, torch.float16, torch.float32) and q.shape[-1] <= MAX_DIM and q.numel() > 0


def forward(inputs: AttentionInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes the output and the tensors that `backward` needs.

    Returns:
        out, like v; the means (segments, heads, padded features, padded head_dim), in the dtype of v; the references
        (segments, heads, padded features); the query sums (batch, heads, length), to base 2 for exponential maps.
        Causal attention and a near field keep no states; the query sums of the latter are those of `favor_attention`.
    """
    if _has_units(inputs):
        out, query_sums = units_triton.forward(inputs)
        return out, *empty_states(inputs), query_sums
    check_bounds(inputs.cu_seqlens, inputs.q.shape[2])
    call = _call(inputs)
    out, query_sums = result_like(inputs.v), call.query_sums()
    means, references = empty_states(inputs)
    if call.takes_short("short_forward", out):
        call.run([call.short_forward(means, references, out, query_sums)])
    else:
        call.run(call.fold(means, references))
        call.run([call.read(means, call.query_references(references), out, query_sums)])
    return out, means, references, query_sums


def backward(
    inputs: AttentionInputs,
    out_grad: Tensor,
    out: Tensor,
    states: Tensor,
    references: Tensor,
    query_sums: Tensor,
    sums_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k and v; features are computed again.

    Query sums are only returned by `favor_attention` with a near field, and have a gradient only there.
    """
    if _has_units(inputs):
        return units_triton.backward(inputs, out_grad, out, query_sums, sums_grad)
    assert sums_grad is None
    call = _call(inputs)
    q_grad, k_grad, v_grad = grads = result_like(inputs.q), result_like(inputs.k), result_like(inputs.v)
    if call.takes_short("short_backward", out_grad, out, *grads):
        call.run([call.short_backward(out_grad, out, states, references, query_sums, grads)])
    else:
        state_grad = call.empty_state_grad()
        of_queries = call.query_references(references)
        call.run(call.query_gradients(out_grad, out, states, of_queries, query_sums, q_grad, state_grad))
        call.run([call.key_gradients(references, state_grad, k_grad, v_grad)])
    return grads


def empty_states(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """Returns means and references to be written, in the shapes of `forward`."""
    heads, head_dim = inputs.q.shape[1], inputs.q.shape[-1]
    if _has_units(inputs):
        return inputs.v.new_empty(0), inputs.v.new_empty(0, dtype=torch.float32)
    shape = (inputs.num_segments, heads, padded_features(inputs.num_features))
    means = inputs.v.new_empty((*shape, padded_dim(head_dim)), dtype=state_dtype(inputs))
    return means, means.new_empty(shape, dtype=torch.float32)


def fold(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """Returns the states and references of all keys in the form of `favor_torch`, but with logarithms to base 2."""
    check_bounds(inputs.cu_seqlens, inputs.q.shape[2])
    call = _call(inputs)
    means, references = empty_states(inputs)
    means = means.float()
    call.run(call.fold(means, references))
    means, references = _without_padding(inputs, means, references)
    if inputs.is_exponential:
        ones = (references > _LOG_ZERO / 2).to(means.dtype).unsqueeze(-1)
        return torch.cat((means, ones), -1), references
    sums = references.unsqueeze(-1)
    is_empty = (references == 0).all(-1, keepdim=True)
    return torch.cat((means * sums, sums), -1), torch.where(is_empty, _LOG_ZERO, torch.zeros_like(references[..., :1]))


def read(inputs: AttentionInputs, states: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the output and the query sums, read from states in the form of `fold`."""
    call = _call(inputs)
    out, query_sums = result_like(inputs.v), call.query_sums()
    means, references = _with_padding(inputs, states, references)
    call.run([call.read(means, call.query_references(references), out, query_sums)])
    return out, query_sums


def query_gradients(
    inputs: AttentionInputs, out_grad: Tensor, out: Tensor, states: Tensor, references: Tensor, query_sums: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the gradient of q, and the contribution of these queries to that of the states, in the form of `fold`."""
    call = _call(inputs)
    q_grad, state_grad = result_like(inputs.q), call.empty_state_grad()
    means, padded_references = _with_padding(inputs, states, references)
    of_queries = call.query_references(padded_references)
    call.run(call.query_gradients(out_grad, out, means, of_queries, query_sums, q_grad, state_grad))
    mean_grads, sum_grads, sizes = state_grad.means.float(), state_grad.sums, state_grad.sizes
    mean_grads, sum_grads = _without_padding(inputs, mean_grads * sizes.unsqueeze(-1), sum_grads)
    grads = torch.cat((mean_grads, -sum_grads.unsqueeze(-1)), -1)
    if not inputs.is_exponential:
        # From the gradient of a mean times its sum to that of the plain sums.
        sums = states[..., -1:]
        grads = torch.where(sums == 0, 0.0, grads / sums)
    return q_grad, grads


def key_gradients(
    inputs: AttentionInputs, states: Tensor, references: Tensor, state_grad: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of k and v, given the whole gradient of the states in the form of `fold`."""
    call = _call(inputs)
    k_grad, v_grad = result_like(inputs.k), result_like(inputs.v)
    if not inputs.is_exponential:
        state_grad = state_grad * states[..., -1:]
    _, padded_references = _with_padding(inputs, states, references)
    padded = call.empty_state_grad()
    sizes = state_grad[..., :-1].abs().amax(-1)
    sizes = torch.where(sizes == 0, 1.0, sizes)
    means, sums = state_grad[..., :-1] / sizes.unsqueeze(-1), -state_grad[..., -1]
    for target, source in ((padded.means, means), (padded.sums, sums), (padded.sizes, sizes)):
        target.zero_()
        target[tuple(slice(n) for n in source.shape)].copy_(source)
    call.run([call.key_gradients(padded_references, padded, k_grad, v_grad)])
    return k_grad, v_grad


def _has_units(inputs: AttentionInputs) -> bool:
    """Returns whether every unit has a state of its own."""
    return inputs.causal or inputs.near_block > 0


def _without_padding(inputs: AttentionInputs, means: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
    """Returns means and references without the padding of features and dimensions."""
    features = inputs.num_features
    return means[..., :features, : inputs.q.shape[-1]], references[..., :features]


def _with_padding(inputs: AttentionInputs, states: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
    """Returns means and references for the kernels, from states in the form of `fold` that several ranks may share."""
    means, padded = empty_states(inputs)
    sums = states[..., -1]
    means.zero_()[..., : states.shape[-2], : inputs.q.shape[-1]] = torch.where(
        sums.unsqueeze(-1) == 0, 0.0, states[..., :-1] / sums.unsqueeze(-1)
    ).to(means.dtype)
    padded.fill_(_LOG_ZERO if inputs.is_exponential else 0.0)[..., : states.shape[-2]] = (
        torch.where(sums == 0, _LOG_ZERO, references + sums.log2()) if inputs.is_exponential else sums
    )
    return means, padded


def _call(inputs: AttentionInputs) -> "Call":
    from protlm.ops.cuda.call import Call

    return Call(inputs)


def _is_interpreted() -> bool:
    return IS_INTERPRETED and importlib.util.find_spec("triton") is not None
