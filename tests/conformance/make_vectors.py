"""Writes vectors.json: what every matrix instruction takes and gives, register by register.

From the fragment tables of the PTX ISA (9.7.14.5.8, "Matrix Fragments for mma.m16n8k16 with
floating point type"; 9.7.14.5.15, "ldmatrix") and NumPy's arithmetic alone; the host code of
cuda/core/mma.cuh is not asked. Every number is a small integer, so that sums are exact in any
order.

A case is a list of 32 lanes, a lane the hexadecimal words of its registers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

VECTORS = Path(__file__).with_name("vectors.json")
LANES = range(32)

Encode = Callable[[np.ndarray], np.ndarray]  # numbers to the 16-bit patterns of a type


def bf16_bits(values: np.ndarray) -> np.ndarray:
    bits = values.astype(np.float32).view(np.uint32)
    assert not (bits & 0xFFFF).any(), "not exact in bfloat16"
    return (bits >> 16).astype(np.uint16)


def f16_bits(values: np.ndarray) -> np.ndarray:
    half = values.astype(np.float16)
    assert (half == values).all(), "not exact in float16"
    return half.view(np.uint16)


def f32_bits(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32).view(np.uint32)


# ---- mma.m16n8k16 ------------------------------------------------------------------------------
# Where element i of a thread's fragment lies. groupID = lane >> 2, threadID_in_group = lane % 4.


def place_in_a(lane: int, i: int) -> tuple[int, int]:
    """a0 .. a7 in A (16 x 16)."""
    row = lane >> 2 if 0 <= i < 2 or 4 <= i < 6 else (lane >> 2) + 8
    column = (lane % 4) * 2 + (i & 1) + (0 if i < 4 else 8)
    return row, column


def place_in_b(lane: int, i: int) -> tuple[int, int]:
    """b0 .. b3 in B (16 x 8)."""
    return (lane % 4) * 2 + (i & 1) + (0 if i < 2 else 8), lane >> 2


def place_in_c(lane: int, i: int) -> tuple[int, int]:
    """c0 .. c3 in C and D (16 x 8)."""
    return (lane >> 2) + (0 if i < 2 else 8), (lane % 4) * 2 + (i & 1)


def pairs(
    matrix: np.ndarray, place: Callable[[int, int], tuple[int, int]], lane: int, count: int
) -> list[int]:
    """Registers of two 16-bit elements each; the first is the lower half."""
    elements = [int(matrix[place(lane, i)]) for i in range(count)]
    return [elements[i] | elements[i + 1] << 16 for i in range(0, count, 2)]


def mma_case(name: str, encode: Encode, a: Any, b: Any, c: Any) -> dict[str, Any]:
    d = a.astype(np.int64) @ b.astype(np.int64) + c.astype(np.int64)
    assert np.abs(d).max() < 2**24
    a_bits, b_bits, c_bits, d_bits = encode(a), encode(b), f32_bits(c), f32_bits(d)
    given = [
        pairs(a_bits, place_in_a, lane, 8)
        + pairs(b_bits, place_in_b, lane, 4)
        + [int(c_bits[place_in_c(lane, i)]) for i in range(4)]
        for lane in LANES
    ]
    taken = [[int(d_bits[place_in_c(lane, i)]) for i in range(4)] for lane in LANES]
    return case(name, given, taken)


def mma(encode: Encode) -> dict[str, Any]:
    """Products that show one operand each, element by element, then one of everything."""
    none_c = np.zeros((16, 8))
    a = np.arange(1, 257).reshape(16, 16)  # every element a number of its own
    b = np.arange(1, 129).reshape(16, 8)
    rng = np.random.default_rng(0)
    cases = [
        mma_case("a, depths 0 to 7", encode, a, np.eye(16, 8), none_c),
        mma_case("a, depths 8 to 15", encode, a, np.eye(16, 8, -8), none_c),
        mma_case("b", encode, np.eye(16), b, none_c),
        mma_case("c", encode, np.zeros((16, 16)), b, np.arange(1, 129).reshape(16, 8) * 1000),
        mma_case(
            "all",
            encode,
            rng.integers(-127, 128, (16, 16)),
            rng.integers(-127, 128, (16, 8)),
            rng.integers(-1000, 1001, (16, 8)),
        ),
    ]
    inputs = [
        f"{name}[{i}]" for name, count in (("a", 4), ("b", 2), ("c", 4)) for i in range(count)
    ]
    return {"inputs": inputs, "outputs": [f"c[{i}]" for i in range(4)], "cases": cases}


# ---- ldmatrix.m8n8.x4 --------------------------------------------------------------------------


def load_matrices(transposed: bool) -> dict[str, Any]:
    """Lanes 8 m to 8 m + 7 point at the rows of matrix m. Thread T receives of it the elements
    (T / 4, 2 (T % 4)) and the next in the row; with .trans those of the transposed matrix.
    """
    numbers = np.arange(256).reshape(32, 8) * 251 + 7  # a row of shared memory each
    rng = np.random.default_rng(1)
    orders = {"rows in order": np.arange(32), "rows in another order": rng.permutation(32)}
    cases = []
    for name, order in orders.items():
        taken = []
        for lane in LANES:
            words = []
            for m in range(4):
                matrix = numbers[order[8 * m : 8 * m + 8]]
                matrix = matrix.T if transposed else matrix
                low, high = matrix[lane // 4, lane % 4 * 2 : lane % 4 * 2 + 2]
                words.append(int(low) | int(high) << 16)
            taken.append(words)
        memory = [[int(r[i]) | int(r[i + 1]) << 16 for i in range(0, 8, 2)] for r in numbers]
        given = [[int(order[lane]), *memory[lane]] for lane in LANES]
        cases.append(case(name, given, taken))
    inputs = ["row", *(f"memory[{i}]" for i in range(4))]
    return {"inputs": inputs, "outputs": [f"taken[{i}]" for i in range(4)], "cases": cases}


def case(name: str, given: list[list[int]], taken: list[list[int]]) -> dict[str, Any]:
    def text(lanes: list[list[int]]) -> list[str]:
        return [" ".join(f"{word:08x}" for word in lane) for lane in lanes]

    return {"name": name, "in": text(given), "out": text(taken)}


def document() -> dict[str, Any]:
    """All of vectors.json, by the names of the wrappers."""
    return {
        "load_matrices<false>": load_matrices(False),
        "load_matrices<true>": load_matrices(True),
        "mma<bf16>": mma(bf16_bits),
        "mma<f16>": mma(f16_bits),
    }


def text() -> str:
    return json.dumps(document(), indent=1) + "\n"


if __name__ == "__main__":
    VECTORS.write_text(text())
