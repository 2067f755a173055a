"""`protlm score`: options in, a table of scores, a summary out."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from protlm.choices import ScoreStrategy
from protlm.cli import output
from protlm.cli.options import (
    DevicesOption,
    ForceOption,
    JsonOption,
    ModelArgument,
    NumNodesOption,
    OnBadRecordOption,
    PrecisionOption,
    ResumeOption,
    TokensPerBatchOption,
    WindowOption,
    one_of,
    seed_option,
)
from protlm.cli.progress import Progress

if TYPE_CHECKING:
    from protlm.workflows.score.estimate import ScoreCounts
    from protlm.workflows.score.report import AssayReport, Benchmark, ScoreReport

_UNITS = {"read": "B", "score": "residue", "write": "variant"}

InputArgument = Annotated[
    str,
    typer.Argument(
        metavar="INPUT",
        help="A protein file as for prep, or - for the standard input; or an assay of ProteinGym, or a folder of them.",
    ),
]
OutOption = Annotated[
    Path, typer.Option("--out", metavar="FILE", help="The table to make (CSV); for a folder of assays a folder.")
]
MutationsOption = Annotated[
    Path | None,
    typer.Option("--mutations", metavar="FILE", help="CSV or TSV with a column mutant: A42G, or A42G:K51E."),
]
AllSinglesOption = Annotated[
    bool, typer.Option("--all-singles", help="Score every single substitution of every protein.")
]
WildTypeOption = Annotated[
    str | None,
    typer.Option(
        "--wild-type", metavar="ID", help="The protein in INPUT that is mutated; alone: the others, variants."
    ),
]
StrategyOption = Annotated[
    ScoreStrategy, typer.Option("--strategy", metavar=one_of(ScoreStrategy), help="How mutants are scored.")
]
OffsetOption = Annotated[
    int,
    typer.Option(
        "--offset",
        metavar="N",
        min=-1_000_000,
        max=1_000_000,
        help="Position 1 of the protein has the number 1 + N in the mutations.",
    ),
]
ColumnOption = Annotated[str, typer.Option("--column", metavar="NAME", help="Name of the column of the scores.")]
AlignmentOption = Annotated[
    Path | None,
    typer.Option("--alignment", metavar="FILE", help="A3M of the protein: site frequencies as a second baseline."),
]
ReferenceOption = Annotated[
    Path | None,
    typer.Option("--reference", metavar="FILE", help="Reference file of ProteinGym: proteins and types of function."),
]
HeatMapOption = Annotated[
    Path | None,
    typer.Option("--heat-map", metavar="FILE", help="Also draw the single substitutions: .png or .svg."),
]
SeedOption = Annotated[int, seed_option("Seed of the bootstrap; scores draw nothing.", max=2**63 - 1)]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Print counts, passes, time and free disk; score nothing.")
]


def score_command(
    model: ModelArgument,
    input: InputArgument,
    out: OutOption,
    mutations: MutationsOption = None,
    all_singles: AllSinglesOption = False,
    wild_type: WildTypeOption = None,
    strategy: StrategyOption = "masked-marginals",
    offset: OffsetOption = 0,
    column: ColumnOption = "score",
    alignment: AlignmentOption = None,
    reference: ReferenceOption = None,
    heat_map: HeatMapOption = None,
    tokens_per_batch: TokensPerBatchOption = None,
    window: WindowOption = None,
    on_bad_record: OnBadRecordOption = "error",
    precision: PrecisionOption = "auto",
    devices: DevicesOption = 1,
    num_nodes: NumNodesOption = 1,
    seed: SeedOption = 0,
    resume: ResumeOption = False,
    force: ForceOption = False,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Score mutants: how likely is each, compared with the wild type?

    A score above 0 is likelier than the wild type. masked-marginals hides each mutated position, a pass of the protein
    for each; wt-marginals hides nothing, one pass for all; both sum log P(mutant) - log P(wild type) over the positions
    of a mutant. pseudo-perplexity compares whole sequences, and so takes insertions and deletions too, at a pass for
    each residue of each variant. The table keeps the columns of the input. Where these have a measurement (DMS_score),
    Spearman, AUC, MCC and NDCG are reported, of the model and of baselines: a model that does not beat BLOSUM62 is of
    no use for this protein.

    \b
    Examples:
      protlm score run protein.fasta --mutations mutations.csv --out scores.csv
      protlm score run protein.fasta --all-singles --out scan.csv --heat-map scan.png
      protlm score run variants.fasta --wild-type P62593 --strategy pseudo-perplexity --out variants.csv
      protlm score run assays --reference DMS_substitutions.csv --out benchmark
    """  # noqa: D301  \b must reach Typer as a backspace
    from protlm.runtime.devices import Devices
    from protlm.runtime.work_folder import partial_folder
    from protlm.workflows.score.request import ScoreRequest, check_request

    request = ScoreRequest(
        model=model, input=input, out=out, mutations=mutations, all_singles=all_singles, wild_type=wild_type,
        strategy=strategy, offset=offset, column=column, alignment=alignment, reference=reference, heat_map=heat_map,
        tokens_per_batch=tokens_per_batch, window=window, on_bad_record=on_bad_record,
        precision=precision, devices=Devices(devices, num_nodes), seed=seed, resume=resume, force=force,
    )  # fmt: skip
    # Before torch is loaded, which takes seconds.
    check_request(request)

    from protlm.workflows.score.estimate import ScoreEstimate, estimate
    from protlm.workflows.score.report import ScoreReport

    report: ScoreEstimate | ScoreReport | None
    try:
        with Progress(_UNITS) as progress:
            if dry_run:
                report = estimate(request, start_progress=progress.start, tell=lambda counts: _tell(counts, as_json))
            else:
                from protlm.workflows.score.score import score

                report = score(request, start_progress=progress.start)
    except KeyboardInterrupt:
        if not dry_run:
            output.warn_if_kept(partial_folder(out))
        raise
    if report is None:
        # Only the first process of a run prints.
        return
    for file in report.left_out:
        output.warn(f"{file}; left out")
    if report.rejects:
        output.warn("skipped " + ", ".join(f"{reason}: {count:,}" for reason, count in report.rejects.items()))
    if report.num_not_standard:
        output.warn(f"left out positions whose residue is none of the 20 standard ones: {report.num_not_standard:,}")
    if isinstance(report, ScoreReport) and heat_map is not None and report.heat_map is None:
        output.warn(f"{heat_map}: not made, as no row is a single substitution")
    if isinstance(report, ScoreEstimate):
        rate = ("passes a second, in a sample", f"{report.passes_per_second:,.3g}")
        output.print_time_and_disk(report, rate, as_json=as_json)
    elif as_json:
        output.print_json(report)
    else:
        if any(assay.num_not_standard for assay in report.assays):
            output.warn(
                "some mutants replace, or put in, a residue such as X: the model hardly knows those, so replacing one "
                "seems a gain, and putting one in a loss; do not compare these scores with others"
            )
        _print(report, column)


def _print(report: "ScoreReport", column: str) -> None:
    if report.benchmark is not None:
        _print_assays(report.assays)
        _print_benchmark(report.benchmark)
    for assay in report.assays if report.benchmark is None else ():
        if assay.metrics:
            output.print_table(
                ("measured", *_HEADER), [(_name(name), *_cells(row)) for name, row in assay.metrics.items()]
            )
            print()
            print(assay.verdict)
    output.print_pairs(_pairs(report, column))


_HEADER = ("Spearman", "95 % interval", "AUC", "MCC", "NDCG")


def _print_assays(assays: "list[AssayReport]") -> None:
    header = ("assay", "variants", "Spearman", "95 % interval", "of BLOSUM62")
    rows = []
    for assay in assays:
        of_model, of_blosum = (assay.metrics.get(name, {}).get("spearman", {}) for name in ("model", "blosum62"))
        rows.append((assay.name, f"{assay.num_variants:,}", _number(of_model), _interval(of_model), _number(of_blosum)))
    output.print_table(header, rows)
    print()


def _print_benchmark(benchmark: "Benchmark") -> None:
    what = "mean over types of function" if benchmark.rule == "types" else "mean over assays"
    rows = [(_name(name), *_cells(row)) for name, row in benchmark.metrics.items()]
    rows += [
        (f"{_name(name)}, {function}", *(_number({"value": values[metric]}) if metric else "" for metric in _METRICS))
        for function, by_name in benchmark.by_function.items()
        for name, values in by_name.items()
    ]
    output.print_table((what, *_HEADER), rows)
    for name, assays in benchmark.lacking.items():
        some = assays[0] if len(assays) == 1 else f"{assays[0]} and {len(assays) - 1} more"
        print(f"no mean of {_name(name)}, which has no score for variants of {some}")
    print()


_METRICS = ("spearman", "", "auc", "mcc", "ndcg")


def _name(prediction: str) -> str:
    from protlm.workflows.score.report import NAMES

    return NAMES[prediction]


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(_number(row[metric]) if metric else _interval(row["spearman"]) for metric in _METRICS)


def _number(value: dict[str, Any]) -> str:
    number = value.get("value")
    return "" if number is None else f"{number:.3f}"


def _interval(value: dict[str, Any]) -> str:
    low, high = value.get("low"), value.get("high")
    return "" if low is None or high is None else f"{low:.3f} to {high:.3f}"


def _pairs(report: "ScoreReport", column: str) -> list[tuple[str, object]]:
    proteins = "1 protein" if report.num_proteins == 1 else f"{report.num_proteins:,} proteins"
    pairs: list[tuple[str, object]] = [
        (
            "scored",
            f"{report.num_variants:,} variants of {proteins} in {report.num_passes:,} passes ({report.strategy})",
        )
    ]
    for count, what in (
        (sum(assay.num_multiple for assay in report.assays), "multiple mutants"),
        (sum(assay.num_indels for assay in report.assays), "with insertions or deletions"),
    ):
        if count:
            pairs.append(("of them", f"{what}: {count:,}"))
    if count := sum(assay.num_not_standard for assay in report.assays):
        pairs.append(("of them", f"from or to a residue other than the 20 standard ones: {count:,}"))
    if report.num_beyond_training:
        longest = f"longer than any that the model was trained on ({report.trained_residues:,} residues)"
        pairs.append(("of these", f"proteins {longest}: {report.num_beyond_training:,}"))
    if report.num_aligned is not None:
        pairs.append(("alignment", f"{report.num_aligned:,} sequences over {report.num_covered:,} of the positions"))
    pairs += [("repaired", f"{count:,} letters ({rule})") for rule, count in report.repairs.items()]
    for assay in report.assays if report.benchmark is None else ():
        for name, value in assay.agreement.items():
            if value is not None:
                pairs.append(("agreement", f"Spearman {value:.3f} of the scores with {_name(name)}"))
        if assay.fit_by == "median":
            pairs.append(("fit", "measurements above their median, for AUC and MCC"))
    pairs.append(("scores", f"{report.out}, column {column}"))
    if report.heat_map is not None:
        pairs.append(("heat map", report.heat_map))
    return pairs


def _tell(counts: "ScoreCounts", as_json: bool) -> None:
    pairs = [
        ("proteins", f"{counts.num_proteins:,}"),
        ("variants", f"{counts.num_variants:,}"),
        ("positions to compute", f"{counts.num_sites:,}"),
        ("passes", f"{counts.num_passes:,}"),
        ("residues that they see", f"{counts.num_computed_residues:,}"),
        ("residues of the longest", f"{counts.longest:,}"),
    ]
    output.print_counts(pairs, as_json=as_json)
