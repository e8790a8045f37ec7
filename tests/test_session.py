"""Sessions: rows join and leave, and a saved session goes on token for token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from prompts import GREEDY, WARM, prompt
from small_model import VOCAB, small_model

from megalodon_ops import _files
from megalodon_ops.generation import generate
from megalodon_ops.sampling import Sampling
from megalodon_ops.session import Event, Session


def run(session: Session, steps: int) -> dict[int, list[int]]:
    said: dict[int, list[int]] = {}
    for _ in range(steps):
        for event in session.step():
            said.setdefault(event.row, []).extend(event.tokens)
    return said


@pytest.mark.parametrize("at", [0, 1, 5, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_session_goes_on_token_for_token(
    tmp_path: Path, at: int, dtype: torch.dtype
) -> None:
    model, path = small_model(dtype=dtype), tmp_path / "session"
    options = Sampling(temperature=1.5, repetition_penalty=1.2, repetition_window=4)
    stop = [(1, 2, 3), (4, 4, 4, 4)]
    session = Session(model, options, stop=stop)
    session.add([prompt(9), prompt(2, seed=1)], seed=4, max_new_tokens=15)
    session.add([prompt(4, seed=2)], seed=9)
    run(session, at)
    session.save(path)
    want = [session.step() for _ in range(14)]
    again = Session.load(path, model)
    assert [again.step() for _ in range(14)] == want
    assert again.rows == session.rows
    assert again.add([[1]]) == session.add([[1]])


def test_rows_join_leave_and_read_on() -> None:
    model = small_model()
    session = Session(model, WARM)
    first = session.add([prompt(5), prompt(8, seed=1)], seed=[1, 2])
    said = run(session, 3)
    (late,) = session.add([prompt(3, seed=2)], seed=3)
    for row, tokens in run(session, 2).items():
        said.setdefault(row, []).extend(tokens)
    session.remove(first[0])
    session.extend(first[1], [1, 2, 3])
    assert session.rows == (first[1], late)
    for row, tokens in run(session, 4).items():
        said.setdefault(row, []).extend(tokens)
    assert said[first[0]] == generate(model, [prompt(5)], 5, WARM, seed=1)[0].tokens
    assert said[late] == generate(model, [prompt(3, seed=2)], 6, WARM, seed=3)[0].tokens
    alone = Session(model, WARM)
    (row,) = alone.add([prompt(8, seed=1)], seed=2)
    want = run(alone, 5)[row]
    alone.extend(row, [1, 2, 3])
    assert said[first[1]] == want + run(alone, 4)[row]
    with pytest.raises(ValueError, match=r"row: wanted one of \[1, 2\]; got 0"):
        session.remove(first[0])


def test_what_is_read_in_between_ends_a_match(tmp_path: Path) -> None:
    """A stop sequence is one of what is said: neither its parts on both sides of something read nor
    what was said and that together are one. What was held comes before what is said next."""
    model, path = small_model(), tmp_path / "session"

    def said(session: Session, *steps: list[int]) -> list[Event]:
        events = []
        for tokens in steps:
            if tokens[:-1]:
                session.extend(0, tokens[:-1])
            session._logits = torch.full((1, VOCAB), -1e9)
            session._logits[0, tokens[-1]] = 0.0
            events += session.step()
        return events

    for resumed in (False, True):
        session = Session(model, GREEDY, stop=[(1, 2), (3, 4, 5)])
        session.add([[7]])
        assert said(session, [1]) == [Event(0, ())]
        if resumed:
            session.save(path)
            session = Session.load(path, model)
        assert said(session, [9, 9, 2]) == [Event(0, (1, 2))]
        assert said(session, [3], [4]) == [Event(0, ()), Event(0, ())]
        session.extend(0, [9])
        if resumed:
            session.save(path)
            session = Session.load(path, model)
        assert session.flush(0) == (3, 4)
        assert said(session, [9, 5], [1], [2]) == [
            Event(0, (5,)), Event(0, ()), Event(0, (), "stop", (1, 2)),
        ]  # fmt: skip


def test_a_row_may_stay_when_it_has_finished(tmp_path: Path) -> None:
    """It goes on behind its stop sequence as one without stops does, saved or not."""
    model, path = small_model(), tmp_path / "session"
    prompts, plain = [prompt(5), prompt(3)], Session(model, WARM)
    plain.add(prompts, seed=[4, 5])
    wanted = run(plain, 60)
    for length in (1, 2, 3):
        stopping, stops = Session(model, WARM, stop=[wanted[0][3 : 3 + length]]), 0
        stopping.add(prompts, seed=[4, 5])
        told: dict[int, list[int]] = {0: [], 1: []}
        for _ in range(60):
            events = stopping.step(leave=False)
            for event in events:
                told[event.row] += (*event.tokens, *(event.stop or ()))
            if any(event.finish == "stop" for event in events):
                stops += 1
                stopping.save(path)
                stopping = Session.load(path, model)
        assert stops > 0
        assert {row: told[row] + list(stopping.flush(row)) for row in stopping.rows} == wanted


def test_a_saved_session_may_take_other_options(tmp_path: Path) -> None:
    model, path = small_model(), tmp_path / "session"
    whole = generate(model, [prompt(5)], 12, WARM)[0].tokens
    session = Session(model, WARM, stop=[(*whole[:4], 0, 0, 0, 0, 0, 0, 0, 0)])
    session.add([prompt(5)])
    assert run(session, 3)[0] == []  # held
    session.save(path)
    other = Session.load(path, model, {"temperature": 0}, stop=())
    assert other.sampling == GREEDY
    assert other.step()[0].tokens[:3] == tuple(whole[:3])
    with pytest.raises(ValueError, match="cannot be continued: repetition_penalty: the file was"):
        Session.load(path, model, {"repetition_penalty": 2.0})
    with pytest.raises(ValueError, match="cannot be continued: top_p must be"):
        Session.load(path, model, {"top_p": 2.0})


def test_bad_session_files(tmp_path: Path) -> None:
    model, path = small_model(), tmp_path / "session"
    session = Session(model)
    session.add([prompt(5)])
    session.save(path)
    whole = path.read_bytes()
    for size in (0, 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="truncated, or not a safetensors file"):
            Session.load(path, model)
    path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 4]) + whole[-8:])
    with pytest.raises(ValueError, match="damaged: its contents do not agree"):
        Session.load(path, model)
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="config: the state belongs to a model of config"):
        Session.load(path, small_model(chunk_size=5))
    with pytest.raises(ValueError, match=r"state: dtype: .* wanted torch\.float32; got"):
        Session.load(path, small_model(dtype=torch.float32))
    model.init_state(1).save(path)
    with pytest.raises(ValueError, match=r"format: wanted 'megalodon_ops\.session'; got 'meg"):
        Session.load(path, model)
    path.write_bytes(whole)
    tensors, metadata = _files.read(path, "megalodon_ops.session", "1")
    del tensors["rows.0.generator"]
    _files.write(path, tensors, metadata)
    with pytest.raises(ValueError, match=r"cannot be continued: 'rows\.0\.generator'"):
        Session.load(path, model)
