"""MODEL, as users write it, becomes a network: an existing path, or the name of a model on the hub."""

import os
from pathlib import Path

from protlm.model.performer import Performer
from protlm.pretrained import foreign, hub
from protlm.pretrained.model_description import ModelDescription
from protlm.pretrained.model_directory import read_model
from protlm.pretrained.model_files import check_checkpoint_file, hub_name_of, is_foreign, model_path


def read_named_model(
    model: str | Path, *, revision: str | None = None, token: str | None = None, local_files_only: bool = False
) -> tuple[Performer, ModelDescription]:
    """Returns a network, in evaluation mode on the CPU, and its description.

    Args:
        model: A model directory, a run, a Hugging Face directory or a checkpoint `.pt` of fairseq; or, where there is
            no such path, `starter`, the model that is part of protlm, or `OWNER/NAME[@REVISION]` on the hub. `hf:`
            before the name passes over paths.
        revision: Branch, tag or commit on the hub, in place of the one in the name.
        token: For the hub.
        local_files_only: Take a model of the hub from its cache only.

    Raises:
        ModelError: There is no such model, or it cannot be read or run.
    """
    name = hub_name_of(model)
    if name is not None:
        asked = hub.HubName(name.name, revision or name.revision)
        snapshot = hub.fetch(asked, token=token, local_files_only=local_files_only)
        return foreign.read_folder(snapshot.folder, asked.name, snapshot.revision)
    path = model_path(model)
    if path.is_file():
        check_checkpoint_file(path)
        return foreign.read_file(path)
    if is_foreign(path):
        return foreign.read_folder(path, Path(os.path.realpath(path)).name)
    return read_model(path)
