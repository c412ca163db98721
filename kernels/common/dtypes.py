"""Dtype of accumulators."""

import torch


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over tensors of a dtype run: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
