"""The models that the embedding benchmark compares: how each is built and gets the hidden states of proteins."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from protlm.config import SPECIAL_TOKENS_PER_SEGMENT
from protlm.data.batching.batches import pack_row
from protlm.inference.precision import set_precision
from protlm.model.performer import Performer
from protlm.pretrained.model_description import ModelDescription
from protlm.pretrained.model_directory import save_model
from protlm.vocabulary import CLS, EOS, PAD, RESIDUES, encode
from scripts.bench import models
from scripts.bench.models import Sizes, building_a_peer, esm_config

EXACT, FAVOR = "protlm, exact", "protlm, FAVOR"
EXACT_HALF = "protlm, exact, bfloat16"
OURS = (EXACT, FAVOR, EXACT_HALF)
ESM_PEER, FAIR_PEER = "transformers EsmModel (SDPA), one by one", "fair-esm, as its extract.py"
PADDED_PEER = "transformers EsmModel (SDPA), 8 at a time, padded"
HALF_PEER = "transformers EsmModel (SDPA), bfloat16, one by one"
PEER_MODULES = {
    **dict.fromkeys((ESM_PEER, PADDED_PEER, HALF_PEER), "transformers"),
    FAIR_PEER: "esm",
}
_PADDED_PROTEINS = 8
FAIR_TOKENS = 4096
"""Tokens of a batch of extract.py by default."""
FAIR_MAX_RESIDUES = 1022
"""Residues after which extract.py cuts a protein by default."""


class Embedder(Protocol):
    """A model that computes the last hidden states of proteins in its own best way."""

    def __call__(self, sequences: Sequence[str]) -> Iterator[Tensor]:
        """Yields hidden states of every token, (…, model_dim); none is kept."""
        ...


def why_missing(name: str) -> str:
    """Returns why a model cannot take part; empty if it can."""
    reason = models.why_missing(PEER_MODULES[name]) if name in PEER_MODULES else ""
    if name == FAIR_PEER and not reason and not hasattr(sys.modules[PEER_MODULES[name]], "ESM2"):
        return "it needs fair-esm, and another package is called esm here"
    return reason


def build(name: str, sizes: Sizes, tokens_per_batch: int) -> Embedder:
    """Returns a freshly drawn model."""
    if name == ESM_PEER:
        return transformers_esm(sizes)
    if name == PADDED_PEER:
        return transformers_esm(sizes, _PADDED_PROTEINS)
    if name == HALF_PEER:
        return transformers_esm(sizes, dtype=torch.bfloat16)
    if name == FAIR_PEER:
        return _fair_esm(sizes)
    model = performer(sizes, "positive" if name == FAVOR else "softmax")
    if name == EXACT_HALF:
        set_precision(model, "bf16")
    return Packed(model, tokens_per_batch)


def performer(sizes: Sizes, attention: Any) -> Performer:
    """Returns a model of the shape of ESM-2: rotary positions, no convolution, no qk_norm."""
    return models.performer(sizes, attention=attention, qk_norm=False, conv_width=0).eval()


def save(model: Performer, folder: Path) -> None:
    """Writes the model directory of a model that was never trained."""
    description = ModelDescription(
        model=model.config, mask_rate=0.15, redraw_every_steps=0, seed=0, step=0,
        residue_counts=dict.fromkeys(RESIDUES, 0), dataset_hash="",
    )  # fmt: skip
    save_model(folder, model, description)


def check(embedders: dict[str, Embedder], sequences: Sequence[str], model_dim: int) -> None:
    """Ends the program unless each model gives finite hidden states of every residue."""
    for name, embed in embedders.items():
        states = [state.reshape(-1, model_dim) for state in embed(sequences)]
        num_tokens, expected = sum(map(len, states)), sum(len(sequence) for sequence in sequences)
        if num_tokens < expected or not all(bool(state.isfinite().all()) for state in states):
            sys.exit(f"error: {name}: expected finite hidden states of {expected} residues and more, got {num_tokens} "
                     "or some that are not finite; nothing is timed")  # fmt: skip


class Packed:
    """protlm: proteins by length, back to back in rows."""

    def __init__(self, model: Performer, tokens_per_batch: int, device: str = "cpu") -> None:
        self._model, self._tokens_per_batch, self._device = model, tokens_per_batch, device

    def __call__(self, sequences: Sequence[str]) -> Iterator[Tensor]:
        """Yields the hidden states of every row."""
        last = self._model.config.num_layers
        for row in self._rows(sequences):
            with torch.inference_mode():
                tokens, bounds = (x.to(self._device) for x in pack_row(row))
                yield self._model.hidden_states(tokens, bounds, (last,))[last]

    def _rows(self, sequences: Sequence[str]) -> Iterator[list[np.ndarray]]:
        row: list[np.ndarray] = []
        free = self._tokens_per_batch
        for protein in (encode(sequence.encode()) for sequence in sorted(sequences, key=len)):
            size = len(protein) + SPECIAL_TOKENS_PER_SEGMENT
            if row and size > free:
                yield row
                row, free = [], self._tokens_per_batch
            row.append(protein)
            free -= size
        yield row


def transformers_esm(
    sizes: Sizes, num_proteins: int = 1, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Embedder:
    """Returns ESM-2 as transformers has it; one protein at a time has no padding, its fastest way on a CPU.

    Args:
        sizes: The shape.
        num_proteins: Proteins of a batch, in the order in which they come, as most scripts take them.
        device: Where it computes.
        dtype: That of weights and products.
    """
    with building_a_peer():
        from transformers import EsmModel

        model = EsmModel(esm_config(sizes, layer_norm_eps=1e-5), add_pooling_layer=False).eval().to(device, dtype)

    def embed(sequences: Sequence[str]) -> Iterator[Tensor]:
        for start in range(0, len(sequences), num_proteins):
            rows = [
                torch.tensor([CLS, *encode(sequence.encode()).tolist(), EOS])
                for sequence in sequences[start : start + num_proteins]
            ]
            tokens = pad_sequence(rows, batch_first=True, padding_value=PAD)
            mask = None if len(rows) == 1 else (tokens != PAD).long().to(device)
            with torch.inference_mode():
                yield model(input_ids=tokens.to(device), attention_mask=mask).last_hidden_state

    return embed


def _fair_esm(sizes: Sizes) -> Embedder:
    """Returns fair-esm's model, given batches as its scripts/extract.py makes them: padded, no contacts by default."""
    if sizes.ffn_dim != 4 * sizes.model_dim:
        raise ValueError(f"ffn_dim: expected {4 * sizes.model_dim}, which fair-esm has, got {sizes.ffn_dim}")
    with building_a_peer():
        from esm import ESM2, FastaBatchedDataset

        model = ESM2(sizes.num_layers, sizes.model_dim, sizes.num_heads).eval()

    def embed(sequences: Sequence[str]) -> Iterator[Tensor]:
        dataset = FastaBatchedDataset([str(index) for index in range(len(sequences))], sequences)
        convert = model.alphabet.get_batch_converter(FAIR_MAX_RESIDUES)
        for indices in dataset.get_batch_indices(FAIR_TOKENS, extra_toks_per_seq=1):
            _, _, tokens = convert([dataset[index] for index in indices])
            # As the script: no_grad, where inference_mode would be a little faster.
            with torch.no_grad():
                out = model(tokens, repr_layers=[sizes.num_layers], return_contacts=False)
            yield out["representations"][sizes.num_layers]

    return embed
