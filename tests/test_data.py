"""The corpus, its windows, and how documents are packed for training."""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from small_model import small_model
from torch import Tensor
from torch.nn import functional as F

from megalodon_ops.loss import IGNORE_INDEX
from megalodon_ops.tokenizer import Tokenizer
from megalodon_ops.training.data import Batch, TokenFile, Windows, open_corpus, split_point
from megalodon_ops.training.errors import CommandError
from megalodon_ops.training.loop import make_optimizer, training_step
from megalodon_ops.training.metrics import read_metrics
from megalodon_ops.training.options import TrainOptions, read_options

TEXT = "".join(f"line {i}: the {i * i} quick brown foxes, é€😀\n" for i in range(60)).encode()


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    """Files of 1 to 40 bytes, each of one letter, none like its neighbours."""
    folder = tmp_path / "documents"
    folder.mkdir()
    for i in range(26):
        letter = chr(97 + i)
        (folder / letter).write_bytes(letter.encode() * (1 + 17 * i % 40))
    return folder


def test_corpus_is_the_files_end_to_end(tmp_path: Path) -> None:
    for name, data in {"b": b"BB", "a/z": b"ZZZ", "a/.git/x": b"no", "empty": b""}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    corpus = open_corpus(str(tmp_path))
    assert corpus.read(0, corpus.size) == b"ZZZBB"
    assert [corpus.read(i, 2) for i in range(4)] == [b"ZZ", b"ZZ", b"ZB", b"BB"]
    assert b"".join(corpus.pieces(1, 5, 3)) == b"ZZBB"
    (tmp_path / "b").write_bytes(b"B")
    with pytest.raises(CommandError, match="shorter"):
        corpus.read(3, 2)


def test_windows_depend_on_seed_and_step_only(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_bytes(TEXT)
    opened = open_corpus(str(tmp_path / "corpus.txt"))
    stop = split_point(opened, 10)
    assert stop == len(TEXT) - round(len(TEXT) / 10)
    windows = Windows(opened, stop, 20, 3, seed=5)
    tokens, targets, bounds = windows.batch(7)
    assert bounds is None  # a file is one document
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
    for row, target in zip(tokens, targets, strict=True):
        assert bytes([*row.tolist(), int(target[-1])]) in TEXT[:stop]
    again = Windows(opened, stop, 20, 3, seed=5)
    assert torch.equal(again.batch(7)[0], tokens)
    assert not torch.equal(again.batch(8)[0], tokens)
    assert not torch.equal(Windows(opened, stop, 20, 3, seed=6).batch(7)[0], tokens)
    # The shortest corpus has one window.
    assert Windows(opened, 21, 20, 1, seed=0).batch(0)[0].shape == (1, 20)


def segments(batch: Batch) -> list[tuple[Tensor, Tensor]]:
    """Tokens and targets of every document of a batch."""
    if batch.cu_seqlens is None:
        return list(zip(batch.tokens, batch.targets, strict=True))
    return [
        (batch.tokens[0, a:b], batch.targets[0, a:b])
        for a, b in pairwise(batch.cu_seqlens.tolist())
    ]


@pytest.mark.parametrize("length", [1, 2, 30])
def test_no_document_sees_another(documents: Path, length: int) -> None:
    corpus = open_corpus(str(documents))
    windows = Windows(corpus, corpus.size, length, 3, seed=0)
    text = Windows(corpus, corpus.size, length, 3, seed=0, pack=False)
    packed = ends = 0
    for step in range(60):
        batch, whole = windows.batch(step), text.batch(step)
        assert whole.cu_seqlens is None
        assert torch.equal(batch.tokens.flatten(), whole.tokens.flatten())
        kept = batch.targets.flatten() != IGNORE_INDEX
        assert torch.equal(batch.targets.flatten()[kept], whole.targets.flatten()[kept])
        # A target is left out exactly where a document ends: letters are documents.
        assert torch.equal(kept, (whole.tokens == whole.targets).flatten())
        for tokens, targets in segments(batch):
            assert 1 <= len(tokens) <= length
            assert len(tokens.unique()) == 1
            assert set(targets.tolist()) <= {int(tokens[0]), IGNORE_INDEX}
        packed += batch.cu_seqlens is not None
        ends += int((~kept).sum())
    assert ends > 0
    assert (packed > 0) == (length > 1)


def test_a_step_is_that_of_the_documents_alone(documents: Path) -> None:
    """The loss is the mean over all tokens with a target, each in its own document."""
    model = small_model(dtype=torch.float32, vocab_size=256)
    corpus = open_corpus(str(documents))
    batch = Windows(corpus, corpus.size, 60, 2, seed=1).batch(0)
    assert batch.cu_seqlens is not None
    total, count = 0.0, 0
    for tokens, targets in segments(batch):
        logits = model(tokens[None]).squeeze(0)
        total += float(F.cross_entropy(logits, targets, reduction="sum").detach())
        count += int((targets != IGNORE_INDEX).sum())
    optimizer = make_optimizer(model, TrainOptions())
    bits, norm = training_step(model, optimizer, batch, "float32", 1.0)
    assert bits == pytest.approx(total / count / math.log(2), rel=1e-4)
    assert norm > 0


def test_a_batch_without_a_target_changes_nothing_bad() -> None:
    model = small_model(dtype=torch.float32)
    batch = Batch(
        torch.ones(1, 2).long(), torch.full((1, 2), IGNORE_INDEX), torch.tensor([0, 1, 2])
    )
    optimizer = make_optimizer(model, TrainOptions())
    assert training_step(model, optimizer, batch, "float32", 1.0) == (0.0, 0.0)


class Letters(Tokenizer):
    """Bytes that pass for tokens of another kind."""

    def stream(self, pieces: Iterable[bytes]) -> Iterator[Sequence[int]]:
        return map(list, pieces)


def test_documents_are_encoded_alone(documents: Path, tmp_path: Path) -> None:
    corpus = open_corpus(str(documents))
    file = TokenFile(tmp_path / "tokens", corpus, corpus.size, Letters())
    assert file.starts == corpus.starts
    assert bytes(file.window(0, file.size).tolist()) == corpus.read(0, corpus.size)
    cut = corpus.starts[3] + 1  # inside the fourth
    assert TokenFile(tmp_path / "tokens", corpus, cut, Letters()).starts == (
        *corpus.starts[:4],
        cut,
    )


def test_the_command_packs_and_says_how_full(
    documents: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("typer")
    from megalodon_ops import cli

    sizes = ["--model-dim=16", "--num-layers=1", "--z-dim=8", "--value-dim=8", "--cema-ndim=2"]
    sizes += ["--ffn-hidden-dim=8", "--norm-num-groups=4", "--seq-len=50", "--dtype=float32"]
    command = ["train", "--data", str(documents), "--steps=4", "--held-out=0", *sizes]
    assert cli.main([*command, "--out", str(tmp_path / "packed")]) == 0
    said = capfd.readouterr().out
    records = [r for r in read_metrics(tmp_path / "packed") if r["kind"] == "train"]
    full = sum(r["fullness"] for r in records) / 4
    assert 0.8 < full < 1
    assert f"rows {100 * full:.2f}% full" in said
    assert cli.main([*command, "--out", str(tmp_path / "text"), "--no-pack"]) == 0
    assert "full" not in capfd.readouterr().out
    records = [r for r in read_metrics(tmp_path / "text") if r["kind"] == "train"]
    assert all(r["fullness"] == 1 for r in records)


def test_runs_from_before_packing_go_on_without() -> None:
    assert not read_options({"seq_len": 20}).pack
    assert TrainOptions().pack
