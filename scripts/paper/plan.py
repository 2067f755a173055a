"""The plan of the table: which models are trained on what, in which order, and with which settings."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

MOST_SEEDS = (0, 1, 2)
TEMPERATURES = (3, 6, 12)
"""Where exact attention starts in the runs that choose its temperature."""

SHAPE = (
    "model.num_layers=4", "model.model_dim=192", "model.num_heads=6", "model.ffn_dim=768", "model.num_features=128",
)  # fmt: skip
"""The shape of every model: 2 million parameters, heads of 32."""
LEARNING = (
    "train.optimizer=muon", "train.lr=1e-3", "train.muon_lr=0.02", "train.warmup_steps=50", "train.schedule=constant",
)  # fmt: skip
"""As the configuration `small`, at a constant rate: so a run may be measured on its way and go on."""
_PLAIN = ("model.qk_norm=false", "model.conv_width=0")

Direction = Literal["BID", "UNI"]


@dataclass(frozen=True)
class Kind:
    """A kind of attention.

    Attributes:
        title: In tables and figures.
        overrides: Settings of the model.
        starts_at_best: Whether its temperature starts where the sweep was best.
    """

    title: str
    overrides: tuple[str, ...]
    starts_at_best: bool = False


KINDS: Mapping[str, Kind] = {
    "exact-plain": Kind("exact, plain", ("model.attention=softmax", *_PLAIN)),
    "relu-plain": Kind("FAVOR relu, plain", ("model.attention=relu", *_PLAIN)),
    "exact": Kind("exact, best temperature", ("model.attention=softmax",), starts_at_best=True),
    "relu": Kind("FAVOR relu", ("model.attention=relu",)),
    "positive": Kind("FAVOR positive", ("model.attention=positive",)),
    "hyperbolic": Kind("FAVOR hyperbolic", ("model.attention=hyperbolic",)),
    "trig": Kind("FAVOR trig", ("model.attention=trig",)),
    "near-far": Kind("near-far", ("model.attention=near-far",)),
    "cycle": Kind("local, FAVOR positive, local", ("model.attention=local,positive,local",)),
}
"""The kinds by name, in the order of the table. All but the plain ones have the depthwise convolution of width 3 and
normalised q and k of protlm's configurations; everything else is the same in all."""


@dataclass(frozen=True)
class Task:
    """How proteins become rows.

    Attributes:
        title: In tables and figures.
        overrides: Settings of the data.
        tokens: Tokens of an update.
        steps: Updates of the comparison at equal updates.
    """

    title: str
    overrides: tuple[str, ...]
    tokens: int
    steps: int


TASKS: Mapping[str, Task] = {
    "single": Task(
        "single proteins, at most 1,024 tokens", ("data.tokens_per_batch=4096", "data.max_length=1022"), 4096, 400
    ),
    "concatenated": Task(
        "concatenated, windows of 8,192",
        ("data.mode=concatenated", "data.window_tokens=8192", "data.tokens_per_batch=8192"), 8192, 100,
    ),
}  # fmt: skip
SWEEP_STEPS = 100


@dataclass(frozen=True)
class Run:
    """One run of the plan.

    Attributes:
        task: A key of `TASKS`.
        kind: A key of `KINDS`.
        direction: `BID`: hidden residues from both sides; `UNI`: the next residue from those before.
        seed: Of weights, features, order and masks.
        temperature: Of a run of the sweep: where exact attention starts.
    """

    task: str
    kind: str
    direction: Direction = "BID"
    seed: int = 0
    temperature: int | None = None

    @property
    def name(self) -> str:
        """The name of its file, without the suffix."""
        sweep = "" if self.temperature is None else f".{self.temperature}"
        return f"{self.task}.{self.direction}.{self.kind}{sweep}.{self.seed}"


MAIN = ("exact", "relu", "positive", "cycle", "exact-plain", "relu-plain", "near-far")
"""The main rows, which have two seeds or more."""
_OTHERS = ("hyperbolic", "trig")
_UNIDIRECTIONAL = ("exact", "relu", "positive")
_CONCATENATED = ("exact", "relu", "positive", "near-far")


def sweep() -> list[Run]:
    """Returns the short runs that choose the temperature of exact attention."""
    return [Run("single", "exact", temperature=temperature) for temperature in TEMPERATURES]


def planned_runs() -> Iterator[Run]:
    """Yields all runs in their order: a part of them, from the first on, has what matters most."""
    yield from sweep()
    yield from (Run("single", kind) for kind in MAIN)
    yield from (Run("concatenated", kind) for kind in _CONCATENATED)
    yield from (Run("single", kind, seed=1) for kind in MAIN)
    yield from (Run("single", kind, "UNI") for kind in _UNIDIRECTIONAL)
    yield from (Run("single", kind) for kind in _OTHERS)
    yield from (Run("single", kind, "UNI", seed=1) for kind in _UNIDIRECTIONAL)
    yield from (Run("concatenated", kind, seed=1) for kind in _CONCATENATED)
    yield from (Run("single", kind, seed=2) for kind in MAIN)


def settings_of(run: Run, best_temperature: int | None) -> tuple[str, ...]:
    """Returns the settings of a run, `section.key=value`, over the defaults.

    Args:
        run: The run.
        best_temperature: That of the sweep; None where none is needed.
    """
    kind, task = KINDS[run.kind], TASKS[run.task]
    temperature = run.temperature if run.temperature is not None else best_temperature if kind.starts_at_best else None
    return (
        *SHAPE, *LEARNING, *task.overrides, *kind.overrides,
        *(() if temperature is None else (f"model.exact_temperature={temperature}",)),
        *(("model.causal=true",) if run.direction == "UNI" else ()),
        f"train.seed={run.seed}",
    )  # fmt: skip
