"""Masking, the choice of scored residues and of the tokens seen in their place: hides the source of the random draws.

Every protein has its own generator, a function of only what its draws may depend on. So batch size, workers, packing
and devices change no draw.
"""

from dataclasses import dataclass

import numpy as np
import xxhash
from jaxtyping import Bool, UInt8

from protlm.vocabulary import FIRST_RESIDUE, MASK, NUM_STANDARD_RESIDUES

EVALUATION_SEED = 0
"""Default seed of the masks in evaluation; validation during training always uses it."""


@dataclass(frozen=True)
class MaskRates:
    """The rates at which residues are scored and replaced; the default shares are those of BERT.

    Attributes:
        rate: Probability that a residue is a target, in (0, 1].
        mask_share: Fraction of the targets that become `<mask>`.
        random_share: Fraction of the targets that become a random standard residue; the others stay as they are.
    """

    rate: float
    mask_share: float = 0.8
    random_share: float = 0.1


@dataclass(frozen=True)
class Objective:
    """The training objective.

    Attributes:
        causal: Predict each token from those before it and hide nothing; otherwise predict hidden residues from all
            other tokens.
        rates: Rates of hidden residues; unused if causal.
    """

    causal: bool
    rates: MaskRates

    def hiding_all(self) -> "Objective":
        """Returns the objective of an evaluation: the same targets, all of them hidden, so that none can be copied."""
        return Objective(self.causal, MaskRates(self.rates.rate, mask_share=1.0, random_share=0.0))


def training_generator(seed: int, draw_index: int) -> np.random.Generator:
    """Returns the generator of the protein with this number among all draws of a training run."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, draw_index], dtype=np.uint64)))


def evaluation_generator(seed: int, tokens: UInt8[np.ndarray, " residues"]) -> np.random.Generator:
    """Returns the generator of a protein in evaluation: a function of the seed and the sequence."""
    digest = xxhash.xxh3_128_digest(tokens.tobytes(), seed=seed)
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest, dtype=np.uint64)))


def mask_residues(
    tokens: UInt8[np.ndarray, " residues"], rates: MaskRates, generator: np.random.Generator
) -> tuple[UInt8[np.ndarray, " residues"], Bool[np.ndarray, " residues"]]:
    """Returns the tokens that the model sees of a protein, and the target_mask of the positions that are scored.

    Each residue becomes a target independently; if none does, one is drawn uniformly. A target is replaced by `<mask>`
    or by a random one of the 20 standard residues, which may be the true one, or stays as it is.

    Args:
        tokens: Residue tokens without `<cls>` and `<eos>`; at least one.
        rates: Rates of targets and of their replacements. The shares do not affect which residues are targets.
        generator: Generator of this protein.
    """
    target_mask = generator.random(len(tokens)) < rates.rate
    if not target_mask.any():
        target_mask[generator.integers(len(tokens))] = True
    fate = generator.random(len(tokens))
    replacements = generator.integers(FIRST_RESIDUE, FIRST_RESIDUE + NUM_STANDARD_RESIDUES, len(tokens), dtype=np.uint8)
    seen = tokens.copy()
    masked = target_mask & (fate < rates.mask_share)
    replaced = target_mask & ~masked & (fate < rates.mask_share + rates.random_share)
    seen[masked] = MASK
    seen[replaced] = replacements[replaced]
    return seen, target_mask
