"""Stop sequences: found across token boundaries, at the first that is complete, and left out."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prompts import WARM, prompt
from small_model import small_model

from megalodon_ops.generation import Generated, generate
from megalodon_ops.session import Event, Session
from megalodon_ops.stopping import Matcher, Stops


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
