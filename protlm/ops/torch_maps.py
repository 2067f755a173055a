"""Feature maps for the chunked torch backend: how each map keeps its exponentials in range.

A map works on one stretch of a block, (heads, segments, positions, head_dim). The features of keys are relative to
references, logarithms that belong to the state of a segment: one for each feature (exponential maps), or one for the
whole head (`trig`, where it bounds exp(‖y‖²/2)). References of any value cancel in the output; they only decide which
intermediate results overflow or vanish. So no stabiliser biases the result, and there is no epsilon.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from protlm.ops.feature_maps import RELU_OFFSET, check_backend
from protlm.ops.inputs import AttentionInputs


class TorchMap(ABC):
    """The rows of the projection, and buffers that all stretches use; subclasses make features of them."""

    def __init__(self, inputs: AttentionInputs) -> None:
        heads, head_dim = inputs.q.shape[1], inputs.q.shape[-1]
        self.dtype = inputs.compute_dtype
        self.num_features = inputs.num_features
        self._norm_scale = 0.5 * head_dim**-0.5
        self._device = inputs.q.device
        self._buffers: dict[str, Tensor] = {}
        self._rows = None
        self._rows_grad: Tensor | None = None
        if inputs.projection is not None:
            definition = inputs.map_definition
            rows = definition.mirrored(definition.rescaled(inputs.projection.to(self.dtype)))
            # Rounded once to the dtype of q, so that all backends use the same rows.
            rows = rows.to(inputs.q.dtype).to(self.dtype)
            self._rows = (rows * head_dim**-0.25).expand(heads, -1, -1)

    @property
    def num_references(self) -> int:
        """Number of references in the state of one head."""
        return 1

    def enter(self, segments: Tensor) -> None:  # noqa: B027 - most maps have no constants of segments
        """Selects the constants of these segments, whose stretches follow."""

    def learn(self) -> None:
        """Sums the gradients of the rows from here on, for `parameter_gradients`."""
        self._rows_grad = None if self._rows is None else torch.zeros_like(self._rows)

    def parameter_gradients(self, inputs: AttentionInputs) -> tuple[Tensor | None, Tensor | None]:
        """Returns the gradients of the projection and of the feature bias since `learn`, of the heads of the inputs."""
        return self._projection_gradient(inputs, self._rows_grad), None

    @abstractmethod
    def key_exponents(self, k: Tensor, valid: Tensor | None) -> Tensor:
        """Returns the logarithms that references bound (…, positions, references), −∞ where a token is not real."""

    @abstractmethod
    def key_features(self, k: Tensor, exponents: Tensor) -> Tensor:
        """Returns features (…, positions, features) from exponents that are relative to the references."""

    @abstractmethod
    def query_features(self, q: Tensor, references: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns features up to a factor per query, and the logarithm of that factor; None for a factor of 1."""

    @abstractmethod
    def scaled_query_features(self, q: Tensor, references: Tensor, query_sums: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns features for the backward, and the divisor that the gradient of the output still needs."""

    @abstractmethod
    def query_gradient(self, q: Tensor, features: Tensor, grads: Tensor) -> Tensor:
        """Returns the gradient of q from that of its features; overwrites both."""

    @abstractmethod
    def key_gradient(self, k: Tensor, features: Tensor, grads: Tensor) -> Tensor:
        """Returns the gradient of k from that of its features; overwrites both."""

    def buffer(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Returns an uninitialised tensor, which the next call with this name may overwrite."""
        size = torch.Size(shape).numel()
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size:
            buffer = torch.empty(size, dtype=self.dtype, device=self._device)
            self._buffers[name] = buffer
        return buffer[:size].view(shape)

    def _scores(self, x: Tensor, name: str) -> Tensor:
        """Returns ω·x/d^¼ (heads, segments, positions, rows) in a buffer; x itself without a projection."""
        if self._rows is None:
            return self.buffer(name, tuple(x.shape)).copy_(x)
        scores = self.buffer(name, (*x.shape[:-1], self._rows.shape[-2]))
        torch.bmm(x.flatten(1, 2), self._rows.transpose(1, 2), out=scores.flatten(1, 2))
        return scores

    def _project_back(self, x: Tensor, scores_grad: Tensor) -> Tensor:
        """Returns the gradient of x, whose scores have this gradient."""
        if self._rows is None:
            return scores_grad.clone()
        if self._rows_grad is not None:
            self._rows_grad.baddbmm_(scores_grad.flatten(1, 2).transpose(1, 2), self._scaled(x).flatten(1, 2))
        return torch.bmm(scores_grad.flatten(1, 2), self._rows).view(*scores_grad.shape[:-1], -1)

    def _projection_gradient(self, inputs: AttentionInputs, rows_grad: Tensor | None) -> Tensor | None:
        projection = inputs.projection
        if projection is None or rows_grad is None:
            return None
        if projection.dim() == 2:
            rows_grad = rows_grad.sum(0)
        rows_grad = rows_grad * inputs.q.shape[-1] ** -0.25
        return inputs.map_definition.projection_gradient(projection.to(self.dtype), rows_grad).to(projection.dtype)

    def _scaled(self, x: Tensor) -> Tensor:
        """Returns x with the factor that it has in scores."""
        return x

    def _half_square(self, x: Tensor) -> Tensor:
        return x.square().sum(-1, keepdim=True).mul_(self._norm_scale)


class ExponentialMap(TorchMap):
    """Exponential maps: exp(s·ω·y − ‖y‖²/2 + constant of ω), with one reference for each feature.

    The maps differ in their rows. With an A, s = √(1−4A), and queries take the constant 2A‖ω‖² of queries and keys;
    they also take the feature bias, which belongs to the product of a query's feature and a key's.
    """

    def __init__(self, inputs: AttentionInputs) -> None:
        super().__init__(inputs)
        assert self._rows is not None
        self._scales = self._constants = None
        self._block_scale: Tensor | None = None
        self._block_constant: Tensor | None = None
        self._segments: Tensor | None = None
        self._constants_grad: Tensor | None = None
        self._head_dim = inputs.q.shape[-1]
        if inputs.oprf_a is not None:
            a = _a_of_heads(inputs)
            squares = self._rows.double().square().sum(-1).unsqueeze(1) * inputs.q.shape[-1] ** 0.5
            self._scales = (1 - 4 * a).sqrt().to(self.dtype).unsqueeze(-1)
            self._constants = (2 * a * squares).to(self.dtype)
        if inputs.feature_bias is not None:
            repeats = inputs.map_definition.features_per_row
            bias = inputs.feature_bias.detach().to(self.dtype).expand(len(self._rows), -1).repeat(1, repeats)
            bias = bias.unsqueeze(1).expand(-1, inputs.num_segments, -1)
            self._constants = bias if self._constants is None else self._constants + bias

    @property
    def num_references(self) -> int:
        """One for each feature."""
        return self.num_features

    def enter(self, segments: Tensor) -> None:
        """Selects s and the constants of these segments."""
        self._segments = segments
        if self._scales is not None:
            self._block_scale = self._scales[:, segments]
        if self._constants is not None:
            self._block_constant = self._constants[:, segments]

    def learn(self) -> None:
        """Sums the gradients of the rows and of the constants from here on."""
        super().learn()
        if self._constants is not None:
            self._constants_grad = torch.zeros_like(self._constants, memory_format=torch.contiguous_format)

    def parameter_gradients(self, inputs: AttentionInputs) -> tuple[Tensor | None, Tensor | None]:
        """Returns the gradients of the projection and of the feature bias since `learn`, of the heads of the inputs."""
        rows_grad, constants_grad, bias, bias_grad = self._rows_grad, self._constants_grad, inputs.feature_bias, None
        if bias is not None and constants_grad is not None:
            bias_grad = constants_grad.sum(1).view(len(constants_grad), -1, bias.shape[-1]).sum(1)
            bias_grad = (bias_grad if bias.dim() == 2 else bias_grad.sum(0)).to(bias.dtype)
        if inputs.oprf_a is not None and rows_grad is not None and constants_grad is not None:
            # Of 2A‖ω‖², where the rows are ω/d^¼.
            pull = (4 * _a_of_heads(inputs) * constants_grad).sum(1).to(self.dtype) * self._head_dim**0.5
            rows_grad = rows_grad + pull.unsqueeze(-1) * self._rows
        return self._projection_gradient(inputs, rows_grad), bias_grad

    def key_exponents(self, k: Tensor, valid: Tensor | None) -> Tensor:
        """Returns the exponents s·ω·y − ‖y‖²/2."""
        exponents = self._scores(self._scaled(k), "keys").sub_(self._half_square(k))
        return exponents if valid is None else exponents.masked_fill_(~valid[..., None], -torch.inf)

    def key_features(self, k: Tensor, exponents: Tensor) -> Tensor:
        """Returns the exponentials of the exponents."""
        return exponents.exp_()

    def absolute_query_exponents(self, q: Tensor) -> Tensor:
        """Returns exponents with which Σ exp(query exponent + key exponent) over features is the estimate itself.

        They take all that a query's features and a key's have in common: the constants, and the division by the number
        of features; so there is nothing absolute about those of `key_exponents`.
        """
        offsets = self._half_square(q).add_(math.log(self.num_features))
        if self._block_scale is not None:
            # (1−4A)^(d/2), of two features.
            offsets = offsets - self._head_dim * self._block_scale.log()
        exponents = self._scores(self._scaled(q), "queries").sub_(offsets)
        return exponents if self._block_constant is None else exponents.add_(self._block_constant.unsqueeze(2))

    def query_features(self, q: Tensor, references: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns exponentials relative to the largest one of each query; ‖y‖² of a query cancels."""
        exponents = self._query_exponents(q, references)
        maxima = exponents.amax(-1, keepdim=True)
        return exponents.sub_(maxima).exp_(), maxima

    def scaled_query_features(self, q: Tensor, references: Tensor, query_sums: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns features divided by the renormaliser, whose logarithm query_sums is."""
        return self._query_exponents(q, references).sub_(query_sums).exp_(), None

    def query_gradient(self, q: Tensor, features: Tensor, grads: Tensor) -> Tensor:
        """Returns the gradient through the exponential and the projection."""
        grads.mul_(features)
        self._learn_constants(grads)
        return self._scaled(self._project_back(q, grads))

    def absolute_query_gradient(self, q: Tensor, features: Tensor, grads: Tensor) -> Tensor:
        """Returns the gradient through `absolute_query_exponents`; overwrites grads."""
        q_grad = self.key_gradient(q, features, grads)
        self._learn_constants(grads)
        return q_grad

    def key_gradient(self, k: Tensor, features: Tensor, grads: Tensor) -> Tensor:
        """Returns the gradient through the exponential, the projection and ‖y‖²."""
        grads.mul_(features)
        k_grad = self._scaled(self._project_back(k, grads))
        return k_grad.addcmul_(grads.sum(-1, keepdim=True), k, value=-2 * self._norm_scale)

    def _query_exponents(self, q: Tensor, references: Tensor) -> Tensor:
        if self._block_constant is not None:
            references = references + self._block_constant
        return self._scores(self._scaled(q), "queries").add_(references.unsqueeze(2))

    def _learn_constants(self, exponents_grad: Tensor) -> None:
        if self._constants_grad is not None:
            self._constants_grad[:, self._segments] += exponents_grad.sum(2)

    def _scaled(self, x: Tensor) -> Tensor:
        """Returns s·x."""
        return x if self._block_scale is None else x * self._block_scale


def _a_of_heads(inputs: AttentionInputs) -> Tensor:
    """Returns A (heads, segments, 1) in float64."""
    assert inputs.oprf_a is not None
    return inputs.oprf_a.detach().double().expand(inputs.num_segments, -1).T.unsqueeze(-1)


class _LinearMap(TorchMap):
    """Maps whose features are no exponentials: queries have no factor to divide out, and query sums are plain sums."""

    def query_features(self, q: Tensor, references: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns the features, with no factor divided out."""
        return self._linear_features(q, "queries"), None

    def scaled_query_features(self, q: Tensor, references: Tensor, query_sums: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns the features, and the renormaliser as the divisor."""
        return self._linear_features(q, "queries"), query_sums

    @abstractmethod
    def _linear_features(self, x: Tensor, name: str) -> Tensor:
        """Returns the features of x, without the factor of a key, in a buffer."""


class TrigMap(_LinearMap):
    """`trig`: exp(‖y‖²/2)·(sin ω·y, cos ω·y); the factor of a query cancels, that of a key has one reference a head."""

    def key_exponents(self, k: Tensor, valid: Tensor | None) -> Tensor:
        """Returns the exponents ‖y‖²/2."""
        exponents = self._half_square(k)
        return exponents if valid is None else exponents.masked_fill_(~valid[..., None], -torch.inf)

    def key_features(self, k: Tensor, exponents: Tensor) -> Tensor:
        """Returns the features exp(exponents)·(sin ω·y, cos ω·y)."""
        return self._linear_features(k, "keys").mul_(exponents.exp_())

    def query_gradient(self, q: Tensor, features: Tensor, grads: Tensor) -> Tensor:
        """Returns the gradient through sine, cosine and the projection."""
        sines, cosines = features.chunk(2, -1)
        sine_grads, cosine_grads = grads.chunk(2, -1)
        return self._project_back(q, sine_grads.mul_(cosines).sub_(cosine_grads.mul_(sines)).contiguous())

    def key_gradient(self, k: Tensor, features: Tensor, grads: Tensor) -> Tensor:
        """Returns the gradient through sine, cosine, the projection and exp(‖y‖²/2)."""
        norm_grad = torch.linalg.vecdot(features, grads).unsqueeze(-1)
        return self.query_gradient(k, features, grads).addcmul_(norm_grad, k, value=2 * self._norm_scale)

    def _linear_features(self, x: Tensor, name: str) -> Tensor:
        scores = self._scores(x, "scores")
        features = self.buffer(name, (*x.shape[:-1], self.num_features))
        sines, cosines = features.chunk(2, -1)
        torch.sin(scores, out=sines)
        torch.cos(scores, out=cosines)
        return features


class ReluMap(_LinearMap):
    """`relu`: max(ω·y, 0) + 1e-3; the exponents of keys only mark which keys are real."""

    def key_exponents(self, k: Tensor, valid: Tensor | None) -> Tensor:
        """Returns 0 for every real key, −∞ for others."""
        exponents = torch.zeros_like(k[..., :1])
        return exponents if valid is None else exponents.masked_fill_(~valid[..., None], -torch.inf)

    def key_features(self, k: Tensor, exponents: Tensor) -> Tensor:
        """Returns the features of real keys, and zeros for others."""
        return self._linear_features(k, "keys").mul_(exponents.exp_())

    def query_gradient(self, q: Tensor, features: Tensor, grads: Tensor) -> Tensor:
        """Returns the gradient through the ReLU, zero where a feature is at its offset, and the projection."""
        return self._project_back(q, grads.mul_(features > RELU_OFFSET))

    def key_gradient(self, k: Tensor, features: Tensor, grads: Tensor) -> Tensor:
        """Returns the gradient through the ReLU, zero where a feature is at its offset, and the projection."""
        return self.query_gradient(k, features, grads)

    def _linear_features(self, x: Tensor, name: str) -> Tensor:
        return self._scores(x, name).clamp_(min=0).add_(RELU_OFFSET)


_LINEAR_MAPS: dict[str, type[TorchMap]] = {"trig": TrigMap, "relu": ReluMap}


def torch_map(inputs: AttentionInputs) -> TorchMap:
    """Returns the map of one call of the op.

    Raises:
        ValueError: This backend does not compute the map.
    """
    check_backend(inputs.feature_map, "torch")
    if inputs.is_exponential:
        return ExponentialMap(inputs)
    if inputs.feature_map not in _LINEAR_MAPS:
        raise ValueError(f"feature_map: expected one of {tuple(_LINEAR_MAPS)}, got {inputs.feature_map!r}")
    return _LINEAR_MAPS[inputs.feature_map](inputs)
