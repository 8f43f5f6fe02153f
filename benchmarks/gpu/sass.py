"""Machine code of a kernel as the disassembler prints it: instructions, loops, and what a thread executes of them."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", re.MULTILINE)
# A jump, its predicate, its modifiers and its target.
JUMP = re.compile(r"^(@!?U?P\d+ )?BRA(\.\S+)? (?:.*, ?)?0x([0-9a-f]+)$")
USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
# Loads, matrix products and arithmetic of floats: a loop without any of them does no work and is left out.
WORK = re.compile(r"^(@!?U?P\d+ )?(LDG|LDS|[A-Z]*MMA|FADD|FFMA|DFMA|DADD)")
BYTES = 16


@dataclass
class Loop:
    """A natural loop: instructions, and loads among them, that are in no inner loop, and the inner loops."""

    start: int
    own: int
    loads: int
    inner: list[Loop] = field(default_factory=list)

    def size(self) -> int:
        """Instructions of the whole body."""
        return self.own + sum(loop.size() for loop in self.inner)


@dataclass
class Code:
    """Instructions outside of all loops, and the outermost loops."""

    own: int
    loops: list[Loop]

    def size(self) -> int:
        """Instructions that can be reached."""
        return self.own + sum(loop.size() for loop in self.loops)


def usage(cuobjdump: Path, cubin: bytes) -> dict[str, int]:
    """Registers, bytes of stack and local memory of a thread."""
    found = USAGE.search(_run(cuobjdump, "-res-usage", cubin))
    registers, stack, _, local = (int(number) for number in found.groups())
    return {"registers": registers, "stack": stack, "local": local}


def code(cuobjdump: Path, cubin: bytes) -> Code:
    """The kernel's instructions by loop; a cubin holds one kernel."""
    return loops_of(_run(cuobjdump, "-sass", cubin))


def _run(cuobjdump: Path, flag: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        done = subprocess.run([cuobjdump, flag, file.name], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def loops_of(text: str) -> Code:
    """The loops of disassembled code, from its jumps: every edge to a block that dominates its source closes one.

    What a call or a jump of diverged warps leads to (division of denormal numbers, reconverging) is left out.
    """
    code = [(int(address, 16), operation) for address, operation in INSTRUCTION.findall(text)]
    jumps = {address: JUMP.match(operation) for address, operation in code}
    jumps = {address: jump for address, jump in jumps.items() if jump and jump[2] != ".DIV"}
    leaders = {code[0][0]} | {int(jump[3], 16) for jump in jumps.values()}
    ends = {address for address, operation in code if address in jumps or "EXIT" in operation}
    leaders |= {address + BYTES for address in ends}
    blocks: dict[int, list[tuple[int, str]]] = {}
    for address, operation in code:
        if address in leaders:
            start = address
        blocks.setdefault(start, []).append((address, operation))
    following = {start: _next(block, jumps, blocks) for start, block in blocks.items()}
    reached = _reached(following, code[0][0])
    dominators = {block: reached - _reached(following, code[0][0], without=block) for block in reached}
    bodies: dict[int, set[int]] = {}
    for block in reached:
        for header in following[block]:
            if block in dominators[header]:
                bodies.setdefault(header, {header}).update(_reaching(following, block, header, reached))
    sizes = {start: sum(operation != "NOP" for _, operation in blocks[start]) for start in reached}
    loads = {start: sum("LDG" in operation for _, operation in blocks[start]) for start in reached}
    bodies = {
        header: body
        for header, body in bodies.items()
        if any(WORK.match(operation) for block in body for _, operation in blocks[block])
    }
    inside = set().union(*bodies.values()) if bodies else set()
    return Code(sum(sizes[block] for block in reached - inside), _nest(bodies, sizes, loads))


def _next(block: list[tuple[int, str]], jumps: dict[int, re.Match], blocks: dict[int, object]) -> list[int]:
    address, operation = block[-1]
    jump = jumps.get(address)
    targets = [int(jump[3], 16)] if jump else []
    # A second predicate, as in "@P0 BRA P1, 0x10", stands between the two as well.
    conditional = operation.startswith("@") or (jump is not None and re.search(r" !?P\d", operation))
    ends = jump is not None or "EXIT" in operation
    if (conditional or not ends) and address + BYTES in blocks:
        targets.append(address + BYTES)
    return targets


def _reached(following: dict[int, list[int]], start: int, without: int | None = None) -> set[int]:
    found: set[int] = set()
    waiting = [start]
    while waiting:
        block = waiting.pop()
        if block not in found and block != without:
            found.add(block)
            waiting += following[block]
    return found


def _reaching(following: dict[int, list[int]], end: int, header: int, among: set[int]) -> set[int]:
    """Blocks from which `end` is reached without passing `header`."""
    before: dict[int, list[int]] = {}
    for block in among:
        for target in following[block]:
            before.setdefault(target, []).append(block)
    return _reached({block: before.get(block, []) for block in among}, end, without=header)


def _nest(bodies: dict[int, set[int]], sizes: dict[int, int], loads: dict[int, int]) -> list[Loop]:
    loops = []
    for header in sorted(bodies):
        around = [other for other in bodies if other != header and header in bodies[other]]
        if not around:
            inner = {h: b for h, b in bodies.items() if h != header and h in bodies[header]}
            held = set().union(*inner.values()) if inner else set()
            own, loaded = (sum(of[block] for block in bodies[header] - held) for of in (sizes, loads))
            loops.append(Loop(header, own, loaded, _nest(inner, sizes, loads)))
    return loops


def executed(code: Code, trips: list) -> int:
    """Instructions of one thread where `trips` nests like the loops: [(trips, [inner trips ..]), ..]."""
    return code.own + _executed(code.loops, trips)


def _executed(loops: list[Loop], trips: list) -> int:
    return sum(
        (count // times) * (loop.own + _executed(loop.inner, inner))
        + (count % times) * (rest.own if rest else 0)
        for (loop, rest, times), (count, inner) in zip(paired(loops, len(trips)), trips, strict=True)
    )


def paired(loops: list[Loop], count: int) -> list[tuple[Loop, Loop | None, int]]:
    """The loops of the source: (loop, None, 1), or (loop, loop of the trips left over, how often it was unrolled).

    Of more loops than the source has, an innermost one that loads a multiple of what the next one loads is its unrolled
    form. Raises ValueError where that does not leave `count` loops.
    """
    found: list[tuple[Loop, Loop | None, int]] = []
    position = 0
    while position < len(loops):
        loop, rest = loops[position], loops[position + 1] if position + 1 < len(loops) else None
        left = len(loops) - position > count - len(found)
        unrolled = left and rest and not loop.inner and rest.loads and loop.loads > rest.loads
        if unrolled and loop.loads % rest.loads == 0:
            found.append((loop, rest, loop.loads // rest.loads))
            position += 2
        else:
            found.append((loop, None, 1))
            position += 1
    if len(found) != count:
        raise ValueError(f"{len(found)} loops where {count} were expected")
    return found
