"""`protlm score`: a model and mutants become a table of scores, compared with measurements where there are some.

What is scored is read once, the probabilities at the positions that it needs are computed and written in portions, and
the scores follow from them in the order of the input. All of this stays in `OUT.partial` until the output is complete.
"""

import shutil
from dataclasses import asdict

import numpy as np

from protlm import files
from protlm.choices import UsedPrecision
from protlm.data.records import shown
from protlm.data.storage.protein_store import ProteinStore, open_proteins
from protlm.errors import ProtlmError
from protlm.inference.precision import set_precision, used_precision
from protlm.inference.row_embeddings import default_tokens_per_batch
from protlm.model.performer import Performer
from protlm.pretrained.model_description import ModelDescription
from protlm.pretrained.model_names import read_named_model
from protlm.runtime import work_folder
from protlm.runtime.devices import best_device
from protlm.runtime.launch import check_processes, process_rank
from protlm.runtime.portion_work import compute_here
from protlm.runtime.progress import StartProgress, no_progress
from protlm.workflows.score.assembly import AssayScores, Scorer, output_paths, write_scores
from protlm.workflows.score.folder import ScoreFolder
from protlm.workflows.score.heat_map import draw_heat_map, printable
from protlm.workflows.score.inputs import Assay, ScoreInputs
from protlm.workflows.score.plan import Plan
from protlm.workflows.score.portions import ScoreWork, joined_portions
from protlm.workflows.score.report import AssayReport, ScoreReport, assay_report, benchmark_of, write_benchmark
from protlm.workflows.score.request import (
    SCORES_NAME,
    ScoreRequest,
    check_model,
    check_options,
    check_picture,
    check_replaceable,
)


def score(request: ScoreRequest, *, start_progress: StartProgress = no_progress) -> ScoreReport | None:
    """Scores every mutant of the inputs, in their order; a score does not depend on the other mutants.

    Args:
        request: The options of the run.
        start_progress: Starts the stages `read` (bytes), `score` (residues) and `write` (variants).

    Returns:
        The report; None in all processes but the first of a run on several devices.

    Raises:
        UsageError: Options that contradict each other.
        ProtlmError: A model or an input that cannot be read, an output that is in the way, a mutant that does not fit
            its protein, a protein that is too long, or an unfinished run with other inputs, options or model.
    """
    check_options(request)
    check_processes(request.devices)
    precision = used_precision(request.precision, may_be_half=False)
    model, description = read_named_model(request.model)
    check_model(request, description)
    set_precision(model, precision)
    tokens_per_batch = request.tokens_per_batch or default_tokens_per_batch()
    if process_rank(request.devices):
        from protlm.workflows.portion_devices import join

        join(model, _work(ScoreFolder(request.out), model, request, tokens_per_batch, precision), request.devices)
        return None
    ScoreFolder(request.out).complete_killed_run(resume=request.resume)
    if not ScoreFolder(request.out).is_finished:
        check_replaceable(request)
        check_picture(request, ScoreFolder(request.out))
    inputs = ScoreInputs(request, description, start_progress)
    folder = ScoreFolder.opened(
        request.out, description.weights_hash, request.options(tokens_per_batch, precision),
        resume=request.resume, force=request.force,
    )  # fmt: skip
    with folder.locked(), folder.kept_or_removed():
        # Those of a run whose output is complete already may be others too.
        folder.keep_inputs(inputs.read(folder.new_proteins_path), inputs.others)
        if not folder.is_finished:
            proteins = open_proteins(folder.store_path)
            plan = Plan(proteins, folder.sites(), request.strategy, request.cut, tokens_per_batch)
            check_lengths(proteins, plan, request, description)
            folder.drop_unusable(plan.portion_sizes(), plan.num_columns)
            _compute(_work(folder, model, request, tokens_per_batch, precision), model, request, start_progress)
            reports = _assemble(folder, proteins, plan, inputs, request, start_progress)
            has_picture = request.heat_map is not None and folder.picture_path(request.heat_map).exists()
            report = _report(request, proteins, plan, inputs, description, reports, precision, has_picture=has_picture)
            _finish(folder, report, request)
        report = ScoreReport.of(folder.report())
        work_folder.remove_finished(folder.path)
    return report


def _compute(work: ScoreWork, model: Performer, request: ScoreRequest, start_progress: StartProgress) -> None:
    """Computes the unfinished portions."""
    if request.devices.total > 1:
        # Imported here because importing Lightning takes seconds, and a single device does not need it.
        from protlm.workflows.portion_devices import compute_on_devices

        compute_on_devices(model, work, request.devices, start_progress)
    else:
        model.to(best_device())
        compute_here(work, start_progress)


def _assemble(
    folder: ScoreFolder,
    proteins: ProteinStore,
    plan: Plan,
    inputs: ScoreInputs,
    request: ScoreRequest,
    start_progress: StartProgress,
) -> list[AssayReport]:
    """Writes the output into the folder, and the picture; returns the report of each assay."""
    assays = [Assay(**assay) for assay in folder.assays()["assays"]]
    files.remove(folder.output_path)
    is_folder = request.kind == "benchmark"
    if is_folder:
        (folder.output_path / SCORES_NAME).mkdir(parents=True)
    paths = output_paths(folder.output_path, assays, SCORES_NAME if is_folder else None)
    scorer = Scorer(proteins, plan, joined_portions(folder, plan), inputs.frequencies)
    advance = start_progress("write", inputs.num_variants)
    reports = []
    for scores in write_scores(folder.variants_path, assays, scorer, proteins, request, paths, advance):
        # An assay of which all rows were skipped has none.
        protein, length = (
            (proteins.id(scores.target), int(proteins.lengths[scores.target])) if scores.num_variants else ("", 0)
        )
        reports.append(assay_report(scores, protein, length, request.seed))
        _draw(scores, proteins, request, folder)
    return reports


def _work(
    folder: ScoreFolder, model: Performer, request: ScoreRequest, tokens_per_batch: int, precision: UsedPrecision
) -> ScoreWork:
    return ScoreWork(folder, model, request.strategy, request.cut, tokens_per_batch, precision)


def check_lengths(proteins: ProteinStore, plan: Plan, request: ScoreRequest, description: ModelDescription) -> None:
    """Raises ProtlmError if a protein is longer than the model's learned positions."""
    limit = description.max_residues
    if limit is None or request.window is not None:
        return
    is_computed = np.diff(plan.sites.bounds) > 0
    too_long = np.flatnonzero((np.asarray(proteins.lengths) > limit) & is_computed)
    if len(too_long):
        first = int(too_long[0])
        raise ProtlmError(
            f"{shown(proteins.id(first))}: has {int(proteins.lengths[first]):,} residues, and the positions of this "
            f"model reach {limit:,}; score long proteins in windows with --window {limit}"
        )


def _draw(scores: AssayScores, proteins: ProteinStore, request: ScoreRequest, folder: ScoreFolder) -> None:
    """Draws the picture into the folder, if there is a single substitution to draw."""
    if request.heat_map is None:
        return
    path = folder.picture_path(request.heat_map)
    path.unlink(missing_ok=True)
    if scores.singles is None or np.isnan(scores.singles).all():
        return
    draw_heat_map(
        path,
        scores.singles,
        proteins.residues(scores.target).decode(),
        title=f"{printable(proteins.id(scores.target))}: {request.strategy}",
        offset=request.offset,
    )


def _report(
    request: ScoreRequest,
    proteins: ProteinStore,
    plan: Plan,
    inputs: ScoreInputs,
    description: ModelDescription,
    assays: list[AssayReport],
    precision: UsedPrecision,
    *,
    has_picture: bool,
) -> ScoreReport:
    _, counts = plan.pass_sizes()
    trained = description.trained_residues
    # What the model sees of each.
    seen = [length if request.window is None else min(length, request.window) for length in inputs.lengths]
    return ScoreReport(
        out=str(request.out),
        heat_map=str(request.heat_map) if has_picture else None,
        strategy=request.strategy,
        precision=precision,
        num_proteins=inputs.num_proteins,
        num_variants=inputs.num_variants,
        num_passes=int(counts.sum()),
        num_beyond_training=0 if trained is None else sum(length > trained for length in seen),
        trained_residues=trained,
        rejects=dict(inputs.rejects),
        repairs=dict(inputs.repairs),
        left_out=inputs.left_out,
        num_not_standard=inputs.num_not_standard,
        num_aligned=None if inputs.frequencies is None else inputs.frequencies.num_sequences,
        num_covered=None if inputs.frequencies is None else inputs.frequencies.num_covered,
        assays=assays,
        benchmark=benchmark_of(assays, request.seed) if request.kind == "benchmark" else None,
    )


def _finish(folder: ScoreFolder, report: ScoreReport, request: ScoreRequest) -> None:
    """Puts the complete output in its place, the picture first: once the table is there, all is."""
    if request.kind == "benchmark":
        write_benchmark(folder.output_path, report)
    check_replaceable(request)
    check_picture(request, folder)
    if report.heat_map is not None and request.heat_map is not None:
        request.heat_map.parent.mkdir(parents=True, exist_ok=True)
        with folder.picture_written(request.heat_map) as partial:
            shutil.copyfile(folder.picture_path(request.heat_map), partial)
    folder.publish(asdict(report))
