"""The description of a saved model: all that is known of it besides its weights, stored as config.json."""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

import xxhash
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from protlm.choices import MOST_TOKENS, Balance, DataMode, NearFarMap
from protlm.config import SPECIAL_TOKENS_PER_SEGMENT, ModelConfig
from protlm.data.batching.masking import MaskRates, Objective
from protlm.vocabulary import RESIDUES, TOKENS

MODEL_FORMAT: Literal["protlm-model"] = "protlm-model"
MODEL_FORMAT_VERSION = 6
READABLE_VERSIONS = (1, 2, 3, 4, 5, 6)
"""In version 1 all models were trained on packed proteins with BERT's masking, and the keys for these were missing.
Before version 3 the valid split was masked as in training, and `valid.targets` was missing. Before version 4 protlm had
trained every model itself: none had an `origin`. Before version 5 none had `fine_tuned_from`, no model was exported
`unmeasured`, all layers of a model had one kind of attention, and the temperature of exact attention had a bound.
Before version 6 no model had an attention that was swapped for its exact one (`swap`)."""

EARLIER_MODEL_SETTINGS: dict[str, Any] = {"exact_temperature": 0.0}
"""Settings of `ModelConfig` that earlier versions lacked, with the values by which these models were computed."""

Count = Annotated[int, Field(ge=0, lt=2**63)]
Share = Annotated[float, Field(ge=0, le=1)]

Targets = Literal["hidden", "mixture", "next-token"]
"""The residues that a measurement scores: `hidden` by `<mask>`; `mixture`: some of them hidden, some replaced at random
and the rest visible, as in training; `next-token`: predicted from the residues before them."""


def dataset_hash_of(hashes: Sequence[str]) -> str:
    """Returns the hash of a dataset, or for several the xxh3-128 of their concatenated hashes."""
    return hashes[0] if len(hashes) == 1 else xxhash.xxh3_128_hexdigest("".join(hashes).encode())


def targets_of(objective: Objective) -> Targets:
    """Returns the kind of residues that an objective scores."""
    if objective.causal:
        return "next-token"
    return "hidden" if objective.rates.mask_share == 1 else "mixture"


class ValidScore(BaseModel):
    """The scores of the model and of the empirical baseline on the valid split, measured when the model was saved.

    Only scores of the same `targets` can be compared.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", ser_json_inf_nan="constants")

    targets: Targets
    num_targets: Count
    accuracy: float
    perplexity: float
    empirical_accuracy: float
    empirical_perplexity: float


class Origin(BaseModel):
    """The source of a model that was trained elsewhere.

    Attributes:
        source: Its name on the hub, or the name of its folder or file.
        revision: The commit on the hub; None for a model from elsewhere.
        family: Name of the family whose names its tensors have.
        licence: The licence, as the source gives it; None if it gives none.
        files: xxh3-128 of each of its files that was read, by name.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    source: str
    revision: str | None = None
    family: str
    licence: str | None = None
    files: dict[str, str]


class Swap(BaseModel):
    """The attention that took the place of a model's exact attention, without any training.

    Attributes:
        weights_hash: xxh3-128 of the weights of the model with exact attention.
        attention: The feature map.
        num_features: Random rows of each head.
        near_block: Tokens of a block whose weights, and those of the blocks beside it, stayed exact; 0: none.
        balance: How q and k were balanced.
        num_proteins: Proteins on which that was calibrated; 0 without.
        seed: Of the random rows and of the choice of these proteins.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    weights_hash: str
    attention: NearFarMap
    num_features: Count
    near_block: Count
    balance: Balance
    num_proteins: Count
    seed: Count


class ModelDescription(BaseModel):
    """The content of a model's config.json.

    The facts of its training, `seed` to `dataset_hash`, are None if another program trained it.

    Attributes:
        format: Marks the file as the description of a protlm model.
        format_version: Version of this file and of the tensors' names.
        vocabulary: The tokens of data in order; those of a model with others are in `model`.
        model: The shape of the network.
        mask_rate: Probability with which a residue was scored in training; `protlm eval` uses it too. Unused by a
            causal model, like the two shares.
        mask_share: Share of the scored residues that was replaced by `<mask>`.
        random_share: Share of the scored residues that was replaced by a random standard residue.
        data_mode: The way in which rows were made of proteins in training.
        window_tokens: Length of a window of concatenated proteins; None for the other modes.
        redraw_every_steps: Updates between two draws of the projections in training; 0: the projections were never
            redrawn, and the model is tied to the saved ones.
        seed: Seed of the training run.
        step: Number of optimizer updates that the weights have had.
        residue_counts: Residues of the training set by letter, for the empirical baseline.
        dataset_hash: Hash of the training dataset's manifest, or the joint hash of several; of a model that was trained
            on from other weights the joint hash of these and of the dataset.
        trained_residues: Length of the longest protein that the model was trained on; None if that is unknown.
        origin: The source of a model that was trained elsewhere; None for one that protlm trained.
        fine_tuned_from: The source of the weights with which training by protlm began, if another program had trained
            them; kept through further trainings.
        swap: The attention that took the place of the exact one of the model that this was made of; kept through
            further trainings. None for a model that has the attention that it was trained with.
        valid: Scores on the valid split; None without one, and while the model is `unmeasured`.
        unmeasured: Whether its run was stopped before it could measure it on the valid split, which there is.
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
    data_mode: DataMode = "packed"
    window_tokens: Annotated[int, Field(gt=SPECIAL_TOKENS_PER_SEGMENT)] | None = None
    redraw_every_steps: Count = 0
    seed: Count | None = None
    step: Count | None = None
    residue_counts: dict[str, Count] | None = None
    dataset_hash: str | None = None
    trained_residues: Annotated[int, Field(gt=0)] | None = None
    origin: Origin | None = None
    fine_tuned_from: Origin | None = None
    swap: Swap | None = None
    valid: ValidScore | None = None
    unmeasured: bool = False
    weights_hash: str = ""

    @field_validator("residue_counts")
    @classmethod
    def _of_every_residue(cls, counts: dict[str, int] | None) -> dict[str, int] | None:
        if counts is not None and sorted(counts) != sorted(RESIDUES):
            raise ValueError(f"expected a count for each of the letters {RESIDUES}")
        return counts

    @model_validator(mode="after")
    def _windows_where_concatenated(self) -> Self:
        if (self.window_tokens is not None) != (self.data_mode == "concatenated"):
            raise ValueError("window_tokens: expected a number with data_mode = 'concatenated' and null without")
        reach = self.model.max_positions if self.model.positions == "learned" else MOST_TOKENS
        if self.window_tokens is not None and self.window_tokens > reach:
            raise ValueError(f"window_tokens: expected at most {reach}, got {self.window_tokens}")
        return self

    @model_validator(mode="after")
    def _trained_or_from_elsewhere(self) -> Self:
        if self.origin is not None and self.fine_tuned_from is not None:
            raise ValueError("fine_tuned_from: expected null in a model with an origin, which protlm did not train")
        if self.origin is None:
            for name in ("seed", "step", "residue_counts", "dataset_hash"):
                if getattr(self, name) is None:
                    raise ValueError(f"{name}: expected a fact of the training of a model without origin, got null")
        return self

    @property
    def objective(self) -> Objective:
        """The training objective: masked residues, with their rates, or next tokens."""
        return Objective(causal=self.model.causal, rates=MaskRates(self.mask_rate, self.mask_share, self.random_share))

    @property
    def max_residues(self) -> int | None:
        """Longest protein that the model's learned positions allow, in residues; None: no limit."""
        if self.model.positions != "learned":
            return None
        return self.model.max_positions - SPECIAL_TOKENS_PER_SEGMENT


def upgrade(content: dict[str, Any]) -> dict[str, Any]:
    """Returns the content of the config.json of an earlier version with the keys of this one.

    Raises:
        ValidationError: The content does not describe a model.
    """
    version = content["format_version"]
    content = {**content, "format_version": MODEL_FORMAT_VERSION}
    if version < 3 and isinstance(content.get("valid"), dict):
        without_valid = ModelDescription.model_validate_json(json.dumps({**content, "valid": None}))
        content["valid"] = {**content["valid"], "targets": targets_of(without_valid.objective)}
    if version < 5 and isinstance(content.get("model"), dict):
        content["model"] = {**content["model"], **EARLIER_MODEL_SETTINGS}
    return content
