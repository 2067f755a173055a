"""Layout `biotrainer`: the HDF5 file in which biotrainer 1.x, and biotrainer-core 2.0, look up a protein's embedding.

The key is what biotrainer's `calculate_sequence_hash` gives: the SHA-256, in hexadecimal digits, of the sequence, `_`
and its length. Each dataset has the id as its attribute `original_id`. Equal sequences have one dataset, with the id of
the first, since biotrainer takes a key that no protein of its own has for an error.
"""

import hashlib

from protlm.data.embeddings.layouts.contents import Contents
from protlm.data.embeddings.layouts.datasets_by_key import KeyedLayout
from protlm.data.embeddings.layouts.names import collected
from protlm.data.strings import Strings


class BiotrainerLayout(KeyedLayout):
    """Layout `biotrainer`."""

    name = "biotrainer"

    def _keys(self, contents: Contents) -> Strings:
        return collected(key_of(contents.residues(index)) for index in range(len(contents)))


def key_of(sequence: bytes) -> str:
    """Returns the key of a sequence."""
    return hashlib.sha256(b"%s_%d" % (sequence, len(sequence))).hexdigest()
