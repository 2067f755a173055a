"""Which derivatives of the op torch gives, by which way: first ones in reverse mode; all else is one clear error."""

import inspect
import re

import pytest
import torch
from torch.autograd import forward_ad

from protlm.ops import favor, favor_attention
from tests.reference.cases import MAPS, Case, assert_equal, computed_of, draw

# torch itself scripts its rules of forward mode.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")

attention = inspect.unwrap(favor.favor_attention)

CASES = [
    *(Case(length=7, feature_map=feature_map, causal=causal) for feature_map in MAPS for causal in (False, True)),
    Case(length=7, padding="some"),
    Case(segments=(4, 0, 3), causal=True),
    Case(length=7, feature_map="oprf", a_axes="segments"),
]
FORWARD = re.escape("reverse mode only (backward, torch.func.grad, vjp and jacrev), got a tangent of forward mode")
# torch loops over what it has no rule for, and says that this is slow.
loops = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")


def of(case):
    """Returns the drawn arguments, and the op as a function of q, k and v alone."""
    arguments = draw(case, torch.float64)
    q, k, v, _, projection, options = arguments
    return arguments, (q, k, v), lambda q, k, v: favor_attention(q, k, v, projection, **options)


def test_q_k_and_v_get_gradients():
    _, (q, k, v), op = of(Case(length=5, feature_map="oprf", a_axes="heads"))
    for tensor in (q, k, v):
        tensor.requires_grad_()
    op(q, k, v).square().sum().backward()
    assert all(tensor.grad is not None for tensor in (q, k, v))
    q.grad = None
    op(q, k.detach(), v.detach()).square().sum().backward()
    assert q.grad is not None


def test_a_gradient_that_would_not_come_is_a_value_error():
    q, k, v, _, projection, options = draw(Case(length=5, feature_map="oprf", a_axes="heads"), torch.float32)
    oprf_a = options["oprf_a"].requires_grad_()
    message = r"^oprf_a: expected a tensor that requires no gradient, as it gets none.* pass oprf_a\.detach\(\)$"

    def call(oprf_a):
        return favor_attention(q, k, v, projection, **{**options, "oprf_a": oprf_a}).sum()

    with pytest.raises(ValueError, match=message):
        call(oprf_a)
    with pytest.raises(ValueError, match=message):
        torch.func.grad(call)(oprf_a.detach())
    expected = call(oprf_a.detach())
    with torch.no_grad():
        assert torch.equal(call(oprf_a), expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_torch_func_vjp_gives_the_gradients_of_backward(case):
    arguments, tensors, op = of(case)
    out, pull = torch.func.vjp(op, *tensors)
    assert_equal((out, *pull(arguments[3])), computed_of(arguments), 1e-12)


def loss_of(op):
    return lambda *tensors: op(*tensors).square().sum()


def gradients(loss, *tensors):
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    return torch.autograd.grad(loss(*leaves), leaves)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_torch_func_grad_gives_the_gradients_of_backward(case):
    _, tensors, op = of(case)
    found = torch.func.grad(loss_of(op), argnums=(0, 1, 2))(*tensors)
    for actual, expected in zip(found, gradients(loss_of(op), *tensors), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@loops
def test_gradients_of_every_example_at_once():
    _, tensors, op = of(Case(length=7, batch=3))
    examples = [tensor.unsqueeze(1) for tensor in tensors]
    found = torch.func.vmap(torch.func.grad(loss_of(op), argnums=(0, 1, 2)))(*examples)
    for number in range(3):
        expected = gradients(loss_of(op), *(example[number] for example in examples))
        for actual, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(actual[number], wanted, rtol=1e-12, atol=1e-12)


@loops
def test_jacrev_gives_the_jacobian():
    _, (q, k, v), op = of(Case(length=3, batch=1))
    expected = torch.autograd.functional.jacobian(lambda x: op(x, k, v), q)
    torch.testing.assert_close(torch.func.jacrev(lambda x: op(x, k, v))(q), expected, rtol=1e-12, atol=1e-12)


def dual(op, tensors, place):
    with forward_ad.dual_level():
        some = list(tensors)
        some[place] = forward_ad.make_dual(some[place], torch.ones_like(some[place]))
        return forward_ad.unpack_dual(op(*some)).tangent


@loops
@pytest.mark.parametrize("place", [0, 1, 2], ids="qkv")
@pytest.mark.parametrize("feature_map", ["positive", "oprf"])
def test_forward_mode_is_refused_rather_than_zero(place, feature_map):
    _, tensors, op = of(Case(length=5, feature_map=feature_map))

    def alone(x):
        return op(*tensors[:place], x, *tensors[place + 1 :])

    tangent = torch.ones_like(tensors[place])
    for way in (
        lambda: torch.func.jvp(alone, (tensors[place],), (tangent,)),
        lambda: torch.func.jacfwd(alone)(tensors[place]),
        lambda: torch.func.hessian(lambda x: alone(x).sum())(tensors[place]),
        lambda: dual(op, tensors, place),
    ):
        with pytest.raises(RuntimeError, match=FORWARD):
            way()


def test_a_level_of_forward_mode_without_a_tangent_is_no_forward_mode():
    arguments, tensors, op = of(Case(length=5))
    with forward_ad.dual_level():
        out = op(*tensors)
    torch.testing.assert_close(out, computed_of(arguments)[0], rtol=0, atol=0)


def test_a_tangent_of_the_projection_is_refused():
    q, k, v, _, projection, options = draw(Case(length=5), torch.float64)
    with pytest.raises(RuntimeError, match=FORWARD):
        dual(lambda q, k, v, projection: favor_attention(q, k, v, projection, **options), (q, k, v, projection), 3)


def test_a_compiled_function_refuses_forward_mode_too():
    torch._dynamo.reset()
    q, k, v, _, projection, options = draw(Case(length=5), torch.float64)

    def alone(x):
        return attention(x, k, v, projection, **options)

    compiled = torch.compile(lambda x: torch.func.jvp(alone, (x,), (x,)), backend="aot_eager")
    with pytest.raises(RuntimeError, match=FORWARD):
        compiled(q)
    whole = torch.compile(alone, backend="aot_eager", fullgraph=True)
    # Which error is torch's choice: the graph would have to break.
    with pytest.raises(RuntimeError):
        dual(whole, (q,), 0)


@pytest.mark.parametrize("of_second", ["q", "v"])
def test_a_second_derivative_is_refused_rather_than_wrong(of_second):
    _, (q, k, v), op = of(Case(length=5))
    second = {"q": q, "v": v}[of_second].requires_grad_()
    (gradient,) = torch.autograd.grad(op(q, k, v).square().sum(), second, create_graph=True)
    with pytest.raises(RuntimeError, match=r"favor_attention has first derivatives .* got a second derivative$"):
        torch.autograd.grad(gradient.sum(), second)
    with pytest.raises(RuntimeError, match=r"got a second derivative$"):
        torch.func.grad(lambda x: torch.func.grad(lambda y: op(y, k, v).square().sum())(x).sum())(q.detach())
