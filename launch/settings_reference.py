"""Lists of the keys of a job, made from its settings class: text for `--help`, Markdown for docs/settings.md."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import TypeAdapter

from clt.config_keys import ConfigKey, ConfigSection, alternatives, item_type, keys_of, own_keys, sections

_WIDTH = 100
_NAMES = {int: "integer", float: "number", str: "text", bool: "true or false"}
_LIMITS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<=", "min_length": "of length >="}


def keys_text(settings: type[Any]) -> str:
    """All keys of a settings class: a line with name, type and default, then what it means."""
    lines = []
    for key in keys_of(settings):
        lines.append(f"  {key.name}  ({type_text(key)}{_default_suffix(key)})")
        indent = " " * 6
        lines += textwrap.wrap(
            key.description, _WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
        )
    return "\n".join(lines)


def keys_markdown(title: str, settings: type[Any], seen: dict[type[Any], str]) -> str:
    """The keys of a job as Markdown, a table for each settings class.

    Args:
        title: name of the job, a heading.
        settings: its settings class.
        seen: heading under which each nested class is listed already; gets those that are listed here.

    Returns:
        The section; a nested class that is listed elsewhere is a link.
    """
    return "\n".join(_tables(title, title, ConfigSection(prefix="", cls=settings, defaults=None), seen))


def type_text(key: ConfigKey) -> str:
    """Type and limits of a key in words."""
    return _type_name(key.annotation, key.field.metadata)


def default_text(key: ConfigKey) -> str | None:
    """Default of a key as one would write it; None where a value must be given or its own keys have the defaults."""
    if key.required or isinstance(key.default, sections(key.annotation)):
        return None
    plain = TypeAdapter(key.annotation).dump_python(key.default, mode="json")
    return plain if isinstance(plain, str) else json.dumps(plain)


def _default_suffix(key: ConfigKey) -> str:
    default = default_text(key)
    if default is not None:
        return f", default: {default}"
    return ", required" if key.required else ""


def _tables(title: str, heading: str, section: ConfigSection, seen: dict[type[Any], str]) -> Iterator[str]:
    """Heading and table of a section, then those of the sections in it that have none yet."""
    yield from (f"{'###' if section.prefix else '##'} {heading}", "", " ".join((section.cls.__doc__ or "").split()), "")
    yield from ("| Key | Type | Default | Meaning |", "| --- | --- | --- | --- |")
    new: list[tuple[str, ConfigSection]] = []
    for key in own_keys(section.cls, section.prefix, section.defaults):
        links = []
        for nested in key.nested:
            name = f" {nested.cls.__name__}" if nested.prefix.endswith("[].") else ""
            if nested.cls not in seen:
                seen[nested.cls] = f"{title}: `{nested.prefix[:-1]}`{name}"
                new.append((seen[nested.cls], nested))
            links.append(_link(seen[nested.cls]))
        default = default_text(key)
        cells = (
            f"`{key.name}`",
            type_text(key),
            ("required" if key.required else "") if default is None else f"`{default}`",
            key.description + (f" Keys: {', '.join(links)}." if links else ""),
        )
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
    yield ""
    for name, nested in new:
        yield from _tables(title, name, nested, seen)


def _link(heading: str) -> str:
    """Link to a heading of the same page, by the anchor that GitHub gives it."""
    anchor = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
    return f"[{heading}](#{anchor})"


def _type_name(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """Alternatives of a type, null last, numbers with their limits."""
    if get_origin(annotation) is Annotated:
        annotation, *metadata = get_args(annotation)
    limits = [f"{sign} {getattr(m, name)}" for m in metadata for name, sign in _LIMITS.items() if hasattr(m, name)]
    names: list[str] = []
    for kind in alternatives(annotation):
        if get_origin(kind) is Literal:
            names += [str(value) for value in get_args(kind)]
        elif item_type(kind) is not None:
            names.append(f"list of {_type_name(item_type(kind))}")
        elif kind in _NAMES:
            names.append(" ".join([_NAMES[kind], ", ".join(limits)]).rstrip())
        elif kind is not type(None):
            names.append("section" if sections(kind) else "path")
    if type(None) in alternatives(annotation):
        names.append("null")
    names = list(dict.fromkeys(names))
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
