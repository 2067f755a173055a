"""What is wrong with a request of `protlm embed` is told before torch is loaded, as far as it shows without weights."""

import os
from pathlib import Path

from protlm.data.embeddings.layouts import LAYOUTS
from protlm.pretrained.model_files import description_of
from protlm.runtime.launch import check_processes, process_rank
from protlm.workflows.embed.folder import EmbedFolder, check_replaceable
from protlm.workflows.embed.inputs import ProteinInputs
from protlm.workflows.embed.settings import EmbedRequest, check_options


def check_request(request: EmbedRequest) -> None:
    """Checks options, inputs, output and model, and changes no file; `embed` checks again what may have changed.

    Raises:
        UsageError: Options that contradict each other.
        ConfigError: There are more or fewer processes than devices.
        ProtlmError: An input that is not there, an output that is in the way, or no such model.
    """
    check_options(request, None)
    check_processes(request.devices)
    if process_rank(request.devices) == 0:
        _check_out(request)
    ProteinInputs(request.inputs, request.split, request.on_bad_record, request.nucleotides)
    check_options(request, description_of(request.model))


def _check_out(request: EmbedRequest) -> None:
    out = Path(os.path.realpath(request.out))
    folder = EmbedFolder(out)
    # A killed run with a finished output is brought to its end first.
    if folder.is_finished:
        return
    check_replaceable(folder, LAYOUTS[request.layout], out, force=request.force)
    folder.check_not_in_use(resume=request.resume, force=request.force)
