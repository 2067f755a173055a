"""The request of `protlm score`: which mutants of what, and everything that can be checked of it without torch."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from protlm import files
from protlm.choices import InferencePrecision, ScoreStrategy, UsedPrecision
from protlm.data.parsing.sources import STDIN, is_protein_file
from protlm.data.records import OnBadRecord
from protlm.errors import ProtlmError, UsageError
from protlm.inference.long_proteins import Cut
from protlm.pretrained.model_description import ModelDescription
from protlm.pretrained.model_files import description_of
from protlm.runtime.devices import Devices
from protlm.runtime.launch import check_processes, process_rank
from protlm.workflows.pages.figures import PICTURE_MARK
from protlm.workflows.score.folder import ScoreFolder

ONE_DEVICE = Devices()

Kind = Literal["mutations", "singles", "variants", "assay", "benchmark"]
"""Where the mutants come from: a table beside a protein, every position of proteins, protein files of variants, a table
that has the variants' sequences, or a folder of such tables."""

BASELINE_COLUMNS = ("blosum62", "site_frequencies")
"""The columns of the baselines in the output."""

_PICTURES = (".png", ".svg")
_BEGINNING_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class ScoreRequest:
    """The options of a run.

    Attributes:
        model: A model directory or a run.
        input: A protein file, `-` for the standard input; or without `mutations`, `all_singles` and `wild_type` an
            assay of ProteinGym or a folder of them.
        out: The table to make; for a folder of assays a folder.
        mutations: A table with a column `mutant`, or `mutated_sequence`.
        all_singles: Score every single substitution of every protein.
        wild_type: Id of the protein in the input that the mutants are compared with.
        strategy: How mutants are scored.
        offset: Difference between the numbering of the mutations and that of the protein from 1.
        column: Name of the column of the scores.
        alignment: An alignment in A3M whose first sequence is the protein or a stretch of it.
        reference: The reference file of ProteinGym.
        heat_map: A picture of all single substitutions to make, .png or .svg.
        tokens_per_batch: Budget of one forward pass; None: a default for the device.
        window: See longer proteins in overlapping windows of so many residues.
        on_bad_record: Stop at a bad record or row, or skip and count it.
        precision: Number type of weights and matrix products; `auto`: float32.
        devices: The devices to compute on.
        seed: Of the bootstrap.
        resume: Resume an unfinished run; start one if there is none.
        force: Replace an existing output and, without `resume`, the work of an unfinished run.
    """

    model: Path
    input: str | Path
    out: Path
    mutations: Path | None = None
    all_singles: bool = False
    wild_type: str | None = None
    strategy: ScoreStrategy = "masked-marginals"
    offset: int = 0
    column: str = "score"
    alignment: Path | None = None
    reference: Path | None = None
    heat_map: Path | None = None
    tokens_per_batch: int | None = None
    window: int | None = None
    on_bad_record: OnBadRecord = "error"
    precision: InferencePrecision = "auto"
    devices: Devices = ONE_DEVICE
    seed: int = 0
    resume: bool = False
    force: bool = False

    @property
    def kind(self) -> Kind:
        """Where the mutants come from."""
        if self.all_singles:
            return "singles"
        if self.mutations is not None:
            return "mutations"
        if self.wild_type is not None:
            return "variants"
        return "benchmark" if Path(self.input).is_dir() else "assay"

    @property
    def cut(self) -> Cut:
        """The treatment of long proteins."""
        return Cut(window=self.window)

    def options(self, tokens_per_batch: int, precision: UsedPrecision) -> dict[str, Any]:
        """Returns the options that shape the output, as `--resume` compares them."""
        return {
            "strategy": self.strategy,
            "offset": self.offset,
            "column": self.column,
            "all-singles": self.all_singles,
            "wild-type": self.wild_type,
            "tokens-per-batch": tokens_per_batch,
            "window": self.window,
            # Earlier versions had none.
            **({} if precision == "32" else {"precision": precision}),
            "heat-map": None if self.heat_map is None else str(self.heat_map),
            "seed": self.seed,
        }


def check_request(request: ScoreRequest) -> None:
    """Checks options, inputs, output and model, and changes no file; `score` checks again what may have changed.

    Raises:
        UsageError: Options that contradict each other.
        ConfigError: There are more or fewer processes than devices.
        ProtlmError: An input that is not there, an output that is in the way, or no such model.
    """
    check_options(request)
    check_processes(request.devices)
    if process_rank(request.devices) == 0:
        folder = ScoreFolder(request.out)
        # A killed run with a finished output is brought to its end first.
        if not folder.is_finished:
            check_replaceable(request)
            check_picture(request, folder)
            folder.check_not_in_use(resume=request.resume, force=request.force)
    _check_inputs(request)
    check_model(request, description_of(request.model))


def check_options(request: ScoreRequest) -> None:
    """Raises UsageError if options contradict each other."""
    kind = request.kind
    if request.all_singles and request.mutations is not None:
        raise UsageError("--all-singles scores every single mutant and --mutations those of a file: give one of them")
    if kind == "variants" and (str(request.input) == STDIN or Path(request.input).is_fifo()):
        raise UsageError("--wild-type reads the proteins twice: give a file, and no pipe or standard input")
    if request.reference is not None and kind not in ("assay", "benchmark"):
        raise UsageError("--reference is for assays of ProteinGym: give INPUT as one of them, or as a folder of them")
    if kind == "benchmark":
        for name, value in (("--alignment", request.alignment), ("--heat-map", request.heat_map)):
            if value is not None:
                raise UsageError(f"{name} is for one protein, and a folder of assays has several: score one of them")
    if request.heat_map is not None and request.heat_map.suffix.lower() not in _PICTURES:
        raise UsageError(f"--heat-map: expected a name that ends in {' or '.join(_PICTURES)}, got {request.heat_map}")
    if request.heat_map is not None and os.path.realpath(request.heat_map) == os.path.realpath(request.out):
        raise UsageError("--heat-map and --out are the same file")
    given = [
        path for path in (request.mutations, request.alignment, request.reference, request.input) if path is not None
    ]
    for option, path in (("--out", request.out), ("--heat-map", request.heat_map)):
        for other in given:
            if path is not None and os.path.realpath(path) == os.path.realpath(other):
                raise UsageError(f"{option}: {path} is an input; choose another file")
    if kind in ("singles", "variants") and request.column in ("id", "mutant"):
        raise UsageError(f"--column: the output has a column {request.column} already; choose another name")
    if not request.column.isprintable():
        raise UsageError(f"--column: expected a name of printable characters, got {request.column!r}")
    if not request.column.strip() or request.column in BASELINE_COLUMNS:
        raise UsageError(f"--column: expected another name, which no baseline has, got {request.column!r}")


def check_model(request: ScoreRequest, description: ModelDescription | None) -> None:
    """Checks that a model is no causal one and reaches as far as --window; nothing for one that is not known yet.

    Raises:
        ProtlmError: A causal model, or windows longer than its learned positions.
    """
    if description is None:
        return
    if description.model.causal:
        raise ProtlmError(
            f"{request.model}: a causal model, which predicts the next residue and so cannot score one in its place; "
            "take a model that was trained on hidden residues"
        )
    limit = description.max_residues
    if request.window is not None and limit is not None and request.window > limit:
        raise ProtlmError(f"{request.model}: the positions of this model reach {limit:,} residues; lower --window")


def check_replaceable(request: ScoreRequest) -> None:
    """Checks that nothing is in the way of the table or folder, except one of its kind that may be replaced.

    Raises:
        ProtlmError: A file or folder is in the way.
    """
    if request.kind == "benchmark":
        _check_path(request.out, "--out", request.force, is_own=is_benchmark(request.out), kind="folder of scores")
    else:
        _check_path(request.out, "--out", request.force, is_own=_is_scores(request.out), kind="table of scores")


def check_picture(request: ScoreRequest, folder: ScoreFolder) -> None:
    """Checks that nothing is in the way of the picture, except one that may be replaced.

    Raises:
        ProtlmError: A file or folder is in the way.
    """
    path = request.heat_map
    if path is None or folder.has_written(path):
        return
    _check_path(path, "--heat-map", request.force, is_own=_is_picture(path), kind="picture of protlm")
    above = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
    if not above.is_dir():
        raise ProtlmError(f"{path}: {above} is no folder; choose another --heat-map")


def _check_path(path: Path, option: str, may_replace: bool, *, is_own: bool, kind: str) -> None:
    if not os.path.lexists(path):
        return
    if not may_replace:
        raise ProtlmError(f"{path}: exists already; choose another {option}, or replace it with --force")
    if not is_own:
        raise ProtlmError(f"{path}: no {kind}, so --force does not replace it; choose another {option}")


ASSAYS_NAME, SCORES_NAME, SUMMARY_NAME = "assays.csv", "scores", "summary.json"
"""The content of the output for a folder of assays."""


def is_benchmark(path: Path) -> bool:
    """Returns whether a folder is the output for a folder of assays, with nothing else in it."""
    return (
        path.is_dir()
        and {entry.name for entry in path.iterdir()} == {ASSAYS_NAME, SCORES_NAME, SUMMARY_NAME}
        and (path / SCORES_NAME).is_dir()
        and all(map(_is_scores, (path / SCORES_NAME).iterdir()))
    )


def _is_scores(path: Path) -> bool:
    """Returns whether a file is a table that this command made, by a column that each has, or an empty file."""
    beginning = _beginning(path)
    if beginning is None:
        return False
    columns = beginning.split(b"\n")[0].split(b",")
    return not beginning or BASELINE_COLUMNS[0].encode() in columns


def _is_picture(path: Path) -> bool:
    """Returns whether a file is a picture that protlm made, PNG or SVG, or empty."""
    beginning = _beginning(path)
    if beginning is None:
        return False
    is_image = beginning.startswith(b"\x89PNG") or b"<svg" in beginning
    return not beginning or (is_image and PICTURE_MARK.encode() in beginning)


def _beginning(path: Path) -> bytes | None:
    """Returns the first bytes of a regular file; None for anything else."""
    try:
        with files.open_regular(path) as file:
            return file.read(_BEGINNING_BYTES)
    except OSError:
        # Whatever cannot be read is not known to be ours.
        return None


def _check_inputs(request: ScoreRequest) -> None:
    kind, path = request.kind, Path(request.input)
    for other in (request.mutations, request.alignment, request.reference):
        if other is not None and not other.exists():
            raise ProtlmError(f"{other}: no such file")
    if str(request.input) == STDIN:
        return
    if not path.exists():
        raise ProtlmError(f"{path}: no such file or folder")
    if kind == "assay" and path.is_file() and is_protein_file(path):
        raise UsageError(f"{path}: proteins: say what to score of them, with --mutations, --all-singles or --wild-type")
    if kind != "benchmark" and path.is_dir():
        raise ProtlmError(f"{path}: a folder; expected a protein file")
