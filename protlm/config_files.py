"""Settings as TOML: read from defaults < file < `--set a.b=c`, and written with the meaning of each."""

import textwrap
import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError

from protlm import files
from protlm.config import Config
from protlm.errors import ConfigError, first_fault

_MOST_FILE_BYTES = 1 << 16
_LONGEST_LINE = 1000
"""Letters of a line of TOML: a key of n dots costs n² time and memory."""

_COMMENT_COLUMNS = 100


def shipped_configs() -> list[str]:
    """Returns the names of the configurations that come with protlm."""
    names = (file.name for file in _config_folder().iterdir())
    return sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml"))


def shipped_summaries() -> dict[str, str]:
    """Returns the first comment line of each configuration that comes with protlm, by its name."""
    texts = {name: (_config_folder() / f"{name}.toml").read_text(encoding="utf-8") for name in shipped_configs()}
    return {name: text.partition("\n")[0].removeprefix("# ") for name, text in texts.items()}


def load_config(
    name_or_file: str | Path | None = None,
    overrides: Sequence[str] = (),
    *,
    instead_of_file: Mapping[str, Mapping[str, Any]] | None = None,
    missing: Mapping[str, Mapping[str, Any]] | None = None,
) -> Config:
    """Returns the settings from defaults, then a file, then overrides.

    Args:
        name_or_file: The name of a shipped configuration, or a path of a TOML file (anything with a `/` or `.toml`).
        instead_of_file: Settings by section, where there is no file.
        missing: Settings by section that stand before the defaults, where the file has none.
        overrides: Texts `section.key=value`, the value written as in TOML; a bare word is taken as a string.

    Raises:
        ConfigError: A missing file, bad TOML, an unknown key or a value out of range.
    """
    settings, source = _read_settings(name_or_file)
    if name_or_file is None and instead_of_file is not None:
        settings = {name: dict(section) for name, section in instead_of_file.items()}
    for name, section in (missing or {}).items():
        if isinstance(settings.setdefault(name, {}), dict):
            settings[name] = {**section, **settings[name]}
    for override in overrides:
        _apply_override(settings, override)
        source = f"{source} with --set" if "--set" not in source else source
    return parse_config(settings, source)


def check_keys(overrides: Sequence[str]) -> None:
    """Checks that overrides name settings, where their values cannot be checked yet.

    Raises:
        ConfigError: One is no `section.key=value`, or names an unknown key.
    """
    for override in overrides:
        settings: dict[str, Any] = {}
        _apply_override(settings, override)
        ((section, values),) = settings.items()
        for place in (section, *(f"{section}.{key}" for key in values)):
            if place.rpartition(".")[2] not in _fields_beside(place):
                raise ConfigError(f"settings with --set: {_unknown_key(place)}")


def parse_config(settings: dict[str, Any], source: str) -> Config:
    """Returns checked settings; an error begins with `source`, the place they came from.

    Raises:
        ConfigError: An unknown key or a value out of range.
    """
    try:
        return Config.model_validate(_lists_to_tuples(settings))
    except ValidationError as error:
        raise ConfigError(f"{source}: {_explain(error)}") from None


def dump_config(config: Config) -> str:
    """Returns the settings as TOML text that `load_config` reads back to an equal object."""
    return tomli_w.dumps(config.model_dump(exclude_none=True))


def explain_config(config: Config) -> str:
    """Returns the settings as TOML text like `dump_config`, with the meaning of each as its comment.

    A setting without a value, which TOML cannot express, is commented out.
    """
    sections = []
    for name, section in config:
        blocks = []
        for key, field in type(section).model_fields.items():
            value = getattr(section, key)
            line = f"# {key} is not set" if value is None else f"{key} = {_toml_value(value)}"
            blocks.append(f"{_comment(field.description or '')}\n{line}\n")
        sections.append(f"{_comment(type(section).__doc__ or '')}\n[{name}]\n" + "\n".join(blocks))
    return "\n".join(sections)


def _comment(text: str) -> str:
    return "\n".join(f"# {line}" for line in textwrap.wrap(" ".join(text.split()), _COMMENT_COLUMNS - 2))


def _toml_value(value: Any) -> str:
    if isinstance(value, tuple):
        # tomli_w writes each item on a line of its own.
        return f"[{', '.join(map(_toml_value, value))}]"
    return tomli_w.dumps({"value": value}).removeprefix("value = ").rstrip("\n")


def _config_folder() -> Traversable:
    # configs/ is installed as protlm.configs; an editable install finds no package there and leaves it in the checkout.
    try:
        return resources.files("protlm.configs")
    except ModuleNotFoundError:
        return Path(__file__).parents[1] / "configs"


def _read_settings(name_or_file: str | Path | None) -> tuple[dict[str, Any], str]:
    if name_or_file is None:
        return {}, "settings"
    text = str(name_or_file)
    if "/" in text or text.endswith(".toml"):
        source = text
        try:
            content = files.read_regular(text, max_bytes=_MOST_FILE_BYTES)
        except OSError as error:
            raise ConfigError(f"{source}: {error.strerror}") from None
    else:
        source = f"{text}.toml"
        file = _config_folder() / source
        if not file.is_file():
            known = ", ".join(shipped_configs())
            raise ConfigError(f"{text}: no such configuration; there are {known}, or give the path of a TOML file")
        content = file.read_bytes()
    try:
        return _parse_toml(content.decode("utf-8-sig")), source
    except ValueError as error:
        raise ConfigError(f"{source}: not a TOML file: {error}") from None


def _parse_toml(text: str) -> dict[str, Any]:
    """Returns the values of a TOML text.

    Raises:
        ValueError: It is none, or it is nested too deep, or a line or a number is too long.
    """
    if (longest := max(map(len, text.split("\n")))) > _LONGEST_LINE:
        raise ValueError(f"expected lines of at most {_LONGEST_LINE:,} letters, got one of {longest:,}")
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None


def _apply_override(settings: dict[str, Any], override: str) -> None:
    if len(override) > _LONGEST_LINE:
        raise ConfigError(f"--set {override[:40]}…: expected at most {_LONGEST_LINE:,} letters, got {len(override):,}")
    path, equals, text = override.partition("=")
    section, dot, key = path.strip().partition(".")
    if not (equals and dot and section and key):
        raise ConfigError(f"--set {override}: expected SECTION.KEY=VALUE, such as train.max_steps=800")
    try:
        values = _parse_toml(f"value = {text}")
    except ValueError:
        values = {"value": text.strip()}
    if len(values) > 1:
        raise ConfigError(f"--set {section}.{key}: expected one value, got more lines than one")
    if not isinstance(settings.setdefault(section, {}), dict):
        raise ConfigError(f"--set {override}: {section} is not a section")
    settings[section][key] = values["value"]


def _lists_to_tuples(settings: dict[str, Any]) -> dict[str, Any]:
    # TOML knows lists only, and a strict model takes no list for a tuple. Settings lie in sections, and no deeper.
    return {
        name: {key: tuple(value) if isinstance(value, list) else value for key, value in section.items()}
        if isinstance(section, dict)
        else section
        for name, section in settings.items()
    }


def _explain(error: ValidationError) -> str:
    fault = first_fault(error)
    if fault.kind == "extra_forbidden":
        return _unknown_key(fault.place)
    if fault.is_rule:
        # The rule of a section names the key.
        return f"{fault.place}.{fault.message}" if fault.place else fault.message
    return str(fault)


def _fields_beside(place: str) -> list[str]:
    """Returns the keys among which a key is looked for: `section.key` in its section, `section` among the sections."""
    section, dot, _ = place.partition(".")
    return list(Config.model_fields[section].annotation.model_fields if dot else Config.model_fields)  # type: ignore[union-attr]


def _unknown_key(place: str) -> str:
    return f"{place}: unknown key; known are {', '.join(_fields_beside(place))}"
