"""Checkpoint files of a transcoder: one safetensors file per layer, and a manifest that is written last."""
