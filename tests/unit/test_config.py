import os
import re
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protlm.config import Config, DataConfig, ModelConfig, TrainConfig
from protlm.config_files import check_keys, dump_config, load_config, parse_config, shipped_configs
from protlm.errors import ConfigError


@pytest.fixture
def write(tmp_path):
    def write_text(text):
        path = tmp_path / "my.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write_text


def test_without_file_and_overrides_the_defaults_hold():
    assert load_config() == Config() == Config(data=DataConfig(), model=ModelConfig(), train=TrainConfig())


def test_overrides_beat_the_file_which_beats_the_defaults(write):
    path = write("[train]\nlr = 0.5\nmax_steps = 7\n[model]\nconv_width = 5\n")
    config = load_config(path, ["train.max_steps=9", "model.attention=relu", "train.max_steps=10"])
    assert (config.train.lr, config.train.max_steps, config.model.conv_width) == (0.5, 10, 5)
    assert config.model.attention == ("relu",)
    assert config.data == DataConfig()


@pytest.mark.parametrize("text", ["local,positive", " local, positive ", '["local", "positive"]'])
def test_kinds_of_attention_are_words_by_comma_or_a_list(text):
    model = load_config(None, [f"model.attention={text}", "model.num_layers=3"]).model
    assert model.kinds == ("local", "positive", "local")
    assert model.attention_name == "local,positive"


def test_equal_kinds_are_one_kind():
    assert load_config(None, ["model.attention=softmax,softmax"]) == load_config(None, ["model.attention=softmax"])


def test_override_values_are_toml_or_bare_words():
    overrides = [
        "train.lr=1e-3",
        "model.qk_norm=false",
        "train.betas=[0.8, 0.9]",
        'train.optimizer = "adamw"',
        "model.projection= iid ",
        "train.weight_decay=0",
    ]
    config = load_config(None, overrides)
    assert (config.train.lr, config.train.betas, config.train.optimizer) == (1e-3, (0.8, 0.9), "adamw")
    assert (config.model.qk_norm, config.model.projection, config.train.weight_decay) == (False, "iid", 0)


def test_a_shipped_configuration_is_found_by_name():
    assert "tiny" in shipped_configs()
    assert load_config("tiny").train.optimizer == "muon"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[trian]\nlr = 1.0", "trian: unknown key; known are data, model, train"),
        ("[train]\nlearning_rate = 1.0", "train.learning_rate: unknown key; known are seed, max_steps"),
        ("[data]\nmax_len = 1", "data.max_len: unknown key; known are tokens_per_batch, max_length"),
        ("train = 3", "train: input should be"),
        ('[train]\nlr = "1"', "train.lr: input should be a valid number, got '1'"),
        ("[train]\nlr = 0.0", "train.lr: input should be greater than 0, got 0.0"),
        ("[train]\nlr = inf", "train.lr: input should be a finite number, got inf"),
        ("[train]\nlr = nan", "train.lr: input should be"),
        ("[train]\nmax_steps = 1.5", "train.max_steps: input should be a valid integer, got 1.5"),
        ("[train]\nmax_steps = true", "train.max_steps: input should be a valid integer, got True"),
        ("[train]\nmask_rate = 0.0", "train.mask_rate: input should be greater than 0"),
        ("[train]\nmask_rate = 1.01", "train.mask_rate: input should be less than or equal to 1"),
        ("[train]\nbetas = [0.9]", "train.betas"),
        ("[model]\nattention = 'linear'", "model.attention.0: input should be 'positive', 'hyperbolic', "),
        ("[model]\nattention = []", "model.attention: expected at least one kind, got none"),
        ("[model]\nattention = ['local', 'loca']", "model.attention.1: input should be 'positive', 'hyperbolic', "),
        ("[model]\nlocal_window = 0", "model.local_window: input should be greater than 0"),
        (
            "[model]\nattention = 'oprf'\nprojection = 'none'",
            "model.projection: expected a random matrix for attention = 'oprf', got 'none'",
        ),
        ("[model]\nqk_norm = 1", "model.qk_norm: input should be a valid boolean, got 1"),
        ("[model]\nconv_width = 4", "model.conv_width: expected 0 or an odd number, got 4"),
        ("[model]\nmodel_dim = 30", "model.model_dim: expected an even multiple of num_heads = 4, got 30"),
        ("[model]\nmodel_dim = 12", "model.model_dim: expected an even multiple of num_heads = 4, got 12"),
        ("[data]\ntokens_per_batch = 2", "data.tokens_per_batch: expected at least 3, got 2"),
        (
            "[data]\ntokens_per_batch = 100\nmax_length = 99",
            "data.max_length: expected at most tokens_per_batch - 2 = 98, got 99",
        ),
        (
            "[model]\npositions = 'learned'\n[data]\nmode = 'concatenated'\ntokens_per_batch = 8192",
            "model.max_positions: expected at least 8192, the most tokens that training looks at together, got 1024; "
            "raise it or lower data.window_tokens",
        ),
        (
            "[data]\nmode = 'concatenated'\ntokens_per_batch = 100\nwindow_tokens = 101",
            "data.window_tokens: expected more than 2 and at most tokens_per_batch = 100, got 101",
        ),
        ("[data]\nweights = [1.0, 0.0]", "data.weights.1: input should be greater than 0, got 0.0"),
        (
            "[model]\npositions = 'learned'\nmax_positions = 100\n[data]\nmax_length = 99",
            "model.max_positions: expected at least 101, the most tokens that training looks at together, got 100",
        ),
        ("[model]\ncausal = true\nrescale_qk = true", "model.rescale_qk: expected false with causal = true"),
        (
            "[model]\ncausal = true\nattention = 'oprf'\nqk_norm = false",
            "model.qk_norm: expected true with causal oprf",
        ),
        (
            "[train]\nmask_share = 0.8\nrandom_share = 0.3",
            "train.random_share: expected at most 1 - mask_share = 0.2, got 0.3",
        ),
        ("[data\n", "not a TOML file"),
        (b"\xff", "not a TOML file"),
    ],
)
def test_a_bad_setting_is_one_line_that_names_file_and_key(write, text, message):
    path = write(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}: {message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("override", ["train.lr=1e-3\nmax_steps=3", "train.lr=[1]\n[a]"])
def test_an_override_is_one_value(override):
    with pytest.raises(ConfigError, match=re.escape("--set train.lr: expected one value")):
        load_config(None, [override])


@pytest.mark.parametrize("override", ["train.lr", "lr=1", "=1", "train.=1", ".lr=1", "", "train=1"])
def test_an_override_of_another_form_is_an_error_that_shows_the_form(override):
    with pytest.raises(ConfigError, match=re.escape(f"--set {override}: expected SECTION.KEY=VALUE")):
        load_config(None, [override])


def test_an_override_of_something_else_than_a_section_is_an_error(write):
    with pytest.raises(ConfigError, match=r"--set train\.lr=1: train is not a section"):
        load_config(write("train = 3"), ["train.lr=1"])


@pytest.mark.parametrize("override", ["train.learning_rate=1", "trian.lr=1"])
def test_an_override_of_an_unknown_key_is_an_error(override):
    with pytest.raises(ConfigError, match=r"^settings with --set: .*unknown key; known are"):
        load_config(None, [override])


def test_files_and_names_that_are_not_there_are_errors(tmp_path):
    with pytest.raises(ConfigError, match=r"no such configuration; there are .*tiny"):
        load_config("huge")
    with pytest.raises(ConfigError, match="No such file"):
        load_config(tmp_path / "absent.toml")
    with pytest.raises(ConfigError, match="Is a directory"):
        load_config(str(tmp_path) + "/")


def test_settings_cannot_be_changed_afterwards():
    with pytest.raises(ValueError, match="frozen"):
        Config().train.lr = 1.0


def test_the_window_is_what_fits_into_a_row_unless_it_is_set():
    assert DataConfig(tokens_per_batch=100).window == 98
    assert DataConfig(tokens_per_batch=100, max_length=98).window == 98
    assert DataConfig(tokens_per_batch=100, max_length=10).window == 10


@settings(deadline=None, max_examples=30)
@given(
    st.floats(min_value=1e-300, max_value=1e30),
    st.integers(1, 10**12),
    st.none() | st.integers(1, 50),
    st.sampled_from(["adamw", "muon"]),
    st.tuples(st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True)),
)
def test_written_settings_read_back_equal(lr, max_steps, max_length, optimizer, betas):
    config = Config(
        data=DataConfig(max_length=max_length),
        model=ModelConfig(num_heads=2, conv_width=0, qk_norm=False),
        train=TrainConfig(lr=lr, max_steps=max_steps, optimizer=optimizer, betas=betas),
    )
    text = dump_config(config)
    assert "\nmax_steps = " in text, "resolved settings name defaults too"
    with TemporaryDirectory() as folder:
        path = Path(folder) / "config.toml"
        path.write_text(text, encoding="utf-8")
        assert load_config(path) == config


@pytest.mark.parametrize("override", ["train.b.c=1", "train.lr.b=1", "model.x.y.z=1"])
def test_a_key_nested_too_deep_is_an_error(override):
    with pytest.raises(ConfigError):
        load_config(None, [override])


def test_a_quoted_key_with_a_dot_is_an_error(write):
    with pytest.raises(ConfigError, match="unknown key"):
        load_config(write('[train]\n"a.b" = 1\n'))


def test_a_seed_that_no_generator_takes_is_an_error():
    assert load_config(None, [f"train.seed={2**63 - 1}"]).train.seed == 2**63 - 1
    with pytest.raises(ConfigError, match=r"train\.seed"):
        load_config(None, [f"train.seed={2**63}"])


def test_the_defaults_are_those_of_the_tiny_configuration():
    assert load_config() == load_config("tiny")


def test_the_longest_segment_is_a_protein_with_its_ends_or_a_window():
    assert DataConfig(tokens_per_batch=100).longest_segment == 100
    assert DataConfig(tokens_per_batch=100, max_length=10, mode="clipped").longest_segment == 12
    assert DataConfig(tokens_per_batch=100, window_tokens=50, mode="concatenated").longest_segment == 50


def test_shares_that_add_up_to_one_as_people_write_them_are_taken():
    for mask_share, random_share in ((0.1, 0.9), (0.8, 0.2), (0.9, 0.1), (0.7, 0.3)):
        assert TrainConfig(mask_share=mask_share, random_share=random_share).random_share == random_share


@pytest.mark.parametrize("section", [DataConfig, ModelConfig, TrainConfig])
def test_every_number_has_an_upper_bound(section):
    for key, schema in section.model_json_schema()["properties"].items():
        for kind in schema.get("anyOf", [schema]):
            numbers = kind.get("prefixItems", [kind]) if kind.get("type") == "array" else [kind]
            if key == "weights":
                numbers = [kind["items"]]
            for number in numbers:
                if number.get("type") in ("integer", "number"):
                    assert {"maximum", "exclusiveMaximum"} & number.keys(), key


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.num_layers=10000000", "model.num_layers: input should be less than or equal to 1024, got 10000000"),
        (f"model.num_layers=0x{'f' * 900}", "model.num_layers: input should be less than or equal to 1024, got "),
        ("data.tokens_per_batch=16777217", "data.tokens_per_batch: input should be less than or equal to 16777216"),
        ("train.lr=1e300", "train.lr: input should be less than or equal to 10{30}, got 1e\\+300"),
        (f"train.lr={'9' * 900}", "train.lr: input should be a valid number, got|train.lr: input should be less"),
        (f"train.lr={'[' * 900}", "train.lr: input should be a valid number, got"),
        (f"train.lr={'{a=' * 300}", "train.lr: input should be a valid number, got"),
        (f"model.{'a.' * 450}b=1", "model.a.a.a"),
    ],
)
def test_an_absurd_override_is_one_short_line(override, message):
    with pytest.raises(ConfigError, match=rf"^settings with --set: {message}") as caught:
        load_config(None, [override])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


def test_an_override_that_is_too_long_is_refused_before_it_is_read():
    with pytest.raises(ConfigError, match=r"^--set train\.lr=1{31}…: expected at most 1,000 letters, got 5,009$"):
        load_config(None, [f"train.lr={'1' * 5000}"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[train]\nlr = " + "[\n" * 5000, "not a TOML file: nested too deep"),
        ("[train]\nlr = " + "1" * 5000, "not a TOML file: expected lines of at most 1,000 letters, got one of 5,005"),
        # Python's parser takes the square of the number of dots in time and memory.
        ("a." * 30_000 + "a = 1", "not a TOML file: expected lines of at most 1,000 letters, got one of 60,005"),
        ("# x\n" * 20_000, "expected at most 65,536 bytes, got 80,000"),
        ("\n".join(f"a{number}.{'a.' * 400} = 1" for number in range(80)), "not a TOML file"),
        ("\n".join(f"{'a.' * 400}a{number} = 1" for number in range(80)), "a: unknown key; known are"),
    ],
    ids=["brackets", "digits", "dots", "bytes", "bad keys", "nested tables"],
)
def test_a_file_that_would_take_for_ever_is_refused(write, text, message):
    path = write(text)
    with pytest.raises(ConfigError, match=f"^{re.escape(f'{path}: {message}')}"):
        load_config(path)


def test_a_value_that_cannot_be_shown_is_not_shown():
    nested = []
    for _ in range(100_000):
        nested = [nested]
    for value in (nested, 1 << 100_000):
        with pytest.raises(ConfigError, match=r"^here: train\.lr: .*, got one too large to be shown$"):
            parse_config({"train": {"lr": value}}, "here")


def test_pipes_devices_and_loops_in_place_of_a_file_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.toml")
    (tmp_path / "zeros.toml").symlink_to("/dev/zero")
    (tmp_path / "loop.toml").symlink_to("loop.toml")
    for name in ("pipe.toml", "zeros.toml", "loop.toml"):
        with pytest.raises(ConfigError, match=r"expected a regular file|Too many levels"):
            load_config(tmp_path / name)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lrr=1", "settings with --set: train.lrr: unknown key; known are seed, "),
        ("tain.lr=1", "settings with --set: tain: unknown key; known are data, model, train"),
        ("train.lr", "expected SECTION.KEY=VALUE"),
    ],
)
def test_keys_are_checked_where_values_cannot_be_yet(override, message):
    check_keys(["train.lr=nonsense", "model.num_heads=7"])
    with pytest.raises(ConfigError) as caught:
        check_keys(["train.lr=1", override])
    assert message in str(caught.value)
