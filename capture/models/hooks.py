"""Record and edit named activations while a model runs.

Used by capture, by the replacement model and by every intervention. A site is a place of the forward pass:

    lm.embed                       what enters block 0                              [N,S,D]
    lm.{l}.resid_pre               residual stream entering block l                 [N,S,D]
    lm.{l}.q                       queries as they meet the keys: normed, rotated   [N,H,S,dh]
    lm.{l}.k, lm.{l}.v             keys likewise, and values                        [N,G,S,dh]
    lm.{l}.scores                  attention scores, scaled (and capped), before mask and softmax [N,H,S,S]
    lm.{l}.pattern                 attention probabilities                          [N,H,S,S]
    lm.{l}.z                       output of each head before the output projection [N,H,S,dh]
    lm.{l}.attn_out                what the attention branch adds, after its norm   [N,S,D]
    lm.{l}.resid_mid               residual stream entering the MLP's norm          [N,S,D]
    lm.{l}.mlp_in                  input of the MLP, after its norm                 [N,S,D]
    lm.{l}.mlp_out                 what the MLP branch adds, after its norm (Gemma) [N,S,D]
    lm.{l}.resid_post              residual stream leaving block l                  [N,S,D]
    lm.final                       what enters the final norm                       [N,S,D]
    vision.{b}.*                   the same kinds in block b of the vision tower    [views,patches,D]
    bridge.out                     what leaves the projector for the language model [images,tokens,D]
    bridge.{i}.out                 what is added after decoder layer i (Qwen3-VL)   [tokens,D]

Queries, keys, values, scores, pattern and z exist only inside the attention function, so while one of them is asked for
the decoder or the tower runs an attention function of ours, registered with transformers together with a mask function:
without the latter the model would silently stop being causal. In a call with a key-value cache the query axis of these
sites is the new tokens only, and keys are those in the cache, of which a sliding layer keeps its window.

Towers that run the patches of all images as one sequence (Qwen) have [patches,D] sites, in the tower's own order, and
N = 1 inside attention; patterns are zero between images and, in Qwen2.5-VL's windowed blocks, between windows. A block
computes all of it, zeros too, while one of these sites is asked for.
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
#: Sites tapped on each attention module, newest `attach` first; read by `_attention` when that module runs.
_taps: WeakKeyDictionary[nn.Module, list[Mapping[str, _Site]]] = WeakKeyDictionary()
#: Where the images or windows of a packed sequence begin and end, in the running call of a tapped attention module.
_bounds: WeakKeyDictionary[nn.Module, Tensor] = WeakKeyDictionary()


@contextmanager
def attach(
    adapter: ModelAdapter, read: Iterable[str] = (), edit: Mapping[str, Edit] | None = None
) -> Iterator[dict[str, Tensor]]:
    """Records and edits sites during the forward passes made inside the `with` block.

    Edits run in every call, the decoding steps of `generate` included; a recorded site keeps its last call, and its
    value after edits. Recorded tensors are the model's own, not copies, and carry gradients where the model does.
    When blocks are nested, the inner one acts first and the outer one sees its result.

    Args:
        adapter: the model.
        read: sites to record, by name or by shell pattern such as `lm.*.mlp_out`.
        edit: site to a function of its tensor that returns the tensor to go on with, same shape, dtype and device.

    Yields:
        Site to recorded tensor, filled as the model runs.

    Raises:
        ModelError: a site is unknown or a pattern matches none (similar names are listed), or an edit returns a tensor
            of another kind.
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
        """Edits and records a value; returns what the model goes on with."""
        if self.edit is not None:
            # A clone, so that writing the result back into the residual stream leaves what autograd saved alone.
            before, value = value, self.edit(value.clone() if self.kind == "resid_mid" else value)
            if (value.shape, value.dtype, value.device) != (before.shape, before.dtype, before.device):
                raise ModelError(
                    f"the edit of {self.name} returned {tuple(value.shape)} {value.dtype} on {value.device}, expected "
                    f"{tuple(before.shape)} {before.dtype} on {before.device}"
                )
            if self.kind == "resid_mid":
                # The block adds this very tensor to the MLP's output later: only a write in place reaches both uses.
                value = before.copy_(value)
        if self.record is not None:
            self.record[self.name] = value
        return value


def _hook(site: _Site, place: Place) -> Callable[[], None]:
    """Registers the hook of a site that is a module's input or output; returns what removes it."""
    # First in line: transformers' own recorders of hidden states are hooks too and must see the edited tensor.
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
    """Runs the decoder ("lm") or the vision tower with our attention function, the given modules tapped."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, eager_mask

    AttentionInterface.register(_ATTENTION, _attention)
    AttentionMaskInterface.register(_ATTENTION, eager_mask)
    module: Any = adapter.decoder if tower == "lm" else adapter.structure.vision
    before = module.config._attn_implementation
    for attention, sites in tapped.items():
        _taps.setdefault(attention, []).insert(0, sites)
    # Where an `attach` around this one taps the module too, its hook is there.
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
    """Has a packed sequence attended to in one call, which `_attention` masks, instead of one per image or window."""
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
    """Attention as transformers calls it: query [N,H,S,dh], key, value [N,Hkv,T,dh] to z [N,S,H,dh] and pattern."""
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
    # float16 and bfloat16 are summed in float32; float64 stays float64.
    wide = torch.promote_types(query.dtype, torch.float32)
    pattern = site("pattern", torch.softmax(scores, dim=-1, dtype=wide).to(query.dtype))
    z = site("z", pattern @ value)
    return z.transpose(1, 2).contiguous(), pattern
