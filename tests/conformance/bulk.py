"""What tensor copies bring from a tensor to shared memory, word by word.

From the PTX ISA alone (5.5, "Tensors": bounding box, zeros out of bounds, the 128-byte swizzle)
and integers in Python, as ``wgmma.py``. The tensor is numbered through; a box has 16 lines of 64
numbers.
"""

from __future__ import annotations

import struct
from typing import Any

from conformance.wgmma import swizzled

LANES, LINES, LINE = 128, 16, 64
SIZES = (96, 3, 40)  # x, y, z; x is contiguous
# Where the box begins, and how many blocks bring it, each of them a part of the lines to all.
BOXES = ((0, 0, 0, 1), (32, 1, 7, 1), (64, 2, 30, 1), (-8, 1, -3, 1), (32, 2, 20, 2))


def number(x: int, y: int, z: int) -> int:
    inside = all(0 <= at < size for at, size in zip((x, y, z), SIZES, strict=True))
    return x + SIZES[0] * (y + SIZES[1] * z) + 1 if inside else 0


def image(x: int, y: int, z: int) -> list[int]:
    memory = bytearray(LINES * LINE * 2)
    for line in range(LINES):
        for n in range(LINE):
            at = swizzled((line * LINE + n) * 2)
            memory[at : at + 2] = struct.pack("<H", number(x + n, y, z + line))
    return list(struct.unpack(f"<{len(memory) // 4}I", memory))


def vectors() -> dict[str, Any]:
    """By the names of the wrapper's instances, as in vectors.json."""
    tensor = [
        number(x, y, z) for z in range(SIZES[2]) for y in range(SIZES[1]) for x in range(SIZES[0])
    ]
    words = struct.unpack(f"<{len(tensor) // 2}I", struct.pack(f"<{len(tensor)}H", *tensor))
    of_lane = len(words) // LANES
    given = [words[lane * of_lane : (lane + 1) * of_lane] for lane in range(LANES)]
    result = {}
    for x, y, z, blocks in BOXES:
        box = image(x, y, z)
        taken = [box[lane * 4 : lane * 4 + 4] * blocks for lane in range(LANES)]
        result[f"tensor_copy<{x}, {y}, {z}, {blocks}>"] = {
            "inputs": [f"tensor[{i}]" for i in range(of_lane)],
            "outputs": [f"block {b}, shared[{i}]" for b in range(blocks) for i in range(4)],
            "cases": [
                {
                    "name": "all",
                    "in": [" ".join(f"{word:08x}" for word in lane) for lane in given],
                    "out": [" ".join(f"{word:08x}" for word in lane) for lane in taken],
                }
            ],
        }
    return result
