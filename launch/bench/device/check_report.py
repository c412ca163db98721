"""Results of a GPU check, its random codes and its clock."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from clt.launch.bench.common.timing import time_runs

Value = float | bool | str


@dataclass(frozen=True, kw_only=True)
class DeviceCheck:
    """Mode of a check.

    Attributes:
        dry: toy sizes on the CPU, without times.
        backend: of the kernels under test.
    """

    dry: bool
    backend: Literal["auto", "triton"]

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal numbers on the device."""
        return torch.randn(shape, device=self.device).to(dtype)

    def codes(
        self, sources: int, tokens: int, k: int, n_features: int, dtype: torch.dtype, filled: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Random codes.

        Args:
            sources: S.
            tokens: B.
            k: slots per token and source.
            n_features: F.
            dtype: of the values.
            filled: expected share of slots that hold a feature.

        Returns:
            values [S,B,K] and indices [S,B,K] int32, in the order that `clt.kernels.ops` describes.
        """
        parts = []
        for _ in range(sources):  # one source at a time: the scores are the largest tensor
            chosen = torch.rand(tokens, n_features, device=self.device).topk(k, dim=1).indices
            live = torch.rand(tokens, k, device=self.device) < filled
            parts.append(torch.where(live, chosen, n_features).sort(dim=1).values)
        key = torch.stack(parts)
        live = key < n_features
        values = torch.where(live, torch.rand(key.shape, device=self.device) + 0.1, 0)
        return values.to(dtype), torch.where(live, key, 0).int()

    def milliseconds(self, run: Callable[[], object], rounds: int = 10) -> float:
        """Median time of a run with a cold L2 cache; 0 in a dry check, which runs it once."""
        run()
        if self.dry:
            return 0.0
        return 1e3 * time_runs(run, torch.device(self.device), rounds).median_s

    def release(self) -> None:
        """Returns unused memory to the GPU."""
        if not self.dry:
            torch.cuda.empty_cache()


@dataclass(kw_only=True)
class CheckReport:
    """Results of one section: printed line by line, and written as JSON after each.

    Attributes:
        section: name.
        file: of the JSON.
        cases: results by the name of the case.
        failed: a case failed.
    """

    section: str
    file: Path
    cases: dict[str, dict[str, Value]] = field(default_factory=dict)
    failed: bool = False

    def add(self, name: str, **values: Value) -> None:
        """Adds the results of a case."""
        self.cases[name] = values
        shown = (
            f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in values.items()
        )
        print(f"{self.section:9s} {name:44s}", *shown, flush=True)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(self.cases, indent=1), encoding="utf-8")

    @contextmanager
    def case(self, name: str) -> Iterator[None]:
        """Turns an exception into a result, so that the next case runs; prints the seconds of the whole section."""
        start = time.perf_counter()
        try:
            yield
        except Exception as error:
            self.failed = True
            where = traceback.extract_tb(error.__traceback__)[-1]
            reason = (str(error).splitlines() or [""])[0][:150]
            self.add(name, error=f"{type(error).__name__}: {reason} at {Path(where.filename).name}:{where.lineno}")
        if name == "section":
            print(f"{self.section} seconds={time.perf_counter() - start:.1f}", flush=True)
