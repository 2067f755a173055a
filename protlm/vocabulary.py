"""The vocabulary: how the letters of a sequence are cleaned, and which token stands for which letter.

The 33 tokens are in ESM's order, so that ESM-2 models and tokenizers fit unchanged.
"""

from collections import Counter
from collections.abc import Sequence

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

    Lower case becomes upper, a trailing `*` is dropped, and a trailing `.` if there is no other gap; J becomes X, gaps
    (`-` `.`) and white space are removed. Remove line ends first: they would count as white space.

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
    # Some programs end a protein in a point where others write `*`.
    if repairs["gap"] == 1 and residues.endswith(b".") and not without_gaps.endswith(b"*"):
        repairs["gap"], repairs["trailing_stop"] = 0, 1
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


_NAMES = {
    "<cls>": ("<cls>", "[CLS]", "<s>", "<bos>"),
    "<pad>": ("<pad>", "[PAD]"),
    "<eos>": ("<eos>", "[SEP]", "</s>"),
    "<unk>": ("<unk>", "[UNK]"),
    "<mask>": ("<mask>", "[MASK]"),
}
"""The special tokens, and the names that they have in the vocabularies of other programs."""


class ModelVocabulary:
    """The tokens of a model, where a network has others than data: which of its tokens stands for which of ours.

    Attributes:
        tokens: The tokens in the order of the embedding's rows.
        is_ours: Whether they are the tokens of data, so that nothing is translated.
        ids: The token of the model that stands for each token of data, int64 (33,).
        columns: The token of the model with the name of each token of data, -1 where it has none, int64 (33,).
        lacked: The residue letters that the model reads as another token.
        stand_in: The token as which it reads them: X, or the unknown token.
    """

    def __init__(self, tokens: Sequence[str] = (), residues_as_x: str = "") -> None:
        """Matches the tokens by name.

        Args:
            tokens: The tokens of the model; by default those of data.
            residues_as_x: Residues that the model has a token for, but was trained to see as X.

        Raises:
            ValueError: A token that comes twice, or a special token or residue that the model needs and lacks.
        """
        self.tokens = tuple(tokens) or TOKENS
        self.is_ours = self.tokens == TOKENS and not residues_as_x
        own = {token: number for number, token in enumerate(self.tokens)}
        if len(own) < len(self.tokens):
            twice = next(token for token, count in Counter(self.tokens).items() if count > 1)
            raise ValueError(f"expected different tokens, got {twice[:20]!r} twice")
        if strange := set(residues_as_x) - set(RESIDUES):
            raise ValueError(f"expected residue letters to be read as X, got {min(strange)!r}")
        numbers = [next((own[name] for name in _NAMES.get(token, (token,)) if name in own), -1) for token in TOKENS]
        self.columns = np.array(numbers, dtype=np.int64)
        for token in ("<cls>", "<eos>", "<mask>", *RESIDUES[:NUM_STANDARD_RESIDUES]):
            if self.columns[TOKEN_IDS[token]] < 0:
                names = " or ".join(_NAMES.get(token, (token,)))
                raise ValueError(f"expected a token {names}, got none")
        x, unknown = (int(self.columns[TOKEN_IDS[token]]) for token in ("X", "<unk>"))
        stand_in = x if x >= 0 else unknown
        if stand_in < 0:
            raise ValueError("expected a token X, or <unk>, got neither")
        if residues_as_x and x < 0:
            raise ValueError("expected a token X for the residues that are read as X, got none")
        self.stand_in = self.tokens[stand_in]
        self.lacked = "".join(r for r in RESIDUES if self.columns[TOKEN_IDS[r]] < 0 or r in residues_as_x)
        self.ids = np.where(self.columns < 0, stand_in, self.columns)
        self.ids[[TOKEN_IDS[residue] for residue in self.lacked]] = stand_in

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def pad(self) -> int | None:
        """The token of the model for padding, if it has one."""
        number = int(self.columns[PAD])
        return number if number >= 0 else None

    @property
    def mask(self) -> int:
        """The token of the model that hides a residue."""
        return int(self.columns[MASK])
