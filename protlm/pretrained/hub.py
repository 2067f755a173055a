"""Models by their name on the Hugging Face hub, by its own library: its cache, its offline mode, its tokens."""

import re
from pathlib import Path
from typing import NamedTuple

from protlm.errors import ModelError

_NAME = re.compile(r"(?:hf:)?([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?")
_TEXTS = ["config.json", "vocab.txt", "vocab.json", "tokenizer.json", "tokenizer_config.json", "README.md"]
_SAFETENSORS = ["model.safetensors", "model-*.safetensors", "model.safetensors.index.json"]
_PICKLES = ["pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json"]


class HubName(NamedTuple):
    """A model on the hub: OWNER/NAME, and the branch, tag or commit asked for."""

    name: str
    revision: str | None


class Snapshot(NamedTuple):
    """The files of a model in the cache, and their commit."""

    folder: Path
    revision: str


def hub_name(text: str) -> HubName | None:
    """Returns the model that a text `OWNER/NAME[@REVISION]` names, with or without `hf:`; None for any other text."""
    found = _NAME.fullmatch(text)
    return HubName(found[1], found[2]) if found else None


def fetch(model: HubName, *, token: str | None = None, local_files_only: bool = False) -> Snapshot:
    """Returns the files of a model, downloaded if the cache has them not.

    Pickles are fetched only of a model without safetensors.

    Args:
        model: The model.
        token: Of the hub, for models that ask for one; default: the one that the library finds.
        local_files_only: Look into the cache only.

    Raises:
        ModelError: The library is not installed, the hub cannot be reached, or the model or a file of it is not there.
    """
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            GatedRepoError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )
    except ImportError:
        raise ModelError(
            f"{model.name}: no such path; to fetch it from the Hugging Face hub, pip install 'protlm[hub]', or "
            "download its files elsewhere and give their folder"
        ) from None
    elsewhere = f"hf download {model.name} --local-dir DIR where there is a network, and give DIR as the model"
    try:
        for weights in (_SAFETENSORS, _PICKLES):
            folder = Path(
                snapshot_download(
                    model.name, revision=model.revision, token=token, local_files_only=local_files_only,
                    allow_patterns=[*_TEXTS, *weights],
                )
            )  # fmt: skip
            if any(file.suffix in (".safetensors", ".bin") for file in folder.iterdir()):
                break
    except GatedRepoError:
        raise ModelError(f"{model.name}: the hub asks for a token and consent to its licence; see its page") from None
    except RepositoryNotFoundError:
        raise ModelError(f"{model.name}: no such path, and no such model on the hub (or it asks for a token)") from None
    except RevisionNotFoundError:
        raise ModelError(f"{model.name}: the hub has no revision {model.revision!r} of it") from None
    except (LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"{model.name}{_at(model)}: no such path, it is not in the cache, and the hub is out of reach "
            f"({type(error).__name__}); {elsewhere}"
        ) from None
    except ValueError as error:
        raise ModelError(f"{model.name}: {' '.join(str(error).split())[:200]}") from None
    if not (folder / "config.json").is_file():
        raise ModelError(f"{model.name}{_at(model)}: its files in {folder} have no config.json; {elsewhere}")
    return Snapshot(folder, folder.name)


def _at(model: HubName) -> str:
    return "" if model.revision is None else f"@{model.revision}"
