"""`megalodon train`: training resumes exactly, nothing is ever lost, errors are one line."""

from __future__ import annotations

import errno
import io
import math
import os
import resource
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from command import SHAPE, TEXT, TINY, one_line, start, train, train_records
from safetensors import torch as safetensors_torch

from megalodon_ops._atomic import write_atomically
from megalodon_ops.training.checkpoint import load
from megalodon_ops.training.data import Windows
from megalodon_ops.training.loop import Interrupt
from megalodon_ops.training.metrics import read_metrics
from megalodon_ops.training.options import DEMO_SHAPE, TrainOptions, build_config


def copy_run(run: Path, folder: Path) -> Path:
    out = folder / "copy"
    out.mkdir()
    for file in run.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    return out


# Training


def test_train_writes_what_it_promises(trained: Path) -> None:
    assert sorted(p.name for p in trained.iterdir()) == [
        "checkpoint.safetensors",
        "loss.png",
        "metrics.jsonl",
    ]
    assert (trained / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    records = list(read_metrics(trained))
    assert [r["step"] for r in records if r["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in records if r["kind"] == "eval"] == [3, 6]
    assert all(math.isfinite(r["bits_per_byte"]) for r in records if "bits_per_byte" in r)


def test_resume_is_bit_exact(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout included: the generator's state is part of a checkpoint."""
    arguments = ["--data", corpus, *TINY, "--steps", 6, "--warmup-steps", 2]
    arguments += ["--dropout", 0.1, "--hidden-dropout", 0.1, "--attention-dropout", 0.1]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(whole, *arguments) == 0
    assert train(parts, *arguments, "--stop-after", 2) == 0
    assert train(parts, "--resume", "--stop-after", 1) == 0
    with monkeypatch.context() as patch:
        drawn: list[int] = []
        batch = Windows.batch
        patch.setattr(Windows, "batch", lambda self, step: drawn.append(step) or batch(self, step))
        assert train(parts, "--resume") == 0
        assert drawn == [3, 4, 5]
    assert train_records(parts) == train_records(whole)
    a, b = load(whole, training=True), load(parts, training=True)
    for mine, other in ((a.weights, b.weights), (a.training, b.training)):
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[name], other[name]) for name in mine)


def test_resume_drops_the_metrics_after_the_checkpoint(corpus: Path, tmp_path: Path) -> None:
    """A run that was killed has metrics beyond its last checkpoint, the last line perhaps cut."""
    out = tmp_path / "run"
    assert train(out, "--data", corpus, *TINY, "--steps", 4, "--stop-after", 2) == 0
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 3, "bits_per_byte": 99}\n{"kind": "tra')
    assert train(out, "--resume") == 0
    assert [record[0] for record in train_records(out)] == [1, 2, 3, 4]
    assert all(record[1] < 99 for record in train_records(out))


def test_a_finished_run_can_be_lengthened(
    corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert train(out, "--data", corpus, *TINY, "--steps", 1) == 0
    assert train(out, "--resume") == 0
    assert "complete at step 1" in capfd.readouterr().out
    assert train(out, "--resume", "--steps", 2, "--dtype", "auto") == 0
    assert load(out).settings["step"] == 2


def test_minutes_is_a_time_budget(corpus: Path, tmp_path: Path) -> None:
    begin = time.monotonic()
    assert train(tmp_path / "run", "--data", corpus, *TINY, "--minutes", 0.01) == 0
    assert time.monotonic() - begin < 30
    settings = load(tmp_path / "run").settings
    assert settings["seconds"] >= 0.6
    assert settings["step"] >= 1


def test_auto_dtype_is_measured_stated_and_kept(
    corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--data", corpus, *SHAPE, "--seq-len", 20, "--steps", 2]
    assert train(tmp_path / "auto", *arguments, "--stop-after", 1) == 0
    told = capfd.readouterr().out
    chosen = load(tmp_path / "auto").settings["options"]["dtype"]
    assert chosen in ("float32", "bfloat16")
    assert f"dtype {chosen}: the faster here" in told
    # The probe changes nothing of the run.
    assert train(tmp_path / "named", *arguments, "--stop-after", 1, "--dtype", chosen) == 0
    assert train_records(tmp_path / "auto") == train_records(tmp_path / "named")


def test_bfloat16_trains(corpus: Path, tmp_path: Path) -> None:
    arguments = [*TINY, "--dtype", "bfloat16", "--steps", 2]
    assert train(tmp_path / "run", "--data", corpus, *arguments) == 0
    assert all(weight.dtype != torch.bfloat16 for weight in load(tmp_path / "run").weights.values())


def test_training_learns(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = [*TINY, "--steps", 30, "--lr", 0.02, "--warmup-steps", 3]
    assert train(out, "--data", corpus, *arguments) == 0
    losses = [record[1] for record in train_records(out)]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 1


def test_default_shape_is_the_demos() -> None:
    from megalodon_ops.model import Megalodon

    config = build_config(None, {})
    assert dict(DEMO_SHAPE).items() <= config.to_dict().items()
    assert sum(p.numel() for p in Megalodon(config).parameters()) == 3_423_232
    preset = build_config("mega200M", {"num_layers": 2})
    assert (preset.model_dim, preset.num_layers, preset.vocab_size) == (1024, 2, 256)


def test_learning_rate_warms_up_and_falls() -> None:
    options = TrainOptions(steps=100, lr=1.0, final_lr=0.1, warmup_steps=10)
    assert options.learning_rate(0, 0.0) == pytest.approx(0.1)
    assert options.learning_rate(9, 0.0) == 1.0
    assert options.learning_rate(50, 0.5) == pytest.approx(0.55)
    assert options.learning_rate(100, 1.0) == pytest.approx(0.1)


# Interruption


def test_ctrl_c_saves_and_exits_130(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start("train", "--out", out, "--data", corpus, *TINY, "--minutes", 5)
    deadline = time.monotonic() + 60
    while not (out.exists() and train_records(out)) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    told, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "Traceback" not in error
    assert "--resume" in told
    step = load(out, training=True).settings["step"]
    assert step == train_records(out)[-1][0]
    assert train(out, "--resume", "--stop-after", 1) == 0
    assert [record[0] for record in train_records(out)] == list(range(1, step + 2))


def test_second_ctrl_c_aborts() -> None:
    with Interrupt() as interrupt:
        assert not interrupt.asked
        signal.raise_signal(signal.SIGINT)
        assert interrupt.asked
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_abort_keeps_the_checkpoint(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    out = copy_run(trained, tmp_path)
    before = (out / "checkpoint.safetensors").read_bytes()
    real = os.fsync

    def interrupted(descriptor: int) -> None:
        if "checkpoint" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise KeyboardInterrupt
        real(descriptor)

    monkeypatch.setattr(os, "fsync", interrupted)
    assert train(out, "--resume", "--steps", 8) == 130
    assert "aborted at step 8 without saving" in capfd.readouterr().err
    assert (out / "checkpoint.safetensors").read_bytes() == before
    assert not list(out.glob("*.tmp"))


# Saving


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new and longer")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_full_disk_while_saving(
    trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A limit on the size of a file stands for the full disk: the write itself fails half-way."""
    out = copy_run(trained, tmp_path)
    before = (out / "checkpoint.safetensors").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        code = train(out, "--resume", "--steps", 8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = one_line(capfd, code)
    assert "cannot save" in error
    assert os.strerror(errno.EFBIG) in error
    assert "previous checkpoint is intact" in error
    assert (out / "checkpoint.safetensors").read_bytes() == before
    assert not list(out.glob("*.tmp"))
    assert train(out, "--resume", "--steps", 8) == 0


def test_loss_that_is_not_finite_stops_without_saving(
    trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], corpus: Path
) -> None:
    out = tmp_path / "run"
    arguments = ["--data", corpus, *TINY, "--steps", 9, "--checkpoint-every", 1]
    code = train(out, *arguments, "--lr", 1e30, "--warmup-steps", 0)
    assert "not finite" in one_line(capfd, code)


def test_tied_weights_are_saved_under_both_names(trained: Path) -> None:
    tensors = safetensors_torch.load_file(trained / "checkpoint.safetensors")
    assert torch.equal(tensors["embed.weight"], tensors["output.output.weight"])


# Bad input


def test_bad_corpora(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / ".hidden").write_bytes(TEXT)
    for name in ("empty", "folder"):
        code = train(tmp_path / "run", "--data", tmp_path / name, *TINY, "--steps", 1)
        assert "is empty" in one_line(capfd, code)
    assert not (tmp_path / "run").exists()


def test_unreadable_corpus(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Simulated, because permissions do not stop the superuser."""

    def denied(self: Path, *arguments: object) -> io.BytesIO:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", denied)
        code = train(tmp_path / "run", "--data", corpus, *TINY, "--steps", 1)
    error = one_line(capfd, code)
    assert "corpus.txt" in error
    assert "Permission denied" in error


def test_resume_refuses_another_run(
    trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], corpus: Path
) -> None:
    before = (trained / "checkpoint.safetensors").read_bytes()
    corpus.write_bytes(TEXT + b"more")
    for arguments, wanted in (
        (["--model-dim", 32], "has model_dim = 16, not 32"),
        (["--preset", "mega200M"], "has num_layers = 2, not 12"),
        (["--lr", 1], "has lr = 0.002, not 1.0"),
        (["--seq-len", 21], "has seq_len = 20, not 21"),
        (["--data", corpus], "not the one this run was trained on"),
    ):
        code = train(trained, "--resume", "--steps", 9, *arguments)
        assert wanted in one_line(capfd, code)
    assert (trained / "checkpoint.safetensors").read_bytes() == before
