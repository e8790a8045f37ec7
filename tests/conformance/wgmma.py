"""What wgmma gives for an image of shared memory, word by word.

From the layouts of the PTX ISA alone (9.7.15.5, "Asynchronous warpgroup-level matrix instructions":
register fragments of D, matrix descriptors, the strides and the 128-byte swizzle of operands in
shared memory) and integers in Python; the host code of cuda/simt/wgmma.cpp is not asked. The words
would fill megabytes, so they are made when they are compared; ``vectors.json`` has the others.

A case is one product over 64 depths, four instructions: a (64 x 64), in shared memory or registers,
and b (64 x N), each with lines along the depth or, transposed, across, added to sums that are there
or in their place. Every number is a small integer, exact in any type and order.
"""

from __future__ import annotations

import struct
from typing import Any

LANES, DEPTHS, LINE = 128, 64, 64
TYPES = {"bf16": lambda value: struct.pack("<f", value)[2:], "f16": lambda v: struct.pack("<e", v)}


BOTH = (False, True)
# Columns, transposed a (None: in registers), transposed b, whether it adds.
INSTANCES: list[tuple[int, bool | None, bool, bool]] = [
    *((columns, a, b, True) for columns in (128, 256) for a in BOTH for b in BOTH),
    *((columns, None, b, True) for columns in (64, 128, 256) for b in BOTH),
    *((columns, False, False, True) for columns in (64, 80)),
    *((columns, False, False, False) for columns in (64, 80, 128)),
]


def swizzled(address: int) -> int:
    """Bits 4 to 6 of an address are xored with bits 7 to 9."""
    return address ^ (address >> 7 & 7) << 4


def place(row: int, depth: int, transposed: bool) -> int:
    """The byte where a number of an operand begins: lines of 128 bytes, each with the 64 depths of
    a row, or with 64 rows of a depth, then those of the next 64 rows.
    """
    if transposed:
        return swizzled((row // LINE * DEPTHS + depth) * 128 + row % LINE * 2)
    return swizzled(row * 128 + depth * 2)


def place_in_a(lane: int, i: int, half: int) -> tuple[int, int]:
    """Row and depth of the lower or upper half of register a_i, for m64nNk16; those of the four
    instructions are 16 depths further each.
    """
    row = lane // 32 * 16 + lane % 32 // 4 + (8 if i % 2 else 0)
    return row, i // 4 * 16 + lane % 4 * 2 + half + (8 if i % 4 >= 2 else 0)


def place_of_sum(lane: int, i: int) -> tuple[int, int]:
    """Row and column of register d_i, for m64nNk16."""
    row = lane // 32 * 16 + lane % 32 // 4 + (8 if i % 4 >= 2 else 0)
    return row, i // 4 * 8 + lane % 4 * 2 + i % 2


def register_of(r: int, c: int) -> int:
    """The i of sum[r][c], as core/wgmma.cuh numbers them."""
    return c // 2 * 4 + r * 2 + c % 2


def image(matrix: list[list[int]], transposed: bool, kind: str) -> list[int]:
    memory = bytearray(len(matrix) * DEPTHS * 2)
    for row, numbers in enumerate(matrix):
        for depth, number in enumerate(numbers):
            at = place(row, depth, transposed)
            memory[at : at + 2] = TYPES[kind](number)
    return list(struct.unpack(f"<{len(memory) // 4}I", memory))


def float_bits(value: int) -> int:
    return int(struct.unpack("<I", struct.pack("<f", value))[0])


def registers_of_a(a: list[list[int]], kind: str) -> list[int]:
    words = []
    for lane in range(LANES):
        for i in range(16):
            places = [place_in_a(lane, i, half) for half in range(2)]
            pair = b"".join(TYPES[kind](a[row][depth]) for row, depth in places)
            words += struct.unpack("<I", pair)
    return words


def case(
    kind: str, columns: int, transposed_a: bool | None, transposed_b: bool, adds: bool
) -> dict[str, Any]:
    """a is in registers where it cannot be transposed (None)."""
    a = [[(7 * row + 3 * d + row * d) % 13 - 6 for d in range(DEPTHS)] for row in range(64)]
    b = [[(5 * n + 11 * d + n * d) % 9 - 4 for d in range(DEPTHS)] for n in range(columns)]
    words = [
        registers_of_a(a, kind) if transposed_a is None else image(a, transposed_a, kind),
        image(b, transposed_b, kind),
    ]
    given, taken = [], []
    for lane in range(LANES):
        sums_in, sums_out = [], []
        for r in range(2):
            for c in range(columns // 4):
                row, column = place_of_sum(lane, register_of(r, c))
                before = row * 300 + column
                product = sum(x * y for x, y in zip(a[row], b[column], strict=True))
                sums_in.append(float_bits(before))
                sums_out.append(float_bits(before * adds + product))
        of_lane = [w[lane * len(w) // LANES : (lane + 1) * len(w) // LANES] for w in words]
        given.append([*of_lane[0], *of_lane[1], *sums_in])
        taken.append(sums_out)

    def text(lanes: list[list[int]]) -> list[str]:
        return [" ".join(f"{word:08x}" for word in lane) for lane in lanes]

    return {"name": "all", "in": text(given), "out": text(taken)}


def vectors() -> dict[str, Any]:
    """By the names of the wrapper's instances, as in vectors.json."""
    result = {}
    for kind in TYPES:
        for columns, a, b, adds in INSTANCES:
            counts = {"a": 16, "b": columns // 4}
            sums = [f"sum[{r}][{c}]" for r in range(2) for c in range(columns // 4)]
            inputs = [f"{name}[{i}]" for name, count in counts.items() for i in range(count)]
            of_a = "registers" if a is None else int(a)
            result[f"wgmma<{kind}, {columns}, {of_a}, {int(b)}, {int(adds)}>"] = {
                "inputs": [*inputs, *sums],
                "outputs": sums,
                "cases": [case(kind, columns, a, b, adds)],
            }
    return result
