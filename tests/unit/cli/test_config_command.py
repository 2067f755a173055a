import json
import tomllib

import pytest

from protlm.cli.app import main
from protlm.config import Config
from protlm.config_files import load_config, shipped_configs


def printed(capsys, *arguments):
    assert main(["config", *map(str, arguments)]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", shipped_configs())
def test_a_printed_configuration_reads_back_to_itself(name, capsys, tmp_path):
    path = tmp_path / "my.toml"
    path.write_text(printed(capsys, name), encoding="utf-8")
    assert load_config(path) == load_config(name)
    # A file is printed like a shipped configuration, but for the line that names the configuration.
    assert path.read_text().endswith(printed(capsys, path))


@pytest.mark.parametrize("name", shipped_configs())
def test_every_setting_and_section_has_its_meaning_as_its_comment(name, capsys):
    text = printed(capsys, name)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    keys = {}
    for section, model in load_config(name):
        keys |= {f"[{section}]": f"[{section}]"}
        keys |= {
            key: f"{key} = " if getattr(model, key) is not None else f"# {key} is not set"
            for key in type(model).model_fields
        }
    for key, start in keys.items():
        (number,) = [number for number, line in enumerate(lines) if line.startswith(start)]
        assert lines[number - 1].startswith("# "), key


def test_every_setting_is_documented_where_it_is_defined():
    for section in Config.model_fields.values():
        assert section.annotation.__doc__
        for name, field in section.annotation.model_fields.items():
            assert field.description, name


def test_tiny_is_printed_by_default(capsys):
    assert printed(capsys) == printed(capsys, "tiny")


def test_the_list_has_a_line_for_each_shipped_configuration(capsys):
    lines = printed(capsys, "--list").splitlines()
    assert [line.split()[0] for line in lines] == shipped_configs()
    assert all("million parameters" in line and len(line) <= 120 for line in lines)
    assert list(json.loads(printed(capsys, "--list", "--json"))) == shipped_configs()


def test_a_name_beside_the_list_is_wrong_usage(capsys):
    assert main(["config", "small", "--list"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "--list: lists all configurations, so it takes no name; got 'small'" in captured.err


def test_json_has_the_settings_by_section(capsys):
    config = json.loads(printed(capsys, "base", "--json"))
    assert list(config) == ["data", "model", "train"]
    assert config["train"]["betas"] == [0.9, 0.98]
    assert config["train"]["schedule_steps"] is None
    assert config["model"] == tomllib.loads(printed(capsys, "base"))["model"]


def test_an_unknown_name_is_one_line_with_the_names_there_are(capsys):
    assert main(["config", "huge"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("error: huge: no such configuration; there are base, ")
