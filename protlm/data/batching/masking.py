"""Which residues are scored and what the model sees in their place: hides where the random draws come from.

Every protein has its own generator, named by what the draw may depend on and nothing else. So batch size, workers,
packing and devices change no draw.
"""

from dataclasses import dataclass

import numpy as np
import xxhash
from jaxtyping import Bool, UInt8

from protlm.vocabulary import FIRST_RESIDUE, MASK, NUM_STANDARD_RESIDUES


@dataclass(frozen=True)
class MaskRates:
    """How much of a protein is scored, and what the model sees there; the default shares are BERT's.

    Attributes:
        rate: Probability that a residue is a target, in (0, 1].
        mask_share: Part of the targets that becomes `<mask>`.
        random_share: Part of the targets that becomes a random standard residue; the rest stays as it is.
    """

    rate: float
    mask_share: float = 0.8
    random_share: float = 0.1


def training_generator(seed: int, draw_index: int) -> np.random.Generator:
    """Returns the generator of the draw_index-th protein that a training run with this seed looks at."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, draw_index], dtype=np.uint64)))


def evaluation_generator(seed: int, tokens: UInt8[np.ndarray, " residues"]) -> np.random.Generator:
    """Returns the generator of a protein in evaluation: a function of the seed and the sequence."""
    digest = xxhash.xxh3_128_digest(tokens.tobytes(), seed=seed)
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest, dtype=np.uint64)))


def mask_residues(
    tokens: UInt8[np.ndarray, " residues"], rates: MaskRates, generator: np.random.Generator
) -> tuple[UInt8[np.ndarray, " residues"], Bool[np.ndarray, " residues"]]:
    """Returns what the model sees of a protein, and the target_mask of the positions that are scored.

    Each residue is a target independently of the others; if none is drawn, one is taken uniformly. A target becomes
    `<mask>`, or a random one of the 20 standard residues, which may be the true one, or stays.

    Args:
        tokens: Residue tokens without `<cls>` and `<eos>`; at least one.
        rates: How many are targets, and what becomes of them. The shares change no choice of targets.
        generator: Where the draws come from.
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
