"""`protlm eval`: options in, a measurement, its tables out."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from protlm.choices import SplitName, SplitOrAll
from protlm.cli import output
from protlm.cli.options import ForceOption, JsonOption, PrecisionOption, seed_option, some_of
from protlm.cli.progress import Progress

if TYPE_CHECKING:
    from protlm.workflows.evaluate.comparison import Comparison
    from protlm.workflows.evaluate.report import EvalReport, ScoreRow

SeedOption = Annotated[int, seed_option("Seed of the masks and of the bootstrap.", max=2**63 - 1)]
ItemsArgument = Annotated[
    list[Path],
    typer.Argument(
        metavar="MODEL DATASET",
        help="A model as for embed, and a dataset of protlm prep; with --compare reports, or models and DATASET.",
    ),
]
CompareOption = Annotated[
    bool, typer.Option("--compare", help="Compare two or more models or reports: --compare A B C.")
]
OutOption = Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the report.")]
SplitsOption = Annotated[
    list[str] | None,
    some_of(
        "--split",
        SplitOrAll,
        "The proteins to score, by comma; repeatable; `all` for every one there is; default: test.",
    ),
]
MasksOption = Annotated[
    int, typer.Option("--masks", metavar="K", min=1, help="Score every protein K times, each time with other masks.")
]
MaskRateOption = Annotated[
    float | None,
    typer.Option(
        "--mask-rate",
        metavar="FRACTION",
        min=0.0,
        max=1.0,
        help="Probability that a residue is hidden; default: as in training.",
    ),
]
AsTrainedOption = Annotated[
    bool,
    typer.Option(
        "--as-trained",
        help="Also score the mixture of hidden, replaced and visible residues that the model was trained with.",
    ),
]
RandomWeightsOption = Annotated[
    bool, typer.Option("--random-weights", help="Also score the same architecture with random weights.")
]
PseudoPerplexityOption = Annotated[
    int,
    typer.Option(
        "--pseudo-perplexity",
        metavar="N",
        min=0,
        help="Also hide the residues of N proteins one at a time: a forward pass for each residue.",
    ),
]
AttentionOption = Annotated[
    list[str] | None,
    typer.Option(
        "--attention",
        metavar="ID",
        help="Show the attention maps of this protein; repeatable; default: BPT1_BOVIN, if a split has it.",
    ),
]
ApproximationOption = Annotated[
    bool,
    typer.Option("--approximation", help="For FAVOR models: measure how near the attention is to exact attention."),
]
ResiduesOption = Annotated[
    bool,
    typer.Option("--residues", help="Write residues.parquet: the prediction at each scored residue (protlm[parquet])."),
]


def eval_command(
    items: ItemsArgument,
    out: OutOption,
    compare: CompareOption = False,
    split: SplitsOption = None,
    masks: MasksOption = 1,
    mask_rate: MaskRateOption = None,
    as_trained: AsTrainedOption = False,
    random_weights: RandomWeightsOption = False,
    pseudo_perplexity: PseudoPerplexityOption = 0,
    attention: AttentionOption = None,
    approximation: ApproximationOption = False,
    residues: ResiduesOption = False,
    precision: PrecisionOption = "auto",
    seed: SeedOption = 0,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure how well a model predicts residues that are hidden from it.

    All scored residues are hidden, whatever the model was trained with. Accuracy is the fraction to which the model
    gives the highest probability. Perplexity is the effective number of residues that it is choosing between. Both
    stand beside baselines on the same residues: the residue frequencies of the model's training set (empirical), and
    tables of the residues beside each short stretch in the dataset's training split (Markov). A model that does not
    beat them knows less than counting does. Intervals are 95 % of a bootstrap over proteins, or clusters where they are
    known. A causal model is scored at every residue, given those before it.

    A good value depends on the proteins: the model of `make demo` has a perplexity of 6.76 on random members of the
    families that it learned, 12.07 on distant ones, where the frequencies have 17.2. The paper's Performer with softmax
    features has 9.24 on a random split of TrEMBL and 12.41 on families kept out of training.

    \b
    Examples:
      protlm eval run dataset --split test --out report
      protlm eval run dataset --split test --split ood --out report-both
      protlm eval run/model dataset --split valid --out report-valid --as-trained --json
      protlm eval --compare run run-softmax dataset --out comparison
      protlm eval --compare report report-softmax --out comparison
    """  # noqa: D301  \b must reach Typer as a backspace
    if mask_rate == 0:
        raise typer.BadParameter("expected a rate above 0: nothing would be scored", param_hint="--mask-rate")
    if not compare and len(items) != 2:
        raise typer.BadParameter(f"expected MODEL and DATASET, got {len(items)} paths", param_hint="MODEL DATASET")
    from protlm.workflows.evaluate.compare import compare as compare_reports
    from protlm.workflows.evaluate.request import EvalRequest, check_request

    request_for = partial(
        EvalRequest, splits=_splits(split or ()), seed=seed, num_masks=masks, mask_rate=mask_rate,
        as_trained=as_trained, random_weights=random_weights, pseudo_perplexity=pseudo_perplexity,
        attention=tuple(attention or ()), approximation=approximation, residues=residues, precision=precision,
        force=force,
    )  # fmt: skip

    def evaluate_model(model: Path, dataset: Path, folder: Path) -> "EvalReport":
        request = request_for(model=model, dataset=dataset, out=folder)
        # Before torch is loaded, which takes seconds.
        check_request(request)

        from protlm.workflows.evaluate.evaluate import evaluate

        return evaluate(request, start_progress=progress.start)

    with Progress({"eval": "residue", "approximation": "residue"}) as progress:
        if compare:
            comparison = compare_reports(items, out, evaluate_model, force=force)
        else:
            report = evaluate_model(items[0], items[1], out)
    if as_json:
        output.print_json(comparison.to_json() if compare else report.to_json())
    elif compare:
        _print_comparison(comparison, out)
    else:
        _print(report, out)
    if not compare:
        _warn_of_weak_results(report, as_json)


def _splits(names: Sequence[str]) -> tuple[SplitName, ...]:
    """Returns the splits that are asked for, each once; none stands for all that there are."""
    if "all" in names:
        return ()
    order = {name: place for place, name in enumerate(names)}
    known: tuple[SplitName, ...] = get_args(SplitName)
    return tuple(sorted((name for name in known if name in order), key=order.__getitem__)) or ("test",)


def _warn_of_weak_results(report: "EvalReport", as_json: bool) -> None:
    from protlm.workflows.evaluate.weak_results import lost_comparisons, single_proteins

    for line in single_proteins(report):
        output.warn(line)
    # Without --json every verdict stands below its table.
    for line in lost_comparisons(report) if as_json else ():
        output.warn(line)


def _print(report: "EvalReport", out: Path) -> None:
    from protlm.workflows.evaluate.report import ROW_NAMES

    for name, split in report.splits.items():
        rows = [(ROW_NAMES[key], *_cells(split.scores[key])) for key in ROW_NAMES if key in split.scores]
        output.print_table((f"{name} split", "accuracy", "± 95 %", "perplexity", "95 % interval"), rows)
        print()
    for split in report.splits.values():
        print(split.verdict)
        if split.pseudo_perplexity is not None:
            value, num_proteins = split.pseudo_perplexity["perplexity"], split.pseudo_perplexity["num_proteins"]
            print(f"pseudo-perplexity {value:.3f} of {num_proteins:,} proteins, one residue hidden at a time")
    scored = [
        f"{split.num_targets:,} residues of {split.num_records:,} proteins ({name})"
        for name, split in report.splits.items()
    ]
    what = "hidden" if report.targets == "hidden" else "predicted from those before"
    pairs: list[tuple[str, object]] = [("scored", f"{'; '.join(scored)}; all {what}")]
    cut = [f"{split.num_cut:,} proteins ({name})" for name, split in report.splits.items() if split.num_cut]
    if cut:
        pairs.append(("cut", f"{'; '.join(cut)}: longer than the model reaches; the rest of each was left out"))
    lacked = [f"{split.num_lacked:,} residues ({name})" for name, split in report.splits.items() if split.num_lacked]
    if lacked:
        pairs.append(("read as other", f"{'; '.join(lacked)}: the model lacks these and reads them as X or unknown"))
    if not report.is_of_training_dataset:
        pairs.append(("trained on", "another dataset, or several: proteins scored here may be among them"))
    output.print_pairs([*pairs, ("report", out / "report.json")])


def _print_comparison(comparison: "Comparison", out: Path) -> None:
    from protlm.workflows.evaluate.compare import COMPARISON_NAME, COMPARISON_PAGE_NAME
    from protlm.workflows.evaluate.report import ROW_NAMES

    for split, scores in comparison.scores.items():
        rows = [(name, *_cells(row)) for name, row in scores.items()]
        rows += [(ROW_NAMES[key], *_cells(row)) for key, row in comparison.baselines[split].items()]
        output.print_table((f"{split} split", "accuracy", "± 95 %", "perplexity", "95 % interval"), rows)
        print()
    differences = [
        (f"{row['first']} − {row['second']} ({row['split']})", row["metric"], *_difference_cells(row))
        for row in comparison.differences
        if row["metric"] in ("accuracy", "bits_per_residue")
    ]
    output.print_table(("paired difference", "of", "", "95 % interval"), differences)
    print()
    for line in (*comparison.verdicts.values(), *comparison.limits()):
        print(line)
    output.print_pairs([("comparison", out / COMPARISON_NAME), ("page", out / COMPARISON_PAGE_NAME)])


def _difference_cells(row: dict[str, Any]) -> tuple[str, str]:
    low, high = row["low"], row["high"]
    return f"{row['difference']:+.4f}", "" if low is None else f"{low:+.4f} to {high:+.4f}"


def _cells(row: "ScoreRow") -> tuple[str, str, str, str]:
    """Returns accuracy and perplexity with their intervals, empty where a figure has none."""
    accuracy, low, high = (row[f"accuracy{suffix}"] for suffix in ("", "_low", "_high"))
    perplexity, least, most = (row[f"perplexity{suffix}"] for suffix in ("", "_low", "_high"))
    return (
        f"{accuracy:.4f}",
        "" if low is None or high is None else f"{(high - low) / 2:.4f}",
        # A report has null for what no number can hold.
        "inf" if perplexity is None else f"{perplexity:.3f}",
        "" if least is None or most is None else f"{least:.3f} to {most:.3f}",
    )
