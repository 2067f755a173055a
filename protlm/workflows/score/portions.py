"""A portion is computed row by row and written as one array: the log-probabilities at its sites."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import BinaryIO, NamedTuple

import numpy as np

from protlm import files
from protlm.choices import ScoreStrategy, UsedPrecision
from protlm.data.records import shown
from protlm.data.storage.protein_store import ProteinStore, open_proteins
from protlm.errors import ProtlmError
from protlm.inference.long_proteins import Cut
from protlm.inference.marginals import Pass, row_of
from protlm.inference.memory import computed_by_halves
from protlm.inference.precision import overflow_hint
from protlm.inference.scoring import score_row
from protlm.model.performer import Performer
from protlm.runtime.progress import Advance, StartProgress, no_advance
from protlm.workflows.score.folder import ScoreFolder
from protlm.workflows.score.plan import Plan


class PortionRow(NamedTuple):
    """A row to compute, and the portion that it belongs to."""

    portion: int
    passes: list[Pass]
    is_last: bool

    @property
    def num_residues(self) -> int:
        """Residues that its passes see."""
        return sum(len(each.tokens) for each in self.passes)


class ScoreWork:
    """The share of one process: a `PortionWork`."""

    def __init__(
        self,
        folder: ScoreFolder,
        model: Performer,
        strategy: ScoreStrategy,
        cut: Cut,
        tokens_per_batch: int,
        precision: UsedPrecision = "32",
    ) -> None:
        """Prepares.

        Args:
            folder: The folder, which the first process fills with what was read.
            model: The network, in evaluation mode.
            strategy: How mutants are scored.
            cut: The treatment of long proteins.
            tokens_per_batch: Budget of a row.
            precision: Number type in which the network computes.
        """
        self._folder, self._model, self._precision = folder, model, precision
        self._options = strategy, cut, tokens_per_batch
        self._proteins: ProteinStore
        self._plan: Plan
        self._advance: Advance = no_advance
        self._gathered: list[np.ndarray] = []

    def waiting(self) -> list[int]:
        """Returns the portions that are not computed yet."""
        self._proteins = open_proteins(self._folder.store_path)
        self._plan = Plan(self._proteins, self._folder.sites(), *self._options)
        return self._folder.unfinished_portions(self._plan.num_portions)

    def start(self, portions: Sequence[int], start_progress: StartProgress) -> Iterator[PortionRow]:
        """Starts the stage `score` (residues), and returns an iterator over the rows of some portions."""
        self._advance = start_progress("score", sum(map(self._plan.num_residues, portions)))
        return self._rows(portions)

    def _rows(self, portions: Sequence[int]) -> Iterator[PortionRow]:
        for portion in portions:
            rows = list(self._plan.rows(portion))
            for number, passes in enumerate(rows, start=1):
                yield PortionRow(portion, passes, number == len(rows))

    def compute(self, row: PortionRow) -> np.ndarray:
        """Returns the log-probabilities at the sites of a row, float32 (sites, columns)."""
        arrays = []
        compute = partial(pass_log_probabilities, self._model, is_of_all_tokens=self._plan.num_columns > 1)
        for each, array in zip(row.passes, computed_by_halves(compute, row.passes), strict=True):
            name = shown(self._proteins.id(each.record))
            if array is None:
                raise ProtlmError(
                    f"{name}: {len(each.tokens):,} residues at a time do not fit into memory; score it in windows "
                    "with --window, or on a machine with more memory, where --resume goes on"
                )
            # A token that the model lacks has the logarithm −∞.
            if np.isnan(array).any():
                raise ProtlmError(f"{name}: its probabilities are not finite; {overflow_hint(self._precision)}")
            arrays.append(array)
        return np.concatenate(arrays)

    def add(self, row: PortionRow, results: np.ndarray) -> None:
        """Takes the log-probabilities of a row; the last row of a portion writes it."""
        self._gathered.append(results)
        if row.is_last:
            content, self._gathered = np.concatenate(self._gathered), []
            with files.written_whole(self._folder.portion_path(row.portion)) as path, path.open("wb") as file:
                write_array_head(file, content.shape)
                file.write(content.data)
        self._advance(row.num_residues)

    def close(self) -> None:
        """Does nothing: each portion is written at once."""


def pass_log_probabilities(model: Performer, passes: Sequence[Pass], *, is_of_all_tokens: bool) -> list[np.ndarray]:
    """Returns the log-probabilities at the predicted residues of each pass of a row, float32 (residues, columns).

    Args:
        model: In evaluation mode.
        passes: The passes of the row.
        is_of_all_tokens: Whether there is a column for each token, or one for the true token.
    """
    scores = score_row(model, row_of(passes))
    columns = scores.log_probabilities if is_of_all_tokens else scores.true_log_probabilities()[:, None]
    bounds = np.cumsum([len(each.places) for each in passes])[:-1]
    return np.split(columns.astype(np.float32), bounds)


def joined_portions(folder: ScoreFolder, plan: Plan) -> np.ndarray:
    """Returns the log-probabilities at all sites, in order, mapped from a file, float32 (sites, columns)."""
    path = folder.path / "log_probabilities.npy"
    # Written and not mapped: on a full disk that is an error, where a map would end the process.
    with path.open("wb") as file:
        write_array_head(file, (int(plan.bounds[-1]), plan.num_columns))
        for portion in range(plan.num_portions):
            file.write(np.load(folder.portion_path(portion), allow_pickle=False).data)
    joined: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    return joined


def write_array_head(file: BinaryIO, shape: tuple[int, ...]) -> None:
    """Writes the beginning of a float32 array's file `.npy`; the numbers follow.

    `numpy.save` writes them past Python, and of a full disk says neither the reason nor the place.
    """
    head = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.float32)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, head)
