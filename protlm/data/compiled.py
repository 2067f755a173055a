"""The compiled library for parsing, counting and k-mers: hides whether it was built, and how it is loaded."""

import ctypes
import functools
import importlib.util
from collections.abc import Callable

_EXTENSION = "protlm.data.parsing._fasta_parser"
# The same as in fasta_parser.cpp, for all its sources: after an update, the library of an earlier version may still be
# installed.
_VERSION = 4

Pointer = ctypes.c_void_p
Integer = ctypes.c_int64


def is_available() -> bool:
    """Returns whether the library was built and can be loaded."""
    return why_not() is None


def why_not() -> str | None:
    """Returns the reason why the library cannot be used, None if it can."""
    loaded = load()
    return loaded if isinstance(loaded, str) else None


def library() -> ctypes.CDLL:
    """Returns the library; its functions are declared in fasta_parser.cpp and kmers.cpp.

    Raises:
        RuntimeError: It is not available.
    """
    loaded = load()
    if isinstance(loaded, str):
        raise RuntimeError(f"the compiled FASTA parser is not available: {loaded}")
    return loaded


@functools.cache
def load(extension: str = _EXTENSION, version: int = _VERSION) -> ctypes.CDLL | str:
    """Returns the library, or the reason why there is none.

    Args:
        extension: Where it is, as a module.
        version: The version that it must be of.
    """
    spec = importlib.util.find_spec(extension)
    if spec is None or spec.origin is None:
        return "it was not built; install a C++17 compiler such as g++, then install protlm again"
    try:
        loaded = ctypes.CDLL(spec.origin)
        library_version = _declare(loaded, "protlm_fasta_version", Integer)()
        if library_version != version:
            return f"{spec.origin} is of version {library_version}, not {version}; install protlm again"
        _declare(loaded, "protlm_measure_fasta", None, ctypes.c_char_p, Integer, Pointer)
        _declare(loaded, "protlm_parse_fasta", None, ctypes.c_char_p, Integer, Integer, Pointer)
        _declare(loaded, "protlm_count_residues", None, Pointer, Integer, Pointer)
        _declare(loaded, "protlm_add_kmers", None, Pointer, Pointer, Integer)
        _declare(loaded, "protlm_find_kmers", Integer, Pointer, Pointer, *[Integer] * 3, Pointer, Pointer)
        _declare(
            loaded, "protlm_mark_known", None, Pointer, Pointer, Integer, Pointer, Pointer, *[Integer] * 3, Pointer
        )
    except (OSError, AttributeError) as error:
        return f"{spec.origin} cannot be loaded ({error}); install protlm again"
    return loaded


def _declare(loaded: ctypes.CDLL, name: str, returned: type | None, *arguments: type) -> Callable[..., int]:
    function = getattr(loaded, name)
    function.restype, function.argtypes = returned, arguments
    return function  # type: ignore[no-any-return]
