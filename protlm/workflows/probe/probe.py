"""`protlm probe`: labelled proteins are embedded once, and a linear model reads the labels from every layer.

The same steps read them from features of the sequences alone and from the embeddings of random weights.
"""

import json
import os
import tempfile
from pathlib import Path

from protlm import files
from protlm.runtime.progress import StartProgress, no_progress
from protlm.workflows.probe.folds import Folds
from protlm.workflows.probe.labels import read_labels
from protlm.workflows.probe.page import render_page
from protlm.workflows.probe.report import ProbeReport, probe_report
from protlm.workflows.probe.request import PAGE_NAME, REPORT_NAME, ProbeRequest, check_request
from protlm.workflows.probe.targets import groups_of, targets_of


def probe(request: ProbeRequest, *, start_progress: StartProgress = no_progress) -> ProbeReport:
    """Predicts labels from a model's embeddings and from baselines; writes the report where one is asked for.

    Args:
        request: What is asked for.
        start_progress: Starts the stages `read` (bytes), `embed` (residues) and `fit` (fits), the last two repeatedly.

    Raises:
        UsageError: Options that contradict each other.
        ProtlmError: A file or model that cannot be read, labels from which nothing can be learned, a protein that is
            too long, or an existing report.
    """
    check_request(request)
    with tempfile.TemporaryDirectory(prefix="protlm-probe-") as name:
        folder = Path(os.path.realpath(name))
        labelled = read_labels(request, folder, start_progress)
        targets = targets_of(request, labelled)
        groups = groups_of(request, labelled)
        folds = Folds(request, labelled, targets, groups)
        divided = [folds.of_seed(request.seed + number) for number in range(request.num_seeds)]
        # It loads torch: after all that can be wrong with the labels.
        from protlm.workflows.probe.fits import fit_all

        fits = fit_all(request, labelled, targets, divided, folder, start_progress)
        report = probe_report(request, labelled, targets, folds, fits, groups)
    if request.out is not None:
        with files.made_folder(request.out):
            # The report last: who sees it finds the page.
            contents = {PAGE_NAME: render_page(report), REPORT_NAME: json.dumps(report.to_json(), indent=1) + "\n"}
            files.write_each_whole(request.out, contents)
    return report
