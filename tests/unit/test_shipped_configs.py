import re
from pathlib import Path

import pytest
import torch

from protlm.config_files import load_config, shipped_configs
from protlm.model.performer import Performer

CONFIGS = Path(__file__).parents[2] / "configs"


def test_the_configurations_of_the_contract_are_shipped():
    assert {"tiny", "small", "base", "paper-trembl-1024", "paper-concat-8192"} <= set(shipped_configs())


@pytest.mark.parametrize("name", shipped_configs())
def test_a_configuration_builds_a_model_of_the_size_that_it_says(name):
    config = load_config(name)
    with torch.device("meta"):
        model = Performer(config.model)
    first_line = (CONFIGS / f"{name}.toml").read_text().splitlines()[0]
    said = float(re.search(r"([\d.]+) million parameters", first_line)[1]) * 1e6
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(said, rel=0.03)


def test_the_papers_models_are_its_own():
    single, joined = load_config("paper-trembl-1024"), load_config("paper-concat-8192")
    assert (single.model.num_layers, single.model.num_heads) == (36, 8)
    assert (single.model.model_dim, single.model.ffn_dim) == (512, 1024)
    assert single.data.longest_segment == 1024
    assert (joined.model.num_layers, joined.model.num_heads) == (6, 8)
    assert (joined.model.model_dim, joined.model.ffn_dim) == (512, 2048)
    assert joined.data.longest_segment == 8192
    for config in (single, joined):
        assert (config.train.lr, config.train.betas, config.train.eps) == (1e-3, (0.9, 0.98), 1e-9)
        assert (config.train.clip_norm, config.train.weight_decay, config.model.dropout) == (0.5, 0.1, 0.1)
        assert (config.train.schedule, config.train.warmup_steps) == ("constant", 0)
        assert (config.model.attention, config.model.num_features) == (("relu",), 256)
