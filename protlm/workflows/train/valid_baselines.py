"""The baselines of curves.png: what is reached on the valid split without a network."""

import math

from protlm.data.batching.batches import Proteins, evaluation_rows
from protlm.data.batching.masking import EVALUATION_SEED
from protlm.inference.baselines import empirical, fit_markov, markov_predictions, mean_losses
from protlm.inference.scoring import max_scored_residues
from protlm.pretrained.model_description import ModelDescription

_TOKENS_PER_ROW = 8192


def baseline_perplexities(training: Proteins, valid: Proteins, description: ModelDescription) -> dict[str, float]:
    """Returns the perplexities on the valid split of the baselines that `protlm eval` has, by the same keys.

    The Markov baselines are fitted by `fit_markov`, which chooses their orders on this very split: each is the best
    table that counting gives here.

    Cost: that of `fit_markov`, and some microseconds for each scored residue.

    Args:
        training: The training split, which is counted.
        valid: The valid split; its scored residues are those of every measurement during training.
        description: Of the model in training.
    """
    assert description.residue_counts is not None  # a run counts its training split
    objective = description.objective.hiding_all()
    markov = fit_markov(training, valid, objective, EVALUATION_SEED)
    predictions = {
        "empirical": empirical(description.residue_counts),
        "markov": markov_predictions(markov.model, objective),
    }
    if markov.two_sided is not None:
        predictions["two_sided"] = markov_predictions(markov.two_sided, objective)
    rows = evaluation_rows(
        valid,
        _TOKENS_PER_ROW,
        EVALUATION_SEED,
        objective,
        window_tokens=description.window_tokens,
        max_residues=max_scored_residues(description),
    )
    losses = mean_losses(list(predictions.values()), rows)
    return dict(zip(predictions, map(math.exp, losses), strict=True))
