import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from protlm.inference import attention_weights
from protlm.inference.attention_maps import read_attention_maps
from protlm.inference.attention_weights import attention_matrix, share_tiles, visit_protein, weight_tiles
from protlm.inference.residue_similarity import attention_similarity
from protlm.ops import reference
from tests.conftest import relative_error
from tests.unit.inference.planted_attention import random_protein
from tests.unit.model.small_models import KINDS, build

ALL_KINDS = (*KINDS, "trig")


def calls_of(model, protein):
    calls = []
    visit_protein(model, protein, calls.append)
    return calls


def dense_twin(call):
    """Returns (heads, length, length): what the float64 twin of the attention makes of one-hot values."""
    q, k = (x.transpose(0, 1).unsqueeze(0) for x in (call.q, call.k))
    _, heads, length, head_dim = q.shape
    columns = []
    for start in range(0, length, head_dim):
        v = torch.zeros(length, head_dim)
        stop = min(start + head_dim, length)
        v[torch.arange(start, stop), torch.arange(stop - start)] = 1
        v = v.expand(1, heads, -1, -1)
        if call.attention.is_exact:
            window = call.attention.window if call.attention.kind == "local" else None
            out = reference.softmax_attention(q, k, v, causal=call.attention.causal, window=window)
        else:
            out = reference.favor_attention(
                q,
                k,
                v,
                call.attention.projection,
                feature_map=call.attention.feature_map,
                causal=call.attention.causal,
                oprf_a=call.attention.fixed_oprf_a(),
                near_block=call.attention.near_block,
            )
        columns.append(out[0, :, :, : stop - start])
    return torch.cat(columns, -1)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("tile_queries", [7, 128])
def test_the_tiles_are_the_weights_of_the_float64_twin(kind, causal, tile_queries, monkeypatch):
    monkeypatch.setattr(attention_weights, "TILE_QUERIES", tile_queries)
    model = build(attention=kind, causal=causal, local_window=9, near_block=8)
    # The A of oprf comes from sums in float32.
    tolerance = 1e-6 if kind == "oprf" else 1e-9
    for call in calls_of(model, random_protein(43)):
        expected = dense_twin(call)
        for head in range(2):
            tiles = list(weight_tiles(call, head))
            assert [start for start, _ in tiles] == list(range(0, 45, tile_queries))
            matrix = torch.cat([tile for _, tile in tiles])
            assert relative_error(matrix, expected[head]) < tolerance
            assert relative_error(matrix.sum(-1), torch.ones(45)) < 1e-9


def test_relu_without_a_projection_has_weights_too():
    (call, _) = calls_of(build(attention="relu", projection="none"), random_protein(20))
    ((_, matrix),) = weight_tiles(call, 1)
    assert relative_error(matrix, dense_twin(call)[1]) < 1e-9


def test_shares_are_the_weights_unless_they_are_signed():
    for kind in ("positive", "softmax", "trig"):
        model = build(attention=kind, max_temperature=12.0, num_features=4)
        (call, _) = calls_of(model, random_protein(60))
        ((_, weights),), ((_, shares),) = weight_tiles(call, 0), share_tiles(call, 0)
        assert bool((weights < 0).any()) == (kind == "trig")
        assert bool((shares >= 0).all())
        assert relative_error(shares, weights.abs() / weights.abs().sum(-1, keepdim=True)) < 1e-12


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["positive", "regularised", "relu", "softmax"])
def test_weights_stay_finite_for_large_norms(kind, causal):
    model = build(attention=kind, causal=causal, qk_norm=False)
    with torch.no_grad():
        for layer in model.layers:
            layer.attention.query.weight.mul_(20)
            layer.attention.key.weight.mul_(20)
    (call, _) = calls_of(model, random_protein(30))
    assert call.q.square().sum(-1).max() > 1e3
    ((_, matrix),) = weight_tiles(call, 0)
    assert relative_error(matrix.sum(-1), torch.ones(32)) < 1e-9


def test_weights_that_are_not_finite_are_an_error_that_names_the_head():
    model = build()
    with torch.no_grad():
        model.layers[1].attention.query.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="layer 2, head 1"):
        attention_matrix(model, random_protein(9), 2, 1)


def test_a_matrix_is_that_of_the_layer_and_head_asked_for():
    model, protein = build(), random_protein(140)
    calls = calls_of(model, protein)
    for layer, head in ((1, 2), (2, 1)):
        matrix = attention_matrix(model, protein, layer, head)
        assert matrix.dtype == np.float64
        expected = torch.cat([tile for _, tile in weight_tiles(calls[layer - 1], head - 1)]).numpy()
        np.testing.assert_array_equal(matrix, expected)


@pytest.mark.parametrize(("layer", "head", "name"), [(0, 1, "layer"), (3, 1, "layer"), (1, 0, "head"), (1, 3, "head")])
def test_a_layer_or_head_that_is_not_there_is_an_error(layer, head, name):
    with pytest.raises(ValueError, match=f"{name}: expected a number from 1 to 2"):
        attention_matrix(build(), random_protein(9), layer, head)


@pytest.mark.parametrize("protein", [np.zeros(0, np.uint8), np.array([5, 0], np.uint8), np.array([32], np.uint8)])
def test_only_residues_make_a_protein(protein):
    with pytest.raises(ValueError, match="at least one residue"):
        attention_matrix(build(), protein, 1, 1)


def test_a_protein_beyond_the_learned_positions_is_an_error_that_names_the_limit():
    model = build(positions="learned", max_positions=16)
    assert attention_matrix(model, random_protein(14), 1, 1).shape == (16, 16)
    with pytest.raises(ValueError, match=r"at most 14 residues.*got 15"):
        attention_matrix(model, random_protein(15), 1, 1)


class LargestTensor(TorchDispatchMode):
    """Records the largest number of elements that any operation returned."""

    def __init__(self):
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        results = result if isinstance(result, (tuple, list)) else (result,)
        sizes = [each.numel() for each in results if isinstance(each, torch.Tensor)]
        self.num_elements = max([self.num_elements, *sizes])
        return result


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_no_tensor_has_the_size_of_the_square_of_the_length(kind, causal):
    model, protein = build(attention=kind, causal=causal), random_protein(598)
    with LargestTensor() as largest:
        read_attention_maps(model, protein)
        attention_similarity(model, [protein])
    # A tile, with the padding of its last block; and the scratch memory of a compiled kernel, which has a bound.
    assert largest.num_elements <= (200_000 if kind in ("local", "softmax") else 128 * 605)
    with LargestTensor() as largest:
        attention_matrix(model, protein, 1, 1)
    assert largest.num_elements == 600**2
