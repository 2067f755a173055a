"""The number of residues, the tokens and the other columns of a shard from records, for tests."""

import numpy as np

from protlm.data.parsing.record_table import table_of
from protlm.data.records import UNKNOWN


def columns_of(records):
    table = table_of(records, {})
    columns = {"offsets": table.offsets}
    strings = {"ids": table.ids, "descriptions": table.descriptions, "cluster_id": table.cluster_ids}
    for name, column in (strings | {"family": table.families}).items():
        if column is not None:
            columns |= {f"{name}/bytes": column.text, f"{name}/offsets": column.offsets}
    for name in ("cluster_size", "taxon_id"):
        if np.any(getattr(table, name) != UNKNOWN):
            columns[name] = getattr(table, name)
    return len(table.tokens), [table.tokens], columns
