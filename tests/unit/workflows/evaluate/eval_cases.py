"""Datasets and models that are evaluated in tests, in files and in memory."""

import math
from pathlib import Path

import numpy as np
import torch

from protlm.cli.app import main
from protlm.config import ModelConfig
from protlm.data.storage.dataset import RecordLabels
from protlm.inference.residue_scores import ResidueScores
from protlm.model.performer import Performer
from protlm.pretrained.model_description import ModelDescription
from protlm.pretrained.model_directory import save_model
from protlm.vocabulary import FIRST_RESIDUE, NUM_RESIDUES, RESIDUES, VOCABULARY_SIZE, encode
from protlm.workflows.evaluate.request import EvalRequest
from tests.conftest import empty_figures

NO_LABELS = RecordLabels((), (), ())


class InMemory:
    """A split in memory: proteins with ids and labels."""

    name = "test"

    def __init__(self, sequences, labels=None):
        self.proteins = [encode(sequence.encode()) for sequence in sequences]
        self.given_labels = labels or [NO_LABELS] * len(self.proteins)
        self.num_records = len(self.proteins)

    @property
    def lengths(self):
        return np.array([len(tokens) for tokens in self.proteins], dtype=np.int64)

    def tokens(self, record):
        return self.proteins[record]

    def id(self, record):
        return f"protein-{record}"

    def labels(self, record):
        return self.given_labels[record]


def random_sequences(num_proteins, seed=0, letters=RESIDUES[:20], shortest=5, longest=60):
    generator = np.random.default_rng(seed)
    sizes = generator.integers(shortest, longest, num_proteins)
    return ["".join(generator.choice(list(letters), size)) for size in sizes]


def random_scores(records, positions, targets, seed=0):
    """Returns scores with random predictions, float32 as those of a model."""
    targets = np.asarray(targets, dtype=np.int64)
    logits = torch.randn(len(targets), VOCABULARY_SIZE, generator=torch.Generator().manual_seed(seed))
    # The true residue is often the best, so that some are correct.
    logits[torch.arange(len(targets)), torch.from_numpy(targets)] += 2
    log_probabilities = torch.log_softmax(logits, -1).numpy()
    return ResidueScores(np.asarray(records), np.asarray(positions), targets, log_probabilities)


def prepare(folder: Path, splits: dict, clusters=None, families=None) -> Path:
    """Makes a dataset of the given proteins, (id, sequence) by split; clusters and families by id."""
    tables = {"split": {record_id: split for split, proteins in splits.items() for record_id, _ in proteins}}
    options = ["--split", "file"]
    for name, labels in (("clusters", clusters), ("families", families)):
        if labels is not None:
            tables[name] = labels
            options += [f"--{name}", str(folder / f"{name}.tsv")]
    for name, labels in tables.items():
        order = (1, 0) if name == "clusters" else (0, 1)
        (folder / f"{name}.tsv").write_text("".join(f"{row[order[0]]}\t{row[order[1]]}\n" for row in labels.items()))
    fasta = folder / "proteins.fasta"
    fasta.write_text("".join(f">{name}\n{sequence}\n" for proteins in splits.values() for name, sequence in proteins))
    out = folder / "dataset"
    arguments = ["prep", str(fasta), "--out", str(out), "--split-file", str(folder / "split.tsv"), *options]
    with empty_figures():
        assert main([*arguments, "--no-check-leaks"]) == 0
    return out


def save_new_model(folder: Path, residue_counts=None, weights=None, description=None, **shape) -> Path:
    """Saves a small model; `weights` changes it before."""
    config = {
        "num_layers": 1,
        "model_dim": 16,
        "num_heads": 2,
        "ffn_dim": 16,
        "attention": "positive",
        "num_features": 8,
        **shape,
    }
    model = Performer(ModelConfig(**config))
    model.reset(0)
    if weights is not None:
        weights(model)
    known = {"redraw_every_steps": 0, "seed": 0, "step": 1, "dataset_hash": "", "mask_rate": 0.15}
    counts = dict.fromkeys(RESIDUES, 1) if residue_counts is None else residue_counts
    values = {**known, **(description or {})}
    save_model(folder, model, ModelDescription(model=model.config, residue_counts=counts, **values))
    return folder


@torch.no_grad()
def predict_always(model: Performer, frequencies) -> None:
    """Makes a model predict the same distribution everywhere: of the 25 residues, and no special token."""
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    model.head.bias.fill_(-1e4)
    for letter, frequency in frequencies.items():
        model.head.bias[FIRST_RESIDUE + RESIDUES.index(letter)] = math.log(frequency)


def smoothed_frequencies(counts):
    total = sum(counts.values()) + NUM_RESIDUES
    return {letter: (counts[letter] + 1) / total for letter in RESIDUES}


def request(model, dataset, out, splits=("test",), **options) -> EvalRequest:
    return EvalRequest(model=model, dataset=dataset, out=out, splits=tuple(splits), **options)
