"""The layouts in which embeddings are written for other programs: `LAYOUTS`, by name on the command line."""

from protlm.data.embeddings.layouts.bio_embeddings import BioEmbeddingsLayout
from protlm.data.embeddings.layouts.biotrainer import BiotrainerLayout
from protlm.data.embeddings.layouts.choice import layout_name
from protlm.data.embeddings.layouts.contents import Column, Contents, Embeddings, columns_of
from protlm.data.embeddings.layouts.esm import EsmLayout
from protlm.data.embeddings.layouts.layout import Layout, LayoutWriter, OutputSummary
from protlm.data.embeddings.layouts.native import NativeLayout
from protlm.data.embeddings.layouts.npy import NpyLayout
from protlm.data.embeddings.layouts.npz import NpzLayout
from protlm.data.embeddings.layouts.parquet import ParquetLayout
from protlm.data.embeddings.layouts.uniprot import UniprotLayout

LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        NativeLayout(),
        UniprotLayout(),
        BioEmbeddingsLayout(),
        BiotrainerLayout(),
        EsmLayout(),
        NpzLayout(),
        ParquetLayout(),
        NpyLayout(),
    )
}

__all__ = [
    "LAYOUTS",
    "Column",
    "Contents",
    "Embeddings",
    "Layout",
    "LayoutWriter",
    "OutputSummary",
    "columns_of",
    "layout_name",
]
