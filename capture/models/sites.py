"""Names of sites and the modules they belong to; docs/models.md lists the tensor of each."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from clt.capture.models.structure import Block, Structure
from clt.errors import ModelError

#: The kinds of site of a block, in the order of the forward pass.
SiteKind = Literal[
    "resid_pre", "q", "k", "v", "scores", "pattern", "z", "attn_out", "resid_mid", "mlp_in", "mlp_out", "resid_post"
]
#: Position of a site's tensor at a module; "attention": inside its attention function.
End = Literal["input", "output", "attention"]

#: Kind of site -> part of the block and position at it, in the order of the forward pass.
_KINDS: dict[SiteKind, tuple[str, End]] = {
    "resid_pre": ("block", "input"),
    "q": ("attn", "attention"),
    "k": ("attn", "attention"),
    "v": ("attn", "attention"),
    "scores": ("attn", "attention"),
    "pattern": ("attn", "attention"),
    "z": ("attn", "attention"),
    "attn_out": ("attn_out", "output"),
    "resid_mid": ("mlp_norm", "input"),
    "mlp_in": ("mlp", "input"),
    "mlp_out": ("mlp_out", "output"),
    "resid_post": ("block", "output"),
}


def decoder_site(layer: int, kind: SiteKind) -> str:
    """Name of a site of a decoder layer, such as `lm.3.mlp_out`."""
    return f"lm.{layer}.{kind}"


def decoder_sites(layers: Iterable[int], kind: SiteKind) -> list[str]:
    """Names of the sites of one kind of several decoder layers, in their order."""
    return [decoder_site(layer, kind) for layer in layers]


@dataclass(frozen=True, kw_only=True, eq=False)
class Place:
    """Module and position of a site.

    Attributes:
        module: the module whose input, output or attention function holds the tensor.
        end: the chosen end.
    """

    module: nn.Module
    end: End


class Sites:
    """All sites of a model.

    Args:
        structure: parts of the model.
        model_name: for error messages.
    """

    def __init__(self, structure: Structure, model_name: str) -> None:
        places: dict[str, Place] = {}
        for number, block in enumerate(structure.vision_blocks):
            places |= _of_block(f"vision.{number}", block)
        places |= {name: Place(module=bridge, end="output") for name, bridge in structure.bridges.items()}
        places["lm.embed"] = Place(module=structure.layers[0].block, end="input")
        for number, block in enumerate(structure.layers):
            places |= _of_block(f"lm.{number}", block)
        places["lm.final"] = Place(module=structure.final_norm, end="input")
        self._places = places
        n_blocks = len(structure.vision_blocks)
        vision = f" and {n_blocks} vision blocks" if n_blocks else ""
        self._model = f"{model_name} with {len(structure.layers)} layers{vision}"

    @property
    def names(self) -> tuple[str, ...]:
        """Names in the order of the forward pass."""
        return tuple(self._places)

    def place(self, name: str) -> Place:
        """Module and position of a site; ModelError with similar names if the name is unknown."""
        if name not in self._places:
            raise self._unknown("site", name)
        return self._places[name]

    def matching(self, wanted: Iterable[str]) -> tuple[str, ...]:
        """Sites by name or by shell pattern, such as `lm.*.mlp_out`, in the order given, each once.

        Raises:
            ModelError: a name or pattern matches nothing; similar names are listed.
        """
        found: list[str] = []
        for name in wanted:
            matches = [name] if name in self._places else fnmatch.filter(self._places, name)
            if not matches:
                raise self._unknown("site pattern" if set(name) & set("*?[") else "site", name)
            found += matches
        return tuple(dict.fromkeys(found))

    def _unknown(self, what: str, name: str) -> ModelError:
        near = _near(name, self.names)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        return ModelError(f"unknown {what} '{name}' in {self._model}{hint}")


def _of_block(prefix: str, block: Block) -> dict[str, Place]:
    return {f"{prefix}.{kind}": Place(module=getattr(block, part), end=end) for kind, (part, end) in _KINDS.items()}


def _near(name: str, names: Sequence[str]) -> list[str]:
    """Similar names; a star in a pattern is taken as 0."""
    return difflib.get_close_matches(re.sub(r"\*", "0", name), names, n=4, cutoff=0.5)
