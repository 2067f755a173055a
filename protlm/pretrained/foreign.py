"""Models that other programs saved: which family a folder or file is of, and what is known of its origin."""

import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash

from protlm import files
from protlm.errors import ModelError
from protlm.model.performer import Performer
from protlm.pretrained.checkpoint_files import Tensors, file_hash, open_tensors
from protlm.pretrained.families.amplify import map_amplify
from protlm.pretrained.families.bert import map_bert, map_roberta
from protlm.pretrained.families.esm import map_esm
from protlm.pretrained.families.esmc import map_esmc
from protlm.pretrained.families.fairseq import map_fairseq, read_fairseq
from protlm.pretrained.families.name_map import Mapped, NameMap
from protlm.pretrained.model_description import ModelDescription, Origin
from protlm.pretrained.model_files import family_of

_FAMILIES: dict[str, Callable[[dict[str, Any], NameMap, Path], Mapped]] = {
    "esm": map_esm,
    "esmc": map_esmc,
    "bert": map_bert,
    "roberta": map_roberta,
    "AMPLIFY": map_amplify,
}
_FAIRSEQ = "fairseq"
_FILES = ("config.json", "vocab.txt", "tokenizer.json", "vocab.json")
_MASK_RATE = 0.15
"""All of these families were trained to predict 15 % of the residues, by BERT's mixture."""
_MOST_CARD_LETTERS = 1 << 20


def read_folder(folder: Path, source: str, revision: str | None = None) -> tuple[Performer, ModelDescription]:
    """Returns the network of a Hugging Face directory, in evaluation mode on the CPU, and its description.

    Args:
        folder: The directory.
        source: Name of the model, for the description.
        revision: Its commit on the hub.

    Raises:
        ModelError: A family that protlm does not run, or a checkpoint that is damaged or no whole model.
    """
    family, tensors, names, mapped = _open_folder(folder)
    files = [folder / name for name in _FILES if (folder / name).is_file()]
    with ThreadPoolExecutor(max_workers=1) as pool:
        hashes = pool.submit(_hashes, [*files, *tensors.files])
        model = names.build(mapped.config)
    origin = Origin(source=source, revision=revision, family=family, licence=_licence(folder), files=hashes.result())
    return model, _description(mapped, origin)


def read_file(path: Path) -> tuple[Performer, ModelDescription]:
    """Returns the network of a checkpoint of fairseq, in evaluation mode on the CPU, and its description.

    Raises:
        ModelError: As `read_folder` raises.
    """
    tensors, names, mapped = _open_file(path)
    origin = Origin(source=path.stem, family=_FAIRSEQ, files=_hashes(tensors.files))
    return names.build(mapped.config), _description(mapped, origin)


def describe(path: Path) -> ModelDescription:
    """Returns the description of a Hugging Face directory or a checkpoint of fairseq, without the hashes of its files.

    No tensor is read: each has its place, and the numbers in it may be anything.

    Raises:
        ModelError: As `read_folder` raises.
    """
    licence = None
    if path.is_file():
        _, names, mapped = _open_file(path)
        family, source = _FAIRSEQ, path.stem
    else:
        family, _, names, mapped = _open_folder(path)
        source, licence = Path(os.path.realpath(path)).name, _licence(path)
    names.check(mapped.config)
    origin = Origin(source=source, family=family, licence=licence, files={})
    return _description(mapped, origin).model_copy(update={"weights_hash": ""})


def _open_folder(folder: Path) -> tuple[str, Tensors, NameMap, Mapped]:
    """Returns the family, the tensors, their map and the settings of a Hugging Face directory."""
    family, content = family_of(folder)
    tensors = open_tensors(folder)
    names = NameMap(tensors, family)
    return family, tensors, names, _FAMILIES[family](content, names, folder)


def _open_file(path: Path) -> tuple[Tensors, NameMap, Mapped]:
    """Returns the tensors, their map and the settings of a checkpoint of fairseq."""
    arguments, tensors = read_fairseq(path)
    names = NameMap(tensors, _FAIRSEQ)
    return tensors, names, map_fairseq(arguments, names, path)


def _description(mapped: Mapped, origin: Origin) -> ModelDescription:
    joint = "\n".join(f"{name} {digest}" for name, digest in origin.files.items())
    return ModelDescription(
        model=mapped.config,
        mask_rate=_MASK_RATE,
        trained_residues=mapped.trained_residues,
        origin=origin,
        weights_hash=xxhash.xxh3_128_hexdigest(joint.encode()),
    )


def _hashes(paths: Sequence[Path]) -> dict[str, str]:
    try:
        return {path.name: file_hash(path) for path in paths}
    except OSError as error:
        raise ModelError(f"{error.filename}: {error.strerror}") from None


def _licence(folder: Path) -> str | None:
    """Returns the licence that the first lines of a model card name."""
    try:
        with files.open_regular(folder / "README.md") as file:
            card = file.read(_MOST_CARD_LETTERS).decode(errors="replace")
    except OSError:
        return None
    header = re.match(r"---\n(.*?)\n---", card, re.DOTALL)
    found = re.search(r"^license:\s*[\"']?([\w.+-]{1,60})", header[1], re.MULTILINE) if header else None
    return found[1] if found else None
