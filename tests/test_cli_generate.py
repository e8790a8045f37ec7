"""`megalodon generate`: reproducible, resumable, and what it prints is whole characters."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from command import TEXT, one_line, start

from megalodon_ops import cli
from megalodon_ops.sampling import Sampling
from megalodon_ops.session import Event, Session
from megalodon_ops.training.checkpoint import load_model


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


def test_a_state_goes_on_behind_the_stop_sequence(
    trained: Path, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    state = tmp_path / "state"
    begin = ["--checkpoint", trained, "--prompt", "line", "--seed", 3, "--max-new-tokens"]
    model, _ = load_model(trained)
    session = Session(model, Sampling())
    session.add([b"line"], seed=3)
    tokens = bytes(token for _ in range(40) for token in session.step()[0].tokens)
    stop = next(tokens[i : i + 2] for i in range(3, 38) if tokens[i : i + 2].isascii())
    end = tokens.index(stop) + 2
    options = ["--stop", stop.decode(), "--save-state", state]
    said = generated(capfdbinary, *begin, 40, *options)
    assert said.decode() == "line" + tokens[: end - 2].decode(errors="replace") + "\n"
    again = ["--checkpoint", trained, "--load-state", state, "--max-new-tokens"]
    rest = generated(capfdbinary, *again, 40 - end, "--stop", "never")
    assert rest.decode() == tokens[end:].decode(errors="replace") + "\n"

    # What is held when the state is saved is shown before a prompt that is read then.
    generated(capfdbinary, *begin, end - 1, *options)
    more = generated(capfdbinary, *again, 1, "--prompt", "[more]")
    assert more.startswith(stop[:1] + b"[more]")
    # It is still one half of the sequence where nothing is read in between.
    assert generated(capfdbinary, *again, 40) == b"\n"


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


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--seed", 2**63], "Invalid value for '--seed'"),
        (["--beams", 2, "--length-penalty", "nan"], "length_penalty: wanted a finite number"),
        (["--beams", 3, "--length-penalty", -2000], "length_penalty: wanted a power that"),
        (["--temperature", "inf"], "--temperature must be 0 or more, and finite; got inf"),
    ],
)
def test_bad_arguments(
    trained: Path, capfd: pytest.CaptureFixture[str], arguments: list[object], wanted: str
) -> None:
    code = cli.main(["generate", "--checkpoint", str(trained), *map(str, arguments)])
    assert wanted in one_line(capfd, code)


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
    monkeypatch.setattr(Session, "step", lambda self, leave: [Event(0, (next(tokens),))])
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
