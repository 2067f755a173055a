"""Names that users choose from, and a bound that they meet, which several floors act on.

Their own modules load torch, NumPy or pydantic; here the names cost nothing, so that `protlm COMMAND --help` can list
them at once. Names whose module is cheap stay there: `data.records`, `data.embeddings.kinds`.
"""

from typing import Literal

SplitName = Literal["train", "valid", "test", "ood"]
"""The splits of a dataset, in the order in which they claim a sequence: the first to have it keeps it."""

SplitOrAll = Literal[SplitName, "all"]
"""A split, or every split that a dataset has."""

SplitMethod = Literal["random", "cluster", "family", "file"]
"""How prep decides which split a record belongs to."""

Unclustered = Literal["random", "train"]
"""What a split by cluster does with a record that is in no cluster: draw it for itself, or train on it."""

StrategyName = Literal["auto", "ddp", "fsdp"]
"""How the devices of a run share the model."""

Stage = Literal["transfer", "distill"]
"""The stages in which a converted model learns from the one that it was made of."""

Precision = Literal["32", "bf16-mixed"]
"""The precision of the matrix products in training."""

InferencePrecision = Literal["auto", "32", "bf16", "fp16"]
"""The number type of weights and matrix products where nothing is trained; `auto` follows from command and device."""

UsedPrecision = Literal["32", "bf16", "fp16"]
"""The same, decided."""

DataMode = Literal["packed", "clipped", "concatenated"]
"""How proteins become the rows that a model is trained on."""

ModelFormat = Literal["protlm", "hf"]
"""The formats that a model can be written in: protlm's own, and that of transformers."""

FeatureMap = Literal["positive", "hyperbolic", "trig", "regularised", "oprf", "relu"]
"""The feature maps of FAVOR."""

NearFarMap = Literal["positive", "hyperbolic", "oprf"]
"""The feature maps whose weights have the unit of exact ones, and so can stand beside them in one sum."""

Balance = Literal["none", "diagonal", "dense"]
"""How q and k of a converted model are balanced: not, by a number for each dimension, or by a matrix of each head."""

AttentionKind = Literal[FeatureMap, "near-far", "softmax", "local"]
"""The kinds of attention of a layer: FAVOR with one of its maps, FAVOR with exact weights of near tokens, exact
attention, or exact attention to near tokens alone."""

EXACT_KINDS = ("softmax", "local")
"""The kinds of attention without random features."""

ProjectionKind = Literal["orthogonal", "iid", "simplex"]
"""How the rows of a random projection depend on each other."""

MOST_TOKENS = 2**24
"""Most tokens of a row: bounds of segments are int32, and the activations of a longer row fit on no device."""

ScoreStrategy = Literal["masked-marginals", "wt-marginals", "pseudo-perplexity"]
"""How mutants are scored: by the probabilities of the wild type's residues, hidden or seen, or by those of each whole
sequence."""

ResidueContext = Literal["masked", "wild-type"]
"""Whether a residue is hidden where its probabilities are asked for, or seen."""

ProbeTask = Literal["auto", "classification", "regression", "per-residue"]
"""What the labels of a probe are: classes or values of proteins, or classes of residues."""
