from pathlib import Path
from typing import get_args

import pytest

from protlm.data.embeddings.kinds import LayoutName
from protlm.data.embeddings.layouts import LAYOUTS, choice, layout_name
from protlm.errors import UsageError


def test_every_layout_has_its_suffixes():
    assert tuple(choice._SUFFIXES) == tuple(LAYOUTS) == get_args(LayoutName)


@pytest.mark.parametrize(
    ("out", "layout"),
    [
        ("a.npz", "npz"),
        ("a.npy", "npy"),
        ("a.parquet", "parquet"),
        ("A.PARQUET", "parquet"),
        ("a.pq", "parquet"),
        ("folder.npz/a.h5", "protlm"),
        ("a.h5", "protlm"),
        ("a.hdf5", "protlm"),
        ("vectors", "protlm"),
        ("run.v2", "protlm"),
        (".npz", "protlm"),
    ],
)
def test_a_clear_suffix_chooses_the_layout(out, layout):
    assert layout_name(Path(out), None) == layout
    assert layout_name(Path(out), layout) == layout


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("out", ["vectors", "run.v2", "a.b.c"])
def test_any_layout_may_have_a_name_that_says_nothing(out, layout):
    assert layout_name(Path(out), layout) == layout


@pytest.mark.parametrize("layout", ["protlm", "uniprot", "bio-embeddings", "biotrainer"])
def test_hdf5_layouts_have_its_suffixes(layout):
    assert layout_name(Path("a.h5"), layout) == layout_name(Path("a.hdf5"), layout) == layout


@pytest.mark.parametrize(
    ("out", "layout", "message"),
    [
        (
            "a.parquet",
            "npz",
            r"a.parquet: a file .parquet holds the layout parquet; for --layout npz name it with .npz",
        ),
        ("a.npz", "protlm", "holds the layout npz; for --layout protlm name it with .h5 or .hdf5"),
        ("a.npy", "npz", "holds the layout npy"),
        ("a.h5", "npy", "holds the layout protlm or uniprot or bio-embeddings or biotrainer; for --layout npy"),
        ("a.HDF5", "parquet", "for --layout parquet name it with .parquet or .pq"),
        ("a.h5", "esm", "for --layout esm name it with no suffix: it is a folder"),
        ("a.pt", "esm", "a file .pt is not what embed writes"),
        ("a.csv", None, "a file .csv is not what embed writes; for --layout protlm name it with .h5 or .hdf5"),
        ("a.h5.gz", None, "a file .gz is not what embed writes"),
        ("a.npz.gz", "npz", "a file .gz is not what embed writes"),
    ],
)
def test_a_suffix_that_contradicts_the_layout_is_refused(out, layout, message):
    with pytest.raises(UsageError, match=message):
        layout_name(Path(out), layout)
