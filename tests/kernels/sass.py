"""Parser of NVIDIA's disassembly that counts loads, barriers and spills inside loops."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

_LABEL = re.compile(r"^\s*([.$\w]+):\s*$")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.\w+)*)\s*([^;]*);")
_TARGET = re.compile(r"`\((\.L_\w+)\)")


@dataclass(frozen=True)
class Instruction:
    """One machine instruction; `goes_on` is whether the next one can follow it, `target` where it may jump to."""

    name: str
    modifiers: tuple[str, ...]
    goes_on: bool
    target: str | None


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Instructions of a stretch of code.

    Attributes:
        instructions: all of it.
        wide: global loads of 16 bytes a lane.
        medium: of 8 bytes.
        narrow: of 4 bytes or fewer, one number for all lanes or a bad layout.
        barriers: waits for the other warps of a program.
        local: loads and stores of spilled registers.
        atomics: atomic updates of global memory.
        tensor_cores: warp-group matrix products.
        shuffles: exchanges between lanes.
    """

    instructions: int
    wide: int
    medium: int
    narrow: int
    barriers: int
    local: int
    atomics: int
    tensor_cores: int
    shuffles: int


@dataclass(frozen=True, kw_only=True)
class Code:
    """A kernel's disassembly: all of it, and every outermost loop."""

    whole: Counts
    loops: list[Counts] = field(default_factory=list)


def read_sass(text: str) -> Code:
    """Counts of one kernel and of its loops, from what `nvdisasm -c` printed."""
    instructions, labels = _parse(text)
    loops = [loop for loop in _cycles(_successors(instructions, labels)) if len(loop) > 1]
    return Code(
        whole=_count(instructions), loops=[_count([instructions[i] for i in sorted(loop)]) for loop in sorted(loops)]
    )


def _parse(text: str) -> tuple[list[Instruction], dict[str, int]]:
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if found := _LABEL.match(line):
            labels[found[1]] = len(instructions)
        elif found := _INSTRUCTION.search(line):
            predicate, opcode, operands = found[1], found[2], found[3]
            name, *modifiers = opcode.split(".")
            target = _TARGET.search(operands)
            # A branch on a uniform predicate names it among its operands: BRA.U UP0, `(.L_x_1)
            conditional = predicate is not None or (name == "BRA" and not operands.strip().startswith("`"))
            instructions.append(
                Instruction(
                    name=name,
                    modifiers=tuple(modifiers),
                    goes_on=conditional or name not in ("BRA", "EXIT", "RET", "BRX", "JMP"),
                    # BSSY names the place where lanes meet again; nothing jumps there.
                    target=target[1] if target and name in ("BRA", "CALL") else None,
                )
            )
    return instructions, labels


def _successors(instructions: list[Instruction], labels: dict[str, int]) -> list[list[int]]:
    following = []
    for place, instruction in enumerate(instructions):
        after = [place + 1] if instruction.goes_on and place + 1 < len(instructions) else []
        if instruction.target is not None:
            after.append(labels[instruction.target])
        following.append(after)
    return following


def _cycles(successors: list[list[int]]) -> list[list[int]]:
    """Strongly connected parts of the control flow (Tarjan's algorithm without recursion): the outermost loops."""
    index: dict[int, int] = {}
    low: dict[int, int] = {}
    stack: list[int] = []
    waiting: set[int] = set()
    parts: list[list[int]] = []
    for root in range(len(successors)):
        work = [(root, 0)] if root not in index else []
        while work:
            node, edge = work.pop()
            if edge == 0:
                index[node] = low[node] = len(index)
                stack.append(node)
                waiting.add(node)
            if edge < len(successors[node]):
                work.append((node, edge + 1))
                following = successors[node][edge]
                if following not in index:
                    work.append((following, 0))
                elif following in waiting:
                    low[node] = min(low[node], index[following])
                continue
            if work:
                low[work[-1][0]] = min(low[work[-1][0]], low[node])
            if low[node] == index[node]:
                cut = stack.index(node)
                parts.append(stack[cut:])
                waiting.difference_update(stack[cut:])
                del stack[cut:]
    return parts


def _count(code: list[Instruction]) -> Counts:
    def number(test: Callable[[Instruction], bool]) -> int:
        return sum(map(test, code))

    def loads(*sizes: str) -> int:
        return number(lambda i: i.name == "LDG" and any(size in i.modifiers for size in sizes))

    return Counts(
        instructions=len(code),
        wide=loads("128"),
        medium=loads("64"),
        narrow=number(lambda i: i.name == "LDG") - loads("128", "64"),
        barriers=number(lambda i: i.name == "BAR"),
        local=number(lambda i: i.name in ("LDL", "STL")),
        atomics=number(lambda i: i.name in ("ATOM", "ATOMG", "RED", "REDG")),
        tensor_cores=number(lambda i: i.name == "HGMMA"),
        shuffles=number(lambda i: i.name == "SHFL"),
    )
