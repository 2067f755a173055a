import dataclasses
import json

import pytest
import torch

from protlm.inference.metrics import Score
from protlm.inference.replaced_attention import (
    ReplacementScores,
    Spread,
    exact_attention,
    other_draw,
    score_replacements,
    sentence_of,
)
from protlm.model.performer import Performer
from protlm.ops.feature_maps import DEFINITIONS
from tests.conftest import relative_error
from tests.unit.model.small_models import SIZES, bounds, build, proteins

TOKENS, BOUNDS = torch.cat(proteins(*SIZES)), bounds(*SIZES)
ESTIMATES = [name for name in DEFINITIONS if name != "relu"]


@torch.no_grad()
def logits_of(model):
    return model(TOKENS, BOUNDS)


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_untouched(model, state, kind):
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert {layer.attention.kind for layer in model.layers} == {kind}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ESTIMATES)
def test_exact_attention_makes_a_softmax_model_of_the_same_weights(kind, causal):
    model = build(attention=kind, causal=causal)
    softmax = Performer(model.config.model_copy(update={"attention": ("softmax",), "exact_temperature": 0.0})).eval()
    softmax.load_state_dict({name: x for name, x in model.state_dict().items() if "projection" not in name})
    before = logits_of(model)
    with exact_attention(model):
        replaced = logits_of(model)
    assert relative_error(replaced, logits_of(softmax)) < 1e-5
    assert relative_error(replaced, before) > 1e-4
    assert torch.equal(logits_of(model), before)


def test_exact_attention_leaves_exact_layers_as_they_are():
    model = build(num_layers=3, attention=("local", "positive", "near-far"), near_block=4)
    before = logits_of(model)
    with exact_attention(model):
        assert [layer.attention.kind for layer in model.layers] == ["local", "softmax", "softmax"]
        assert relative_error(logits_of(model), before) > 1e-4
    assert [layer.attention.kind for layer in model.layers] == ["local", "positive", "near-far"]
    assert torch.equal(logits_of(model), before)


def test_the_proteins_of_a_row_stay_apart_under_every_replacement():
    model = build()
    for replace in (lambda: exact_attention(model), lambda: other_draw(model, torch.Generator().manual_seed(1))):
        with replace(), torch.no_grad():
            alone = [model(tokens, bounds(len(tokens))) for tokens in proteins(*SIZES)]
            assert relative_error(logits_of(model), torch.cat(alone)) < 1e-5


def test_another_draw_is_that_of_its_generator_in_every_layer_and_head():
    model = build()
    before = state_of(model)
    with other_draw(model, torch.Generator().manual_seed(1)):
        first = [layer.attention.projection.clone() for layer in model.layers]
        assert {layer.attention.kind for layer in model.layers} == {"positive"}
    for layer, projection in enumerate(first):
        saved = before[f"layers.{layer}.attention.projection"]
        assert all(not torch.allclose(projection[head], saved[head]) for head in range(2))
    assert not torch.allclose(first[0], first[1])
    with other_draw(model, torch.Generator().manual_seed(1)):
        assert torch.equal(model.layers[1].attention.projection, first[1])


@pytest.mark.parametrize("kind", ESTIMATES)
def test_everything_is_restored_to_the_bit_even_after_an_error(kind):
    model = build(attention=kind)
    state = state_of(model)
    for replace in (lambda: exact_attention(model), lambda: other_draw(model, torch.Generator().manual_seed(1))):
        with replace():
            logits_of(model)
        assert_untouched(model, state, kind)
        with pytest.raises(RuntimeError, match="stop"), replace():
            raise RuntimeError("stop")
        assert_untouched(model, state, kind)


def test_exact_attention_has_nothing_to_replace():
    model = build(attention="softmax")
    for replace in (exact_attention(model), other_draw(model, torch.Generator())):
        with pytest.raises(ValueError, match="nothing to approximate"), replace:
            pass
    with pytest.raises(ValueError, match="nothing to approximate"):
        score_replacements(model, lambda: Score(accuracy=0.1, perplexity=18.0), Score(accuracy=0.1, perplexity=18.0))


def test_a_kernel_of_its_own_is_not_replaced_by_exact_attention():
    with pytest.raises(ValueError, match="kernel of their own"), exact_attention(build(attention="relu")):
        pass
    no_draws = build(attention="relu", projection="none")
    with pytest.raises(ValueError, match="nothing to draw"), other_draw(no_draws, torch.Generator()):
        pass


def scored(model):
    """Returns a function that scores by the logits, so that any other attention gives another score."""
    return lambda: Score(accuracy=0.5, perplexity=10 + logits_of(model).double().sum().item() % 1)


@pytest.mark.parametrize("attention", ["positive", "relu"])
def test_a_model_is_scored_under_every_replacement_that_means_something(attention):
    model = build(attention=attention)
    state = state_of(model)
    empirical = Score(accuracy=0.1, perplexity=18.0)
    scores = score_replacements(model, scored(model), empirical, num_draws=4, seed=2)
    assert_untouched(model, state, attention)
    assert scores.saved == scored(model)()
    assert scores.empirical == empirical
    assert (scores.exact is None) == (attention == "relu")
    if scores.exact is not None:
        with exact_attention(model):
            assert scores.exact == scored(model)()
    perplexities = torch.tensor([each.perplexity for each in scores.redrawn], dtype=torch.float64)
    assert len(perplexities.unique()) == 4
    assert scores.redrawn_perplexity.mean == pytest.approx(perplexities.mean().item())
    assert scores.redrawn_perplexity.std == pytest.approx(perplexities.std().item())
    assert scores.redrawn_accuracy == Spread(mean=0.5, std=0.0)
    assert scores == score_replacements(model, scored(model), empirical, num_draws=4, seed=2)
    json.dumps(dataclasses.asdict(scores), allow_nan=False)


def test_too_few_draws_have_no_spread():
    with pytest.raises(ValueError, match="num_draws: expected at least 2"):
        score_replacements(build(), scored(build()), Score(accuracy=0.1, perplexity=18.0), num_draws=1)


def scores_of(saved, redrawn, exact):
    def score(perplexity):
        return Score(accuracy=round(1 / perplexity, 3), perplexity=perplexity)

    return ReplacementScores(
        saved=score(saved),
        empirical=score(18.0),
        exact=None if exact is None else score(exact),
        redrawn=[score(redrawn)] * 2,
        redrawn_accuracy=Spread(mean=score(redrawn).accuracy, std=0.0),
        redrawn_perplexity=Spread(mean=redrawn, std=0.0),
    )


@pytest.mark.parametrize(
    ("saved", "redrawn", "exact", "verdict"),
    [
        (6.0, 17.0, 16.0, "no estimate of softmax attention but tied to its draw, and loses 95% of its gain over"),
        (6.0, 40.0, 16.0, "and loses 100% of its gain over the empirical baseline with another one"),
        (6.0, 12.0, 6.1, "works with exact attention, but as an estimate of it is tied to its draw"),
        (6.0, 6.1, 9.0, "does not depend on its draw, but on the kernel"),
        (6.0, 6.1, 5.9, "computes an estimate of softmax attention that is near enough to it"),
        (6.0, 12.0, None, "a kernel of its own, which estimates no softmax attention and is tied to its draw"),
        (6.0, 6.0, None, "a kernel of its own, which estimates no softmax attention and does not depend on its draw"),
        (17.9, 18.0, 18.0, "learned hardly more than the frequencies"),
    ],
)
def test_the_sentence_says_what_the_scores_mean(saved, redrawn, exact, verdict):
    sentence = sentence_of(scores_of(saved, redrawn, exact), redraw_every_steps=0)
    assert verdict in sentence
    assert sentence.startswith("Trained on one draw, this model ")
    assert f"perplexity from {saved:.2f} to {redrawn:.2f} (mean of 2 draws)" in sentence
    assert ("with exact attention to" in sentence) == (exact is not None)
    assert sentence.endswith(".")


def test_the_sentence_tells_a_model_that_was_redrawn():
    sentence = sentence_of(scores_of(12.0, 12.1, 12.0), redraw_every_steps=100)
    assert sentence.startswith("Trained with a new draw every 100 updates, this model computes an estimate")


def test_a_model_without_draws_approximates_nothing():
    scores = dataclasses.replace(scores_of(6.0, 6.0, None), redrawn=[], redrawn_accuracy=None, redrawn_perplexity=None)
    assert "approximates nothing" in sentence_of(scores, redraw_every_steps=0)
