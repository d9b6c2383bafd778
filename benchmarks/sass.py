"""The loops of a compiled NVIDIA kernel, and what one pass through each of them issues.

A loop is what a branch back encloses and no other loop does. Its hot path is the way through it that meets the most
128-bit accesses and, among those, issues the least: a branch around the tile of the label is taken by every other tile.
"""

import re
import subprocess
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

VECTOR_BYTES = 16
# By the pipe that executes them on sm_90, which the stem of the opcode tells; what is in none is "other".
PIPES = {
    "mufu": {"MUFU"},
    "fma": {"FADD", "FMUL", "FFMA", "IMAD", "FADD2", "FMUL2", "FFMA2", "HFMA2", "HADD2", "HMUL2"},
    "alu": {
        "FMNMX", "FMNMX3", "FSEL", "FSETP", "FSET", "FCHK", "PRMT", "SHF", "SHL", "SHR", "LOP3", "PLOP3", "IADD3",
        "IADD", "VIADD", "VIADDMNMX", "VIMNMX", "IMNMX", "ISETP", "SEL", "LEA", "F2FP", "HMNMX2", "VHMNMX", "HSETP2",
        "IABS", "MOV", "CS2R", "P2R", "R2P",
    },
    "convert": {"I2F", "I2FP", "F2I", "F2F", "FRND", "POPC", "FLO", "BREV"},
    "memory": {"LDG", "STG", "LDS", "STS", "LDL", "STL", "LDC", "SHFL", "ATOMG", "RED", "LDGSTS"},
    "control": {"BRA", "BAR", "BSSY", "BSYNC", "EXIT", "WARPSYNC", "NOP", "YIELD", "CALL", "RET"},
}  # fmt: skip
_PIPE_OF = {stem: pipe for pipe, stems in PIPES.items() for stem in stems}


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
    def pipe(self) -> str:
        """The pipe that executes it. U...: the scalar pipe of a warp; a shift by IMAD goes where IMAD goes."""
        if self.stem not in _PIPE_OF and self.stem.startswith("U"):
            return "uniform"
        return _PIPE_OF.get(self.stem, "other")

    @property
    def is_wide(self) -> bool:
        """A 128-bit access of global memory."""
        return self.stem in ("LDG", "STG") and ".128" in self.opcode


class Loop(NamedTuple):
    """The hot path through a loop."""

    instructions: list[Instruction]
    skipped: int  # instructions of the loop beside the path

    def wide(self, stem: str) -> int:
        """128-bit loads (LDG) or stores (STG) of a thread in one pass."""
        return sum(1 for line in self.instructions if line.is_wide and line.stem == stem)

    def bytes_per_thread(self) -> int:
        """Bytes of logits that a thread asks for in one pass; where it reads none, that it writes."""
        return VECTOR_BYTES * (self.wide("LDG") or self.wide("STG"))

    def elements_per_thread(self, itemsize: int) -> int:
        """Elements of one pass of a thread."""
        return self.bytes_per_thread() // itemsize

    def loads_ahead(self) -> bool:
        """No 128-bit load is waited for in the pass that asks for it: what it brings is read in the next."""
        for place, load in enumerate(self.instructions):
            if load.is_wide and load.stem == "LDG":
                first = int(load.operands[1:].partition(",")[0])
                brought = {f"R{first + n}" for n in range(VECTOR_BYTES // 4)}
                for later in self.instructions[place + 1 :]:
                    written, _, read = later.operands.partition(",")
                    if brought & set(re.findall(r"\bR\d+\b", read if later.stem != "STG" else later.operands)):
                        return False
                    brought -= {written.partition(".")[0]}
        return True

    def pipes(self) -> Counter[str]:
        """Issue slots of one pass by pipe."""
        return Counter(line.pipe for line in self.instructions)

    def opcodes(self) -> Counter[str]:
        """The same by opcode without modifiers."""
        return Counter(line.stem for line in self.instructions)


def parse(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """Instructions of a disassembly, and the place of every label."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        line = re.sub(r"/\*.*?\*/", "", line).strip()
        if label := re.fullmatch(r"(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.fullmatch(r"\{?\s*(@!?\w+)?\s*([A-Z][A-Z0-9_.]*)\s*(.*?)\s*;\s*\}?", line):
            instructions.append(Instruction(found[1] or "", found[2], found[3]))
    return instructions, labels


def _followers(instructions: list[Instruction], labels: dict[str, int], place: int) -> list[int]:
    """Where control may go from an instruction."""
    line = instructions[place]
    always = not line.predicate and "UP" not in line.operands and ".DIV" not in line.opcode
    after = [] if line.stem in ("BRA", "EXIT") and always else [place + 1]
    if line.stem == "BRA":
        target = re.search(r"\.L_\w+", line.operands)
        assert target is not None, line
        after.append(labels[target[0]])
    return [follower for follower in after if follower < len(instructions)]


def _members(before: dict[int, list[int]], head: int, latch: int) -> set[int]:
    """The natural loop of a branch from latch back to head."""
    members, rest = {head, latch}, [latch]
    while rest:
        place = rest.pop()
        if place == head:
            continue
        for earlier in before.get(place, ()):
            if earlier not in members:
                members.add(earlier)
                rest.append(earlier)
    return members


def loops(text: str) -> list[Loop]:
    """The innermost loops of a disassembly that access global memory 128 bits at a time, in their order."""
    instructions, labels = parse(text)
    after = [_followers(instructions, labels, place) for place in range(len(instructions))]
    before: dict[int, list[int]] = {}
    for place, followers in enumerate(after):
        for follower in followers:
            before.setdefault(follower, []).append(place)
    heads: dict[int, set[int]] = {}
    latches: dict[int, set[int]] = {}
    for place, followers in enumerate(after):
        for head in followers:
            members = _members(before, head, place) if head <= place else set()
            if members and min(members) >= head and head != place:
                heads.setdefault(head, set()).update(members)
                latches.setdefault(head, set()).add(place)
    found = []
    for head, members in sorted(heads.items()):
        if any(other != head and heads[other] < members for other in heads):
            continue
        path = _hot_path(instructions, after, head, members, latches[head])
        if any(line.is_wide for line in path):
            found.append(Loop(path, len(members) - len(path)))
    return found


def _hot_path(
    instructions: list[Instruction], after: list[list[int]], head: int, members: set[int], latches: set[int]
) -> list[Instruction]:
    """From head to a latch: the most 128-bit accesses, then the fewest instructions."""

    @cache
    def best(place: int) -> tuple[int, int, tuple[int, ...]] | None:
        """Wide accesses, minus instructions, places: of the best way from here."""
        ways = [way for next_ in after[place] if next_ in members and next_ > place and (way := best(next_))]
        if place in latches:
            ways.append((0, 0, ()))
        if not ways:
            return None
        wide, cost, path = max(ways, key=lambda way: way[:2])
        return wide + instructions[place].is_wide, cost - 1, (place, *path)

    # From the end, so that no call goes deeper than one instruction.
    for place in sorted(members, reverse=True):
        best(place)
    way = best(head)
    assert way is not None
    return [instructions[place] for place in way[2]]


def disassemble(kernel: Any) -> str:
    """The SASS of a kernel that Triton has compiled."""
    return _run_tool("nvdisasm", kernel, "-c")


def resources(kernel: Any) -> dict[str, int]:
    """Registers and bytes of stack and spills of a thread; bytes of shared memory of a block."""
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
