"""Layout `esm`: a folder of `.pt` files as esm-extract writes them, one for each protein, and `index.tsv`.

Each file holds a dictionary that `torch.load(…, weights_only=True)` reads: `label` (the id) and the requested ones of
`representations` (per-residue), `mean_representations`, `bos_representations` (cls), each by number of layer, and
`logits`.

A file is named after the id, `sp|P69905|HBA_HUMAN.pt`. Letters that some file system refuses become `_`, a long id is
cut, and then the hash of the id is appended. The bar `|` stays, although Windows refuses it: it is in every id of
UniProt, and those who read such files look for it. The hash is also appended to an id that differs from an earlier one
only in case or in the encoding of its accents. `index.tsv` lists the id and the file of every protein.
"""

import os
import re
import shutil
import unicodedata
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from protlm import files
from protlm.data.embeddings.kinds import Kind
from protlm.data.embeddings.layouts.contents import Column, Contents
from protlm.data.embeddings.layouts.layout import Layout, LayoutWriter, OutputSummary
from protlm.data.embeddings.layouts.names import all_different, check_one_line_each, collected, is_repeat
from protlm.data.embeddings.layouts.sized_file import sync
from protlm.data.strings import Strings
from protlm.errors import ShardError

_SUFFIX = ".pt"
_INDEX = "index.tsv"
_HEADER = "protein\tfile\n"
_UNFINISHED = ".unfinished"
"""Name of the file that is being written."""

_TITLES: dict[Kind, str] = {
    "per-residue": "representations",
    "mean": "mean_representations",
    "cls": "bos_representations",
    "logits": "logits",
}
_MAX_NAME_BYTES = 200
_SYNC_THREADS = 16
_UNSAFE = re.compile(r"[/\\:*?\"<>\x00-\x1f\x7f-\x9f]|^[.-]|[. ]$")
_RESERVED = re.compile(r"(?:con|prn|aux|nul|conin\$|conout\$|(?:com|lpt)[\d¹²³]) *(?:\..*)?", re.IGNORECASE | re.DOTALL)
"""Names of devices on Windows, with or without a suffix."""


class EsmLayout(Layout):
    """Layout `esm`."""

    name = "esm"
    can_resume = True
    # A file takes up whole blocks of the disk.
    bytes_per_record = 4096

    def check_ids(self, ids: Strings) -> None:
        """Raises ProtlmError for an id that does not fit on a line of the index."""
        check_one_line_each(ids, self.name)

    def is_own(self, out: Path) -> bool:
        """Returns whether this is a folder with an index of ours, and without files that we would not write."""
        try:
            with files.open_regular(out / _INDEX) as file:
                if file.read(len(_HEADER)) != _HEADER.encode():
                    return False
            with os.scandir(out) as entries:
                return all(_is_ours(entry.name) and entry.is_file(follow_symlinks=False) for entry in entries)
        except OSError:
            return False

    def summary(self, out: Path) -> OutputSummary:
        """Returns the summary of a folder, after comparing its index with its files; see `Layout.summary`."""
        with (out / _INDEX).open(encoding="utf-8") as file:
            listed = [line.rstrip("\n").split("\t")[-1] for line in file][1:]
        there = {entry.name for entry in os.scandir(out) if entry.name.endswith(_SUFFIX)}
        if len(there.symmetric_difference(listed)):
            raise ShardError(f"{out}: {_INDEX} lists {len(listed)} files, and there are {len(there)}, or others")
        if not listed:
            return OutputSummary(num_entries=0)
        import torch

        content = torch.load(out / listed[0], weights_only=True)
        kinds = tuple(kind for kind, title in _TITLES.items() if title in content)
        by_layer = [content[_TITLES[kind]] for kind in kinds if kind != "logits"]
        some = next(iter(by_layer[0].values())) if by_layer else content[_TITLES["logits"]]
        return OutputSummary(
            num_entries=len(listed),
            kinds=kinds,
            layers=tuple(sorted({layer for tensors in by_layer for layer in tensors})),
            dim=some.shape[-1],
            dtype=str(some.dtype).removeprefix("torch."),
        )

    def open(self, path: Path, contents: Contents, *, resume: bool) -> "EsmWriter":
        """Starts a folder, or continues one; see `Layout.open`."""
        self.check_ids(contents.ids)
        names = file_names(contents.ids)
        if resume and not (self.is_own(path) and _lists(path / _INDEX, contents.ids, names)):
            raise ShardError(f"{path}: no unfinished output of these proteins; begin again without --resume")
        if not resume:
            _create(path, contents, names)
        return EsmWriter(path, contents, names, resume=resume)


class EsmWriter(LayoutWriter):
    """Writes a file for each protein."""

    def __init__(self, path: Path, contents: Contents, names: Strings, *, resume: bool) -> None:
        """Opens a folder with an index."""
        super().__init__(contents, resume=resume)
        self._path = path
        self._names = names
        self._unsynced: list[Path] = []

    def flush(self) -> None:
        """Syncs all written files to disk."""
        # A journalling file system syncs together what several threads ask for at once.
        with ThreadPoolExecutor(_SYNC_THREADS) as pool:
            list(pool.map(sync, self._unsynced))
        self._unsynced = []
        sync(self._path)

    def discard(self) -> None:
        """Does nothing; a resume can continue the folder."""

    def _write(self, index: int, stored: Mapping[Column, np.ndarray]) -> None:
        # Not at the top of the file: the command line names layouts and must not wait for torch.
        import torch

        content: dict[str, Any] = {"label": self.contents.record_id(index)}
        for (kind, layer), rows in stored.items():
            # A copy, so that a file holds only its own rows.
            tensor = torch.from_numpy(rows.copy())
            if kind == "logits":
                content[_TITLES[kind]] = tensor
            else:
                content.setdefault(_TITLES[kind], {})[layer] = tensor
        unfinished = self._path / _UNFINISHED
        # Given a path, torch would write its name into the file, and equal content would not give equal bytes.
        with unfinished.open("wb") as file:
            torch.save(content, file)
        path = self._path / (self._names.bytes_of(index).decode() + _SUFFIX)
        os.replace(unfinished, path)
        self._unsynced.append(path)

    def _complete(self) -> None:
        (self._path / _UNFINISHED).unlink(missing_ok=True)
        self.flush()


def file_names(ids: Strings) -> Strings:
    """Returns the name of each protein's file without suffix; all differ even if case is ignored."""
    names = collected(map(_safe, ids))
    repeated = is_repeat(names, _folded)
    if repeated.any():
        every = zip(ids, names, repeated, strict=True)
        names = collected(_with_hash(name, record_id) if again else name for record_id, name, again in every)
    # An id may be the very name that another one got with its hash.
    return all_different(names, _folded)


def _safe(record_id: str) -> str:
    """Returns an id if every file system allows it as a name, else a name made from it."""
    encoded = record_id.encode()
    name = _UNSAFE.sub("_", encoded[:_MAX_NAME_BYTES].decode(errors="ignore")) or "_"
    if _RESERVED.fullmatch(name):
        name = f"_{name}"
    return name if name == record_id else _with_hash(name, record_id)


def _with_hash(name: str, record_id: str) -> str:
    return f"{name}-{xxhash.xxh3_64_hexdigest(record_id.encode())}"


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _is_ours(name: str) -> bool:
    return name.endswith(_SUFFIX) or name in (_INDEX, _UNFINISHED)


def _index_lines(ids: Strings, names: Strings) -> Iterator[str]:
    yield _HEADER
    for record_id, name in zip(ids, names, strict=True):
        yield f"{record_id}\t{name}{_SUFFIX}\n"


def _lists(index: Path, ids: Strings, names: Strings) -> bool:
    """Returns whether an index lists these proteins; earlier versions gave some ids other names."""
    with index.open(encoding="utf-8", errors="replace", newline="") as file:
        try:
            return all(line == expected for line, expected in zip(file, _index_lines(ids, names), strict=True))
        except ValueError:
            return False


def _create(path: Path, contents: Contents, names: Strings) -> None:
    """Creates the output folder with `index.tsv` and no `.pt` file yet; it takes the place of an earlier output."""
    folder = files.partial_path(path)
    folder.mkdir()
    try:
        with (folder / _INDEX).open("w", encoding="utf-8", newline="") as file:
            file.writelines(_index_lines(contents.ids, names))
        sync(folder / _INDEX)
        files.remove(path)
        folder.replace(path)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    sync(path.parent)
