"""Real antibody sequences of the R package alakazam: translated, and split so that no clone is in two splits."""

import csv
import gzip
from collections.abc import Iterator
from pathlib import Path

import xxhash

_BASES = "TCAG"
_RESIDUES = "FFLLSSSSYY**CC*WLLLLPPPPHHQQRRRRIIIMTTTTNNKKSSRRVVVVAAAADDEEGGGG"
_CODE = {
    a + b + c: _RESIDUES[16 * i + 4 * j + k]
    for i, a in enumerate(_BASES)
    for j, b in enumerate(_BASES)
    for k, c in enumerate(_BASES)
}
_SHORTEST, _MOST_UNKNOWN = 100, 2
_HELD_SHARE = 10
"""One clone in so many is held out."""


def vh_sequences(path: Path) -> Iterator[tuple[str, str, bool]]:
    """Yields the id of each distinct productive VH sequence, its residues, and whether its clone is held out.

    A clone is told by the genes V and J and the length of the junction.

    Args:
        path: `example_airr.tsv.gz`, in the format of the AIRR community.
    """
    seen: set[str] = set()
    with gzip.open(path, "rt", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            # In frame only where the alignment begins with a whole codon of the germline.
            if row["productive"] != "T" or (int(row["v_germline_start"] or 1) - 1) % 3:
                continue
            bases = row["sequence_alignment"].replace(".", "").replace("-", "")
            residues = "".join(_CODE.get(bases[place : place + 3], "X") for place in range(0, len(bases) - 2, 3))
            if "*" in residues or residues in seen or residues.count("X") > _MOST_UNKNOWN or len(residues) < _SHORTEST:
                continue
            seen.add(residues)
            genes = (row[name].split("*")[0].split(",")[0] for name in ("v_call", "j_call"))
            clone = "|".join((*genes, row["junction_length"]))
            yield row["sequence_id"], residues, xxhash.xxh3_64_intdigest(clone.encode()) % _HELD_SHARE == 0
