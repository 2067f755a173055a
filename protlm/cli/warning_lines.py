"""Warnings of protlm's own modules, which print nothing themselves, reach the user as one line each."""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

from protlm.cli import output
from protlm.errors import ProtlmWarning


@contextlib.contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Within it, a `ProtlmWarning` is printed as a line `warning: …` on stderr, the same one once."""
    with warnings.catch_warnings():
        show_others = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *place: Any, **options: Any) -> None:
            if issubclass(category, ProtlmWarning):
                output.warn(str(message))
            else:
                show_others(message, category, *place, **options)

        warnings.showwarning = show
        warnings.simplefilter("default", ProtlmWarning)
        yield
