"""MegalodonConfig: presets, validation, serialisation, and that it needs no torch."""

import json
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from small_model import small_config

from megalodon_ops.config import PRESETS, MegalodonConfig
from megalodon_ops.model import Megalodon

# At V = 32000, from the formula of the released sizes.
COUNTS = {
    "mega200M": 220_627_968,
    "mega1.3B": 1_342_832_640,
    "mega1.3B_pg19": 1_327_628_288,
    "mega7.1B": 7_117_381_632,
    "mega7.3B": 7_385_817_088,
    "paper7B": 7_385_817_088,
}


@pytest.mark.parametrize("name", PRESETS)
def test_preset_has_the_published_number_of_parameters(name: str) -> None:
    with torch.device("meta"):
        model = Megalodon(MegalodonConfig.preset(name))
    assert sum(p.numel() for p in model.parameters()) == COUNTS[name]


def test_paper_preset() -> None:
    paper = MegalodonConfig.preset("paper7B")
    assert (paper.chunk_size, paper.rope_base, paper.swiglu) == (4096, 100000.0, True)
    assert paper.replace(chunk_size=2048, rope_base=None) == MegalodonConfig.preset("mega7.3B")


def test_unknown_preset() -> None:
    with pytest.raises(ValueError, match=r"preset: wanted one of mega200M, .*; got 'mega8B'"):
        MegalodonConfig.preset("mega8B")


def test_official_defaults() -> None:
    c = MegalodonConfig()
    sizes = (c.num_layers, c.model_dim, c.z_dim, c.value_dim, c.num_heads, c.ffn_hidden_dim)
    assert sizes == (8, 1024, 256, 2048, 1, 2048)
    assert (c.cema_ndim, c.chunk_size, c.norm_num_groups, c.norm_eps) == (16, 2048, 32, 1e-5)
    assert c.rope_base is None
    assert c.rope_base_value == 10000.0
    assert c.norm_affine
    assert c.init_mode == "he"
    assert not c.any_dropout


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"num_heads": 3}, ValueError, "z_dim: wanted a multiple of num_heads = 3; got 8"),
        ({"z_dim": 6}, ValueError, r"z_dim: wanted an even .*got 6 / 2 = 3"),
        ({"value_dim": 7}, ValueError, "value_dim: wanted a multiple of num_heads = 2; got 7"),
        ({"norm_num_groups": 5}, ValueError, "norm_num_groups: wanted a divisor .*= 12; got 5"),
        ({"norm_num_groups": 12}, ValueError, "norm_num_groups: .*at most 6 .*got 12"),
        ({"chunk_size": 0}, ValueError, "chunk_size: wanted an int >= 1; got 0"),
        ({"chunk_size": 2**63}, ValueError, r"chunk_size: wanted an int < 2\^63; got 922337203685"),
        ({"num_layers": -1}, ValueError, "num_layers: wanted an int >= 1; got -1"),
        ({"num_layers": True}, TypeError, r"num_layers: wanted an int; got True \(bool\)"),
        ({"model_dim": 12.0}, TypeError, r"model_dim: wanted an int; got 12.0 \(float\)"),
        ({"output_size": 0}, ValueError, "output_size: wanted an int >= 1; got 0"),
        ({"output_size": 5, "share_emb": True}, ValueError, "output_size: wanted vocab_size = 11"),
        ({"swiglu": 1}, TypeError, r"swiglu: wanted a bool; got 1 \(int\)"),
        ({"dropout": 1.0}, ValueError, r"dropout: wanted a probability in \[0, 1\); got 1.0"),
        ({"hidden_dropout": -0.1}, ValueError, "hidden_dropout: wanted a probability"),
        ({"attention_dropout": math.nan}, ValueError, "attention_dropout: wanted a probability"),
        ({"dropout": "0"}, TypeError, r"dropout: wanted a float; got '0' \(str\)"),
        ({"norm_eps": 0.0}, ValueError, "norm_eps: wanted a finite number > 0; got 0.0"),
        ({"rope_base": math.inf}, ValueError, "rope_base: wanted None or a finite number > 0"),
        ({"init_mode": "zero"}, ValueError, "init_mode: wanted one of he, bert, .*got 'zero'"),
        ({"init_mode": None}, TypeError, "init_mode: wanted a str; got None"),
    ],
)
def test_invalid_fields(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        small_config(**changes)


def test_round_trip_through_json() -> None:
    config = small_config(rope_base=500.0, dropout=0, share_emb=True)
    assert MegalodonConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert isinstance(config.dropout, float)


def test_unknown_keys() -> None:
    with pytest.raises(ValueError, match="unknown field heads, layers; the fields are num_layers"):
        MegalodonConfig.from_dict({"layers": 3, "heads": 2})
    with pytest.raises(ValueError, match="unknown field heads"):
        small_config().replace(heads=1)


def test_fingerprint() -> None:
    config = small_config()
    same = config.replace(
        dropout=0.1, init_mode="bert", layerwise_ckpt=True, rope_base=10000.0, output_size=11
    )
    assert same.fingerprint() == config.fingerprint()
    for change in ({"chunk_size": 8}, {"rope_base": 1e5}, {"swiglu": True}, {"norm_eps": 1e-6}):
        assert config.replace(**change).fingerprint() != config.fingerprint()
    # Written into files: it may never change.
    assert MegalodonConfig().fingerprint() == "7b2fbf5e9793618a8dae9ec7845fe22c"


def test_config_imports_without_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import megalodon_ops.config"
    subprocess.run([sys.executable, "-c", code], check=True)
