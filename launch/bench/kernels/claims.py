"""What the project promises of its kernels, judged by the best rounds where they were measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from clt.launch.bench.common.report import Claim, claim
from clt.launch.bench.kernels.backward import TWO_PASSES, TWO_PASSES_BAG
from clt.launch.bench.kernels.forward import OURS, TORCH_TOPK
from clt.launch.bench.kernels.report import Table
from clt.launch.bench.kernels.step import FORWARD_BACKWARD, STEP

#: Sizes at which a GPU is judged, and the size at which a CPU is.
GPU_SIZES, CPU_SIZE = ("A", "B"), "cpu"
#: How the tables call EleutherAI's kernels, whichever checkout they come from.
ELEUTHER = "EleutherAI"


def kernel_claims(tables: Sequence[Table], device: str) -> tuple[Claim, ...]:
    """Judges all promises.

    Args:
        tables: what was measured.
        device: "cuda" or "cpu", on which it was.

    Returns:
        One claim per promise and table; one without a measurement where no table has what it takes.
    """
    gpu, cpu = (tables, ()) if device == "cuda" else ((), tables)
    judged = [table for table in gpu if table.size in GPU_SIZES]
    wide, narrow = ([table for table in judged if table.size == size] for size in GPU_SIZES)
    peer = "against EleutherAI's kernels"
    return (
        *_promises(narrow, "encode_topk", "GPU, D=768: encode, against product and torch.topk", 1.6, _over(TORCH_TOPK)),
        *_promises(wide, "encode_topk", "GPU, D=4096: encode, against product and torch.topk", 1.15, _over(TORCH_TOPK)),
        *_promises(judged, "decode", "GPU: gather of decode, the better of TB/s / 6 and roofline / 0.75", 1, _gather),
        *_promises(
            judged, "decoder_grad", "GPU: fused backward, against two passes", 2, _over(TWO_PASSES, TWO_PASSES_BAG)
        ),
        *_promises(judged, FORWARD_BACKWARD, f"GPU: forward and backward, {peer}", 1.5, _over(ELEUTHER)),
        *_promises(judged, STEP, f"GPU: step with optimizer, {peer} and torch's Adam", 3, _over(ELEUTHER)),
        *_cpu_promises([table for table in cpu if table.size == CPU_SIZE]),
    )


def _cpu_promises(tables: Sequence[Table]) -> list[Claim]:
    where = "CPU, D=768 F=16384 k=32"
    return [
        *_promises(tables, FORWARD_BACKWARD, f"{where}: forward and backward, against dense", 1, _over("dense")),
        *_promises(tables, STEP, f"{where}: step with optimizer, against dense and torch's Adam", 1, _over("dense")),
    ]


#: What is divided by what in a table; None where it was not measured.
Ratio = Callable[[Table], tuple[float | None, float | None]]


def _promises(tables: Sequence[Table], op: str, text: str, bound: float, ratio: Ratio) -> list[Claim]:
    claims = []
    for table in tables:
        if table.op == op:
            claims.append(claim(f"{table.size}/{table.distribution}: {text}", *ratio(table), ">=", bound))
    if all(entry.measured is None for entry in claims):
        return [claim(text, None, None, ">=", bound)]
    return claims


def _over(*rivals: str) -> Ratio:
    """Best time of the fastest of some rivals, by the beginning of their names, over ours, the first row of all."""

    def ratio(table: Table) -> tuple[float | None, float | None]:
        ours = [row.ms for row in table.rows if row.name.startswith(OURS)][:1]
        theirs = [row.ms for row in table.rows if row.name.startswith(rivals) and row.ms is not None]
        return min(theirs, default=None), ours[0]

    return ratio


def _gather(table: Table) -> tuple[float | None, float | None]:
    row = table.rows[0]
    if row.ms is None or row.roofline is None:
        return None, None
    return max(table.gather_bytes / (row.ms / 1e3) / 6e12, row.roofline / 0.75), 1.0
