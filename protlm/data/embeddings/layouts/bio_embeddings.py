"""Layout `bio-embeddings`: an HDF5 file as bio_embeddings wrote it, and its `mapping_file.csv`.

The key of a protein is the MD5 of its sequence, in hexadecimal digits; each dataset has the id as its attribute
`original_id`. bio_embeddings refused equal sequences; here the first keeps the key, and the others get `#2`, `#3`, ….
The mapping file has the columns of bio_embeddings: the key, without a title, `original_id` and `sequence_length`.
"""

import csv
import hashlib
from pathlib import Path

from protlm import files
from protlm.data.embeddings.layouts.contents import Contents
from protlm.data.embeddings.layouts.datasets_by_key import KeyedLayout
from protlm.data.embeddings.layouts.names import all_different, collected
from protlm.data.embeddings.layouts.sized_file import sync
from protlm.data.strings import Strings

_HEADER = ("", "original_id", "sequence_length")
_FIRST_LINE = f"{','.join(_HEADER)}\n".encode()


class BioEmbeddingsLayout(KeyedLayout):
    """Layout `bio-embeddings`."""

    name = "bio-embeddings"

    def paths(self, out: Path) -> tuple[Path, ...]:
        """Returns the file and the mapping file beside it."""
        return out, out.with_name("mapping_file.csv")

    def is_own(self, out: Path) -> bool:
        """Returns whether the file is of this layout, and no other file has the name of the mapping file."""
        _, mapping = self.paths(out)
        try:
            with files.open_regular(mapping) as file:
                is_mapping = file.read(len(_FIRST_LINE)) == _FIRST_LINE
        except FileNotFoundError:
            is_mapping = True
        except OSError:
            is_mapping = False
        return is_mapping and super().is_own(out)

    def _keys(self, contents: Contents) -> Strings:
        # MD5 as a name, not for security; some systems refuse it otherwise.
        sums = (hashlib.md5(contents.residues(index), usedforsecurity=False) for index in range(len(contents)))
        return all_different(collected(md5.hexdigest() for md5 in sums))

    def _write_companions(self, path: Path, contents: Contents, keys: Strings) -> None:
        _, mapping = self.paths(path)
        with files.written_whole(mapping) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
            rows = csv.writer(file, lineterminator="\n")
            rows.writerow(_HEADER)
            for index, (key, record_id) in enumerate(zip(keys, contents.ids, strict=True)):
                rows.writerow((key, record_id, len(contents.residues(index))))
        sync(mapping)
