"""Which implementation runs: chosen here and nowhere else, and said once in the log.

    triton     the fused kernels; CUDA tensors, or CPU tensors in Triton's interpreter (TRITON_INTERPRET=1)
    cpu        sparse PyTorch; float32 and float64 tensors on the CPU
    reference  plain PyTorch; any tensor, slow

"auto" takes triton on CUDA and cpu on the CPU where they apply, else the reference.
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

_demanded: Name = "auto"


def use_backend(name: Name) -> None:
    """Demands an implementation for all following operations of this process.

    Args:
        name: "auto", "triton", "cpu" or "reference".

    Raises:
        ValueError: there is no such implementation.
        RuntimeError: it cannot run on this machine; says why.
    """
    global _demanded
    if name not in ("auto", "triton", "cpu", "reference"):
        raise ValueError(f"backend {name!r} must be auto, triton, cpu or reference")
    if name == "triton" and (missing := _no_triton()):
        raise RuntimeError(f"the Triton kernels cannot run: {missing}; take auto")
    _demanded = name


def backend_of(tensor: Tensor) -> str:
    """Name of the implementation that operations on such a tensor take.

    Raises:
        RuntimeError: the demanded one cannot take this tensor.
    """
    return _backend(_demanded, tensor.device.type, tensor.dtype)


def implementation(tensor: Tensor) -> KernelBackend:
    """The implementation that `backend_of` names."""
    name = backend_of(tensor)
    if name == "triton":
        from clt.kernels.gpu import triton_backend

        return triton_backend
    return cpu if name == "cpu" else reference


def device_guard(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes a tensor's GPU the current one inside a with statement; does nothing for the CPU."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@functools.cache
def _backend(demanded: Name, device: str, dtype: torch.dtype) -> str:
    what = f"{str(dtype).removeprefix('torch.')} on {device}"
    fast = "triton" if device == "cuda" else "cpu"
    obstacle = _obstacle(fast if demanded == "auto" else demanded, device, dtype)
    if obstacle is None:
        name = fast if demanded == "auto" else demanded
        log.info("kernels: %s for %s", name, what)
    elif demanded == "auto":
        name = "reference"
        log.warning("kernels: the slow reference for %s, because %s", what, obstacle)
    else:
        raise RuntimeError(f"backend {demanded} cannot take {what}: {obstacle}; take auto")
    return name


def _obstacle(name: str, device: str, dtype: torch.dtype) -> str | None:
    """Why an implementation cannot take such tensors, None if it can."""
    dtypes = {"triton": _TRITON_DTYPES, "cpu": _CPU_DTYPES, "reference": (dtype,)}[name]
    if dtype not in dtypes:
        return f"{name} takes {', '.join(str(t).removeprefix('torch.') for t in dtypes)}"
    if name == "cpu" and device != "cpu":
        return "cpu takes tensors of the CPU"
    if name == "triton" and device == "cpu" and not _interpreting():
        return "TRITON_INTERPRET=1 is not set"
    return _no_triton() if name == "triton" else None


def _no_triton() -> str | None:
    """Why the kernels cannot run here, None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if not torch.cuda.is_available() and not _interpreting():
        return "there is no CUDA device, and TRITON_INTERPRET=1 is not set"
    return None


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
