"""Layout `parquet`: a table with the columns `id`, `length` and `embedding`, for pandas, polars, DuckDB and Spark.

It is written in row groups of bounded size, so that memory does not grow with the table. The key `protlm` of the file's
metadata gives the kind, the layer and the model hash as JSON.
"""

import contextlib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from protlm.data.embeddings.kinds import Dtype, Kind
from protlm.data.embeddings.layouts.contents import Column, Contents
from protlm.data.embeddings.layouts.layout import Layout, LayoutWriter, OutputSummary
from protlm.errors import ProtlmError

_METADATA_KEY = b"protlm"
_GROUP_BYTES = 32 << 20
_MAX_GROUP_ROWS = 1 << 16


class ParquetLayout(Layout):
    """Layout `parquet`."""

    name = "parquet"
    can_resume = False

    def check(self, kinds: Sequence[Kind], layers: Sequence[int], dtype: Dtype) -> None:
        """Raises ValueError unless mean or cls of one layer is requested, ProtlmError without pyarrow."""
        self._check_one_row(kinds)
        self._check_one_column(kinds, layers)
        if importlib.util.find_spec("pyarrow") is None:
            raise ProtlmError("layout parquet needs pyarrow, which is not installed: pip install 'protlm[parquet]'")

    def is_own(self, out: Path) -> bool:
        """Returns whether the file has the metadata of this layout."""
        if not out.is_file():
            return False
        try:
            import pyarrow.parquet
        except ImportError:
            return False
        try:
            metadata = pyarrow.parquet.read_schema(out).metadata or {}
        except (OSError, ValueError):
            return False
        return _METADATA_KEY in metadata

    def summary(self, out: Path) -> OutputSummary:
        """Returns the summary of a table; see `Layout.summary`."""
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(out) as table:
            schema = table.schema_arrow
            about = json.loads(schema.metadata[_METADATA_KEY])
            rows = next(table.iter_batches(1, columns=["embedding"]), None)
            return OutputSummary(
                num_entries=table.metadata.num_rows,
                kinds=(about["kind"],),
                layers=(about["layer"],),
                dim=len(rows["embedding"][0]) if rows else None,
                dtype=str(np.dtype(schema.field("embedding").type.value_type.to_pandas_dtype())),
                model_hash=about["model_hash"],
                precision=about.get("precision"),
            )

    def open(self, path: Path, contents: Contents, *, resume: bool) -> "ParquetWriter":
        """Starts a file; see `Layout.open`."""
        self._refuse_resume(resume=resume)
        self.check(contents.kinds, contents.layers, contents.dtype)
        return ParquetWriter(path, contents)


class ParquetWriter(LayoutWriter):
    """Collects rows and writes them group by group."""

    def __init__(self, path: Path, contents: Contents) -> None:
        """Opens a new file."""
        import pyarrow
        import pyarrow.parquet

        super().__init__(contents, resume=False)
        ((kind, layer),) = contents.columns
        description = {
            "kind": kind, "layer": layer, "model_hash": contents.model_hash, "precision": contents.precision,
        }  # fmt: skip
        number = pyarrow.from_numpy_dtype(np.dtype(contents.dtype))
        columns = [("id", pyarrow.string()), ("length", pyarrow.int64()), ("embedding", pyarrow.list_(number))]
        self._schema = pyarrow.schema(columns, {_METADATA_KEY: json.dumps(description, sort_keys=True)})
        row_bytes = contents.model_dim * np.dtype(contents.dtype).itemsize
        num_rows = max(1, min(_MAX_GROUP_ROWS, _GROUP_BYTES // row_bytes, len(contents)))
        self._rows = np.empty((num_rows, contents.model_dim), dtype=contents.dtype)
        self._num_rows = 0
        self._num_written = 0
        self._file: BinaryIO = path.open("wb")
        # Floating-point numbers hardly repeat, so neither a dictionary nor compression would make the file smaller.
        self._table = pyarrow.parquet.ParquetWriter(
            self._file, self._schema, use_dictionary=False, compression="none", write_statistics=["id", "length"]
        )

    def flush(self) -> None:
        """Does nothing: the file is useless until it is complete."""

    def discard(self) -> None:
        """Closes the file, which is useless."""
        # Closing writes the footer, which may fail like the write before it.
        with contextlib.suppress(OSError, ValueError):
            self._table.close()
        with contextlib.suppress(OSError):
            self._file.close()

    def _write(self, index: int, stored: Mapping[Column, np.ndarray]) -> None:
        (self._rows[self._num_rows],) = stored.values()
        self._num_rows += 1
        if self._num_rows == len(self._rows):
            self._write_group()

    def _write_group(self) -> None:
        import pyarrow

        start, end = self._num_written, self._num_written + self._num_rows
        bounds = np.arange(self._num_rows + 1, dtype=np.int32) * self._rows.shape[1]
        embeddings: Any = pyarrow.ListArray.from_arrays(bounds, self._rows[: self._num_rows].reshape(-1))
        ids = [self.contents.record_id(index) for index in range(start, end)]
        lengths = self.contents.lengths[start:end]
        self._table.write_table(pyarrow.table([ids, lengths, embeddings], schema=self._schema))
        self._num_rows, self._num_written = 0, end

    def _complete(self) -> None:
        if self._num_rows:
            self._write_group()
        self._table.close()
        self._file.close()
