"""The definitions of the feature maps: who reads them, and that a map is refused wherever it is not known.

Under pytest the annotations of public functions are checked first; `inspect.unwrap` gives the functions as a user gets
them.
"""

import importlib.util
import inspect
from dataclasses import replace
from itertools import product
from typing import get_args

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from protlm.choices import EXACT_KINDS, FeatureMap
from protlm.config import ModelConfig
from protlm.inference import approximation, attention_weights, replaced_attention
from protlm.model import health
from protlm.model.performer import Performer
from protlm.ops import (
    compiled,
    draw_projection,
    favor,
    favor_cpp,
    favor_torch,
    favor_triton,
    operators,
    random_features,
    reference,
)
from protlm.ops.feature_maps import DEFINITIONS, MapDefinition, definition_of
from protlm.ops.inputs import AttentionInputs
from protlm.ops.torch_maps import torch_map

MADE_UP = "made-up"
EXPONENTIAL = MapDefinition(
    name=MADE_UP,
    features_per_row=1,
    is_exponential=True,
    norm_exponent=-1,
    estimates="softmax",
    backends=frozenset(),
    formula=None,
)
LINEAR = replace(EXPONENTIAL, needs_projection=False, is_exponential=False, norm_exponent=0, estimates=None)

Q = torch.ones(1, 2, 8, 4)
PROJECTION = torch.ones(2, 6, 4)
PROTEIN = [5, 6, 7]


def made_up_inputs():
    return AttentionInputs(Q, Q, Q, PROJECTION, feature_map=MADE_UP)


def attend(backend):
    return lambda: favor.favor_attention(Q, Q, Q, PROJECTION, feature_map=MADE_UP, backend=backend)


def make_cuda_call():
    from protlm.ops.cuda.call import Call

    Call(made_up_inputs())


def model_with(kind):
    model = Performer(
        ModelConfig(attention="positive", num_layers=1, model_dim=8, num_heads=2, ffn_dim=8, num_features=6)
    )
    model.reset(0)
    model.layers[0].attention.feature_map = kind
    return model


def measure_health():
    health.attention_health(model_with(MADE_UP), torch.tensor(PROTEIN), torch.tensor([0, 3], dtype=torch.int32))


def weigh_keys():
    def weigh(call):
        call.attention.feature_map = MADE_UP
        next(attention_weights.weight_tiles(call, 0))

    attention_weights.visit_protein(model_with("positive"), np.array(PROTEIN, dtype=np.uint8), weigh)


def measure_error():
    approximation.measure_approximation(model_with(MADE_UP), [np.array(PROTEIN, dtype=np.uint8)])


NEEDS_CPP = pytest.mark.skipif(compiled.why_not() is not None, reason="the compiled kernel was not built")
NEEDS_TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
PLACES = {
    "the op": attend("auto"),
    "the op on torch": attend("torch"),
    "the op on cpp": pytest.param(attend("cpp"), marks=NEEDS_CPP),
    "the op on triton": pytest.param(attend("triton"), marks=NEEDS_TRITON),
    "the torch backend": lambda: favor_torch.forward(made_up_inputs()),
    "the compiled backend": pytest.param(lambda: favor_cpp.forward(made_up_inputs()), marks=NEEDS_CPP),
    "a call of CUDA kernels": pytest.param(make_cuda_call, marks=NEEDS_TRITON),
    "the features": lambda: random_features.kernel_features(Q, PROJECTION[0], feature_map=MADE_UP),
    "the twin of the features": lambda: reference.kernel_features(Q, PROJECTION[0], feature_map=MADE_UP),
    "the twin of the op": lambda: reference.favor_attention(Q, Q, Q, PROJECTION, feature_map=MADE_UP),
    "the logarithms of features": lambda: health.log_features(Q, PROJECTION[0], MADE_UP),
    "the health of a model": measure_health,
    "the weights of attention": weigh_keys,
    "the error of attention": measure_error,
}


@pytest.fixture
def _unchecked_annotations(monkeypatch):
    """Makes functions that take the name of a map what they are outside pytest."""
    for module in (favor, random_features, reference, health):
        for name, function in list(vars(module).items()):
            if inspect.isfunction(function) and function.__module__ == module.__name__:
                monkeypatch.setattr(module, name, inspect.unwrap(function))


@pytest.mark.usefixtures("_unchecked_annotations")
@pytest.mark.parametrize("definition", [None, EXPONENTIAL, LINEAR], ids=["undefined", "exponential", "linear"])
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_a_map_is_refused_by_name_where_it_is_not_known(place, definition, monkeypatch):
    if definition is not None:
        monkeypatch.setitem(DEFINITIONS, MADE_UP, definition)
    with pytest.raises(ValueError, match=r"^feature_map: expected .*got 'made-up'$"):
        place()


def test_exact_attention_replaces_maps_whose_definition_says_that_they_estimate_it(monkeypatch):
    with pytest.raises(ValueError, match=r"^feature_map: expected .*got 'made-up'$"):
        replaced_attention.estimates_softmax(model_with(MADE_UP))
    for estimates in ("softmax", "bound", None):
        monkeypatch.setitem(DEFINITIONS, MADE_UP, replace(LINEAR, estimates=estimates))
        assert replaced_attention.estimates_softmax(model_with(MADE_UP)) == (estimates is not None)


@pytest.mark.parametrize("definition", [EXPONENTIAL, LINEAR], ids=["exponential", "linear"])
def test_no_backend_covers_a_map_whose_definition_does_not_list_it(definition, monkeypatch):
    monkeypatch.setattr(favor_triton, "_is_interpreted", lambda: True)
    for listed, covers_cpp, covers_triton in (((), False, False), (("cpp",), True, False), (("triton",), False, True)):
        monkeypatch.setitem(DEFINITIONS, MADE_UP, replace(definition, backends=frozenset(listed)))
        inputs = made_up_inputs()
        assert (favor_cpp.covers(inputs), favor_triton.covers(inputs)) == (covers_cpp, covers_triton)


def test_the_torch_backend_takes_no_linear_map_for_another(monkeypatch):
    monkeypatch.setitem(DEFINITIONS, MADE_UP, replace(LINEAR, backends=frozenset(["torch"])))
    with pytest.raises(ValueError, match=r"^feature_map: expected one of \('trig', 'relu'\), got 'made-up'$"):
        torch_map(made_up_inputs())


def test_every_map_that_users_can_choose_has_its_definition():
    assert tuple(DEFINITIONS) == get_args(FeatureMap)
    assert all(definition_of(name).name == name for name in DEFINITIONS)
    # Twice the same annotation would make two names for a map.
    configured = ModelConfig.model_json_schema()["properties"]["attention"]["items"]["enum"]
    assert configured == [*DEFINITIONS, "near-far", *EXACT_KINDS]


def test_backends_are_those_of_the_op_and_compute_what_they_did():
    backends = {name: set(definition.backends) for name, definition in DEFINITIONS.items()}
    everywhere = frozenset(("torch", "cpp", "triton"))
    assert backends == {**dict.fromkeys(DEFINITIONS, everywhere), "trig": {"torch"}}
    assert set().union(*backends.values()) == set(operators.BACKENDS)


@pytest.mark.parametrize("name", DEFINITIONS)
def test_a_definition_agrees_with_the_features_of_its_formula(name):
    definition = DEFINITIONS[name]
    x = torch.randn(50, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    projection = draw_projection(40, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    a = -0.1 if definition.takes_oprf_a else None
    features = random_features.kernel_features(x, projection, feature_map=name, oprf_a=a)
    assert features.shape[-1] == 40 * definition.features_per_row
    assert bool((features < 0).any()) == definition.is_signed
    scores = torch.linspace(-2, 2, 9).unsqueeze(1)
    if definition.mirrors_rows:
        assert torch.equal(definition.apply(scores), torch.cat((scores, -scores), -1))
    lengths = definition.rescaled(projection).norm(dim=-1)
    assert bool((lengths - 4).abs().max() < 1e-12) == definition.rescales_rows
    assert definition.mirrored(projection).shape[0] == 40 * (2 if definition.mirrors_rows else 1)


def is_valid(**settings):
    try:
        ModelConfig(**settings)
    except ValidationError:
        return False
    return True


def test_a_configuration_refuses_what_the_definitions_rule_out():
    for (name, definition), projection in product(DEFINITIONS.items(), ("orthogonal", "none")):
        assert is_valid(attention=name, projection=projection) == (
            projection == "orthogonal" or not definition.needs_projection
        )
    for (name, definition), qk_norm in product(DEFINITIONS.items(), (True, False)):
        # Causal attention takes the A of a map from the temperature of qk_norm.
        assert is_valid(attention=name, causal=True, qk_norm=qk_norm) == (qk_norm or not definition.takes_oprf_a)
