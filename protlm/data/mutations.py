"""The notation of mutations, `A42G:K51E`, and whether one fits a protein; the only file that parses it."""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from protlm.data.records import shown
from protlm.vocabulary import RESIDUES

SEPARATOR = ":"
"""Stands between the substitutions of a multiple mutant."""

_SUBSTITUTION = re.compile(r"([A-Z])(-?[0-9]{1,9})([A-Z])")


class Substitution(NamedTuple):
    """One residue in place of another.

    Attributes:
        position: Of the residue in its protein, from 0.
        wild_type: The letter of the protein.
        mutant: The letter that takes its place.
    """

    position: int
    wild_type: str
    mutant: str


def parse_mutant(text: str, protein: str, offset: int = 0) -> tuple[Substitution, ...]:
    """Returns the substitutions of a mutant, in the order of the text.

    Args:
        text: One substitution, `A42G`, or several, `A42G:K51E`. Position p of the protein, counted from 1, is written
            as p + offset.
        protein: The residues of the wild type.
        offset: Difference between the numbering of the text and that of the protein.

    Raises:
        ValueError: No such notation, a position outside the protein or named twice, or another wild-type letter than
            that of the protein.
    """
    substitutions = tuple(_parse_substitution(part.strip(), protein, offset) for part in text.split(SEPARATOR))
    positions = [substitution.position for substitution in substitutions]
    if len(set(positions)) < len(positions):
        twice = next(position for position in positions if positions.count(position) > 1)
        raise ValueError(f"{shown(text)}: expected each position once, got {twice + 1 + offset} again")
    return substitutions


def _parse_substitution(text: str, protein: str, offset: int) -> Substitution:
    match = _SUBSTITUTION.fullmatch(text)
    if match is None:
        raise ValueError(f"expected a mutation such as 'A42G' or 'A42G:K51E', got {shown(text)}")
    wild_type, number, mutant = match[1], int(match[2]), match[3]
    position = number - offset - 1
    if not 0 <= position < len(protein):
        raise ValueError(
            f"{shown(text)}: position {number} is outside the protein, whose residues have the numbers "
            f"{1 + offset} to {len(protein) + offset}"
        )
    if protein[position] != wild_type:
        raise ValueError(f"{shown(text)}: the protein has {protein[position]} at position {number}, not {wild_type}")
    if mutant not in RESIDUES:
        raise ValueError(f"{shown(text)}: {mutant!r} is no residue; expected one of {RESIDUES}")
    return Substitution(position, wild_type, mutant)


def mutant_name(substitutions: Iterable[Substitution], offset: int = 0) -> str:
    """Returns the notation of substitutions: the inverse of `parse_mutant`."""
    return SEPARATOR.join(
        f"{wild_type}{position + 1 + offset}{mutant}" for position, wild_type, mutant in substitutions
    )


def mutated(protein: str, substitutions: Sequence[Substitution]) -> str:
    """Returns the protein with the substitutions made."""
    letters = list(protein)
    for position, _, mutant in substitutions:
        letters[position] = mutant
    return "".join(letters)


def reverted(protein: str, text: str, offset: int = 0) -> str:
    """Returns the wild type of a mutant, given the mutant's residues and its notation.

    Raises:
        ValueError: No such notation, a position outside, or another letter there than that of the mutant.
    """
    backwards = []
    for part in text.split(SEPARATOR):
        match = _SUBSTITUTION.fullmatch(part.strip())
        backwards.append(part if match is None else f"{match[3]}{match[2]}{match[1]}")
    return mutated(protein, parse_mutant(SEPARATOR.join(backwards), protein, offset))


def differences(wild_type: str, variant: str) -> tuple[Substitution, ...]:
    """Returns the substitutions that lead from a protein to a variant of the same length."""
    assert len(wild_type) == len(variant), "a variant of another length has insertions or deletions"
    return tuple(
        Substitution(position, before, after)
        for position, (before, after) in enumerate(zip(wild_type, variant, strict=True))
        if before != after
    )
