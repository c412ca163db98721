"""Configuration: frozen dataclasses validated by pydantic, read from YAML with dotted `key=value` overrides.

One file describes one job. Dataclasses live near their owner: those of the transcoder in `clt.transcoder.architecture`,
those of its training in `clt.training.settings`. An unknown key, a wrong type or a value out of range is a
`ConfigError` that names the dotted path.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from clt.errors import ConfigError

T = TypeVar("T")

#: Configuration of every settings class: an unknown key is an error, instances are values.
STRICT = ConfigDict(extra="forbid")


def load_config(cls: type[T], path: Path | str, overrides: Sequence[str] = ()) -> T:
    """Reads a YAML file into a settings class and applies dotted overrides.

    Args:
        cls: a pydantic dataclass.
        path: YAML file.
        overrides: strings `a.b=value`; the value is read as YAML.

    Returns:
        A validated instance of `cls`.

    Raises:
        ConfigError: the file cannot be read, a key is unknown, or a value is not valid; names the dotted key.
    """
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: not a readable YAML file ({_one_line(error)})") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected keys at the top level, found {type(tree).__name__}")
    for override in overrides:
        _apply(tree, override)
    return parse_config(cls, tree, source=str(path))


def parse_config(cls: type[T], tree: Mapping[str, Any], source: str) -> T:
    """Validates a tree of plain values against a settings class.

    Args:
        cls: a pydantic dataclass.
        tree: nested mappings, as YAML or JSON give them.
        source: file name for the error message.

    Returns:
        A validated instance of `cls`.

    Raises:
        ConfigError: a key is unknown or a value is not valid; names the dotted key.
    """
    try:
        return TypeAdapter(cls).validate_python(tree)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"]) or "top level"
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            raise ConfigError(f"{source}: unknown key '{key}'; remove it or correct its spelling{more}") from None
        raise ConfigError(f"{source}: {key}: {first['msg']}, got {first['input']!r}{more}") from None


def config_to_tree(config: Any) -> dict[str, Any]:
    """A settings object as nested plain values, ready for YAML or JSON."""
    return TypeAdapter(type(config)).dump_python(config, mode="json")


def config_to_yaml(config: Any) -> str:
    """A settings object as YAML text, every default written out."""
    return yaml.safe_dump(config_to_tree(config), sort_keys=False)


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override '{override}': expected key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override '{override}': the value is not valid YAML ({_one_line(error)})") from None
    *parents, leaf = key.split(".")
    node = tree
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override '{override}': '{parent}' holds a value, not keys")
        node = child
    node[leaf] = value


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
