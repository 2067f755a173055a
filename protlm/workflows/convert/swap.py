"""The swap of exact attention for estimates of it: calibrated on some proteins, measured on others."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from protlm.data.batching.batches import evaluation_rows
from protlm.data.batching.masking import EVALUATION_SEED
from protlm.errors import ProtlmError, validation_fault
from protlm.inference.attention_swap import Moments, SwapSettings, measure_moments, swap_attention, swapped_config
from protlm.inference.metrics import Estimate
from protlm.inference.swap_scores import (
    EXACT,
    FAR_ONLY,
    NEAR_ONLY,
    SWAPPED,
    Candidate,
    SwapScores,
    measure_swaps,
    parts_of,
)
from protlm.model.performer import Performer
from protlm.pretrained.model_description import ModelDescription, Swap
from protlm.runtime.devices import best_device
from protlm.runtime.progress import StartProgress
from protlm.vocabulary import TOKEN_IDS
from protlm.workflows.convert.cost import Cost, measure_costs
from protlm.workflows.convert.proteins import SampledProteins, sample_proteins
from protlm.workflows.convert.request import (
    DEFAULT_BALANCE,
    DEFAULT_NEAR_BLOCK,
    DEFAULT_NUM_FEATURES,
    ConvertRequest,
)

FEW_PROTEINS = 32
"""With fewer the moments depend on the choice of the proteins."""
_TOKENS_PER_ROW = 4096


@dataclass(frozen=True, kw_only=True)
class SwapReport:
    """The outcome of a swap.

    Attributes:
        calibrated_on: Proteins on which q and k were balanced; 0 without.
        measured_on: Proteins with hidden residues; 0 if nothing was measured.
        num_shared: Of these, proteins on which q and k were balanced.
        num_cut: Of all these proteins, those of which only the beginning was taken.
        scores: With exact attention, swapped, and with either part of the weights alone.
        grid: Swapped with other numbers of features and other blocks, on the same residues; empty without a report.
        exact_costs: Of a forward pass of the model with exact attention; empty without a report.
        costs: Of the swapped one.
        verdict: What is kept, as a sentence; None if nothing was measured.
    """

    calibrated_on: int
    measured_on: int
    num_shared: int
    num_cut: int
    scores: list[SwapScores]
    grid: list[SwapScores]
    exact_costs: list[Cost]
    costs: list[Cost]
    verdict: str | None


def check_swap(request: ConvertRequest, description: ModelDescription) -> None:
    """Raises ProtlmError if the exact attention of a model cannot be swapped as a request asks for."""
    settings = settings_of(request)
    if settings is None:
        return
    try:
        swapped_config(description.model, settings)
    except ValueError as error:
        raise ProtlmError(f"{request.model}: {_first_fault(error)}") from None  # now with the model


def _first_fault(error: ValueError) -> str:
    """Returns the message of an error; of one of pydantic its first fault, with the setting."""
    if not isinstance(error, ValidationError):
        return str(error)
    return validation_fault(error)


def settings_of(request: ConvertRequest) -> SwapSettings | None:
    """Returns the settings of the swap that a request asks for; None if it asks for none."""
    if request.attention is None:
        return None
    return SwapSettings(
        attention=request.attention,
        num_features=request.num_features or DEFAULT_NUM_FEATURES,
        near_block=DEFAULT_NEAR_BLOCK if request.near_block is None else request.near_block,
        balance=request.balance or DEFAULT_BALANCE,
        seed=request.seed,
    )


def swap(
    model: Performer,
    description: ModelDescription,
    request: ConvertRequest,
    settings: SwapSettings,
    start_progress: StartProgress,
) -> tuple[Performer, ModelDescription, SwapReport]:
    """Returns the model after the swap, its description, and the report of the swap.

    Args:
        model: The model with exact attention.
        description: Its description.
        request: Where the proteins are.
        settings: What takes the place of its attention.
        start_progress: Starts the stages `read` (bytes), `calibrate` and `measure` (residues).

    Raises:
        ProtlmError: Proteins that cannot be read, or are too few to calibrate on.
    """
    model = model.to(best_device())
    reach = description.max_residues
    calibration, moments = None, None
    if request.calibrate is not None:
        calibration = sample_proteins(request.calibrate, "--calibrate", reach, request.seed, start_progress)
        moments = _moments(model, calibration, request, start_progress)
    swapped = swap_attention(model, settings, moments)
    candidates, measured = parts_of(swapped), calibration
    num_parts = 1 + len(candidates)
    if request.report is not None:
        measured = sample_proteins(request.report, "--report", reach, request.seed, start_progress)
        candidates += _grid(model, settings, moments)
    scores: list[SwapScores] = []
    for sample, path in ((calibration, request.calibrate), (measured, request.report or request.calibrate)):
        if sample is not None:
            _check_readable(sample, description, path)
    if measured is not None:
        objective = description.objective.hiding_all()
        rows = evaluation_rows(measured, _TOKENS_PER_ROW, EVALUATION_SEED, objective, max_residues=reach)
        advance = start_progress("measure", int(measured.lengths.sum()))
        try:
            scores = measure_swaps(model, candidates, rows, measured.key, advance=advance)
        except ValueError as error:
            # Without a report there is nothing to say of proteins that hide nothing.
            if request.report is not None:
                raise ProtlmError(f"{request.report}: {error}") from None  # now with the file
    samples = {id(sample): sample for sample in (calibration, measured) if sample is not None}
    report = SwapReport(
        calibrated_on=0 if calibration is None else len(calibration),
        measured_on=0 if measured is None or not scores else len(measured),
        num_shared=_num_shared(calibration, measured),
        num_cut=sum(sample.num_cut for sample in samples.values()),
        scores=scores[:num_parts],
        grid=scores[num_parts:],
        exact_costs=[],
        costs=[],
        verdict=verdict_of(scores[:num_parts]) if scores else None,
    )
    return swapped, _described(description, swapped, settings, report.calibrated_on), report


def _described(
    exact: ModelDescription, swapped: Performer, settings: SwapSettings, num_proteins: int
) -> ModelDescription:
    """Returns the description of a swapped model, which was measured on no valid split."""
    swap = Swap(
        weights_hash=exact.weights_hash,
        attention=settings.attention,
        num_features=settings.num_features,
        near_block=settings.near_block,
        balance=settings.balance,
        num_proteins=num_proteins,
        seed=settings.seed,
    )
    changes = {"model": swapped.config, "swap": swap, "valid": None, "redraw_every_steps": 0, "weights_hash": ""}
    return exact.model_copy(update=changes)


def _check_readable(sample: SampledProteins, description: ModelDescription, path: str | Path | None) -> None:
    """Raises ProtlmError if a model has no token for most residues of some proteins."""
    lacked = np.array([TOKEN_IDS[letter] for letter in description.model.tokens().lacked], dtype=np.uint8)
    num_lacked = sum(int(np.isin(tokens, lacked).sum()) for tokens in sample.residues)
    num_residues = int(sample.lengths.sum())
    if 2 * num_lacked > num_residues:
        raise ProtlmError(
            f"{path}: the model has no token for {num_lacked:,} of the {num_residues:,} residues; give proteins that "
            "it can read"
        )


def _num_shared(calibration: SampledProteins | None, measured: SampledProteins | None) -> int:
    if calibration is None or measured is None:
        return 0
    known = {calibration.key(record) for record in range(len(calibration))}
    return sum(measured.key(record) in known for record in range(len(measured)))


def _moments(
    model: Performer, proteins: SampledProteins, request: ConvertRequest, start_progress: StartProgress
) -> list[Moments]:
    advance = start_progress("calibrate", int(proteins.lengths.sum()))
    num_residues, head_dim = int(proteins.lengths.sum()), model.config.head_dim
    if num_residues < 2 * head_dim:
        raise ProtlmError(
            f"{request.calibrate}: {num_residues} residues are too few to balance heads of {head_dim} dimensions; give "
            f"{FEW_PROTEINS} proteins and more of the kind that the model is for"
        )
    try:
        return measure_moments(model, proteins.residues, advance)
    except ValueError as error:
        raise ProtlmError(f"{request.calibrate}: {error}") from None  # now with the file


def _grid(model: Performer, settings: SwapSettings, moments: Sequence[Moments] | None) -> Iterator[Candidate]:
    """Yields swaps with half and twice the features, and with no, half and twice the near field, as far as they go."""
    features, block = settings.num_features, settings.near_block
    for num_features in sorted({max(1, features // 2), features, 2 * features}):
        for near_block in sorted({0, block // 2, block, 2 * block}):
            if (num_features, near_block) == (features, block):
                continue
            other = replace(settings, num_features=num_features, near_block=near_block)
            try:
                swapped = swap_attention(model, other, moments)
            except ValueError:
                continue  # beyond the largest that a model may have
            yield Candidate(SWAPPED, swapped, num_features, near_block)


def verdict_of(scores: Sequence[SwapScores]) -> str:
    """Returns the sentence on the share of the accuracy with exact attention that a swap keeps."""
    by_name = {each.name: each for each in scores}
    swapped, exact = by_name[SWAPPED], by_name[EXACT]
    if swapped.kept is None:
        return "Exact attention is right at none of the hidden residues, so there is nothing to keep."
    text = (
        f"The swapped model keeps {_percent(swapped.kept)} of the accuracy with exact attention, "
        f"{swapped.accuracy.value:.3f} of {exact.accuracy.value:.3f}"
    )
    if NEAR_ONLY in by_name:
        near, far = (by_name[name].accuracy.value / exact.accuracy.value for name in (NEAR_ONLY, FAR_ONLY))
        text += f"; the near field alone keeps {near:.1%}, estimates of all weights alone {far:.1%}"
    return text + "."


def _percent(estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.1%} (without an interval: too few proteins, or no difference between any)"
    return f"{estimate.value:.1%} (95 % interval {estimate.low:.1%} to {estimate.high:.1%})"


def costs_of(exact: str | Path, swapped: Path, description: ModelDescription) -> tuple[list[Cost], list[Cost]]:
    """Returns the costs of forward passes with exact attention and after the swap; both models are on disk."""
    return measure_costs(exact, description.max_residues), measure_costs(swapped, description.max_residues)
