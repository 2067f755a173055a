import json

import pytest

from protlm.workflows.pages.multiqc import Column, general_statistics

COLUMNS = [
    Column(key="protlm_a", title="A", description="The a"),
    Column(key="protlm_b", title="B", description="The b", format="{:.1f}", suffix=" %", low=0.0, hidden=True),
]


def test_rows_become_general_statistics_with_a_description_of_each_column():
    text = general_statistics("protlm_x", "protlm x", "About x.", COLUMNS, {"one": {"protlm_a": 1, "protlm_b": 0.5}})
    assert text.endswith("}\n")
    content = json.loads(text)
    assert {name: content[name] for name in ("id", "section_name", "description", "plot_type")} == {
        "id": "protlm_x", "section_name": "protlm x", "description": "About x.", "plot_type": "generalstats",
    }  # fmt: skip
    assert content["data"] == {"one": {"protlm_a": 1, "protlm_b": 0.5}}
    first, second = content["pconfig"]
    assert first == {
        "protlm_a": {
            "title": "A", "description": "The a", "namespace": "protlm x", "format": "{:,.0f}", "scale": "Blues",
            "hidden": False,
        }
    }  # fmt: skip
    assert second["protlm_b"]["min"] == 0.0
    assert second["protlm_b"]["suffix"] == " %"


def test_a_value_without_a_column_is_refused():
    with pytest.raises(ValueError, match="one: expected the columns"):
        general_statistics("x", "x", "x", COLUMNS, {"one": {"protlm_c": 1}})
