"""The forms in which embeddings are given to others: `LAYOUTS`, by the name each has on the command line."""

from protlm.data.layouts.bio_embeddings import BioEmbeddingsLayout
from protlm.data.layouts.contents import Column, Contents, Embeddings, columns_of
from protlm.data.layouts.esm import EsmLayout
from protlm.data.layouts.layout import Layout, LayoutWriter
from protlm.data.layouts.native import NativeLayout
from protlm.data.layouts.npy import NpyLayout
from protlm.data.layouts.npz import NpzLayout
from protlm.data.layouts.parquet import ParquetLayout
from protlm.data.layouts.uniprot import UniprotLayout

LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        NativeLayout(),
        UniprotLayout(),
        BioEmbeddingsLayout(),
        EsmLayout(),
        NpzLayout(),
        ParquetLayout(),
        NpyLayout(),
    )
}

__all__ = ["LAYOUTS", "Column", "Contents", "Embeddings", "Layout", "LayoutWriter", "columns_of"]
