"""A task of workers that is a number, for tests of how tasks are handed out; worker processes import it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Numbered:
    number: int

    @property
    def title(self):
        return str(self.number)
