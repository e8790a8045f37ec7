"""The golden data: outputs, states and gradients of the official code, and the comparison with it.

The folder is `MEGALODON_GOLDEN`, by default `../shared/golden` beside the repository; its
index.json explains every array. Where it is missing the tests skip, and fail in CI.

A `run_*` function takes a case and the operators to test, with the signatures of
`megalodon_ops.reference`, and returns what they give under the names and in the layout of the
golden arrays.
"""

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

FOLDER = Path(
    os.environ.get("MEGALODON_GOLDEN") or Path(__file__).resolve().parents[2] / "shared" / "golden"
)

Op = Callable[..., Any]
Arrays = dict[str, Tensor]


def _load(file: str) -> Arrays:
    with np.load(FOLDER / file) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


@dataclass(frozen=True)
class Case:
    """One golden case: its hyper-parameters, its arrays' names and, on demand, the arrays."""

    name: str
    kind: str
    file: str | None = None
    float32_file: str | None = None
    hyper: dict[str, Any] = field(default_factory=dict)
    names: frozenset[str] = frozenset()

    @cached_property
    def arrays(self) -> Arrays:
        """Inputs, parameters, cotangents, outputs and gradients of the official code in float64."""
        if self.file is None:
            reason = f"golden data not found in {FOLDER} (set MEGALODON_GOLDEN)"
            pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
        return _load(self.file)

    @cached_property
    def float32(self) -> Arrays:
        """Outputs and gradients of the official code in float32 from the same inputs."""
        assert self.float32_file is not None, f"{self.name} has no float32 arrays"
        return _load(self.float32_file)

    def group(self, prefix: str) -> Arrays:
        """The arrays whose name starts with `prefix`, without it."""
        return {k.removeprefix(prefix): v for k, v in self.arrays.items() if k.startswith(prefix)}


@cache
def cases(kind: str) -> tuple[Case, ...]:
    """Every case of a kind.

    The kinds are cema, timestep_norm, timestep_norm_stream, attention, mega_layer, mega_block,
    mega_model and mega_decode. Without the data there is one case, and a test that touches it skips
    or, in CI, fails.
    """
    index = FOLDER / "index.json"
    if not index.is_file():
        return (Case("missing", kind),)
    return tuple(
        Case(
            c["name"],
            kind,
            c["file"],
            c.get("float32", {}).get("file"),
            c["hyper_parameters"],
            frozenset(c["arrays"]),
        )
        for c in json.loads(index.read_text())["cases"]
        if c["kind"] == kind
    )


def each(
    kind: str, *dtypes: torch.dtype, having: str | None = None, lacking: str | None = None
) -> pytest.MarkDecorator:
    """Parametrize `case` and `dtype` over a kind's cases, with and without the arrays named.

    float32 is paired only with the cases that have float32 arrays.
    """
    chosen = [
        (case, dtype)
        for dtype in dtypes
        for case in cases(kind)
        if case.file is None
        or (
            (having is None or having in case.names)
            and lacking not in case.names
            and (dtype != torch.float32 or case.float32_file)
        )
    ]
    ids = [f"{case.name}-{str(dtype).removeprefix('torch.')}" for case, dtype in chosen]
    return pytest.mark.parametrize(("case", "dtype"), chosen, ids=ids)


def _scale(ref: Tensor) -> float:
    """max|ref|, or 1 where the reference is empty or zero throughout and offers no scale."""
    return (ref.abs().max().item() if ref.numel() else 0.0) or 1.0


def _error(got: Tensor, ref: Tensor) -> float:
    if ref.numel() == 0:
        return 0.0
    error = (got.double() - ref.double()).abs().max().item()
    return math.inf if math.isnan(error) else error


def _compare(case: Case, got: Arrays, tolerance: Callable[[str, Tensor], float]) -> None:
    assert got, f"{case.name}: nothing to compare"
    wrong = []
    for name, value in got.items():
        ref = case.arrays[name]
        assert value.shape == ref.shape, f"{case.name} {name}: {value.shape}, want {ref.shape}"
        if not ref.is_floating_point():
            assert value.dtype == ref.dtype, f"{case.name} {name}: {value.dtype}, want {ref.dtype}"
            assert torch.equal(value, ref), f"{case.name} {name}: differs"
            continue
        error, allowed = _error(value, ref), tolerance(name, ref)
        if error > allowed:
            wrong.append(f"{name}: error {error:.3g}, allowed {allowed:.3g}, max {_scale(ref):.3g}")
    assert not wrong, "\n".join([case.name, *wrong])


def assert_golden64(case: Case, got: Arrays) -> None:
    """Every array within 1e-10 of the official float64 one, relative to its largest magnitude."""
    assert all(v.dtype == torch.float64 for v in got.values() if v.is_floating_point())
    _compare(case, got, lambda name, ref: 1e-10 * _scale(ref))


def assert_golden32(case: Case, got: Arrays) -> None:
    """Every array within twice the official float32 code's own error, or 8 eps max|ref|."""
    eps = torch.finfo(torch.float32).eps
    _compare(
        case,
        got,
        lambda name, ref: max(2 * _error(case.float32[name], ref), 8 * eps * _scale(ref)),
    )


def assert_golden(case: Case, got: Arrays, dtype: torch.dtype) -> None:
    """`assert_golden64` or `assert_golden32`."""
    (assert_golden64 if dtype == torch.float64 else assert_golden32)(case, got)


def leaves(case: Case, dtype: torch.dtype, device: torch.device | str = "cpu") -> Arrays:
    """The case's in/ and param/ arrays by bare name; those it has a gradient of require one."""
    out = {}
    for name, value in {**case.group("in/"), **case.group("param/")}.items():
        value = value.to(device, dtype if value.is_floating_point() else value.dtype)
        out[name] = value.requires_grad_(f"grad/{name}" in case.arrays)
    return out


def gradients(case: Case, inputs: Arrays, outputs: Arrays, prefix: str = "grad/") -> Arrays:
    """Gradients of sum(cot * out) over the given outputs, in every input the case has one of."""
    cotangents = case.group("cot/")
    total = sum(
        (cotangents[name].to(out) * out).sum()
        for name, out in outputs.items()
        if name in cotangents
    )
    wanted = {name: inputs[name] for name in case.group(prefix)}
    grads = torch.autograd.grad(
        total, list(wanted.values()), retain_graph=True, materialize_grads=True
    )
    return {prefix + name: g for name, g in zip(wanted, grads, strict=True)}


def _detached(results: Arrays) -> Arrays:
    return {name: value.detach().cpu() for name, value in results.items()}


def _cema_parameters(inputs: Arrays) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """alpha, delta, theta, gamma in the operators' shapes."""
    alpha, delta = inputs["alpha"].squeeze(-1), inputs["delta"].squeeze(-1)
    return alpha, delta, inputs["theta"].flatten(), inputs["gamma"]


def run_cema(
    case: Case, cema: Op, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Arrays:
    """`cema` on a cema case: out/y, out/h, grad/* (of y and h) and grad_y/* (of y alone)."""
    inputs = leaves(case, dtype, device)
    y, h = cema(
        inputs["x"].transpose(1, 2),
        *_cema_parameters(inputs),
        inputs["omega"].flatten(),
        inputs.get("hx"),
    )
    outputs = {"y": y.transpose(1, 2), "h": h}
    results = {f"out/{name}": value for name, value in outputs.items()}
    results |= gradients(case, inputs, outputs)
    results |= (
        gradients(case, inputs, {"y": outputs["y"]}, "grad_y/") if case.group("grad_y/") else {}
    )
    return _detached(results)


def run_cema_kernel(
    case: Case, cema_kernel: Op, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Arrays:
    """`cema_kernel` on a cema case that has out/kernel."""
    inputs = leaves(case, dtype, device)
    length = case.arrays["out/kernel"].shape[1]
    return _detached({"out/kernel": cema_kernel(*_cema_parameters(inputs), length)})


def run_cema_convolution(
    case: Case,
    cema_kernel: Op,
    fft_conv: Op,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> Arrays:
    """`fft_conv` by `cema_kernel`, plus omega x, on a stateless cema case: out/y and grad_y/*."""
    inputs = leaves(case, dtype, device)
    x = inputs["x"].transpose(1, 2)
    k = cema_kernel(*_cema_parameters(inputs), x.shape[1])
    y = (fft_conv(x, k) + inputs["omega"].flatten() * x).transpose(1, 2)
    return _detached({"out/y": y} | gradients(case, inputs, {"y": y}, "grad_y/"))


def _timestep_norm_state(case: Case, inputs: Arrays) -> tuple[Tensor | None, ...]:
    """The carried state, else the state an official TimestepNorm makes of its prior, else none."""
    if "prev_count" in inputs:
        return inputs["prev_count"], inputs["prev_mean"], inputs["prev_var"]
    if "prior_mean" in inputs:
        B, G = inputs["x"].shape[0], case.hyper["G"]
        count = torch.full((B,), case.hyper["prior"], device=inputs["x"].device)
        return (
            count,
            inputs["prior_mean"].expand(B, G),
            inputs["prior_logv"].exp().expand(B, G),
        )
    return None, None, None


def run_timestep_norm(
    case: Case, timestep_norm: Op, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Arrays:
    """`timestep_norm` on a case of either kind, a stream in its segments: out/* and grad/*."""
    inputs = leaves(case, dtype, device)
    state = _timestep_norm_state(case, inputs)
    segments = case.hyper.get("segs", [case.hyper["L"]])
    ys, results = [], {}
    start = 0
    for i, length in enumerate(segments):
        part = slice(start, start + length)
        mask = inputs["mask"][:, part] if "mask" in inputs else None
        y, *state = timestep_norm(
            inputs["x"][:, part],
            inputs["weight"],
            inputs["bias"],
            case.hyper["G"],
            case.hyper["eps"],
            *state,
            mask,
        )[:4]
        ys.append(y)
        start += length
        if "segs" in case.hyper:
            for name, value in zip(("count", "mean", "var"), state, strict=True):
                results[f"out/seg{i}_{name}"] = value
    outputs = dict(zip(("y", "count", "mean", "var"), (torch.cat(ys, 1), *state), strict=True))
    results |= {f"out/{name}": value for name, value in outputs.items()}
    return _detached(results | gradients(case, inputs, outputs))


def run_attention(
    case: Case,
    qk_norm_rope: Op,
    chunk_attention: Op,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> Arrays:
    """Both operators on an attention case: out/q_rot, out/k_rot, out/y and grad/*."""
    inputs = leaves(case, dtype, device)
    H, C = case.hyper["H"], case.hyper["chunk"]
    base = case.hyper["base"] or 10000.0
    q, k = qk_norm_rope(
        inputs["z"], inputs["gamma"], inputs["beta"], H, C, base, None, case.hyper["eps"]
    )[:2]
    v = inputs["v"].unflatten(-1, (H, case.hyper["dv"]))
    o = chunk_attention(q, k, v, C)
    y = (o[0] if isinstance(o, tuple | list) else o).flatten(-2)
    results = {"out/q_rot": q.flatten(-2), "out/k_rot": k.flatten(-2), "out/y": y}
    return _detached(results | gradients(case, inputs, {"y": y}))
