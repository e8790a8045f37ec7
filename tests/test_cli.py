"""The `megalodon` command as a whole: help, errors in one line, info, bench; see test_cli_*.py."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command import SHAPE, TEXT, one_line
from safetensors import torch as safetensors_torch

from megalodon_ops import checkpoint, cli
from megalodon_ops.training import checkpoint as checkpoints
from megalodon_ops.training.checkpoint import load
from megalodon_ops.training.errors import CommandError

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
