"""One prompt's model as linear maps: attention patterns and norm denominators frozen at the values of its forward.

With both frozen, what a vector in the residual stream adds to a later place is a matrix product. `LinearModel` holds
those matrices and pulls a batch of cotangents back through attention layers: an explicit vector-Jacobian product that
keeps no autograd graph and stores every pattern once (Ameisen et al. 2025, "Circuit Tracing", section "Attribution
graphs", with stop-gradients on patterns and denominators). MLP outputs are inputs of it.

Shapes: B cotangents in a batch, S prompt length, R <= S positions that a batch can reach, L layers, D d_model, H heads,
G key-value heads, E head width, V vocabulary. Weights are used in float32 at least.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from clt.attribution.replacement.frozen_model import PromptRecording, norm_scales, same_values
from clt.capture.models.adapter import ModelAdapter
from clt.errors import ModelError


class LinearModel:
    """Attention, norms and unembedding of a prompt as linear maps.

    Args:
        adapter: the model.
        recording: a forward of the prompt, from `record`.

    Raises:
        ModelError: a norm is not an RMSNorm, or the linear maps do not reproduce the recorded forward, as in models
            with norms after the branches, parallel branches, or scaled or capped logits.
    """

    def __init__(self, adapter: ModelAdapter, recording: PromptRecording) -> None:
        self.adapter = adapter
        self.recording = recording
        self.dtype = recording.embed.dtype
        scales = norm_scales(adapter, recording, self.dtype)
        self.attn_scale, self.mlp_scale, self.final_scale = scales[:-1:2], scales[1::2], scales[-1]
        self.is_causal = not bool(recording.pattern.triu(1).any())
        self._require_reproduction()

    @property
    def n_layers(self) -> int:
        """Decoder layers."""
        return self.adapter.n_layers

    @property
    def n_positions(self) -> int:
        """Tokens of the prompt, S."""
        return len(self.recording.embed)

    def reach(self, positions: Tensor) -> int:
        """Number of leading positions that can affect any of the given ones."""
        return int(positions.max()) + 1 if self.is_causal else self.n_positions

    def weight(self, module: nn.Module) -> Tensor:
        """Weight of a linear layer, [out,in]."""
        return cast(Tensor, module.weight).to(self.dtype)

    def bias(self, module: nn.Module) -> Tensor | None:
        """Bias of a linear layer, [out], if it has one."""
        bias = cast(Tensor | None, getattr(module, "bias", None))
        return None if bias is None else bias.to(self.dtype)

    def attention_biases(self, layer: int) -> tuple[Tensor | None, Tensor | None]:
        """Biases of a layer's value and output projection."""
        return self.bias(self.adapter.v_proj(layer)), self.bias(self.adapter.o_proj(layer))

    def attention_bias(self, layer: int) -> Tensor:
        """[D] that a layer's attention biases add at every position: pattern rows sum to 1."""
        (v_bias, o_bias), o_proj = self.attention_biases(layer), self.weight(self.adapter.o_proj(layer))
        H, G, E = self.adapter.n_heads, self.adapter.n_kv_heads, self.adapter.head_dim
        out_D = o_proj.new_zeros(len(o_proj)) if o_bias is None else o_bias
        if v_bias is not None:
            out_D = out_D + o_proj @ v_bias.view(G, E).repeat_interleave(H // G, dim=0).flatten()
        return out_D

    def pull_attention(self, layer: int, cotangent_BRD: Tensor) -> tuple[Tensor, Tensor]:
        """Pulls cotangents back through a layer's attention branch and the residual stream around it.

        Args:
            layer: decoder layer.
            cotangent_BRD: [B,R,D] with respect to resid_mid at the first R positions.

        Returns:
            [B,R,D] with respect to resid_pre, and [B,R,G*E] with respect to the values.
        """
        B, R, _ = cotangent_BRD.shape
        H, G, E = self.adapter.n_heads, self.adapter.n_kv_heads, self.adapter.head_dim
        z_BRHE = (cotangent_BRD @ self.weight(self.adapter.o_proj(layer))).view(B, R, H, E)
        z_HRX = z_BRHE.permute(2, 1, 0, 3).reshape(H, R, B * E)
        v_HRX = torch.bmm(self.recording.pattern[layer, :, :R, :R].transpose(1, 2), z_HRX)
        # Query heads that share a key-value head are contiguous: the value's cotangent is their sum.
        v_GRBE = v_HRX.view(G, H // G, R, B, E).sum(1)
        v_BRX = v_GRBE.permute(2, 1, 0, 3).reshape(B, R, G * E)
        branch_BRD = (v_BRX @ self.weight(self.adapter.v_proj(layer))).mul_(self.attn_scale[layer][:R])
        return branch_BRD.add_(cotangent_BRD), v_BRX

    def _require_reproduction(self) -> None:
        found = self.recording
        after = torch.cat([found.resid_pre[1:], found.final[None]])
        for layer in range(self.n_layers):
            if not same_values(
                self.adapter, found.resid_mid[layer], found.resid_pre[layer] + self._attention_output(layer)
            ):
                raise self._unsupported(f"the attention of layer {layer}")
            if not same_values(self.adapter, after[layer], found.resid_mid[layer] + found.mlp_out[layer]):
                raise self._unsupported(f"the residual stream after layer {layer}")
        logits_SV = (found.final * self.final_scale) @ self.weight(self.adapter.lm_head).T
        bias = self.bias(self.adapter.lm_head)
        if not same_values(self.adapter, found.logits, logits_SV if bias is None else logits_SV + bias):
            raise self._unsupported("the logits")

    def _attention_output(self, layer: int) -> Tensor:
        """[S,D] that the frozen attention of a layer adds."""
        H, G, E = self.adapter.n_heads, self.adapter.n_kv_heads, self.adapter.head_dim
        v_bias, o_bias = self.attention_biases(layer)
        normed_SD = self.recording.resid_pre[layer] * self.attn_scale[layer]
        v_SX = normed_SD @ self.weight(self.adapter.v_proj(layer)).T
        v_SX = v_SX if v_bias is None else v_SX + v_bias
        v_HSE = v_SX.view(-1, G, E).repeat_interleave(H // G, dim=1).transpose(0, 1)
        z_SX = (self.recording.pattern[layer] @ v_HSE).transpose(0, 1).reshape(-1, H * E)
        out_SD = z_SX @ self.weight(self.adapter.o_proj(layer)).T
        return out_SD if o_bias is None else out_SD + o_bias

    def _unsupported(self, what: str) -> ModelError:
        return ModelError(
            f"{what} of {self.adapter.identity.name} ({self.adapter.identity.architecture}): not reproduced with "
            "frozen patterns and norms; attribution does not support this architecture"
        )
