"""What a machine with a GPU has to show, in parts: ``make gpu-check PARTS="build test"``.

    build     the extension for this machine's GPU
    test      the Python suite against the CUDA kernels (MEGALODON_TEST_BACKEND=cuda)
    cuda      tests/test_cuda.py: graphs, streams, devices, size, repeats, CuPy
    sanitize  compute-sanitizer's four tools on a short set, where they work
    ceilings  copy bandwidth and the rate of a bfloat16 GEMM, beside which all times are read
    bench     the benches of the ops that have a CUDA kernel, to bench/results (or $OUT)

Needs no network: Python with torch, pytest and hypothesis, nvcc, cmake and ninja. Every part writes
its result into one json at once, so that a run that was cut off goes on with the parts it lacks.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build-gpu"
RESULTS = Path(os.environ.get("OUT") or ROOT / "bench" / "results")
OPS = sorted(path.stem for path in ROOT.glob("cuda/ops/*.cu"))
OWN_TESTS = [f for op in OPS if (f := ROOT / "tests" / f"test_{op}.py").exists()]
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
LAST_LINES = 12


def command(*parts: str | Path, limit: float, **environment: str) -> dict[str, Any]:
    """Runs it, shows its output, and says how it ended."""
    words = [str(part) for part in parts]
    print("$", *words, flush=True)
    paths = os.pathsep.join(p for p in (str(ROOT / "python"), os.environ.get("PYTHONPATH")) if p)
    env = {**os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1", **environment}
    start = time.monotonic()
    try:
        done = subprocess.run(
            words,
            cwd=ROOT,
            env=env,
            timeout=limit,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        status, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired as error:
        status = -1
        output = (error.stdout or b"").decode(errors="replace") + f"\nstopped after {limit:.0f} s"
    lines = output.strip().splitlines()[-LAST_LINES:]
    print(*lines, sep="\n", flush=True)
    seconds = round(time.monotonic() - start, 1)
    return {"ok": status == 0, "seconds": seconds, "last_lines": lines}


def pytest(*arguments: str | Path, limit: float, **environment: str) -> dict[str, Any]:
    result = command(sys.executable, "-m", "pytest", "-q", *arguments, limit=limit, **environment)
    summary = " ".join(result["last_lines"])
    for outcome in ("passed", "failed", "skipped"):
        found = re.search(rf"(\d+) {outcome}", summary)
        result[outcome] = int(found[1]) if found else 0
    result["ok"] = result["ok"] and result["passed"] > 0
    return result


def build() -> dict[str, Any]:
    configure = command(
        "cmake",
        *("-G", "Ninja", "-S", ROOT, "-B", BUILD),
        *("-DMEGALODON_CUDA=ON", "-DMEGALODON_IN_PLACE=ON"),
        f"-DCMAKE_CUDA_ARCHITECTURES={_architecture()}",
        f"-DPython_EXECUTABLE={sys.executable}",
        limit=120,
    )
    if not configure["ok"]:
        return configure
    return command("cmake", "--build", BUILD, limit=480)


def _architecture() -> str:
    import torch

    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}{'a' if major == 9 else ''}-real"


def test() -> dict[str, Any]:
    return pytest("tests/test_ops.py", *OWN_TESTS, limit=300, MEGALODON_TEST_BACKEND="cuda")


def cuda() -> dict[str, Any]:
    return pytest("tests/test_cuda.py", limit=300)


def sanitize() -> dict[str, Any]:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"ok": True, "skipped": "compute-sanitizer is not on the PATH"}
    start = time.monotonic()
    results = {}
    for name in TOOLS:
        results[name] = command(
            *(tool, "--tool", name, "--error-exitcode", "9", "--target-processes", "all"),
            *(sys.executable, "-m", "pytest", "-q", "-x", "tests/test_ops.py"),
            *("-k", "test_forward_matches_reference and float32 and portable"),
            limit=120,
            MEGALODON_TEST_BACKEND="cuda",
        )
    ok = all(result["ok"] for result in results.values())
    return {"ok": ok, "seconds": round(time.monotonic() - start, 1), "tools": results}


def ceilings() -> dict[str, Any]:
    import torch

    source = torch.randn(1 << 30, device="cuda").bfloat16()
    target = torch.empty_like(source)
    n = 8192
    a, b = (torch.randn(n, n, device="cuda").bfloat16() for _ in range(2))
    product = torch.empty_like(a)
    copy = _median_ms(lambda: target.copy_(source))
    gemm = _median_ms(lambda: torch.mm(a, b, out=product))
    result = {
        "ok": True,
        "copy_gb_per_s": round(2 * source.numel() * source.element_size() / copy / 1e6, 1),
        "bf16_gemm_tflop_per_s": round(2 * n**3 / gemm / 1e9, 1),
    }
    print(result, flush=True)
    return result


def _median_ms(call: Callable[[], Any], warm_up: int = 10, repeats: int = 50) -> float:
    import torch

    times = []
    for i in range(warm_up + repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        if i >= warm_up:
            times.append(begin.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def bench() -> dict[str, Any]:
    files = [f for op in OPS if (f := ROOT / "bench" / f"bench_{op}.py").exists()]
    save = ("--device", "cuda", "--save", _device_slug(), "--results", RESULTS)
    return pytest(*files, *save, limit=540)


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "build": build,
    "test": test,
    "cuda": cuda,
    "sanitize": sanitize,
    "ceilings": ceilings,
    "bench": bench,
}


def _device_slug() -> str:
    import torch

    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")


def _facts() -> dict[str, Any]:
    import torch

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "device": torch.cuda.get_device_name(),
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip() or "unknown",
        "torch": torch.__version__,
        "cuda_ops": OPS,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all if absent")
    chosen = parser.parse_args().parts or list(PARTS)
    unknown = [part for part in chosen if part not in PARTS]
    if unknown:
        parser.error(f"unknown part {unknown[0]!r}: wanted some of {', '.join(PARTS)}")

    import torch

    if not torch.cuda.is_available():
        print("gpu-check: torch sees no GPU on this machine", file=sys.stderr)
        return 1
    facts = _facts()
    path = RESULTS / f"gpu-check-{_device_slug()}.json"
    document = json.loads(path.read_text()) if path.exists() else {}
    if document.get("commit") != facts["commit"]:
        document = {}
    document = {**facts, "parts": document.get("parts", {})}
    RESULTS.mkdir(parents=True, exist_ok=True)
    for part in chosen:
        print(f"== {part}", flush=True)
        document["parts"][part] = PARTS[part]()
        path.write_text(json.dumps(document, indent=1) + "\n")
        if part == "build" and not document["parts"][part]["ok"]:
            break
    for part in chosen:
        result = document["parts"].get(part)
        verdict = "not run" if result is None else "ok" if result["ok"] else "FAILED"
        print(f"{part:10}{verdict}")
    print(f"wrote {path}")
    return 0 if all(document["parts"].get(part, {}).get("ok") for part in chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
