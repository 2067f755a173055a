"""Commands that are killed before one of the operations by which they change a folder."""

import os
import signal
import struct
import threading

from protlm import files

OPERATIONS = ("rename", "replace", "unlink", "remove", "mkdir", "rmdir", "link", "fsync")
"""The functions of `os` that count, besides the exchange of two names."""


class KillPoint:
    """Counts the operations of a process and kills it before one of them; passed as `prepare` to `Forked`.

    Attributes:
        number: How many operations are let through; None for all.
        count_path: Where the count is kept.
    """

    def __init__(self, number, count_path):
        self.number = number
        self.count_path = str(count_path)

    def __call__(self):
        self._count, self._lock = 0, threading.Lock()
        self._file = os.open(self.count_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for name in OPERATIONS:
            setattr(os, name, self._counted(getattr(os, name)))
        files.exchange = self._counted(files.exchange)

    def _counted(self, function):
        def counted(*arguments, **options):
            with self._lock:
                if self._count == self.number:
                    os.kill(os.getpid(), signal.SIGKILL)
                self._count += 1
                os.pwrite(self._file, struct.pack("q", self._count), 0)
            return function(*arguments, **options)

        return counted

    def count(self):
        """Returns how many operations the process has made, once it has ended."""
        with open(self.count_path, "rb") as file:
            return struct.unpack("q", file.read())[0]
