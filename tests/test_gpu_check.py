"""gpu_check.py as far as a machine without a GPU can tell: its parts are replaced."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gpu_check
import gpu_commands
import pytest
import torch
from backend import CUDA_OPS
from gpu_commands import ROOT, command

Result = dict[str, Any]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    gpu_commands._broken_off.clear()
    yield
    gpu_commands._broken_off.clear()


def test_all_limits_together_are_less_than_nine_minutes() -> None:
    assert list(gpu_check.LIMITS) == list(gpu_check.PARTS)
    assert gpu_check.TOTAL + gpu_commands.GRACE + 2 < 540
    assert sum(gpu_check.LIMITS.values()) <= 540


def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **outcomes: Any) -> list[str]:
    """Parts that end like this: True, False or an error to raise; the names of those run."""
    ran: list[str] = []

    def part(name: str, outcome: Any) -> Any:
        def run(result: Result, limit: float) -> None:
            ran.append(name)
            result["seen"] = 1
            if isinstance(outcome, BaseException):
                raise outcome
            result["ok"] = outcome

        return run

    parts = {name: part(name, outcomes.get(name, True)) for name in gpu_check.PARTS}
    monkeypatch.setattr(gpu_check, "PARTS", parts)
    monkeypatch.setattr(gpu_check, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu_check, "BUILD", tmp_path)
    objects = tmp_path / "CMakeFiles/_C.dir/cpp/bind"
    objects.mkdir(parents=True, exist_ok=True)
    (objects / "module.cpp.o").touch()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    return ran


def written(folder: Path) -> Result:
    return json.loads((folder / "gpu-check-nvidia-h200.json").read_text())


def test_what_was_not_passed_is_run_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran = stand_in(monkeypatch, tmp_path, test=False)
    assert gpu_check.main([]) == 1
    assert ran == list(gpu_check.PARTS)
    document = written(tmp_path)
    assert document["device"] == "NVIDIA H200"
    assert [p for p, result in document["parts"].items() if not result["ok"]] == ["test"]
    ran = stand_in(monkeypatch, tmp_path)
    assert gpu_check.main([]) == 0
    assert ran == ["test"]
    assert all(result["ok"] for result in written(tmp_path)["parts"].values())


def test_named_parts_run_in_order_and_keep_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stand_in(monkeypatch, tmp_path)
    assert gpu_check.main([]) == 0
    ran = stand_in(monkeypatch, tmp_path, bench=False)
    assert gpu_check.main(["bench", "test"]) == 1
    assert ran == ["test", "bench"]
    assert list(written(tmp_path)["parts"]) == list(gpu_check.PARTS)


def test_other_sources_begin_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stand_in(monkeypatch, tmp_path)
    assert gpu_check.main([]) == 0
    monkeypatch.setattr(gpu_check, "fingerprint", lambda: "another")
    ran = stand_in(monkeypatch, tmp_path)
    assert gpu_check.main(["ceilings"]) == 0
    assert ran == ["ceilings"]
    assert list(written(tmp_path)["parts"]) == ["ceilings"]
    (tmp_path / "gpu-check-nvidia-h200.json").write_text("{cut off")
    assert gpu_check.main(["build"]) == 0


def test_a_failed_build_ends_it_and_a_raised_error_does_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ran = stand_in(monkeypatch, tmp_path, build=False)
    assert gpu_check.main([]) == 1
    assert ran == ["build"]
    ran = stand_in(monkeypatch, tmp_path, test=ValueError("a typo"))
    assert gpu_check.main([]) == 1
    assert ran == list(gpu_check.PARTS)
    assert written(tmp_path)["parts"]["test"]["error"] == "ValueError: a typo"


def test_ctrl_c_keeps_what_there_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran = stand_in(monkeypatch, tmp_path, cuda=KeyboardInterrupt())
    assert gpu_check.main([]) == 130
    assert ran[-1] == "cuda"
    parts = written(tmp_path)["parts"]
    assert parts["test"]["ok"]
    assert parts["cuda"] == {"ok": False, "seen": 1, "broken_off": True, "seconds": 0.0}


def test_no_part_begins_without_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran = stand_in(monkeypatch, tmp_path)
    document: Result = {"parts": {}}
    assert gpu_check.run(["build"], tmp_path / "x.json", document, total=1) == 1
    assert ran == []


def test_wrong_parts_and_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as stopped:
        gpu_check.main(["bulid"])
    assert stopped.value.code == 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 1


def test_a_command_and_its_children_end_at_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_commands, "GRACE", 1)
    code = "import subprocess; print('begun', flush=True); subprocess.run(['sleep', '77.25'])"
    start = time.monotonic()
    result = command(sys.executable, "-c", code, limit=1.5)
    assert time.monotonic() - start < 8
    assert not result["ok"]
    assert result["output"].startswith("begun\n")
    assert result["last_lines"][-1].startswith("stopped after")
    left = subprocess.run(["pgrep", "-f", "sleep 77.25"], capture_output=True, check=False)
    assert not left.stdout


def test_ctrl_c_ends_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_commands, "GRACE", 1)
    threading.Timer(1, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        command("sleep", "66.25", limit=60)
    assert not subprocess.run(["pgrep", "-f", "sleep 66.25"], capture_output=True).stdout


def test_jobs_side_by_side_note_each(tmp_path: Path) -> None:
    good, bad = tmp_path / "test_good.py", tmp_path / "test_bad.py"
    good.write_text("def test_one(): pass\ndef test_two(): pass\n")
    bad.write_text("def test_three(): assert 0, 'three'\n")
    result: Result = {}
    jobs = {
        path.stem: lambda path=path: gpu_commands.pytest(path, limit=60, ECHO="0")
        for path in (good, bad)
    }
    gpu_commands.side_by_side(result, jobs)
    assert not result["ok"]
    assert (result["passed"], result["failed"]) == (2, 1)
    assert result["jobs"]["test_good"]["ok"]
    assert "output" not in result["jobs"]["test_bad"]


def test_every_part_asks_for_files_and_options_that_exist(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each part's commands, recorded; pytest must be able to collect what they name."""
    said: list[list[str]] = []

    def record(*words: Any, limit: float, echo: bool = True, **environment: str) -> Result:
        said.append([str(word) for word in words])
        output = "3 passed\n========= ERROR SUMMARY: 0 errors\n"
        ok = {"ok": True, "stopped": False, "seconds": 0.1, "output": output}
        return {**ok, "last_lines": ['{"copy_gb_per_s": 1.0}']}

    monkeypatch.setattr(gpu_check, "command", record)
    monkeypatch.setattr(gpu_commands, "command", record)
    monkeypatch.setattr(gpu_check, "RESULTS", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(gpu_check.shutil, "which", lambda _: "/usr/bin/compute-sanitizer")
    for name, part in gpu_check.PARTS.items():
        result: Result = {}
        part(result, 50)
        assert result["ok"], name
    assert "-DCMAKE_CUDA_ARCHITECTURES=90a-real" in said[0]
    tests = [words for words in said if "pytest" in words]
    assert len(tests) == 2 * len(gpu_check.OPS) + 1 + 1 + len(gpu_check.TOOLS) + 1
    for words in tests[0], tests[len(gpu_check.OPS)], tests[-1]:
        start = words.index("pytest") + 1
        collect = [sys.executable, "-m", "pytest", *words[start:], "--co"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "python")}
        done = subprocess.run(collect, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_test_of_a_room_runs_with_its_op() -> None:
    assert gpu_check.OPS == CUDA_OPS
    assert gpu_check.own_tests("cema") == [
        "tests/test_cema.py",
        "tests/test_cema_fft.py",
        "tests/test_cema_mma.py",
    ]
    assert gpu_check.own_tests("cema_kernel") == ["tests/test_cema_kernel.py"]
    step = gpu_check.own_tests("chunk_attention_step")
    assert step == ["tests/test_chunk_attention_step.py"]
    assert not set(step) & set(gpu_check.own_tests("chunk_attention"))
