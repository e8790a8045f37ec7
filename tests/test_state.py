"""MegalodonState: rows, copies, files, and what a model refuses."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_model import random_tokens, small_config, small_model

from megalodon_ops import _files
from megalodon_ops.model import Megalodon
from megalodon_ops.state import MegalodonState


def advanced(model: Megalodon, rows: int = 3, length: int = 6) -> MegalodonState:
    with torch.no_grad():
        state: MegalodonState = model(random_tokens(rows, length), return_state=True)[1]
    return state


def equal(a: MegalodonState, b: MegalodonState) -> bool:
    ours, theirs = a.tensors(), b.tensors()
    same = ours.keys() == theirs.keys() and a.fingerprint == b.fingerprint
    return same and all(
        ours[n].dtype == theirs[n].dtype and torch.equal(ours[n], theirs[n]) for n in ours
    )


def test_shapes_and_dtypes() -> None:
    state = small_model(dtype=torch.float32).init_state(3)
    layer = state.layers[1]
    assert layer.k_cache.shape == (3, 4, 2, 4)
    assert layer.v_cache.shape == (3, 4, 2, 6)
    assert layer.h.shape == (3, 12, 3, 2)
    assert layer.norm.mean.shape == layer.norm.var.shape == (3, 3)
    assert layer.norm.count.dtype == state.position.dtype == torch.int64
    assert (state.batch_size, state.dtype, state.device.type) == (3, torch.float32, "cpu")
    assert len(state.tensors()) == 2 * 6 + 3 + 1


def test_clone_shares_nothing_and_detach_everything() -> None:
    model = small_model()
    _, state = model(random_tokens(2, 5), return_state=True)
    copy, bare = state.clone(), state.detach()
    assert equal(copy, state)
    assert copy.layers[0].h.requires_grad
    assert not bare.layers[0].h.requires_grad
    for name, tensor in state.tensors().items():
        assert copy.tensors()[name].data_ptr() != tensor.data_ptr()
        assert bare.tensors()[name].data_ptr() == tensor.data_ptr()


def test_rows() -> None:
    model = small_model()
    state = advanced(model)
    picked = state.index_select(torch.tensor([2, 0, 2]))
    assert equal(picked.select(0), state.select(2))
    assert equal(picked.select(1), state.select(0))
    assert equal(picked.select(-1), state.select(-1))
    assert equal(MegalodonState.cat([state.select(i) for i in range(3)]), state)
    with pytest.raises(IndexError, match=r"row must be in \[-3, 3\); got 3"):
        state.select(3)
    with pytest.raises(ValueError, match=r"rows must be a vector of int64 or int32"):
        state.index_select(torch.tensor([0.5]))
    with pytest.raises(ValueError, match="wanted one state or more"):
        MegalodonState.cat([])
    with pytest.raises(ValueError, match="wanted states of one config"):
        MegalodonState.cat([state, small_model(chunk_size=5).init_state(1)])


def test_save_and_load(tmp_path: Path) -> None:
    model = small_model()
    state = advanced(model)
    path = tmp_path / "state.safetensors"
    state.save(path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    loaded = MegalodonState.load(path, model.config)
    assert equal(loaded, state)
    more = random_tokens(3, 3, seed=1)
    assert torch.equal(model(more, loaded), model(more, state))
    # A slice of a larger storage, and other training settings.
    state.select(1).save(path)
    config = model.config.replace(dropout=0.5)
    assert equal(MegalodonState.load(path, config), state.select(1))


def test_bfloat16_state_survives_a_file(tmp_path: Path) -> None:
    state = advanced(small_model(dtype=torch.bfloat16))
    state.save(tmp_path / "state")
    assert equal(MegalodonState.load(tmp_path / "state"), state)


def test_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state"
    model = small_model()
    model.init_state(1).save(path)
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="disk full"):
        advanced(model).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


def test_bad_files(tmp_path: Path) -> None:
    model = small_model()
    path = tmp_path / "state"
    with pytest.raises(FileNotFoundError):
        MegalodonState.load(path)
    advanced(model).save(path)
    whole = path.read_bytes()
    for size in (0, 4, 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="truncated, or not a safetensors file"):
            MegalodonState.load(path)
    path.write_bytes(b"hello, this is text, not tensors")
    with pytest.raises(ValueError, match="truncated, or not a safetensors file"):
        MegalodonState.load(path)
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"format: wanted 'megalodon_ops\.state'; got None"):
        MegalodonState.load(path)
    for at in [*range(0, len(whole) - 1, 31), len(whole) - 1]:  # header, names, metadata, tensors
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(ValueError, match=r"truncated, or not|(format|version): wanted|damaged"):
            MegalodonState.load(path)
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="config: the state belongs to a model of config"):
        MegalodonState.load(path, small_config(chunk_size=8))


def test_files_with_missing_or_misshapen_tensors(tmp_path: Path) -> None:
    model = small_model()
    state = advanced(model)
    path = tmp_path / "state"
    metadata = {
        "format": "megalodon_ops.state",
        "version": "2",
        "fingerprint": state.fingerprint,
        "num_layers": "2",
    }
    named = state.tensors()
    _files.write(path, {n: t for n, t in named.items() if n != "layers.1.cema_h"}, metadata)
    with pytest.raises(ValueError, match=r"not a complete MegalodonState: .*layers\.1\.cema_h"):
        MegalodonState.load(path)
    _files.write(path, {**named, "position": torch.zeros(1, dtype=torch.int64)}, metadata)
    with pytest.raises(ValueError, match="not a complete MegalodonState: state: shape"):
        MegalodonState.load(path, model.config)
    _files.write(path, {**named, "extra": torch.zeros(1)}, metadata)
    with pytest.raises(ValueError, match="tensors of another kind"):
        MegalodonState.load(path)
    _files.write(path, named, {**metadata, "version": "1"})
    with pytest.raises(ValueError, match="version: wanted '2'; got '1'"):
        MegalodonState.load(path)


def test_model_refuses_a_state_that_does_not_fit() -> None:
    model = small_model()
    state = model.init_state(2)
    tokens = random_tokens(2, 3)
    with pytest.raises(ValueError, match=r"state: batch: wanted 2 rows .*; got 3"):
        model(tokens, model.init_state(3))
    with pytest.raises(ValueError, match="state: config: the state belongs to a model of config"):
        model(tokens, small_model(rope_base=1e5).init_state(2))
    with pytest.raises(
        ValueError, match=r"state: dtype: .*wanted torch.float64; got torch.float32"
    ):
        model(tokens, small_model(dtype=torch.float32).init_state(2))
    with pytest.raises(ValueError, match=r"state: device: .* on meta; tokens and model on cpu"):
        model(tokens, state.to("meta"))
    with pytest.raises(TypeError, match="state: wanted a MegalodonState; got tuple"):
        model(tokens, ())
    with pytest.raises(ValueError, match="inplace_state: wanted a state to write into"):
        model(tokens, inplace_state=True)
    with pytest.raises(ValueError, match=r"inplace_state: wanted torch.no_grad\(\)"):
        model(tokens, state, inplace_state=True)
