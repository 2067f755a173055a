"""`protlm --version --verbose`: what to send along with a question."""

import platform
from importlib.metadata import version

import typer

_LIBRARIES = ("torch", "pytorch-lightning", "numpy", "h5py", "biopython")


def print_versions() -> None:
    """Prints the versions of what protlm builds on, and which of its compiled parts and backends run here."""
    import torch

    from protlm.data import compiled
    from protlm.ops import backends

    typer.echo(f"python {platform.python_version()} on {platform.system()} {platform.machine()}")
    for library in _LIBRARIES:
        typer.echo(f"{library} {version(library)}")
    typer.echo(f"threads {torch.get_num_threads()}")
    for name, what in backends().items():
        typer.echo(f"attention, {name}: {what}")
    typer.echo(f"compiled FASTA parser: {compiled.why_not() or 'available'}")
