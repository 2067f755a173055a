"""Reads disassembled machine code (SASS): hides its syntax, and how loops are found in it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

LABEL = re.compile(r"\s*(\.L_x_\d+):")
INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][A-Za-z0-9_.]*)\s*(.*?)\s*;")
TARGET = re.compile(r"`\((\.L_x_\d+)\)")
ENDS = ("EXIT", "RET")
JUMPS = ("BRA", "CALL")
"""A call is a far jump where it goes to a label of the same function, which is how ptxas moves rare code away."""


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        opcode: With its modifiers, as in `HMMA.16816.F32.BF16`.
        operands: As they are printed.
        target: The index of the instruction that it may jump to, if it is a jump.
        falls_through: Whether the next instruction may follow.
    """

    opcode: str
    operands: str
    target: int | None = None
    falls_through: bool = True

    @property
    def base(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.partition(".")[0]


def parse(disassembly: str) -> list[Instruction]:
    """Returns the instructions of the only kernel of a `nvdisasm -c` listing."""
    labels: dict[str, int] = {}
    lines: list[tuple[str | None, str, str]] = []
    for line in disassembly.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(lines)
        elif instruction := INSTRUCTION.match(line):
            lines.append((instruction[1], instruction[2], instruction[3]))
    if not lines:
        raise ValueError(f"disassembly: expected instructions, got {disassembly[:200]!r}")
    return [_instruction(predicate, opcode, operands, labels) for predicate, opcode, operands in lines]


def _instruction(predicate: str | None, opcode: str, operands: str, labels: dict[str, int]) -> Instruction:
    base = opcode.partition(".")[0]
    target = TARGET.search(operands) if base in JUMPS else None
    # Some branches have their condition among the operands: BRA.U !UP0, `(.L_x_4)
    is_certain = predicate is None and (target is None or operands == target[0])
    jumps_away = base in ENDS or target is not None
    return Instruction(opcode, operands, labels[target[1]] if target else None, not (is_certain and jumps_away))


def loops(instructions: Sequence[Instruction]) -> list[list[int]]:
    """Returns the positions of the instructions of every natural loop, inner loops before those around them.

    A loop is what can reach a jump back to an instruction that every way into the loop passes. Rare code that ptxas
    moves behind the end, such as waiting for a barrier once more, belongs to the loop that it returns to, and a jump
    back from there makes no loop.
    """
    starts, successors = _blocks(instructions)
    dominators = _dominators(successors)
    bodies: dict[int, set[int]] = {}
    for block, following in enumerate(successors):
        for header in following:
            if header in dominators[block]:
                bodies.setdefault(header, {header}).update(_reaching(block, header, successors))
    ends = [*starts[1:], len(instructions)]
    return [
        [position for block in sorted(body) for position in range(starts[block], ends[block])]
        for body in sorted(bodies.values(), key=len)
    ]


def _blocks(instructions: Sequence[Instruction]) -> tuple[list[int], list[list[int]]]:
    """Returns where each basic block starts, and which blocks may follow it."""
    leaders = {0}
    for position, instruction in enumerate(instructions):
        if instruction.target is not None:
            leaders.add(instruction.target)
        if instruction.target is not None or not instruction.falls_through:
            leaders.add(position + 1)
    starts = sorted(leaders - {len(instructions)})
    number = {start: block for block, start in enumerate(starts)}
    successors = []
    for end in [*starts[1:], len(instructions)]:
        last, following = instructions[end - 1], []
        if last.falls_through and end in number:
            following.append(number[end])
        if last.target is not None and last.target in number:
            following.append(number[last.target])
        successors.append(following)
    return starts, successors


def _dominators(successors: Sequence[Sequence[int]]) -> list[set[int]]:
    """Returns for each block those that every way to it passes; nothing for blocks that are never reached."""
    order, predecessors = _reachable(successors)
    dominators = [set(order) if block in predecessors else set() for block in range(len(successors))]
    dominators[0] = {0}
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            dominating = set.intersection(*(dominators[before] for before in predecessors[block])) | {block}
            if dominating != dominators[block]:
                dominators[block], changed = dominating, True
    return dominators


def _reachable(successors: Sequence[Sequence[int]]) -> tuple[list[int], dict[int, list[int]]]:
    """Returns the blocks that the first one leads to, itself first, and what leads to each of them."""
    predecessors: dict[int, list[int]] = {0: []}
    order = [0]
    for block in order:
        for following in successors[block]:
            if following not in predecessors:
                predecessors[following] = []
                order.append(following)
            predecessors[following].append(block)
    return order, predecessors


def _reaching(block: int, header: int, successors: Sequence[Sequence[int]]) -> set[int]:
    """Returns the blocks from which this one is reached without passing the header."""
    _, predecessors = _reachable(successors)
    body, waiting = {header}, [block]
    while waiting:
        current = waiting.pop()
        if current not in body:
            body.add(current)
            waiting.extend(predecessors[current])
    return body
