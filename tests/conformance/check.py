"""Runs the program of program.cu and compares it with vectors.json: ``python check.py PROGRAM``.

Needs Python alone, no NumPy and no torch.
"""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conformance import bulk, wgmma

VECTORS = Path(__file__).with_name("vectors.json")
SHOWN = 4  # mistakes of one case

Run = Callable[[str, bytes], bytes]  # (wrapper, input words) -> output words


def by_program(program: Path, limit: float = 120) -> Run:
    """What the program answers; its complaint is raised."""

    def run(wrapper: str, given: bytes) -> bytes:
        done = subprocess.run(
            [str(program), wrapper], input=given, capture_output=True, timeout=limit, check=False
        )
        if done.returncode != 0:
            said = done.stderr.decode()[-2000:]
            raise RuntimeError(f"{program.name} {wrapper}: status {done.returncode}: {said}")
        return done.stdout

    return run


def _lanes(rows: list[str]) -> list[list[int]]:
    return [[int(word, 16) for word in row.split()] for row in rows]


def _origin(number: int, given: list[list[int]], inputs: list[str]) -> str:
    """Which input register holds this number, as a whole or in a half: where it came from."""
    halves = {number: ""}
    value = struct.unpack("f", struct.pack("I", number))[0]
    if value == value and abs(value) <= 65504:  # no NaN: as bf16 or f16 it may be half of a word
        halves[number >> 16 | 1 << 32] = ""
        halves[struct.unpack("H", struct.pack("e", value))[0] | 1 << 32] = ""
    for lane, words in enumerate(given):
        for name, word in zip(inputs, words, strict=True):
            if word in halves:
                return f"; that is {name} of lane {lane}"
            for half, part in (("lower", word & 0xFFFF), ("upper", word >> 16)):
                if part and part | 1 << 32 in halves:
                    return f"; that is the {half} half of {name} of lane {lane}"
    return ""


def mistakes(run: Run, wrapper: str, vectors: dict[str, Any]) -> list[str]:
    """One line per wrong register: wrapper, case, lane, register, wanted and got."""
    given = [_lanes(case["in"]) for case in vectors["cases"]]
    words = [word for lanes in given for lane in lanes for word in lane]
    answer = run(wrapper, struct.pack(f"{len(words)}I", *words))
    registers, found = vectors["outputs"], []
    count = sum(len(lanes) for lanes in given) * len(registers)
    if len(answer) != 4 * count:
        return [f"{wrapper}: {len(answer)} bytes, wanted {4 * count}"]
    got = iter(struct.unpack(f"{count}I", answer))
    for case, lanes_in in zip(vectors["cases"], given, strict=True):
        wrong = []
        for lane, wanted in enumerate(_lanes(case["out"])):
            for register, word in zip(registers, wanted, strict=True):
                value = next(got)
                if value != word:
                    wrong.append(
                        f"{wrapper}, case '{case['name']}': lane {lane}, {register}: "
                        f"wanted {word:08x}, got {value:08x}"
                        + _origin(value, lanes_in, vectors["inputs"])
                    )
        found += wrong[:SHOWN]
        if len(wrong) > SHOWN:
            found.append(f"{wrapper}, case '{case['name']}': and {len(wrong) - SHOWN} more")
    return found


def all_vectors() -> dict[str, Any]:
    """By the names of the wrappers."""
    return {**json.loads(VECTORS.read_text()), **wgmma.vectors(), **bulk.vectors()}


def check(run: Run) -> dict[str, list[str]]:
    """The mistakes of every wrapper that runs here: Hopper's own on Hopper alone."""
    names = run("--list", b"").decode().split("\n")
    vectors = {name: of for name, of in all_vectors().items() if name in names}
    return {wrapper: mistakes(run, wrapper, of) for wrapper, of in vectors.items()}


def main() -> int:
    found = check(by_program(Path(sys.argv[1])))
    for wrapper, lines in found.items():
        print(f"{wrapper}: {'as in the PTX ISA' if not lines else f'{len(lines)} mistakes'}")
        for line in lines:
            print(f"  {line}")
    return 1 if any(found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
