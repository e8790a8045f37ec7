"""Stop sequences, of tokens or of bytes, found wherever token boundaries lie."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

Stop = bytes | Sequence[int]


class Stops:
    """Compiled stop sequences, shared by all rows.

    Args:
        stop: bytes, found in the text, or sequences of token ids.
        token_bytes: the bytes of a token; None means that token i is byte i.
        vocab_size: V.

    Raises:
        TypeError: stop is one sequence instead of several, or holds something else.
        ValueError: a sequence is empty, could never occur, or bytes are given for a model whose
            tokens are not bytes, without `token_bytes`.
    """

    def __init__(
        self,
        stop: Sequence[Stop],
        token_bytes: Callable[[int], bytes] | None,
        vocab_size: int,
    ) -> None:
        if isinstance(stop, bytes | str):
            raise TypeError(f"stop: wanted a sequence of stop sequences; got {stop!r} alone")
        self.given = tuple(s if isinstance(s, bytes) else _ids(s, vocab_size) for s in stop)
        for index, sequence in enumerate(self.given):
            if len(sequence) == 0:
                raise ValueError(f"stop: sequence {index} is empty: it would match everywhere")
        self.any_bytes = any(isinstance(sequence, bytes) for sequence in self.given)
        if self.any_bytes and token_bytes is None and vocab_size > 256:
            raise ValueError(
                f"stop: bytes need token_bytes, the bytes of each token: this model has "
                f"{vocab_size} tokens, which are not single bytes"
            )
        self.token_bytes = token_bytes or _one_byte
        self.failures = [_failure_table(sequence) for sequence in self.given]

    def advance(self, index: int, matched: int, symbol: int) -> int:
        """How much of a sequence the text's end matches, after one more symbol (Knuth, Morris,
        Pratt): no text is kept, however long."""
        sequence, failure = self.given[index], self.failures[index]
        while matched and sequence[matched] != symbol:
            matched = failure[matched - 1]
        return matched + 1 if sequence[matched] == symbol else 0


class Fed(NamedTuple):
    """What one more token does.

    tokens: those that are now known to be before any stop sequence. stop: the sequence that is now
    complete, or None. rest: of a token in which that sequence begins, the bytes before it.
    """

    tokens: tuple[int, ...]
    stop: Stop | None = None
    rest: bytes = b""


class _Held(NamedTuple):
    token: int
    data: bytes
    # Where the token ends, counted in tokens and in bytes since the matcher began.
    token_end: int
    byte_end: int


class Matcher:
    """One row's place in its stop sequences. Tokens that may be the beginning of one are held."""

    def __init__(self, stops: Stops) -> None:
        self._stops = stops
        self._matched = [0] * len(stops.given)
        self._held: deque[_Held] = deque()
        self._tokens = self._bytes = 0

    @property
    def held(self) -> tuple[int, ...]:
        """The tokens that are held: feeding them to a new matcher puts it into this one's place."""
        return tuple(held.token for held in self._held)

    def feed(self, token: int) -> Fed:
        """Take the next token of the row."""
        stops = self._stops
        data = stops.token_bytes(token) if stops.any_bytes else b""
        start_bytes = self._bytes
        self._tokens += 1
        self._bytes += len(data)
        self._held.append(_Held(token, data, self._tokens, self._bytes))
        # Found sequences: where they begin (in bytes, in tokens), the earliest first.
        found: list[tuple[int, int, int]] = []
        for index, sequence in enumerate(stops.given):
            by_bytes = isinstance(sequence, bytes)
            for at, symbol in enumerate(data if by_bytes else (token,), 1):
                matched = stops.advance(index, self._matched[index], symbol)
                self._matched[index] = matched
                if matched == len(sequence):
                    end = start_bytes + at if by_bytes else self._tokens
                    found.append((at if by_bytes else len(data), end - matched, index))
                    break
        if found:
            _, start, index = min(found)
            return self._cut(start, index)
        return Fed(tuple(self._release()))

    def copy(self) -> Matcher:
        """Another matcher in the same place."""
        other = Matcher(self._stops)
        other._matched, other._held = list(self._matched), self._held.copy()
        other._tokens, other._bytes = self._tokens, self._bytes
        return other

    def flush(self) -> tuple[int, ...]:
        """The held tokens, given out and forgotten: no stop sequence will contain them."""
        tokens = self.held
        self._held.clear()
        self._matched = [0] * len(self._matched)
        return tokens

    def _release(self) -> Iterator[int]:
        """Tokens that end before every sequence that may have begun."""
        token_start, byte_start = self._tokens, self._bytes
        for sequence, matched in zip(self._stops.given, self._matched, strict=True):
            if isinstance(sequence, bytes):
                byte_start = min(byte_start, self._bytes - matched)
            else:
                token_start = min(token_start, self._tokens - matched)
        while self._held:
            first = self._held[0]
            if first.token_end > token_start or first.byte_end > byte_start:
                return
            yield self._held.popleft().token

    def _cut(self, start: int, index: int) -> Fed:
        """The held tokens before a sequence that begins at `start` (of its own kind), after which
        the matcher begins anew."""
        sequence = self._stops.given[index]
        by_bytes = isinstance(sequence, bytes)
        tokens, rest = [], b""
        for held in self._held:
            if (held.byte_end if by_bytes else held.token_end) > start:
                if by_bytes:
                    rest = held.data[: max(0, start - (held.byte_end - len(held.data)))]
                break
            tokens.append(held.token)
        self.flush()
        return Fed(tuple(tokens), sequence, rest)


def _one_byte(token: int) -> bytes:
    return bytes([token])


def _ids(sequence: Sequence[int], vocab_size: int) -> tuple[int, ...]:
    if isinstance(sequence, str):
        raise TypeError(f"stop: wanted bytes or token ids; got the str {sequence!r} (encode it)")
    ids = tuple(sequence)
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int):
            raise TypeError(f"stop: wanted bytes or token ids; got {token!r}")
        if not 0 <= token < vocab_size:
            raise ValueError(f"stop: wanted ids in [0, {vocab_size}); got {token}")
    return ids


def _failure_table(sequence: Sequence[int]) -> list[int]:
    """For every prefix, the length of its longest proper prefix that is also its end."""
    table = [0] * len(sequence)
    length = 0
    for i in range(1, len(sequence)):
        while length and sequence[i] != sequence[length]:
            length = table[length - 1]
        length += sequence[i] == sequence[length]
        table[i] = length
    return table
