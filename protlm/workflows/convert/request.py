"""The request of `protlm convert`, and what can be checked of it before torch is loaded, which takes seconds."""

import os
from dataclasses import dataclass
from pathlib import Path

from protlm.choices import Balance, ModelFormat, NearFarMap
from protlm.data.parsing.sources import STDIN
from protlm.errors import ProtlmError, UsageError
from protlm.pretrained.model_files import EXPORTED_FILES, MODEL_FILES, description_of

DEFAULT_NUM_FEATURES, DEFAULT_NEAR_BLOCK = 256, 32
DEFAULT_BALANCE: Balance = "dense"


@dataclass(frozen=True, kw_only=True)
class ConvertRequest:
    """What is asked for.

    Attributes:
        model: MODEL as users write it.
        out: The directory to make.
        to: Its format.
        attention: The map whose estimates take the place of exact attention; None: the model stays as it is.
        num_features: Random rows of each head of these; None: `DEFAULT_NUM_FEATURES`.
        near_block: Tokens of a block whose weights, and those of the blocks beside it, stay exact; 0: none. None:
            `DEFAULT_NEAR_BLOCK`.
        balance: How q and k are balanced; None: `DEFAULT_BALANCE`.
        calibrate: Proteins on which they are balanced.
        report: Other proteins on which the swap is measured.
        seed: Of the random rows, and of the choice of proteins.
        force: Replace a model that is there.
    """

    model: str | Path
    out: Path
    to: ModelFormat = "protlm"
    attention: NearFarMap | None = None
    num_features: int | None = None
    near_block: int | None = None
    balance: Balance | None = None
    calibrate: str | Path | None = None
    report: str | Path | None = None
    seed: int = 0
    force: bool = False


def check_request(request: ConvertRequest) -> None:
    """Checks options, inputs and output, and the model as far as it is known without torch.

    Raises:
        UsageError: Options that contradict each other.
        ProtlmError: An output that is in the way, an input that is not there, or no such model.
    """
    _check_options(request)
    _check_replaceable(request, Path(os.path.realpath(request.out)))
    for path in (request.calibrate, request.report):
        if path is None or str(path) == STDIN:
            continue
        if not Path(path).exists():
            raise ProtlmError(f"{path}: no such file")
        if Path(path).is_dir():
            raise ProtlmError(f"{path}: a folder; expected a protein file")
    description_of(request.model)


def _check_options(request: ConvertRequest) -> None:
    if request.attention is None:
        for name, value in (
            ("--calibrate", request.calibrate), ("--report", request.report), ("--balance", request.balance),
            ("--num-features", request.num_features), ("--near-block", request.near_block),
        ):  # fmt: skip
            if value is not None:
                raise UsageError(f"{name} is for a swap of the attention: say which takes its place with --attention")
        return
    if request.to == "hf":
        raise UsageError("--attention makes a model that transformers does not have; leave --to hf out")
    balance = request.balance or DEFAULT_BALANCE
    if balance != "none" and request.calibrate is None:
        raise UsageError(
            "--calibrate: give proteins of the kind that the model is for, on which q and k are balanced, or take "
            "--balance none"
        )
    if balance == "none" and request.calibrate is not None:
        raise UsageError("--calibrate is of no use with --balance none; leave one of them out")
    if str(request.calibrate) == STDIN and str(request.report) == STDIN:
        raise UsageError("--calibrate and --report: the standard input can be read only once")


def _check_replaceable(request: ConvertRequest, out: Path) -> None:
    """Refuses to write over anything but a model, and over the model itself that is read."""
    if not os.path.lexists(out):
        return
    if out == Path(os.path.realpath(request.model)) or out in Path(os.path.realpath(request.model)).parents:
        raise ProtlmError(f"{request.out}: the model itself, or a folder around it; choose another --out")
    if not request.force:
        raise ProtlmError(f"{request.out}: exists already; replace it with --force")
    foreign = sorted({entry.name for entry in out.iterdir()} - {*MODEL_FILES, *EXPORTED_FILES}) if out.is_dir() else []
    if not out.is_dir() or foreign or not (out / "config.json").is_file():
        holds = f"holds {foreign[0]!r}" if foreign else "is no folder with a config.json"
        raise ProtlmError(f"{request.out}: not a converted model ({holds}), and not replaced; choose another --out")
