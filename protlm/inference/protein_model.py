"""The Python interface of a trained model: sequences in, NumPy arrays out; tokens, packing and devices stay inside."""

from collections.abc import Iterable, Iterator, Sequence
from numbers import Integral
from pathlib import Path
from typing import get_args

import numpy as np
import torch

from protlm import vocabulary
from protlm.choices import InferencePrecision, ResidueContext, ScoreStrategy
from protlm.config import SPECIAL_TOKENS_PER_SEGMENT
from protlm.data.batching.rows import packed_in_order
from protlm.data.embeddings.kinds import KINDS, Kind, absolute_layer
from protlm.data.mutations import Substitution, mutated, parse_mutant
from protlm.errors import ProtlmError
from protlm.inference.long_proteins import Cut
from protlm.inference.marginals import (
    CONTEXTS,
    check_mutants,
    marginal_score,
    marginals,
    perplexity_score,
    pseudo_losses,
)
from protlm.inference.precision import overflow_hint, set_precision, used_precision
from protlm.inference.row_embeddings import RowEmbedder, default_tokens_per_batch, merge_windows
from protlm.inference.sequences import described, each_tokens, tokens_of
from protlm.model.performer import Performer
from protlm.pretrained.model_description import ModelDescription
from protlm.pretrained.model_names import read_named_model
from protlm.runtime.devices import best_device


class ProteinModel:
    """A trained model that takes sequences as text and returns NumPy arrays.

    Attributes:
        description: The content of the model's config.json.
    """

    def __init__(self, model: Performer, description: ModelDescription) -> None:
        self._model = model.eval()
        self._is_float16 = model.encoder_layers()[0].ffn_out.weight.dtype == torch.float16
        self.description = description

    @property
    def num_layers(self) -> int:
        """Number of the last layer; 0 is the embedding."""
        return self.description.model.num_layers

    @property
    def model_dim(self) -> int:
        """Width of an embedding."""
        return self.description.model.model_dim

    def embed(
        self,
        sequences: Iterable[str],
        include: Sequence[Kind] = ("mean",),
        *,
        layer: int = -1,
        tokens_per_batch: int | None = None,
    ) -> Iterator[dict[str, np.ndarray]]:
        """Returns an iterator over the embeddings of each sequence, in order, as float32.

        A result does not depend on the other sequences. Sequences are read only as they are needed.

        Args:
            sequences: Residues as text; repaired like records of a FASTA file.
            include: `mean` over the residues (dim,), `per-residue` (num_residues, dim), `cls` (dim,), `logits`
                (num_residues, 33); logits always are those of the last layer.
            layer: 0 is the embedding, -1 the last layer.
            tokens_per_batch: Budget of one forward pass; a longer protein has a pass of its own. None: a default for
                the device.

        Raises:
            ValueError: An unknown kind or layer; with its place in `sequences`, one that is no str, is empty, holds
                anything else than residues, or is longer than the model's learned positions.
        """
        if isinstance(include, str) or not include or not set(include) <= set(KINDS):
            raise ValueError(f"include: expected some of {', '.join(map(repr, KINDS))}, got {include!r}")
        number = absolute_layer(layer, self.num_layers)
        _check_budget(tokens_per_batch)
        proteins = each_tokens(sequences, self.description.max_residues)
        return self._compute(proteins, tuple(dict.fromkeys(include)), number, tokens_per_batch)

    def logits(self, sequences: Iterable[str], *, tokens_per_batch: int | None = None) -> Iterator[np.ndarray]:
        """Returns an iterator over the logits of each sequence, in order: float32 (num_residues, 33).

        Args:
            sequences: Residues as text, as for `embed`; `<mask>` hides one, as in `MK<mask>V`. Nothing else is hidden.
            tokens_per_batch: Budget of one forward pass; None: a default for the device.

        Raises:
            ValueError: A sequence that `embed` would not take without its `<mask>` either.
        """
        _check_budget(tokens_per_batch)
        proteins = each_tokens(sequences, self.description.max_residues, may_be_masked=True)
        by_kind = self._compute(proteins, ("logits",), self.num_layers, tokens_per_batch)
        return (arrays["logits"] for arrays in by_kind)

    def log_probabilities(
        self,
        sequence: str,
        positions: Sequence[int] | np.ndarray | None = None,
        strategy: ResidueContext = "masked",
        *,
        window: int | None = None,
        tokens_per_batch: int | None = None,
    ) -> np.ndarray:
        """Returns the natural logarithms of the probabilities of all tokens at some positions, float32 (positions, 33).

        A column that the model lacks a token for is −∞; a residue that the model reads as another one, such as U as X,
        has the probability of that one at its own position.

        Args:
            sequence: Residues as text.
            positions: Positions counted from 0, in any order; None: all.
            strategy: `masked`: each position is hidden, alone, which takes a pass of the protein for each;
                `wild-type`: nothing is hidden, and one pass gives all positions.
            window: See a longer protein in overlapping windows of so many residues; a position is computed in the one
                whose middle is nearest to it.
            tokens_per_batch: Budget of a packed row of passes; None: a default for the device. It changes no result
                beyond rounding.

        Raises:
            ValueError: No sequence of residues, a position outside it, an unknown strategy, a model that predicts the
                next residue and so hides none, or a protein or window that its learned positions do not reach.
        """
        if strategy not in get_args(ResidueContext):
            raise ValueError(f"strategy: expected {_one_of(ResidueContext)}, got {strategy!r}")
        self._check_masked()
        _check_budget(tokens_per_batch)
        tokens = tokens_of(sequence, "sequence", self._reach(window))
        wanted = _positions(positions, len(tokens))
        needed, rows = np.unique(wanted, return_inverse=True)
        budget = tokens_per_batch or default_tokens_per_batch()
        logs = marginals(self._model, tokens, needed, strategy, Cut(window=window), budget)
        self._check_range(logs, "sequence")
        return logs[rows]

    def score(
        self,
        sequence: str,
        mutations: Iterable[str],
        strategy: ScoreStrategy = "masked-marginals",
        *,
        offset: int = 0,
        window: int | None = None,
        tokens_per_batch: int | None = None,
    ) -> np.ndarray:
        """Returns the score of each mutant of a protein, float64 (mutations,); above 0: likelier than the wild type.

        `masked-marginals` and `wt-marginals` give Σ_i (log P(mutant_i) − log P(wild type_i)) over the substitutions of
        a mutant (`log_probabilities`, masked or wild-type; Meier et al., bioRxiv 2021.07.09.450648): the score of a
        multiple mutant is the sum of those of its substitutions. Only positions that a mutation touches are computed.
        `pseudo-perplexity` gives log PPPL(wild type) − log PPPL(mutant), with the pseudo-perplexity of each whole
        sequence (Salazar et al., arXiv 1910.14659): a pass of a sequence for each of its residues.

        Args:
            sequence: The wild type, residues as text.
            mutations: Mutants such as `A42G`, or `A42G:K51E` for several substitutions, with positions from 1.
            strategy: How mutants are scored.
            offset: Added to a position of the protein, counted from 1, it gives the number in a mutation.
            window: As for `log_probabilities`.
            tokens_per_batch: As for `log_probabilities`.

        Raises:
            ValueError: As `log_probabilities`; with its place in `mutations`, one that is no mutation of this protein,
                or, but for `pseudo-perplexity`, to a residue that the model has no token for.
        """
        if strategy not in get_args(ScoreStrategy):
            raise ValueError(f"strategy: expected {_one_of(ScoreStrategy)}, got {strategy!r}")
        self._check_masked()
        _check_budget(tokens_per_batch)
        _check_whole("offset", offset)
        tokens = tokens_of(sequence, "sequence", self._reach(window))
        protein = vocabulary.decode(tokens)
        mutants = self._mutants(protein, mutations, offset, strategy)
        cut, budget = Cut(window=window), tokens_per_batch or default_tokens_per_batch()
        if strategy == "pseudo-perplexity":
            sequences = (protein, *(mutated(protein, mutant) for mutant in mutants))
            encoded = (vocabulary.encode(sequence.encode()) for sequence in sequences)
            losses = pseudo_losses(self._model, encoded, cut, budget)
            wild_type = next(losses)
            scores = np.array([perplexity_score(wild_type, loss) for loss in losses], dtype=np.float64)
            self._check_range(scores, "mutations")
            return scores
        needed = np.unique(np.array([s.position for mutant in mutants for s in mutant], dtype=np.int64))
        logs = marginals(self._model, tokens, needed, CONTEXTS[strategy], cut, budget)
        self._check_range(logs, "sequence")
        return np.array([marginal_score(logs, needed, mutant) for mutant in mutants], dtype=np.float64)

    def pseudo_perplexity(
        self, sequences: Iterable[str], *, window: int | None = None, tokens_per_batch: int | None = None
    ) -> Iterator[float]:
        """Returns an iterator over the pseudo-perplexity of each sequence, exp(−1/L Σ_i log P(x_i | x without x_i)).

        It takes a pass of the sequence for each of its residues (Salazar et al., arXiv 1910.14659). 1 is a model that
        is certain and right, 33 a guess among all tokens.

        Args:
            sequences: Residues as text.
            window: As for `log_probabilities`.
            tokens_per_batch: As for `log_probabilities`.

        Raises:
            ValueError: A sequence that `embed` would not take either, or a model that predicts the next residue.
        """
        self._check_masked()
        _check_budget(tokens_per_batch)
        proteins = each_tokens(sequences, self._reach(window))
        budget = tokens_per_batch or default_tokens_per_batch()
        losses = pseudo_losses(self._model, proteins, Cut(window=window), budget)
        return (self._perplexity(loss, f"sequences[{number}]") for number, loss in enumerate(losses))

    def _check_masked(self) -> None:
        if self.description.model.causal:
            raise ValueError(
                "model: expected one that was trained on hidden residues, got a causal one, which predicts the next "
                "residue from those before"
            )

    def _reach(self, window: int | None) -> int | None:
        """Returns the residues that a sequence may have; None: any number."""
        limit = self.description.max_residues
        if window is None:
            return limit
        _check_whole("window", window)
        if window < 2 or (limit is not None and window > limit):
            reach = (
                "" if limit is None else f", and at most the {limit} residues that the positions of this model reach"
            )
            raise ValueError(f"window: expected at least 2{reach}, got {window}")
        return None

    def _mutants(
        self, protein: str, mutations: Iterable[str], offset: int, strategy: ScoreStrategy
    ) -> list[tuple[Substitution, ...]]:
        if isinstance(mutations, str | bytes) or not isinstance(mutations, Iterable):
            got = "a single str; put it into a list" if isinstance(mutations, str) else described(mutations)
            raise ValueError(f"mutations: expected several, such as a list of str, got {got}")
        mutants, lacked = [], self.description.model.tokens().lacked
        for index, text in enumerate(mutations):
            name = f"mutations[{index}]"
            if not isinstance(text, str):
                raise ValueError(f"{name}: expected a mutation as str, got {described(text)}")
            try:
                mutants.append(parse_mutant(text, protein, offset))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None  # with the place in the caller's list
            try:
                # In a whole sequence it has the probability of the token as which the model reads it.
                check_mutants(mutants[-1], "" if strategy == "pseudo-perplexity" else lacked)
            except ValueError as error:
                raise ValueError(f"{name}: {text!r}: {error}") from None  # likewise
        return mutants

    def _compute(
        self, proteins: Iterable[np.ndarray], kinds: Sequence[Kind], layer: int, tokens_per_batch: int | None
    ) -> Iterator[dict[str, np.ndarray]]:
        embedder, number = RowEmbedder(self._model, kinds, (layer,)), 0
        for row in packed_in_order(proteins, _num_tokens, tokens_per_batch or default_tokens_per_batch()):
            for protein, sums in zip(row, embedder(row), strict=True):
                # A vector that the caller keeps must not keep the whole row in memory.
                merged = merge_windows([sums], len(protein))
                for array in merged.values():
                    self._check_range(array, f"sequences[{number}]")
                number += 1
                yield {kind: array.copy() for (kind, _), array in merged.items()}

    def _perplexity(self, loss: float, name: str) -> float:
        self._check_range(np.array(loss), name)
        return float(np.exp(loss))

    def _check_range(self, results: np.ndarray, name: str) -> None:
        """Raises ProtlmError if some results are no numbers in a model that computes in float16."""
        # A token that the model lacks has the logit −∞.
        if self._is_float16 and (np.isnan(results).any() or np.isposinf(results).any()):
            raise ProtlmError(f"{name}: its results are not finite; {overflow_hint('fp16')}")


def load_model(
    name: str | Path,
    *,
    precision: InferencePrecision = "auto",
    revision: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
) -> ProteinModel:
    """Returns a saved model, on the GPU if there is one.

    Args:
        name: An existing path: a model directory, a run of `protlm train`, a Hugging Face directory or a checkpoint
            `.pt` of fairseq; otherwise `OWNER/NAME[@REVISION]` on the Hugging Face hub.
        precision: Number type of weights and matrix products: `32`, `bf16` or `fp16`; `auto` is `32`. What is returned
            is float32 in any case.
        revision: Branch, tag or commit on the hub.
        token: For models of the hub that ask for one.
        local_files_only: Take a model of the hub from its cache only.

    Raises:
        ModelError: Files that are missing, altered or of another version, or a model that protlm does not run.
        ProtlmError: A half precision that this machine has no units for.
        ValueError: An unknown precision.
    """
    if precision not in get_args(InferencePrecision):
        raise ValueError(f"precision: expected {_one_of(InferencePrecision)}, got {precision!r}")
    used = used_precision(precision, may_be_half=False)
    model, description = read_named_model(name, revision=revision, token=token, local_files_only=local_files_only)
    set_precision(model, used)
    return ProteinModel(model.to(best_device()), description)


def _num_tokens(protein: np.ndarray) -> int:
    return len(protein) + SPECIAL_TOKENS_PER_SEGMENT


def _check_whole(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{name}: expected a whole number, got {described(value)}")


def _check_budget(tokens_per_batch: int | None) -> None:
    if tokens_per_batch is None:
        return
    _check_whole("tokens_per_batch", tokens_per_batch)
    if tokens_per_batch < 1:
        raise ValueError(f"tokens_per_batch: expected at least 1, got {tokens_per_batch}")


def _one_of(choices: object) -> str:
    return " or ".join(map(repr, get_args(choices)))


def _positions(positions: Sequence[int] | np.ndarray | None, num_residues: int) -> np.ndarray:
    """Returns the positions that a caller asked for, int64."""
    if positions is None:
        return np.arange(num_residues)
    try:
        wanted = np.asarray(positions)
    except ValueError:
        raise ValueError("positions: expected whole numbers in one dimension, got a nested list") from None
    if wanted.ndim != 1 or (wanted.size and wanted.dtype.kind not in "iu"):
        raise ValueError(f"positions: expected whole numbers in one dimension, got {wanted.dtype} {wanted.shape}")
    wrong = np.flatnonzero((wanted < 0) | (wanted >= num_residues))
    if len(wrong):
        raise ValueError(
            f"positions[{wrong[0]}]: expected 0 to {num_residues - 1}, the positions of the sequence counted from 0, "
            f"got {wanted[wrong[0]]}"
        )
    return wanted.astype(np.int64)
