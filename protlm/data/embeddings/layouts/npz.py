"""Layout `npz`: a zip of arrays that `numpy.load` reads, under the names that TAPE's tape-embed gave them.

tape-embed stored under each id a pickled dictionary with `seq` (per-residue), `avg` (mean) and `pooled` (cls). Pickles
can run code, so this layout has none: with one kind of one layer the key is the id itself, otherwise `ID/seq`,
`ID/avg`, `ID/pooled` or `ID/logits`, followed, except for logits, by `/layer_N` if several layers were requested.

In an id that would unpack outside the folder of the zip, or that NumPy would read as another, slashes, backslashes,
NULs and the dot of a final `.npy` become `_`; an id of more than 60,000 bytes is cut. Keys that would be equal get
`#2`, `#3`, …. A member whose key was changed has the id as its comment. The comment of the zip, which NumPy ignores, is
`protlm embeddings` and then, as JSON, what the arrays are.
"""

import contextlib
import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from protlm import files
from protlm.data.embeddings.kinds import LAYER_PREFIX, Kind
from protlm.data.embeddings.layouts.contents import Column, Contents
from protlm.data.embeddings.layouts.layout import Layout, LayoutWriter, OutputSummary
from protlm.data.embeddings.layouts.names import all_different, collected

_SUFFIX = ".npy"
_MARK = b"protlm embeddings"
_TITLES: dict[Kind, str] = {"per-residue": "seq", "mean": "avg", "cls": "pooled", "logits": "logits"}
_FIRST_DATE = (1980, 1, 1, 0, 0, 0)
_UNIX = 3
_READABLE = 0o644 << 16
_MAX_KEY_BYTES = 60_000
_UNSAFE = re.compile(r"^/|^[A-Za-z]:|\\|\0|(?:^|/)\.\.?(?:/|$)|//|\.npy$|^$")
_REPLACED = re.compile(r"[/\\\0]|\.(?=npy$)|(?<=^[A-Za-z]):")


class NpzLayout(Layout):
    """Layout `npz`."""

    name = "npz"
    can_resume = False
    bytes_per_record = 320

    def is_own(self, out: Path) -> bool:
        """Returns whether this is a zip with the comment of this layout."""
        try:
            with files.open_regular(out) as file:
                if file.read(2) != b"PK":
                    return False
            with zipfile.ZipFile(out) as archive:
                return archive.comment.startswith(_MARK)
        except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):  # a name no UTF-8; a later format
            return False

    def summary(self, out: Path) -> OutputSummary:
        """Returns the summary of an archive; see `Layout.summary`."""
        with zipfile.ZipFile(out) as archive:
            # An earlier version wrote the mark alone.
            about = json.loads(archive.comment.removeprefix(_MARK) or b"{}")
            members = archive.namelist()
        columns = about.get("columns", ())
        which = next((place for place, (kind, _) in enumerate(columns) if kind != "logits"), 0)
        with np.load(out) as arrays:
            some = arrays[members[which].removesuffix(_SUFFIX)] if members else None
        return OutputSummary(
            num_entries=len(members) // max(1, len(columns)),
            kinds=tuple(dict.fromkeys(kind for kind, _ in columns)),
            layers=tuple(sorted({layer for _, layer in columns})),
            dim=None if some is None else some.shape[-1],
            dtype=None if some is None else str(some.dtype),
            model_hash=about.get("model_hash"),
            precision=about.get("precision"),
        )

    def open(self, path: Path, contents: Contents, *, resume: bool) -> "NpzWriter":
        """Starts a file; see `Layout.open`."""
        self._refuse_resume(resume=resume)
        return NpzWriter(path, contents)


class NpzWriter(LayoutWriter):
    """Adds arrays protein by protein."""

    def __init__(self, path: Path, contents: Contents) -> None:
        """Opens a new file."""
        super().__init__(contents, resume=False)
        self._keys = all_different(collected(map(key_of, contents.ids)))
        self._suffixes = _suffixes(contents)
        self._file: BinaryIO = path.open("wb")
        self._archive = zipfile.ZipFile(self._file, "w", zipfile.ZIP_STORED)
        about = {
            "columns": contents.columns, "model_hash": contents.model_hash, "precision": contents.precision
        }  # fmt: skip
        self._archive.comment = _MARK + b" " + json.dumps(about).encode()

    def flush(self) -> None:
        """Does nothing: the file is useless until it is complete."""

    def discard(self) -> None:
        """Closes the file, which is useless."""
        # Closing writes the table of contents, which may fail like the write before it.
        with contextlib.suppress(OSError, ValueError):
            self._archive.close()
        with contextlib.suppress(OSError):
            self._file.close()

    def _write(self, index: int, stored: Mapping[Column, np.ndarray]) -> None:
        key, record_id = self._keys.bytes_of(index).decode(), self.contents.record_id(index)
        for column, rows in stored.items():
            member = zipfile.ZipInfo(f"{key}{self._suffixes[column]}{_SUFFIX}", _FIRST_DATE)
            member.create_system, member.external_attr = _UNIX, _READABLE
            if key != record_id:
                member.comment = record_id.encode()[:_MAX_KEY_BYTES]
            with self._archive.open(member, "w", force_zip64=rows.nbytes >= 1 << 30) as file:
                np.lib.format.write_array(file, rows, allow_pickle=False)

    def _complete(self) -> None:
        self._archive.close()
        self._file.close()


def key_of(record_id: str) -> str:
    """Returns the key of a record, which other records may have too."""
    encoded = record_id.encode()
    if len(encoded) > _MAX_KEY_BYTES:
        record_id = encoded[:_MAX_KEY_BYTES].decode(errors="ignore")
    if not _UNSAFE.search(record_id):
        return record_id
    key = _REPLACED.sub("_", record_id)
    return "_" if key in ("", ".", "..") else key


def _suffixes(contents: Contents) -> dict[Column, str]:
    columns = contents.columns
    if len(columns) == 1:
        return {columns[0]: ""}
    num_layers = len({layer for kind, layer in columns if kind != "logits"})
    return {
        (kind, layer): f"/{_TITLES[kind]}" + (f"/{LAYER_PREFIX}{layer}" if num_layers > 1 and kind != "logits" else "")
        for kind, layer in columns
    }
