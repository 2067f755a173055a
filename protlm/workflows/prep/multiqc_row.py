"""The row of a dataset in MultiQC, made from its manifest alone: hides its name and which numbers it has."""

import re

from protlm.data.storage.manifest import Manifest
from protlm.workflows.pages.multiqc import Column, general_statistics

_SUFFIXES = re.compile(r"(\.(fasta|fa|faa|a3m|dat|txt|xml))?(\.(gz|bz2|xz|zst))?$")

_COLUMNS = [
    Column(key="protlm_records", title="Proteins", description="Proteins of all splits"),
    Column(key="protlm_residues", title="Residues", description="Residues of all splits", scale="Greens"),
    Column(key="protlm_median_length", title="Median length", description="Median length of the largest split",
           suffix=" aa", scale="Purples"),
    Column(key="protlm_train", title="Train", description="Proteins to train on", hidden=True),
    Column(key="protlm_valid", title="Valid", description="Proteins to validate on", hidden=True),
    Column(key="protlm_test", title="Test", description="Proteins to test on", hidden=True),
    Column(key="protlm_ood", title="OOD", description="Proteins of held-out families, to test on", hidden=True),
    Column(key="protlm_duplicates", title="Duplicates", description="Proteins left out as another has their sequence",
           scale="Oranges"),
    Column(key="protlm_rejects", title="Rejected", description="Records left out for another reason", scale="Reds"),
]  # fmt: skip


def render_multiqc(manifest: Manifest) -> str:
    """Returns the content of the file in which MultiQC finds a dataset, named after its first source."""
    splits = manifest.splits
    largest = max(splits.values(), key=lambda split: split.num_records)
    values = {
        "protlm_records": sum(split.num_records for split in splits.values()),
        "protlm_residues": sum(split.num_residues for split in splits.values()),
        **({"protlm_median_length": largest.length_quantiles["median"]} if largest.num_records else {}),
        **{f"protlm_{name}": split.num_records for name, split in splits.items()},
        "protlm_duplicates": manifest.duplicates_removed.within_split + manifest.duplicates_removed.across_splits,
        "protlm_rejects": sum(manifest.rejects.values()),
    }
    description = "Protein datasets made by protlm prep."
    return general_statistics("protlm_prep", "protlm prep", description, _COLUMNS, {_sample(manifest): values})


def _sample(manifest: Manifest) -> str:
    first, *others = [source.name for source in manifest.sources]
    return _SUFFIXES.sub("", first) + (f" and {len(others)} more" if others else "")
