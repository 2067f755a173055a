"""What a swap of the attention costs: the estimates of a model beside the exact attention that they stand for."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from protlm.data.batching.batches import EvaluationRow
from protlm.inference.metrics import Estimate, MetricSums, estimate, metric_values, replicate_weights, sums_by_protein
from protlm.inference.replaced_attention import far_only, has_near_field, near_only
from protlm.inference.residue_scores import ResidueScores
from protlm.inference.scoring import score_row
from protlm.model.attention import SelfAttention
from protlm.model.performer import Performer
from protlm.runtime.progress import Advance, no_advance

EXACT, SWAPPED, NEAR_ONLY, FAR_ONLY = "exact", "swapped", "near only", "far only"


@dataclass(frozen=True, kw_only=True)
class SwapScores:
    """A model's scores with one kind of attention, beside those with exact attention on the same hidden residues.

    Intervals are of a bootstrap over proteins.

    Attributes:
        name: `exact`; `swapped`; `near only`: the exact weights of near tokens without all others; `far only`: the
            estimates of all weights.
        num_features: Random rows of each head; None for `exact`.
        near_block: Tokens of a block whose weights are exact; 0: none; None for `exact`.
        accuracy: Share of the hidden residues that it gives the highest probability.
        perplexity: On the hidden residues.
        kept: Accuracy divided by that of exact attention; None if that is 0.
        kl: Mean Kullback–Leibler divergence, in nats, of its predictions from those with exact attention.
        agreement: Share of the hidden residues whose most likely token is that of exact attention.
        cosine: Mean cosine, over all tokens, of the last hidden state and that with exact attention.
        layer_errors: ‖out − exact‖/‖exact‖ of the attention's output in each layer, over all tokens, given what the
            layer sees in the model with exact attention.
    """

    name: str
    num_features: int | None
    near_block: int | None
    accuracy: Estimate
    perplexity: Estimate
    kept: Estimate | None
    kl: float
    agreement: float
    cosine: float
    layer_errors: list[float]


@dataclass(frozen=True)
class Candidate:
    """A model that is compared with the one with exact attention.

    Attributes:
        name: As in `SwapScores`.
        model: The model.
        num_features: As in `SwapScores`.
        near_block: As in `SwapScores`.
    """

    name: str
    model: Performer
    num_features: int | None
    near_block: int | None

    @contextmanager
    def as_named(self) -> Iterator[None]:
        """Leaves out the part of the model's attention that its name excludes, until the end of the block."""
        with {NEAR_ONLY: near_only, FAR_ONLY: far_only}.get(self.name, nullcontext)(self.model):
            yield


def parts_of(model: Performer) -> list[Candidate]:
    """Returns a model of estimates, and if it has a near field that alone and the estimates of all weights alone."""
    near_block = model.config.near_block if has_near_field(model) else 0
    names = (SWAPPED, NEAR_ONLY, FAR_ONLY) if near_block else (SWAPPED,)
    return [Candidate(name, model, model.config.num_features, near_block) for name in names]


@dataclass
class _Sums:
    """The sums of one candidate over all rows."""

    metrics: MetricSums = field(default_factory=MetricSums)
    kl: float = 0.0
    num_equal: int = 0
    cosine: float = 0.0
    errors: dict[int, Tensor] = field(default_factory=dict)


def measure_swaps(
    exact: Performer,
    candidates: Sequence[Candidate],
    rows: Iterable[EvaluationRow],
    sequences: Callable[[int], bytes],
    *,
    seed: int = 0,
    advance: Advance = no_advance,
) -> list[SwapScores]:
    """Returns the scores of the model with exact attention, and those of each candidate, on the same hidden residues.

    Args:
        exact: The model with exact attention, in evaluation mode.
        candidates: Models with the same layers, on the same device.
        rows: What is scored.
        sequences: Returns the bytes of a protein's sequence by its number: equal ones are resampled together.
        seed: Of the bootstrap.
        advance: Called with the residues of each row.

    Raises:
        ValueError: No residue is hidden.
    """
    reference = Candidate(EXACT, exact, None, None)
    sums = [_Sums() for _ in (reference, *candidates)]
    exact_energy: dict[int, Tensor] = {}
    num_tokens = 0
    for row in rows:
        scores = score_row(exact, row)
        state, energies = _visit(exact, row, candidates, sums[1:])
        for layer, energy in energies.items():
            exact_energy[layer] = exact_energy.get(layer, torch.zeros(())) + energy
        num_tokens += len(row.batch.tokens)
        records, of_exact = sums_by_protein(scores)
        keys = [sequences(int(record)) for record in records]
        weights = replicate_weights(keys, seed)
        sums[0].metrics.add(of_exact, weights, keys)
        for candidate, collected in zip(candidates, sums[1:], strict=True):
            with candidate.as_named():
                own = score_row(candidate.model, row)
                own_state = _last_state(candidate.model, row)
            collected.metrics.add(sums_by_protein(own)[1], weights, keys)
            collected.kl += _divergence(scores, own)
            collected.num_equal += int((scores.log_probabilities.argmax(1) == own.log_probabilities.argmax(1)).sum())
            collected.cosine += float(F.cosine_similarity(state, own_state, dim=-1).double().sum())
        advance(row.batch.num_residues)
    if not sums[0].metrics.num_targets:
        raise ValueError("rows: expected hidden residues, got none; give more or longer proteins")
    sums[0].num_equal, sums[0].cosine = sums[0].metrics.num_targets, float(num_tokens)
    sums[0].errors = {layer: torch.zeros(()) for layer in exact_energy}
    return [
        _scores_of(candidate, collected, sums[0].metrics, exact_energy, num_tokens)
        for candidate, collected in zip((reference, *candidates), sums, strict=True)
    ]


def _visit(
    exact: Performer, row: EvaluationRow, candidates: Sequence[Candidate], sums: Sequence[_Sums]
) -> tuple[Tensor, dict[int, Tensor]]:
    """Returns the last hidden state of a row with exact attention, and ‖out‖² of the attention in each layer.

    The squared errors of the candidates, given the same input of the layer, are added to their sums meanwhile: only one
    layer is held at a time.
    """
    energies: dict[int, Tensor] = {}

    def compare(number: int, arguments: tuple[Any, ...], out: Tensor) -> None:
        energies[number] = out.double().square().sum().cpu()
        for candidate, collected in zip(candidates, sums, strict=True):
            with candidate.as_named():
                own = candidate.model.layers[number].attention(*arguments)  # type: ignore[operator]
            error = (own - out).double().square().sum().cpu()
            collected.errors[number] = collected.errors.get(number, torch.zeros(())) + error

    with ExitStack() as stack:
        for number, layer in enumerate(exact.layers):
            attention = layer.attention
            assert isinstance(attention, SelfAttention)
            hook = attention.register_forward_hook(
                lambda _, arguments, out, number=number: compare(number, arguments, out)
            )
            stack.callback(hook.remove)
        state = _last_state(exact, row)
    return state, energies


@torch.no_grad()
def _last_state(model: Performer, row: EvaluationRow) -> Tensor:
    device, last = model.embedding.weight.device, model.config.num_layers
    return model.hidden_states(row.batch.tokens.to(device), row.batch.cu_seqlens.to(device), (last,))[last]


def _divergence(exact: ResidueScores, other: ResidueScores) -> float:
    """Returns Σ KL(exact ‖ other) over the targets; a token that the model lacks adds nothing."""
    logs, others = (scores.log_probabilities.astype(np.float64) for scores in (exact, other))
    known = np.isfinite(logs)
    differences = np.where(known, logs, 0.0) - np.where(known, others, 0.0)
    return float((np.where(known, np.exp(logs), 0.0) * differences).sum())


def _scores_of(
    candidate: Candidate, sums: _Sums, exact: MetricSums, energies: dict[int, Tensor], num_tokens: int
) -> SwapScores:
    estimates = sums.metrics.estimates()
    own, reference = (metric_values(each.resampled())["accuracy"] for each in (sums.metrics, exact))
    of_exact = exact.score().accuracy
    with np.errstate(invalid="ignore", divide="ignore"):
        shares = own / reference
    return SwapScores(
        name=candidate.name,
        num_features=candidate.num_features,
        near_block=candidate.near_block,
        accuracy=estimates["accuracy"],
        perplexity=estimates["perplexity"],
        kept=estimate(sums.metrics.score().accuracy / of_exact, shares[np.isfinite(shares)]) if of_exact else None,
        kl=sums.kl / exact.num_targets,
        agreement=sums.num_equal / exact.num_targets,
        cosine=sums.cosine / num_tokens,
        layer_errors=[float((sums.errors[layer] / energy).sqrt()) for layer, energy in sorted(energies.items())],
    )
