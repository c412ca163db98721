"""One prompt's forward pass, recorded, and the model run again with parts of it frozen at the recorded values.

Attribution computes effects in a local replacement model: attention patterns and norm denominators are constants, taken
from a forward of the prompt, and MLP outputs are inputs (Ameisen et al. 2025, "Circuit Tracing", section "The local
replacement model"). `record` takes these constants. `FrozenModel` runs the model's own modules with them, to measure
interventions; `clt.attribution.replacement.linear_model` holds the same model as matrices, to compute effects.

Shapes: S prompt length, L layers, H heads, D d_model, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from clt.capture.models.adapter import ModelAdapter, PromptInputs
from clt.capture.models.hooks import Edit, attach
from clt.capture.models.sites import SiteKind, decoder_site, decoder_sites
from clt.errors import GraphError, ModelError
from clt.transcoder.architecture import ReadSite

#: Parts of the forward that can be frozen: attention patterns, denominators of the decoder's norms, MLP outputs.
FrozenPart = Literal["attention", "norms", "mlps"]


@dataclass(frozen=True, kw_only=True)
class PromptRecording:
    """One forward of a prompt; activations in float32 at least.

    Attributes:
        inputs: the prompt.
        embed: [S,D] what enters block 0: text embeddings and projected image patches, merged and scaled.
        resid_pre: [L,S,D] residual stream entering each block.
        resid_mid: [L,S,D] residual stream entering each MLP's norm.
        read: [L,S,D] inputs of the encoders.
        mlp_out: [L,S,D] what each MLP adds.
        final: [S,D] residual stream entering the final norm.
        pattern: [L,H,S,S] attention probabilities, query before key.
        norm_factors: for each of `norm_modules` [S] float64, by which it multiplied its weight times its input:
            1 / denominator. None for a norm that is not an RMSNorm.
        logits: [S,V].
    """

    inputs: PromptInputs
    embed: Tensor
    resid_pre: Tensor
    resid_mid: Tensor
    read: Tensor
    mlp_out: Tensor
    final: Tensor
    pattern: Tensor
    norm_factors: tuple[Tensor | None, ...]
    logits: Tensor


def require_one_prompt(inputs: PromptInputs) -> None:
    """Raises GraphError for a batch of several prompts, or one with padding."""
    if len(inputs.prompts) != 1 or not bool(inputs.real_mask.all()):
        raise GraphError(f"prompts={len(inputs.prompts)}: give one prompt at a time, without padding")


@torch.no_grad()
def record(adapter: ModelAdapter, inputs: PromptInputs, read_site: ReadSite) -> PromptRecording:
    """Runs the model on one prompt and keeps its activations, attention patterns and norm denominators.

    Args:
        adapter: the model.
        inputs: one prompt without padding.
        read_site: site that the encoders read.

    Returns:
        The recording, on the model's device.

    Raises:
        GraphError: there is more than one prompt, or padding.
    """
    require_one_prompt(inputs)
    kinds: tuple[SiteKind, ...] = ("resid_pre", "resid_mid", "mlp_out", "pattern", read_site)
    sites = [site for kind in kinds for site in decoder_sites(range(adapter.n_layers), kind)]
    factors: list[Tensor | None] = []
    with ExitStack() as stack:
        found = stack.enter_context(attach(adapter, read=["lm.embed", *sites, "lm.final"]))
        for norm in norm_modules(adapter):
            hook = partial(_keep_factor, adapter, factors)
            stack.callback(norm.register_forward_hook(hook).remove)
        logits = adapter.forward(inputs)
    wide = torch.promote_types(adapter.dtype, torch.float32)

    def layers(kind: SiteKind) -> Tensor:
        return torch.stack([found[site][0] for site in decoder_sites(range(adapter.n_layers), kind)]).to(wide)

    return PromptRecording(
        inputs=inputs,
        embed=found["lm.embed"][0].to(wide),
        resid_pre=layers("resid_pre"),
        resid_mid=layers("resid_mid"),
        read=layers(read_site),
        mlp_out=layers("mlp_out"),
        final=found["lm.final"][0].to(wide),
        pattern=layers("pattern"),
        norm_factors=tuple(factors),
        logits=logits[0].to(wide),
    )


def norm_modules(adapter: ModelAdapter) -> list[nn.Module]:
    """The norms before attention and MLP of every layer and the final norm, in the order of the forward."""
    layers = range(adapter.n_layers)
    pairs = [norm for layer in layers for norm in (adapter.attn_norm(layer), adapter.mlp_norm(layer))]
    return [*pairs, adapter.final_norm]


def norm_scales(adapter: ModelAdapter, recording: PromptRecording, dtype: torch.dtype) -> list[Tensor]:
    """The frozen norms as factors of their inputs: weight over denominator.

    Args:
        adapter: the model.
        recording: a forward of the prompt.
        dtype: of the result.

    Returns:
        [S,D] for each of `norm_modules`.

    Raises:
        ModelError: a norm is not an RMSNorm.
    """
    scales = []
    for norm, factor_S in zip(norm_modules(adapter), recording.norm_factors, strict=True):
        if factor_S is None:
            name = f"{type(norm).__name__} of {adapter.identity.name}"
            raise ModelError(f"{name}: attribution supports norms that are weight * x / sqrt(mean(x^2) + eps) only")
        scales.append((_norm_weight(norm) * factor_S[:, None]).to(dtype))
    return scales


def same_values(adapter: ModelAdapter, found: Tensor, expected: Tensor) -> bool:
    """True if two tensors of a model agree up to the rounding of its dtype, far below the size of a missing term.

    Args:
        adapter: the model.
        found: any shape.
        expected: the same shape; the comparison is in its dtype and relative to its largest entry.
    """
    tolerance = max(1e-4, 16 * torch.finfo(adapter.dtype).eps)
    return bool((found.to(expected.dtype) - expected).abs().max() <= tolerance * expected.abs().max())


def _norm_weight(norm: nn.Module) -> Tensor:
    """[D] float64; 1 for a norm without weight."""
    weight = cast(Tensor | None, getattr(norm, "weight", None))
    return torch.ones((), dtype=torch.float64) if weight is None else weight.double()


def _keep_factor(
    adapter: ModelAdapter, factors: list[Tensor | None], norm: nn.Module, args: tuple[Any, ...], output: Tensor
) -> None:
    """Appends [S] float64, the least-squares factor of weight * input in an RMSNorm's output; None for other norms."""
    x_SD, output_SD = args[0][0].double(), output[0].double()
    weighted_SD = x_SD * _norm_weight(norm)
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    eps = torch.finfo(args[0].dtype).eps if eps is None else eps
    is_rms = same_values(adapter, output_SD, weighted_SD * torch.rsqrt(x_SD.square().mean(-1, keepdim=True) + eps))
    # Measured rather than computed, so that a frozen norm gives what the module gave.
    factor_S = (output_SD * weighted_SD).sum(-1) / weighted_SD.square().sum(-1).clamp_min(1e-300)
    factors.append(factor_S if is_rms else None)


class FrozenModel:
    """A model that runs one prompt with what enters block 0, and the chosen parts, frozen at a recording's values.

    With all parts frozen the logits are linear in what is added to MLP outputs and embeddings. With `freeze=()` it is
    the model itself.

    Args:
        adapter: the model.
        recording: a forward of the prompt, from `record`.
        freeze: parts that keep their recorded values.
        dtype: dtype of the computation, in a copy of the model if it is not the model's own (default): a difference of
            two forwards in float32 loses the digits that an exact check needs.

    Raises:
        GraphError: a part is unknown.
        ModelError: norms are to be frozen, and one is not an RMSNorm.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        recording: PromptRecording,
        freeze: Collection[FrozenPart] = get_args(FrozenPart),
        dtype: torch.dtype | None = None,
    ) -> None:
        unknown = set(freeze) - set(get_args(FrozenPart))
        if unknown:
            raise GraphError(f"freeze={sorted(unknown)}: unknown; choose among {', '.join(get_args(FrozenPart))}")
        self.dtype = dtype or adapter.dtype
        self.adapter, self.inputs, self.recording = adapter, recording.inputs, recording
        if self.dtype != adapter.dtype:
            self.adapter = ModelAdapter(copy.deepcopy(adapter.model).to(self.dtype), adapter, adapter.identity)
            tensors = self.inputs.model_inputs.items()
            cast_inputs = {name: x.to(self.dtype) if x.is_floating_point() else x for name, x in tensors}
            self.inputs = replace(self.inputs, model_inputs=cast_inputs)
        scales = norm_scales(adapter, recording, self.dtype) if "norms" in freeze else []
        self._norms = list(zip(norm_modules(self.adapter), scales, strict=False))
        held = {"lm.embed": recording.embed}
        if "attention" in freeze:
            held |= {decoder_site(layer, "pattern"): value for layer, value in enumerate(recording.pattern)}
        if "mlps" in freeze:
            held |= {decoder_site(layer, "mlp_out"): value for layer, value in enumerate(recording.mlp_out)}
        self._held = {site: value[None].to(self.dtype) for site, value in held.items()}

    @torch.no_grad()
    def forward(self, edit: Mapping[str, Edit] | None = None) -> Tensor:
        """Logits of the prompt.

        Args:
            edit: site to a function of its tensor [1,...] that returns its replacement. At a frozen site the
                function gets the recorded value, at any other the value that the running forward computed.

        Returns:
            [S,V] logits; other activations are read by an `attach(frozen.adapter, read=...)` around the call.

        Raises:
            ModelError: a site is unknown, or an edit returns a tensor of another shape, dtype or device.
        """
        with self.running(edit):
            return self.adapter.forward(self.inputs)[0]

    @contextmanager
    def running(self, edit: Mapping[str, Edit] | None = None) -> Iterator[None]:
        """Freezes and edits `adapter` for forwards of the prompt made inside the `with` block; see `forward`."""
        edits = dict(edit or {})
        for site, value in self._held.items():
            edits[site] = _on_constant(value, edits.get(site))
        with ExitStack() as stack:
            stack.enter_context(attach(self.adapter, edit=edits))
            for norm, scale_SD in self._norms:
                stack.callback(norm.register_forward_hook(partial(_scale_input, scale_SD)).remove)
            yield


def _scale_input(scale_SD: Tensor, _norm: nn.Module, args: tuple[Any, ...], _output: Tensor) -> Tensor:
    """A forward hook: the output of a frozen norm."""
    return cast(Tensor, args[0]) * scale_SD


def _on_constant(value: Tensor, edit: Edit | None) -> Edit:
    """An edit that takes a constant for the value of the running forward."""
    return lambda _running: value if edit is None else edit(value)
