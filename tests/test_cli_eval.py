"""`megalodon eval`: the same bits per byte in any pieces, of a file or of the held-out part."""

from __future__ import annotations

import gzip
import lzma
import math
from pathlib import Path

import pytest
from command import TEXT

from megalodon_ops import cli
from megalodon_ops.training.checkpoint import load_model
from megalodon_ops.training.evaluation import bits_per_byte, byte_tensor, compare
from megalodon_ops.training.metrics import read_metrics


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
