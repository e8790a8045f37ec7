"""Commands with a time limit, one after the other or side by side; used by gpu_check.py.

A command is a process group of its own: at its limit, or after Ctrl-C, all that it has started
ends with it.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
GRACE = 8  # seconds between Ctrl-C and kill for a command that is over its limit
LAST_LINES = 12
AT_ONCE = min(8, os.cpu_count() or 1)  # test processes

Result = dict[str, Any]

_running: set[subprocess.Popen[str]] = set()
_broken_off = threading.Event()  # no command starts after it


def _start(words: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    paths = os.pathsep.join(p for p in (str(ROOT / "python"), os.environ.get("PYTHONPATH")) if p)
    env = {**os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1", **environment}
    return subprocess.Popen(
        words,
        cwd=ROOT,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # a group of its own, with all that it starts
    )


def _signal(process: subprocess.Popen[str], number: int) -> None:
    """To the command and all it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _end(process: subprocess.Popen[str]) -> None:
    """First as Ctrl-C does, so that pytest says how far it came."""
    _signal(process, signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)


def stop_all() -> None:
    """Ends what still runs in other threads."""
    _broken_off.set()
    for process in list(_running):
        _signal(process, signal.SIGINT)
    end = time.monotonic() + GRACE
    while _running and time.monotonic() < end:
        time.sleep(0.05)
    for process in list(_running):
        _signal(process, signal.SIGKILL)


def command(
    *parts: str | Path, limit: float, echo: bool = True, **environment: str
) -> dict[str, Any]:
    """Runs it within the limit, shows its output as it comes, and says how it ended."""
    words = [str(part) for part in parts]
    if _broken_off.is_set():
        return {"ok": False, "seconds": 0.0, "output": "", "last_lines": ["not begun"]}
    start = time.monotonic()
    if echo:
        print("$", *words, flush=True)
    try:
        process = _start(words, environment)
    except OSError as error:
        print(f"{words[0]}: {error.strerror}", flush=True)
        return {"ok": False, "seconds": 0.0, "output": "", "last_lines": [str(error)]}
    _running.add(process)
    lines: list[str] = []

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            if echo:
                print(lines[-1], flush=True)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    stopped = False
    try:
        process.wait(max(limit, 0.1))
    except subprocess.TimeoutExpired:
        stopped = True
        _end(process)
    except BaseException:
        _end(process)
        raise
    finally:
        _signal(process, signal.SIGKILL)  # what it has left behind would hold the pipe open
        process.wait()
        reader.join(2)
        _running.discard(process)
    if stopped:
        lines.append(f"stopped after {limit:.0f} s")
        print(lines[-1], flush=True)
    return {
        "ok": process.returncode == 0 and not stopped,
        "stopped": stopped,
        "seconds": round(time.monotonic() - start, 1),
        "output": "\n".join(lines),
        "last_lines": [line for line in lines if line.strip()][-LAST_LINES:],
    }


def pytest(*arguments: str | Path, limit: float, **environment: str) -> dict[str, Any]:
    """A run of pytest: also how many tests ended how, and which have failed."""
    words = (sys.executable, "-m", "pytest", "-q", "-rfE", "--tb=short", "-p", "no:cacheprovider")
    echo = environment.pop("ECHO", "1") == "1"
    result = command(*words, *arguments, limit=limit, echo=echo, **environment)
    output = result["output"]
    summary = output[-2000:]
    for outcome in ("passed", "failed", "skipped", "error"):
        found = re.findall(rf"\b(\d+) {outcome}", summary)
        result[outcome] = int(found[-1]) if found else 0
    failed = re.findall(r"^(?:FAILED|ERROR) (tests/\S+|bench/\S+)(.*)$", output, re.MULTILINE)
    if failed:
        result["failures"] = [f"{name}{why[:200]}" for name, why in failed[:40]]
    result["ok"] = result["ok"] and result["passed"] > 0
    return result


def kept(result: dict[str, Any]) -> dict[str, Any]:
    """What goes into the json."""
    return {name: value for name, value in result.items() if name != "output"}


def side_by_side(
    result: Result, jobs: dict[str, Callable[[], dict[str, Any]]], width: int = AT_ONCE
) -> None:
    """Runs them and notes each as it ends: a fault of one op's kernel takes the GPU away from its
    own process alone.
    """
    done = result.setdefault("jobs", {})

    def run(name: str) -> None:
        outcome = jobs[name]()
        done[name] = kept(outcome)
        counts = [
            f"{outcome[k]} {k}" for k in ("passed", "failed", "error", "skipped") if outcome.get(k)
        ]
        verdict = "ok" if outcome["ok"] else "FAILED"
        print(f"  {name}: {verdict}, {', '.join(counts)} ({outcome['seconds']} s)", flush=True)
        if not outcome["ok"]:
            print(*(f"    {line}" for line in outcome["last_lines"]), sep="\n", flush=True)

    with ThreadPoolExecutor(width) as pool:
        futures = [pool.submit(run, name) for name in jobs]
        try:
            for future in futures:
                future.result()
        except BaseException:
            stop_all()
            raise
    for outcome in ("passed", "failed", "skipped"):
        result[outcome] = sum(job.get(outcome, 0) for job in done.values())
    result["ok"] = all(name in done and done[name]["ok"] for name in jobs)
