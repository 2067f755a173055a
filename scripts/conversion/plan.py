"""The plan: which models are swapped, in which ways they recover, and in how many steps."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

SEEDS = (0, 1)
"""Of the random features, the order of the proteins and the masks."""

FORMAT_VERSION = 1
"""Of the files of runs, and of that of long proteins."""

SEQUENCES_PER_STEP = 8

Learning = Literal["cross-entropy", "transfer", "distill"]
"""What an update learns from: the hidden residues, or the exact model in one of the two stages of `protlm train`."""


@dataclass(frozen=True)
class Subject:
    """A model that is swapped.

    Attributes:
        title: In tables and figures.
        num_features: Random features of each head.
        near_block: Tokens of a block of the near field, where there is one.
        longest: Residues of the longest protein that is used.
        scratch_steps: Updates of the arm that begins with random weights; 0: it has none.
        most_steps: Updates of the other arms, transfer included.
        seeds: Seeds with which it runs.
    """

    title: str
    num_features: int
    near_block: int
    longest: int
    scratch_steps: int
    most_steps: int = 300
    seeds: tuple[int, ...] = SEEDS


SUBJECTS: Mapping[str, Subject] = {
    "sapiens": Subject("sapiens VH (4 layers of 128, learned positions)", 128, 16, 142, 4000),
    "rotary": Subject("our own (6 layers of 128, rotary positions, exact attention)", 128, 16, 254, 0),
    "antiberty": Subject("AntiBERTy (8 layers of 512, learned positions)", 256, 16, 142, 0, most_steps=200),
}


@dataclass(frozen=True)
class Arm:
    """A way to swap the attention and to recover.

    Attributes:
        title: In tables and figures.
        balance: As for `protlm convert`; None: no swap, the weights begin at random.
        has_near_field: Whether the weights of near tokens stay exact.
        stages: What is learned from, with the number of updates, one after the other.
    """

    title: str
    balance: Literal["none", "diagonal", "dense"] | None
    has_near_field: bool
    stages: tuple[tuple[Learning, int], ...]


_CROSS_ENTROPY: tuple[tuple[Learning, int], ...] = (("cross-entropy", 300),)
_STAGES: tuple[tuple[Learning, int], ...] = (("transfer", 100), ("distill", 200))

ARMS: Mapping[str, Arm] = {
    "plain-ce": Arm("as it is, cross-entropy (the paper's way)", "none", False, _CROSS_ENTROPY),
    "plain-stages": Arm("as it is, transfer, distill", "none", False, _STAGES),
    "balanced-ce": Arm("balanced, cross-entropy", "dense", False, _CROSS_ENTROPY),
    "balanced-stages": Arm("balanced, transfer, distill", "dense", False, _STAGES),
    "near-ce": Arm("balanced + near field, cross-entropy", "dense", True, _CROSS_ENTROPY),
    "near-stages": Arm(
        "balanced + near field, transfer, distill", "dense", True, (("transfer", 100), ("distill", 200))
    ),
    "scratch": Arm("FAVOR from random weights, cross-entropy", None, False, (("cross-entropy", 0),)),
}
"""Every way, the plain ones first."""


@dataclass(frozen=True)
class Run:
    """One run of the plan."""

    subject: str
    arm: str
    seed: int

    @property
    def name(self) -> str:
        """The name of its file, without the suffix."""
        return f"{self.subject}.{self.arm}.{self.seed}"

    @property
    def stages(self) -> tuple[tuple[Learning, int], ...]:
        """Its stages with their numbers of updates."""
        subject = SUBJECTS[self.subject]
        if self.arm == "scratch":
            return (("cross-entropy", subject.scratch_steps),)
        left, stages = subject.most_steps, []
        for learning, steps in ARMS[self.arm].stages:
            stages.append((learning, min(steps, left)))
            left -= stages[-1][1]
        return tuple(stages)


def planned_runs() -> Iterator[Run]:
    """Yields all runs, those of the first seed first."""
    for seed in SEEDS:
        for name, subject in SUBJECTS.items():
            if seed not in subject.seeds:
                continue
            yield from (Run(name, arm, seed) for arm in ARMS if arm != "scratch" or subject.scratch_steps)
