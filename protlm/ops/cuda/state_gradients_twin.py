"""The float64 twin of `state_gradients`."""

from torch import Tensor

from protlm.ops.cuda.read_state_twin import query_weights


def state_gradients(
    q: Tensor, out_grad: Tensor, inner: Tensor, rows: Tensor, references: Tensor, is_exponential: bool
) -> tuple[Tensor, Tensor]:
    """Returns Σ over queries of weights ⊗ out_grad (features, head_dim), and of weights · inner (features)."""
    weights, _ = query_weights(q, rows, references, is_exponential)
    return weights.T @ out_grad.double(), weights.T @ inner.double()
