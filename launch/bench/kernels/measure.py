"""Runs the rivals of one operation: checks what they compute, then times them.

On a CPU they take turns round after round, since the machine's other work comes and goes. On a GPU, which is otherwise
idle and whose memory would not hold everyone at once, each is timed by device events in rounds of its own, with the L2
cache filled with something else before each run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from clt.launch.bench.common.timing import Rival, Timing, interleave
from clt.launch.bench.kernels.work import Work

#: Written before each run on a GPU; several times its L2 cache.
_FLUSH_BYTES = 512 * 2**20


def _nothing() -> None:
    return


@dataclass(frozen=True, kw_only=True)
class Runner:
    """A rival that is set up.

    Attributes:
        run: the work; gives tensors, or tuples and lists of them.
        start: puts back what the work changes in place, so that two runs can be compared; not timed.
    """

    run: Callable[[], Any]
    start: Callable[[], object] = _nothing


@dataclass(frozen=True, kw_only=True)
class Contender:
    """Someone who does the work.

    Attributes:
        name: what the table calls it.
        make: sets it up; what it allocates is freed after its table.
        may_fail: report its failure in the table instead of ending the benchmark: code of other projects.
        error: relative error of its results against float64, where not that of the case.
    """

    name: str
    make: Callable[[], Runner]
    may_fail: bool = False
    error: Callable[[Any], float] | None = None


@dataclass(frozen=True, kw_only=True)
class Case:
    """One operation on one problem.

    Attributes:
        op: its name.
        title: what is done.
        works: what has to be done, as a sequence of operations.
        contenders: who does it; the first is ours.
        error: relative error of results against float64; None where there is no such reference.
    """

    op: str
    title: str
    works: tuple[Work, ...]
    contenders: tuple[Contender, ...]
    error: Callable[[Any], float] | None = None


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What was measured of one contender.

    Attributes:
        name: who.
        timing: its rounds; None if it could not run.
        error: relative error against float64, if there is a reference.
        repeats: whether two runs gave the same bits.
        peak_bytes: device memory that a run takes beside its inputs; None on a CPU.
        absent: why it could not run.
    """

    name: str
    timing: Timing | None = None
    error: float | None = None
    repeats: bool | None = None
    peak_bytes: int | None = None
    absent: str | None = None


def relative_error(out: Tensor, reference: Tensor) -> float:
    """Norm of the difference over the norm of the reference; NaN stays NaN."""
    reference = reference.double()
    return float((out.double() - reference).norm() / reference.norm())


def measure(case: Case, device: torch.device, rounds: int, tolerance: float) -> tuple[Sample, ...]:
    """Checks everyone and times those whose results are right.

    Args:
        case: the operation.
        device: where its tensors lie.
        rounds: rounds per contender, > 0.
        tolerance: relative error beyond which a result counts as wrong.

    Returns:
        One sample per contender, in their order.
    """
    if device.type == "cuda":
        return tuple(_measure_alone(contender, case, device, rounds, tolerance) for contender in case.contenders)
    checked = [_set_up(contender, case, device, tolerance) for contender in case.contenders]
    rivals = [Rival(name=sample.name, run=runner.run) for runner, sample in checked if runner is not None]
    timings = interleave(rivals, rounds) if rivals else {}
    return tuple(_timed(sample, timings.get(sample.name)) for _, sample in checked)


def _measure_alone(contender: Contender, case: Case, device: torch.device, rounds: int, tolerance: float) -> Sample:
    runner, sample = _set_up(contender, case, device, tolerance)
    timing = None if runner is None else time_runs(runner.run, device, rounds)
    del runner
    torch.cuda.empty_cache()
    return _timed(sample, timing)


def _timed(sample: Sample, timing: Timing | None) -> Sample:
    return replace(sample, timing=timing)


def _set_up(contender: Contender, case: Case, device: torch.device, tolerance: float) -> tuple[Runner | None, Sample]:
    try:
        runner = contender.make()
        sample = _check(contender, runner, case, device)
        # NaN is wrong too.
        if sample.error is not None and not sample.error <= tolerance:
            return None, replace(sample, absent=f"wrong: relative error {sample.error:.1e}")
        return runner, sample
    except torch.OutOfMemoryError:
        return None, Sample(name=contender.name, absent="out of memory")
    except Exception as error:  # whatever another project's code raises is its result
        if not contender.may_fail:
            raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        return None, Sample(name=contender.name, absent=reason)


def _check(contender: Contender, runner: Runner, case: Case, device: torch.device) -> Sample:
    """Two runs from the same start, compared bit by bit and with float64; they also warm everything up."""
    runner.start()
    base = _reset_peak(device)
    outputs = runner.run()
    peak = _peak(device, base)
    error_of = contender.error or case.error
    error = None if error_of is None else error_of(outputs)
    first = [tensor.detach().clone() for tensor in _tensors(outputs)]
    del outputs
    runner.start()
    repeats = all(_same_bits(one, other) for one, other in zip(first, _tensors(runner.run()), strict=True))
    return Sample(name=contender.name, error=error, repeats=repeats, peak_bytes=peak)


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


def time_runs(run: Callable[[], Any], device: torch.device, rounds: int) -> Timing:
    """Times work that was run before: by events on a GPU (no CPU seconds), by the clock on a CPU."""
    if device.type != "cuda":
        return interleave([Rival(name="", run=run)], rounds)[""]
    flush = torch.empty(_FLUSH_BYTES // 4, dtype=torch.int32, device=device)
    pairs = []
    for _ in range(rounds):
        # The flush keeps the device busy while the launches of the run queue up behind it.
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize(device)
    return Timing(wall_s=tuple(start.elapsed_time(end) / 1e3 for start, end in pairs), cpu_s=())


def graphed(runner: Runner) -> Runner:
    """The same work as one CUDA graph; its launches cost next to nothing.

    Args:
        runner: work without host synchronisation whose inputs stay where they are.

    Returns:
        The replay; its results lie in the same tensors every time.
    """
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
