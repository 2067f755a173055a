"""The model directory: hides how a trained model lies on disk, and never loads a pickle from it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from protlm import files
from protlm.config import SPECIAL_TOKENS_PER_SEGMENT, ModelConfig
from protlm.data.batching.batches import Objective
from protlm.data.batching.masking import MaskRates
from protlm.errors import CheckpointError
from protlm.model.performer import Performer
from protlm.vocabulary import RESIDUES, TOKENS

MODEL_FORMAT: Literal["protlm-model"] = "protlm-model"
MODEL_FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)
"""Version 1 knew packed proteins and masking as BERT does it only; its missing keys mean that."""

Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class ValidScore(BaseModel):
    """What the training run measured on its valid split when it saved the model."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", ser_json_inf_nan="constants")

    num_targets: Count
    accuracy: float
    perplexity: float
    empirical_accuracy: float
    empirical_perplexity: float


class ModelDescription(BaseModel):
    """The content of a model's config.json.

    Attributes:
        format: Says that this is a protlm model.
        format_version: Of this file and of the tensors' names.
        vocabulary: The tokens in order.
        model: The shape of the network.
        mask_rate: Probability with which residues were scored in training; `protlm eval` uses it too. Unused by a
            causal model, like the two shares.
        mask_share: Part of the scored residues that was hidden behind `<mask>`.
        random_share: Part of them that was replaced by a random standard residue.
        data_mode: How proteins became rows in training.
        window_tokens: Length of a window of concatenated proteins; None for the other modes.
        redraw_every_steps: 0: the model is tied to its saved projections; else they were redrawn while it was trained.
        seed: Of the training run.
        step: Optimizer updates behind the weights.
        residue_counts: Residues of the training set by letter, for the empirical baseline.
        dataset_hash: Of the manifest of the training dataset, or of several together.
        valid: Measured on the valid split, where there was one.
        weights_hash: xxh3-128 of model.safetensors.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", ser_json_inf_nan="constants")

    format: Literal["protlm-model"] = MODEL_FORMAT
    format_version: int = MODEL_FORMAT_VERSION
    vocabulary: list[str] = list(TOKENS)
    model: ModelConfig
    mask_rate: Annotated[float, Field(gt=0, le=1)]
    mask_share: Share = 0.8
    random_share: Share = 0.1
    data_mode: Literal["packed", "clipped", "concatenated"] = "packed"
    window_tokens: Annotated[int, Field(gt=SPECIAL_TOKENS_PER_SEGMENT)] | None = None
    redraw_every_steps: Count
    seed: Count
    step: Count
    residue_counts: dict[str, Count]
    dataset_hash: str
    valid: ValidScore | None = None
    weights_hash: str = ""

    @field_validator("residue_counts")
    @classmethod
    def _of_every_residue(cls, counts: dict[str, int]) -> dict[str, int]:
        if sorted(counts) != sorted(RESIDUES):
            raise ValueError(f"expected a count for each of the letters {RESIDUES}")
        return counts

    @model_validator(mode="after")
    def _windows_where_concatenated(self) -> Self:
        if (self.window_tokens is not None) != (self.data_mode == "concatenated"):
            raise ValueError("window_tokens: expected a number with data_mode = 'concatenated' and null without")
        return self

    @property
    def objective(self) -> Objective:
        """What the model predicts, and what it sees meanwhile."""
        return Objective(causal=self.model.causal, rates=MaskRates(self.mask_rate, self.mask_share, self.random_share))

    @property
    def max_residues(self) -> int | None:
        """Residues of one protein that the model's positions reach; None where there is no limit."""
        if self.model.positions != "learned":
            return None
        return self.model.max_positions - SPECIAL_TOKENS_PER_SEGMENT


def dataset_hash_of(hashes: Sequence[str]) -> str:
    """Returns what stands for the training data in a model: the one dataset's hash, or the xxh3-128 of all joined."""
    return hashes[0] if len(hashes) == 1 else xxhash.xxh3_128_hexdigest("".join(hashes).encode())


def save_model(folder: Path, weights: Performer | Mapping[str, Tensor], description: ModelDescription) -> None:
    """Writes config.json, model.safetensors and README.md; each file is complete or as it was before.

    A reader that comes between two of them sees by the hash that weights and description do not belong together.

    Args:
        folder: The model directory; made if it is not there.
        weights: The network, or its tensors by name where it lies in shards and was gathered.
        description: What is known of it; the hash of the weights is filled in.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = weights.state_dict() if isinstance(weights, Performer) else weights
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    content = save(tensors)
    description = description.model_copy(update={"weights_hash": xxhash.xxh3_128_hexdigest(content)})
    for name, data in (
        ("model.safetensors", content),
        ("config.json", (description.model_dump_json(indent=2) + "\n").encode()),
        ("README.md", _model_card(description).encode()),
    ):
        with files.written_whole(folder / name) as partial:
            partial.write_bytes(data)


def find_model(path: Path) -> Path:
    """Returns the model directory that a user means: the path itself, or `model/` inside a run.

    Raises:
        CheckpointError: Neither holds a model.
    """
    for folder in (path, path / "model"):
        if (folder / "config.json").is_file():
            return folder
    if (path / "checkpoints").is_dir():
        raise CheckpointError(f"{path}: this run has no model yet; let protlm train reach its first measurement")
    reason = "no config.json in it or in its model/" if path.is_dir() else "no such directory"
    raise CheckpointError(f"{path}: expected a model directory or a run of protlm train, got {reason}")


def read_model(path: Path) -> tuple[Performer, ModelDescription]:
    """Returns the network in evaluation mode on the CPU, and what is known of it.

    Raises:
        CheckpointError: Files that are missing, altered, of another version or no protlm model.
    """
    folder = find_model(path)
    description = read_description(folder)
    weights_path = folder / "model.safetensors"
    try:
        weights = weights_path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{weights_path}: {error.strerror}") from None
    if xxhash.xxh3_128_hexdigest(weights) != description.weights_hash:
        raise CheckpointError(
            f"{weights_path}: not the weights that config.json names (hash differs); copy the model directory anew"
        )
    try:
        with torch.device("meta"):
            model = Performer(description.model)
        tensors = load(weights)
    except (SafetensorError, RuntimeError, MemoryError) as error:
        raise CheckpointError(
            f"{weights_path}: does not hold this model: {str(error)[:200] or 'not enough memory'}"
        ) from None
    _check_tensors(weights_path, tensors, model.state_dict())
    model.load_state_dict(tensors, assign=True)
    return model.eval(), description


def initial_weights(model: Performer, path: Path) -> list[str]:
    """Copies the weights of a saved model into a network of another kind of attention, or of the same.

    Projections and temperatures belong to the attention: where the saved model has none that fit, the network keeps its
    own. So the weights of a softmax Transformer start a Performer, and the other way round.

    Args:
        model: A network whose weights are set already.
        path: A model directory or a run.

    Returns:
        The names of the tensors that the network kept.

    Raises:
        CheckpointError: A model that cannot be read, or any other difference between the two.
    """
    saved, description = read_model(path)
    where = f"{path}: cannot start this model"
    found, wanted = saved.state_dict(), model.state_dict()
    if description.model.num_heads != model.config.num_heads:
        raise CheckpointError(
            f"{where}: model.num_heads: expected {description.model.num_heads} as in the saved one, "
            f"got {model.config.num_heads}"
        )
    for name in sorted(found.keys() ^ wanted.keys()):
        if not _is_of_attention(name):
            state = "is missing in the saved one" if name in wanted else "of the saved one has no place in it"
            raise CheckpointError(f"{where}: tensor {name!r} {state}; the model sections must agree")
    kept = []
    for name, tensor in wanted.items():
        fits = name in found and found[name].shape == tensor.shape
        if _is_of_attention(name) and not (fits and _is_drawn_alike(name, description.model, model.config)):
            kept.append(name)
        elif not fits:
            raise CheckpointError(
                f"{where}: tensor {name!r}: expected {tuple(found[name].shape)} as in the saved one, "
                f"got {tuple(tensor.shape)}; the model sections must agree"
            )
    model.load_state_dict({**wanted, **{name: found[name] for name in wanted if name not in kept}})
    return kept


def _is_of_attention(name: str) -> bool:
    return name.endswith((".projection", ".temperature_logit"))


def _is_drawn_alike(name: str, saved: ModelConfig, wanted: ModelConfig) -> bool:
    return not name.endswith(".projection") or saved.projection == wanted.projection


def _check_tensors(path: Path, found: dict[str, Tensor], expected: dict[str, Any]) -> None:
    """Raises CheckpointError at the first tensor that is missing, too much, of another kind or not finite."""
    for name in sorted(found.keys() ^ expected.keys()):
        state = "is missing" if name in expected else "is not part of this model"
        raise CheckpointError(f"{path}: does not hold this model: tensor {name!r} {state}")
    for name, tensor in found.items():
        wanted = expected[name]
        if tensor.shape != wanted.shape or tensor.dtype != wanted.dtype:
            raise CheckpointError(
                f"{path}: does not hold this model: tensor {name!r}: expected {wanted.dtype} {tuple(wanted.shape)}, "
                f"got {tensor.dtype} {tuple(tensor.shape)}"
            )
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{path}: tensor {name!r} holds numbers that are not finite; the model is of no use")


def read_description(folder: Path) -> ModelDescription:
    """Returns what a model directory says of its model.

    Raises:
        CheckpointError: A file that is unreadable, of another version or of no protlm model.
    """
    path = folder / "config.json"
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    if not isinstance(found, dict) or found.get("format") != MODEL_FORMAT:
        raise CheckpointError(f"{path}: expected a protlm model, got another JSON file")
    if found.get("format_version") not in READABLE_VERSIONS:
        raise CheckpointError(
            f"{path}: expected format version {' or '.join(map(str, READABLE_VERSIONS))}, "
            f"got {found.get('format_version')!r}; use the protlm that wrote it"
        )
    try:
        description = ModelDescription.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{path}: {where}: {first['msg']}") from None
    if description.vocabulary != list(TOKENS):
        raise CheckpointError(f"{path}: the model has another vocabulary than this protlm")
    return description


_DATA_MODES = {
    "packed": "It saw whole proteins, each by itself; of one too long for a row a random stretch.",
    "clipped": "It saw proteins each by itself, and of a long one the beginning.",
    "concatenated": "It saw windows of {window_tokens:,} tokens of proteins joined by `<eos>`, across their bounds.",
}


def _task(description: ModelDescription) -> str:
    if description.model.causal:
        return "to predict the next token from those before it"
    return (
        f"to predict masked residues: {description.mask_rate:.0%} of them, of which {description.mask_share:.0%} "
        f"were hidden and {description.random_share:.0%} replaced by a random one"
    )


def _model_card(description: ModelDescription) -> str:
    shape = description.model
    kind = "fixed random projections, saved with it" if description.redraw_every_steps == 0 else (
        f"projections redrawn every {description.redraw_every_steps} steps"
    )  # fmt: skip
    lines = [
        "# A protein language model trained with protlm",
        "",
        f"A {shape.num_layers}-layer {'causal ' if shape.causal else ''}Performer of width {shape.model_dim} with "
        f"{shape.num_heads} heads and `{shape.attention}` attention" + (f" ({kind})." if shape.has_projection else "."),
        f"Trained for {description.step} steps with seed {description.seed} {_task(description)}.",
        _DATA_MODES[description.data_mode].format(window_tokens=description.window_tokens),
        "",
        f"- Training dataset (manifest hash): `{description.dataset_hash}`",
        f"- Residues in it: {sum(description.residue_counts.values()):,}",
        f"- Weights (xxh3-128): `{description.weights_hash}`",
        "",
    ]
    if description.valid is None:
        lines.append("No valid split was measured.")
    else:
        valid = description.valid
        lines += [
            f"On {valid.num_targets:,} {'' if shape.causal else 'masked '}residues of its valid split:",
            "",
            "| | accuracy | perplexity |",
            "|---|---|---|",
            f"| this model | {valid.accuracy:.4f} | {valid.perplexity:.3f} |",
            f"| residue frequencies of the training set | {valid.empirical_accuracy:.4f} | "
            f"{valid.empirical_perplexity:.3f} |",
        ]
    lines += ["", "Use it with `protlm eval`, `protlm embed` or `protlm.load_model`.", ""]
    return "\n".join(lines)
