"""Makes the starter model: its datasets, its measurements, and the folder of it that is part of protlm.

`sets` prepares Swiss-Prot; then `protlm train` trains (docs/starter.md has the command), `pack` writes a model as
float16 into protlm/models/starter, and `measure` measures what lies there, says whether it earns its place, and writes
its card and the tables of the page.
"""

import argparse
import csv
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Run as a file, Python looks for imports beside it, not in the folder that holds the package `scripts`.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from protlm import files, read_records
from protlm.errors import ProtlmError
from scripts.paper.proteins import of_each_family, shuffled, write_proteins

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data" / "swissprot"
WORK = Path(tempfile.gettempdir()) / "protlm-starter"
STARTER = ROOT / "protlm" / "models" / "starter"
PAGE = ROOT / "docs" / "starter.md"
RESULTS = ROOT / "docs" / "starter" / "results.json"

NUM_VALID = 500
"""Proteins of the held-out clusters that decided; the others are the test."""
NUM_OF_FAMILIES = 2400
"""Proteins of the held-out families, of each as many."""
NUM_PROBED = 1920
MOST_MEGABYTES = 8

_SPLITS = {"cluster": "held-out clusters", "ood": "held-out families", "iid": "random proteins"}
_ROWS = {
    "model": "starter", "two_sided": "Markov, both sides", "markov": "Markov, residues before",
    "empirical": "residue frequencies",
}  # fmt: skip
_PROBES = {
    "model": "starter, layer chosen in folds", "composition": "composition",
    "dipeptides": "composition and dipeptides", "random_weights": "the same shape with random weights",
}  # fmt: skip
_CARD = """\
# starter: a small protein language model, part of protlm

Its name is `starter` wherever protlm takes a MODEL. It is there to try protlm without a download, and to start training
from. For embeddings to build on, take a large pretrained model, such as ESM-2 by its name on the hub.

{training}

**Data**: 100,000 proteins of Swiss-Prot (UniProtKB 2014_01, by the UniProt Consortium, under CC BY 4.0; the weights
have the same licence). Whole clusters at 30 % identity, and all members of 24 families of Pfam, were held out.

**Hidden residues**: accuracy, then perplexity, with 95 % intervals over proteins.

{scores}

**Probe**: the family of {num_probed} proteins of the held-out families, {num_classes} classes, 5 folds.

{probe}

**Limits**: it knows a little more of a protein than its residues and their neighbours tell, and nothing near what ESM-2
knows (8 million parameters: 21 % of hidden residues and perplexity 13.1 on UniRef50, as its authors measure). Counts
of dipeptides tell families apart better than its embeddings do. What it says of mutations, structure or function has
not been measured.

Weights (xxh3-128): `{hash}`. How it was made: docs/starter.md and scripts/starter.py.
"""


def make_sets(arguments: argparse.Namespace) -> None:
    """Prepares the datasets and the labels of the probe."""
    from protlm.workflows.prep.options import PrepRequest
    from protlm.workflows.prep.prepare import prepare

    data, work = arguments.data, arguments.work
    work.mkdir(parents=True, exist_ok=True)
    clusters = shuffled(list(read_records(data / "valid_cluster_5k.fasta.gz")))
    families = list(read_records(data / "ood_pfam24.fasta.gz"))
    valid = write_proteins(work / "valid.fasta", clusters[:NUM_VALID])
    test = write_proteins(work / "test.fasta", clusters[NUM_VALID:])
    ood = write_proteins(work / "ood.fasta", of_each_family(families, NUM_OF_FAMILIES))
    train = [data / "train_100k.fasta.gz"]
    prepare(PrepRequest(inputs=train, out=work / "trained", valid_inputs=[valid], test_inputs=[test], ood_inputs=[ood]))
    prepare(PrepRequest(inputs=train, out=work / "iid", test_inputs=[data / "test_random_5k.fasta.gz"]))
    with (work / "families.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("id", "sequence", "label"))
        for record in of_each_family(families, NUM_PROBED):
            writer.writerow((record.id, record.sequence, record.description.split("|")[1]))
    print(work)


def pack(arguments: argparse.Namespace) -> None:
    """Writes a model as float16 into the folder of the starter."""
    import torch

    from protlm.pretrained.model_directory import read_model, save_model

    model, description = read_model(arguments.model)
    state = {
        name: tensor.half() if tensor.dtype == torch.float32 else tensor for name, tensor in model.state_dict().items()
    }
    save_model(STARTER, state, description)
    num_bytes = sum(path.stat().st_size for path in STARTER.iterdir())
    if num_bytes > MOST_MEGABYTES * 1_000_000:
        raise ProtlmError(f"{STARTER}: {num_bytes:,} bytes; expected at most {MOST_MEGABYTES} MB")
    print(f"{STARTER}: {num_bytes:,} bytes")


def measure(arguments: argparse.Namespace) -> None:
    """Measures the starter on all splits and on labels of families, and writes results, card and page."""
    from protlm.workflows.evaluate.evaluate import evaluate
    from protlm.workflows.evaluate.request import EvalRequest
    from protlm.workflows.probe.probe import probe
    from protlm.workflows.probe.request import ProbeRequest
    from scripts.environment import environment

    work = arguments.work
    model = Path("starter")
    of_trained = evaluate(
        EvalRequest(model=model, dataset=work / "trained", splits=("test", "ood"), out=work / "report", force=True)
    )
    of_iid = evaluate(
        EvalRequest(model=model, dataset=work / "iid", splits=("test",), out=work / "report-iid", force=True)
    )
    of_families = probe(ProbeRequest(model=model, labels=work / "families.csv", out=work / "probe", force=True))
    splits = {"cluster": of_trained.splits["test"], "ood": of_trained.splits["ood"], "iid": of_iid.splits["test"]}
    results = {
        "weights_hash": of_trained.weights_hash,
        "num_parameters": of_trained.num_parameters,
        "num_bytes": sum(path.stat().st_size for path in STARTER.glob("model.safetensors")),
        "training": json.loads(arguments.training.read_text(encoding="utf-8")),
        "splits": {
            name: {
                "num_records": split.num_records,
                "num_targets": split.num_targets,
                "scores": {row: _kept(split.scores[row]) for row in _ROWS if row in split.scores},
            }
            for name, split in splits.items()
        },
        "probe": {
            "num_proteins": of_families.num_proteins,
            "num_classes": of_families.num_classes,
            "scores": of_families.to_json()["scores"],
            "gains": of_families.to_json()["gains"],
        },
        "environment": environment(),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    files.write_each_whole(RESULTS.parent, {RESULTS.name: json.dumps(results, indent=1) + "\n"})
    write_page(results)
    for name, is_met in demands(results).items():
        print(f"{'met   ' if is_met else 'not met'} {name}")


def _kept(row: Mapping[str, float | None]) -> dict[str, float | None]:
    names = [f"{metric}{suffix}" for metric in ("accuracy", "perplexity") for suffix in ("", "_low", "_high")]
    return {name: None if row[name] is None else round(float(row[name] or 0.0), 5) for name in names}


def demands(results: Mapping[str, Any]) -> dict[str, bool]:
    """Returns the conditions on a model that is part of protlm, and whether each is met beyond the intervals."""
    met = {}
    for name in ("cluster", "ood"):
        scores = results["splits"][name]["scores"]
        for row in ("markov", "two_sided"):
            ours, theirs = scores["model"], scores[row]
            met[f"{_SPLITS[name]}: accuracy above {_ROWS[row]}"] = ours["accuracy_low"] > theirs["accuracy_high"]
            met[f"{_SPLITS[name]}: perplexity below {_ROWS[row]}"] = ours["perplexity_high"] < theirs["perplexity_low"]
    for row in ("composition", "random_weights"):
        met[f"probe of held-out families: above {_PROBES[row]}"] = results["probe"]["gains"][row]["low"] > 0
    return met


def write_page(results: Mapping[str, Any]) -> None:
    """Writes the tables of the page, and the card of the model."""
    from scripts.report.page import filled

    tables = {"scores": scores_table(results), "probe": probe_table(results), "training": training_line(results)}
    text = filled(PAGE.read_text(encoding="utf-8"), tables.__getitem__)
    files.write_each_whole(PAGE.parent, {PAGE.name: text})
    (STARTER / "README.md").write_text(card(results, tables), encoding="utf-8")


def scores_table(results: Mapping[str, Any]) -> str:
    """Returns the table of accuracy and perplexity on every split, with their intervals."""
    from scripts.report.page import table

    header = ("hidden residues", *(f"{title}" for title in _SPLITS.values()))
    rows: list[Sequence[str]] = []
    for row, title in _ROWS.items():
        cells = [_cell(results["splits"][name]["scores"].get(row)) for name in _SPLITS]
        rows.append((title, *cells))
    counts = [
        f"{results['splits'][name]['num_records']:,}; {results['splits'][name]['num_targets']:,}" for name in _SPLITS
    ]
    return table(header, [*rows, ("proteins; scored residues", *counts)])


def _cell(row: Mapping[str, float] | None) -> str:
    if row is None:
        return "–"
    accuracy = f"{row['accuracy']:.3f} ({row['accuracy_low']:.3f} to {row['accuracy_high']:.3f})"
    return f"{accuracy}; {row['perplexity']:.2f} ({row['perplexity_low']:.2f} to {row['perplexity_high']:.2f})"


def probe_table(results: Mapping[str, Any]) -> str:
    """Returns the table of the probe: accuracy and the gain of the model over each baseline."""
    from scripts.report.page import table

    probe = results["probe"]
    rows = []
    for name, title in _PROBES.items():
        score, gain = probe["scores"][name]["accuracy"], probe["gains"].get(name)
        told = "" if gain is None else f"{gain['value']:+.3f} ({gain['low']:+.3f} to {gain['high']:+.3f})"
        rows.append((title, f"{score['value']:.3f} ± {score['stderr']:.3f}", told))
    return table(("features of a linear probe", "accuracy", "starter minus it"), rows)


def training_line(results: Mapping[str, Any]) -> str:
    """Returns a sentence on the training."""
    training = results["training"]
    return (
        f"{results['num_parameters']:,} parameters, {training['steps']:,} updates, {training['million_tokens']:.1f} "
        f"million tokens of Swiss-Prot, {training['hours']:.1f} hours on {training['processor']}; stored as float16 in "
        f"{results['num_bytes'] / 1e6:.1f} MB."
    )


def card(results: Mapping[str, Any], tables: Mapping[str, str]) -> str:
    """Returns the card of the model."""
    probe = results["probe"]
    return _CARD.format(
        **tables,
        num_probed=f"{probe['num_proteins']:,}",
        num_classes=probe["num_classes"],
        hash=results["weights_hash"],
    )


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    sets = commands.add_parser("sets", help="prepare the datasets")
    sets.add_argument("--data", type=Path, default=DATA, help="folder of Swiss-Prot's splits (%(default)s)")
    packed = commands.add_parser("pack", help="write a model as float16 into the package")
    packed.add_argument("model", type=Path, help="the run or the model directory")
    measured = commands.add_parser("measure", help="measure the model in the package; write its card and page")
    measured.add_argument("training", type=Path, help="JSON with steps, million_tokens, hours and processor")
    commands.add_parser("page", help="write card and page anew from the results")
    for command in (sets, measured):
        command.add_argument("--work", type=Path, default=WORK, help="folder of datasets and reports (%(default)s)")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """Runs the subcommand of the command line."""
    arguments = parse(words)
    try:
        if arguments.command == "page":
            write_page(json.loads(RESULTS.read_text(encoding="utf-8")))
        else:
            {"sets": make_sets, "pack": pack, "measure": measure}[arguments.command](arguments)
    except ProtlmError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
