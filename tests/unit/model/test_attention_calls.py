import pytest
import torch

from protlm.model.attention_calls import visit_attention
from tests.unit.model.small_models import KINDS, SIZES, bounds, build, proteins


@pytest.mark.parametrize("kind", [*KINDS, "trig"])
def test_a_call_repeats_the_attention_of_its_layer(kind):
    model = build(attention=kind)
    inputs, seen = [], []
    for layer in model.layers:
        layer.attention.output.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0]))
    visit_attention(
        model,
        torch.cat(proteins(*SIZES)),
        bounds(*SIZES),
        lambda call: seen.append((call.layer, call.attention.attend(call.q, call.k, call.v, call.segments))),
    )
    assert [layer for layer, _ in seen] == [1, 2]
    for (_, out), joined in zip(seen, inputs, strict=True):
        assert torch.equal(out.flatten(1), joined)


def test_only_oprf_has_an_a_and_causal_models_take_it_from_the_temperature():
    for options in ({"attention": "oprf"}, {"attention": "oprf", "causal": True}, {"attention": "positive"}):
        model, seen = build(**options), []
        visit_attention(
            model,
            torch.cat(proteins(*SIZES)),
            bounds(*SIZES),
            lambda call, seen=seen: seen.append(call.attention.oprf_a(call.q, call.k, call.segments)),
        )
        if options["attention"] == "positive":
            assert seen == [None, None]
            continue
        assert seen[0].shape == (len(SIZES), 2)
        assert bool((seen[0] < 0).all())
        assert bool((seen[0] == seen[0][:1]).all()) == options.get("causal", False)
