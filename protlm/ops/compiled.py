"""The compiled library of the CPU: how it is found and loaded, and the structures that its functions take."""

import ctypes
import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

_EXTENSION = "protlm.ops._favor"
# As in cpp/favor.cpp.
_VERSION = 7
_TASKS = {
    "favor": ("forward", "backward", "fold", "read", "query_gradients", "key_gradients"),
    "local": ("forward", "backward"),
    "near_far": ("forward", "backward"),
    "heads": ("forward", "backward"),
}
"""The functions of each op, besides that which returns the floats of its workspace, where it has one."""
_WITHOUT_WORKSPACE = ("heads",)
_HALF_KERNELS = ("amx", "avx512bf16")
_HALF_TASKS = {"favor": ("forward", "backward"), "local": ("forward", "backward")}
"""The same of the kernels of bfloat16."""

Pointer = ctypes.c_void_p
Integer = ctypes.c_int64


class StridedTensor(ctypes.Structure):
    """The structure `FavorTensor` of cpp/call.h."""

    _fields_ = [("data", Pointer), *((f"{name}_stride", Integer) for name in ("batch", "head", "token"))]


class FavorCall(ctypes.Structure):
    """The structure `FavorCall` of cpp/call.h."""

    _fields_ = [
        *((name, Integer) for name in (
            "heads", "head_dim", "num_tokens", "num_rows", "mirror", "is_exponential", "is_causal",
            "projection_head_stride",
        )),
        ("scale", ctypes.c_double),
        *((name, Pointer) for name in ("projection", "oprf_a", "feature_bias")),
        ("feature_bias_head_stride", Integer),
        *((name, Pointer) for name in ("positions", "units", "groups")),
        *((name, Integer) for name in ("num_units", "num_groups", "num_slots", "longest_unit")),
        *((name, StridedTensor) for name in ("q", "k", "v", "out")),
        *((name, Pointer) for name in ("query_sums", "states", "state_grads", "references")),
        ("result_bytes", Integer),
        *((name, StridedTensor) for name in ("out_grad", "q_grad", "k_grad", "v_grad")),
        ("workspace", Pointer),
        *((name, Integer) for name in ("num_threads", "is_backward")),
    ]  # fmt: skip


class LocalCall(ctypes.Structure):
    """The structure `LocalCall` of cpp/call.h."""

    _fields_ = [
        *((name, Integer) for name in ("heads", "head_dim", "num_tokens", "before", "after")),
        ("units", Pointer),
        *((name, Integer) for name in ("num_units", "longest_unit")),
        *((name, StridedTensor) for name in ("q", "k", "v", "out")),
        *((name, Pointer) for name in ("maxima", "factors")),
        ("result_bytes", Integer),
        *((name, StridedTensor) for name in ("out_grad", "q_grad", "k_grad", "v_grad")),
        ("workspace", Pointer),
        *((name, Integer) for name in ("num_threads", "is_backward")),
    ]


class NearFarCall(ctypes.Structure):
    """The structure `NearFarCall` of cpp/call.h."""

    _fields_ = [
        ("favor", FavorCall),
        *((name, Pointer) for name in ("offsets", "factors", "sums_grad", "bounds", "units")),
        *((name, Integer) for name in ("num_units", "longest_unit", "widest_block")),
    ]


class HeadsCall(ctypes.Structure):
    """The structure `HeadsCall` of cpp/call.h."""

    _fields_ = [
        *((name, Integer) for name in ("tokens", "heads", "head_dim", "is_half")),
        *((name, Pointer) for name in ("x", "out")),
        *((name, Integer) for name in ("x_stride", "out_stride")),
        *((name, Pointer) for name in ("lengths", "cosines", "sines")),
        ("angles_stride", Integer),
        ("norms", Pointer),
        *((name, Integer) for name in ("width", "first_offset")),
        ("weight", Pointer),
        ("weight_stride", Integer),
        *((name, Pointer) for name in ("positions", "segment_lengths", "grad", "x_grad")),
        ("grad_stride", Integer),
        ("length_grads", Pointer),
        ("num_threads", Integer),
    ]


_CALLS: dict[str, type[ctypes.Structure]] = {
    "favor": FavorCall,
    "local": LocalCall,
    "near_far": NearFarCall,
    "heads": HeadsCall,
}


def why_not() -> str | None:
    """Returns the reason why the library cannot be used here, None if it can."""
    loaded = _load()
    return loaded if isinstance(loaded, str) else None


@functools.cache
def best_kernel() -> str:
    """Returns the name of the kernels for this machine: `avx512`, `avx2` or `portable`."""
    name: bytes = _function(library(), "protlm_favor_best_kernel", ctypes.c_char_p)()
    return name.decode()


@functools.cache
def best_half_kernel() -> str:
    """Returns the name of the kernels of bfloat16 for this machine: `amx`, `avx512bf16`, or nothing for none."""
    name: bytes = _function(library(), "protlm_favor_best_half_kernel", ctypes.c_char_p)()
    return name.decode()


def kernel_of(dtype: torch.dtype) -> str:
    """Returns the name of the kernels for tensors of float32 or of bfloat16."""
    return best_half_kernel() if dtype == torch.bfloat16 else best_kernel()


@functools.cache
def functions(op: str, kernel: str) -> dict[str, Callable[..., Any]]:
    """Returns the functions of an op, a key of `_TASKS`; each takes a pointer to the structure of its calls."""
    tasks = _HALF_TASKS if kernel in _HALF_KERNELS else _TASKS
    returned = ({} if op in _WITHOUT_WORKSPACE else {"workspace": Integer}) | dict.fromkeys(tasks[op])
    return {
        name: _function(library(), f"protlm_{op}_{kernel}_{name}", kind, Pointer) for name, kind in returned.items()
    }


def library() -> ctypes.CDLL:
    """Returns the library.

    Raises:
        ValueError: There is none; the message says why.
    """
    loaded = _load()
    if isinstance(loaded, str):
        raise ValueError(f"backend: expected one that was built, got 'cpp': {loaded}")
    return loaded


@functools.cache
def _load() -> ctypes.CDLL | str:
    """Returns the library, or the reason why there is none."""
    spec = importlib.util.find_spec(_EXTENSION)
    if spec is None or spec.origin is None:
        return "it was not built; install a C++17 compiler with OpenMP such as g++, then install protlm again"
    try:
        # torch has already loaded its OpenMP, and the loader gives the kernel the same one.
        loaded = ctypes.CDLL(spec.origin)
        names = ("favor_version", *(f"{op}_call_bytes" for op in _CALLS))
        version = tuple(_function(loaded, f"protlm_{name}", Integer)() for name in names)
    except (OSError, AttributeError) as error:
        return f"{spec.origin} cannot be loaded ({error}); install protlm again"
    if version != (_VERSION, *map(ctypes.sizeof, _CALLS.values())):
        return f"{spec.origin} is not of this version of protlm; install protlm again"
    return loaded


def _function(loaded: ctypes.CDLL, name: str, returned: type | None, *arguments: type) -> Callable[..., Any]:
    function = getattr(loaded, name)
    function.restype, function.argtypes = returned, arguments
    return function  # type: ignore[no-any-return]
