"""Record and edit named activations while a model runs.

Used by capture, by the replacement model and by every intervention. A site is a place of the forward pass:

    lm.embed                       what enters block 0                              [N,S,D]
    lm.{l}.resid_pre               residual stream entering block l                 [N,S,D]
    lm.{l}.scores                  attention scores, scaled, before mask and softmax [N,H,S,S]
    lm.{l}.pattern                 attention probabilities                          [N,H,S,S]
    lm.{l}.z                       output of each head before the output projection [N,H,S,dh]
    lm.{l}.attn_out                what the attention branch adds                   [N,S,D]
    lm.{l}.resid_mid               residual stream entering the MLP's norm          [N,S,D]
    lm.{l}.mlp_in                  input of the MLP, after its norm                 [N,S,D]
    lm.{l}.mlp_out                 what the MLP branch adds                         [N,S,D]
    lm.{l}.resid_post              residual stream leaving block l                  [N,S,D]
    lm.final                       what enters the final norm                       [N,S,D]

Scores, pattern and z exist only inside the attention function, so while one of them is asked for the decoder runs an
attention function of ours, registered with transformers together with a mask function: without the latter the model
would silently stop being causal. In a call with a key-value cache the query axis of these sites is the new tokens only.
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
    from clt.capture.adapter import ModelAdapter

Edit = Callable[[Tensor], Tensor]

_ATTENTION = "clt_sites"
_ATTENTION_KINDS = ("scores", "pattern", "z")
_OUTPUT_KINDS = ("attn_out", "mlp_out", "resid_post")
#: Sites tapped on each attention module, newest `attach` first; read by `_attention` when that module runs.
_taps: WeakKeyDictionary[nn.Module, list[Mapping[str, _Site]]] = WeakKeyDictionary()


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
        read: sites to record.
        edit: site to a function of its tensor that returns the tensor to go on with, same shape, dtype and device.

    Yields:
        Site to recorded tensor, filled as the model runs.

    Raises:
        ModelError: a site is unknown (similar names are listed), or an edit returns a tensor of another kind.
    """
    recorded: dict[str, Tensor] = {}
    edits = dict(edit or {})
    wanted = set(read)
    sites = [
        _Site(name=name, edit=edits.get(name), record=recorded if name in wanted else None)
        for name in dict.fromkeys([*edits, *read])
    ]
    modules = [adapter.module_for(site.name) for site in sites]
    with ExitStack() as stack:
        tapped: dict[nn.Module, dict[str, _Site]] = {}
        for site, module in zip(sites, modules, strict=True):
            if site.kind in _ATTENTION_KINDS:
                tapped.setdefault(module, {})[site.kind] = site
            else:
                stack.callback(_hook(site, module))
        if tapped:
            stack.enter_context(_own_attention(adapter, tapped))
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


def _hook(site: _Site, module: nn.Module) -> Callable[[], None]:
    """Registers the hook of a site that is a module's input or output; returns what removes it."""
    # First in line: transformers' own recorders of hidden states are hooks too and must see the edited tensor.
    if site.kind in _OUTPUT_KINDS:

        def after(_module: nn.Module, _args: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (site.pass_through(output[0]), *output[1:])
            return site.pass_through(output)

        return module.register_forward_hook(after, prepend=True).remove

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        if args:
            return (site.pass_through(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": site.pass_through(kwargs["hidden_states"])}

    return module.register_forward_pre_hook(before, prepend=True, with_kwargs=True).remove


@contextmanager
def _own_attention(adapter: ModelAdapter, tapped: Mapping[nn.Module, Mapping[str, _Site]]) -> Iterator[None]:
    """Runs the decoder with our attention function, the given modules tapped."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, eager_mask

    AttentionInterface.register(_ATTENTION, _attention)
    AttentionMaskInterface.register(_ATTENTION, eager_mask)
    before = adapter.decoder.config._attn_implementation
    for module, sites in tapped.items():
        _taps.setdefault(module, []).insert(0, sites)
    try:
        _set_attention(adapter, _ATTENTION)
        yield
    finally:
        for module, sites in tapped.items():
            _taps[module] = [other for other in _taps[module] if other is not sites]
        _set_attention(adapter, before)


def _set_attention(adapter: ModelAdapter, name: str) -> None:
    model = adapter.model
    model.set_attn_implementation({"text_config": name} if "text_config" in model.config.sub_configs else name)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
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

    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = site("scores", scores)
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[2]]
    # float16 and bfloat16 are summed in float32; float64 stays float64.
    wide = torch.promote_types(query.dtype, torch.float32)
    pattern = site("pattern", torch.softmax(scores, dim=-1, dtype=wide).to(query.dtype))
    z = site("z", pattern @ value)
    return z.transpose(1, 2).contiguous(), pattern
