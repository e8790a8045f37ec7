"""Tokenizers: text there and back, in pieces; and the command with them, from train to generate."""

from __future__ import annotations

import gzip
import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_model import small_model

from megalodon_ops import Sampling, generate, save_checkpoint
from megalodon_ops import tokenizer as module
from megalodon_ops.tokenizer import BYTES, Tokenizer, load_tokenizer

TEXT = "".join(f"line {i}: the {i * i} quick brown foxes, é€😀\n" for i in range(120))
SHAPE = [
    *("--model-dim=16", "--num-layers=2", "--z-dim=8", "--value-dim=12", "--ffn-hidden-dim=16"),
    *("--cema-ndim=2", "--chunk-size=8", "--norm-num-groups=4", "--seq-len=20", "--batch-size=2"),
    *("--dtype=float32", "--eval-bytes=200"),
]


def byte_level(path: Path, vocab_size: int = 300) -> Path:
    """A byte-level BPE as GPT-2's, with a special token."""
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator([TEXT], trainer)
    model.save(str(path))
    return path


def byte_fallback(path: Path) -> Path:
    """A BPE as Llama's: spaces are U+2581, unknown characters fall back to bytes."""
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
    vocabulary |= {c: 256 + i for i, c in enumerate("\u2581abcdefghijklmnopqrstuvwxyz")}
    vocabulary |= {"th": 300, "the": 301, "\u2581the": 302}
    vocabulary = {piece: i for i, piece in enumerate(vocabulary)}
    merges = [("t", "h"), ("th", "e"), ("\u2581", "the")]
    model = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=False)
    )
    model.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
    model.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.Replace("\u2581", " "), tokenizers.decoders.ByteFallback()]
    )
    model.save(str(path))
    return path


def sentence_piece(path: Path) -> Path:
    sentencepiece = pytest.importorskip("sentencepiece")
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()),
        model_writer=out,
        vocab_size=360,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    path.write_bytes(out.getvalue())
    return path


MAKERS = {
    "byte_level": byte_level,
    "byte_fallback": byte_fallback,
    "sentence_piece": sentence_piece,
}


@pytest.fixture(scope="module", params=["bytes", *MAKERS])
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    if request.param == "bytes":
        return BYTES
    return load_tokenizer(MAKERS[request.param](tmp_path_factory.mktemp("t") / "tokenizer"))


@given(text=st.one_of(st.text().map(str.encode), st.binary()))
def test_there_and_back(tokenizer: Tokenizer, text: bytes) -> None:
    """Any text, and any bytes that are no text, control characters and NUL included."""
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert all(0 <= token < tokenizer.vocab_size for token in tokens)


def test_text_is_shorter_in_tokens(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode(TEXT.encode())
    assert tokenizer.decode(tokens).decode() == TEXT
    assert (len(tokens) < len(TEXT.encode())) == (tokenizer is not BYTES)


def test_streams_are_the_same_for_any_pieces(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Segments are cut after a line break, else at a character, never by the pieces."""
    monkeypatch.setattr(module, "SEGMENT", 64)
    text = (TEXT[:300] + "€" * 60 + TEXT[:100]).encode() + b"\xff" * 70 + "no end é".encode()
    wanted: list[int] | None = None
    for size in (1, 3, 64, 65, 1000):
        pieces = [text[at : at + size] for at in range(0, len(text), size)]
        tokens = [t for part in tokenizer.stream(iter([b"", *pieces])) for t in part]
        assert tokenizer.decode(tokens) == text
        assert wanted is None or tokens == wanted
        wanted = tokens
    assert list(tokenizer.stream([])) == []


def test_special_tokens_in_a_text_are_text(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(byte_level(tmp_path / "t.json"))
    tokens = tokenizer.encode(b"a<|end|>b")
    assert len(tokens) > 3
    assert tokenizer.decode(tokens) == b"a<|end|>b"
    assert tokenizer.token_bytes(0) == b"<|end|>"
    assert tokenizer.token_bytes(10**6) == b""


def test_files_that_are_no_tokenizers(tmp_path: Path) -> None:
    good = byte_level(tmp_path / "good.json").read_bytes()
    bad = tmp_path / "bad"
    for data in (good[: len(good) // 2], b"{}", b'{"model": 3}'):
        bad.write_bytes(data)
        with pytest.raises(ValueError, match=r"bad: not a tokenizer\.json that can be used: "):
            load_tokenizer(bad)
    pytest.importorskip("sentencepiece")
    for data in (b"", b"\x00\x01\x02", b"plain text"):
        bad.write_bytes(data)
        with pytest.raises(ValueError, match=r"bad: not a SentencePiece model that can be used: "):
            load_tokenizer(bad)
    with pytest.raises(FileNotFoundError):
        load_tokenizer(tmp_path / "absent")


def test_tokenizers_whose_tokens_are_no_certain_bytes(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}))
    model.decoder = tokenizers.decoders.WordPiece()
    for name, wanted in (("WordPiece", "got WordPiece"), ("none", "got none")):
        fields = json.loads(model.to_str())
        if name == "none":
            fields["decoder"] = None
        (tmp_path / "t.json").write_text(json.dumps(fields))
        with pytest.raises(ValueError, match=f"decoder: wanted one whose tokens .*; {wanted}"):
            load_tokenizer(tmp_path / "t.json")


@pytest.mark.parametrize(("package", "data"), [("tokenizers", "{}"), ("sentencepiece", "x")])
def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, data: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "t").write_text(data)
    with pytest.raises(ImportError, match=f"needs {package}; pip install 'megalodon-ops"):
        load_tokenizer(tmp_path / "t")


def test_bytes_without_a_token(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "\u2581": 1}, []))
    model.decoder = tokenizers.decoders.Metaspace()
    model.save(str(tmp_path / "t.json"))
    with pytest.raises(ValueError, match=r"not UTF-8, and .* no token for the byte 0xff"):
        load_tokenizer(tmp_path / "t.json").encode(b"a\xff")


# The command


@pytest.fixture(scope="module", params=["byte_level", "sentence_piece"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on tokens; the tokenizer's original file is gone. Tests must not change it."""
    for needed in ("typer", "rich", "matplotlib", "safetensors"):
        pytest.importorskip(needed)
    from megalodon_ops import cli

    folder = tmp_path_factory.mktemp("trained")
    (folder / "corpus.txt").write_text(TEXT)
    file = MAKERS[request.param](folder / "original")
    out = folder / "run"
    arguments = ["train", "--out", str(out), "--data", str(folder / "corpus.txt"), *SHAPE]
    assert cli.main([*arguments, "--tokenizer", str(file), "--steps=6", "--eval-every=3"]) == 0
    file.unlink()
    return out


def test_a_run_keeps_its_tokenizer(trained: Path, tmp_path: Path) -> None:
    from megalodon_ops.training.checkpoint import load, load_model, tokenizer_of

    model, saved = load_model(trained)
    tokenizer = tokenizer_of(saved, trained)
    assert (trained / tokenizer.file_name).is_file()
    assert model.config.vocab_size == model.config.num_outputs == tokenizer.vocab_size > 256
    assert load(trained).settings["tokenizer"] == tokenizer.identity()


def test_bits_are_per_byte_of_text(trained: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from megalodon_ops import cli
    from megalodon_ops.training.checkpoint import load_model, tokenizer_of
    from megalodon_ops.training.evaluation import bits_per_byte, compare
    from megalodon_ops.training.metrics import read_metrics

    model, saved = load_model(trained)
    tokenizer = tokenizer_of(saved, trained)
    data = TEXT[:400].encode()
    tokens = torch.tensor([tokenizer.encode(data)])
    chosen = model(tokens).double().log_softmax(-1)[0, :-1].gather(-1, tokens[0, 1:, None])
    bits = math.log2(tokenizer.vocab_size) - chosen.sum().item() / math.log(2)
    for size, longest in ((7, 2048), (400, 5), (64, 1)):
        pieces = [data[at : at + size] for at in range(0, len(data), size)]
        done: list[int] = []
        result = compare(model, pieces, done.append, tokenizer, longest)
        assert result.model == pytest.approx(bits / len(data), rel=1e-5)
        assert result.gzip == 8 * len(gzip.compress(data, 9)) / len(data)
        assert sum(done) == result.count == len(data)
    assert bits_per_byte(model, [data], tokenizer=tokenizer) == pytest.approx(bits / len(data))

    assert cli.main(["eval", "--checkpoint", str(trained), "--max-bytes", "200"]) == 0
    told = capfd.readouterr().out
    last = [r for r in read_metrics(trained) if r["kind"] == "eval"][-1]["bits_per_byte"]
    assert "200 bytes" in told
    assert f"{last:.4f}" in told
    first = next(r for r in read_metrics(trained) if r["kind"] == "train")["bits_per_byte"]
    assert 1 < first < 8  # log2 of the vocabulary is above 8, over more than a byte a token


def test_generate_prints_whole_characters(
    trained: Path, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    from megalodon_ops import cli
    from megalodon_ops.training.checkpoint import load_model, tokenizer_of

    model, saved = load_model(trained)
    tokenizer = tokenizer_of(saved, trained)
    prompt = "line 7: é"
    options = ["--checkpoint", str(trained), "--prompt", prompt, "--max-new-tokens", "12"]
    assert cli.main(["generate", *options, "--temperature", "0", "--timing"]) == 0
    out = capfdbinary.readouterr()
    tokens = generate(model, [tokenizer.encode(prompt.encode())], 12, Sampling(0))[0].tokens
    text = prompt.encode() + tokenizer.decode(tokens)
    assert out.out.decode() == text.decode(errors="replace") + "\n"
    assert f"prompt: {len(tokenizer.encode(prompt.encode()))} tokens".encode() in out.err
    assert cli.main(["generate", *options, "--beams", "2"]) == 0
    assert cli.main(["generate", *options, "--stop", "e", "--seed", "1"]) == 0
    assert b"e" not in capfdbinary.readouterr().out.split(b"\n")[-2].removeprefix(prompt.encode())
    # An empty prompt, and one that goes on from a saved state.
    state = tmp_path / "state"
    assert cli.main(["generate", *options[:2], "--save-state", str(state), *options[4:]]) == 0
    more = ["--load-state", str(state), "--prompt", " foxes", *options[4:]]
    assert cli.main(["generate", *options[:2], *more]) == 0


def test_resume_with_a_tokenizer(trained: Path, tmp_path: Path) -> None:
    """Parts of a run are the run, and the tokenizer may be given again from another place."""
    from megalodon_ops import cli
    from megalodon_ops.training.checkpoint import load
    from megalodon_ops.training.metrics import read_metrics

    kept = next(trained.glob("tokenizer.*"))
    data = str(trained.parent / "corpus.txt")
    arguments = ["--data", data, *SHAPE, "--tokenizer", str(kept), "--steps", "4"]
    losses = []
    for name, stops in (("whole", []), ("parts", ["--stop-after", "2"])):
        out = tmp_path / name
        assert cli.main(["train", "--out", str(out), *arguments, *stops]) == 0
        if stops:
            moved = tmp_path / "moved"
            moved.write_bytes(kept.read_bytes())
            again = ["--resume", "--tokenizer", str(moved)]
            assert cli.main(["train", "--out", str(out), *again]) == 0
        losses.append([r["bits_per_byte"] for r in read_metrics(out) if r["kind"] == "train"])
    assert losses[0] == losses[1]
    a, b = load(tmp_path / "whole").weights, load(tmp_path / "parts").weights
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_bad_tokenizers_are_told_in_one_line(
    trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from megalodon_ops import cli

    corpus = trained.parent / "corpus.txt"
    other = byte_level(tmp_path / "other.json", 290)
    (tmp_path / "bad").write_bytes(b"{")
    new = ["train", "--out", tmp_path / "new", "--data", corpus, *SHAPE, "--steps", 1]
    lost = tmp_path / "lost"
    lost.mkdir()
    (lost / "checkpoint.safetensors").write_bytes((trained / "checkpoint.safetensors").read_bytes())
    words = tmp_path / "words.safetensors"
    save_checkpoint(small_model(vocab_size=300, dtype=torch.float32), words)
    few = tmp_path / "few.safetensors"
    save_checkpoint(small_model(dtype=torch.float32), few)
    cases: list[tuple[list[Any], str]] = [
        ([*new, "--tokenizer", tmp_path / "bad"], "not a tokenizer.json"),
        ([*new, "--tokenizer", tmp_path / "absent"], "cannot read the tokenizer"),
        ([*new, "--tokenizer", ""], "--tokenizer must be the path of a file"),
        (["train", "--out", trained, "--resume", "--tokenizer", other], "is not the one that"),
        (["eval", corpus, "--checkpoint", trained, "--tokenizer", other], "is not the one that"),
        (["eval", corpus, "--checkpoint", lost], "cannot read the tokenizer"),
        (["generate", "--checkpoint", words], "a model of 300 tokens and no tokenizer"),
        (["generate", "--checkpoint", few, "--tokenizer", other], "has 290 tokens; the model in"),
    ]
    capfd.readouterr()
    for arguments, wanted in cases:
        assert cli.main(list(map(str, arguments))) == 2, arguments
        error = capfd.readouterr().err
        assert wanted in error
        assert error.count("\n") == 1, error
    # A checkpoint from elsewhere names no tokenizer: any that fits may be given.
    options = ["--checkpoint", str(words), "--tokenizer", str(other), "--max-new-tokens", "3"]
    assert cli.main(["generate", *options]) == 0
