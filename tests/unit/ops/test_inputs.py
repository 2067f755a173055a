"""Every argument of the op that does not fit is a ValueError that names the argument, expected and got, or a TypeError.

Under pytest the annotations of public functions are checked first and raise before our checks; `inspect.unwrap` gives
the functions as a user gets them.
"""

import inspect
import re

import numpy as np
import pytest
import torch
import torch.distributed as dist

from protlm.ops import favor, reference
from protlm.ops.feature_maps import DEFINITIONS
from protlm.ops.inputs import AttentionInputs

favor_attention = inspect.unwrap(favor.favor_attention)

SHAPE = (2, 3, 5, 4)
ONE_ROW = (1, 3, 5, 4)


def fitting(shape=SHAPE):
    """Returns arguments that fit together."""
    return {**{name: torch.zeros(shape) for name in "qkv"}, "projection": torch.zeros(6, 4)}


def int32(*bounds):
    return torch.tensor(bounds, dtype=torch.int32)


BAD_ARGUMENTS = {
    "q axes": ({"q": torch.zeros(3, 5, 4)}, "q: expected 4 axes (batch, heads, length, head_dim), got (3, 5, 4)"),
    "q dtype": (
        {name: torch.zeros(SHAPE, dtype=torch.int64) for name in "qkv"},
        "q: expected a floating dtype, got torch.int64",
    ),
    "k shape": ({"k": torch.zeros(2, 3, 6, 4)}, "k: expected the shape of q, (2, 3, 5, 4), got (2, 3, 6, 4)"),
    "v shape": ({"v": torch.zeros(2, 3, 5, 8)}, "v: expected the shape of q, (2, 3, 5, 4), got (2, 3, 5, 8)"),
    "k dtype": ({"k": torch.zeros(SHAPE).double()}, "k: expected the dtype of q, torch.float32, got torch.float64"),
    "v dtype": ({"v": torch.zeros(SHAPE).half()}, "v: expected the dtype of q, torch.float32, got torch.float16"),
    "feature_map": (
        {"feature_map": "elu"},
        "feature_map: expected one of ('positive', 'hyperbolic', 'trig', 'regularised', 'oprf', 'relu'), got 'elu'",
    ),
    "no projection of another map": (
        {"projection": None, "feature_map": "hyperbolic"},
        "projection: expected a tensor for feature_map 'hyperbolic', got None",
    ),
    "a of another map": (
        {"oprf_a": torch.zeros(3)},
        "oprf_a: expected None for feature_map 'positive', got a value",
    ),
    "a missing": (
        {"feature_map": "oprf", "causal": True},
        "oprf_a: expected a tensor for causal attention, as the data would tell of later tokens, got None",
    ),
    "a shape": (
        {"feature_map": "oprf", "oprf_a": torch.zeros(2)},
        "oprf_a: expected shape (3,) or (2, 3), got (2,)",
    ),
    "a shape of segments": (
        {**fitting(ONE_ROW), "feature_map": "oprf", "cu_seqlens": int32(0, 2, 5), "oprf_a": torch.zeros(1, 3)},
        "oprf_a: expected shape (3,) or (2, 3), got (1, 3)",
    ),
    "a dtype": (
        {"feature_map": "oprf", "oprf_a": torch.zeros(3, dtype=torch.int64)},
        "oprf_a: expected a floating dtype, got torch.int64",
    ),
    "a device": (
        {"feature_map": "oprf", "oprf_a": torch.zeros(3, device="meta")},
        "oprf_a: expected the device of q, cpu, got meta",
    ),
    "a too large": (
        {"feature_map": "oprf", "oprf_a": torch.tensor([0.0, 0.125, -1.0])},
        "oprf_a: expected values below 1/8, got up to 0.125",
    ),
    "no projection": (
        {"projection": None},
        "projection: expected a tensor for feature_map 'positive', got None",
    ),
    "projection axes": (
        {"projection": torch.zeros(4)},
        "projection: expected (features, 4) or (3, features, 4), got (4,)",
    ),
    "projection head_dim": (
        {"projection": torch.zeros(6, 5)},
        "projection: expected (features, 4) or (3, features, 4), got (6, 5)",
    ),
    "projection heads": (
        {"projection": torch.zeros(2, 6, 4)},
        "projection: expected (features, 4) or (3, features, 4), got (2, 6, 4)",
    ),
    "projection empty": (
        {"projection": torch.zeros(0, 4)},
        "projection: expected (features, 4) or (3, features, 4), got (0, 4)",
    ),
    "projection dtype": (
        {"projection": torch.zeros(6, 4, dtype=torch.int32)},
        "projection: expected a floating dtype, got torch.int32",
    ),
    "token_mask shape": (
        {"token_mask": torch.ones(2, 4, dtype=torch.bool)},
        "token_mask: expected shape (2, 5), got (2, 4)",
    ),
    "token_mask dtype": (
        {"token_mask": torch.ones(2, 5)},
        "token_mask: expected dtype torch.bool, got torch.float32",
    ),
    "cu_seqlens axes": (
        {"cu_seqlens": torch.zeros(1, 2, dtype=torch.int32)},
        "cu_seqlens: expected one axis with at least 2 bounds, got (1, 2)",
    ),
    "cu_seqlens one bound": (
        {"cu_seqlens": int32(0)},
        "cu_seqlens: expected one axis with at least 2 bounds, got (1,)",
    ),
    "cu_seqlens dtype": (
        {"cu_seqlens": int32(0, 5).long()},
        "cu_seqlens: expected dtype torch.int32, got torch.int64",
    ),
    "cu_seqlens batch": ({"cu_seqlens": int32(0, 5)}, "q: expected batch = 1 with cu_seqlens, got 2"),
    "k device": ({"k": torch.zeros(SHAPE, device="meta")}, "k: expected the device of q, cpu, got meta"),
    "v device": ({"v": torch.zeros(SHAPE, device="meta")}, "v: expected the device of q, cpu, got meta"),
    "projection device": (
        {"projection": torch.zeros(6, 4, device="meta")},
        "projection: expected the device of q, cpu, got meta",
    ),
    "token_mask device": (
        {"token_mask": torch.ones(2, 5, dtype=torch.bool, device="meta")},
        "token_mask: expected the device of q, cpu, got meta",
    ),
    "cu_seqlens device": (
        {**fitting(ONE_ROW), "cu_seqlens": int32(0, 5).to("meta")},
        "cu_seqlens: expected the device of q, cpu, got meta",
    ),
    "a group of others": (
        # What new_group returns to a process that is not in it.
        {"process_group": dist.GroupMember.NON_GROUP_MEMBER},
        "process_group: expected a torch.distributed.ProcessGroup that this process is in, got ",
    ),
    "backend": ({"backend": "cuda"}, "backend: expected 'auto' or one of "),
    "near_block below 0": ({"near_block": -1}, "near_block: expected an integer of at least 0, got -1"),
    "near_block beyond int64": (
        {"near_block": 1 << 63},
        "near_block: expected an integer below 2^63, got 9223372036854775808",
    ),
    "near_block of another type": ({"near_block": 2.0}, "near_block: expected an integer of at least 0, got 2.0"),
    "near_block of a map of another kernel": (
        {"near_block": 4, "feature_map": "regularised"},
        "feature_map: expected one of ('positive', 'hyperbolic', 'oprf') with near_block > 0, got 'regularised'",
    ),
    "near_block of a signed map": (
        {"near_block": 4, "feature_map": "trig"},
        "feature_map: expected one of ('positive', 'hyperbolic', 'oprf') with near_block > 0, got 'trig'",
    ),
    "feature_bias of a map without exponents": (
        {"feature_bias": torch.zeros(6), "feature_map": "relu"},
        "feature_map: expected one of ('positive', 'hyperbolic', 'regularised', 'oprf') with feature_bias, got 'relu'",
    ),
    "feature_bias shape": (
        {"feature_bias": torch.zeros(5)},
        "feature_bias: expected shape (6,) or (3, 6), got (5,)",
    ),
    "feature_bias dtype": (
        {"feature_bias": torch.zeros(6, dtype=torch.int64)},
        "feature_bias: expected a floating dtype, got torch.int64",
    ),
    "feature_bias device": (
        {"feature_bias": torch.zeros(6, device="meta")},
        "feature_bias: expected the device of q, cpu, got meta",
    ),
    "return_log_normaliser of a map without exponents": (
        {"return_log_normaliser": True, "feature_map": "relu"},
        "feature_map: expected one of ('positive', 'hyperbolic', 'regularised', 'oprf') with return_log_normaliser, "
        "got 'relu'",
    ),
}


@pytest.mark.parametrize(("changes", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_an_argument_that_does_not_fit_is_a_value_error(changes, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        favor_attention(**{**fitting(), **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": np.zeros(SHAPE)}, "q: expected a torch.Tensor, got numpy.ndarray; pass torch.as_tensor(q)"),
        ({"v": [[0.0]]}, "v: expected a torch.Tensor, got list; pass torch.as_tensor(v)"),
        ({"k": None}, "k: expected a torch.Tensor, got NoneType; pass torch.as_tensor(k)"),
        (
            {"projection": np.zeros((6, 4))},
            "projection: expected a torch.Tensor, got numpy.ndarray; pass torch.as_tensor",
        ),
        (
            {"cu_seqlens": [0, 5]},
            "cu_seqlens: expected a torch.Tensor, got list; pass torch.as_tensor(cu_seqlens, dtype=torch.int32)",
        ),
        (
            {"token_mask": np.ones((2, 5), bool)},
            "token_mask: expected a torch.Tensor, got numpy.ndarray; pass torch.as_tensor(token_mask, dtype=torch.bool",
        ),
        (
            {"feature_map": "oprf", "oprf_a": -0.1},
            "oprf_a: expected a torch.Tensor, got float; pass torch.as_tensor(oprf_a)",
        ),
    ],
)
def test_what_is_no_tensor_is_a_type_error_that_says_what_to_pass(changes, message):
    with pytest.raises(TypeError, match="^" + re.escape(message)):
        favor_attention(**{**fitting(), **changes})


SHORTER = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("name", "qkv")
@pytest.mark.parametrize("dtype", SHORTER, ids=str)
def test_autocast_may_shorten_some_tensors_and_others_not(name, dtype):
    generator = torch.Generator().manual_seed(0)
    tensors = {each: torch.randn(SHAPE, generator=generator) for each in "qkv"}
    projection = torch.randn(6, 4, generator=generator)
    mixed = {**tensors, name: tensors[name].to(dtype).requires_grad_()}
    with pytest.raises(ValueError, match="expected the dtype of q"):
        favor_attention(**mixed, projection=projection)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = favor_attention(**mixed, projection=projection)
    out.float().sum().backward()
    assert out.dtype == mixed["v"].dtype
    assert mixed[name].grad.dtype == dtype
    # The longest dtype is that of the computation: nothing more is rounded.
    expected = favor_attention(**{**mixed, name: mixed[name].float()}, projection=projection)
    assert torch.equal(out, expected.to(out.dtype))


def test_without_autocast_dtypes_must_agree():
    with torch.autocast("cpu", enabled=False), pytest.raises(ValueError, match="v: expected the dtype of q"):
        favor_attention(**{**fitting(), "v": torch.zeros(SHAPE).bfloat16()})


@pytest.mark.parametrize("values", [(1, 5), (0, 4), (0, 6), (0, 3, 2, 5), (-1, 5), (5, 0)])
def test_bounds_that_do_not_rise_from_zero_to_the_length_are_a_value_error(values):
    with pytest.raises(ValueError, match=r"^cu_seqlens: expected bounds that rise from 0 to the length 5, got \["):
        favor_attention(**fitting(ONE_ROW), cu_seqlens=int32(*values))


@pytest.mark.parametrize("name", ["favor_attention", "softmax_attention"])
def test_the_twins_check_their_arguments_too(name):
    attention = inspect.unwrap(getattr(reference, name))
    projection = (torch.zeros(6, 4),) if name == "favor_attention" else ()
    tensors = (torch.zeros(SHAPE) for _ in "qkv")
    token_mask = torch.ones(1, 5, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"^token_mask: expected shape \(2, 5\), got \(1, 5\)"):
        attention(*tensors, *projection, token_mask=token_mask)


def test_arguments_that_fit_are_accepted():
    for changes in (
        {"projection": torch.zeros(3, 6, 4)},
        {"feature_map": "relu", "projection": None},
        {"feature_map": "oprf", "oprf_a": torch.zeros(3)},
        {"feature_map": "oprf", "oprf_a": torch.zeros(2, 3), "causal": True},
        *({"feature_map": name} for name in DEFINITIONS),
        {"projection": torch.zeros(6, 4).double()},
        {"backend": "torch"},
        {"near_block": 2},
        {"near_block": 2, "backend": "cpp", "feature_map": "hyperbolic"},
        {"feature_bias": torch.zeros(6)},
        {"feature_bias": torch.zeros(3, 6), "feature_map": "regularised"},
    ):
        assert favor_attention(**{**fitting(), **changes}).shape == SHAPE


def test_a_log_normaliser_without_a_near_field_in_a_group_is_a_value_error():
    q = torch.zeros(SHAPE)
    inputs = AttentionInputs(q, q, q, torch.zeros(6, 4), group_name="0")
    message = "process_group: expected None with return_log_normaliser and no near_block, got a group"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        inputs.check_log_normaliser()
