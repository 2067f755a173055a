"""Which layout an output has: the one asked for, or the one that the suffix of its name stands for."""

from pathlib import Path

from protlm.data.embeddings.kinds import LayoutName
from protlm.errors import UsageError

DEFAULT: LayoutName = "protlm"

_HDF5_SUFFIXES = (".h5", ".hdf5")
_SUFFIXES: dict[LayoutName, tuple[str, ...]] = {
    "protlm": _HDF5_SUFFIXES,
    "uniprot": _HDF5_SUFFIXES,
    "bio-embeddings": _HDF5_SUFFIXES,
    "biotrainer": _HDF5_SUFFIXES,
    "esm": (),
    "npz": (".npz",),
    "parquet": (".parquet", ".pq"),
    "npy": (".npy",),
}
"""The suffixes that say that a file is of a layout; without any of them it may be of each."""

_OF_NO_LAYOUT = (
    *(".pt", ".pth", ".pkl", ".pickle", ".csv", ".tsv", ".txt", ".json"),
    *(".gz", ".bz2", ".xz", ".zst", ".zip"),
)


def layout_name(out: Path, wanted: LayoutName | None) -> LayoutName:
    """Returns the name of an output's layout.

    Args:
        out: The output.
        wanted: The layout that the user asked for; None: that of the suffix, or `protlm` if it is not clear.

    Raises:
        UsageError: The suffix is one of other layouts or of none.
    """
    suffix = out.suffix.lower()
    possible = [name for name, suffixes in _SUFFIXES.items() if suffix in suffixes]
    if suffix in _OF_NO_LAYOUT or (possible and wanted not in (None, *possible)):
        holds = f"holds the layout {' or '.join(possible)}" if possible else "is not what embed writes"
        good = " or ".join(_SUFFIXES[wanted or DEFAULT]) or "no suffix: it is a folder"
        raise UsageError(f"{out}: a file {suffix} {holds}; for --layout {wanted or DEFAULT} name it with {good}")
    if wanted is not None:
        return wanted
    return possible[0] if len(possible) == 1 else DEFAULT
