"""The model card: the README.md of a model directory, written from its description."""

from protlm.pretrained.model_description import ModelDescription, Origin, ValidScore
from protlm.vocabulary import NUM_RESIDUES

_DATA_MODES = {
    "packed": "It saw whole proteins, each by itself; of one too long for a row a random stretch.",
    "clipped": "It saw proteins each by itself, and of a long one the beginning.",
    "concatenated": "It saw windows of {window_tokens:,} tokens of proteins joined by `<eos>`, across their bounds.",
}

_UNMEASURED = (
    "This model is unmeasured: its run was stopped before it could be measured on the valid split. `protlm eval` "
    "measures it, and `protlm train --resume` goes on."
)


def model_card(description: ModelDescription) -> str:
    """Returns the text of the README.md of a model directory."""
    if description.origin is not None:
        return _card_of_import(description, description.origin)
    shape = description.model
    kind = "fixed random projections, saved with it" if description.redraw_every_steps == 0 else (
        f"projections redrawn every {description.redraw_every_steps} steps"
    )  # fmt: skip
    lines = [
        "# A protein language model trained with protlm",
        "",
        f"A {shape.num_layers}-layer {'causal ' if shape.causal else ''}Performer of width {shape.model_dim} with "
        f"{shape.num_heads} heads and `{shape.attention_name}` attention"
        + (f" ({kind})." if shape.has_projection else "."),
        f"{_beginning(description)} for {description.step} steps with seed {description.seed} {_task(description)}.",
        _DATA_MODES[description.data_mode].format(window_tokens=description.window_tokens),
        "",
        f"- Training dataset (manifest hash): `{description.dataset_hash}`",
        f"- Residues in it: {sum((description.residue_counts or {}).values()):,}",
        f"- Weights (xxh3-128): `{description.weights_hash}`",
        *([] if description.fine_tuned_from is None else _source(description.fine_tuned_from)),
        "",
        *_swap(description),
    ]
    if description.valid is not None:
        lines += _scores(description, description.valid)
    else:
        lines.append(_UNMEASURED if description.unmeasured else "No valid split was measured.")
    lines += ["", "Use it with `protlm eval`, `protlm embed` or `protlm.load_model`.", ""]
    return "\n".join(lines)


def _card_of_import(description: ModelDescription, origin: Origin) -> str:
    shape = description.model
    reach = description.max_residues
    lines = [
        f"# {origin.source} in protlm",
        "",
        f"The weights of {_name(origin)}, a model of the family {origin.family}, as protlm runs it: "
        f"{shape.num_layers} layers of width {shape.model_dim} with {shape.num_heads} heads and "
        f"`{shape.attention_name}` attention."
        + (" Its numbers are those of the source but for rounding." if description.swap is None else ""),
        "",
        *_swap(description),
        f"- Licence: {_licence(origin)}",
        f"- Longest protein: {f'{reach:,} residues, which its positions reach' if reach is not None else 'any'}",
        f"- Weights (xxh3-128): `{description.weights_hash}`",
        *_files(origin),
        "",
        "Use it with `protlm eval`, `protlm embed`, `protlm train --init` or `protlm.load_model`.",
        "",
    ]
    return "\n".join(lines)


def _swap(description: ModelDescription) -> list[str]:
    """Returns the lines on the exact attention that this model had once."""
    swap = description.swap
    if swap is None:
        return []
    near = f" beside the exact weights of near tokens (blocks of {swap.near_block})" if swap.near_block else ""
    balance = f"balanced (`{swap.balance}`) on {swap.num_proteins:,} proteins" if swap.num_proteins else "not balanced"
    return [
        "It was made of a model with exact attention by `protlm convert`, which put random features in its place: "
        f"{swap.num_features} of the map `{swap.attention}`{near}, q and k {balance}, seed {swap.seed}. The weights of "
        f"that model have the hash `{swap.weights_hash}` (xxh3-128). `protlm eval` measures what this costs.",
        "",
    ]


def _source(origin: Origin) -> list[str]:
    """Returns the lines on the weights with which a training began."""
    return [
        f"- Fine-tuned from: {_name(origin)}, a model of the family {origin.family}",
        f"- Licence of its weights, which these are made of: {_licence(origin)}",
        *_files(origin),
    ]


def _name(origin: Origin) -> str:
    return origin.source if origin.revision is None else f"{origin.source} (revision {origin.revision})"


def _licence(origin: Origin) -> str:
    return origin.licence or "not given by the source; see there"


def _files(origin: Origin) -> list[str]:
    return [f"- Made from `{name}` (xxh3-128): `{digest}`" for name, digest in origin.files.items()]


def _beginning(description: ModelDescription) -> str:
    origin = description.fine_tuned_from
    return "Trained" if origin is None else f"Fine-tuned from {_name(origin)}"


def _scores(description: ModelDescription, valid: ValidScore) -> list[str]:
    """Returns the lines of the table, of how it was measured, and of what it can be compared with."""
    hidden, replaced = description.mask_share, description.random_share
    visible = max(0.0, 1 - hidden - replaced)
    how = {
        "hidden": "hidden residues of its valid split "
        f"({description.mask_rate:.0%} of all; each is replaced by `<mask>`)",
        "mixture": "residues of its valid split, masked as in training "
        f"({hidden:.0%} of them hidden, {replaced:.0%} replaced by a random one, {visible:.0%} visible)",
        "next-token": "residues of its valid split, each predicted from those before it",
    }
    comparable = {
        "hidden": "measured on hidden residues of the same split",
        "mixture": "measured with the same mixture on the same split, and with none of hidden residues alone, which "
        "are harder: `protlm eval` measures those",
        "next-token": "of models that predict the next residue, measured on the same split",
    }
    return [
        f"On {valid.num_targets:,} {how[valid.targets]}:",
        "",
        "| | accuracy | perplexity |",
        "|---|---|---|",
        f"| this model | {valid.accuracy:.4f} | {valid.perplexity:.3f} |",
        f"| empirical baseline (residue frequencies of the training set) | {valid.empirical_accuracy:.4f} | "
        f"{valid.empirical_perplexity:.3f} |",
        "",
        f"Compare these numbers only with numbers {comparable[valid.targets]}: a perplexity depends on how close a "
        f"split is to the training set. A blind guess among the {NUM_RESIDUES} residue letters has perplexity "
        f"{NUM_RESIDUES}; `protlm eval` adds further baselines.",
    ]


def _task(description: ModelDescription) -> str:
    if description.model.causal:
        return "to predict the next token from those before it"
    return (
        f"to predict masked residues: {description.mask_rate:.0%} of them, of which {description.mask_share:.0%} "
        f"were hidden and {description.random_share:.0%} replaced by a random one"
    )
