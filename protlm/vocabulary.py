"""The vocabulary: how the letters of a sequence are cleaned, and which token stands for which letter.

The 33 tokens are in ESM's order, so that ESM-2 models and tokenizers fit unchanged.
"""

from collections import Counter

import numpy as np

TOKENS: tuple[str, ...] = (
    "<cls>", "<pad>", "<eos>", "<unk>",
    "L", "A", "G", "V", "S", "E", "R", "T", "I", "D", "P", "K", "Q", "N", "F", "Y", "M", "H", "W", "C",
    "X", "B", "U", "Z", "O", ".", "-", "<null_1>", "<mask>",
)  # fmt: skip
VOCABULARY_SIZE = len(TOKENS)
TOKEN_IDS: dict[str, int] = {token: index for index, token in enumerate(TOKENS)}

CLS = TOKEN_IDS["<cls>"]
PAD = TOKEN_IDS["<pad>"]
EOS = TOKEN_IDS["<eos>"]
MASK = TOKEN_IDS["<mask>"]

FIRST_RESIDUE = TOKEN_IDS["L"]
NUM_STANDARD_RESIDUES = 20
NUM_RESIDUES = 25
RESIDUES = "".join(TOKENS[FIRST_RESIDUE : FIRST_RESIDUE + NUM_RESIDUES])
"""The 25 residue letters in token order: 20 standard ones, then X B U Z O."""

_LETTERS = RESIDUES.encode()
_NOT_A_RESIDUE = 255
_TO_TOKEN = bytes(_LETTERS.index(byte) + FIRST_RESIDUE if byte in _LETTERS else _NOT_A_RESIDUE for byte in range(256))
_TO_LETTER = bytes(_LETTERS[t - FIRST_RESIDUE] if 0 <= t - FIRST_RESIDUE < NUM_RESIDUES else 63 for t in range(256))
_WHITE_SPACE = b" \t\r\n\v\f"
_GAPS = b"-."

REPAIRS = ("lower_case", "trailing_stop", "j_to_x", "gap", "white_space")
"""The repairs that `clean` makes and counts, in letters."""


class IllegalLetterError(ValueError):
    """A letter that stands for no residue.

    Attributes:
        letter: The letter.
        offset: Its position in the uncleaned text, from 0.
    """

    def __init__(self, letter: str, offset: int) -> None:
        super().__init__(f"illegal character {letter!r} at position {offset + 1}")
        self.letter = letter
        self.offset = offset


def clean(text: bytes) -> tuple[bytes, Counter[str]]:
    """Returns the residues of a sequence as a file writes it, and the repairs that were needed.

    Lower case becomes upper, a trailing `*` is dropped, J becomes X, gaps (`-` `.`) and white space are removed. Remove
    line ends first: they would count as white space.

    Args:
        text: The sequence as ASCII bytes.

    Returns:
        The cleaned residues, one byte each, and the number of letters repaired by each rule of `REPAIRS`.

    Raises:
        IllegalLetterError: A `*` before the end, a digit or any other character that stands for no residue.
    """
    repairs: Counter[str] = Counter()
    if not text.translate(None, delete=_LETTERS):
        return text, repairs
    residues = text.translate(None, delete=_WHITE_SPACE)
    repairs["white_space"] = len(text) - len(residues)
    without_gaps = residues.translate(None, delete=_GAPS)
    repairs["gap"] = len(residues) - len(without_gaps)
    upper = without_gaps.upper()
    repairs["lower_case"] = (
        sum(a != b for a, b in zip(without_gaps, upper, strict=True)) if upper != without_gaps else 0
    )
    if upper.endswith(b"*"):
        upper = upper[:-1]
        repairs["trailing_stop"] = 1
    repairs["j_to_x"] = upper.count(b"J")
    residues = upper.replace(b"J", b"X")
    if residues.translate(None, delete=_LETTERS):
        raise _first_illegal_letter(text)
    return residues, +repairs


def _first_illegal_letter(text: bytes) -> IllegalLetterError:
    allowed = _LETTERS + _LETTERS.lower() + b"Jj" + _GAPS + _WHITE_SPACE
    last = len(text.rstrip(_WHITE_SPACE + _GAPS)) - 1
    for offset, byte in enumerate(text):
        if byte not in allowed and not (byte == ord("*") and offset == last):
            return IllegalLetterError(text[offset : offset + 4].decode("utf-8", "replace")[0], offset)
    raise AssertionError("a rejected sequence has an illegal letter")


def encode(residues: bytes) -> np.ndarray:
    """Returns the residue tokens of a cleaned sequence, uint8 of shape (num_residues,), without `<cls>` and `<eos>`."""
    return np.frombuffer(residues.translate(_TO_TOKEN), dtype=np.uint8)


def decode(tokens: np.ndarray) -> str:
    """Returns the sequence of residue tokens; the inverse of `encode`.

    Raises:
        ValueError: A token does not stand for a residue.
    """
    tokens = np.asarray(tokens)
    if not are_residues(tokens):
        raise ValueError(f"tokens: expected residue tokens {FIRST_RESIDUE}…{FIRST_RESIDUE + NUM_RESIDUES - 1}")
    return tokens.astype(np.uint8).tobytes().translate(_TO_LETTER).decode()


def are_residues(tokens: np.ndarray) -> bool:
    """Returns whether every token stands for a residue."""
    return tokens.size == 0 or bool(tokens.min() >= FIRST_RESIDUE and tokens.max() < FIRST_RESIDUE + NUM_RESIDUES)
