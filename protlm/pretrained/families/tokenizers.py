"""The vocabulary of a Hugging Face directory, from whichever of its files has it."""

from pathlib import Path
from typing import Any

from protlm.errors import ModelError
from protlm.pretrained.model_files import read_json

_MOST_BYTES = 1 << 20


def read_tokens(folder: Path, size: int) -> tuple[str, ...]:
    """Returns the tokens of a model in the order of its embedding.

    Args:
        folder: A Hugging Face directory.
        size: Number of tokens that its config.json says.

    Raises:
        ModelError: There is no vocabulary, or one of another size.
    """
    if (folder / "vocab.txt").is_file():
        path = folder / "vocab.txt"
        try:
            with path.open(encoding="utf-8") as file:
                tokens = tuple(file.read(_MOST_BYTES).split())
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"{path}: cannot be read: {error}") from None
    elif (folder / "tokenizer.json").is_file():
        path = folder / "tokenizer.json"
        tokens = _in_order(path, _of_tokenizer(read_json(path)))
    elif (folder / "vocab.json").is_file():
        path = folder / "vocab.json"
        tokens = _in_order(path, read_json(path))
    else:
        raise ModelError(f"{folder}: expected a vocabulary in vocab.txt, tokenizer.json or vocab.json, got none")
    if len(tokens) != size:
        raise ModelError(f"{path}: expected {size} tokens as config.json says, got {len(tokens)}")
    return tokens


def _of_tokenizer(content: dict[str, Any]) -> Any:
    model = content.get("model")
    numbers: Any = dict(model["vocab"]) if isinstance(model, dict) and isinstance(model.get("vocab"), dict) else {}
    added = content.get("added_tokens")
    for token in added if isinstance(added, list) else ():
        if isinstance(token, dict) and isinstance(token.get("content"), str):
            numbers[token["content"]] = token.get("id")
    return numbers


def _in_order(path: Path, numbers: Any) -> tuple[str, ...]:
    """Returns tokens by their numbers, which must be those from 0 on."""
    if not isinstance(numbers, dict) or not all(type(number) is int for number in numbers.values()):
        raise ModelError(f"{path}: expected the number of each token")
    tokens = sorted(numbers, key=lambda token: int(numbers[token]))
    if sorted(numbers.values()) != list(range(len(tokens))):
        raise ModelError(f"{path}: expected tokens numbered from 0 on, each once")
    return tuple(tokens)
