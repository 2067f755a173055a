"""Layout `uniprot`: one HDF5 dataset for each accession, as in UniProt's own `per-protein.h5` and `per-residue.h5`.

The key of `sp|P69905|HBA_HUMAN` and `tr|…` is the accession, that of any other id the id itself. HDF5 does not allow
`/` and NUL in a key, nor a key `.` or an empty one: each becomes `_`. Keys that would be equal get `#2`, `#3`, …. Each
dataset has the id as its attribute `original_id`.
"""

import re

from protlm.data.embeddings.kinds import Dtype
from protlm.data.embeddings.layouts.contents import Contents
from protlm.data.embeddings.layouts.datasets_by_key import KeyedLayout
from protlm.data.embeddings.layouts.names import all_different, collected
from protlm.data.strings import Strings

_UNIPROT_ID = re.compile(r"(?:sp|tr)\|([^|]+)\|")
_UNSAFE = re.compile(r"[/\0]")


class UniprotLayout(KeyedLayout):
    """Layout `uniprot`."""

    name = "uniprot"
    default_dtype: Dtype = "float16"

    def _keys(self, contents: Contents) -> Strings:
        return all_different(collected(map(key_of, contents.ids)))


def key_of(record_id: str) -> str:
    """Returns the key of a record, which other records may have too."""
    match = _UNIPROT_ID.match(record_id)
    key = _UNSAFE.sub("_", match[1] if match else record_id)
    return "_" if key in ("", ".") else key
