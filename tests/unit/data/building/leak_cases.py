"""Shards of a few sequences, for the tests that look for what splits have in common."""

import itertools

from protlm.data.records import Record
from protlm.data.storage.shards import ShardReader, write_shard
from tests.unit.data.storage.shard_columns import columns_of

numbers = itertools.count()
PROTEIN = "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQAPILSRVGDGTQDNLSGAEKAVQVKVKALPDAQFEVVHSLAKWKRQTLGQHDFSAGEG"


def write(folder, records, split="train"):
    name = f"{split}-{next(numbers):05d}.h5"
    write_shard(folder, name, split, *columns_of(records))
    return ShardReader(folder / name)


def shards(folder, *groups):
    """One shard for each group of sequences."""
    return [write(folder, [Record(f"r{number}", "", text) for number, text in enumerate(group)]) for group in groups]
