"""The errors a user can cause: each ends the command with one line, and with status 1 or, for wrong usage, 2.

`ProtlmWarning` is for what stops nothing.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import ValidationError

_SHOWN_VALUE_LETTERS, _SHOWN_PLACE_LETTERS = 100, 200


class ProtlmError(Exception):
    """A fault in the user's data, files or settings; its text names the fault, the place and what to do."""


class ProtlmWarning(UserWarning):
    """Something that the user should know and that stops nothing; the command line prints it as `warning: …`."""


class UsageError(ProtlmError):
    """Options that contradict each other or lie out of range: the only error that ends a command with status 2."""


class ConfigError(ProtlmError):
    """A configuration key or value that protlm does not accept."""


class RecordError(ProtlmError):
    """A protein record that cannot be used.

    Attributes:
        path: The file, as the user named it.
        line: Line number in the file, from 1.
        message: What is wrong.
        reason: A short word for counting, such as `illegal_character`.
        record_id: The id of the record, empty if it has none.
    """

    def __init__(
        self, path: str | Path, line: int, message: str, *, reason: str = "malformed", record_id: str = ""
    ) -> None:
        super().__init__(f"{path}:{line}: {message}")
        self.path = str(path)
        self.line = line
        self.message = message
        self.reason = reason
        self.record_id = record_id

    def __reduce__(self) -> tuple[Any, ...]:
        return _record_error, (self.path, self.line, self.message, self.reason, self.record_id)

    def moved(self, num_lines: int) -> "RecordError":
        """Returns the same error that many lines further down, for one found in a piece of its file."""
        return _record_error(self.path, self.line + num_lines, self.message, self.reason, self.record_id)


def _record_error(path: str, line: int, message: str, reason: str, record_id: str) -> RecordError:
    return RecordError(path, line, message, reason=reason, record_id=record_id)


class ShardError(ProtlmError):
    """A dataset, shard or embeddings file that is missing, damaged or of another version."""


class ModelError(ProtlmError):
    """A model directory that is missing, damaged, of another version or of another model than expected."""


class RunError(ProtlmError):
    """A run folder, its run.json or one of its tables that is missing, damaged or of another run than expected."""


class CheckpointError(ProtlmError):
    """A checkpoint that `protlm train --resume` cannot continue from."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A value that pydantic refused.

    Attributes:
        place: Its keys from the outermost on, joined by dots; empty for the whole object.
        kind: Pydantic's name of the fault.
        message: The expectation, such as `input should be greater than 0`, or the message of a rule of ours.
        value: The value.
    """

    place: str
    kind: str
    message: str
    value: Any

    @property
    def is_rule(self) -> bool:
        """Whether a validator of ours refused the value: its message then names keys and values itself."""
        return self.kind == "value_error"

    def __str__(self) -> str:
        if self.is_rule or not self.place:
            return self.message
        if self.kind == "missing":
            return f"{self.place}: {self.message}"
        return f"{self.place}: {self.message}, got {_shown(self.value)}"


def _shown(value: Any) -> str:
    """Returns the beginning of a value as Python writes it; some are nested too deep or have too many digits for it."""
    try:
        return repr(value)[:_SHOWN_VALUE_LETTERS]
    except (RecursionError, ValueError):
        return "one too large to be shown"


def first_fault(error: "ValidationError") -> Fault:
    """Returns the first fault of a validation by pydantic."""
    details = error.errors(include_url=False)[0]
    message, place = details["msg"].removeprefix("Value error, "), ".".join(map(str, details["loc"]))
    # A key of a user's file may have any length.
    place = place[:_SHOWN_PLACE_LETTERS]
    if details["type"] != "value_error":
        message = message[0].lower() + message[1:]
    return Fault(place=place, kind=details["type"], message=message, value=details["input"])


def validation_fault(error: "ValidationError") -> str:
    """Returns the first fault of a validation by pydantic in one line."""
    return str(first_fault(error))
