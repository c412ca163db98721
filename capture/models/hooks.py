"""Records and edits named activations (sites) during the forward pass of a model; docs/models.md lists the sites.

Queries, keys, values, scores, pattern and z exist only inside the attention function. While one of them is requested,
the decoder or tower runs the attention function of this module, registered with transformers together with a mask
function; without the latter the model would silently stop being causal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from clt.errors import ModelError

if TYPE_CHECKING:
    from clt.capture.models.adapter import ModelAdapter
    from clt.capture.models.sites import Place

Edit = Callable[[Tensor], Tensor]

_ATTENTION = "clt_sites"
#: Requested sites of each attention module, newest `attach` first; read by `_attention` when the module runs.
_taps: WeakKeyDictionary[nn.Module, list[Mapping[str, _Site]]] = WeakKeyDictionary()
#: Boundaries of the images or windows of a packed sequence, in the current call of such an attention module.
_bounds: WeakKeyDictionary[nn.Module, Tensor] = WeakKeyDictionary()


@contextmanager
def attach(
    adapter: ModelAdapter, read: Iterable[str] = (), edit: Mapping[str, Edit] | None = None
) -> Iterator[dict[str, Tensor]]:
    """Records and edits sites during the forward passes inside the `with` block.

    Edits run in every call, including the decoding steps of `generate`; a recorded site holds the value of the last
    call, after edits. Recorded tensors are those of the model, not copies, and carry gradients if the model's do. Of
    nested blocks the inner one acts first; the outer one receives its result.

    Args:
        adapter: the model.
        read: sites to record, by name or by shell pattern such as `lm.*.mlp_out`.
        edit: site -> function from its tensor to the replacement, of the same shape, dtype and device.

    Yields:
        Site -> recorded tensor, filled as the model runs.

    Raises:
        ModelError: a site is unknown or a pattern matches none (similar names are listed), or an edit returns a tensor
            of another shape, dtype or device.
    """
    recorded: dict[str, Tensor] = {}
    edits = dict(edit or {})
    wanted = adapter.sites.matching(read)
    sites = [
        _Site(name=name, edit=edits.get(name), record=recorded if name in wanted else None)
        for name in dict.fromkeys([*edits, *wanted])
    ]
    places = [adapter.sites.place(site.name) for site in sites]
    with ExitStack() as stack:
        tapped: dict[str, dict[nn.Module, dict[str, _Site]]] = {}
        for site, place in zip(sites, places, strict=True):
            if place.end == "attention":
                tower = site.name.partition(".")[0]
                tapped.setdefault(tower, {}).setdefault(place.module, {})[site.kind] = site
            else:
                stack.callback(_hook(site, place))
        for tower, modules in tapped.items():
            stack.enter_context(_own_attention(adapter, tower, modules))
        yield recorded


@dataclass(frozen=True, kw_only=True)
class _Site:
    name: str
    edit: Edit | None
    record: dict[str, Tensor] | None
    kind: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", self.name.rpartition(".")[2])

    def pass_through(self, value: Tensor) -> Tensor:
        """Edits and records a value; returns the value that the model continues with."""
        if self.edit is not None:
            # A clone, so that writing the result back into the residual stream keeps the tensor saved by autograd.
            before, value = value, self.edit(value.clone() if self.kind == "resid_mid" else value)
            if (value.shape, value.dtype, value.device) != (before.shape, before.dtype, before.device):
                raise ModelError(
                    f"the edit of {self.name} returned {tuple(value.shape)} {value.dtype} on {value.device}, expected "
                    f"{tuple(before.shape)} {before.dtype} on {before.device}"
                )
            if self.kind == "resid_mid":
                # The block later adds this same tensor to the MLP's output: only a write in place reaches both uses.
                value = before.copy_(value)
        if self.record is not None:
            self.record[self.name] = value
        return value


def _hook(site: _Site, place: Place) -> Callable[[], None]:
    """Registers the hook of a site that is a module's input or output; returns the function that removes it."""
    # Prepended: the recorders of hidden states in transformers are hooks too and must receive the edited tensor.
    if place.end == "output":

        def after(_module: nn.Module, _args: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (site.pass_through(output[0]), *output[1:])
            return site.pass_through(output)

        return place.module.register_forward_hook(after, prepend=True).remove

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        if args:
            return (site.pass_through(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": site.pass_through(kwargs["hidden_states"])}

    return place.module.register_forward_pre_hook(before, prepend=True, with_kwargs=True).remove


@contextmanager
def _own_attention(
    adapter: ModelAdapter, tower: str, tapped: Mapping[nn.Module, Mapping[str, _Site]]
) -> Iterator[None]:
    """Runs the decoder ("lm") or the vision tower with `_attention`, for the sites of the given modules."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, eager_mask

    AttentionInterface.register(_ATTENTION, _attention)
    AttentionMaskInterface.register(_ATTENTION, eager_mask)
    module: Any = adapter.decoder if tower == "lm" else adapter.structure.vision
    before = module.config._attn_implementation
    for attention, sites in tapped.items():
        _taps.setdefault(attention, []).insert(0, sites)
    # An enclosing `attach` on the same module has registered the hook.
    hooks = [
        attention.register_forward_pre_hook(_make_whole, with_kwargs=True)
        for attention in tapped
        if len(_taps[attention]) == 1
    ]
    try:
        _set_attention(adapter, tower, _ATTENTION)
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for attention, sites in tapped.items():
            _taps[attention] = [other for other in _taps[attention] if other is not sites]
            _bounds.pop(attention, None)
        _set_attention(adapter, tower, before)


def _make_whole(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
    """Makes a packed sequence one attention call, masked by `_attention`, instead of one per image or window."""
    if "cu_seqlens" not in kwargs:
        return args, kwargs
    _bounds[module] = kwargs["cu_seqlens"]
    return args, {**kwargs, "cu_seqlens": kwargs["cu_seqlens"][[0, -1]]}


def _set_attention(adapter: ModelAdapter, tower: str, name: str) -> None:
    model, part = adapter.model, "text_config" if tower == "lm" else "vision_config"
    model.set_attn_implementation({part: name} if part in model.config.sub_configs else name)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention function of transformers: query [N,H,S,dh], key, value [N,G,T,dh] to z [N,S,H,dh] and pattern."""
    assert dropout == 0.0, "the adapter keeps its model in eval mode"
    taps = _taps.get(module, [])

    def site(kind: str, tensor: Tensor) -> Tensor:
        for sites in taps:
            if kind in sites:
                tensor = sites[kind].pass_through(tensor)
        return tensor

    query, key, value = site("q", query), site("k", key), site("v", value)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = site("scores", scores)
    if module in _bounds:
        lengths = _bounds[module].diff()
        part = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
        scores = scores.masked_fill(part[:, None] != part, -torch.inf)
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[2]]
    # Softmax of float16 and bfloat16 is in float32; float64 stays float64.
    wide = torch.promote_types(query.dtype, torch.float32)
    pattern = site("pattern", torch.softmax(scores, dim=-1, dtype=wide).to(query.dtype))
    z = site("z", pattern @ value)
    return z.transpose(1, 2).contiguous(), pattern
