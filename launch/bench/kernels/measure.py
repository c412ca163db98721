"""Checks the results of all implementations of an operation, then times them.

On a CPU they run in turns (`clt.launch.bench.common.timing`), since the load of the machine varies. On a GPU, which is
otherwise idle and whose memory may not hold all of them at once, each is timed alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from clt.launch.bench.common.timing import TimedRun, Timing, interleave, nothing, time_runs
from clt.launch.bench.kernels.roofline import Workload


@dataclass(frozen=True, kw_only=True)
class Runner:
    """An implementation with its inputs.

    Attributes:
        run: the work; returns tensors, or tuples and lists of them.
        start: restores what the work changes in place, so that two runs can be compared; not timed.
    """

    run: Callable[[], Any]
    start: Callable[[], object] = nothing


@dataclass(frozen=True, kw_only=True)
class Implementation:
    """A way to compute an operation.

    Attributes:
        name: row of the table.
        make: allocates its tensors, which are freed after its table.
        may_fail: whether its failure is a row of the table instead of an error; for code of other projects.
        error: relative error of its results against float64; default: that of the case.
    """

    name: str
    make: Callable[[], Runner]
    may_fail: bool = False
    error: Callable[[Any], float] | None = None

    @classmethod
    def of(cls, name: str, run: Callable[[], Any]) -> Implementation:
        """An implementation that needs no tensors of its own."""
        return cls(name=name, make=lambda: Runner(run=run))


@dataclass(frozen=True, kw_only=True)
class Case:
    """One operation on given inputs.

    Attributes:
        op: its name.
        title: its description.
        works: the work, as a sequence of operations.
        implementations: ours first.
        error: relative error of results against float64; None where there is no such reference.
    """

    op: str
    title: str
    works: tuple[Workload, ...]
    implementations: tuple[Implementation, ...]
    error: Callable[[Any], float] | None = None


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Result of one implementation.

    Attributes:
        name: of the implementation.
        timing: its rounds; None if it could not run.
        error: relative error against float64, if there is a reference.
        repeats: whether two runs gave the same bits.
        peak_bytes: device memory of a run beside its inputs; None on a CPU.
        absent: reason why it could not run, or None.
    """

    name: str
    timing: Timing | None = None
    error: float | None = None
    repeats: bool | None = None
    peak_bytes: int | None = None
    absent: str | None = None


def relative_error(out: Tensor, reference: Tensor) -> float:
    """Norm of the difference over the norm of the reference; NaN if any value is NaN."""
    reference = reference.double()
    return float((out.double() - reference).norm() / reference.norm())


def measure(case: Case, device: torch.device, rounds: int, tolerance: float) -> tuple[Measurement, ...]:
    """Checks all implementations and times those whose results are right.

    Args:
        case: the operation.
        device: of its tensors.
        rounds: rounds per implementation, > 0.
        tolerance: relative error above which a result counts as wrong.

    Returns:
        One measurement per implementation, in their order.
    """
    if device.type == "cuda":
        return tuple(_measure_alone(each, case, device, rounds, tolerance) for each in case.implementations)
    checked = [_set_up(each, case, device, tolerance) for each in case.implementations]
    runs = [TimedRun(name=found.name, run=runner.run) for runner, found in checked if runner is not None]
    timings = interleave(runs, rounds) if runs else {}
    return tuple(replace(found, timing=timings.get(found.name)) for _, found in checked)


def _measure_alone(
    implementation: Implementation, case: Case, device: torch.device, rounds: int, tolerance: float
) -> Measurement:
    runner, found = _set_up(implementation, case, device, tolerance)
    timing = None if runner is None else time_runs(runner.run, device, rounds)
    del runner
    torch.cuda.empty_cache()
    return replace(found, timing=timing)


def _set_up(
    implementation: Implementation, case: Case, device: torch.device, tolerance: float
) -> tuple[Runner | None, Measurement]:
    """The runner and its check; no runner if it failed or its result is wrong."""
    try:
        runner = implementation.make()
        found = _check(implementation, runner, case, device)
        # NaN is wrong too.
        if found.error is not None and not found.error <= tolerance:
            return None, replace(found, absent=f"wrong: relative error {found.error:.1e}")
        return runner, found
    except torch.OutOfMemoryError:
        return None, Measurement(name=implementation.name, absent="out of memory")
    except Exception as error:  # any error of another project's code is its result
        if not implementation.may_fail:
            raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        return None, Measurement(name=implementation.name, absent=reason)


def _check(implementation: Implementation, runner: Runner, case: Case, device: torch.device) -> Measurement:
    """Compares two runs bit by bit and with float64; they also warm up."""
    runner.start()
    base = _reset_peak(device)
    outputs = runner.run()
    peak = _peak(device, base)
    error_of = implementation.error or case.error
    error = None if error_of is None else error_of(outputs)
    first = [tensor.detach().clone() for tensor in _tensors(outputs)]
    del outputs
    runner.start()
    repeats = all(_same_bits(one, other) for one, other in zip(first, _tensors(runner.run()), strict=True))
    return Measurement(name=implementation.name, error=error, repeats=repeats, peak_bytes=peak)


def _tensors(outputs: Any) -> Iterator[Tensor]:
    if isinstance(outputs, Tensor):
        yield outputs
        return
    for output in outputs:
        yield from _tensors(output)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return torch.equal(one.contiguous().view(kind), other.detach().contiguous().view(kind))


def _reset_peak(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _peak(device: torch.device, base: int) -> int | None:
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - base


def graphed(runner: Runner) -> Runner:
    """Captures work without host synchronisation as one CUDA graph, whose replays write to the same tensors."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            runner.run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = runner.run()

    def replay() -> Any:
        graph.replay()
        return outputs

    return Runner(run=replay, start=runner.start)
