"""Files that others may have put into a run: opens regular ones only, without waiting and up to a bound."""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO


def open_regular(path: str | Path, *, max_bytes: int | None = None) -> BinaryIO:
    """Opens a file to read its bytes, if it is a regular file: neither a pipe, which waits, nor a device without end.

    Args:
        path: The file; links are followed.
        max_bytes: Most bytes that it may have; None for any number.

    Raises:
        OSError: It cannot be opened, is of another kind or is larger; its `strerror` is a message for users.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "expected a regular file, got a pipe, socket or device", str(path))
        if max_bytes is not None and status.st_size > max_bytes:
            size = f"expected at most {max_bytes:,} bytes, got {status.st_size:,}"
            raise OSError(errno.EFBIG, size, str(path))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise
