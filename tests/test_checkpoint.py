"""Checkpoints in files: official shards merge and split, and writing is all or nothing."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import golden
import pytest
import torch
from golden import Case
from small_model import assert_same, random_tokens, small_model, wide_model
from torch import Tensor, nn

safetensors_torch = pytest.importorskip("safetensors.torch")

from megalodon_ops import MegalodonConfig, load_checkpoint, save_checkpoint  # noqa: E402
from megalodon_ops import functional as F  # noqa: E402
from megalodon_ops.official import shard_axis, shard_files  # noqa: E402

VARIANTS: list[dict[str, Any]] = [
    {},
    {"swiglu": True, "rescale_nffn": True, "output_size": 7},
    {"share_emb": True, "scale_emb": True, "rope_base": 100.0, "norm_affine": False},
]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("num_shards", [0, 1, 2, 4])  # 0: safetensors
def test_round_trip(
    tmp_path: Path, variant: dict[str, Any], dtype: torch.dtype, num_shards: int
) -> None:
    model = wide_model(dtype, **variant)
    path = tmp_path / ("official" if num_shards else "model.safetensors")
    before = torch.get_rng_state()
    assert save_checkpoint(model, path, num_shards=num_shards or 1) == path
    loaded = load_checkpoint(path)
    assert torch.equal(torch.get_rng_state(), before)
    assert not loaded.training
    assert_same(loaded, model)
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_what_is_written(tmp_path: Path) -> None:
    """The names that the released code's reloading.py reads, and no memory but the shard's own."""
    save_checkpoint(wide_model(torch.bfloat16), tmp_path / "two", num_shards=2)
    names = ["config.json", "consolidate_config.json", "consolidated.00.pth", "consolidated.01.pth"]
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == names
    told = json.loads((tmp_path / "two" / "consolidate_config.json").read_text())
    assert told == {"model_parallel_size": 2, "dtype": "bf16"}
    config = json.loads((tmp_path / "two" / "config.json").read_text())
    assert config["model"]["output_size"] == -1
    assert (config["model_parallel_size"], config["chunk_parallel_size"]) == (2, 1)
    shard = torch.load(tmp_path / "two" / "consolidated.00.pth", weights_only=True)
    for name, tensor in shard.items():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, name
    save_checkpoint(wide_model(), tmp_path / "one")
    assert (tmp_path / "one" / "consolidated.pth").is_file()


def test_how_each_parameter_is_divided() -> None:
    """The released code's layers, module by module (model_parallel/layers.py and its users)."""
    by_channel = {"alpha", "delta", "theta", "gamma", "omega"}
    for name in wide_model(swiglu=True, rescale_nffn=True).state_dict():
        part = name.split(".")
        if "cema" in part and part[-1] in by_channel:
            want: int | None = 0
        elif "timenorm" in part or "final_norm" in part:
            want = None if part[-1] == "prior_count" else 0
        elif part[-2] in ("wv", "wz", "wr", "wh1", "fc1", "fc3"):
            want = 0  # ColumnParallelLinear, its bias too
        elif part[-2] in ("wh2", "fc2", "output", "embed") or part[-1] in ("gamma", "beta"):
            want = 1  # RowParallelLinear, ParallelEmbedding; heads
        elif part[0] == "embed":
            want = 1
        else:
            assert part[-2] in ("rope", "rmsnorm", "norm", "nffn"), name
            want = None
        assert shard_axis(name) == want, name


def ranks_block(shards: list[dict[str, Tensor]], config: MegalodonConfig, x: Tensor) -> Tensor:
    """A block as the released code's model-parallel ranks compute it, each on its own shard.

    The residual stream is divided by channels; gathered are CEMA's outputs, what timestep norm
    gives to the values, and the feed-forward's input; `wh2` and `fc2` are sums over the ranks.
    """
    count = len(shards)
    heads, groups = config.num_heads // count, config.norm_num_groups // count
    xs = x.chunk(count, -1)

    def product(rank: int, name: str, value: Tensor) -> Tensor:
        weights = shards[rank]
        return nn.functional.linear(
            value, weights[f"layers.0.{name}.weight"], weights.get(f"layers.0.{name}.bias")
        )

    normed, averaged = [], []
    for rank, weights in enumerate(shards):
        own = {k.removeprefix("layers.0.mega."): v for k, v in weights.items()}
        t, _ = F.timestep_norm(xs[rank], own["timenorm.weight"], own["timenorm.bias"], groups)
        normed.append(t)
        names = ("alpha", "delta", "theta", "gamma", "omega")
        averaged.append(F.cema(t, *(own[f"cema.{name}"] for name in names))[0])
    t = torch.cat(normed, -1)
    mx = F.rms_norm(torch.cat(averaged, -1), shards[0]["layers.0.mega.rmsnorm.weight"])
    gated = []
    for rank, weights in enumerate(shards):
        gamma, beta = (weights[f"layers.0.mega.{name}"] for name in ("gamma", "beta"))
        z = product(rank, "mega.wz", mx)
        q, k = F.qk_norm_rope(z, gamma, beta, heads, config.chunk_size)
        v = F.silu_mul(product(rank, "mega.wv", t)).unflatten(-1, (heads, -1))
        o = F.chunk_attention(q, k, v, config.chunk_size).flatten(-2)
        gated.append(o * F.silu_mul(product(rank, "mega.wr", mx)))
    total = sum(product(rank, "mega.wh2", gated[rank]) for rank in range(count))
    y = torch.cat([product(rank, "mega.wh1", mx) for rank in range(count)], -1) + total + x
    norm = (shards[0][f"layers.0.nffn.norm.{name}"] for name in ("weight", "bias"))
    u = F.layer_norm(y, *norm)
    hidden = [
        F.silu_mul(product(rank, "nffn.fc1", u), product(rank, "nffn.fc3", u))
        for rank in range(count)
    ]
    out = sum(product(rank, "nffn.fc2", hidden[rank]) for rank in range(count))
    return shards[0]["layers.0.nffn.alpha"] * out + x


@pytest.mark.parametrize("num_shards", [1, 2, 4])
def test_a_shard_is_what_its_rank_computes_with(tmp_path: Path, num_shards: int) -> None:
    model = wide_model(torch.float64, swiglu=True, rescale_nffn=True)
    save_checkpoint(model, tmp_path / "ranks", num_shards=num_shards)
    shards = [torch.load(file, weights_only=True) for file in shard_files(tmp_path / "ranks")]
    assert len(shards) == num_shards
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    with torch.no_grad():
        want, _ = model.layers[0](x)
        torch.testing.assert_close(ranks_block(shards, model.config, x), want)


@golden.each("mega_model", torch.float32)
def test_official_weights(case: Case, dtype: torch.dtype, tmp_path: Path) -> None:
    """A folder as the released code's consolidation would leave it, from its own parameters."""
    from test_model import config_of

    config = config_of(case)
    weights = {name: value.to(dtype) for name, value in case.group("param/").items()}
    weights |= {n: v for n, v in case.group("param/").items() if n.endswith("prior_count")}
    torch.save(weights, tmp_path / "consolidated.pth")
    fields = {**config.to_dict(), "vocab_size": -1, "output_size": -1, "efficient_attn": "swift"}
    (tmp_path / "config.json").write_text(json.dumps({"model": fields, "tokenizer": {}}))
    (tmp_path / "consolidate_config.json").write_text('{"model_parallel_size": 1, "dtype": "fp32"}')
    model = load_checkpoint(tmp_path)
    assert model.config.fingerprint() == config.fingerprint()
    logits = model(case.arrays["in/tokens"])
    torch.testing.assert_close(
        logits.double(), case.arrays["out/logits"].double(), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("mode", ["key", "weight"])
def test_what_dropout_drops_is_which_attention_runs(mode: str, tmp_path: Path) -> None:
    """The released code drops weights in its plain attention, keys in its fused one."""
    model = small_model(attention_dropout=0.5, attention_dropout_mode=mode)
    save_checkpoint(model, tmp_path / "official", format="official")
    written = json.loads((tmp_path / "official" / "config.json").read_text())["model"]
    assert written["efficient_attn"] == {"key": "fused", "weight": None}[mode]
    assert load_checkpoint(tmp_path / "official").config == model.config


def test_a_sliding_window_is_not_official(tmp_path: Path) -> None:
    model = small_model(attention="sliding")
    with pytest.raises(ValueError, match="no sliding attention"):
        save_checkpoint(model, tmp_path / "official", format="official")
    assert not (tmp_path / "official").exists()
    save_checkpoint(model, tmp_path / "ours.safetensors")
    assert load_checkpoint(tmp_path / "ours.safetensors").config == model.config


def test_other_places_of_the_configuration(tmp_path: Path) -> None:
    model = wide_model()
    torch.save(model.state_dict(), tmp_path / "consolidated.00.pth")
    with pytest.raises(FileNotFoundError, match=r"no config\.json or params\.json"):
        load_checkpoint(tmp_path)
    for path in (tmp_path, tmp_path / "consolidated.00.pth"):
        assert_same(load_checkpoint(path, config=model.config), model)
    (tmp_path / "params.json").write_text(json.dumps(model.config.to_dict()))
    assert_same(load_checkpoint(tmp_path), model)
    with pytest.raises(ValueError, match="another model than config=: chunk_size: wanted 8; got 4"):
        load_checkpoint(tmp_path, config=model.config.replace(chunk_size=8))
    safetensors_torch.save_file(model.state_dict(), tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match="no configuration"):
        load_checkpoint(tmp_path / "plain.safetensors")
    assert_same(load_checkpoint(tmp_path / "plain.safetensors", config=model.config), model)


def test_dtype_is_chosen_when_loading(tmp_path: Path) -> None:
    save_checkpoint(wide_model(), tmp_path / "m.safetensors")
    model = load_checkpoint(tmp_path / "m.safetensors", dtype=torch.bfloat16)
    assert model.embed.weight.dtype == torch.bfloat16
    assert model.layers[0].mega.cema.alpha.dtype == torch.float32
    with pytest.raises(ValueError, match="dtype: wanted a floating dtype; got"):
        load_checkpoint(tmp_path / "m.safetensors", dtype=torch.int64)


def test_narrow_files_are_widened_where_the_kernels_want_it(tmp_path: Path) -> None:
    """The released code consolidates everything to one dtype, CEMA and rope.freqs included."""
    model = wide_model(rope_base=77.0)
    weights = {
        name: value.bfloat16() if value.is_floating_point() else value
        for name, value in model.state_dict().items()
    }
    torch.save(weights, tmp_path / "consolidated.pth")
    loaded = load_checkpoint(tmp_path, config=model.config)
    assert loaded.embed.weight.dtype == torch.bfloat16
    alpha = loaded.layers[0].mega.cema.alpha
    assert alpha.dtype == torch.float32
    assert torch.equal(alpha, weights["layers.0.mega.cema.alpha"].float())
    assert torch.equal(loaded.rope.freqs, model.rope.freqs)
    assert loaded(random_tokens(1, 5)).isfinite().all()


# Writing


@pytest.mark.parametrize("kind", ["official", "safetensors"])
@pytest.mark.parametrize("failing", ["fsync", "rename", "replace"])
def test_a_failed_write_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, failing: str
) -> None:
    if (kind, failing) in (("official", "replace"), ("safetensors", "rename")):
        pytest.skip("that format does not call it")
    target = tmp_path / ("folder" if kind == "official" else "file.safetensors")

    def fail(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, failing, fail)
        with pytest.raises(OSError, match="No space left"):
            save_checkpoint(wide_model(), target, format=kind)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    save_checkpoint(wide_model(), tmp_path / "model")
    before = (tmp_path / "model" / "consolidated.pth").read_bytes()
    with pytest.raises(FileExistsError, match="wanted a new or an empty folder"):
        save_checkpoint(wide_model(), tmp_path / "model", num_shards=2)
    assert (tmp_path / "model" / "consolidated.pth").read_bytes() == before
    (tmp_path / "empty").mkdir()
    save_checkpoint(wide_model(), tmp_path / "empty")
    assert_same(load_checkpoint(tmp_path / "empty"), wide_model())
