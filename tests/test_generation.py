"""Generation: every row as if it were alone, reproducible, resumable; what each option does."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rows import assert_same_state
from small_model import random_tokens, small_model

from megalodon_ops import _files
from megalodon_ops import sampling as sampling_module
from megalodon_ops._prefill import prefill
from megalodon_ops.beam import beam_search
from megalodon_ops.generation import Generated, generate
from megalodon_ops.model import Megalodon
from megalodon_ops.sampling import History, Sampling, sample
from megalodon_ops.session import Event, Session
from megalodon_ops.stopping import Matcher, Stops

GREEDY = Sampling(temperature=0)
WARM = Sampling(temperature=1.0)


def prompt(length: int, seed: int = 0) -> list[int]:
    tokens: list[int] = random_tokens(1, length, seed)[0].tolist()
    return tokens


def next_logits(model: Megalodon, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([tokens]))[0, -1]
    return logits


# Sampling


def draws(logits: list[float], count: int = 300, **options: Any) -> set[int]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.tensor([logits])
    return {sample(rows, Sampling(**options), [generator])[0] for _ in range(count)}


def test_filters() -> None:
    logits = [0.0, 3.0, 1.0, 2.0, -math.inf]
    assert draws(logits, temperature=1.0) == {0, 1, 2, 3}
    assert draws(logits, temperature=1.0, top_k=2) == {1, 3}
    assert draws(logits, temperature=1.0, top_k=99) == {0, 1, 2, 3}
    assert draws(logits, temperature=1.0, top_p=0.5) == {1}
    assert draws(logits, temperature=1.0, top_p=1e-9) == {1}
    assert draws(logits, temperature=1.0, top_p=0.7) == {1, 3}
    assert draws(logits, temperature=1.0, min_p=1.0) == {1}
    assert draws(logits, temperature=1.0, min_p=0.9 * math.exp(-1)) == {1, 3}
    assert draws(logits, temperature=1.0, min_p=0.9 * math.exp(-2)) == {1, 2, 3}
    assert draws(logits, temperature=2.0, min_p=0.9 * math.exp(-1)) == {1, 2, 3}
    assert draws(logits, temperature=1.0, top_p=0.7, min_p=0.9 * math.exp(-2)) == {1, 3}
    assert draws(logits, temperature=1e-300) == {1}
    assert draws(logits, temperature=0) == {1}


def test_frequencies() -> None:
    logits = torch.tensor([0.0, 3.0, 1.0, 2.0])
    generator = torch.Generator().manual_seed(0)
    rows = logits.expand(4000, -1)
    drawn = torch.tensor(sample(rows, WARM, [generator] * 4000))
    counts = torch.bincount(drawn, minlength=4) / 4000
    torch.testing.assert_close(counts, logits.softmax(0), atol=0.03, rtol=0)


@pytest.mark.parametrize(
    "options",
    [{"top_p": 0.9}, {"top_p": 0.999}, {"min_p": 0.01}, {"min_p": 1e-9}, {"top_k": 40}, {},
     {"top_k": 40, "top_p": 0.8}, {"top_p": 0.9, "min_p": 0.01}, {"top_p": 1e-9}],
)  # fmt: skip
@pytest.mark.parametrize("ties", [False, True])
def test_a_large_vocabulary_is_not_sorted(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], ties: bool
) -> None:
    """And the draws are those from the sorted one, equal logits included."""
    logits = 4 * torch.randn(3, 5000)
    logits = logits.bfloat16().float() if ties else logits
    logits[2] = logits[2] if options.get("min_p") else logits[2] / 100  # nothing stands out

    def drawn() -> list[list[int]]:
        generators = [torch.Generator().manual_seed(i) for i in range(3)]
        return [sample(logits, Sampling(temperature=1.0, **options), generators) for _ in range(40)]

    fast = drawn()
    monkeypatch.setattr(sampling_module, "_SMALL", 5000)
    if not options:  # drawn in the vocabulary's order
        flat = torch.tensor(fast).T
        assert all(len(row.unique()) > 5 for row in flat)
    elif not (ties and options.get("top_k")):  # of equal ones either may be the k-th
        assert fast == drawn()


def test_rows_do_not_share_draws() -> None:
    logits = torch.randn(3, 50)

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(i) for i in range(3)]

    options = Sampling(temperature=1.3, top_k=30, top_p=0.9, min_p=0.01)
    together, alone = generators(), generators()
    for _ in range(20):
        want = [sample(row[None], options, [g])[0] for row, g in zip(logits, alone, strict=True)]
        assert sample(logits, options, together) == want


def test_repetition_penalty() -> None:
    history = History(4, 0)
    history.read(torch.tensor([1, 1, 3]))
    rows = torch.tensor([[1.0, 1.5, -1.0, -0.9]])
    for penalty, best in ((1.0, 1), (1.4, 1), (1.6, 0)):
        options = Sampling(temperature=0, repetition_penalty=penalty)
        assert sample(rows, options, [], [history]) == [best]
    only = torch.tensor([[-math.inf, -math.inf, -1.0, -0.9]])
    penalised = Sampling(temperature=0, repetition_penalty=1.6)
    assert sample(only, penalised, [], [history]) == [2]


@given(
    tokens=st.lists(st.integers(0, 4), max_size=12),
    cut=st.integers(0, 12),
    window=st.integers(0, 5),
)
def test_history_counts_the_window(tokens: list[int], cut: int, window: int) -> None:
    history = History(5, window)
    history.read(torch.tensor(tokens[:cut], dtype=torch.int64))
    history.add(tokens[cut:])
    kept = tokens[-window:] if window else tokens
    assert history.counts.tolist() == [kept.count(token) for token in range(5)]


def test_repetition_penalty_of_a_session() -> None:
    """Prompt and generated tokens count, the window forgets: equal to the plain definition."""
    model, start = small_model(), prompt(7)
    for window in (0, 3):
        options = Sampling(temperature=0, repetition_penalty=1.8, repetition_window=window)
        got = generate(model, [start], 12, options, piece=4)[0].tokens
        text = list(start)
        for token in got:
            logits = next_logits(model, text)
            for seen in set(text[-window:] if window else text):
                logits[seen] = logits[seen] / 1.8 if logits[seen] > 0 else logits[seen] * 1.8
            assert token == int(logits.argmax())
            text.append(token)


def test_bad_sampling() -> None:
    for field, value, wanted in (
        ("temperature", -1.0, "temperature must be 0 or more; got -1.0"),
        ("temperature", math.nan, "temperature must be"),
        ("top_k", -1, "top_k must be"),
        ("top_p", 0.0, "top_p must be above 0 and at most 1; got 0.0"),
        ("min_p", 1.1, "min_p must be from 0 to 1; got 1.1"),
        ("repetition_penalty", 0.0, "repetition_penalty must be above 0; got 0.0"),
        ("repetition_window", -1, "repetition_window must be"),
    ):
        with pytest.raises(ValueError, match=wanted):
            Sampling(**{field: value})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="top_k must be a int"):
        Sampling(top_k=1.5)  # type: ignore[arg-type]
    for bad in ([0.0, math.nan], [math.inf, 0.0], [-math.inf, -math.inf]):
        with pytest.raises(ValueError, match="not finite"):
            sample(torch.tensor([bad]), WARM, [torch.Generator()])


# Stop sequences


def expected_stop(
    tokens: list[int], stops: list[Any], token_bytes: Any
) -> tuple[list[int], Any, bytes]:
    """By trying every prefix of the text."""
    for end in range(1, len(tokens) + 1):
        before = b"".join(token_bytes(t) for t in tokens[: end - 1])
        data = before + token_bytes(tokens[end - 1])
        hits = []  # the symbol of the last token at which it is complete, where it begins
        for index, stop in enumerate(stops):
            if isinstance(stop, bytes):
                for at in range(len(before) + 1, len(data) + 1):
                    if data[:at].endswith(stop):
                        hits.append((at - len(before), at - len(stop), index))
                        break
            elif tuple(tokens[:end][-len(stop) :]) == tuple(stop):
                hits.append((len(data) - len(before), end - len(stop), index))
        if not hits:
            continue
        _, start, index = min(hits)
        if not isinstance(stops[index], bytes):
            return tokens[:start], stops[index], b""
        kept: list[int] = []
        size = 0
        for token in tokens:
            piece = token_bytes(token)
            if size + len(piece) > start:
                return kept, stops[index], piece[: start - size]
            kept.append(token)
            size += len(piece)
    return tokens, None, b""


WORDS = [b"a", b"b", b"ab", b"ba", b"aab", b""]


@settings(max_examples=300)
@given(
    tokens=st.lists(st.integers(0, 5), max_size=14),
    stops=st.lists(
        st.text("ab", min_size=1, max_size=5).map(str.encode)
        | st.lists(st.integers(0, 5), min_size=1, max_size=3).map(tuple),
        min_size=1,
        max_size=3,
    ),
)
def test_stop_sequences(tokens: list[int], stops: list[Any]) -> None:
    """Found across token boundaries, at the first symbol that completes one; nothing of a stop
    sequence is ever given out; held tokens rebuild the matcher."""

    def token_bytes(token: int) -> bytes:
        return WORDS[token]

    compiled = Stops(stops, token_bytes, 6)
    matcher = Matcher(compiled)
    kept, stop, rest = expected_stop(tokens, stops, token_bytes)
    got: list[int] = []
    for token in tokens:
        fed = matcher.feed(token)
        got += fed.tokens
        if fed.stop is not None:
            assert (got, fed.stop, fed.rest) == (kept, stop, rest)
            return
        assert got == kept[: len(got)]
        again = Matcher(compiled)
        assert [t for h in matcher.held for t in again.feed(h).tokens] == []
        assert again.held == matcher.held
        matcher = again
    assert stop is None
    assert got + list(matcher.flush()) == tokens


def test_bad_stop_sequences() -> None:
    model = small_model()
    for stop, kind, wanted in (
        ([b""], ValueError, "stop: sequence 0 is empty"),
        ([(1,), ()], ValueError, "stop: sequence 1 is empty"),
        ([(11,)], ValueError, r"stop: wanted ids in \[0, 11\); got 11"),
        (["a"], TypeError, "got the str 'a'"),
        (b"ab", TypeError, "wanted a sequence of stop sequences"),
        ([(0.5,)], TypeError, "wanted bytes or token ids"),
    ):
        with pytest.raises(kind, match=wanted):
            Session(model, stop=stop)  # type: ignore[arg-type]
    large = small_model(vocab_size=300)
    with pytest.raises(ValueError, match="stop: bytes need token_bytes"):
        Session(large, stop=[b"a"])
    with pytest.raises(ValueError, match="is bytes, but this model has 300 tokens"):
        generate(large, [b"a"], 1)


def test_stop_ends_a_row_and_is_left_out() -> None:
    model = small_model()
    whole = generate(model, [prompt(5)], 30, WARM)[0].tokens
    stop = tuple(whole[9:12])
    first = next(i for i in range(30) if tuple(whole[i : i + 3]) == stop)
    events: list[Event] = []
    got = generate(model, [prompt(5)], 30, WARM, stop=[stop, (0,) * 9], on_event=events.append)
    assert got == [Generated(whole[:first], "stop", stop)]
    assert [token for event in events for token in event.tokens] == whole[:first]
    assert events[-1].finish == "stop"
    # A possible beginning that was held comes out when the row ends.
    held = generate(model, [prompt(5)], 10, WARM, stop=[(*whole[8:10], 0, 0, 0, 0)])
    assert held == [Generated(whole[:10], "length")]


# Rows


@settings(max_examples=10)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    batch_size=st.none() | st.integers(1, 3),
    piece=st.integers(1, 40),
    greedy=st.booleans(),
)
def test_rows_are_as_if_alone(
    lengths: list[int], batch_size: int | None, piece: int, greedy: bool
) -> None:
    model = small_model()
    prompts = [prompt(n, seed=i) for i, n in enumerate(lengths)]
    sampling = GREEDY if greedy else Sampling(temperature=1.0, top_p=0.95, repetition_penalty=1.1)
    options: dict[str, Any] = {"sampling": sampling, "stop": [(3, 4), (5,)]}
    events: list[Event] = []
    got = generate(
        model, prompts, 9, **options, seed=7, batch_size=batch_size, piece=piece,
        on_event=events.append,
    )  # fmt: skip
    for i, start in enumerate(prompts):
        assert got[i] == generate(model, [start], 9, **options, seed=[7 + i])[0]
        streamed = [token for e in events if e.row == i for token in e.tokens]
        assert streamed == got[i].tokens


def test_greedy_is_argmax_of_the_whole_forward() -> None:
    model, start = small_model(), prompt(11)
    made = generate(model, [torch.tensor(start), start[:3]], 12, GREEDY)
    for begin, result in zip((start, start[:3]), made, strict=True):
        text = list(begin)
        for token in result.tokens:
            assert token == int(next_logits(model, text).argmax())
            text.append(token)


def test_prompts_of_any_kind() -> None:
    model = small_model(vocab_size=256)
    text = b"some text of 20 byte"

    def pieces() -> Iterator[bytes]:
        for at in range(0, 20, 3):
            yield text[at : at + 3]
            yield b""

    forms = [text, list(text), torch.tensor(list(text), dtype=torch.int32), pieces()]
    results = generate(model, forms, 5, GREEDY)
    assert all(result == results[0] for result in results)
    assert generate(model, [], 5) == []
    assert generate(model, [text], 0) == [Generated()]


def test_long_prompts_are_read_in_pieces() -> None:
    """No call of the model sees more than `piece` tokens, and no more logits than rows are made."""
    model, calls, heads = small_model(), [], []
    model.embed.register_forward_hook(lambda _, args, __: calls.append(args[0].numel()))
    model.output.output.register_forward_hook(lambda _, __, y: heads.append(y.shape[:-1].numel()))

    def pieces() -> Iterator[list[int]]:
        for i in range(50):
            yield prompt(37, seed=i)

    logits, state = prefill(model, [pieces(), prompt(100), prompt(3)], piece=64)
    assert max(calls) <= 64
    assert max(heads) <= 3
    assert state.position.tolist() == [1850, 100, 3]
    whole = [token for i in range(50) for token in prompt(37, seed=i)]
    torch.testing.assert_close(logits[0], next_logits(model, whole), rtol=1e-9, atol=1e-10)


def test_bad_prompts() -> None:
    model = small_model()
    for prompts, kind, wanted in (
        ([[1], []], ValueError, "prompts: prompt 1 is empty"),
        ([[11]], IndexError, r"prompts: prompt 0: wanted ids in \[0, 11\); got 11"),
        ([[-1]], IndexError, "got -1"),
        (["text"], TypeError, r"got a str \(encode it\)"),
        ("text", TypeError, "got one prompt"),
        (torch.tensor([1]), TypeError, "got one prompt"),
        ([[0.5]], TypeError, r"wanted token ids; got 0\.5"),
        ([torch.tensor([[1]])], TypeError, "wanted a vector of token ids"),
        ([3], TypeError, "wanted token ids or bytes; got int"),
    ):
        with pytest.raises(kind, match=wanted):
            generate(model, prompts, 3)  # type: ignore[arg-type]
    for options, wanted in (
        ({"max_new_tokens": -1}, "max_new_tokens: wanted 0 or more; got -1"),
        ({"seed": [1, 2]}, r"seed: wanted one int, or 1 \(one per prompt\); got 2"),
        ({"seed": -1}, r"seed: wanted 0 to 2\^63 - 1; got -1"),
        ({"batch_size": 0}, "batch_size: wanted None or 1 or more; got 0"),
        ({"piece": 0}, "piece: wanted an int >= 1; got 0"),
    ):
        with pytest.raises(ValueError, match=wanted):
            generate(model, [[1]], **{"max_new_tokens": 3, **options})
    with pytest.raises(ValueError, match=r"call model\.eval\(\)"):
        generate(small_model(dropout=0.1).train(), [[1]], 3)


@pytest.mark.parametrize("length", [1, 4, 5, 31, 32, 33, 36, 37, 40, 41, 47, 60])
def test_recent_norms_are_the_released_codes(length: int) -> None:
    """Its schedule, written down: chunks two by two, the statistics of the last six from 8 on."""
    model = small_model()
    chunk, text = 4, random_tokens(1, length)
    with torch.no_grad():
        state, whole = model.init_state(1), (length - 1) // chunk
        for first in range(0, whole, 2):
            end = min(first + 2, whole) * chunk
            state = model(text[:, first * chunk : end], state, return_state=True)[1]
            if end >= 8 * chunk:
                fresh = model(text[:, end - 6 * chunk : end], return_state=True)[1]
                state = state.with_norms(fresh)
        want, state = model(text[:, whole * chunk :], state, return_state=True)
        got, after = prefill(model, [text[0], text[0, :3]], recent_norms=True)
        torch.testing.assert_close(got[:1], want[:, -1], rtol=1e-9, atol=1e-10)
        assert_same_state(after.select(0), state)
        plain = prefill(model, [text[0]])[0]
    assert torch.allclose(plain, got[:1], rtol=1e-6) == (length <= 32)
    seen = length if length <= 32 else 6 * chunk + 1 + (length - 1) % chunk
    assert after.layers[0].norm.count[0] == seen
    expected = generate(model, [text[0]], 3, GREEDY, recent_norms=True)[0].tokens
    assert expected[0] == int(want[0, -1].argmax())
    with pytest.raises(ValueError, match="recent_norms: wanted state=None"):
        prefill(model, [[1]], after.select(0), recent_norms=True)


# Sessions


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


# Beams


def all_continuations(
    model: Megalodon, start: list[int], limit: int, stop: tuple[int, ...]
) -> dict[tuple[int, ...], float]:
    """Every continuation with its log probability, ended at the stop sequence or at the limit."""
    done: dict[tuple[int, ...], float] = {}
    live: dict[tuple[int, ...], float] = {(): 0.0}
    for length in range(1, limit + 1):
        grown = {}
        for tokens, value in live.items():
            for token, more in enumerate(next_logits(model, start + list(tokens)).log_softmax(-1)):
                grown[(*tokens, token)] = value + float(more)
        live = {}
        for tokens, value in grown.items():
            ended = tokens[-len(stop) :] == stop or length == limit
            (done if ended else live)[tokens] = value
    return done


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0, -1.0])
def test_enough_beams_find_the_best(penalty: float) -> None:
    model, start, stop = small_model(vocab_size=4), [1, 2, 3], (2, 1)
    every = all_continuations(model, start, 4, stop)
    best = sorted(every.items(), key=lambda item: -item[1] / len(item[0]) ** penalty)[:5]
    (found,) = beam_search(
        model, [start], 4, beams=256, length_penalty=penalty, results=5, stop=[stop]
    )
    for hypothesis, (tokens, value) in zip(found, best, strict=True):
        ended = tokens[-2:] == stop
        assert tuple(hypothesis.tokens) == (tokens[:-2] if ended else tokens)
        assert hypothesis.finish == ("stop" if ended else "length")
        assert hypothesis.log_probability == pytest.approx(value)
        assert hypothesis.score == pytest.approx(value / len(tokens) ** penalty)


def test_beams() -> None:
    model, starts = small_model(), [prompt(6), prompt(3, seed=1)]
    one = beam_search(model, starts, 10, beams=1)
    greedy = generate(model, starts, 10, GREEDY)
    assert [found[0].tokens for found in one] == [result.tokens for result in greedy]
    for start, found in zip(
        starts, beam_search(model, starts, 10, beams=4, results=3), strict=True
    ):
        assert [h.score for h in found] == sorted((h.score for h in found), reverse=True)
        for hypothesis in found:
            text, value = list(start), 0.0
            for token in hypothesis.tokens:
                value += float(next_logits(model, text).log_softmax(-1)[token])
                text.append(token)
            assert hypothesis.log_probability == pytest.approx(value)
    with pytest.raises(ValueError, match="results: wanted 1 or more and at most beams = 2; got 3"):
        beam_search(model, starts, 4, beams=2, results=3)
    with pytest.raises(ValueError, match="beams: wanted 1 or more; got 0"):
        beam_search(model, starts, 4, beams=0)
