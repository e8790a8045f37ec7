"""Checkpoints that are refused: every damage is told, nothing in a file runs."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_model import assert_same, small_config, wide_model

safetensors_torch = pytest.importorskip("safetensors.torch")

from megalodon_ops import load_checkpoint, save_checkpoint  # noqa: E402
from megalodon_ops.checkpoint import FILE_NAME, FORMAT  # noqa: E402


class Evil:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.system, ("touch executed",)


def test_no_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "consolidated.pth"
    config = small_config()
    for write in (
        lambda: torch.save({"embed.weight": Evil()}, file),
        lambda: torch.save(wide_model(), file),
        lambda: file.write_bytes(pickle.dumps(Evil())),
        lambda: file.write_bytes(pickle.dumps({"embed.weight": Evil()}, protocol=0)),
    ):
        write()
        with pytest.raises(ValueError, match=r"consolidated\.pth: (refused|truncated)") as caught:
            load_checkpoint(tmp_path, config=config)
        assert "weights_only" not in str(caught.value)
        assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("kind", ["official", "model.safetensors", "legacy.pth"])
def test_truncated_files(tmp_path: Path, kind: str) -> None:
    model = wide_model()
    if kind == "legacy.pth":
        file = tmp_path / kind
        torch.save(model.state_dict(), file, _use_new_zipfile_serialization=False)
        assert_same(load_checkpoint(file, config=model.config), model)
    else:
        save_checkpoint(model, tmp_path / kind)
        file = tmp_path / kind / "consolidated.pth" if kind == "official" else tmp_path / kind
    good = file.read_bytes()
    for length in (0, 1, 7, 100, len(good) // 3, len(good) // 2, len(good) - 30, len(good) - 1):
        file.write_bytes(good[:length])
        with pytest.raises(ValueError, match=f"{file.name}: (truncated|refused)"):
            load_checkpoint(file, config=model.config)


def test_damaged_bytes_give_an_error_or_a_model(tmp_path: Path) -> None:
    model = wide_model()
    file = tmp_path / "legacy.pth"
    generator = torch.Generator().manual_seed(0)
    for zipped in (True, False):
        torch.save(model.state_dict(), file, _use_new_zipfile_serialization=zipped)
        good = file.read_bytes()
        for _ in range(25):
            data = bytearray(good)
            for place in torch.randint(0, min(len(good), 4000), (3,), generator=generator).tolist():
                data[place] ^= 1 << (place % 8)
            file.write_bytes(data)
            with contextlib.suppress(ValueError):
                load_checkpoint(file, config=model.config)


def edited(
    tmp_path: Path, shard: int, edit: Callable[[dict[str, Any]], Any], num_shards: int = 2
) -> Path:
    """A folder of shards of which one was changed."""
    folder = tmp_path / "shards"
    save_checkpoint(wide_model(), folder, num_shards=num_shards)
    file = folder / f"consolidated.{shard:02d}.pth"
    weights = torch.load(file, weights_only=True)
    torch.save(edit(weights) or weights, file)
    return folder


WZ = "layers.1.mega.wz.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda w: w.__delitem__(WZ), rf"consolidated\.01\.pth: {WZ}: missing, but in .*00"),
        (lambda w: w.update(odd=torch.zeros(2)), r"consolidated\.00\.pth: odd: missing, but in"),
        (
            lambda w: w.update({WZ: torch.zeros(9, 16)}),
            rf"01\.pth: {WZ}: wanted \[8, 16\] float32 as in .*00\.pth; got \[9, 16\] float32",
        ),
        (
            lambda w: w.update({WZ: w[WZ].half()}),
            rf"{WZ}: wanted .* float32 as in .*; got .* float16",
        ),
        (
            lambda w: w.update({"layers.0.nffn.norm.weight": torch.ones(16)}),
            r"01\.pth: layers\.0\.nffn\.norm\.weight: wanted the values of .*different checkpoints",
        ),
        (lambda w: w.update({WZ: 3}), rf"01\.pth: {WZ}: wanted a named tensor; got int"),
        (
            lambda w: w.update({WZ: torch.zeros(8, 16).to_sparse()}),
            rf"{WZ}: wanted a dense tensor; got torch\.sparse_coo",
        ),
        (lambda w: [1, 2], "01.pth: wanted a state_dict; got list"),
    ],
)
def test_shards_that_do_not_fit(
    tmp_path: Path, edit: Callable[[dict[str, Any]], Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_checkpoint(edited(tmp_path, 1, edit))


def test_shards_that_are_missing_or_too_many(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    save_checkpoint(wide_model(), folder, num_shards=4)
    with pytest.raises(ValueError, match=r"one of 4 shards .*; give the folder"):
        load_checkpoint(folder / "consolidated.02.pth")
    moved = (folder / "consolidated.02.pth").rename(tmp_path / "away.pth")
    with pytest.raises(FileNotFoundError, match=r"wanted consolidated\.02\.pth; got .*00"):
        load_checkpoint(folder)
    (folder / "consolidate_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"wanted consolidated\.02\.pth"):
        load_checkpoint(folder)
    moved.rename(folder / "consolidated.02.pth")
    assert_same(load_checkpoint(folder), wide_model())
    (folder / "consolidate_config.json").write_text('{"model_parallel_size": 2}')
    with pytest.raises(ValueError, match=r"wanted 2 .*; got also .*02\.pth"):
        load_checkpoint(folder)
    (folder / "consolidate_config.json").write_text('{"model_parallel_size": "two"}')
    with pytest.raises(ValueError, match="model_parallel_size: wanted an int >= 1; got 'two'"):
        load_checkpoint(folder)


def test_a_wrong_number_of_shards_is_found_by_the_shapes(tmp_path: Path) -> None:
    """Half of the shards of a model, renumbered: each is whole, together they are not."""
    folder = tmp_path / "shards"
    save_checkpoint(wide_model(), folder, num_shards=4)
    for rank in (2, 3):
        (folder / f"consolidated.0{rank}.pth").unlink()
    (folder / "consolidate_config.json").write_text('{"model_parallel_size": 2}')
    with pytest.raises(ValueError, match=r"model_dim: the configuration has 16; .* has 8"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 3}, "num_layers: the configuration has 3; the weights have 2"),
        ({"num_layers": 10**9}, "num_layers: the configuration has 1000000000; .* have 2"),
        ({"model_dim": 2**30}, "model_dim: the configuration has 1073741824; embed.weight has 16"),
        ({"model_dim": 2**40}, "sizes of no tensor: .* overflowed with sizes=.1099511627776, "),
        ({"vocab_size": 12}, "vocab_size: the configuration has 12; embed.weight has 11"),
        ({"z_dim": 24}, r"z_dim: the configuration has 24; .*wz.weight has 16"),
        ({"cema_ndim": 4}, "cema_ndim: the configuration has 4; .* has 3"),
        ({"norm_num_groups": 2}, "norm_num_groups: the configuration has 2; .* has 4"),
        ({"num_heads": 2}, r"z_dim / num_heads: the configuration has 8; rope.freqs has 4"),
        ({"swiglu": True}, r"fc3.weight: missing \(the configuration has swiglu = True\)"),
        ({"norm_affine": False}, r"rmsnorm.weight: unexpected \(.* norm_affine = False\)"),
        ({"rope_base": 5.0}, r"rope.freqs: .* rope_base about 10000; .* rope_base = 5"),
        ({"share_emb": True}, "output.output.weight: differs from embed.weight"),
        ({"model_dim": "wide"}, r"config.json: model_dim: wanted an int; got 'wide'"),
        ({"wheels": 4}, "config.json: MegalodonConfig: unknown field wheels"),
    ],
)
def test_a_configuration_that_contradicts_the_weights(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    folder = tmp_path / "model"
    save_checkpoint(wide_model(), folder)
    values = json.loads((folder / "config.json").read_text())
    values["model"] |= change
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message) as caught:
        load_checkpoint(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("place", ["config.json", "consolidate_config.json", "config", "settings"])
def test_json_that_is_nested_too_deep(tmp_path: Path, place: str) -> None:
    folder, nested = tmp_path / "model", "[" * 100_000
    if place.endswith(".json"):
        save_checkpoint(wide_model(), folder)
        (folder / place).write_text(nested)
    else:
        folder.mkdir()
        about = {"format": FORMAT, "version": "1", "config": "{}", "settings": "{}", place: nested}
        safetensors_torch.save_file({}, folder / FILE_NAME, about)
    with pytest.raises(ValueError, match=r"(not JSON|cannot be read): .*recursion") as caught:
        load_checkpoint(folder)
    assert str(folder) in str(caught.value)


def test_other_refusals(tmp_path: Path) -> None:
    model = wide_model()
    for path in (tmp_path, tmp_path / "absent", tmp_path / "absent.pth"):
        with pytest.raises(FileNotFoundError, match="no checkpoint here"):
            load_checkpoint(path)
    with pytest.raises(ValueError, match="format: wanted one of safetensors, official; got 'zip'"):
        save_checkpoint(model, tmp_path / "x", format="zip")
    with pytest.raises(ValueError, match="num_shards: wanted 1 with"):
        save_checkpoint(model, tmp_path / "x.safetensors", num_shards=2)
    for count in (3, 8):
        with pytest.raises(ValueError, match="num_shards: wanted a divisor of num_heads = 4"):
            save_checkpoint(model, tmp_path / "x", num_shards=count)
    with pytest.raises(ValueError, match="num_shards: wanted an int >= 1; got 0"):
        save_checkpoint(model, tmp_path / "x", num_shards=0)
    with pytest.raises(TypeError, match="model: wanted a Megalodon; got str"):
        save_checkpoint("model", tmp_path / "x")
    with pytest.raises(TypeError, match="config: wanted a MegalodonConfig; got dict"):
        load_checkpoint(tmp_path, config={})
    for kind in (torch.int32, torch.complex64, torch.float8_e4m3fn):
        weights = model.state_dict() | {"embed.weight": torch.zeros(11, 16).to(kind)}
        torch.save(weights, tmp_path / "odd.pth")
        with pytest.raises(ValueError, match=f"embed.weight: wanted float32, .*; got {kind}"):
            load_checkpoint(tmp_path / "odd.pth", config=model.config)
    save_checkpoint(model, tmp_path / "both")
    save_checkpoint(model, tmp_path / "both", format="safetensors")
    with pytest.raises(ValueError, match=r"wanted one checkpoint; got checkpoint.safetensors and"):
        load_checkpoint(tmp_path / "both")
