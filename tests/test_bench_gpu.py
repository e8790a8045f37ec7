"""The benches' way on a GPU, without one: on tensors that have no numbers (fake_gpu.py)."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from backend import CUDA_OPS, ROOT

BENCHES = [op for op in CUDA_OPS if (ROOT / f"bench/bench_{op}.py").exists()]


def run(folder: Path, *options: str) -> str:
    paths = [ROOT / "python", ROOT / "tests", ROOT / "bench", os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "fake_gpu", "--device=meta"]
    command += ["-p", "no:cacheprovider", f"--results={folder}", "--save=nothing", *options]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("options", [(), ("--long",)], ids=["short", "long"])
def test_every_bench(tmp_path: Path, options: tuple[str, ...]) -> None:
    benches = ["rms_norm"] if options else BENCHES  # all sizes of one say enough
    said = run(tmp_path, *(f"bench/bench_{op}.py" for op in benches), *options)
    document = json.loads((tmp_path / "nothing.json").read_text())
    assert document["device"] == "NVIDIA Nothing"
    assert document["ceilings"] == {"copy_gb_per_s": 4295.0, "bf16_gemm_tflop_per_s": 1099.5}
    rows = document["rows"]
    assert {row["op"] for row in rows} == set(benches)
    assert {row["device_type"] for row in rows} == {"meta"}
    assert all(row["ours_p10_ms"] == row["ours_p90_ms"] == row["ours_ms"] for row in rows)
    peers = [row["op"] for row in rows if row["peer"]]
    assert set(peers) == set(benches)
    # A peer that mixes devices would be left out.
    left_out = [line for line in said.splitlines() if "is left out" in line]
    assert not [line for line in left_out if "sdpa" not in line], left_out
    shapes = {row["shape"] for row in rows if row["op"] == "rms_norm"}
    if options:
        assert shapes >= {"1x32768x4096", "8x4096x1024", "1x131072x4096", "2x16384x2048"}
    else:
        assert shapes == {"1x32768x4096"}
        assert {row["dtype"] for row in rows if row["op"] == "rms_norm"} == {"bfloat16"}


def test_out_of_time_is_a_skip_and_keeps_earlier_rows(tmp_path: Path) -> None:
    run(tmp_path, "bench/bench_silu_mul.py")
    first = json.loads((tmp_path / "nothing.json").read_text())["rows"]
    said = run(tmp_path, "bench/bench_rms_norm.py", "--seconds=-1")
    assert "2 skipped" in said
    run(tmp_path, "bench/bench_rms_norm.py")
    rows = json.loads((tmp_path / "nothing.json").read_text())["rows"]
    assert [row for row in rows if row["op"] == "silu_mul"] == first
    assert {row["op"] for row in rows} == {"rms_norm", "silu_mul"}


def test_a_time_limit() -> None:
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        from gpu import time_limit
    finally:
        sys.path.pop(0)
    with pytest.raises(TimeoutError, match="not within"), time_limit(0.05):
        time.sleep(5)
    with time_limit(0.05):
        pass
    time.sleep(0.1)  # nothing is left of it


def test_every_file_of_the_benches_can_be_read() -> None:
    command = [sys.executable, "-m", "pytest", "bench", "-q", "--collect-only"]
    command += ["-o", "python_files=bench_*.py", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
