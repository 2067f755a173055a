"""The list of backends."""

from dataclasses import replace

from protlm.ops import backends, favor, operators
from protlm.ops.feature_maps import DEFINITIONS


def test_backends_are_named_with_what_they_are():
    assert set(backends()) == set(operators.BACKENDS)
    assert "torch" in backends()
    assert all(backends().values())


def test_a_description_names_the_maps_that_a_backend_does_not_compute(monkeypatch):
    for backend in ("cpp", "triton"):
        assert favor._maps_of(backend) == "every feature map but trig"
    assert favor._maps_of("torch") == "every feature map"
    monkeypatch.setitem(DEFINITIONS, "trig", replace(DEFINITIONS["trig"], backends=frozenset(["cpp"])))
    monkeypatch.setitem(DEFINITIONS, "relu", replace(DEFINITIONS["relu"], backends=frozenset(["torch"])))
    assert favor._maps_of("cpp") == "every feature map but relu"
