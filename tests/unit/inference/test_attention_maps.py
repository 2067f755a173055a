import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from protlm.inference.attention_maps import classify, read_attention_maps
from protlm.inference.attention_weights import attention_matrix
from tests.unit.inference.planted_attention import model_with, random_protein, sharp_positions
from tests.unit.model.small_models import build


def numbers_of(matrix, causal):
    """Returns the numbers of a whole map, written as they are defined."""
    length = len(matrix)
    offsets = np.arange(length) - np.arange(length)[:, None]
    uniform = np.tril(np.ones_like(matrix)) if causal else np.ones_like(matrix)
    uniform /= uniform.sum(1, keepdims=True)
    num_columns = math.ceil(length / 50)

    def entropy(rows):
        return -(rows * np.log(np.where(rows > 0, rows, 1))).sum()

    return {
        "local_share": matrix[np.abs(offsets) <= 4].sum() / length,
        "uniform_local_share": uniform[np.abs(offsets) <= 4].sum() / length,
        "column_share": np.sort(matrix.sum(0))[-num_columns:].sum() / length,
        "uniform_column_share": np.sort(uniform.sum(0))[-num_columns:].sum() / length,
        "entropy": entropy(matrix) / entropy(uniform),
        "special_share": matrix[:, [0, -1]].sum() / length,
        "offset_profile": [
            np.diagonal(matrix, offset).mean() if abs(offset) < length else 0.0 for offset in range(-32, 33)
        ],
    }


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["positive", "relu", "softmax"])
@pytest.mark.parametrize("num_residues", [1, 20, 129, 300])
def test_the_numbers_are_those_of_the_whole_map(kind, causal, num_residues):
    model, protein = build(attention=kind, causal=causal), random_protein(num_residues)
    maps = read_attention_maps(model, protein, max_blocks=50)
    assert (maps.num_tokens, maps.is_causal) == (num_residues + 2, causal)
    assert [(each.layer, each.head) for each in maps.heads] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    size = maps.block_tokens
    starts = range(0, maps.num_tokens, size)
    assert len(starts) <= 50
    for each in maps.heads:
        matrix = attention_matrix(model, protein, each.layer, each.head)
        for name, expected in numbers_of(matrix, causal).items():
            np.testing.assert_allclose(getattr(each, name), expected, rtol=1e-9, atol=1e-15, err_msg=name)
        blocks = [[matrix[i : i + size, j : j + size].mean() for j in starts] for i in starts]
        np.testing.assert_allclose(each.picture, blocks, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("causal", [False, True])
def test_planted_heads_get_their_class(causal, monkeypatch):
    length, head_dim = 202, 32
    q, k = torch.zeros(2, length, 4, head_dim)
    positions = sharp_positions(length, head_dim, 12.0)
    q[:, 0] = k[:, 0] = positions
    # Each query looks at the token two before it.
    q[2:, 1], k[:, 1] = positions[:-2], positions
    q[:, 2, 0], k[3, 2, 0], k[100, 2, 0] = 6.0, 6.0, 6.0
    maps = read_attention_maps(model_with(monkeypatch, q, k, causal=causal), random_protein(200))
    assert [each.pattern for each in maps.heads] == ["diagonal", "diagonal", "vertical", "diffuse"]
    on_diagonal, before, columns, uniform = maps.heads
    assert np.argmax(on_diagonal.offset_profile) == 32
    assert np.argmax(before.offset_profile) == 30
    assert np.argmax(np.sum(columns.picture, 0)) == 3 // maps.block_tokens
    assert uniform.entropy == pytest.approx(1)
    assert uniform.local_share == pytest.approx(uniform.uniform_local_share)
    assert uniform.column_share == pytest.approx(uniform.uniform_column_share)
    assert all(each.entropy < 0.9 for each in maps.heads[:3])


def test_favor_shows_planted_columns_too(monkeypatch):
    q, k = torch.zeros(2, 202, 1, 16)
    q[:, 0, 0], k[50:55, 0, 0] = 3.0, 3.0
    model = model_with(monkeypatch, q, k, attention="positive", num_features=256)
    (head,) = read_attention_maps(model, random_protein(200)).heads
    assert head.pattern == "vertical"
    assert head.column_share > 2 * head.uniform_column_share


def test_the_larger_excess_decides():
    assert classify(0.5, 0.1, 0.4, 0.1) == "diagonal"
    assert classify(0.5, 0.1, 0.6, 0.1) == "vertical"
    assert classify(0.1, 0.1, 0.1, 0.1) == "diffuse"
    # Everything is near in a short protein, which shows nothing.
    assert classify(1.0, 1.0, 0.4, 0.4) == "diffuse"
    assert classify(0.189, 0.1, 0.1, 0.1) == "diffuse"
    assert classify(0.191, 0.1, 0.1, 0.1) == "diagonal"


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["positive", "softmax"])
def test_the_heads_of_an_untrained_model_are_diffuse(kind, causal):
    model = build(attention=kind, causal=causal, num_features=128)
    model.reset(3)
    assert {each.pattern for each in read_attention_maps(model, random_protein(150)).heads} == {"diffuse"}


def test_maps_are_the_same_twice_and_fit_into_json():
    model, protein = build(), random_protein(60)
    maps = read_attention_maps(model, protein)
    assert maps == read_attention_maps(model, protein)
    written = json.loads(json.dumps(dataclasses.asdict(maps), allow_nan=False))
    assert len(written["heads"]) == 4
    assert written["heads"][0]["offset_profile"] == maps.heads[0].offset_profile


def test_a_picture_needs_a_block():
    with pytest.raises(ValueError, match="max_blocks: expected at least 1"):
        read_attention_maps(build(), random_protein(5), max_blocks=0)
