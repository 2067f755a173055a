"""The memory of a training step, estimated from the shapes in the settings before anything is allocated."""

from dataclasses import dataclass

from protlm.choices import AttentionKind
from protlm.config import Config, ModelConfig
from protlm.errors import ConfigError
from protlm.model.shapes import tensor_shapes
from protlm.runtime.devices import gigabytes
from protlm.workflows.train.frozen import untrained_names
from protlm.workflows.train.stage import learned_features

_FLOAT_BYTES = 4
_SHORT_BYTES = 2
_GRADIENTS_AT_ONCE = 2
"""Gradients per token, in units of model_dim, that exist at the peak of the backward pass, which frees as it goes."""


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """The memory that training takes on a device that holds the whole model.

    Attributes:
        parameters: Number of trained parameters.
        projections: Number of entries of the random projections.
        weights_bytes: Parameters, frozen ones too, and projections.
        gradients_bytes: Gradients of all trained parameters.
        optimizer_bytes: Moments of AdamW, momentum of Muon.
        activations_bytes: Tensors that a row keeps for the backward pass, and those that the pass works with.
        teacher_bytes: The weights of a teacher, and what it computes for a row; every device has all of it.
    """

    parameters: int
    projections: int
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    teacher_bytes: int = 0

    @property
    def state_bytes(self) -> int:
        """Weights, gradients and the state of the optimizer, which do not depend on the row."""
        return self.weights_bytes + self.gradients_bytes + self.optimizer_bytes

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return self.state_bytes + self.activations_bytes + self.teacher_bytes


def estimate_memory(config: Config, *, in_place: bool = True, teacher: ModelConfig | None = None) -> MemoryEstimate:
    """Returns the memory of a training step: activations within about a third, the rest exactly.

    Args:
        config: Settings of the run; a device is taken to hold the whole model and one row of tokens_per_batch.
        in_place: Whether the device is a CPU, where some layers keep less.
        teacher: The shape of the teacher; None without one, and while it is unknown.

    Raises:
        ConfigError: Patterns to freeze that match nothing.
    """
    tensors = tensor_shapes(config.model)
    learned = set(learned_features(config))
    parameters = {name: tensor for name, tensor in tensors.items() if tensor.role != "fixed" or name in learned}
    frozen = untrained_names(parameters, config)
    num_parameters = sum(tensor.size for tensor in parameters.values())
    num_trained = num_parameters - sum(parameters[name].size for name in frozen)
    matrices = {name: tensor.size for name, tensor in parameters.items() if tensor.role == "matrix"}
    num_matrices = sum(matrices.values())
    num_projections = sum(tensor.size for tensor in tensors.values()) - num_parameters
    trained_matrices = sum(size for name, size in matrices.items() if name not in frozen)
    num_muons = trained_matrices if config.train.optimizer == "muon" else 0
    activations = _activations_bytes(config, on_cpu=in_place)
    if config.train.precision == "bf16-mixed":
        # Autocast keeps a bfloat16 copy of every weight matrix.
        activations += _SHORT_BYTES * num_matrices
    return MemoryEstimate(
        parameters=num_trained,
        projections=num_projections,
        weights_bytes=_FLOAT_BYTES * (num_parameters + num_projections),
        gradients_bytes=_FLOAT_BYTES * num_trained,
        optimizer_bytes=_FLOAT_BYTES * (2 * num_trained - num_muons),
        activations_bytes=activations,
        teacher_bytes=0 if teacher is None else _teacher_bytes(config, teacher),
    )


def check_can_be_built(memory: MemoryEstimate, available_bytes: int) -> None:
    """Refuses a model whose weights alone do not fit into the memory in which each process builds it.

    Args:
        memory: The estimate of a step.
        available_bytes: Memory of the machine, not of a GPU.

    Raises:
        ConfigError: The weights need more.
    """
    if memory.weights_bytes > available_bytes:
        raise ConfigError(
            f"model: its weights need {gigabytes(memory.weights_bytes)} of memory, expected at most the "
            f"{gigabytes(available_bytes)} of this machine; lower model.num_layers, model.model_dim, model.ffn_dim or "
            "model.num_features"
        )


def check_fits(memory: MemoryEstimate, available_bytes: int) -> None:
    """Refuses a run that certainly does not fit into the memory of a device that holds the whole model.

    Only the state is certain: activations may turn out smaller than estimated.

    Args:
        memory: The estimate of a step.
        available_bytes: Memory of the device.

    Raises:
        ConfigError: Weights, gradients and optimizer need more memory than the device has.
    """
    if memory.state_bytes <= available_bytes:
        return
    sizes = {
        "weights": memory.weights_bytes, "gradients": memory.gradients_bytes, "optimizer": memory.optimizer_bytes
    }  # fmt: skip
    listed = ", ".join(f"{name} {gigabytes(size)}" for name, size in sizes.items())
    raise ConfigError(
        f"model: {memory.parameters:,} parameters need {gigabytes(memory.state_bytes)} of memory ({listed}), expected "
        f"at most the {gigabytes(available_bytes)} of the device; lower model.num_layers, model.model_dim, "
        "model.ffn_dim or model.num_features, or share the model out with --strategy fsdp on several devices"
    )


def _teacher_bytes(config: Config, teacher: ModelConfig) -> int:
    """Returns the bytes of the weights of a teacher, and of what its pass over a row holds at once."""
    weights = sum(tensor.size for tensor in tensor_shapes(teacher).values())
    # A layer at work: the residual stream, its norm, q, k, v and their attention, or the feed-forward layer.
    numbers = 2 * teacher.model_dim + max(6 * teacher.model_dim, 2 * teacher.ffn_dim)
    if config.train.stage == "transfer":
        # The input and the output of the attention of every layer.
        numbers += 2 * teacher.num_layers * teacher.model_dim
    else:
        # The last state, its way through the head, the logits and their logarithms.
        numbers += 3 * teacher.model_dim + 2 * len(teacher.tokens())
    return _FLOAT_BYTES * (weights + config.data.tokens_per_batch * numbers)


def _activations_bytes(config: Config, *, on_cpu: bool) -> int:
    """Returns the bytes that autograd saves of a row for its backward pass, and of the gradients within that pass."""
    model = config.model
    is_short = config.train.precision == "bf16-mixed"
    longest = min(config.data.longest_segment, config.data.tokens_per_batch)
    layers = [
        _layer_bytes(model, kind, longest_segment=longest, is_short=is_short, on_cpu=on_cpu) for kind in model.kinds
    ]
    if config.train.activation_checkpointing:
        kept = model.num_layers * _FLOAT_BYTES * model.model_dim + max(layers)
    else:
        kept = sum(layers)
    working = _FLOAT_BYTES * _GRADIENTS_AT_ONCE * model.model_dim
    # The embedding and the last norm; rotary angles; at each target the head and three rows of logits.
    ends = _FLOAT_BYTES * (2 * model.model_dim + 2 * model.head_dim)
    # A teacher's predictions are learned at every token.
    share_of_targets = 1.0 if model.causal or config.train.stage == "distill" else config.train.mask_rate
    head = share_of_targets * _FLOAT_BYTES * (5 * model.model_dim + 3 * len(model.tokens()))
    return int(config.data.tokens_per_batch * (kept + working + ends + head))


def _layer_bytes(model: ModelConfig, kind: AttentionKind, *, longest_segment: int, is_short: bool, on_cpu: bool) -> int:
    """Returns the bytes that autograd saves of one token in one layer, except for a few numbers per head.

    Args:
        model: The shape of the network.
        kind: The attention of the layer.
        longest_segment: Tokens of the longest protein or window.
        is_short: Whether matrix products, and so their inputs and outputs, are bfloat16.
        on_cpu: Whether QK-norm keeps no intermediate tensors, nor in float32 does the convolution.
    """
    in_place = on_cpu and not is_short
    dim = model.model_dim
    # The residual stream before attention and before the feed-forward layer.
    floats = 2 * dim
    # The input of q, k and v (autocast makes a short copy for each of them) and of the feed-forward layer; q, k and v;
    # attention's output, for exact attention also with its heads side by side.
    products = (3 if is_short else 1) * dim + dim + 3 * dim + (2 if kind == "softmax" else 1) * dim
    if kind == "softmax" and model.local_bias:
        # The biased logits and the weights, in the worst case of proteins that fill the row.
        products += 2 * model.num_heads * longest_segment
    # The input of the activation function (SwiGLU: gate and value). Under autocast also its output (SwiGLU: the SiLU of
    # the gate and the product).
    products += (2 if model.ffn == "swiglu" else 1) * (2 if is_short else 1) * model.ffn_dim
    if model.conv_width:
        products += 3 * dim if in_place else 3 * model.conv_width * dim
    if model.qk_norm and not on_cpu:
        products += 2 * dim
    if model.rescale_qk:
        # The factors, in float32; on a CPU also q and k before.
        products += (4 if is_short else 3) * dim if on_cpu else dim
    if model.qk_layer_norm:
        products += 2 * dim
    masks = 2 * dim if model.dropout else 0
    product_bytes = _SHORT_BYTES if is_short else _FLOAT_BYTES
    # A CPU keeps dropout masks as numbers, a GPU as bytes.
    return _FLOAT_BYTES * floats + product_bytes * products + (_FLOAT_BYTES if in_place else 1) * masks
