"""The float64 twin of `short_forward`: the twins of its two halves."""

from torch import Tensor

from protlm.ops.cuda.fold_keys_twin import fold_keys
from protlm.ops.cuda.read_state_twin import read_state


def short_forward(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, constants: Tensor, is_exponential: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the output of one head of a segment, and its state: means and references.

    Args:
        q: (tokens, head_dim).
        k: The real keys.
        v: Their values.
        rows: (features, head_dim), with the factor d^-¼ and the scale of `oprf` in them.
        constants: (features), added to the references for queries, to base 2; zeros except for `oprf`.
        is_exponential: Whether φ is an exponential, else ReLU.
    """
    means, references = fold_keys(k, v, rows, is_exponential)
    out, _ = read_state(q, rows, means, references + constants, is_exponential)
    return out, means, references
