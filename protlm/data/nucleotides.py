"""Which records are nucleic acids: the letters of DNA and RNA stand for residues too, and would pass as a protein.

A record is one if its header says so, or if it has nothing but nucleotide letters over a length at which no protein
does: none of the 170,941 records of the project's data sets.
"""

import re

import numpy as np

from protlm import vocabulary
from protlm.data.records import shown
from protlm.data.strings import Strings

MIN_LENGTH = 30
"""Shorter records are nucleic acids only by their header: peptides of few kinds of residues do exist."""

_BASES = b"ACGTU"
_CERTAIN = _BASES + b"N"
# R, S, K and the like are common residues, and make up whole protamines.
_AMBIGUOUS = b"RYKMSWBDHV"
_MOST_AMBIGUOUS = 0.1
# Of two kinds of residues are the repeats of silk, `GAGAGA`.
_LEAST_BASES = 3
# As the PDB writes it in pdb_seqres.txt.
_MOLECULE = re.compile(r"(?:^|\s)mol:(na|protein)(?=\s|$)")
_MARK = b"mol:na"

_IS_LETTER = np.zeros(vocabulary.VOCABULARY_SIZE, dtype=bool)
_IS_LETTER[vocabulary.encode(_CERTAIN + _AMBIGUOUS)] = True


def is_nucleic_acid(residues: bytes, description: str) -> bool:
    """Returns whether a record is a nucleic acid, from its cleaned letters and its header."""
    if (molecule := _MOLECULE.search(description)) is not None:
        return molecule[1] == "na"
    if len(residues) < MIN_LENGTH:
        return False
    others = residues.translate(None, delete=_CERTAIN)
    if len(others) > _MOST_AMBIGUOUS * len(residues) or others.translate(None, delete=_AMBIGUOUS):
        return False
    # DNA has T where RNA has U.
    return len(set(residues.replace(b"U", b"T")) & set(_BASES)) >= _LEAST_BASES


def nucleic_acids(tokens: np.ndarray, offsets: np.ndarray, descriptions: Strings) -> np.ndarray:
    """Returns the indices of the records that are nucleic acids.

    Args:
        tokens: Residue tokens of all records back to back, uint8.
        offsets: The bounds of each record in `tokens`, int64 (records + 1).
        descriptions: The rest of each header.

    Returns:
        int64, ascending.
    """
    # The first letters tell nearly all proteins: each is looked at where all before it are letters of nucleotides.
    longer = np.flatnonzero(np.diff(offsets) >= MIN_LENGTH)
    for place in range(MIN_LENGTH):
        longer = longer[_IS_LETTER[tokens[offsets[longer] + place]]]
    is_candidate = np.zeros(len(offsets) - 1, dtype=bool)
    is_candidate[longer] = True
    if _MARK in descriptions.text.tobytes():
        is_candidate |= np.array([_MARK in description for description in descriptions.encoded()], dtype=bool)
    chosen = [
        place
        for place in np.flatnonzero(is_candidate).tolist()
        if is_nucleic_acid(vocabulary.decode(tokens[offsets[place] : offsets[place + 1]]).encode(), descriptions[place])
    ]
    return np.array(chosen, dtype=np.int64)


def refusal(record_id: str) -> str:
    """Returns the message for a record that is a nucleic acid where proteins are expected."""
    return (
        f"record {shown(record_id)} is a nucleic acid, by its header or its letters; expected proteins: translate it, "
        "leave such records out with --nucleotides skip, or read their letters as residues with --nucleotides keep"
    )
