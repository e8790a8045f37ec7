"""The `megalodon` command: training resumes exactly, nothing is ever lost, errors are one line."""

from __future__ import annotations

import dataclasses
import errno
import gzip
import io
import json
import lzma
import math
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")
for needed in ("typer", "rich", "matplotlib"):
    pytest.importorskip(needed)

from megalodon_ops import checkpoint, cli  # noqa: E402
from megalodon_ops._atomic import write_atomically  # noqa: E402
from megalodon_ops.sampling import Sampling  # noqa: E402
from megalodon_ops.session import Event, Session  # noqa: E402
from megalodon_ops.training import checkpoint as checkpoints  # noqa: E402
from megalodon_ops.training.checkpoint import load, load_model  # noqa: E402
from megalodon_ops.training.data import Windows  # noqa: E402
from megalodon_ops.training.errors import CommandError  # noqa: E402
from megalodon_ops.training.evaluation import bits_per_byte, byte_tensor, compare  # noqa: E402
from megalodon_ops.training.loop import Interrupt  # noqa: E402
from megalodon_ops.training.metrics import read_metrics  # noqa: E402
from megalodon_ops.training.options import DEMO_SHAPE, TrainOptions, build_config  # noqa: E402

TEXT = "".join(f"line {i}: the {i * i} quick brown foxes, é€😀\n" for i in range(120)).encode()
SIZES = {
    "model-dim": 16,
    "num-layers": 2,
    "z-dim": 8,
    "value-dim": 12,
    "ffn-hidden-dim": 16,
    "cema-ndim": 2,
    "chunk-size": 8,
    "norm-num-groups": 4,
}
SHAPE = [word for name, size in SIZES.items() for word in (f"--{name}", str(size))]
TINY = [*SHAPE, "--seq-len=20", "--batch-size=2", "--dtype=float32", "--eval-bytes=40"]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_bytes(TEXT)
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of six steps. Tests must not change it."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "corpus.txt").write_bytes(TEXT)
    out = folder / "run"
    arguments = ["train", "--out", str(out), "--data", str(folder / "corpus.txt"), *TINY]
    assert cli.main([*arguments, "--steps", "6", "--eval-every", "3"]) == 0
    return out


def train(out: Path, *arguments: object) -> int:
    return cli.main(["train", "--out", str(out), *map(str, arguments)])


def train_records(out: Path) -> list[tuple[float, ...]]:
    keys = ("step", "bits_per_byte", "gradient_norm", "lr")
    return [tuple(r[k] for k in keys) for r in read_metrics(out) if r["kind"] == "train"]


def one_line(capfd: pytest.CaptureFixture[str], code: int) -> str:
    """The error told on stderr: one line, exit code 2, no traceback."""
    error = capfd.readouterr().err
    assert code == 2, error
    assert error.startswith("megalodon: error: ")
    assert error.count("\n") == 1, error
    return error


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "megalodon_ops", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )


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


def copy_run(run: Path, folder: Path) -> Path:
    out = folder / "copy"
    out.mkdir()
    for file in run.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    return out


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


def test_bad_options(
    corpus: Path, tmp_path: Path, trained: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    new = ["train", "--out", tmp_path / "new", "--data", corpus, *SHAPE]
    generate = ["generate", "--checkpoint", trained, "--max-new-tokens", 1]
    cases: list[tuple[list[object], str]] = [
        ([*new, "--seq-len", 0], "--seq-len must be at least 1; got 0"),
        ([*new, "--lr", "nan"], "--lr must be a positive number; got nan"),
        ([*new, "--lr", -1], "--lr must be"),
        ([*new, "--minutes", "inf"], "--minutes must be"),
        ([*new, "--steps", 5, "--minutes", 1], "--steps or --minutes"),
        ([*new, "--steps", "many"], "--steps"),
        ([*new, "--held-out", 100], "--held-out must be from 0 to below 100"),
        ([*new, "--dtype", "int8"], "--dtype must be one of"),
        ([*new, "--seed", -1], "--seed must be"),
        ([*new, "--chunk-size", 0], "chunk_size"),
        ([*new, "--norm-num-groups", 3], "norm_num_groups"),
        ([*new, "--z-dim", 7], "z_dim"),
        ([*new, "--preset", "mega9T"], "mega9T"),
        ([*new, "--colour", "red"], "--colour"),
        ([*new, "--seq-len", 10**6], "shorter than a window"),
        ([*new, "--seq-len", len(TEXT)], "shorter than a window"),
        ([*new, "--data", ""], "--data must be"),
        ([*new, "--data", tmp_path / "absent"], "No such file"),
        ([*new, "--data", "/dev/null"], "neither a file nor a folder"),
        ([*new, "--out", corpus], "corpus.txt"),
        (["train", "--out", trained, "--steps", 1], "already holds a run"),
        ([*generate, "--temperature", -1], "--temperature must be"),
        ([*generate, "--temperature", "nan"], "--temperature must be"),
        ([*generate, "--top-p", 0], "--top-p must be"),
        ([*generate, "--top-k", -2], "--top-k must be"),
        ([*generate, "--min-p", 1.5], "--min-p must be from 0 to 1; got 1.5"),
        ([*generate, "--repetition-penalty", 0], "--repetition-penalty must be"),
        ([*generate, "--repetition-window", -1], "--repetition-window must be"),
        ([*generate, "--stop", ""], "--stop must not be empty"),
        ([*generate, "--beams", 2, "--top-k", 3], "it excludes the options of sampling"),
        ([*generate, "--beams", 2, "--save-state", tmp_path / "a"], "it excludes --save-state"),
        ([*generate[:-1], 0, "--beams", 2], "--beams needs a --max-new-tokens above 0"),
        ([*generate, "--save-state", tmp_path / "absent" / "state"], "No such file"),
        ([*generate, "--prompt", "a", "--prompt-file", corpus], "not both"),
        ([*generate, "--prompt-file", tmp_path / "absent"], "cannot read the prompt"),
        (["eval", tmp_path / "absent", "--checkpoint", trained], "No such file"),
        (["eval", "--checkpoint", tmp_path / "absent"], "no checkpoint at"),
        (["fly"], "fly"),
    ]
    capfd.readouterr()
    for arguments, wanted in cases:
        code = cli.main(list(map(str, arguments)))
        assert wanted in one_line(capfd, code), arguments
    assert not (tmp_path / "new" / "checkpoint.safetensors").exists()


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


def test_bad_checkpoints(
    trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], corpus: Path
) -> None:
    good = (trained / "checkpoint.safetensors").read_bytes()
    bad = tmp_path / "bad.safetensors"

    def told(*command: object) -> str:
        return one_line(capfd, cli.main(list(map(str, command))))

    for length in (0, 4, 100, len(good) // 2, len(good) - 1):
        bad.write_bytes(good[:length])
        assert "truncated, damaged or not" in told("eval", corpus, "--checkpoint", bad)
    torch.save({"embed.weight": torch.zeros(2)}, bad)
    assert "not a safetensors file" in told("generate", "--checkpoint", bad)
    safetensors_torch.save_file({"weight": torch.zeros(2)}, bad)
    assert "not a checkpoint of `megalodon train`" in told("generate", "--checkpoint", bad)

    saved = load(trained, training=True)
    folder = tmp_path / "run"
    folder.mkdir()

    def saved_with(**changes: object) -> Path:
        checkpoints.save(dataclasses.replace(saved, **changes), folder)
        return folder

    wide = saved.config.replace(ffn_hidden_dim=20)
    assert "do not fit" in told("generate", "--checkpoint", saved_with(config=wide))
    saved_with(training={})
    assert "no complete training state" in told("train", "--out", folder, "--resume")
    saved_with(settings={})
    assert "--resume" in told("train", "--out", folder, "--resume", "--data", corpus)
    assert "no checkpoint at" in told("train", "--out", tmp_path / "absent", "--resume")


def test_a_header_that_is_not_ours(trained: Path, tmp_path: Path) -> None:
    weights = {"a": torch.zeros(1)}
    path = tmp_path / "file.safetensors"
    good = {"format": checkpoint.FORMAT, "version": "1", "config": "{}", "settings": "{}"}
    for change in (
        {"version": "2"},
        {"version": "x"},
        {"config": "{"},
        {"config": '{"wheels": 4}'},
        {"config": "[]"},
        {"config": '{"model_dim": "big"}'},
    ):
        safetensors_torch.save_file(weights, path, good | change)
        with pytest.raises(CommandError, match=r"newer|cannot be read"):
            load(path)


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


# Evaluation


def test_eval_is_the_same_in_any_pieces(trained: Path) -> None:
    model, _ = load_model(trained)
    data = TEXT[:150]

    def pieces(size: int) -> list[bytes]:
        return [data[i : i + size] for i in range(0, len(data), size)]

    logits = model(byte_tensor(data))[0].double().log_softmax(-1)
    chosen = logits[:-1].gather(-1, byte_tensor(data)[0, 1:, None])
    expected = (8 - chosen.sum().item() / math.log(2)) / len(data)
    for size in (1, 7, 8, 64, 1000):
        result = bits_per_byte(model, pieces(size))
        assert result == pytest.approx(expected, rel=1e-5)
    assert bits_per_byte(model, [b"", data[:1], b"", data[1:]]) == pytest.approx(expected, rel=1e-5)
    compared = compare(model, pieces(33))
    assert compared.count == len(data)
    assert compared.model == pytest.approx(expected, rel=1e-5)
    assert compared.gzip == 8 * len(gzip.compress(data, 9)) / len(data)
    assert compared.xz == 8 * len(lzma.compress(data, preset=9)) / len(data)


def test_eval_of_a_file_and_of_the_held_out_part(
    trained: Path, corpus: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    corpus.write_bytes(TEXT[:50])
    assert cli.main(["eval", str(corpus), "--checkpoint", str(trained)]) == 0
    output = capfd.readouterr()
    assert "50 bytes" in output.out
    assert all(name in output.out for name in ("megalodon", "xz -9", "gzip -9"))
    assert output.err == ""
    assert cli.main(["eval", "--checkpoint", str(trained), "--max-bytes", "40"]) == 0
    told = capfd.readouterr().out
    assert "held out: 40 bytes" in told
    last = [r for r in read_metrics(trained) if r["kind"] == "eval"][-1]["bits_per_byte"]
    assert f"{last:.4f}" in told  # --eval-bytes was 40 as well


# Generation


def generated(capfdbinary: pytest.CaptureFixture[bytes], *arguments: object) -> bytes:
    capfdbinary.readouterr()
    assert cli.main(["generate", *map(str, arguments)]) == 0
    return capfdbinary.readouterr().out


def test_generate_is_reproducible_by_seed(
    trained: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    arguments = ["--checkpoint", trained, "--max-new-tokens", 20, "--prompt", "line"]
    texts = [generated(capfdbinary, *arguments, "--seed", seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith(b"line")
    unechoed = generated(capfdbinary, *arguments, "--seed", 1, "--no-echo")
    assert b"line" + unechoed == texts[0]


def test_generate_at_temperature_zero_is_argmax(
    trained: Path, corpus: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    model, _ = load_model(trained)
    corpus.write_bytes(TEXT[:21])
    made = generated(
        capfdbinary, "--checkpoint", trained, "--prompt-file", corpus, "--no-echo",
        "--temperature", 0, "--max-new-tokens", 12,
    )  # fmt: skip
    context = list(TEXT[:21])
    for _ in range(12):
        with torch.no_grad():
            context.append(int(model(torch.tensor([context]))[0, -1].argmax()))
    assert made.decode() == bytes(context[21:]).decode(errors="replace") + "\n"


def test_stop_and_saved_states(
    trained: Path, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    state = tmp_path / "state"
    options = ["--checkpoint", trained, "--temperature", 2, "--no-echo"]
    prompt = ["--prompt", "line", "--seed", 3]
    model, _ = load_model(trained)
    session = Session(model, Sampling(temperature=2.0))
    session.add([b"line"], seed=3)
    tokens = bytes(token for _ in range(40) for token in session.step()[0].tokens)
    cut = next(i for i in range(3, 40) if 33 <= tokens[i] < 127 and tokens[i] not in tokens[:i])
    stopped = generated(
        capfdbinary, *options, *prompt, "--stop", chr(tokens[cut]), "--stop", "never"
    )
    assert stopped.decode() == tokens[:cut].decode(errors="replace") + "\n"

    first = generated(capfdbinary, *options, *prompt, "--max-new-tokens", 15, "--save-state", state)
    again = ["--checkpoint", trained, "--no-echo", "--load-state", state, "--max-new-tokens", 25]
    second = generated(capfdbinary, *again)
    assert first.decode() == tokens[:15].decode(errors="replace") + "\n"
    assert second.decode() == tokens[15:].decode(errors="replace") + "\n"
    # More prompt after a state, and other options than those it was saved with.
    more = generated(capfdbinary, *again, "--prompt", " 7", "--temperature", 0)
    assert more == generated(capfdbinary, *again, "--prompt", " 7", "--temperature", 0, "--seed", 9)


def test_ctrl_c_saves_the_state(trained: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    process = start(
        "generate", "--checkpoint", trained, "--max-new-tokens", 0, "--save-state", state
    )
    assert process.stdout is not None
    assert process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error == ""
    assert len(Session.load(state, load_model(trained)[0]).rows) == 1


def test_beams(trained: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    options = ["--checkpoint", trained, "--prompt", "li", "--max-new-tokens", 9]
    greedy = generated(capfdbinary, *options, "--temperature", 0)
    assert generated(capfdbinary, *options, "--beams", 1) == greedy
    assert cli.main(["generate", *map(str, options), "--beams", "3", "--timing"]) == 0
    output = capfdbinary.readouterr()
    assert output.out.startswith(b"li")
    assert b"log probability -" in output.err


def test_bad_state_files(trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    state = tmp_path / "state"
    base = ["generate", "--checkpoint", str(trained), "--load-state", str(state)]
    assert "No such file" in one_line(capfd, cli.main(base))
    assert cli.main([*base[:3], "--save-state", str(state), "--max-new-tokens", "1"]) == 0
    capfd.readouterr()
    whole = state.read_bytes()
    state.write_bytes(whole[:-5])
    assert "truncated" in one_line(capfd, cli.main(base))
    state.write_bytes(whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:])
    assert "damaged" in one_line(capfd, cli.main(base))


def test_characters_are_printed_when_complete(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    wanted = "é€😀".encode()
    tokens = iter([*wanted, 0xFF, *b"a", 0xE2, 0x82])
    monkeypatch.setattr(Session, "step", lambda self: [Event(0, (next(tokens),))])
    out = generated(capfdbinary, "--checkpoint", trained, "--no-echo", "--max-new-tokens", 13)
    assert out.decode() == "é€😀\ufffda\ufffd\n"


def test_prompt_file_and_timing(
    trained: Path, corpus: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    arguments = ["generate", "--checkpoint", trained, "--prompt-file", corpus, "--timing"]
    assert cli.main([*map(str, arguments), "--max-new-tokens", "2"]) == 0
    output = capfdbinary.readouterr()
    assert output.out.startswith(TEXT)
    assert f"prompt: {len(TEXT)} tokens".encode() in output.err
    assert b"2 tokens at" in output.err
    assert b"ms/token" in output.err


def test_unlimited_generation_stops_at_ctrl_c(trained: Path) -> None:
    process = start("generate", "--checkpoint", trained, "--max-new-tokens", 0, "--timing")
    assert process.stdout is not None
    assert process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in error
    assert "ms/token" in error


def test_a_reader_that_leaves_is_no_error(trained: Path) -> None:
    process = start("generate", "--checkpoint", trained, "--max-new-tokens", 0)
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.read(5)
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert process.stderr.read() == ""
    process.stderr.close()


# The rest


def test_info(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    told = capfd.readouterr().out
    assert all(word in told for word in ("torch", "python", "threads", "CUDA"))


def test_bench_needs_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # workers do not time
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "a" / "b" / "c" / "cli.py"))
    assert "source checkout" in one_line(capfd, cli.main(["bench"]))
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "bench_add.py").write_text(
        "def test_add(benchmark):\n    assert benchmark(lambda: 1 + 1) == 2\n"
    )
    assert cli.main(["bench", "add"]) == 0
    assert "test_add" in capfd.readouterr().out


def test_help_lists_the_commands(capfd: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"]):
        assert cli.main(arguments) == 0
        told = capfd.readouterr().out
        assert all(word in told for word in ("train", "generate", "eval", "bench", "info"))


def test_the_library_imports_without_the_commands_packages() -> None:
    code = (
        "import megalodon_ops, sys, json;"
        "print(json.dumps([n for n in ('typer','rich','matplotlib','safetensors')"
        " if n in sys.modules]))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert json.loads(result.stdout) == []
