"""Settings of a model and its training: typed, frozen and strict.

The docstring below a setting is its documentation: `protlm config` prints it as the comment of the setting.
"""

from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_serializer, model_validator

from protlm.choices import (
    MOST_TOKENS,
    AttentionKind,
    DataMode,
    FeatureMap,
    NearFarMap,
    Precision,
    ProjectionKind,
    Stage,
)
from protlm.vocabulary import ModelVocabulary

_MOST_STEPS = 10**12
"""A thousand updates a second for thirty years."""
_MOST_LAYERS = 1024
"""The deepest Transformer known has 1,000 layers (DeepNet, arXiv 2203.00555)."""
_MOST_FEATURES = 2**20
"""Random features, and the width of the feed-forward layer, past which one matrix fills a device."""
_WIDEST_MODEL = 2**16
"""Several times the width of the largest language models known."""
_WIDEST_WINDOW = 2**14
"""Past this exact attention to the whole protein costs less."""
_LARGEST_BIAS = 100.0
"""e^100 times the weight: no other token counts."""
_LARGEST_TEMPERATURE = 1e4
"""Logits of ±10⁴, whose softmax is a choice of one token."""
_LARGEST_FLOAT = 1e30
"""Weights are float32, which ends at 3·10³⁸."""

Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Tokens = Annotated[int, Field(gt=0, le=MOST_TOKENS)]
Steps = Annotated[int, Field(gt=0, le=_MOST_STEPS)]
StepsOrNone = Annotated[int, Field(ge=0, le=_MOST_STEPS)]
PositiveFloat = Annotated[float, Field(gt=0, le=_LARGEST_FLOAT, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, le=_LARGEST_FLOAT, allow_inf_nan=False)]
# The product of a rate and a coefficient, which the optimizers form, is still a number of float32.
Coefficient = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]

_MOST_MODEL_TOKENS = 4096

SPECIAL_TOKENS_PER_SEGMENT = 2
"""`<cls>` and `<eos>` around the residues of every segment."""


def _kinds(value: Any) -> Any:
    """Returns kinds of attention as a tuple: of one word, of words by comma, or of a list."""
    if isinstance(value, str):
        value = [word.strip() for word in value.split(",")]
    if not isinstance(value, list | tuple):
        return value
    return tuple(value[:1] if all(kind == value[0] for kind in value) else value)


class _Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", validate_default=True, use_attribute_docstrings=True
    )


class DataConfig(_Section):
    """How proteins become batches."""

    tokens_per_batch: Tokens = 4096
    """Budget of one row, special tokens included."""
    max_length: Tokens | None = None
    """Longest window of one protein in a training row, in residues. Default: what fits into the row. Unused by
    `concatenated`."""
    mode: DataMode = "packed"
    """`packed`: whole proteins side by side, without attention between them; of a protein longer than max_length, a
    random window that changes with every draw. `clipped`: the same, but always with the first max_length residues.
    `concatenated`: all proteins joined by `<eos>` and cut into windows of window_tokens; inside a window, attention
    crosses protein boundaries."""
    window_tokens: Tokens = 8192
    """Tokens of a window, special tokens included; for `concatenated` only."""
    sample: Literal["records", "clusters"] = "records"
    """An epoch is `records`: every protein once, or `clusters`: one random member of every cluster."""
    weights: tuple[PositiveFloat, ...] = ()
    """How often each of several datasets is drawn from, relative to the others. Default: an epoch takes every protein
    of all datasets once."""
    num_workers: Annotated[int, Field(ge=0, le=1024)] = 0
    """Processes that prepare batches beside the training process; 0: the training process prepares them."""

    @model_validator(mode="after")
    def _a_protein_fits(self) -> Self:
        if self.mode == "concatenated":
            if not SPECIAL_TOKENS_PER_SEGMENT < self.window_tokens <= self.tokens_per_batch:
                raise ValueError(
                    f"window_tokens: expected more than {SPECIAL_TOKENS_PER_SEGMENT} and at most "
                    f"tokens_per_batch = {self.tokens_per_batch}, got {self.window_tokens}"
                )
            return self
        room = self.tokens_per_batch - SPECIAL_TOKENS_PER_SEGMENT
        if room < 1:
            raise ValueError(f"tokens_per_batch: expected at least 3, got {self.tokens_per_batch}")
        if self.max_length is not None and self.max_length > room:
            raise ValueError(
                f"max_length: expected at most tokens_per_batch - {SPECIAL_TOKENS_PER_SEGMENT} = {room}, "
                f"got {self.max_length}"
            )
        return self

    @property
    def window(self) -> int:
        """The longest window of one protein in a training row, in residues; meaningless when concatenated."""
        return self.max_length or self.tokens_per_batch - SPECIAL_TOKENS_PER_SEGMENT

    @property
    def longest_segment(self) -> int:
        """The most tokens that one attention covers in training, special tokens included."""
        if self.mode == "concatenated":
            return self.window_tokens
        return self.window + SPECIAL_TOKENS_PER_SEGMENT


class ModelConfig(_Section):
    """The architecture: everything that the shapes and the meaning of the weights depend on."""

    num_layers: Annotated[int, Field(gt=0, le=_MOST_LAYERS)] = 3
    """Encoder layers."""
    model_dim: Annotated[int, Field(gt=0, le=_WIDEST_MODEL)] = 128
    """Width of the residual stream."""
    num_heads: Annotated[int, Field(gt=0, le=_WIDEST_MODEL // 2)] = 4
    """Attention heads; model_dim / num_heads is head_dim, which must be even for rotary positions."""
    ffn_dim: Annotated[int, Field(gt=0, le=_MOST_FEATURES)] = 512
    """Width of the feed-forward layer."""
    ffn: Literal["gelu", "swiglu"] = "gelu"
    """The feed-forward layer: `gelu`, or `swiglu`, which is SiLU(gate) · value with a third matrix."""
    layer_norm: Literal["pre", "post"] = "pre"
    """`pre`: before attention and feed-forward, and once after the last layer; `post`: after each residual sum."""
    positions: Literal["rotary", "learned", "sinusoidal", "none"] = "rotary"
    """`rotary` (q and k are rotated), `learned` or `sinusoidal` (added to the embedding), or `none`. Positions restart
    in every protein, and in every window of concatenated proteins."""
    max_positions: Annotated[int, Field(gt=SPECIAL_TOKENS_PER_SEGMENT, le=MOST_TOKENS)] = 1024
    """Number of `learned` positions, special tokens included; unused by the other kinds."""
    causal: bool = False
    """Attend to earlier positions only, and learn to predict the next token instead of masked residues."""
    attention: Annotated[tuple[AttentionKind, ...], BeforeValidator(_kinds)] = ("local", "positive", "local")
    """The kind of every layer, or several that the layers take in turn, over and over: `positive`, `hyperbolic`, `oprf`
    or `trig` (FAVOR: estimates of softmax attention), `regularised` (FAVOR with a smoother kernel), `relu` (generalised
    FAVOR), `near-far` (exact weights of near tokens and estimates of all others in one sum), `softmax` (exact) or
    `local` (exact, to the tokens at most local_window away)."""
    local_window: Annotated[int, Field(gt=0, le=_WIDEST_WINDOW)] = 32
    """Tokens on either side that a token sees in `local` layers; causal: before it only."""
    near_block: Annotated[int, Field(gt=0, le=_WIDEST_WINDOW)] = 32
    """Tokens of a block in `near-far` layers: weights are exact within a block and for the two beside it."""
    near_map: NearFarMap = "positive"
    """The feature map that estimates the other weights of `near-far` layers."""
    local_bias: Annotated[float, Field(ge=0, le=_LARGEST_BIAS)] = 0.0
    """Start of a number that each head of a `softmax` layer learns and adds to the logits of the tokens at most
    local_window away: 3 favours near tokens from the first step. 0: none. It costs a matrix of the square of a
    protein's length for each head."""
    num_features: Annotated[int, Field(gt=0, le=_MOST_FEATURES)] = 128
    """Random features per head: rows of its random matrix. Unused by exact kinds and without a projection."""
    projection: Literal[ProjectionKind, "none"] = "orthogonal"
    """How the random matrix is drawn: in `orthogonal` blocks, in `simplex` blocks or with `iid` rows. `none`, for
    `relu` only, applies the ReLU to q and k themselves."""
    qk_norm: bool = True
    """Normalise q and k per head, with a learned temperature: ‖q/d^¼‖², for FAVOR at most max_temperature."""
    rescale_qk: bool = False
    """Balance q and k: divide each dimension of q, and multiply the same dimension of k, by a factor that makes their
    sizes in a protein equal. q·k does not change, and its estimates have a lower variance."""
    max_temperature: PositiveFloat = 2.0
    """Upper bound of ‖q/d^¼‖² in FAVOR layers with qk_norm, which bounds the variance of the estimates; training starts
    at three quarters of it."""
    exact_temperature: Annotated[float, Field(ge=0, le=_LARGEST_TEMPERATURE)] = 6.0
    """Start of ‖q/d^¼‖² in `softmax` and `local` layers with qk_norm; it is learned without a bound. 0: these layers
    are bound by max_temperature too, as in models from before protlm had this setting."""
    estimator: bool = False
    """The layers with random features stand for exact ones, as `protlm convert` makes them of those of a trained model:
    their temperature is as free as that of exact layers, and each row of their random matrix has a bias."""
    qk_balance: bool = False
    """With `estimator`: these layers multiply q by a matrix of each head after positions have rotated it, and k by the
    inverse of its transpose. q·k does not change, and its estimates have a lower variance."""
    conv_width: Annotated[int, Field(ge=0, le=127)] = 3
    """Width of the depthwise convolution over q, k and v inside each protein: odd and at most 127, or 0 for none. It
    is centred; in a causal model it covers earlier positions only."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout rate after attention and after the feed-forward layer."""
    norm: Literal["layer", "rms"] = "layer"
    """The norms of the encoder: `layer` (LayerNorm), or `rms` (no mean is subtracted, no bias added)."""
    norm_eps: Annotated[float, Field(gt=0, le=1)] = 1e-5
    """Added to the variance in every norm, that of the head included."""
    embedding_norm: bool = False
    """Normalise the embedding, after positions were added to it."""
    qk_layer_norm: bool = False
    """Normalise q and k over all heads together, by a LayerNorm without bias, before positions rotate them."""
    token_dropout: bool = False
    """Embed `<mask>` as zeros, and scale the other embeddings of a protein by 0.88 / (1 - its fraction of `<mask>`), as
    ESM does."""
    stored_frequencies: bool = False
    """Rotary frequencies are saved with the weights, as those of an imported model are; otherwise they are
    10000^(-2i / head_dim)."""
    head: Literal["dense", "linear"] = "dense"
    """The language-model head: `dense`, GELU, LayerNorm and the decoder, or the decoder alone (`linear`)."""
    tied_head: bool = True
    """The matrix of the decoder is that of the embedding."""
    vocabulary: tuple[Annotated[str, Field(min_length=1, max_length=32)], ...] = ()
    """The tokens of the model in the order of its embedding, for one that was trained elsewhere. Default: those of
    datasets, which are ESM's."""
    residues_as_x: str = ""
    """Residues that the model reads as X, although it has tokens for them."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.model_dim % self.num_heads or self.head_dim % 2:
            raise ValueError(
                f"model_dim: expected an even multiple of num_heads = {self.num_heads}, got {self.model_dim}"
            )
        if not self.attention:
            raise ValueError("attention: expected at least one kind, got none")
        if self.projection == "none" and (drawn := self.feature_maps - {"relu"}):
            raise ValueError(f"projection: expected a random matrix for attention = {min(drawn)!r}, got 'none'")
        if self.conv_width and self.conv_width % 2 == 0:
            raise ValueError(f"conv_width: expected 0 or an odd number, got {self.conv_width}")
        if self.causal and self.rescale_qk:
            raise ValueError("rescale_qk: expected false with causal = true: it looks at the whole protein")
        if self.causal and "oprf" in self.feature_maps and not self.qk_norm:
            raise ValueError("qk_norm: expected true with causal oprf, which takes its constant from the temperature")
        if self.estimator and (others := self.feature_maps - set(get_args(NearFarMap))):
            raise ValueError(f"estimator: expected maps that estimate softmax attention, got {min(others)!r}")
        if self.estimator and not self.feature_maps:
            raise ValueError("estimator: expected false where all layers are exact")
        if self.qk_balance and not self.estimator:
            raise ValueError("qk_balance: expected false without estimator = true")
        if self.qk_norm and self.qk_layer_norm:
            raise ValueError("qk_layer_norm: expected false with qk_norm = true, which normalises q and k itself")
        if self.stored_frequencies and self.positions != "rotary":
            raise ValueError(f"stored_frequencies: expected false with positions = {self.positions!r}")
        if len(self.vocabulary) > _MOST_MODEL_TOKENS:
            raise ValueError(
                f"vocabulary: expected at most {_MOST_MODEL_TOKENS:,} tokens, got {len(self.vocabulary):,}"
            )
        try:
            self.tokens()
        except ValueError as error:
            raise ValueError(f"vocabulary: {error}") from None
        return self

    def tokens(self) -> ModelVocabulary:
        """Returns the vocabulary of the model."""
        return ModelVocabulary(self.vocabulary, self.residues_as_x)

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.model_dim // self.num_heads

    @property
    def has_projection(self) -> bool:
        """Whether the weights include random matrices."""
        return bool(self.feature_maps) and self.projection != "none"

    @property
    def kinds(self) -> tuple[AttentionKind, ...]:
        """The kind of attention of each layer, first layer first."""
        return tuple(self.attention[layer % len(self.attention)] for layer in range(self.num_layers))

    def feature_map_of(self, kind: AttentionKind) -> FeatureMap | None:
        """Returns the feature map of the layers of a kind; None for exact ones."""
        if kind == "softmax" or kind == "local":
            return None
        return self.near_map if kind == "near-far" else kind

    @property
    def feature_maps(self) -> frozenset[FeatureMap]:
        """The feature maps of all layers; empty if all are exact."""
        maps = (self.feature_map_of(kind) for kind in self.kinds)
        return frozenset(feature_map for feature_map in maps if feature_map is not None)

    @property
    def attention_name(self) -> str:
        """The kinds as a user writes them, such as `positive` or `local,positive,local`."""
        return ",".join(self.attention)

    @field_serializer("attention")
    def _as_written(self, attention: tuple[AttentionKind, ...]) -> str | tuple[str, ...]:
        return attention[0] if len(attention) == 1 else attention


class TrainConfig(_Section):
    """How the model is trained."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of the weights, the projections, the order of the proteins, the masks and dropout; below 2⁶³."""
    max_steps: Steps = 900
    """Optimizer updates from step 0 on, those before a --resume included."""
    schedule_steps: Steps | None = None
    """Length of the learning-rate schedule in updates. Default: max_steps at the first start."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up, `cosine` decay to a tenth of the peak rate at schedule_steps, or `constant`."""
    optimizer: Literal["adamw", "muon"] = "muon"
    """`adamw`, or `muon`: Muon for the matrices of the encoder and AdamW for all other weights."""
    lr: PositiveFloat = 2e-3
    """Peak learning rate of AdamW."""
    muon_lr: PositiveFloat = 0.04
    """Peak learning rate of Muon; unused by `adamw`."""
    betas: tuple[Decay, Decay] = (0.9, 0.98)
    """Decay rates of AdamW's first and second moment."""
    eps: PositiveFloat = 1e-8
    """Added by AdamW to the square root of the second moment."""
    weight_decay: Coefficient = 0.01
    """Decoupled weight decay of matrices; biases, norms and embeddings are not decayed."""
    warmup_steps: StepsOrNone = 40
    """Updates over which the learning rate rises linearly to its peak."""
    clip_norm: NonNegativeFloat = 1.0
    """Largest norm of the whole gradient; larger ones are scaled down. 0: no clipping."""
    accumulate: Annotated[int, Field(gt=0, le=2**20)] = 1
    """Rows per update on all devices together; a multiple of the number of devices."""
    # In TOML, and after --set, 32 is a number.
    precision: Annotated[Precision, BeforeValidator(lambda value: "32" if value == 32 else value)] = "32"
    """`32` (float32), or `bf16-mixed`: matrix products in bfloat16, weights and sums in float32."""
    activation_checkpointing: bool = False
    """Keep only the input of each layer and recompute the rest in the backward pass: less memory, about a third more
    work."""
    compile: bool = False
    """Compile the layers with torch.compile."""
    checkpoint_every_steps: Steps = 200
    """Updates between checkpoints for --resume; the last two are kept."""
    keep_every_steps: StepsOrNone = 0
    """Updates between checkpoints that are kept for good. 0: none."""
    valid_every_steps: Steps = 200
    """Updates between measurements on the valid split; there is always one after the last update."""
    patience: StepsOrNone = 0
    """Stop the run after this many measurements in a row without a lower perplexity. 0: never."""
    health_every_steps: StepsOrNone = 50
    """Updates between measurements of the health of the attention. 0: none."""
    redraw_every_steps: StepsOrNone = 0
    """Updates between new draws of the random projections. 0: the first draw stays, and is saved in the model."""
    mask_rate: Annotated[float, Field(gt=0, le=1)] = 0.15
    """Probability that a residue becomes a target. Unused by a causal model, which predicts every residue."""
    mask_share: Share = 0.8
    """Fraction of the targets that `<mask>` replaces."""
    random_share: Share = 0.1
    """Fraction of the targets that a random standard residue replaces; the rest stays unchanged."""
    stage: Stage | None = None
    """What a converted model learns from its teacher, the model that it was made of. `transfer`: each layer with random
    features, the output of the teacher's attention for the teacher's input; only the weights of q and k, and the
    temperature, are trained. `distill`: the teacher's predictions and its last hidden state; all weights are trained.
    A stage has defaults of its own for the optimizer, its rates and the numbers of steps. Default: no teacher."""
    transfer_features: bool = True
    """In `transfer`, also train the random features: the rows of the random matrices and their biases."""
    convert_layers: StepsOrNone = 0
    """With `estimator`, updates between the conversions of one layer with random features and of the next, from the
    first layer on; until its turn a layer computes exact attention with the same weights. 0: all at the start."""
    freeze: tuple[Annotated[str, Field(min_length=1, max_length=200)], ...] = ()
    """Parameters that keep their values, by patterns of their names such as `embedding.*` or `layers.[0-3].*`."""

    @model_validator(mode="after")
    def _shares_fit(self) -> Self:
        # Shares as people write them need not add up to exactly 1 in binary.
        if self.mask_share + self.random_share > 1 + 1e-9:
            raise ValueError(
                f"random_share: expected at most 1 - mask_share = {1 - self.mask_share:g}, got {self.random_share:g}"
            )
        return self


class Config(_Section):
    """All settings of `protlm train`, in three sections."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()

    @model_validator(mode="after")
    def _positions_reach(self) -> Self:
        longest = self.data.longest_segment
        shorter = "data.window_tokens" if self.data.mode == "concatenated" else "data.max_length"
        if self.model.positions == "learned" and longest > self.model.max_positions:
            raise ValueError(
                f"model.max_positions: expected at least {longest}, the most tokens that training looks at together, "
                f"got {self.model.max_positions}; raise it or lower {shorter}"
            )
        return self
