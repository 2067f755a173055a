"""Settings of the attention layer beyond the default: trig features, simplex rows, no projection, rescaling."""

from itertools import pairwise

import pytest
import torch

from protlm.config import ModelConfig
from protlm.model.attention import rescale
from protlm.model.segments import Segments
from tests.conftest import TOLERANCE, relative_error
from tests.unit.model.test_performer import SIZES, attended, bounds, build, proteins

FLOAT32 = TOLERANCE[torch.float32]


def q_and_k(length, seed=0):
    """Returns q and k whose dimensions differ in size by orders of magnitude, in different ways."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-2, 2, 8)
    q, k = (torch.randn(length, 3, 8, generator=generator) for _ in range(2))
    return q * sizes, k * sizes.roll(3)


def test_rescaling_keeps_products_and_makes_the_norms_least():
    q, k = q_and_k(40)
    new_q, new_k = rescale(q, k, Segments.from_bounds(bounds(40)))
    products = torch.einsum("lhd,mhd->hlm", q.double(), k.double())
    assert relative_error(torch.einsum("lhd,mhd->hlm", new_q.double(), new_k.double()), products) < FLOAT32
    least = (new_q.square() + new_k.square()).sum()
    assert least < 0.2 * (q.square() + k.square()).sum()
    for dimension, factor in ((0, 1.1), (0, 0.9), (7, 1.1), (7, 0.9)):
        other_q, other_k = new_q.clone(), new_k.clone()
        other_q[..., dimension] *= factor
        other_k[..., dimension] /= factor
        assert (other_q.square() + other_k.square()).sum() > least


def test_rescaling_is_of_every_segment_and_head_on_its_own():
    sizes = (5, 0, 1, 30)
    q, k = q_and_k(36)
    whole = torch.stack(rescale(q, k, Segments.from_bounds(bounds(*sizes)))).split(sizes, 1)
    for size, found, *parts in zip(sizes, whole, q.split(sizes), k.split(sizes), strict=True):
        alone = torch.stack(rescale(*parts, Segments.from_bounds(bounds(size))))
        assert torch.equal(found, alone)
        for head in range(3):
            single = (part[:, head : head + 1].contiguous() for part in parts)
            only = torch.stack(rescale(*single, Segments.from_bounds(bounds(size))))
            assert relative_error(only, alone[:, :, head : head + 1]) < FLOAT32


def test_a_dimension_of_zeros_is_left_alone():
    q, k = q_and_k(9)
    q[..., 0] = 0.0
    k[..., 1] = 0.0
    new_q, new_k = rescale(q, k, Segments.from_bounds(bounds(9)))
    assert torch.equal(new_k[..., 0], k[..., 0])
    assert torch.equal(new_q[..., 1], q[..., 1])
    assert torch.stack((new_q, new_k)).isfinite().all()


def test_no_gradient_flows_through_the_scale():
    q, k = (x.requires_grad_() for x in q_and_k(6))
    new_q, new_k = rescale(q, k, Segments.from_bounds(bounds(6)))
    scale = (new_q / q).detach()
    (q_grad,) = torch.autograd.grad(new_q.sum() + new_k.sum(), q)
    assert relative_error(q_grad, scale) < FLOAT32


@torch.no_grad()
def test_rescaling_changes_nothing_for_exact_attention_and_something_for_favor(monkeypatch):
    tokens, cu_seqlens = torch.cat(proteins(*SIZES)), bounds(*SIZES)
    for kind, is_same in (("softmax", True), ("positive", False)):
        plain, rescaled = (build(attention=kind, rescale_qk=choice) for choice in (False, True))
        error = relative_error(rescaled(tokens, cu_seqlens), plain(tokens, cu_seqlens))
        assert (error < FLOAT32) == is_same
    q, k, _, _ = attended(build(rescale_qk=True), tokens, cu_seqlens, monkeypatch)
    for start, stop in pairwise(cu_seqlens.tolist()):
        q_squares, k_squares = (x[0, :, start:stop].square().sum(1) for x in (q, k))
        assert relative_error(q_squares, k_squares) < FLOAT32


@pytest.mark.parametrize("options", [{"rescale_qk": True}, {"attention": "oprf", "projection": "simplex"}], ids=str)
@torch.no_grad()
def test_a_protein_has_the_same_logits_alone_and_in_any_row(options):
    model = build(**options)
    members = proteins(*SIZES)
    packed = model(torch.cat(members), bounds(*SIZES)).split(SIZES)
    for tokens, found in zip(members, packed, strict=True):
        assert relative_error(found, model(tokens, bounds(len(tokens)))) < FLOAT32


@torch.no_grad()
def test_trig_attention_keeps_proteins_apart_too():
    # Its renormaliser is a sum of signed terms: rounding before it is amplified, more than for other maps.
    model = build(attention="trig", max_temperature=0.5, num_features=256)
    members = proteins(*SIZES)
    packed = model(torch.cat(members), bounds(*SIZES)).split(SIZES)
    for tokens, found in zip(members, packed, strict=True):
        assert relative_error(found, model(tokens, bounds(len(tokens)))) < 10 * FLOAT32


def test_simplex_rows_are_what_the_configuration_asks_for():
    projection = build(projection="simplex").layers[0].attention.projection
    directions = torch.nn.functional.normalize(projection[:, :16], dim=-1)
    cosines = directions @ directions.transpose(1, 2)
    off_diagonal = cosines[:, ~torch.eye(16, dtype=torch.bool)]
    assert (off_diagonal + 1 / 15).abs().max() < 1e-5


def test_relu_without_a_projection_has_none_in_its_weights(monkeypatch):
    model = build(attention="relu", projection="none")
    assert not ModelConfig(attention="relu", projection="none").has_projection
    assert not any("projection" in name for name in model.state_dict())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.redraw(torch.Generator().manual_seed(1))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    q, k, v, out = attended(model, proteins(30)[0], bounds(30), monkeypatch)
    weights = (q.relu() + 1e-3) @ (k.relu() + 1e-3).transpose(-1, -2)
    assert relative_error(out, weights @ v / weights.sum(-1, keepdim=True)) < FLOAT32
