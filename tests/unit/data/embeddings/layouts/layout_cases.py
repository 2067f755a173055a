"""Proteins and their embeddings for the tests of layouts."""

import numpy as np

from protlm.data.digests import sequence_digest
from protlm.data.embeddings.layouts import LAYOUTS, Contents
from protlm.data.strings import Strings

MODEL_DIM = 5
LAST_LAYER = 6

SEQUENCES = {
    "sp|P69905|HBA_HUMAN": "MVLS",
    "tr|A0A0/24|X": "M",
    "UniRef100_A0A7": "MKTAYIAK",
    "P69905": "ACDEFGH",
    "again": "MVLS",
    "again#2": "MVLSP",
    "Again": "KK",
    "AGAIN": "KKK",
    "../../escape": "LL",
    "/absolute/x": "LLL",
    "..": "LLLL",
    ".": "SS",
    "-rf": "SSS",
    "é/c": "SSSS",
    "日本": "TT",
    "CON": "TTT",
    "back\\slash": "TTTT",
    "dot.": "GG",
    "a.npy": "GGG",
    "a": "GGGG",
    "long" + "x" * 10_000: "VV",
    "long" + "x" * 9_999 + "y": "VVV",
}

SOME = dict(list(SEQUENCES.items())[:6])


def contents_of(sequences=SOME, kinds=("mean",), layers=(LAST_LAYER,), dtype="float32", model_hash="abc"):
    texts = [sequence.encode() for sequence in sequences.values()]
    digests = np.frombuffer(b"".join(map(sequence_digest, texts)), dtype=np.uint8).reshape(-1, 16)
    return Contents(
        ids=Strings.of(sequences),
        lengths=np.array([len(text) for text in texts], dtype=np.int64),
        digests=digests,
        residues=texts.__getitem__,
        kinds=tuple(kinds),
        layers=tuple(layers),
        last_layer=LAST_LAYER,
        model_dim=MODEL_DIM,
        dtype=dtype,
        model_hash=model_hash,
    )


def value(contents, column, index):
    """Returns what a record has of a kind and a layer: different for every one, and exact in float16."""
    kind, layer = column
    generator = np.random.default_rng([*kind.encode(), layer, index])
    return (generator.integers(-999, 999, contents.shape(kind, index)) / 4).astype(np.float32)


def embeddings_of(contents, index):
    return {column: value(contents, column, index) for column in contents.columns}


def write_all(layout_name, path, contents):
    """Writes an output whole, and returns its layout."""
    layout = LAYOUTS[layout_name]
    with layout.open(path, contents, resume=False) as writer:
        for index in range(len(contents)):
            writer.write(index, embeddings_of(contents, index))
    return layout


def bytes_of(layout, path):
    """Returns every file of an output by its place relative to it."""
    content_by_path = {}
    for place in layout.paths(path):
        files = sorted(place.iterdir()) if place.is_dir() else [place]
        content_by_path.update({str(file.relative_to(path.parent)): file.read_bytes() for file in files})
    return content_by_path
