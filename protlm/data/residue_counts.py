"""Counts of residues: by compiled code where it was built, by NumPy elsewhere."""

import numpy as np

from protlm import vocabulary
from protlm.data import compiled

_COUNTED_TOKENS = 1 << 20


def count_residues(tokens: np.ndarray) -> np.ndarray:
    """Returns the count of each residue, in token order, int64 of shape (25,); other tokens are not counted.

    Args:
        tokens: Tokens, uint8 of one axis.

    Raises:
        ValueError: An array of another type or rank.
    """
    if tokens.dtype != np.uint8 or tokens.ndim != 1:
        raise ValueError(f"tokens: expected uint8 of one axis, got {tokens.dtype} of shape {tokens.shape}")
    counts = np.zeros(vocabulary.NUM_RESIDUES, dtype=np.int64)
    if compiled.is_available():
        tokens = np.ascontiguousarray(tokens)
        compiled.library().protlm_count_residues(tokens.ctypes.data, len(tokens), counts.ctypes.data)
    else:
        residues = slice(vocabulary.FIRST_RESIDUE, vocabulary.FIRST_RESIDUE + vocabulary.NUM_RESIDUES)
        # In slices, because bincount makes eight bytes of each token.
        for start in range(0, len(tokens), _COUNTED_TOKENS):
            counts += np.bincount(tokens[start : start + _COUNTED_TOKENS], minlength=residues.stop)[residues]
    return counts
