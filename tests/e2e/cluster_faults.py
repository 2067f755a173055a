"""Faults that the tests of clusters plant in the processes of workers, by Dask's own `Client.run`."""

import contextlib
import importlib
import os
import signal
import sys
from pathlib import Path


def before(name, act, number=1):
    """Lets a function of a module, `module:function`, act before its call of a number and those after it."""
    module, function = name.split(":")
    module = importlib.import_module(module)
    plain, calls = getattr(module, function), []

    def wrapped(*arguments, **options):
        calls.append(arguments)
        if len(calls) >= number:
            act()
        return plain(*arguments, **options)

    wrapped.plain = plain
    setattr(module, function, wrapped)


def mend(name):
    """Takes a fault back, if there is one."""
    module, function = name.split(":")
    if module in sys.modules:
        planted = getattr(sys.modules[module], function)
        setattr(sys.modules[module], function, getattr(planted, "plain", planted))


def die_once(path):
    """Kills this process, unless another one was killed so before."""
    with contextlib.suppress(FileExistsError):
        Path(path).touch(exist_ok=False)
        os.kill(os.getpid(), signal.SIGKILL)


def fill_disk():
    raise OSError(28, "No space left on device", "a disk")


def hide_folders():
    """Makes all folders of tests invisible."""
    is_dir = Path.is_dir
    Path.is_dir = lambda path, **options: "pytest" not in str(path) and is_dir(path, **options)
    Path.is_dir.plain = is_dir


def show_folders():
    Path.is_dir = getattr(Path.is_dir, "plain", Path.is_dir)
