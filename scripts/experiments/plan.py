"""The plan: hides which runs there are, their order, and how settings of one follow from the results of others."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from scripts.experiments.tasks import TASKS

Budget = Literal["steps", "time", "sweep"]
"""`steps`: as many updates as every kind gets on the task; `time`: as many as fit into the training time of the cycle;
`sweep`: a short run that chooses a temperature."""
Result = Mapping[str, Any]
"""The content of a run's file."""
Results = Mapping[str, Result]
"""Results by the names of the runs."""

SEEDS = (0, 1)
CYCLE = "cycle"
TARGET = "families-long"
"""The task of the comparison at equal time, and of the sweep."""
MAIN_TASKS = (TARGET, "copies", "families")
WINDOW_TASKS = ("concat-4096", "concat-8192")
VARIANT_TASK = "copies"
TEMPERATURES = (3, 6, 12, 24)
"""Where exact kinds start in the sweep."""
SWEEP_STEPS = 300


@dataclass(frozen=True)
class Kind:
    """A kind of attention that is compared.

    Attributes:
        title: In tables and figures.
        overrides: Settings of the model.
        is_exact: Whether all its layers are exact, so that it starts at the best temperature of the sweep.
    """

    title: str
    overrides: tuple[str, ...]
    is_exact: bool = False


def _layers(title: str, attention: str, *, is_exact: bool = False, **settings: float) -> Kind:
    overrides = tuple(f"model.{name}={value}" for name, value in settings.items())
    return Kind(title, (f"model.attention={attention}", *overrides), is_exact)


KINDS: Mapping[str, Kind] = {
    CYCLE: _layers("local, FAVOR, local", "local,positive,local"),
    "exact": _layers("exact", "softmax", is_exact=True),
    "exact-prior": _layers("exact, local prior", "softmax", is_exact=True, local_bias=3),
    "favor": _layers("FAVOR", "positive"),
    "local": _layers("local", "local"),
    "near-far": _layers("near-far", "near-far"),
}
"""The kinds that are compared on every task; the cycle first, whose time others are given."""
SLOW = "near-far"
"""The kind that is run after all others."""
VARIANTS: Mapping[str, Kind] = {
    "cycle-exact": _layers("local, exact, local", "local,softmax,local"),
    "cycle-64": _layers("local, FAVOR, local: 64 features", "local,positive,local", num_features=64),
    "cycle-256": _layers("local, FAVOR, local: 256 features", "local,positive,local", num_features=256),
    "cycle-t4": _layers("local, FAVOR, local: temperature to 4", "local,positive,local", max_temperature=4),
    "cycle-t8": _layers("local, FAVOR, local: temperature to 8", "local,positive,local", max_temperature=8),
    "cycle-two": _layers("local, FAVOR, FAVOR", "local,positive,positive"),
    "cycle-last": _layers("local, local, FAVOR", "local,local,positive"),
    "near-far-t4": _layers("near-far: temperature to 4", "near-far", max_temperature=4),
}
"""Other kinds, on the task of copies: which layer, how many features and which temperature make the far field count."""


@dataclass(frozen=True)
class Run:
    """One run of the plan.

    Attributes:
        task: A key of `TASKS`.
        kind: A key of `KINDS` or `VARIANTS`.
        seed: Of the run.
        budget: How many updates it makes.
        temperature: Of a run of the sweep: where exact attention starts.
    """

    task: str
    kind: str
    seed: int
    budget: Budget = "steps"
    temperature: float | None = None

    @property
    def name(self) -> str:
        """The name of its file, without the suffix."""
        budget = {"steps": "", "time": ".time", "sweep": f".{self.temperature}"}[self.budget]
        return f"{self.task}.{self.kind}{budget}.{self.seed}"

    @property
    def definition(self) -> Kind:
        """The kind with its settings."""
        return KINDS[self.kind] if self.kind in KINDS else VARIANTS[self.kind]


def planned_runs() -> Iterator[Run]:
    """Yields all runs in their order: a part of them, from the first on, has as many of each kind as it can."""
    fast = [kind for kind in KINDS if kind != SLOW]
    for seed in SEEDS:
        for task in MAIN_TASKS:
            yield from (Run(task, kind, seed) for kind in fast)
            if task == TARGET:
                yield from (Run(task, kind, seed, "time") for kind in fast if KINDS[kind].is_exact)
    fast_variants = [kind for kind in VARIANTS if not kind.startswith(SLOW)]
    yield from (Run(VARIANT_TASK, kind, SEEDS[0]) for kind in fast_variants)
    for seed in SEEDS:
        yield from (Run(task, kind, seed) for task in WINDOW_TASKS for kind in fast if kind != "exact-prior")
    yield from (Run("copies-varied", kind, SEEDS[0]) for kind in (CYCLE, "exact", "exact-prior"))
    for seed in SEEDS:
        yield from (Run(task, SLOW, seed) for task in MAIN_TASKS)
    yield from (Run(VARIANT_TASK, kind, SEEDS[0]) for kind in VARIANTS if kind.startswith(SLOW))


def needed_by(run: Run) -> Iterator[Run]:
    """Yields the runs whose results decide on the settings of a run."""
    if run.budget == "time":
        yield Run(run.task, CYCLE, run.seed)
        yield replace(run, budget="steps")
    if run.definition.is_exact and run.budget != "sweep":
        yield from (Run(TARGET, run.kind, SEEDS[0], "sweep", temperature) for temperature in TEMPERATURES)


def settings_of(run: Run, results: Results, steps: int | None = None) -> tuple[str, ...]:
    """Returns the settings of a run, `section.key=value`, over those of the configuration tiny.

    Args:
        run: The run.
        results: Those of the runs that it needs, at least.
        steps: Updates in place of those of the plan.
    """
    temperature = run.temperature
    if run.definition.is_exact and temperature is None:
        temperature = best_temperature(run.kind, results)
    exact = () if temperature is None else (f"model.exact_temperature={temperature}",)
    return (
        *TASKS[run.task].overrides, *run.definition.overrides, *exact, f"train.seed={run.seed}",
        f"train.max_steps={steps or _steps_of(run, results)}",
    )  # fmt: skip


def best_temperature(kind: str, results: Results) -> float:
    """Returns the temperature of the sweep with the lowest perplexity on its valid split."""
    sweep = [run for run in needed_by(Run(TARGET, kind, SEEDS[0])) if run.budget == "sweep"]
    best = min(sweep, key=lambda run: results[run.name]["curve"][-1]["perplexity"])
    assert best.temperature is not None
    return best.temperature


def _steps_of(run: Run, results: Results) -> int:
    steps = TASKS[run.task].steps
    if run.budget == "sweep":
        return min(SWEEP_STEPS, steps)
    if run.budget == "time":
        cycle, own = (results[needed.name] for needed in (Run(run.task, CYCLE, run.seed), replace(run, budget="steps")))
        return max(1, round(steps * cycle["training_seconds"] / own["training_seconds"]))
    return steps
