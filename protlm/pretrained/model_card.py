"""The model card: the README.md of a model directory, written from its description."""

from protlm.pretrained.model_description import ModelDescription

_DATA_MODES = {
    "packed": "It saw whole proteins, each by itself; of one too long for a row a random stretch.",
    "clipped": "It saw proteins each by itself, and of a long one the beginning.",
    "concatenated": "It saw windows of {window_tokens:,} tokens of proteins joined by `<eos>`, across their bounds.",
}


def model_card(description: ModelDescription) -> str:
    """Returns the text of the README.md of a model directory."""
    shape = description.model
    kind = "fixed random projections, saved with it" if description.redraw_every_steps == 0 else (
        f"projections redrawn every {description.redraw_every_steps} steps"
    )  # fmt: skip
    lines = [
        "# A protein language model trained with protlm",
        "",
        f"A {shape.num_layers}-layer {'causal ' if shape.causal else ''}Performer of width {shape.model_dim} with "
        f"{shape.num_heads} heads and `{shape.attention}` attention" + (f" ({kind})." if shape.has_projection else "."),
        f"Trained for {description.step} steps with seed {description.seed} {_task(description)}.",
        _DATA_MODES[description.data_mode].format(window_tokens=description.window_tokens),
        "",
        f"- Training dataset (manifest hash): `{description.dataset_hash}`",
        f"- Residues in it: {sum(description.residue_counts.values()):,}",
        f"- Weights (xxh3-128): `{description.weights_hash}`",
        "",
    ]
    if description.valid is None:
        lines.append("No valid split was measured.")
    else:
        valid = description.valid
        lines += [
            f"On {valid.num_targets:,} {'' if shape.causal else 'masked '}residues of its valid split:",
            "",
            "| | accuracy | perplexity |",
            "|---|---|---|",
            f"| this model | {valid.accuracy:.4f} | {valid.perplexity:.3f} |",
            f"| empirical baseline (residue frequencies of the training set) | {valid.empirical_accuracy:.4f} | "
            f"{valid.empirical_perplexity:.3f} |",
        ]
    lines += ["", "Use it with `protlm eval`, `protlm embed` or `protlm.load_model`.", ""]
    return "\n".join(lines)


def _task(description: ModelDescription) -> str:
    if description.model.causal:
        return "to predict the next token from those before it"
    return (
        f"to predict masked residues: {description.mask_rate:.0%} of them, of which {description.mask_share:.0%} "
        f"were hidden and {description.random_share:.0%} replaced by a random one"
    )
