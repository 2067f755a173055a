"""residues.parquet: the prediction at every scored residue, written row by row as the stream of scores goes by."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from protlm import files
from protlm.data.storage.dataset import Split
from protlm.errors import ProtlmError
from protlm.inference.residue_scores import ResidueScores
from protlm.vocabulary import FIRST_RESIDUE, NUM_RESIDUES, RESIDUES

_ROWS_PER_GROUP = 1 << 16


def check_pyarrow() -> None:
    """Raises ProtlmError if pyarrow is not installed."""
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise ProtlmError("--residues needs pyarrow: pip install 'protlm[parquet]'") from None


class ResidueTable:
    """The open table; see `open_residue_table`."""

    def __init__(self, writer: Any, schema: Any) -> None:
        self._writer, self._schema = writer, schema
        self._held: list[Any] = []
        self._num_held = 0

    def add(self, split: Split, mask: int, scores: ResidueScores) -> None:
        """Adds the targets of a row.

        Args:
            split: The split that the records belong to.
            mask: Number of the masks, from 0.
            scores: The predictions.
        """
        import pyarrow as pa

        records, places = np.unique(scores.records, return_inverse=True)
        ids = pa.array([split.id(record) for record in records.tolist()])
        probabilities = np.exp(scores.log_probabilities[:, FIRST_RESIDUE : FIRST_RESIDUE + NUM_RESIDUES])
        columns = {
            "split": pa.DictionaryArray.from_arrays(np.zeros(len(scores), dtype=np.int8), [split.name]),
            "mask": np.full(len(scores), mask, dtype=np.int32),
            "id": pa.DictionaryArray.from_arrays(places.astype(np.int32), ids).cast(pa.string()),
            # As biologists count.
            "position": (scores.positions + 1).astype(np.int32),
            "residue": pa.DictionaryArray.from_arrays(scores.residues.astype(np.int8), list(RESIDUES)).cast(
                pa.string()
            ),
            "log_probability": scores.true_log_probabilities().astype(np.float32),
            "rank": (scores.ranks() + 1).astype(np.int8),
            "probabilities": pa.FixedSizeListArray.from_arrays(
                pa.array(probabilities.astype(np.float32).ravel()), NUM_RESIDUES
            ),
        }
        columns["split"] = columns["split"].cast(pa.string())
        self._held.append(pa.table(columns, schema=self._schema))
        self._num_held += len(scores)
        if self._num_held >= _ROWS_PER_GROUP:
            self.flush()

    def flush(self) -> None:
        """Writes the rows that are held, as one group: a group for each row of proteins would double the file."""
        import pyarrow as pa

        if self._held:
            self._writer.write_table(pa.concat_tables(self._held))
            self._held, self._num_held = [], 0


@contextmanager
def open_residue_table(path: Path) -> Iterator[ResidueTable]:
    """Opens a new table, which takes its place when the block ends without an error."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        [
            ("split", pa.string()),
            ("mask", pa.int32()),
            ("id", pa.string()),
            ("position", pa.int32()),
            ("residue", pa.string()),
            ("log_probability", pa.float32()),
            ("rank", pa.int8()),
            ("probabilities", pa.list_(pa.float32(), NUM_RESIDUES)),
        ],
        metadata={"probabilities": f"of the residues {RESIDUES}, in this order"},
    )
    with files.written_whole(path) as partial, pq.ParquetWriter(partial, schema) as writer:
        table = ResidueTable(writer, schema)
        yield table
        table.flush()
