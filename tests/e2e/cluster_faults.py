"""Faults that the tests of clusters plant in the processes of workers, by Dask's own `Client.run`."""

import contextlib
import importlib
import os
import signal
import sys
import time
from pathlib import Path


def hand_in(shared, task):
    return shared, task.number


def before(name, act, number=1, *, takes_arguments=False):
    """Lets a function of a module, `module:function`, act before its call of a number and those after it."""
    module, function = name.split(":")
    module = importlib.import_module(module)
    plain, calls = getattr(module, function), []

    def wrapped(*arguments, **options):
        calls.append(arguments)
        if len(calls) >= number:
            act(*arguments) if takes_arguments else act()
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


def kill(pid):
    os.kill(pid, signal.SIGKILL)


def kill_own():
    os.kill(os.getpid(), signal.SIGKILL)


def note(path):
    with open(path, "a", encoding="ascii") as file:
        file.write(".")


def note_process(path):
    # A moment, in which the other processes begin too.
    time.sleep(0.1)
    with open(path, "a", encoding="ascii") as file:
        file.write(f"{os.getpid()}\n")


def fail_first_portion(folder, _run, portion):
    """Fails the first portion of embed once another one is finished, whose workers' folders are in a folder."""
    end = time.monotonic() + 60
    while portion.number == 0:
        if any(folder.glob("parts*/*.h5")) or time.monotonic() > end:
            raise OSError(5, "Input/output error", "a disk")
        time.sleep(0.05)


def hide(folder):
    """Makes everything in a folder invisible to `os.path.exists`."""
    exists = os.path.exists
    os.path.exists = lambda path: not str(path).startswith(str(folder)) and exists(path)
    os.path.exists.plain = exists


def show():
    os.path.exists = getattr(os.path.exists, "plain", os.path.exists)
