"""What a run tells about its own result where it is weak: which results count as weak, and the line for each."""

from collections.abc import Mapping

from protlm.pretrained.model_description import ValidScore

MANY_EPOCHS = 100
"""Passes over the training split from which on they are told."""

_BASELINES = {
    "empirical": "the residue frequencies of the training split",
    "markov": "a table of the residues before each one",
    "two_sided": "a table of the residues on both sides of each one",
}
"""The baselines of a run in words, by the keys of `baseline_perplexities`."""


def weak_results(
    *, valid: ValidScore | None, baselines: Mapping[str, float], num_training: int, num_valid: int | None, epochs: int
) -> list[str]:
    """Returns a line for each weakness of a result.

    Args:
        valid: Scores of the exported model; None if it is not measured.
        baselines: Perplexities of the baselines on the valid split.
        num_training: Proteins in the training split.
        num_valid: Proteins in the valid split; None without one.
        epochs: Passes that were made over the training split.
    """
    lines = [] if valid is None else _lost_comparisons(valid, baselines)
    if num_training == 1:
        lines.append("the training split is a single protein, and so the model knows no other")
    if num_valid == 1:
        lines.append("the valid split is a single protein, and so its scores say nothing about others")
    if epochs >= MANY_EPOCHS:
        lines.append(
            f"the run went on for {epochs:,} epochs, and may know the {num_training:,} proteins of its training split "
            "by heart; train on more proteins, or for fewer steps"
        )
    return lines


def _lost_comparisons(valid: ValidScore, baselines: Mapping[str, float]) -> list[str]:
    """Returns a line about the best of the baselines that the model does not beat, if there is any."""
    # Earlier versions scored the mixture of training, which is easier than the hidden residues of the baselines.
    if valid.targets == "mixture":
        return []
    better = {name: perplexity for name, perplexity in baselines.items() if not valid.perplexity < perplexity}
    if not better:
        return []
    best = min(better, key=better.__getitem__)
    figures = f"perplexity {valid.perplexity:.2f} against {better[best]:.2f}"
    return [f"on valid the model is no better than {_BASELINES[best]}: {figures}; train it for longer, or otherwise"]
