"""The errors a user can cause: each is shown as one line `error: …` and ends the command with status 1."""

from pathlib import Path


class ProtlmError(Exception):
    """A fault in the user's data, files or settings; its text says what, where and what to do."""


class ConfigError(ProtlmError):
    """A configuration key or value that protlm does not accept."""


class RecordError(ProtlmError):
    """A protein record that cannot be used.

    Attributes:
        path: The file, as the user named it.
        line: Line number in the file, from 1.
        reason: A short word for counting, such as `illegal_character`.
    """

    def __init__(self, path: str | Path, line: int, message: str, *, reason: str = "malformed") -> None:
        super().__init__(f"{path}:{line}: {message}")
        self.path = str(path)
        self.line = line
        self.reason = reason


class ShardError(ProtlmError):
    """A dataset, shard or embeddings file that is missing, damaged or of another version."""


class CheckpointError(ProtlmError):
    """A run or a model directory that is missing, damaged or of another version."""
