"""Sequences that a caller passes from Python: how each becomes tokens, and how a wrong one is named by its place."""

import numbers
import re
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from protlm import vocabulary
from protlm.data.records import shown
from protlm.vocabulary import MASK

_MASK_TOKEN = vocabulary.TOKENS[MASK]
_SPECIAL_TOKEN = re.compile("|".join(re.escape(token) for token in vocabulary.TOKENS if len(token) > 1))
_SHOWN_BYTES = 60


def residues_of(sequence: object, name: str) -> bytes:
    """Returns the cleaned residues of a sequence that a caller passed.

    Args:
        sequence: What was passed.
        name: Its name for messages, such as `sequences[3]`.

    Raises:
        ValueError: No `str`, no residue in it, or something else than residues.
    """
    text = _text_of(sequence, name)
    if special := _SPECIAL_TOKEN.search(text):
        raise ValueError(
            f"{name}: expected residues only, got the special token {special[0]!r} at position {special.start() + 1}; "
            "write X for an unknown residue, and leave the ends to protlm"
        )
    residues = _cleaned(text, name, 0)
    if not residues:
        raise ValueError(f"{name}: expected at least one residue, got {shown(text)}")
    return residues


def tokens_of(sequence: object, name: str, max_residues: int | None, *, may_be_masked: bool = False) -> np.ndarray:
    """Returns the tokens of a sequence that a caller passed, uint8 (num_residues,).

    Args:
        sequence: What was passed.
        name: Its name for messages.
        max_residues: Residues that the model's positions reach; None: any number.
        may_be_masked: Whether `<mask>` may stand in the place of a residue.

    Raises:
        ValueError: As `residues_of`, or a sequence that is too long.
    """
    if may_be_masked and isinstance(sequence, str) and _MASK_TOKEN in sequence:
        tokens = _masked_tokens(sequence, name)
    else:
        tokens = vocabulary.encode(residues_of(sequence, name))
    if max_residues is not None and len(tokens) > max_residues:
        raise ValueError(
            f"{name}: expected at most {max_residues} residues, which the positions of this model reach, "
            f"got {len(tokens)}"
        )
    return tokens


def each_tokens(
    sequences: Iterable[str], max_residues: int | None, *, may_be_masked: bool = False
) -> Iterator[np.ndarray]:
    """Returns an iterator over the tokens of each sequence.

    Raises:
        ValueError: At once, what is no series of sequences; later, as `tokens_of`.
    """
    # The keys of a mapping would be taken for the sequences.
    if isinstance(sequences, str | bytes | bytearray | Mapping) or not isinstance(sequences, Iterable):
        got = "a single str; put it into a list" if isinstance(sequences, str) else described(sequences)
        raise ValueError(f"sequences: expected several, such as a list of str, got {got}")
    return (
        tokens_of(sequence, f"sequences[{index}]", max_residues, may_be_masked=may_be_masked)
        for index, sequence in enumerate(sequences)
    )


def described(value: object) -> str:
    """Returns the description of a value that is no sequence, with the next step where it is clear."""
    text = shown(str(value))[1:-1]
    if value is None or isinstance(value, numbers.Number):
        return text
    kind = type(value).__name__
    if isinstance(value, bytes | bytearray):
        return f"{kind} {bytes(value[:_SHOWN_BYTES])!r}; decode it"
    if isinstance(value, tuple | list):
        return f"{kind} {text}; pass the sequence alone"
    return kind


def _text_of(sequence: object, name: str) -> str:
    if not isinstance(sequence, str):
        raise ValueError(f"{name}: expected a sequence as str, got {described(sequence)}")
    return sequence


def _masked_tokens(sequence: str, name: str) -> np.ndarray:
    """Returns the tokens of a sequence with hidden residues."""
    others = (match for match in _SPECIAL_TOKEN.finditer(sequence) if match[0] != _MASK_TOKEN)
    if special := next(others, None):
        raise ValueError(
            f"{name}: expected residues and <mask> only, got the special token {special[0]!r} at position "
            f"{special.start() + 1}; write X for an unknown residue, and leave the ends to protlm"
        )
    *before, last = sequence.split(_MASK_TOKEN)
    tokens, offset = [], 0
    for stretch in before:
        # A residue behind it: only at the end of the whole sequence a `*` is no residue.
        tokens.append(vocabulary.encode(_cleaned(stretch + "X", name, offset))[:-1])
        tokens.append(np.array([MASK], dtype=np.uint8))
        offset += len(stretch) + len(_MASK_TOKEN)
    return np.concatenate([*tokens, vocabulary.encode(_cleaned(last, name, offset))])


def _cleaned(text: str, name: str, offset: int) -> bytes:
    """Returns the residues of a stretch that begins at an offset of its sequence."""
    try:
        # Half a surrogate pair is no text, but an illegal character like any other.
        return vocabulary.clean(text.encode(errors="surrogatepass"))[0]
    except vocabulary.IllegalLetterError as error:
        moved = vocabulary.IllegalLetterError(error.letter, offset + error.offset)
        raise ValueError(f"{name}: {moved}; expected the letters of residues, {vocabulary.RESIDUES}") from None
