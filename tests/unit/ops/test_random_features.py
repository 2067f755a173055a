"""The arguments of projections and features that cannot be: each is a ValueError.

Under pytest the annotations of public functions are checked first and raise before our checks; `inspect.unwrap` gives
the functions as a user gets them.
"""

import inspect
import re

import numpy as np
import pytest
import torch

from protlm.ops import random_features

draw_projection = inspect.unwrap(random_features.draw_projection)
kernel_features = inspect.unwrap(random_features.kernel_features)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_features": 0}, "num_features: expected at least 1, got 0"),
        ({"head_dim": -2}, "head_dim: expected at least 1, got -2"),
        ({"num_heads": 0}, "num_heads: expected at least 1, got 0"),
        ({"kind": "haar"}, "kind: expected one of ('orthogonal', 'iid', 'simplex'), got 'haar'"),
        ({"kind": "simplex", "head_dim": 1}, "head_dim: expected at least 2 for kind 'simplex', got 1"),
    ],
)
def test_a_projection_that_cannot_be_drawn_is_a_value_error(sizes, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        draw_projection(**{"num_features": 4, "head_dim": 4, **sizes})


@pytest.mark.parametrize("kind", ["orthogonal", "iid", "simplex"])
def test_a_projection_is_drawn_alike_for_every_device(kind):
    def draw(**options):
        return draw_projection(4, 4, kind=kind, generator=torch.Generator().manual_seed(0), **options)

    assert draw(device="meta").device.type == draw(device=torch.device("meta")).device.type == "meta"
    assert draw(device="meta", dtype=torch.float16).dtype == torch.float16
    assert torch.equal(draw(device="cpu"), draw())
    with torch.device("meta"):
        assert draw().device.type == "meta"
        assert torch.equal(draw(device="cpu"), draw_projection(4, 4, kind=kind, device="cpu", **seeded()))


def seeded():
    return {"generator": torch.Generator().manual_seed(0)}


def test_a_generator_of_another_device_is_a_value_error():
    class Elsewhere:
        device = torch.device("cuda")

    with pytest.raises(ValueError, match=r"^generator: expected one of the CPU, where rows are drawn, got one of cuda"):
        draw_projection(4, 4, generator=Elsewhere())


def test_features_of_what_is_no_tensor_are_a_type_error():
    with pytest.raises(TypeError, match=r"^x: expected a torch.Tensor, got numpy.ndarray; pass torch.as_tensor\(x\)"):
        kernel_features(np.zeros((5, 4)), torch.zeros(6, 4))
    with pytest.raises(TypeError, match=r"^projection: expected a torch.Tensor, got list"):
        kernel_features(torch.zeros(5, 4), [[0.0]])


def test_features_without_a_projection_are_a_value_error():
    with pytest.raises(ValueError, match=r"^projection: expected a tensor for feature_map 'positive', got None"):
        kernel_features(torch.zeros(5, 4), None)


def test_features_of_an_unknown_map_or_another_head_dim_are_a_value_error():
    with pytest.raises(ValueError, match=r"feature_map: expected .*got 'elu'"):
        kernel_features(torch.zeros(5, 4), torch.zeros(6, 4), feature_map="elu")
    with pytest.raises(ValueError, match="projection: expected head_dim 4 as in x, got 3"):
        kernel_features(torch.zeros(5, 4), torch.zeros(6, 3))


def test_features_of_oprf_without_a_and_a_of_another_map_are_a_value_error():
    with pytest.raises(ValueError, match=r"^oprf_a: expected a number or a tensor for feature_map 'oprf', got None"):
        kernel_features(torch.zeros(5, 4), torch.zeros(6, 4), feature_map="oprf")
    with pytest.raises(ValueError, match=r"^oprf_a: expected None for feature_map 'trig', got a value"):
        kernel_features(torch.zeros(5, 4), torch.zeros(6, 4), feature_map="trig", oprf_a=-0.1)
