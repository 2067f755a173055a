"""A trained model with exact attention becomes one whose attention estimates the same weights, from the same numbers.

The relative variance of an estimated weight grows with ‖x + y‖², x = q/d^¼ and y = k/d^¼, while the weight itself
depends on x·y alone. Two changes leave every x·y as it is and make the sums smaller: a matrix A of each head, x → A x
and y → A⁻ᵀ y (balancing), and a shift of the random rows to the mean of x + y, which acts as if x and y were centred.
Both follow from the moments of x and y on proteins of the kind that the model is for.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from protlm.choices import EXACT_KINDS, AttentionKind, Balance, NearFarMap
from protlm.config import ModelConfig
from protlm.inference.attention_weights import visit_protein
from protlm.model.attention import SelfAttention
from protlm.model.attention_calls import AttentionCall
from protlm.model.half_precision import halve
from protlm.model.performer import Performer
from protlm.model.skeleton import skeleton
from protlm.runtime.progress import Advance, no_advance

_RIDGE = 1e-4
"""Share of the mean square that is added to every variance: where a head hardly varies there is little to balance."""

_LEAST_RIDGE = 1e-6
"""The same for heads whose q or k are zero: A then is at most a thousand times as large as it would be without."""


@dataclass(frozen=True, kw_only=True)
class SwapSettings:
    """The attention that takes the place of exact attention.

    Attributes:
        attention: The feature map.
        num_features: Random rows of each head.
        near_block: Tokens of a block whose weights, and those of the blocks beside it, stay exact; 0: none do.
        balance: `none`; `diagonal`: A is a number for each dimension, or for each pair that positions rotate together;
            `dense`: a whole matrix.
        seed: Of the random rows.
    """

    attention: NearFarMap
    num_features: int
    near_block: int
    balance: Balance
    seed: int


class Moments:
    """The means and second moments of the x and y of one layer, over the tokens of some proteins, in float64.

    Attributes:
        num_tokens: Tokens.
    """

    def __init__(self, num_heads: int, head_dim: int) -> None:
        self.num_tokens = 0
        self._sums = torch.zeros(2, num_heads, head_dim, dtype=torch.float64)
        self._products = torch.zeros(2, num_heads, head_dim, head_dim, dtype=torch.float64)

    def add(self, call: AttentionCall) -> None:
        """Adds the tokens of a row."""
        self.num_tokens += len(call.q)
        for place, x in enumerate((call.q, call.k)):
            by_head = x.detach().double().cpu().transpose(0, 1) * x.shape[-1] ** -0.25
            self._sums[place] += by_head.sum(1)
            self._products[place] += by_head.mT @ by_head

    @property
    def means(self) -> Tensor:
        """The means of x and of y, float64 (2, heads, head_dim)."""
        return self._sums / self.num_tokens

    @property
    def covariances(self) -> Tensor:
        """The covariances of x and of y, float64 (2, heads, head_dim, head_dim), positive definite."""
        means = self.means
        covariances = self._products / self.num_tokens - means.unsqueeze(-1) * means.unsqueeze(-2)
        size = covariances.shape[-1]
        # Of the squares and not of the variances: a head that is constant must not be blown up.
        mean_squares = (self._products / self.num_tokens).diagonal(dim1=-2, dim2=-1).mean(-1)
        ridge = _RIDGE * mean_squares + _LEAST_RIDGE
        return covariances + ridge[..., None, None] * torch.eye(size, dtype=torch.float64)


def measure_moments(model: Performer, proteins: Iterable[np.ndarray], advance: Advance = no_advance) -> list[Moments]:
    """Returns the moments of every layer, first layer first.

    Args:
        model: On any device.
        proteins: Residue tokens of each protein, uint8; nothing is hidden.
        advance: Called with the residues of each protein.

    Raises:
        ValueError: There is no protein, one does not fit (see `visit_protein`), or q and k that are not finite.
    """
    moments = [Moments(model.config.num_heads, model.config.head_dim) for _ in model.config.kinds]
    for protein in proteins:
        visit_protein(model, protein, lambda call: moments[call.layer - 1].add(call))
        advance(len(protein))
    if not moments[0].num_tokens:
        raise ValueError("proteins: expected at least one, got none")
    if not all(torch.isfinite(layer.covariances).all() for layer in moments):
        raise ValueError("model: its queries and keys are not finite on these proteins; the model is of no use")
    return moments


def balancing_matrices(covariances: Tensor, balance: Balance, *, are_rotated: bool) -> Tensor:
    """Returns the matrix A of each head, symmetric, float64 (heads, head_dim, head_dim).

    `dense` is A = (Σx⁻¹ # Σy)^½ with the geometric mean # of matrices: of all A it minimises the mean of
    ‖A x‖² + ‖A⁻ᵀ y‖², and both covariances become equal. `diagonal` is its like for diagonal A.

    Args:
        covariances: Of x and of y, (2, heads, head_dim, head_dim).
        balance: The kind of A.
        are_rotated: Whether A has to commute with rotary positions, which rotate dimension i with i + head_dim/2:
            `diagonal` then has one number for both.
    """
    of_x, of_y = covariances
    heads, size = of_x.shape[:2]
    if balance == "none":
        return torch.eye(size, dtype=torch.float64).expand(heads, size, size)
    if balance == "diagonal":
        variances = covariances.diagonal(dim1=-2, dim2=-1)
        if are_rotated:
            variances = variances.reshape(2, heads, 2, size // 2).sum(-2).repeat(1, 1, 2)
        return torch.diag_embed((variances[1] / variances[0]) ** 0.25)
    root, inverse_root = _power(of_x, 0.5), _power(of_x, -0.5)
    mean = inverse_root @ _power(root @ of_y @ root, 0.5) @ inverse_root
    return _power(mean, 0.5)


def _power(matrices: Tensor, exponent: float) -> Tensor:
    """Returns a power of symmetric positive matrices."""
    values, vectors = torch.linalg.eigh((matrices + matrices.mT) / 2)
    powers = values.clamp_min(torch.finfo(values.dtype).tiny).pow(exponent)
    result: Tensor = (vectors * powers.unsqueeze(-2)) @ vectors.mT
    return result


def exact_twin(model: Performer) -> Performer:
    """Returns the model with exact attention in the place of its estimates; tensors are shared.

    Exact attention gives the same with balanced q and k as with those before: it is that of the model of before a swap,
    as long as the weights were not trained since.

    Raises:
        ValueError: The model is no estimator.
    """
    if not model.config.estimator:
        raise ValueError("model: expected estimates of exact attention, as protlm convert makes them")
    kinds = tuple(kind if kind in EXACT_KINDS else "softmax" for kind in model.config.attention)
    changes = {"attention": kinds, "estimator": False, "qk_balance": False}
    result = skeleton(ModelConfig.model_validate({**model.config.model_dump(), **changes}))
    state = model.state_dict()
    dtype = model.encoder_layers()[0].ffn_out.weight.dtype
    if dtype != torch.float32:
        halve(result, dtype)
    result.load_state_dict({name: state[name] for name in result.state_dict()}, assign=True)
    return result.eval()


def check_swappable(config: ModelConfig) -> None:
    """Raises ValueError if a model has no exact attention over whole proteins, or one that cannot be estimated."""
    if "softmax" not in config.kinds:
        raise ValueError(f"has no exact attention over whole proteins to swap, but {config.attention_name}")
    if config.feature_maps:
        raise ValueError(f"has layers with random features already ({config.attention_name})")
    if config.local_bias:
        raise ValueError("has a learned prior on near tokens (local_bias), which no feature map estimates")


def swapped_config(config: ModelConfig, settings: SwapSettings) -> ModelConfig:
    """Returns the settings of a model after the swap.

    Raises:
        ValueError: As `check_swappable`, or settings that do not fit the model.
    """
    check_swappable(config)
    kind: AttentionKind = "near-far" if settings.near_block else settings.attention
    changes = {
        "attention": tuple(kind if each == "softmax" else each for each in config.attention),
        "num_features": settings.num_features,
        "near_map": settings.attention,
        "near_block": settings.near_block or config.near_block,
        "projection": "orthogonal",
        "estimator": True,
        "qk_balance": settings.balance != "none" and not _folds(config, settings.balance),
    }
    return ModelConfig.model_validate({**config.model_dump(), **changes})


def _folds(config: ModelConfig, balance: Balance) -> bool:
    """Returns whether balancing is part of the weights of q and k, and so costs nothing: nothing stands between."""
    if config.qk_norm or config.qk_layer_norm or config.conv_width or config.rescale_qk:
        return False
    return balance == "diagonal" or config.positions != "rotary"


@torch.no_grad()
def swap_attention(model: Performer, settings: SwapSettings, moments: Sequence[Moments] | None) -> Performer:
    """Returns a model whose layers estimate the exact attention of those of another; all other numbers are equal.

    Tensors that do not change are shared with the other model, so that neither must be trained. The random rows of a
    layer are a function of the seed, the layer and their number.

    Args:
        model: The model with exact attention.
        settings: What takes its place.
        moments: Of every layer, of `measure_moments`; None only with `balance` = `none`.

    Raises:
        ValueError: The model has nothing to swap, settings that do not fit it, or moments that are missing.
    """
    if moments is None and settings.balance != "none":
        raise ValueError(f"moments: expected those of every layer for balance = {settings.balance!r}, got none")
    config = swapped_config(model.config, settings)
    result, device = skeleton(config), model.embedding.weight.device
    state = model.state_dict()
    new = {
        name: torch.empty(tensor.shape, device=device)
        for name, tensor in result.state_dict().items()
        if name not in state
    }
    result.load_state_dict({**state, **new}, assign=True)
    result.eval()
    for number, (layer, kind) in enumerate(zip(result.layers, model.config.kinds, strict=True)):
        attention = layer.attention
        assert isinstance(attention, SelfAttention)
        if kind != "softmax":
            continue
        generator = torch.Generator().manual_seed(settings.seed * len(result.layers) + number)
        attention.reset_balance()
        if moments is not None and settings.balance != "none":
            _balance(attention, config, settings, moments[number])
        attention.redraw(generator)
    return result


def _balance(attention: SelfAttention, config: ModelConfig, settings: SwapSettings, moments: Moments) -> None:
    """Sets the balance of a layer, in its weights or as its matrices, and the shift of its random rows."""
    matrices = balancing_matrices(
        moments.covariances, settings.balance, are_rotated=config.positions == "rotary" and not config.qk_balance
    )
    # Symmetric, so its inverse is the inverse of its transpose.
    inverses = torch.linalg.inv(matrices)
    means = moments.means.unsqueeze(-1)
    if settings.attention == "positive" and attention.feature_shift is not None:
        attention.feature_shift.copy_((matrices @ means[0] + inverses @ means[1]).squeeze(-1))
    if attention.query_balance is not None and attention.key_balance is not None:
        attention.query_balance.copy_(matrices)
        attention.key_balance.copy_(inverses)
        return
    for linear, factors in ((attention.query, matrices), (attention.key, inverses)):
        for parameter in (linear.weight, linear.bias):
            by_head = parameter.double().cpu().reshape(attention.num_heads, attention.head_dim, -1)
            # In memory of its own: that of the exact model stays as it is.
            parameter.data = (factors @ by_head).reshape(parameter.shape).to(parameter)
