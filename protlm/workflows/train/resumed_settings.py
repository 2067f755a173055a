"""Which settings of a run may become others when it is resumed."""

from typing import Any


def first_difference(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[str, object, object] | None:
    """Returns key and both values of the first setting that differs in a way that a resumed run does not allow.

    train.max_steps may become anything, and the learning rates lower.
    """
    for section in ours:
        for key, value in ours[section].items():
            other = theirs.get(section, {}).get(key)
            if not (is_same(value, other) or _may_become(f"{section}.{key}", value, other)):
                return f"{section}.{key}", value, other
    return None


def is_same(value: Any, expected: Any) -> bool:
    """Returns whether two plain values are equal and of one type, and so their items: `7 == torch.tensor(7.0)`."""
    if type(value) is not type(expected):
        return False
    if type(expected) in (list, tuple):
        return len(value) == len(expected) and all(map(is_same, value, expected))
    return bool(value == expected)


def _may_become(key: str, value: Any, other: Any) -> bool:
    is_lower = type(value) is float and type(other) is float and other < value
    return key == "train.max_steps" or (key in ("train.lr", "train.muon_lr") and is_lower)
