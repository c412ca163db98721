"""Parts of a model, found by name: decoder blocks, vision blocks, bridges, norms and the language-model head.

Blocks of all supported models have the same parts under different names: norm, attention, norm, MLP, each branch added
to the residual stream, in some models after one more norm. `discover` finds these parts by the public accessors of
transformers (`get_decoder`, `get_encoder`, `get_output_embeddings`) and the names below, and raises an error for other
structures. A model with other names is described by a function and registered
(`clt.capture.models.architectures.register_adapter`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from clt.errors import ModelError

_ATTENTION = ("self_attn", "attn")
_ATTENTION_NORMS = ("input_layernorm", "ln_1", "layer_norm1", "norm1")
#: The first that exists is used: Gemma's blocks have the first two, the second of them on the attention branch.
_MLP_NORMS = ("pre_feedforward_layernorm", "post_attention_layernorm", "ln_2", "layer_norm2", "norm2")
_OUTPUT_PROJECTIONS = ("o_proj", "c_proj", "out_proj", "proj", "dense")
_BLOCKS = ("layers", "h", "blocks", "encoder.layers")
_FINAL_NORMS = ("norm", "ln_f")
_BRIDGES = ("multi_modal_projector", "connector", "merger")


@dataclass(frozen=True, kw_only=True, eq=False)
class Block:
    """Modules of a transformer block, which computes resid_mid = input + attn_out, output = resid_mid + mlp_out.

    Attributes:
        block: the whole block, from residual stream to residual stream.
        attn_norm: norm before attention.
        attn: the attention.
        attn_out: the module whose output the attention branch adds: `attn`, or a norm after it.
        mlp_norm: norm before the MLP; its input is the residual stream between the branches.
        mlp: the MLP.
        mlp_out: the module whose output the MLP branch adds: `mlp`, or a norm after it.
    """

    block: nn.Module
    attn_norm: nn.Module
    attn: nn.Module
    attn_out: nn.Module
    mlp_norm: nn.Module
    mlp: nn.Module
    mlp_out: nn.Module

    @property
    def o_proj(self) -> nn.Module:
        """Output projection of the attention."""
        return part(self.attn, *_OUTPUT_PROJECTIONS)

    @property
    def v_proj(self) -> nn.Module:
        """Value projection of the attention; ModelError if queries, keys and values are one projection."""
        return part(self.attn, "v_proj")


@dataclass(frozen=True, kw_only=True, eq=False)
class Structure:
    """Parts of a model.

    Attributes:
        decoder: the language model without its head.
        layers: blocks of the language model in order.
        final_norm: norm after the last block.
        lm_head: unembedding.
        vision: the vision tower; None for text models.
        vision_blocks: blocks of the vision tower in order.
        bridges: site name -> module between the tower and the language model.
    """

    decoder: nn.Module
    layers: tuple[Block, ...]
    final_norm: nn.Module
    lm_head: nn.Module
    vision: nn.Module | None = None
    vision_blocks: tuple[Block, ...] = ()
    bridges: Mapping[str, nn.Module] = field(default_factory=dict)


def discover(model: Any) -> Structure:
    """Finds the parts of a Hugging Face model.

    Args:
        model: a causal language model, with or without a vision tower.

    Returns:
        Its parts.

    Raises:
        ModelError: a part is not found.
    """
    decoder = model.get_decoder()
    head = model.get_output_embeddings()
    if head is None:
        raise ModelError(f"{type(model).__name__}: get_output_embeddings() found no language-model head")
    layers = tuple(discover_block(block) for block in _blocks(decoder))
    text = {"decoder": decoder, "layers": layers, "final_norm": part(decoder, *_FINAL_NORMS), "lm_head": head}
    if getattr(model.config, "vision_config", None) is None:
        return Structure(**text)
    vision = model.get_encoder(modality="image")
    return Structure(
        **text,
        vision=vision,
        vision_blocks=tuple(discover_block(block) for block in _blocks(vision)),
        bridges=_bridges(model, vision),
    )


def discover_block(block: nn.Module) -> Block:
    """Finds the parts of a transformer block by their usual names.

    Args:
        block: a block with sequential branches: norm, attention, norm, MLP.

    Returns:
        Its parts.

    Raises:
        ModelError: a part is not found, or the block has a norm at an unknown position.
    """
    attn, mlp, mlp_norm = part(block, *_ATTENTION), part(block, "mlp"), part(block, *_MLP_NORMS)
    before, after = (getattr(block, f"{name}_feedforward_layernorm", None) for name in ("pre", "post"))
    if (before is None) != (after is None):
        raise ModelError(
            f"{type(block).__name__}: norms after branches but none before; register its Structure (docs/models.md)"
        )
    return Block(
        block=block,
        attn_norm=part(block, *_ATTENTION_NORMS),
        attn=attn,
        attn_out=attn if after is None else part(block, "post_attention_layernorm"),
        mlp_norm=mlp_norm,
        mlp=mlp,
        mlp_out=mlp if after is None else after,
    )


def part(module: nn.Module, *paths: str) -> nn.Module:
    """The first submodule that exists.

    Args:
        module: the parent module.
        paths: dotted names, in order of preference.

    Raises:
        ModelError: none exists.
    """
    for path in paths:
        found: Any = module
        for name in path.split("."):
            found = getattr(found, name, None)
        if found is not None:
            return found
    raise ModelError(f"{type(module).__name__}: no module '{' or '.join(paths)}'; this structure is not supported")


def _blocks(module: nn.Module) -> list[nn.Module]:
    blocks = part(module, *_BLOCKS)
    if not isinstance(blocks, nn.ModuleList) or not len(blocks):
        raise ModelError(f"{type(module).__name__}: its blocks are not a ModuleList; this structure is not supported")
    return list(blocks)


def _bridges(model: Any, vision: nn.Module) -> dict[str, nn.Module]:
    """Bridges by site name; those into later decoder layers are numbered (Qwen3-VL)."""
    places = [vision, model.get_decoder(), getattr(model, model.base_model_prefix, model)]
    found = [getattr(place, name) for name in _BRIDGES for place in places if hasattr(place, name)]
    if not found:
        raise ModelError(f"{type(model).__name__}: no {' or '.join(_BRIDGES)} found; this structure is not supported")
    deep = getattr(vision, "deepstack_merger_list", ())
    return {"bridge.out": found[0]} | {f"bridge.{number}.out": merger for number, merger in enumerate(deep)}
