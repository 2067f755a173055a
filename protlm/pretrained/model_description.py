"""What is known of a model beside its weights: the content of the config.json of a model directory."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from protlm.config import SPECIAL_TOKENS_PER_SEGMENT, ModelConfig
from protlm.data.batching.batches import Objective
from protlm.data.batching.masking import MaskRates
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
