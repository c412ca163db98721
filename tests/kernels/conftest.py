"""Fixtures of kernel tests: a GPU where there is one, else Triton's interpreter; new memory is filled with NaN."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On a machine with a GPU, tests that run kernels are GPU tests."""
    if torch.cuda.is_available():
        for item in items:
            if "device" in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.gpu)


@pytest.fixture
def device() -> str:
    """Device of the kernels: "cuda", or "cpu" for the interpreter (Triton 3.9; older ones fail with numpy 2.4)."""
    if torch.cuda.is_available():
        return "cuda"
    pytest.importorskip("triton", minversion="3.9")
    return "cpu"


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN (or the largest integer), so that unwritten elements are detected."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def random_codes(
    sources: int, tokens: int, k: int, n_features: int, *, dtype: torch.dtype, device: str, filled: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Canonical codes [S,B,K] with about that fraction of slots filled, distinct features per token."""
    scores = torch.rand(sources, tokens, n_features)
    scores = torch.where(torch.rand_like(scores) < filled, scores, 0)
    indices = scores.argsort(dim=2, descending=True)[:, :, :k]
    live = scores.gather(2, indices) > 0
    key = torch.where(live, indices, n_features).sort(dim=2).values
    live = key < n_features
    values = torch.where(live, torch.rand(sources, tokens, k) + 0.1, 0)
    return values.to(device, dtype), torch.where(live, key, 0).int().to(device)
