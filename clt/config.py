"""Configuration: frozen dataclasses validated by pydantic, read from YAML and from dotted `key=value` overrides.

One file describes one job. Settings classes live near the code that reads them: those of the transcoder in
`clt.transcoder.architecture`, those of its training in `clt.training.settings`; docs/settings.md lists all keys. An
unknown key, a wrong type or a value out of range is a `ConfigError` that names the dotted key.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, TypeVar

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from clt.config_keys import alternatives, find_key, item_type, nearest_key, sections
from clt.errors import ConfigError

log = logging.getLogger(__name__)

T = TypeVar("T")

#: Configuration of every settings class: an unknown key is an error, instances are values.
STRICT = ConfigDict(extra="forbid")

#: Earlier names of files in configs/train.
_RENAMED_FILES = {
    "seed.yaml": "vlm_clt_training.yaml",
    "seed_independent.yaml": "vlm_clt_training_independent.yaml",
}


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a key that is given twice is an error, not the last value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        if twice := [name for name in names if names.count(name) > 1]:
            raise yaml.MarkedYAMLError(problem=f"the key '{twice[0]}' is given twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def load_config(cls: type[T], path: Path | str | None, overrides: Sequence[str] = ()) -> T:
    """Reads a YAML file into a settings class and applies dotted overrides.

    Args:
        cls: a pydantic dataclass.
        path: YAML file; None: all values come from `overrides` and the defaults of `cls`.
        overrides: strings `a.b=value`. The text is the value itself where the key's type is a string or a path (`null`
            is None if the key may be None); items separated by commas, or a YAML list, where it is a list; YAML
            elsewhere.

    Returns:
        A validated instance of `cls`.

    Raises:
        ConfigError: the file cannot be read, a key is unknown, or a value is not valid; names the dotted key.
    """
    tree = {} if path is None else _read_tree(Path(path))
    for override in overrides:
        _apply(cls, tree, override)
    overridden = [override.partition("=")[0] for override in overrides]
    return parse_config(cls, tree, "command line" if path is None else str(path), overridden)


def parse_config(cls: type[T], tree: Mapping[str, Any], source: str, overridden: Sequence[str] = ()) -> T:
    """Validates a tree of plain values against a settings class.

    Args:
        cls: a pydantic dataclass.
        tree: nested mappings, as YAML or JSON give them.
        source: file name for the error message.
        overridden: keys whose values come from the command line instead.

    Returns:
        A validated instance of `cls`.

    Raises:
        ConfigError: a key is unknown or a value is not valid; names the dotted key.
    """
    try:
        return TypeAdapter(cls).validate_python(tree)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        if any(key == name or key.startswith(f"{name}.") for name in overridden):
            source = "command line"
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            raise ConfigError(f"{source}: {_unknown(cls, key)}{more}") from None
        missing = [".".join(map(str, item["loc"])) for item in error.errors() if item["type"] == "missing"]
        if first["type"] == "missing":
            raise ConfigError(f"{source}: missing {', '.join(missing)}; set a value") from None
        given = "" if isinstance(first["input"], Mapping) else f", got {first['input']!r}"
        place = f"{key}: " if key else ""
        raise ConfigError(f"{source}: {place}{first['msg'].removeprefix('Value error, ')}{given}{more}") from None


def config_to_tree(config: Any) -> dict[str, Any]:
    """A settings object as nested plain values, ready for YAML or JSON."""
    return TypeAdapter(type(config)).dump_python(config, mode="json")


def config_to_yaml(config: Any) -> str:
    """A settings object as YAML text, every default written out."""
    return yaml.safe_dump(config_to_tree(config), sort_keys=False)


def _read_tree(path: Path) -> dict[str, Any]:
    renamed = path.parent / _RENAMED_FILES.get(path.name, path.name)
    if renamed != path and renamed.exists() and not path.exists():
        log.warning("%s is deprecated and will be removed; use its new name %s", path, renamed)
        path = renamed
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder; give a YAML file") from None
    # ValueError: text that looks like a date and is none.
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: not a readable YAML file ({_one_line(error)})") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected keys at the top level, found {type(tree).__name__}")
    return tree


def _apply(cls: type[Any], tree: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise ConfigError(f"override '{override}': expected key=value")
    key = find_key(cls, name)
    if key is None:
        raise ConfigError(f"command line: {_unknown(cls, name)}")
    try:
        value = _parse_value(key.annotation, text)
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"override '{override}': the value cannot be read ({_one_line(error)})") from None
    *parents, leaf = name.split(".")
    node = tree
    for parent in parents:
        child = {} if node.get(parent) is None else node[parent]
        if not isinstance(child, dict):
            raise ConfigError(f"override '{override}': '{parent}' has the value {child!r} and no keys; remove it first")
        node[parent] = node = child
    node[leaf] = value


def _parse_value(annotation: Any, text: str) -> Any:
    """Text of the command line as a value of that type; validation follows later."""
    kinds, item = alternatives(annotation), item_type(annotation)
    if item is not None and not sections(item) and not text.lstrip().startswith("["):
        if text == "null" and type(None) in kinds:
            return None
        parts = [part.strip() for part in text.split(",")] if text else []
        if not all(parts):
            raise ValueError("an item of the list is empty")
        return [_parse_value(item, part) for part in parts]
    if not any(isinstance(kind, type) and issubclass(kind, (str, PurePath)) for kind in kinds):
        return yaml.safe_load(text)
    # A key that also takes another type than text gets it where the text reads as that type.
    try:
        value = yaml.safe_load(text)
        fits = value is not None or text == "null"
        return value if fits and not isinstance(value, str) and _accepts(annotation, value) else text
    except (ValueError, yaml.YAMLError):
        return text


def _accepts(annotation: Any, value: Any) -> bool:
    try:
        TypeAdapter(annotation).validate_python(value)
    except ValidationError:
        return False
    return True


def _unknown(cls: type[Any], name: str) -> str:
    near = nearest_key(cls, name)
    remedy = f"did you mean '{near}'?" if near else "remove it or correct its spelling"
    return f"unknown key '{name}'; {remedy}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
