"""The errors a user can cause: each is shown as one line `error: …` and ends the command with status 1."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import ValidationError


class ProtlmError(Exception):
    """A fault in the user's data, files or settings; its text says what, where and what to do."""


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


class CheckpointError(ProtlmError):
    """A run or a model directory that is missing, damaged or of another version."""


def validation_fault(error: "ValidationError") -> str:
    """Returns the first of the faults that pydantic found, in one line."""
    fault = error.errors(include_url=False)[0]
    message = fault["msg"].removeprefix("Value error, ").replace("Input", "the value")
    place = ".".join(str(key) for key in fault["loc"])
    if not place or fault["type"] == "value_error":
        return message
    return f"{place}: {message}, got {str(fault['input'])[:40]!r}"
