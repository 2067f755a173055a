"""The row of a model in MultiQC's report: the figures of report.json that a reader of many reports compares."""

from protlm.workflows.evaluate.report import EvalReport
from protlm.workflows.pages.multiqc import Column, general_statistics

_HIDDEN = "over hidden residues (for a causal model over all residues)"
_COLUMNS = (
    Column(
        key="protlm_accuracy",
        title="Accuracy",
        description=f"Fraction of residues that the model ranks first, {_HIDDEN}",
        format="{:,.3f}",
        scale="Greens",
        low=0.0,
        high=1.0,
    ),
    Column(
        key="protlm_perplexity",
        title="Perplexity",
        description=f"Effective number of residues to choose between, {_HIDDEN}; lower is better",
        format="{:,.2f}",
        scale="Blues-rev",
        low=1.0,
        high=25.0,
    ),
    Column(
        key="protlm_markov_perplexity",
        title="Markov",
        description="Perplexity of the better Markov baseline on the same residues",
        format="{:,.2f}",
        scale="Greys-rev",
        low=1.0,
        high=25.0,
    ),
    Column(
        key="protlm_empirical_perplexity",
        title="Empirical",
        description="Perplexity of the empirical baseline on the same residues",
        format="{:,.2f}",
        scale="Greys-rev",
        low=1.0,
        high=25.0,
        hidden=True,
    ),
    Column(
        key="protlm_scored_residues",
        title="Scored",
        description="Scored residues",
        scale="Purples",
        hidden=True,
    ),
)


def multiqc_rows(report: EvalReport) -> str:
    """Returns the content of `protlm_eval_mqc.json`: a row for each split."""
    rows = {}
    for name, split in report.splits.items():
        values = {
            "protlm_accuracy": split.scores["model"]["accuracy"],
            "protlm_perplexity": split.scores["model"]["perplexity"],
            "protlm_empirical_perplexity": split.scores["empirical"]["perplexity"],
            "protlm_scored_residues": float(split.num_targets),
        }
        tables = [split.scores[key]["perplexity"] for key in ("markov", "two_sided") if key in split.scores]
        if known := [perplexity for perplexity in tables if perplexity is not None]:
            values["protlm_markov_perplexity"] = min(known)
        rows[f"{report.model_name} ({name})"] = {key: value for key, value in values.items() if value is not None}
    return general_statistics(
        "protlm_eval", "protlm eval", "Models evaluated by protlm, on hidden residues, beside baselines", _COLUMNS, rows
    )
