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


def absolute_layer(layer: int, last_layer: int) -> int:
    """Returns the absolute number of a layer; a negative one counts from the last layer, which is -1.

    Raises:
        ValueError: There is no such layer.
    """
    if not -last_layer - 1 <= layer <= last_layer:
        raise ValueError(f"layer: expected {-last_layer - 1} to {last_layer}, got {layer}")
    return layer if layer >= 0 else last_layer + 1 + layer
