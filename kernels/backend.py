"""Choice of the kernel backend by device and dtype, logged once for each.

    triton     the fused kernels; CUDA tensors, or CPU tensors in Triton's interpreter (TRITON_INTERPRET=1)
    cpu        sparse PyTorch; float32 and float64 tensors on the CPU
    reference  plain PyTorch; any tensor, slow

"auto" takes triton on CUDA and cpu on the CPU where they apply, else reference.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor

from clt.kernels.common.interface import KernelBackend
from clt.kernels.pytorch import cpu, reference

log = logging.getLogger(__name__)

Name = Literal["auto", "triton", "cpu", "reference"]

_TRITON_DTYPES = (torch.bfloat16, torch.float32, torch.float64)
_CPU_DTYPES = (torch.float32, torch.float64)

_chosen: Name = "auto"


def use_backend(name: Name) -> None:
    """Sets the backend of all following operations of this process.

    Args:
        name: "auto", "triton", "cpu" or "reference".

    Raises:
        ValueError: there is no such backend.
        RuntimeError: it cannot run on this machine.
    """
    global _chosen
    if name not in ("auto", "triton", "cpu", "reference"):
        raise ValueError(f"unknown backend {name!r}; use auto, triton, cpu or reference")
    if name == "triton" and (missing := _no_triton()):
        raise RuntimeError(f"backend triton cannot run here: {missing}; use auto")
    _chosen = name


def backend_of(tensor: Tensor) -> str:
    """Name of the backend that runs operations on such a tensor.

    Raises:
        RuntimeError: the backend that was set does not support this tensor.
    """
    return _backend(_chosen, tensor.device.type, tensor.dtype)


def implementation(tensor: Tensor) -> KernelBackend:
    """The backend that `backend_of` names."""
    name = backend_of(tensor)
    if name == "triton":
        from clt.kernels.gpu import triton_backend

        return triton_backend
    return cpu if name == "cpu" else reference


def device_guard(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes a tensor's GPU the current one inside a with statement; does nothing for the CPU."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@functools.cache
def _backend(chosen: Name, device: str, dtype: torch.dtype) -> str:
    shown = str(dtype).removeprefix("torch.")
    fast = "triton" if device == "cuda" else "cpu"
    obstacle = _obstacle(fast if chosen == "auto" else chosen, device, dtype)
    if obstacle is None:
        name = fast if chosen == "auto" else chosen
        log.info("kernel_backend=%s dtype=%s device=%s", name, shown, device)
    elif chosen == "auto":
        name = "reference"
        log.warning("kernel_backend=reference (slow) dtype=%s device=%s: %s", shown, device, obstacle)
    else:
        raise RuntimeError(f"backend {chosen} does not support {shown} on {device}: {obstacle}; use auto")
    return name


def _obstacle(name: str, device: str, dtype: torch.dtype) -> str | None:
    """Reason why a backend does not support such tensors, None if it does."""
    dtypes = {"triton": _TRITON_DTYPES, "cpu": _CPU_DTYPES, "reference": (dtype,)}[name]
    if dtype not in dtypes:
        return f"{name} supports {', '.join(str(t).removeprefix('torch.') for t in dtypes)}"
    if name == "cpu" and device != "cpu":
        return "cpu supports CPU tensors only"
    if name == "triton" and device == "cpu" and not _interpreting():
        return "TRITON_INTERPRET=1 is not set"
    return _no_triton() if name == "triton" else None


def _no_triton() -> str | None:
    """Reason why Triton cannot run here, None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if not torch.cuda.is_available() and not _interpreting():
        return "there is no CUDA device, and TRITON_INTERPRET=1 is not set"
    return None


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
