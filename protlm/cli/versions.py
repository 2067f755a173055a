"""`protlm --version --verbose`: the versions and capabilities to send along with a question."""

import platform
from importlib.metadata import version

import typer

_LIBRARIES = ("torch", "pytorch-lightning", "numpy", "h5py", "biopython")


def print_versions() -> None:
    """Prints the versions of the libraries, and which compiled code and backends run here."""
    import torch

    from protlm.data import compiled
    from protlm.ops import backends

    typer.echo(f"python {platform.python_version()} on {platform.system()} {platform.machine()}")
    for library in _LIBRARIES:
        typer.echo(f"{library} {version(library)}")
    typer.echo(f"threads {torch.get_num_threads()}")
    for name, description in backends().items():
        typer.echo(f"attention, {name}: {description}")
    typer.echo(f"compiled FASTA parser: {compiled.why_not() or 'available'}")
