"""What a machine with a GPU has to show, in parts: ``make gpu-check PARTS="build test"``.

    build        the extension for this machine's GPU
    conformance  the matrix instructions' registers against committed vectors (tests/conformance)
    test         the Python suite against the CUDA kernels (MEGALODON_TEST_BACKEND=cuda)
    cuda         tests/test_cuda.py: graphs, streams, devices, size, repeats, CuPy
    sanitize     compute-sanitizer's four tools on a short set, where they work
    ceilings     copy bandwidth and the rate of a bfloat16 GEMM, beside which all times are read
    bench        the benches of the ops that have a CUDA kernel, to bench/results (or $OUT)

Without PARTS, those that this source has not passed on this machine yet. Each ends within its
limit, all of them within nine minutes; what they found goes into one json at once, so that a run
that was cut off, or broken off by Ctrl-C, goes on with the parts it lacks. The exit status is 0 if
all were passed, 1 if not, 2 for a wrong part, 130 after Ctrl-C.

Needs no network: Python with torch, NumPy, pytest, pytest-benchmark, hypothesis and pybind11;
nvcc, cmake and ninja. Not yet run on a GPU.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from gpu_commands import ROOT, Result, command, kept, pytest, side_by_side, stop_all

BUILD = ROOT / "build-gpu"
RESULTS = Path(os.environ.get("OUT") or ROOT / "bench" / "results").resolve()

# A room's further files, such as cema_mma.cu, are no ops of their own.
OPS = sorted(
    path.stem
    for path in ROOT.glob("cuda/ops/*.cu")
    if (ROOT / "python/megalodon_ops/ops" / f"{path.stem}.py").exists()
)
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
SOURCES = ("cpp", "cuda", "python/megalodon_ops", "tests", "bench")

# Seconds. nvcc takes up to 20 for a file and one architecture on a slow core, g++ up to 30, and
# ninja compiles on all cores; a process that imports torch and opens the GPU takes about ten. The
# suite has about 2300 tests, of some milliseconds each, in a process per op.
LIMITS = {
    "build": 170,
    "conformance": 20,
    "test": 100,
    "cuda": 80,
    "sanitize": 50,
    "ceilings": 20,
    "bench": 90,
}
TOTAL = 525
LEAST = 5  # what it is worth beginning a part for
# ---- the parts -----------------------------------------------------------------------------------


def build(result: Result, limit: float) -> None:
    end = time.monotonic() + limit
    configure = command(
        "cmake",
        *("-G", "Ninja", "-S", ROOT, "-B", BUILD),
        *("-DMEGALODON_CUDA=ON", "-DMEGALODON_IN_PLACE=ON"),
        f"-DCMAKE_CUDA_ARCHITECTURES={_architecture()}",
        f"-DPython_EXECUTABLE={sys.executable}",
        limit=min(60, limit),
    )
    result.update(kept(configure))
    if configure["ok"]:
        targets = ("--target", "all", "cuda_conformance")
        made = command("cmake", "--build", BUILD, *targets, limit=end - time.monotonic())
        result.update(kept(made))


def _architecture() -> str:
    import torch

    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}{'a' if major == 9 else ''}-real"


def conformance(result: Result, limit: float) -> None:
    program = BUILD / "cuda_conformance"
    result.update(kept(command(sys.executable, "tests/conformance/check.py", program, limit=limit)))


def own_tests(op: str) -> list[str]:
    """test_{op}.py and test_{op}_*.py, but for those of an op whose name begins alike."""
    files = sorted((ROOT / "tests").glob(f"test_{op}*.py"))
    names = [file.stem.removeprefix("test_") for file in files]
    rooms = [max((o for o in OPS if f"{name}_".startswith(f"{o}_")), key=len) for name in names]
    return [f"tests/test_{n}.py" for n, room in zip(names, rooms, strict=True) if room == op]


def test(result: Result, limit: float) -> None:
    end = time.monotonic() + limit

    def run(op: str) -> dict[str, Any]:
        files = ["tests/test_ops.py", *own_tests(op)]
        environment = {"MEGALODON_TEST_BACKEND": "cuda", "MEGALODON_TEST_OPS": op, "ECHO": "0"}
        environment["OMP_NUM_THREADS"] = "2"
        return pytest(*files, limit=end - time.monotonic(), **environment)

    side_by_side(result, {op: lambda op=op: run(op) for op in OPS})


LARGE = "two_to_the_31"  # tests that want most of the memory: after the others, one by one


def cuda(result: Result, limit: float) -> None:
    end = time.monotonic() + limit

    def run(op: str) -> dict[str, Any]:
        environment = {"MEGALODON_TEST_OPS": op, "ECHO": "0", "OMP_NUM_THREADS": "2"}
        if op == "cupy":
            return pytest(
                "tests/test_cuda.py", "-k", "cupy", limit=end - time.monotonic(), ECHO="0"
            )
        select = ("-k", f"not cupy and not {LARGE}")
        return pytest("tests/test_cuda.py", *select, limit=end - time.monotonic(), **environment)

    side_by_side(result, {name: lambda op=name: run(op) for name in (*OPS, "cupy")})
    large = pytest("tests/test_cuda.py", "-k", LARGE, limit=end - time.monotonic())
    result["jobs"]["large"] = kept(large)
    result["ok"] = result["ok"] and large["ok"]


def sanitize(result: Result, limit: float) -> None:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        result.update(ok=True, skipped_because="compute-sanitizer is not on the PATH")
        return

    def run(name: str) -> dict[str, Any]:
        found = pytest_under(
            (tool, "--tool", name, "--error-exitcode", "9", "--target-processes", "all"),
            # Our kernels alone. Torch's allocator would hide an access beyond a tensor.
            ("--kernel-regex", "kns=megalodon", "--report-api-errors", "no"),
            limit,
        )
        output = found["output"]
        reports = [int(n) for n in re.findall(r"ERROR SUMMARY: (\d+) error", output)]
        # racecheck counts hazards
        reports += [int(n) for n in re.findall(r"RACECHECK SUMMARY: (\d+) hazard", output)]
        found["reports"] = sum(reports) if reports else None
        found["first_reports"] = [
            line
            for line in output.splitlines()
            if re.match(r"=+ (Error|Invalid|Uninit|Barrier)", line)
        ][:10]
        if re.search(r"not supported|Failed to initialize|No attachable process", output):
            found.update(ok=True, skipped_because="it does not work on this machine")
        elif found["stopped"]:  # slow, not wrong: what it looked at it has found right
            found["ok"] = not found["reports"] and found["failed"] == 0 and found["passed"] > 0
            found["complete"] = False
        return found

    side_by_side(result, {name: lambda name=name: run(name) for name in TOOLS}, len(TOOLS))


def pytest_under(tool: Iterable[str], options: Iterable[str], limit: float) -> dict[str, Any]:
    result = command(
        *(*tool, *options, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
        *("tests/test_ops.py", "-k", "matches_reference and float32"),
        limit=limit,
        echo=False,
        MEGALODON_TEST_BACKEND="cuda",
        PYTORCH_NO_CUDA_MEMORY_CACHING="1",
        OMP_NUM_THREADS="2",
    )
    for outcome in ("passed", "failed"):
        found = re.findall(rf"\b(\d+) {outcome}", result["output"])
        result[outcome] = int(found[-1]) if found else 0
    return result


def ceilings(result: Result, limit: float) -> None:
    outcome = command(sys.executable, "bench/ceilings.py", limit=limit)
    result.update(kept(outcome))
    for line in outcome["last_lines"]:
        if line.startswith("{"):
            result.update(json.loads(line))


def bench(result: Result, limit: float) -> None:
    files = [f for op in OPS if (f := ROOT / "bench" / f"bench_{op}.py").exists()]
    save = ("--device=cuda", f"--save={_device_slug()}", f"--results={RESULTS}")
    seconds = f"--seconds={max(10, limit - 20):.0f}"
    result.update(kept(pytest(*files, *save, seconds, limit=limit)))


PARTS: dict[str, Callable[[Result, float], None]] = {
    "build": build,
    "conformance": conformance,
    "test": test,
    "cuda": cuda,
    "sanitize": sanitize,
    "ceilings": ceilings,
    "bench": bench,
}


# ---- the json ------------------------------------------------------------------------------------


def _device_slug() -> str:
    import torch

    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")


def fingerprint() -> str:
    """Of the sources: a machine without git has them, too."""
    files = [ROOT / "CMakeLists.txt"]
    for folder in SOURCES:
        files += [
            path
            for path in sorted((ROOT / folder).rglob("*"))
            if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh", ".cmake") and path.is_file()
        ]
    digest = hashlib.sha256()
    for path in files:
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _said(*words: str) -> str:
    try:
        done = subprocess.run(
            words, cwd=ROOT, capture_output=True, text=True, check=False, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"


def facts() -> dict[str, Any]:
    import torch

    return {
        "device": torch.cuda.get_device_name(),
        "date": datetime.date.today().isoformat(),
        "commit": _said("git", "rev-parse", "--short", "HEAD"),
        "source": fingerprint(),
        "torch": torch.__version__,
        "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda_ops": OPS,
    }


def write(path: Path, document: dict[str, Any]) -> None:
    """At once or not at all."""
    new = path.with_suffix(".tmp")
    new.write_text(json.dumps(document, indent=1) + "\n")
    new.replace(path)


def earlier(path: Path, source: str) -> dict[str, Any]:
    """The parts that this very source has been through already."""
    try:
        document = json.loads(path.read_text())
        return dict(document["parts"]) if document["source"] == source else {}
    except (OSError, ValueError, KeyError):
        return {}


def run(chosen: list[str], path: Path, document: dict[str, Any], total: float = TOTAL) -> int:
    """Runs the parts, each within its limit, and writes after each; the exit status."""
    end = time.monotonic() + total
    parts = document["parts"]
    broken_off = False
    for part in chosen:
        left = end - time.monotonic()
        later = sum(LIMITS[other] for other in chosen[chosen.index(part) + 1 :])
        limit = min(left, max(LIMITS[part], left - later))  # with what earlier parts left over
        if limit < LEAST:
            print(f"== {part}: no time left", flush=True)
            continue
        print(f"== {part} (at most {limit:.0f} s)", flush=True)
        start = time.monotonic()
        result: Result = {"ok": False}
        parts[part] = result
        try:
            PARTS[part](result, limit)
        except KeyboardInterrupt:
            broken_off = True
            stop_all()
            result.update(ok=False, broken_off=True)
        except Exception as error:  # the other parts, and what was written, are worth having
            result.update(ok=False, error=f"{type(error).__name__}: {error}")
            print(result["error"], flush=True)
        result["seconds"] = round(time.monotonic() - start, 1)
        write(path, document)
        if broken_off or (part == "build" and not result["ok"]):
            break
    for part in chosen:
        outcome = parts.get(part)
        verdict = "not run" if outcome is None else "ok" if outcome["ok"] else "FAILED"
        print(f"{part:12}{verdict}")
    print(f"wrote {path}")
    if broken_off:
        return 130
    return 0 if all(parts.get(part, {}).get("ok") for part in chosen) else 1


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument(
        "parts", nargs="*", help=f"of {', '.join(PARTS)}; those not passed if absent"
    )
    named = parser.parse_args(arguments).parts
    unknown = [part for part in named if part not in PARTS]
    if unknown:
        parser.error(f"unknown part {unknown[0]!r}: wanted some of {', '.join(PARTS)}")

    import torch

    if not torch.cuda.is_available():
        print("gpu-check: torch sees no GPU on this machine", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    document = facts()
    path = RESULTS / f"gpu-check-{_device_slug()}.json"
    RESULTS.mkdir(parents=True, exist_ok=True)
    document["parts"] = earlier(path, document["source"])
    passed = [part for part, result in document["parts"].items() if result.get("ok")]
    # The extension of another machine, or none, may lie where the build puts its own.
    if "build" in passed and not any(BUILD.glob("CMakeFiles/_C.dir/**/*.o")):
        passed.remove("build")
    chosen = [part for part in PARTS if part in named] or [p for p in PARTS if p not in passed]
    return run(chosen, path, document)


if __name__ == "__main__":
    sys.exit(main())
