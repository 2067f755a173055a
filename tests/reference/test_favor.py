"""The fast op against its float64 twin: the output and every gradient, at awkward shapes."""

from dataclasses import dataclass

import pytest
import torch

from protlm.ops import draw_projection, favor_attention, favor_torch, kernel_features, reference
from tests.conftest import TOLERANCE, relative_error

NAMES = ("out", "dq", "dk", "dv")
# Segments of 0, 1 and 3 tokens, several that share a block, and one longer than a chunk.
MIXED = (0, 1, 0, 3, 3, 20, 21, 22, 23, 1, 100, 0, 75, 80, 9, 300, 0)


@dataclass(frozen=True)
class Case:
    """The shape of one comparison; `segments` packs them into a single row, and `length` is then ignored."""

    length: int = 100
    head_dim: int = 8
    feature_map: str = "positive"
    batch: int = 2
    heads: int = 2
    features: int = 32
    per_head: bool = True
    has_projection: bool = True
    is_masked: bool = False
    segments: tuple[int, ...] = ()
    is_strided: bool = False
    chunk_length: int | None = None

    def __str__(self):
        default = Case()
        return "-".join(f"{n}={v}" for n, v in vars(self).items() if v != getattr(default, n)) or "default"


CASES = [
    Case(length=1),
    Case(length=1, feature_map="relu"),
    Case(length=15, head_dim=60, features=37),
    Case(length=63, head_dim=24, per_head=False),
    Case(length=63, head_dim=24, feature_map="relu", per_head=False, is_masked=True),
    Case(length=100, head_dim=64, features=64),
    Case(length=100, head_dim=60, features=16, is_masked=True, batch=3),
    Case(length=100, head_dim=60, feature_map="relu", has_projection=False, is_masked=True, is_strided=True),
    Case(length=257, head_dim=24, is_strided=True, is_masked=True),
    Case(length=257, feature_map="relu", is_strided=True, chunk_length=64, batch=1),
    Case(length=257, is_masked=True, chunk_length=1, batch=1),
    Case(length=100, is_masked=True, chunk_length=220, batch=5),
    Case(length=1000, head_dim=64, features=128, batch=1, heads=1),
    Case(length=1000, head_dim=64, features=64, batch=1, chunk_length=64, is_masked=True, is_strided=True),
    Case(length=1000, head_dim=24, feature_map="relu", batch=1),
    Case(segments=(0,)),
    Case(segments=(0, 1, 0)),
    Case(segments=MIXED),
    Case(segments=MIXED, head_dim=60, per_head=False, is_strided=True),
    Case(segments=MIXED, feature_map="relu", chunk_length=64),
    Case(segments=MIXED, feature_map="relu", has_projection=False, is_masked=True, chunk_length=64),
    Case(segments=MIXED, is_masked=True, head_dim=24, is_strided=True),
    Case(segments=MIXED, is_masked=True, chunk_length=64),
    Case(segments=MIXED, is_masked=True, chunk_length=7),
]


def draw(case, dtype, seed=0):
    """Returns q, k, v, the cotangent of the output, the projection and the options of a case."""
    generator = torch.Generator().manual_seed(seed)
    length = sum(case.segments) if case.segments else case.length
    batch = 1 if case.segments else case.batch
    shape = (batch, case.heads, length, case.head_dim)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(4)]
    if case.is_strided:
        # As a model lays them out: token-major, seen as (batch, heads, length, head_dim).
        tensors = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in tensors]
    projection = None
    if case.has_projection:
        heads = case.heads if case.per_head else None
        projection = draw_projection(case.features, case.head_dim, num_heads=heads, generator=generator, dtype=dtype)
    options = {"feature_map": case.feature_map}
    if case.is_masked:
        options["token_mask"] = torch.rand(batch, length, generator=generator) < 0.7
    if case.segments:
        options["cu_seqlens"] = torch.tensor([0, *torch.tensor(case.segments).cumsum(0)], dtype=torch.int32)
    return *tensors, projection, options


def differentiate(attention, q, k, v, out_grad, projection, options):
    """Returns the output and the gradients of q, k and v; inputs become leaves with their strides."""
    leaves = [tensor.detach().clone(memory_format=torch.preserve_format).requires_grad_() for tensor in (q, k, v)]
    out = attention(*leaves, projection, **options)
    return out.detach(), *torch.autograd.grad(out, leaves, out_grad)


def expected_of(q, k, v, out_grad, projection, options):
    doubles = [tensor.double() for tensor in (q, k, v, out_grad)]
    return differentiate(reference.favor_attention, *doubles, projection, options)


def assert_equal(found, expected, tolerance):
    # One key a segment leaves dq and dk exactly zero, and no relative error: then dv gives the scale.
    gradient_scale = expected[3].abs().max().item() if expected[3].numel() else 0.0
    for name, a, b in zip(NAMES, found, expected, strict=True):
        if b.numel() and b.abs().max() < 1e-12 * gradient_scale:
            assert a.shape == b.shape, name
            assert a.abs().max().item() <= tolerance * gradient_scale, name
        else:
            assert relative_error(a, b) <= tolerance, name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_gradients_equal_the_float64_twin(case, dtype, monkeypatch):
    if case.chunk_length is not None:
        features = case.features if case.has_projection else case.head_dim
        monkeypatch.setattr(favor_torch, "_MIN_CHUNK_LENGTH", 1)
        monkeypatch.setattr(favor_torch, "_CHUNK_FEATURES", case.chunk_length * case.heads * features)
    arguments = draw(case, dtype)
    found = differentiate(favor_attention, *arguments)
    assert [tensor.dtype for tensor in found] == [dtype] * 4
    assert_equal(found, expected_of(*arguments), TOLERANCE[dtype])


@pytest.mark.parametrize("feature_map", ["positive", "relu"])
def test_bfloat16_values_give_what_float64_gives_for_the_same_values(feature_map):
    case = Case(head_dim=32, features=64, segments=(100, 3, 40), feature_map=feature_map)
    arguments = draw(case, torch.bfloat16)
    found = differentiate(favor_attention, *arguments)
    assert [tensor.dtype for tensor in found] == [torch.bfloat16] * 4
    assert_equal(found, expected_of(*arguments), TOLERANCE[torch.bfloat16])


def test_a_float32_projection_is_rounded_once_to_the_dtype_of_q():
    q, k, v, _, projection, options = draw(Case(features=16), torch.float32)
    q, k, v = (tensor.bfloat16() for tensor in (q, k, v))
    whole = favor_attention(q, k, v, projection, **options)
    assert torch.equal(whole, favor_attention(q, k, v, projection.bfloat16(), **options))


@pytest.mark.parametrize("feature_map", ["positive", "relu"])
def test_the_twin_is_the_plain_formula_of_the_features(feature_map):
    q, k, v, _, projection, options = draw(Case(length=9, feature_map=feature_map), torch.float64)
    q_features, k_features = (kernel_features(x, projection, feature_map=feature_map) for x in (q, k))
    weights = q_features @ k_features.transpose(-1, -2)
    expected = weights @ v / weights.sum(-1, keepdim=True)
    assert relative_error(reference.favor_attention(q, k, v, projection, **options), expected) < 1e-13


def test_features_are_the_formula_written_out():
    x, projection = torch.tensor([[0.6, -0.8, 1.0, 2.0]]).double(), torch.tensor([[1.0, 2.0, -1.0, 0.5]]).double()
    y = x[0] / 4**0.25
    score, square = sum(y * projection[0]), sum(y * y)
    positive = kernel_features(x, projection)
    assert torch.allclose(positive[0, 0], torch.exp(score - square / 2), rtol=1e-14, atol=0)
    both = torch.cat((projection, -projection))
    relu = kernel_features(x, both, feature_map="relu")
    assert torch.allclose(relu[0], (torch.stack((score, -score)).clamp(min=0) + 1e-3) / 2**0.5, rtol=1e-14, atol=0)
    bare = kernel_features(x, None, feature_map="relu")
    assert torch.allclose(bare[0], x[0].clamp(min=0) + 1e-3, rtol=1e-14, atol=0)


def test_float64_twin_of_the_features_equals_them():
    x = torch.randn(2, 3, 20, 24, generator=torch.Generator().manual_seed(0))
    projection = draw_projection(32, 24, num_heads=3, generator=torch.Generator().manual_seed(1))
    for feature_map in ("positive", "relu"):
        twin = reference.kernel_features(x, projection, feature_map=feature_map)
        assert twin.dtype == torch.float64
        assert relative_error(kernel_features(x, projection, feature_map=feature_map), twin) < TOLERANCE[torch.float32]


def test_many_features_approach_exact_softmax_attention():
    q, k, v, _, projection, _ = draw(Case(length=20, features=20_000, heads=1, batch=1), torch.float64)
    q, k = 0.5 * q, 0.5 * k
    exact = reference.softmax_attention(q, k, v)
    # The weights are far from uniform, so that the average of v would not pass for attention.
    assert relative_error(v.mean(2, keepdim=True).expand_as(v), exact) > 0.2
    assert relative_error(favor_attention(q, k, v, projection), exact) < 0.03


def test_exact_softmax_twin_equals_torch_on_masked_segments():
    q, k, v, _, _, options = draw(Case(segments=(5, 0, 1, 30), is_masked=True, has_projection=False), torch.float64)
    found = reference.softmax_attention(q, k, v, token_mask=options["token_mask"], cu_seqlens=options["cu_seqlens"])
    expected = torch.zeros_like(v)
    real = options["token_mask"][0]
    for start, stop in ((0, 5), (5, 6), (6, 36)):
        chosen = torch.arange(start, stop)[real[start:stop]]
        if len(chosen):
            parts = (x[:, :, chosen] for x in (q, k, v))
            expected[:, :, chosen] = torch.nn.functional.scaled_dot_product_attention(*parts)
    assert relative_error(found, expected) < 1e-13


@pytest.mark.parametrize("case", [Case(length=7, is_masked=True), Case(segments=(4, 0, 3))], ids=str)
def test_the_op_passes_opcheck(case):
    q, k, v, _, projection, options = draw(case, torch.float32)
    tensors = [tensor.requires_grad_() for tensor in (q, k, v)]
    arguments = (*tensors, projection, options.get("token_mask"), options.get("cu_seqlens"), "positive", "torch")
    torch.library.opcheck(torch.ops.protlm.favor.default, arguments)


def test_the_op_compiles_as_one_graph():
    arguments = draw(Case(length=20), torch.float32)
    compiled = torch.compile(favor_attention.__wrapped__, fullgraph=True, backend="aot_eager")
    found = differentiate(compiled, *arguments)
    assert_equal(found, differentiate(favor_attention, *arguments), 1e-7)


def test_only_q_k_and_v_get_gradients():
    q, k, v, _, projection, options = draw(Case(length=5), torch.float32)
    projection.requires_grad_()
    favor_attention(q.requires_grad_(), k, v, projection, **options).sum().backward()
    assert q.grad is not None
    assert k.grad is None
    assert projection.grad is None
