"""Two builds of the library in one process: ``python bench/builds.py OLD.so NEW.so``.

Each kernel is called through the C interface, on the same buffers, by the two builds in turns:
where pages lie, and who else uses the caches, is then the same for both, which it is not in two
processes. One thread, outputs that exist.

A line: ms of both, median (and fastest); OLD over NEW, the median of the turns' ratios; a copy of
as many bytes over NEW, in per cent; and by how much the outputs differ, relative to OLD's.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack

from megalodon_ops._library import Maker

SECONDS = 0.02  # a build's turn


class _DataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Spec(ctypes.Structure):  # megalodon_spec
    _fields_ = (
        ("dtype", _DataType),
        ("ndim", ctypes.c_int32),
        ("shape", ctypes.c_int64 * 8),
    )


_DTYPES = {
    (0, 64): torch.int64,
    (1, 8): torch.uint8,
    (2, 32): torch.float32,
    (4, 16): torch.bfloat16,
}
_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)


class Build:
    """libmegalodon_ops at a path, by one thread."""

    def __init__(self, path: str) -> None:
        self.library = ctypes.CDLL(path)
        self.library.megalodon_last_error.restype = ctypes.c_char_p
        self.library.megalodon_set_num_threads(ctypes.c_int64(1))
        self.kept: list[Any] = []

    def _convert(self, arguments: Sequence[Any]) -> list[Any]:
        def convert(value: Any) -> Any:
            if isinstance(value, Tensor):
                capsule = to_dlpack(value)
                self.kept.append(capsule)
                return ctypes.c_void_p(_pointer(capsule, b"dltensor"))
            if isinstance(value, str):
                return ctypes.c_char_p(value.encode())
            return (
                ctypes.c_double(value)
                if isinstance(value, float)
                else value and ctypes.c_int64(value)
            )

        return [convert(value) for value in arguments]

    def _check(self, status: int) -> None:
        if status:
            raise RuntimeError(self.library.megalodon_last_error().decode())

    def prepare(
        self, name: str, arguments: Sequence[Any], like: Sequence[Tensor] = ()
    ) -> tuple[Callable[[], None], list[Tensor]]:
        """A call, and its outputs: those of `like` where they have the shape."""
        specs = (_Spec * 16)()
        inputs = self._convert(arguments)
        self._check(getattr(self.library, f"megalodon_{name}_outputs")(*inputs, specs))
        outputs = []
        for spec, other in itertools.zip_longest(specs, like):
            if spec is None or spec.dtype.bits == 0:
                break
            shape = tuple(spec.shape[: spec.ndim])
            dtype = _DTYPES[spec.dtype.code, spec.dtype.bits]
            same = other is not None and tuple(other.shape) == shape
            outputs.append(other if same else torch.empty(shape, dtype=dtype))
        function, every = (
            getattr(self.library, f"megalodon_{name}"),
            (*inputs, *self._convert(outputs)),
        )
        return lambda: self._check(function(*every, None)), outputs


def arguments_of(
    op: str, dtype: torch.dtype, B: int, L: int, H: int, D: int
) -> tuple[tuple[Any, ...], Callable[[list[Tensor]], tuple[Any, ...]]]:
    """Of forward, and of backward by forward's outputs. H: heads; of cema N."""
    make = Maker(dtype)
    x, dy = make.activation(B, L, D), make.activation(B, L, D)
    weight, bias = make.stat(D, scale=0.3), make.stat(D, scale=0.3)
    if op == "rms_norm":
        return (x, weight, 1e-5), lambda out: (dy, x, weight, out[1])
    if op == "layer_norm":
        return (x, weight, bias, 1e-5), lambda out: (dy, x, weight, *out[1:3])
    if op == "silu_mul":
        b = make.activation(B, L, D)
        return (x, b), lambda _: (dy, x, b)
    if op == "qk_norm_rope":
        scales, rope = (make.stat(2, D), make.stat(2, D)), (H, 2048, 10000.0, None, 1e-5, None)
        dq, dk = make.activation(B, L, H, D // H), make.activation(B, L, H, D // H)
        return (x, *scales, *rope), lambda out: (dq, dk, x, *scales, out[2], *rope)
    if op == "timestep_norm":
        none = (None,) * 5
        return (x, weight, bias, 32, 1e-5, *none), lambda out: (
            *(dy, None, None, x, weight),
            *(*none, *out[4:6], 32, 1e-5),
        )
    if op == "cema":
        shapes = (D, H), (D, H), (D,), (D, H, 2), (D,)
        inputs = (x, *(make.stat(*shape) for shape in shapes), None, None, "scan")
        return inputs, lambda _: (dy, None, *inputs)
    raise ValueError(f"builds: op must be one of {', '.join(OPS)}; got {op}")


OPS = ("rms_norm", "layer_norm", "silu_mul", "qk_norm_rope", "timestep_norm", "cema")


def compare(
    builds: Sequence[Build], op: str, arguments: Sequence[Any], outputs_of: int, rounds: int
) -> tuple[str, list[Tensor]]:
    """The line of a kernel, and its outputs, of which the first `outputs_of` are compared."""
    first, outputs = builds[0].prepare(op, arguments)
    second, others = builds[1].prepare(op, arguments, outputs)
    first()
    wanted = [t.double() for t in outputs[:outputs_of]]
    second()
    differences = [
        ((got.double() - want).norm() / want.norm()).item()
        for got, want in zip(others, wanted, strict=False)
    ]
    moved = [t for t in (*arguments, *outputs) if isinstance(t, Tensor) and t.dim() > 2]
    source = torch.ones(sum(t.numel() * t.element_size() for t in moved) // 2, dtype=torch.uint8)
    target = source.clone()
    calls = (first, second, lambda: target.copy_(source))
    start = time.perf_counter()
    first()
    count = max(1, int(SECONDS / (time.perf_counter() - start)))
    times: list[list[float]] = [[], [], []]
    for _ in range(rounds):
        for i in random.sample(range(3), 3):
            calls[i]()
            start = time.perf_counter()
            for _ in range(count):
                calls[i]()
            times[i].append((time.perf_counter() - start) / count * 1e3)
    old, new, copy = times
    ratio = statistics.median(a / b for a, b in zip(old, new, strict=True))
    floor = statistics.median(a / b for a, b in zip(copy, new, strict=True))
    cells = " ".join(f"{statistics.median(t):8.3f} ({min(t):.3f})" for t in (old, new))
    return f"{cells}  {ratio:5.2f}  {100 * floor:4.0f}%  {max(differences):.1e}", outputs


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("old", help="libmegalodon_ops.so of a build")
    parser.add_argument("new", help="of another")
    parser.add_argument("--op", choices=OPS, action="append", help="default: all of them")
    parser.add_argument(
        "--size",
        default=["2x1024x1x512", "2x4096x1x512", "2x65536x1x512"],
        nargs="+",
        metavar="BxLxHxD",
    )
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for op, size, dtype in itertools.product(
        options.op or OPS, options.size, (torch.float32, torch.bfloat16)
    ):
        builds = [Build(path) for path in (options.old, options.new)]
        forward, backward_of = arguments_of(op, dtype, *map(int, size.split("x")))
        name = f"{op} {size} {str(dtype).removeprefix('torch.')}"
        line, outputs = compare(builds, f"{op}_forward", forward, 2, options.rounds)
        print(f"{name:36} forward   {line}", flush=True)
        line, _ = compare(builds, f"{op}_backward", backward_of(outputs), 1, options.rounds)
        print(f"{name:36} backward  {line}", flush=True)


if __name__ == "__main__":
    main()
