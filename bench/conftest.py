"""One thread unless asked otherwise, and the table at the end."""

from __future__ import annotations

import ctypes
import datetime
import functools
import gc
import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import harness
import pytest
import torch
from harness import lines, model_rows, rows

RESULTS = Path(__file__).parent / "results"
_DEADLINE = pytest.StashKey[float]()


def pytest_configure(config: pytest.Config) -> None:
    """Chooses the device, and keeps freed memory in the process (glibc): a fresh output above 32 MB
    would cost a page fault per 4 KB in every call, several times what the kernel takes; the floor
    writes to old memory. Any bound for what is kept would be passed by the largest peers, and the
    call after them would pay.
    """
    harness.device = torch.device(config.getoption("--device"))
    harness.long_set = config.getoption("--long")
    config.stash[_DEADLINE] = time.monotonic() + config.getoption("--seconds")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-4, 0)  # M_MMAP_MAX
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--threads", type=int, default=1, help="torch threads of the benches")
    parser.addoption("--device", default="cpu", help="where ops are timed: cpu or cuda")
    parser.addoption("--long", action="store_true", help="all sizes, types and peers")
    parser.addoption("--seconds", type=float, default=1e9, help="no bench begins after these")
    parser.addoption("--save", metavar="NAME", help="write the table to bench/results/NAME.json")
    parser.addoption("--results", default=str(RESULTS), help="another folder for it")


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest) -> Any:
    if time.monotonic() > request.config.stash[_DEADLINE]:
        pytest.skip("no time left (--seconds)")
    before, count = torch.get_num_threads(), len(rows) + len(model_rows)
    torch.set_num_threads(request.config.getoption("--threads"))
    yield
    torch.set_num_threads(before)
    if len(rows) + len(model_rows) > count:  # a run that is cut off has what it has measured
        _save(request.config)
    gc.collect()  # graphs hold their memory
    if harness.device.type != "cpu":
        torch.cuda.empty_cache()
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:  # each begins with as little as the first
        malloc_trim(0)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On a GPU bfloat16 alone, but for --long and benches of one type."""
    if harness.device.type == "cpu" or harness.long_set:
        return
    left_out = [i for i in items if "float32" in i.name and "torch.bfloat16" not in i.name]
    items[:] = [i for i in items if i not in left_out]
    config.hook.pytest_deselected(items=left_out)


def device_name() -> str:
    """The model of the device that ops are timed on, as the system calls it."""
    if harness.device.type != "cpu":
        return torch.cuda.get_device_name()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        return platform.processor()
    return platform.processor()


def _commit() -> str:
    result = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return result.stdout.strip() or "unknown"


def _save(config: pytest.Config) -> Path | None:
    """Writes the table so far, beside other rows of the same device that are there already; every
    row has the date, commit and torch of its run.
    """
    name = config.getoption("--save")
    if not name:
        return None
    path = Path(config.getoption("--results")) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = {
        "device": device_name(),
        "cores": os.cpu_count(),
        **_ceilings(),
    }
    run = {
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "torch": torch.__version__,
    }
    old = json.loads(path.read_text()) if path.exists() else {}
    if old.get("device") != document["device"]:
        old = {}
    for part, key, new in (("rows", KEY, rows), ("model", MODEL_KEY, model_rows)):
        table = {tuple(row[k] for k in key): row for row in old.get(part, [])}
        table |= {tuple(row[k] for k in key): row | run for row in (r.as_dict() for r in new)}
        document[part] = sorted(table.values(), key=lambda row: str(row[key[0]]))
    path.write_text(json.dumps(document, indent=1) + "\n")
    return path


KEY = ("op", "shape", "dtype", "direction", "threads", "device_type")
MODEL_KEY = ("what", "dtype", "threads", "at")


@functools.cache
def _ceilings() -> dict[str, Any]:
    """What this GPU can do in this run."""
    if harness.device.type == "cpu":
        return {}
    from ceilings import ceilings

    return {"ceilings": ceilings(harness.device)}


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    write = terminalreporter.write_line
    for line in ["", *lines] if lines else []:
        write(line)
    if not (rows or model_rows):
        return
    write("")
    write(
        f"{'op':22}{'shape':25} {'dtype':10}{'pass':18}{'ours ms':>10}{'floor':>7}"
        f"{'% floor':>9}{'best peer':>16}{'ratio':>8}{'A/A':>6}{'error':>10}"
    )
    for r in rows:
        ratio = "" if r.peer_ratio is None else f"{r.peer_ratio:.1f}x"
        write(
            f"{r.op:22}{r.shape:25} {r.dtype:10}{r.direction:18}{r.ours_ms:10.3f}{r.floor:>7}"
            f"{100 * r.floor_ratio:8.0f}%{r.peer:>16}{ratio:>8}{r.noise:6.2f}{r.error:10.1e}"
        )
    for name, value in _ceilings().get("ceilings", {}).items():
        write(f"{name}: {value}")
    path = _save(config)
    if path is not None:
        write(f"wrote {path}")
