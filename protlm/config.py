"""Settings of a model and its training: typed, frozen, strict, and read from defaults < file < `--set a.b=c`."""

import tomllib
from collections.abc import Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tomli_w
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from protlm.errors import ConfigError

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
# In TOML, and after --set, 32 is a number.
Precision = Annotated[Literal["32", "bf16-mixed"], BeforeValidator(lambda value: "32" if value == 32 else value)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]

SPECIAL_TOKENS_PER_SEGMENT = 2
"""`<cls>` and `<eos>` around the residues of every segment."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", validate_default=True)


class DataConfig(_Section):
    """How proteins become batches.

    Attributes:
        tokens_per_batch: Budget of one row, special tokens included.
        max_length: Longest stretch of one protein that enters a training row, in residues. Default: what fits into the
            row. Unused by `concatenated`.
        mode: `packed`: whole proteins side by side, none sees another; of one longer than max_length a random stretch,
            another at every draw. `clipped`: the same with the first max_length residues, always. `concatenated`: all
            proteins joined by `<eos>` and cut into windows of window_tokens; inside a window attention crosses the
            proteins.
        window_tokens: Tokens of a window, special tokens included; for `concatenated` only.
        sample: What an epoch takes once: every one of the `records`, or one random member of each of the `clusters`.
        weights: With several datasets, how often a protein is drawn from each; default: an epoch takes each of their
            proteins once.
        num_workers: Processes that prepare batches beside the training process; 0 prepares them in it.
    """

    tokens_per_batch: Positive = 4096
    max_length: Positive | None = None
    mode: Literal["packed", "clipped", "concatenated"] = "packed"
    window_tokens: Positive = 8192
    sample: Literal["records", "clusters"] = "records"
    weights: tuple[PositiveFloat, ...] = ()
    num_workers: NonNegative = 0

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
        """The longest stretch of one protein in a training row, in residues; of no meaning when concatenated."""
        return self.max_length or self.tokens_per_batch - SPECIAL_TOKENS_PER_SEGMENT

    @property
    def longest_segment(self) -> int:
        """The most tokens that attention looks at together in training, special tokens included."""
        if self.mode == "concatenated":
            return self.window_tokens
        return self.window + SPECIAL_TOKENS_PER_SEGMENT


class ModelConfig(_Section):
    """The shape of the network; everything that its weights depend on.

    Attributes:
        num_layers: Encoder layers.
        model_dim: Width of the residual stream.
        num_heads: Attention heads; model_dim / num_heads is head_dim, an even number for the rotary positions.
        ffn_dim: Width of the feed-forward layer.
        ffn: `gelu`, or `swiglu`: SiLU(gate) · value, with a third matrix.
        layer_norm: `pre`: before attention and feed-forward, and once at the end; `post`: after each residual sum.
        positions: `rotary` (q and k are turned), `learned` or `sinusoidal` (added to the embedding), or `none`; they
            start anew in every protein, and in every window of concatenated proteins.
        max_positions: Tokens that `learned` positions reach, special tokens included; unused by the others.
        causal: Attention looks back only, and the model learns to predict the next token instead of hidden residues.
        attention: `positive`, `hyperbolic`, `oprf` or `trig` (FAVOR, estimates of softmax), `regularised` (FAVOR of a
            smoother kernel), `relu` (generalised FAVOR) or `softmax` (exact).
        num_features: Rows of a head's random matrix; unused by `softmax` and without a projection.
        projection: How the random matrix is drawn: `orthogonal` blocks, `simplex` blocks or `iid` rows; `none`, for
            `relu` only, applies the ReLU to q and k themselves.
        qk_norm: Normalise q and k per head, with a learned temperature in (0, max_temperature].
        rescale_qk: Divide each dimension of q and multiply that of k by what evens out their sizes in a protein: q·k
            stays, and estimates vary less.
        max_temperature: Upper bound of ‖q/d^¼‖² under qk_norm; training starts at three quarters of it.
        conv_width: Width of the depthwise convolution on q, k, v inside each protein, odd and at most 127; 0 for none.
            It is centred, but looks back only where the model is causal.
        dropout: Dropped fraction after attention and feed-forward.
    """

    num_layers: Positive = 3
    model_dim: Positive = 128
    num_heads: Positive = 4
    ffn_dim: Positive = 512
    ffn: Literal["gelu", "swiglu"] = "gelu"
    layer_norm: Literal["pre", "post"] = "pre"
    positions: Literal["rotary", "learned", "sinusoidal", "none"] = "rotary"
    max_positions: Positive = 1024
    causal: bool = False
    attention: Literal["positive", "hyperbolic", "trig", "regularised", "oprf", "relu", "softmax"] = "positive"
    num_features: Positive = 128
    projection: Literal["orthogonal", "iid", "simplex", "none"] = "orthogonal"
    qk_norm: bool = True
    rescale_qk: bool = False
    max_temperature: PositiveFloat = 2.0
    conv_width: Annotated[int, Field(ge=0, le=127)] = 3
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.model_dim % self.num_heads or self.head_dim % 2:
            raise ValueError(
                f"model_dim: expected an even multiple of num_heads = {self.num_heads}, got {self.model_dim}"
            )
        if self.projection == "none" and self.attention not in ("relu", "softmax"):
            raise ValueError(f"projection: expected a random matrix for attention = {self.attention!r}, got 'none'")
        if self.conv_width and self.conv_width % 2 == 0:
            raise ValueError(f"conv_width: expected 0 or an odd number, got {self.conv_width}")
        if self.causal and self.rescale_qk:
            raise ValueError("rescale_qk: expected false with causal = true: it looks at the whole protein")
        if self.causal and self.attention == "oprf" and not self.qk_norm:
            raise ValueError("qk_norm: expected true with causal oprf, which takes its constant from the temperature")
        return self

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.model_dim // self.num_heads

    @property
    def has_projection(self) -> bool:
        """Whether the weights include random matrices."""
        return self.attention != "softmax" and self.projection != "none"


class TrainConfig(_Section):
    """How the weights are found.

    Attributes:
        seed: Seed of the weights, the projections, the order of the proteins, the masks and dropout; below 2⁶³.
        max_steps: Optimizer updates since step 0, resumed ones included.
        schedule_steps: Horizon of the learning-rate schedule; default: max_steps at the first start.
        schedule: `cosine` to a tenth of the rate at the horizon, or `constant`; both after the warm-up.
        optimizer: `adamw`, or `muon` for the matrices of the encoder with AdamW on the rest.
        lr: Peak learning rate of AdamW.
        muon_lr: Peak learning rate of Muon; unused by `adamw`.
        betas: Decay of AdamW's two moments.
        eps: What AdamW adds to the root of its second moment.
        weight_decay: Decoupled weight decay of matrices; biases, norms and embeddings have none.
        warmup_steps: Updates of linear warm-up.
        clip_norm: Largest norm of the whole gradient; 0 for no clipping.
        accumulate: Rows per update, all devices together: a multiple of their number.
        precision: `32`, or `bf16-mixed`: matrix products in bfloat16, weights and sums in float32.
        activation_checkpointing: Keep only what enters each layer, and compute the rest again in the backward pass:
            less memory for about a third more work.
        compile: Compile the layers with torch.compile.
        checkpoint_every_steps: Updates between checkpoints for resuming.
        keep_every_steps: Updates between checkpoints that are kept for good; 0 keeps none.
        valid_every_steps: Updates between measurements on the valid split; the last update always measures.
        patience: Measurements in a row without a lower perplexity that end the run; 0 for none.
        health_every_steps: Updates between measurements of the attention's health; 0 for none.
        redraw_every_steps: Updates between new random projections; 0 keeps the first draw, which is saved in the model.
        mask_rate: Probability that a residue is scored; unused by a causal model, which scores them all.
        mask_share: Part of the scored residues that is hidden behind `<mask>`.
        random_share: Part of them that is replaced by a random standard residue; the rest stays as it is.
    """

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    max_steps: Positive = 900
    schedule_steps: Positive | None = None
    schedule: Literal["cosine", "constant"] = "cosine"
    optimizer: Literal["adamw", "muon"] = "muon"
    lr: PositiveFloat = 2e-3
    muon_lr: PositiveFloat = 0.04
    betas: tuple[Decay, Decay] = (0.9, 0.98)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.01
    warmup_steps: NonNegative = 40
    clip_norm: NonNegativeFloat = 1.0
    accumulate: Annotated[int, Field(gt=0, le=2**20)] = 1
    precision: Precision = "32"
    activation_checkpointing: bool = False
    compile: bool = False
    checkpoint_every_steps: Positive = 200
    keep_every_steps: NonNegative = 0
    valid_every_steps: Positive = 200
    patience: NonNegative = 0
    health_every_steps: NonNegative = 50
    redraw_every_steps: NonNegative = 0
    mask_rate: Annotated[float, Field(gt=0, le=1)] = 0.15
    mask_share: Share = 0.8
    random_share: Share = 0.1

    @model_validator(mode="after")
    def _shares_fit(self) -> Self:
        # Shares as people write them need not add up to exactly 1 in binary.
        if self.mask_share + self.random_share > 1 + 1e-9:
            raise ValueError(
                f"random_share: expected at most 1 - mask_share = {1 - self.mask_share:g}, got {self.random_share:g}"
            )
        return self


class Config(_Section):
    """Everything that `protlm train` is told, in three sections."""

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


def shipped_configs() -> list[str]:
    """Returns the names of the configurations that come with protlm."""
    names = (file.name for file in _config_folder().iterdir())
    return sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml"))


def load_config(name_or_file: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Returns the settings from defaults, then a file, then overrides.

    Args:
        name_or_file: The name of a shipped configuration, or a path of a TOML file (anything with a `/` or `.toml`).
        overrides: Texts `section.key=value`, the value written as in TOML; a bare word is taken as a string.

    Raises:
        ConfigError: A missing file, bad TOML, an unknown key or a value out of range.
    """
    settings, source = _read_settings(name_or_file)
    for override in overrides:
        _apply_override(settings, override)
        source = f"{source} with --set" if "--set" not in source else source
    return parse_config(settings, source)


def parse_config(settings: dict[str, Any], source: str) -> Config:
    """Returns checked settings; `source` says in an error where they came from.

    Raises:
        ConfigError: An unknown key or a value out of range.
    """
    try:
        return Config.model_validate(_lists_to_tuples(settings))
    except ValidationError as error:
        raise ConfigError(f"{source}: {_explain(error)}") from None


def dump_config(config: Config) -> str:
    """Returns the settings as TOML text that `load_config` reads back to an equal object."""
    return tomli_w.dumps(config.model_dump(exclude_none=True))


def _config_folder() -> Traversable:
    # configs/ is installed as protlm.configs; an editable install finds no package there and leaves it in the checkout.
    try:
        return resources.files("protlm.configs")
    except ModuleNotFoundError:
        return Path(__file__).parents[1] / "configs"


def _read_settings(name_or_file: str | Path | None) -> tuple[dict[str, Any], str]:
    if name_or_file is None:
        return {}, "settings"
    text = str(name_or_file)
    if "/" in text or text.endswith(".toml"):
        source = text
        try:
            content = Path(text).read_bytes()
        except OSError as error:
            raise ConfigError(f"{source}: {error.strerror}") from None
    else:
        source = f"{text}.toml"
        file = _config_folder() / source
        if not file.is_file():
            known = ", ".join(shipped_configs())
            raise ConfigError(f"{text}: no such configuration; there are {known}, or give the path of a TOML file")
        content = file.read_bytes()
    try:
        return tomllib.loads(content.decode("utf-8-sig")), source
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{source}: not a TOML file: {error}") from None


def _apply_override(settings: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    section, dot, key = path.strip().partition(".")
    if not (equals and dot and section and key):
        raise ConfigError(f"--set {override}: expected SECTION.KEY=VALUE, such as train.max_steps=800")
    try:
        found = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        found = {"value": text.strip()}
    if len(found) > 1:
        raise ConfigError(f"--set {section}.{key}: expected one value, got more lines than one")
    if not isinstance(settings.setdefault(section, {}), dict):
        raise ConfigError(f"--set {override}: {section} is not a section")
    settings[section][key] = found["value"]


def _lists_to_tuples(settings: dict[str, Any]) -> dict[str, Any]:
    # TOML knows lists only, and a strict model takes no list for a tuple.
    return {
        key: _lists_to_tuples(value) if isinstance(value, dict) else tuple(value) if isinstance(value, list) else value
        for key, value in settings.items()
    }


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        section = Config.model_fields.get(str(first["loc"][0])) if len(first["loc"]) > 1 else None
        fields = Config.model_fields if section is None else section.annotation.model_fields  # type: ignore[union-attr]
        return f"{where}: unknown key; known are {', '.join(fields)}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{where}.{message}" if where else message
    got = f", got {first['input']!r}"
    return f"{where}: {message[0].lower()}{message[1:]}{got}"
