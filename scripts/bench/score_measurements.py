"""The two sides of the benchmark of scoring, with the same weights, and single passes of a FAVOR model."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from protlm import load_model
from protlm.data.batching.batches import pack_row
from protlm.inference.blosum import STANDARD_RESIDUES
from protlm.inference.protein_model import ProteinModel
from protlm.model.performer import Performer
from protlm.vocabulary import CLS, EOS, MASK, RESIDUES, TOKEN_IDS, TOKENS, encode
from scripts.bench.models import Sizes, building_a_peer, esm_config, performer

OURS, PEER = "protlm, masked marginals", "transformers EsmForMaskedLM (SDPA), one position at a time"
NUM_MUTANTS = len(STANDARD_RESIDUES) - 1
"""Mutants of a position."""

_TOLERANCE = 1e-4

Scorer = Callable[[str], np.ndarray]
"""Returns the scores of all single mutants of a protein, float64 (num_residues, 20); 0 for the wild type."""


def protein(length: int) -> str:
    """Returns a random protein."""
    return "".join(np.random.default_rng(0).choice(list(STANDARD_RESIDUES), size=length))


def scorers(sizes: Sizes, folder: Path, tokens_per_batch: int | None) -> dict[str, Scorer]:
    """Returns both sides: a freshly drawn model of transformers, and ours that reads its directory.

    Args:
        sizes: The shape.
        folder: An empty folder for the directory.
        tokens_per_batch: Budget of a row of ours.
    """
    with building_a_peer():
        from transformers import EsmForMaskedLM

        model = EsmForMaskedLM(esm_config(sizes, layer_norm_eps=1e-5, tie_word_embeddings=True)).eval()
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(TOKENS) + "\n")
    return {OURS: _ours(load_model(folder), tokens_per_batch), PEER: _one_at_a_time(model)}


def _ours(model: ProteinModel, tokens_per_batch: int | None) -> Scorer:
    def scores(sequence: str) -> np.ndarray:
        return _gains(model.log_probabilities(sequence, tokens_per_batch=tokens_per_batch), sequence)

    return scores


def _one_at_a_time(model: torch.nn.Module) -> Scorer:
    def scores(sequence: str) -> np.ndarray:
        tokens = torch.tensor([[CLS, *encode(sequence.encode()).tolist(), EOS]])
        rows = []
        for place in range(1, len(sequence) + 1):
            hidden = tokens.clone()
            hidden[0, place] = MASK
            with torch.inference_mode():
                rows.append(torch.log_softmax(model(input_ids=hidden).logits[0, place], -1).numpy())
        return _gains(np.stack(rows), sequence)

    return scores


def _gains(log_probabilities: np.ndarray, sequence: str) -> np.ndarray:
    columns = [TOKEN_IDS[letter] for letter in STANDARD_RESIDUES]
    wild_type = [TOKEN_IDS[letter] for letter in sequence]
    own = log_probabilities[np.arange(len(sequence)), wild_type]
    gains: np.ndarray = log_probabilities[:, columns].astype(np.float64) - own[:, None]
    return gains


def check(sides: dict[str, Scorer], sequence: str) -> None:
    """Ends the program unless both sides give the same scores."""
    ours, peer = (scorer(sequence) for scorer in sides.values())
    error = np.abs(ours - peer).max() / np.abs(peer).max()
    if not error < _TOLERANCE:
        raise SystemExit(f"error: the scores of both sides differ by {error:.1e} of the largest; nothing is timed")


def favor_model(sizes: Sizes) -> Performer:
    """Returns a model of the same shape whose attention is FAVOR in all layers."""
    return performer(sizes, attention="positive", qk_norm=False, conv_width=0).eval()


def one_pass(model: Performer, sequence: str) -> None:
    """Makes one pass of a protein, whose probabilities are taken at one position."""
    assert set(sequence) <= set(RESIDUES)
    tokens, bounds = pack_row([encode(sequence.encode())])
    with torch.no_grad():
        model(tokens, bounds, torch.tensor([1]))
