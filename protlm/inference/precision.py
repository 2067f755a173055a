"""The number type in which a model computes where nothing is trained: which one, and whether this machine has it."""

from protlm.choices import InferencePrecision, UsedPrecision
from protlm.errors import ProtlmError
from protlm.model.half_precision import halve
from protlm.model.performer import Performer
from protlm.runtime.devices import best_device, has_half_precision_units

NAMES: dict[UsedPrecision, str] = {"32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""The number types by their names."""


def used_precision(wanted: InferencePrecision, *, may_be_half: bool) -> UsedPrecision:
    """Returns the precision of a run on the default device.

    Args:
        wanted: As the user wrote it.
        may_be_half: Whether `auto` is bfloat16 on a GPU that has it; otherwise it is float32 everywhere.

    Raises:
        ProtlmError: A half precision that the device would only emulate.
    """
    device = best_device()
    if wanted == "auto":
        return "bf16" if may_be_half and device.type == "cuda" and has_half_precision_units("bf16") else "32"
    if wanted != "32" and not has_half_precision_units(wanted):
        raise ProtlmError(f"precision {wanted}: {emulation(wanted)}")
    return wanted


def emulation(precision: UsedPrecision) -> str:
    """Returns what to say of a half precision that the default device would only emulate."""
    what = "GPU" if best_device().type == "cuda" else "processor"
    return (
        f"as far as PyTorch can tell this {what} has no units for {NAMES[precision]}, and would be slower in it than "
        "in float32; take precision 32"
    )


def set_precision(model: Performer, precision: UsedPrecision) -> None:
    """Gives a model the weights of a precision, in place; in half precision it cannot be trained any more."""
    if precision != "32":
        # torch is loaded with the model.
        import torch

        halve(model, torch.bfloat16 if precision == "bf16" else torch.float16)


def overflow_hint(precision: UsedPrecision) -> str:
    """Returns what to do about numbers that are not finite: in float16 they may be beyond its range."""
    if precision == "fp16":
        return "float16 ends at 65,504: take precision 32, or bf16 where the machine has it"
    return "the model is of no use"
