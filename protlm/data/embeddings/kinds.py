"""The kinds of embedding, and the layouts, number types and layer names under which they are stored."""

from typing import Literal, get_args

Kind = Literal["per-residue", "mean", "cls", "logits"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""All kinds; by default the first of them that a file has is opened."""

RESIDUE_KINDS: tuple[Kind, ...] = ("per-residue", "logits")
"""The kinds with one row a residue; the others have one row a protein."""

Dtype = Literal["float32", "float16"]
LayoutName = Literal["protlm", "uniprot", "bio-embeddings", "biotrainer", "esm", "npz", "parquet", "npy"]
LAYER_PREFIX = "layer_"
