"""The innermost loops of a compiled NVIDIA kernel, and the instructions of one pass through each.

The hot path of a loop is the one with the most 128-bit accesses and, among those, the fewest instructions: a branch
around the label's tile is taken in all other tiles.
"""

import re
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

VECTOR_BYTES = 16
# The opcodes that two pipes of sm_90 execute, without modifiers; the others never bind these kernels.
PIPES = {
    "mufu": {"MUFU"},
    "alu": {
        "FMNMX", "FMNMX3", "FSEL", "FSETP", "FSET", "FCHK", "PRMT", "SHF", "SHL", "SHR", "LOP3", "PLOP3", "IADD3",
        "IADD", "VIADD", "VIADDMNMX", "VIMNMX", "IMNMX", "ISETP", "SEL", "LEA", "F2FP", "HMNMX2", "VHMNMX", "HSETP2",
        "IABS", "MOV", "CS2R", "P2R", "R2P",
    },
}  # fmt: skip


class Instruction(NamedTuple):
    """One line of a disassembly: `@!P0 LDG.E.128 R4, ...` has opcode LDG.E.128."""

    predicate: str
    opcode: str
    operands: str

    @property
    def stem(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def is_wide(self) -> bool:
        """A 128-bit access of global memory."""
        return self.stem in ("LDG", "STG") and ".128" in self.opcode


class Loop(NamedTuple):
    """The hot path through a loop."""

    instructions: list[Instruction]

    def wide(self, stem: str) -> int:
        """128-bit loads (LDG) or stores (STG) of a thread in one pass."""
        return sum(1 for line in self.instructions if line.is_wide and line.stem == stem)

    def bytes_per_thread(self) -> int:
        """Bytes of logits that a thread reads in one pass; or writes, where it reads none."""
        return VECTOR_BYTES * (self.wide("LDG") or self.wide("STG"))

    def elements_per_thread(self, itemsize: int) -> int:
        """Elements of one pass of a thread."""
        return self.bytes_per_thread() // itemsize

    def loads_ahead(self) -> bool:
        """Whether every 128-bit load is first used in the pass after the one that issues it."""
        for at, load in enumerate(self.instructions):
            if load.is_wide and load.stem == "LDG":
                first = int(load.operands[1:].partition(",")[0])
                brought = {f"R{first + n}" for n in range(VECTOR_BYTES // 4)}
                for later in self.instructions[at + 1 :]:
                    written, _, read = later.operands.partition(",")
                    if brought & set(re.findall(r"\bR\d+\b", read if later.stem != "STG" else later.operands)):
                        return False
                    brought -= {written.partition(".")[0]}
        return True

    def count(self, pipe: str) -> int:
        """Instructions of one pass that a pipe executes."""
        return sum(line.stem in PIPES[pipe] for line in self.instructions)


def parse(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """Return the instructions of a disassembly, and the index of every label."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        line = re.sub(r"/\*.*?\*/", "", line).strip()
        if label := re.fullmatch(r"(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.fullmatch(r"\{?\s*(@!?\w+)?\s*([A-Z][A-Z0-9_.]*)\s*(.*?)\s*;\s*\}?", line):
            instructions.append(Instruction(found[1] or "", found[2], found[3]))
    return instructions, labels


def _followers(instructions: list[Instruction], labels: dict[str, int], at: int) -> list[int]:
    """Return the indices that control may reach from an instruction."""
    line = instructions[at]
    always = not line.predicate and "UP" not in line.operands and ".DIV" not in line.opcode
    after = [] if line.stem in ("BRA", "EXIT") and always else [at + 1]
    if line.stem == "BRA":
        target = re.search(r"\.L_\w+", line.operands)
        assert target is not None, line
        after.append(labels[target[0]])
    return [follower for follower in after if follower < len(instructions)]


def _members(before: dict[int, list[int]], head: int, latch: int) -> set[int]:
    """Return the natural loop of a branch from latch back to head."""
    members, rest = {head, latch}, [latch]
    while rest:
        at = rest.pop()
        if at == head:
            continue
        for earlier in before.get(at, ()):
            if earlier not in members:
                members.add(earlier)
                rest.append(earlier)
    return members


def loops(text: str) -> list[Loop]:
    """Return the innermost loops of a disassembly that access global memory 128 bits at a time, in order."""
    instructions, labels = parse(text)
    after = [_followers(instructions, labels, at) for at in range(len(instructions))]
    before: dict[int, list[int]] = {}
    for at, followers in enumerate(after):
        for follower in followers:
            before.setdefault(follower, []).append(at)
    heads: dict[int, set[int]] = {}
    latches: dict[int, set[int]] = {}
    for at, followers in enumerate(after):
        for head in followers:
            members = _members(before, head, at) if head <= at else set()
            if members and min(members) >= head and head != at:
                heads.setdefault(head, set()).update(members)
                latches.setdefault(head, set()).add(at)
    innermost = []
    for head, members in sorted(heads.items()):
        if any(other != head and heads[other] < members for other in heads):
            continue
        path = _hot_path(instructions, after, head, members, latches[head])
        if any(line.is_wide for line in path):
            innermost.append(Loop(path))
    return innermost


def _hot_path(
    instructions: list[Instruction], after: list[list[int]], head: int, members: set[int], latches: set[int]
) -> list[Instruction]:
    """Return the path from head to a latch with the most 128-bit accesses, then the fewest instructions."""

    @cache
    def best(at: int) -> tuple[int, int, tuple[int, ...]] | None:
        """Wide accesses, minus instructions, indices: of the best path from here."""
        ways = [way for next_ in after[at] if next_ in members and next_ > at and (way := best(next_))]
        if at in latches:
            ways.append((0, 0, ()))
        if not ways:
            return None
        wide, cost, path = max(ways, key=lambda way: way[:2])
        return wide + instructions[at].is_wide, cost - 1, (at, *path)

    # From the end, so that no call recurses deeper than one instruction.
    for at in sorted(members, reverse=True):
        best(at)
    way = best(head)
    assert way is not None
    return [instructions[at] for at in way[2]]


def disassemble(kernel: Any) -> str:
    """Return the SASS of a kernel that Triton has compiled."""
    return _run_tool("nvdisasm", kernel, "-c")


def resources(kernel: Any) -> dict[str, int]:
    """Return registers, stack and spills of a thread, and bytes of shared memory of a block."""
    text = _run_tool("cuobjdump", kernel, "--dump-resource-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
    assert found is not None, text
    registers, stack, static, local = map(int, found.groups())
    return {"registers": registers, "stack": stack, "spills": local, "shared": static + int(kernel.metadata.shared)}


def _run_tool(name: str, kernel: Any, *options: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        return subprocess.run([tool, *options, cubin.name], capture_output=True, text=True, check=True).stdout
