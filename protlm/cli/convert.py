"""`protlm convert`: a model in, a directory in another format, a summary out."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from protlm.choices import Balance, ModelFormat, NearFarMap
from protlm.cli import output
from protlm.cli.options import ForceOption, JsonOption, ModelArgument, one_of, seed_option
from protlm.cli.progress import Progress

if TYPE_CHECKING:
    from protlm.inference.swap_scores import SwapScores
    from protlm.workflows.convert.cost import Cost
    from protlm.workflows.convert.swap import SwapReport

OutOption = Annotated[Path, typer.Option("--out", metavar="DIR", help="The directory to make.")]
ToOption = Annotated[
    ModelFormat,
    typer.Option("--to", metavar=one_of(ModelFormat), help="A model directory of protlm, or one of transformers."),
]
AttentionOption = Annotated[
    NearFarMap | None,
    typer.Option("--attention", metavar=one_of(NearFarMap), help="Swap exact attention for estimates of this map."),
]
NumFeaturesOption = Annotated[
    int | None, typer.Option("--num-features", metavar="N", min=1, help="Random features of each head; default: 256.")
]
NearBlockOption = Annotated[
    int | None,
    typer.Option(
        "--near-block",
        metavar="N",
        min=0,
        help="Weights in blocks of N tokens and the two beside stay exact; 0: none; default: 32.",
    ),
]
BalanceOption = Annotated[
    Balance | None,
    typer.Option("--balance", metavar=one_of(Balance), help="How q and k of each head are balanced; default: dense."),
]
CalibrateOption = Annotated[
    str | None,
    typer.Option("--calibrate", metavar="FILE", help="Proteins to balance on, some of the kind the model is for."),
]
ReportOption = Annotated[
    str | None, typer.Option("--report", metavar="FILE", help="Other proteins, on which the swap is measured.")
]
SeedOption = Annotated[int, seed_option("Seed of the random features and of the choice of proteins.")]


def convert_command(
    model: ModelArgument,
    out: OutOption,
    to: ToOption = "protlm",
    attention: AttentionOption = None,
    num_features: NumFeaturesOption = None,
    near_block: NearBlockOption = None,
    balance: BalanceOption = None,
    calibrate: CalibrateOption = None,
    report: ReportOption = None,
    seed: SeedOption = 0,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a pretrained model as a model directory, for transformers, or with FAVOR in place of exact attention.

    Every command takes a pretrained model by its name as well; a converted one needs no network, no pickle and no
    checks of names, and records where it came from. --to hf writes what AutoModelForMaskedLM and AutoTokenizer load,
    for architectures that transformers has; otherwise it says what stands in the way.

    --attention makes a Performer of a Transformer, without training: the exact weights of near tokens stay, and random
    features estimate all others at a cost that is linear in the length. What that costs in accuracy is measured on the
    proteins of --report, with a grid of other settings, time and memory; without it, on those of --calibrate.

    \b
    Examples:
      protlm convert facebook/esm2_t6_8M_UR50D --out esm2
      protlm convert esm1b_t33_650M_UR50S.pt --out esm1b
      protlm convert esm2 --out esm2-hf --to hf
      protlm convert esm2 --out performer --attention positive --calibrate proteins.fasta --report others.fasta
    """  # noqa: D301  \b must reach Typer as a backspace
    from protlm.workflows.convert.request import ConvertRequest, check_request

    request = ConvertRequest(
        model=model, out=out, to=to, attention=attention, num_features=num_features, near_block=near_block,
        balance=balance, calibrate=calibrate, report=report, seed=seed, force=force,
    )  # fmt: skip
    # Before torch is loaded, which takes seconds.
    check_request(request)

    from protlm.workflows.convert.convert import convert
    from protlm.workflows.convert.swap import FEW_PROTEINS

    units = {"convert": "step", "read": "B", "calibrate": "residue", "measure": "residue"}
    with Progress(units) as progress:
        outcome = convert(request, start_progress=progress.start)
    if outcome.swap is not None and 0 < outcome.swap.calibrated_on < FEW_PROTEINS:
        output.warn(
            f"proteins of the calibration: {outcome.swap.calibrated_on}, fewer than {FEW_PROTEINS}; the balance "
            "depends on which these are"
        )
    if as_json:
        output.print_json(outcome)
        return
    if outcome.swap is not None:
        _print_swap(outcome.swap)
    limit = "any" if outcome.max_residues is None else f"{outcome.max_residues:,} residues"
    if outcome.max_residues is None and outcome.trained_residues is not None:
        limit += f"; it was trained on proteins of up to {outcome.trained_residues:,} residues"
    pairs: list[tuple[str, object]] = [
        ("parameters", f"{outcome.num_parameters:,} in {outcome.num_layers} layers, {outcome.model_dim} wide"),
        ("longest protein", limit),
    ]
    if outcome.lacked:
        pairs.append(("read as", f"{outcome.stand_in}: {', '.join(outcome.lacked)}"))
    for name, origin in (("source", outcome.origin), ("fine-tuned from", outcome.fine_tuned_from)):
        if origin is not None:
            revision = "" if origin.revision is None else f" at {origin.revision}"
            pairs.append((name, f"{origin.source}{revision}, family {origin.family}"))
            pairs.append(("licence", origin.licence or "not given by the source"))
    pairs.append(("model", out if outcome.architecture is None else f"{out} ({outcome.architecture})"))
    output.print_pairs(pairs)


def _print_swap(swap: "SwapReport") -> None:
    if swap.scores:
        header = ("attention", "features", "block", "accuracy", "95 % interval", "kept", "perplexity", "KL", "agree",
                  "cosine")  # fmt: skip
        output.print_table(header, [_cells(each) for each in (*swap.scores, *swap.grid)])
        print()
        output.print_table(
            ("error of the attention's output, by layer", *(str(layer) for layer in _layers(swap))),
            [(each.name, *(f"{error:.2f}" for error in each.layer_errors)) for each in swap.scores[1:]],
        )
        print()
    if swap.costs:
        rows = [
            (f"{own.length:,} residues", *_cost(exact), *_cost(own))
            for exact, own in zip(swap.exact_costs, swap.costs, strict=True)
        ]
        output.print_table(("one pass", "exact, s", "MiB", "swapped, s", "MiB"), rows)
        print()
    if swap.verdict is not None:
        print(
            f"{swap.verdict} Hidden residues, proteins: {swap.measured_on:,}; of these in the calibration: "
            f"{swap.num_shared:,}."
        )
        if swap.num_cut:
            print(f"Of longer proteins only the beginning was taken: {swap.num_cut:,}.")
        print()


def _layers(swap: "SwapReport") -> range:
    return range(1, 1 + len(swap.scores[0].layer_errors))


def _cells(scores: "SwapScores") -> tuple[str, ...]:
    low, high = scores.accuracy.low, scores.accuracy.high
    return (
        scores.name,
        "" if scores.num_features is None else str(scores.num_features),
        "" if scores.near_block is None else str(scores.near_block),
        f"{scores.accuracy.value:.3f}",
        "" if low is None or high is None else f"{low:.3f} to {high:.3f}",
        "" if scores.kept is None else f"{scores.kept.value:.1%}",
        f"{scores.perplexity.value:.2f}",
        f"{scores.kl:.3f}",
        f"{scores.agreement:.3f}",
        f"{scores.cosine:.3f}",
    )


def _cost(cost: "Cost") -> tuple[str, str]:
    from protlm.workflows.convert.cost import MOST_SECONDS

    failed = {"time": f"over {MOST_SECONDS}", "memory": "out of memory"}
    seconds = failed[cost.outcome] if cost.seconds is None else f"{cost.seconds:.3g}"
    return seconds, "" if cost.peak_bytes is None else f"{cost.peak_bytes / 2**20:,.0f}"
