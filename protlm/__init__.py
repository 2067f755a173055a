"""protlm: protein language models with linear-cost Performer attention.

The public names load what they need on first use, so that importing the package stays cheap.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC_NAMES = {
    "load_model": "protlm.inference.protein_model",
    "open_embeddings": "protlm.data.embeddings.reader",
    "read_records": "protlm.data.parsing.reader",
}
__all__ = ["__version__", "load_model", "open_embeddings", "read_records"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC_NAMES:
        raise AttributeError(f"module 'protlm' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC_NAMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
