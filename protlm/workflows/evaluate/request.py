"""The request of `protlm eval`: what is measured on which proteins, checked before anything is computed.

Nothing here needs torch, so that what is wrong is told before that is loaded, which takes seconds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from protlm.choices import InferencePrecision, SplitName
from protlm.data.batching.masking import EVALUATION_SEED
from protlm.data.storage.dataset import Dataset, Split, open_dataset
from protlm.data.storage.manifest import MANIFEST_NAME
from protlm.errors import ProtlmError, UsageError
from protlm.pretrained.model_description import ModelDescription
from protlm.pretrained.model_files import description_of
from protlm.workflows.evaluate.residue_table import check_pyarrow

REPORT_NAME = "report.json"
PAGE_NAME = "report.html"
MULTIQC_NAME = "protlm_eval_mqc.json"
RESIDUES_NAME = "residues.parquet"


@dataclass(frozen=True, kw_only=True)
class EvalRequest:
    """A measurement that `protlm eval` is asked for.

    Attributes:
        model: A model directory or a run.
        dataset: A dataset of `protlm prep`.
        splits: Which splits are scored, in the order of the report; empty: all that have records.
        out: Folder of the report.
        seed: Of the masks and of the bootstrap.
        num_masks: How many times the split is scored, each time with other masks.
        mask_rate: Probability that a residue is hidden; None: as the model was trained.
        as_trained: Score BERT's mixture, or whatever the model was trained with, beside hidden residues.
        random_weights: Score the same architecture with random weights too.
        pseudo_perplexity: Number of proteins whose residues are hidden one at a time; 0 for none.
        attention: Ids of proteins whose attention maps are shown; empty: the paper's protein, if a scored split has it.
        approximation: Measure how near the attention of a FAVOR model is to exact attention.
        residues: Write `residues.parquet` with the prediction at every scored residue.
        precision: Number type of weights and matrix products; `auto`: float32.
        tokens_per_batch: Budget of a packed row; it changes no result beyond rounding.
        force: Replace an existing report.
    """

    model: Path
    dataset: Path
    splits: tuple[SplitName, ...]
    out: Path
    seed: int = EVALUATION_SEED
    num_masks: int = 1
    mask_rate: float | None = None
    as_trained: bool = False
    random_weights: bool = False
    pseudo_perplexity: int = 0
    attention: tuple[str, ...] = ()
    approximation: bool = False
    residues: bool = False
    precision: InferencePrecision = "auto"
    tokens_per_batch: int = 8192
    force: bool = False


REPORT_FILES = (REPORT_NAME, PAGE_NAME, MULTIQC_NAME, RESIDUES_NAME)
"""All that may be in the folder of a report."""


class Proteins(NamedTuple):
    """The dataset of a request, and the splits to score by name, with their shards open."""

    dataset: Dataset
    splits: dict[SplitName, Split]


def check_request(request: EvalRequest) -> Proteins:
    """Checks all that shows without weights, and returns the opened proteins.

    Raises:
        UsageError: Options that do not fit the model.
        ProtlmError: A dataset that cannot be read, an empty split, an existing report, or no such model.
    """
    check_out(request)
    dataset = open_dataset(request.dataset)
    splits = {name: dataset.split(name) for name in resolve_splits(request, dataset)}
    for split in splits.values():
        split.open_shards()
    description = description_of(request.model)
    if description is not None:
        check_options(request, description)
    return Proteins(dataset, splits)


def check_options(request: EvalRequest, description: ModelDescription) -> None:
    """Raises UsageError for options that the model has no use for."""
    of_masks = request.num_masks > 1 or request.mask_rate is not None
    if description.objective.causal and (of_masks or request.as_trained or request.pseudo_perplexity):
        raise UsageError(
            "this model predicts the next token and hides nothing: --masks, --mask-rate, --as-trained and "
            "--pseudo-perplexity are for masked models"
        )
    if request.approximation and not description.model.feature_maps:
        raise UsageError("--approximation is for FAVOR models; the attention of this model is exact")
    if description.window_tokens is not None and request.pseudo_perplexity:
        raise UsageError("--pseudo-perplexity takes proteins one by one, and this model reads windows of several")


def check_out(request: EvalRequest) -> None:
    """Raises ProtlmError if the report cannot be written: something else is in its place, or one is there already."""
    if request.residues:
        check_pyarrow()
    check_folder(request.out, REPORT_FILES, force=request.force)


def check_folder(folder: Path, names: Sequence[str], *, force: bool) -> None:
    """Raises ProtlmError if files cannot be written into a folder, or must not.

    Args:
        folder: The folder, which need not exist.
        names: The files.
        force: Whether files that exist are replaced.
    """
    for name in (MANIFEST_NAME, "config.toml", "config.json"):
        if (folder / name).exists():
            raise ProtlmError(f"{folder}: holds {name}, so it is no folder for a report; choose another --out")
    for path in (folder / name for name in names):
        if (folder.exists() and not folder.is_dir()) or path.is_dir():
            raise ProtlmError(f"{folder}: expected a folder for {path.name}, got something else; choose another --out")
        if path.exists() and not force:
            raise ProtlmError(f"{path}: exists already; replace it with --force or choose another --out")


def resolve_splits(request: EvalRequest, dataset: Dataset) -> list[SplitName]:
    """Returns the splits to score, each once.

    Raises:
        ShardError: A split that is empty or not there; the message names those that are.
    """
    # What a reader asks for first: proteins that the model has not been trained on or chosen by.
    order: tuple[SplitName, ...] = ("test", "ood", "valid", "train")
    filled = [name for name in order if name in dataset.manifest.splits and dataset.manifest.splits[name].num_records]
    for name in request.splits or filled or ("test",):
        dataset.split(name)
    return list(dict.fromkeys(request.splits)) or filled
