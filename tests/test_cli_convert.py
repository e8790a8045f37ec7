"""`megalodon convert`: shards, safetensors and back; what it refuses is told in one line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from small_model import assert_same, wide_model

pytest.importorskip("safetensors.torch")

from megalodon_ops import load_checkpoint, save_checkpoint


def test_convert_says_that_transformers_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("typer")
    from megalodon_ops import cli

    monkeypatch.setitem(sys.modules, "transformers", None)
    for name in [n for n in sys.modules if n.startswith("megalodon_ops.hf")]:
        monkeypatch.delitem(sys.modules, name)
    save_checkpoint(wide_model(), tmp_path / "a.safetensors")
    paths = [str(tmp_path / name) for name in ("a.safetensors", "hf")]
    assert cli.main(["convert", *paths, "--format", "hf"]) == 2
    assert "pip install 'megalodon-ops[hf]'" in capfd.readouterr().err


def test_convert(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("typer")
    from megalodon_ops import cli

    model = wide_model()
    start, shards, back = (
        tmp_path / "a.safetensors",
        tmp_path / "shards",
        tmp_path / "b.safetensors",
    )
    save_checkpoint(model, start)
    assert cli.main(["convert", str(start), str(shards), "--num-shards", "2"]) == 0
    assert cli.main(["convert", str(shards), str(back), "--dtype", "bfloat16"]) == 0
    assert "bfloat16" in capfd.readouterr().out
    assert_same(load_checkpoint(shards), model)
    assert_same(load_checkpoint(back), model.bfloat16())
    for arguments, wanted in (
        ([start, back], "exists already"),
        ([start, tmp_path / "c", "--num-shards", 3], "num_shards: wanted a divisor"),
        ([start, tmp_path / "c", "--dtype", "int4"], "--dtype must be one of"),
        ([start, tmp_path / "c", "--format", "zip"], "--format must be one of"),
        ([start, tmp_path / "c", "--format", "hf", "--num-shards", 2], "--num-shards is for"),
        ([tmp_path / "absent", tmp_path / "c"], "no checkpoint here"),
    ):
        assert cli.main(["convert", *map(str, arguments)]) == 2
        error = capfd.readouterr().err
        assert wanted in error
        assert error.count("\n") == 1
    assert not (tmp_path / "c").exists()
