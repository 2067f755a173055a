"""Which residues are scored and what the model sees in their place: hides where the random draws come from.

Every protein has its own generator, named by what the draw may depend on and nothing else. So batch size, workers,
packing and devices change no draw.
"""

import numpy as np
import xxhash
from jaxtyping import Bool, UInt8

from protlm.vocabulary import FIRST_RESIDUE, MASK, NUM_STANDARD_RESIDUES

# BERT's proportions: of the scored positions 80 % become <mask>, 10 % a random standard residue, 10 % stay.
_MASKED_SHARE = 0.8
_RANDOM_SHARE = 0.1


def training_generator(seed: int, draw_index: int) -> np.random.Generator:
    """Returns the generator of the draw_index-th protein that a training run with this seed looks at."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, draw_index], dtype=np.uint64)))


def evaluation_generator(seed: int, tokens: UInt8[np.ndarray, " residues"]) -> np.random.Generator:
    """Returns the generator of a protein in evaluation: a function of the seed and the sequence."""
    digest = xxhash.xxh3_128_digest(tokens.tobytes(), seed=seed)
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest, dtype=np.uint64)))


def mask_residues(
    tokens: UInt8[np.ndarray, " residues"], mask_rate: float, generator: np.random.Generator
) -> tuple[UInt8[np.ndarray, " residues"], Bool[np.ndarray, " residues"]]:
    """Returns what the model sees of a protein, and the target_mask of the positions that are scored.

    Each residue is a target independently with probability mask_rate; if none is drawn, one is taken uniformly. A
    target becomes `<mask>` (80 %), a random one of the 20 standard residues (10 %) or stays (10 %).

    Args:
        tokens: Residue tokens without `<cls>` and `<eos>`; at least one.
        mask_rate: In (0, 1].
        generator: Where the draws come from.
    """
    target_mask = generator.random(len(tokens)) < mask_rate
    if not target_mask.any():
        target_mask[generator.integers(len(tokens))] = True
    fate = generator.random(len(tokens))
    replacements = generator.integers(FIRST_RESIDUE, FIRST_RESIDUE + NUM_STANDARD_RESIDUES, len(tokens), dtype=np.uint8)
    seen = tokens.copy()
    masked = target_mask & (fate < _MASKED_SHARE)
    replaced = target_mask & ~masked & (fate < _MASKED_SHARE + _RANDOM_SHARE)
    seen[masked] = MASK
    seen[replaced] = replacements[replaced]
    return seen, target_mask
