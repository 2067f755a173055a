import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from protlm.config import Config, DataConfig, ModelConfig, TrainConfig
from protlm.data.batching.batches import pack_row
from protlm.model.performer import Performer
from protlm.ops import local_cpp
from protlm.ops.feature_maps import DEFINITIONS
from protlm.workflows.train.run_size import TWO_FEATURES_A_ROW, size_of
from tests.unit.data.batching.batch_cases import InMemory

SHAPE = {
    "attention": "positive",
    "num_layers": 2,
    "model_dim": 32,
    "num_heads": 4,
    "ffn_dim": 48,
    "num_features": 16,
    "conv_width": 0,
}
LENGTH, NUM_PROTEINS = 98, 6


class Proteins(InMemory):
    """Proteins that lie in memory, as a mixture of one dataset."""

    def __init__(self, *lengths):
        super().__init__(*lengths)
        self.num_records, self.sizes = len(lengths), (len(lengths),)


PROTEINS = Proteins(*[LENGTH] * NUM_PROTEINS)
# Three proteins fill a row.
DATA = DataConfig(tokens_per_batch=3 * (LENGTH + 2))


def row_flops(model=None, **train):
    settings = Config(data=DATA, model=ModelConfig(**SHAPE | (model or {})), train=TrainConfig(**train))
    return size_of(settings, PROTEINS).row_flops


@pytest.mark.parametrize("changes", [{"ffn": "swiglu"}, {"head": "linear", "tied_head": False}, {"layer_norm": "post"}])
@pytest.mark.parametrize("causal", [False, True])
def test_the_operations_of_exact_attention_are_those_that_torch_counts(changes, causal, monkeypatch):
    # Torch counts its own attention only.
    monkeypatch.setattr(local_cpp, "longest_exact", lambda dtype, has_gradients: 0)
    shape = {"attention": "softmax", "causal": causal, **changes}
    model = Performer(ModelConfig(**SHAPE | shape))
    model.reset(0)
    tokens, bounds = pack_row(PROTEINS.sequences[:3])
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(tokens, bounds)
    # Torch computes the half of a causal map that is not needed too.
    unneeded = 2 * (LENGTH + 2) * 32 * len(tokens) * 2 if causal else 0
    assert row_flops(shape, mask_rate=1.0) == pytest.approx(3 * (counter.get_total_flops() - unneeded))


def test_features_cost_by_their_number_and_exact_attention_by_the_length():
    base, more, both = row_flops(), row_flops({"num_features": 32}), row_flops({"attention": "hyperbolic"})
    tokens, layers, dim = 300, 2, 32
    # Features of q and k, the state and what is read from it: four products of a row of features with a vector.
    assert more - base == pytest.approx(3 * tokens * layers * (4 + 4) * 16 * dim)
    # Twice the features, of as many rows.
    assert both - base == pytest.approx(3 * tokens * layers * 4 * 16 * dim)
    assert {name for name, definition in DEFINITIONS.items() if definition.features_per_row == 2} == TWO_FEATURES_A_ROW
    assert {definition.features_per_row for definition in DEFINITIONS.values()} == {1, 2}


def test_local_attention_costs_by_its_window_and_near_far_by_its_blocks():
    tokens, layers, dim = 300, 2, 32
    local = [row_flops({"attention": "local", "local_window": window}) for window in (8, 9)]
    assert local[1] - local[0] == pytest.approx(3 * tokens * layers * 4 * 2 * dim)
    exact = row_flops({"attention": "softmax"})
    assert row_flops({"attention": "local", "local_window": LENGTH}) == pytest.approx(exact)
    near = row_flops({"attention": "near-far", "near_block": 5}) - row_flops()
    assert near == pytest.approx(3 * tokens * layers * 4 * 15 * dim)


def test_a_checkpointed_step_costs_a_pass_more_and_targets_cost_the_head():
    assert row_flops(activation_checkpointing=True) == pytest.approx(row_flops() * 4 / 3)
    head = 2 * (32 * 32 + 32 * 33)
    assert row_flops(mask_rate=0.5) - row_flops(mask_rate=0.25) == pytest.approx(3 * 300 * 0.25 * head)


def test_the_counts_are_those_of_an_epoch():
    size = size_of(Config(data=DATA, train=TrainConfig(max_steps=7, accumulate=2)), PROTEINS)
    assert (size.num_records, size.rows_per_epoch, size.steps, size.epochs) == (NUM_PROTEINS, 2, 7, 7.0)
    assert (size.residues_per_epoch, size.tokens_per_epoch) == (NUM_PROTEINS * LENGTH, NUM_PROTEINS * (LENGTH + 2))


def test_long_proteins_reach_as_far_as_their_window_and_joined_ones_as_theirs():
    short = Config(data=DATA, model=ModelConfig(**SHAPE | {"attention": "softmax"}))
    long = Proteins(*[10 * LENGTH] * NUM_PROTEINS)
    wide = short.model_copy(update={"data": DataConfig(tokens_per_batch=300, max_length=298)})
    cut = short.model_copy(update={"data": DataConfig(tokens_per_batch=300, max_length=98)})
    joined = short.model_copy(update={"data": DataConfig(tokens_per_batch=300, mode="concatenated", window_tokens=100)})
    assert size_of(cut, long).row_flops == pytest.approx(size_of(short, PROTEINS).row_flops)
    assert size_of(wide, long).row_flops > 1.2 * size_of(cut, long).row_flops
    assert size_of(joined, long).row_flops == pytest.approx(size_of(cut, long).row_flops, rel=0.02)
