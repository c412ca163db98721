"""Keys of a settings class: name, type, default and description of every field, those of nested classes included."""

from __future__ import annotations

import ast
import difflib
import inspect
import itertools
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from functools import cache
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic.fields import FieldInfo


@dataclass(frozen=True, kw_only=True)
class ConfigSection:
    """A settings class nested in a key.

    Attributes:
        prefix: of the names of its keys, with the dot.
        cls: the class.
        defaults: instance with the defaults of its keys; None: the class's own.
    """

    prefix: str
    cls: type[Any]
    defaults: Any


@dataclass(frozen=True, kw_only=True)
class ConfigKey:
    """One field of a settings class, reached from the class of a job.

    Attributes:
        name: dotted path; `[]` is an item of a list.
        owner: the class that has the field.
        field: type, limits and default, from pydantic.
        default: value if none is given; None where one must be.
        required: whether a value must be given.
    """

    name: str
    owner: type[Any]
    field: FieldInfo
    default: Any
    required: bool

    @property
    def annotation(self) -> Any:
        """Type of the value."""
        return self.field.annotation

    @property
    def description(self) -> str:
        """Sentence below the field in the source, empty without one."""
        descriptions = field_descriptions(self.owner)  # type: ignore[arg-type]  # mypy holds type[Any] not hashable
        return descriptions.get(self.name.rpartition(".")[2], "")

    @property
    def nested(self) -> tuple[ConfigSection, ...]:
        """Settings classes that the value may be, or its items if it is a list."""
        name, default = self.name, self.default
        values = sections(self.annotation)
        items = sections(item_type(self.annotation))
        return tuple(
            [
                ConfigSection(prefix=f"{name}.", cls=c, defaults=default if isinstance(default, c) else None)
                for c in values
            ]
            + [ConfigSection(prefix=f"{name}[].", cls=c, defaults=None) for c in items]
        )


def own_keys(cls: type[Any], prefix: str = "", defaults: Any = None) -> Iterator[ConfigKey]:
    """The fields of a settings class, without those of nested classes.

    Args:
        cls: a pydantic dataclass.
        prefix: put before each name, with its dot.
        defaults: instance whose values are the defaults, instead of the class's own.

    Returns:
        The keys in the order of the source, inherited ones first.
    """
    for name, field in cls.__pydantic_fields__.items():
        required = defaults is None and field.is_required()
        default = getattr(defaults, name, None if required else field.get_default())
        yield ConfigKey(name=prefix + name, owner=cls, field=field, default=default, required=required)


def keys_of(cls: type[Any], prefix: str = "", defaults: Any = None) -> Iterator[ConfigKey]:
    """All keys of a settings class, each followed by those nested in it; for the arguments see `own_keys`."""
    for key in own_keys(cls, prefix, defaults):
        yield key
        for section in key.nested:
            yield from keys_of(section.cls, section.prefix, section.defaults)


def find_key(cls: type[Any], name: str) -> ConfigKey | None:
    """The key of that dotted name, None if there is none."""
    return next((key for key in keys_of(cls) if key.name == name), None)


def nearest_key(cls: type[Any], name: str) -> str | None:
    """The key that a misspelt or incomplete name may mean: the same last part elsewhere, or similar spelling."""
    names = [key.name for key in keys_of(cls)]
    leaf = name.rpartition(".")[2]
    same_leaf = [known for known in names if known.rpartition(".")[2] == leaf]
    return next(iter(difflib.get_close_matches(name, same_leaf or names, n=1, cutoff=0 if same_leaf else 0.6)), None)


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """Types of a union, or the type itself, without `Annotated`."""
    if get_origin(annotation) is Annotated:
        return alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(itertools.chain.from_iterable(map(alternatives, get_args(annotation))))
    return (annotation,)


def sections(annotation: Any) -> tuple[type[Any], ...]:
    """Settings classes that a type admits."""
    return tuple(kind for kind in alternatives(annotation) if isinstance(kind, type) and is_dataclass(kind))


def item_type(annotation: Any) -> Any:
    """Type of the items of a list or tuple, None for other types."""
    for kind in alternatives(annotation):
        if get_origin(kind) in (tuple, list):
            return get_args(kind)[0]
    return None


@cache
def field_descriptions(cls: type[Any]) -> Mapping[str, str]:
    """Docstrings below the fields of a class and of the classes that it inherits from."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        (definition,) = ast.parse(inspect.cleandoc(inspect.getsource(base))).body
        assert isinstance(definition, ast.ClassDef)
        for field, text in itertools.pairwise(definition.body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                found[ast.unparse(field.target)] = " ".join(str(text.value.value).split())
    return found
