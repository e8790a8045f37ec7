"""`Session`: rows that are decoded together, come and go, and are saved and continued."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _files
from ._prefill import DEFAULT_PIECE, Prompt, number_of, prefill, require_count, require_tokens
from .decoding import Decoder
from .model import Megalodon
from .sampling import History, Sampling, generator_of, sample, seeds_of
from .state import MegalodonState
from .stopping import Fed, Matcher, Stop, Stops

_FORMAT = "megalodon_ops.session"
_VERSION = "1"
_STATE = "state."
_SETTLED = 8  # steps of the same rows after which a decoder (on a GPU: a graph) is worth making

TokenBytes = Callable[[int], bytes]


class Event(NamedTuple):
    """What one step did to one row.

    Attributes:
        row: the row's number, from `Session.add`.
        tokens: tokens that are now final: none while they may belong to a stop sequence.
        finish: None; or why the row has left: "stop" or "length".
        stop: the stop sequence that was found.
        rest: where a stop sequence of bytes begins inside a token, that token's bytes before it.
    """

    row: int
    tokens: tuple[int, ...]
    finish: str | None = None
    stop: Stop | None = None
    rest: bytes = b""


@dataclass
class _Row:
    number: int
    generator: torch.Generator
    limit: int | None
    made: int = 0
    matcher: Matcher | None = None
    history: History | None = None
    early: tuple[int, ...] = ()  # tokens that the next event also tells

    def take(self, token: int) -> Event:
        event = self._next(token)
        if self.early:
            event, self.early = event._replace(tokens=self.early + event.tokens), ()
        return event

    def flush(self) -> tuple[int, ...]:
        """The tokens that no event has told; none of them is a stop sequence's beginning now."""
        held = () if self.matcher is None else self.matcher.flush()
        tokens, self.early = self.early + held, ()
        return tokens

    def _next(self, token: int) -> Event:
        self.made += 1
        if self.history is not None:
            self.history.add((token,))
        fed = Fed((token,)) if self.matcher is None else self.matcher.feed(token)
        if fed.stop is not None:
            return Event(self.number, fed.tokens, "stop", fed.stop, fed.rest)
        if self.limit is not None and self.made >= self.limit:
            held = () if self.matcher is None else self.matcher.flush()
            return Event(self.number, fed.tokens + held, "length")
        return Event(self.number, fed.tokens)


class Session:
    """Rows that are decoded together; each as if it were alone.

    A row has its own state, position, random generator and place in the stop sequences, so what it
    says depends on its prompt and seed, not on the other rows (to rounding: a matrix product of
    other sizes may round otherwise, which decides only where two tokens are as good as equal).

    Args:
        model: in eval mode, if it has any dropout.
        sampling: how tokens are drawn; None is `Sampling()`.
        stop: sequences that end a row: of token ids (an end-of-text token is one of length 1), or
            bytes, which are found across the boundaries of tokens.
        token_bytes: the bytes of a token id, for stop sequences of bytes; None: token i is byte i.
        piece: tokens of prompts that are read in one call.
        recent_norms: as for `prefill`, of the prompts that begin rows.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
    """

    def __init__(
        self,
        model: Megalodon,
        sampling: Sampling | None = None,
        *,
        stop: Sequence[Stop] = (),
        token_bytes: TokenBytes | None = None,
        piece: int = DEFAULT_PIECE,
        recent_norms: bool = False,
    ) -> None:
        if model.training and model.config.any_dropout:
            raise ValueError("the model is in training mode, with dropout: call model.eval()")
        require_tokens(model.config)
        self.model = model
        self.sampling = Sampling() if sampling is None else sampling
        self._stops = Stops(stop, token_bytes, model.config.vocab_size)
        self._piece, self._recent_norms = piece, recent_norms
        self._rows: list[_Row] = []
        self._next_number = 0
        self._state: MegalodonState | None = None
        self._decoder: Decoder | None = None
        self._steps = 0  # since the rows changed
        # The logits to draw from, or None where the model must first read _tokens, the last drawn.
        self._logits: Tensor | None = None
        self._tokens: Tensor | None = None

    @property
    def rows(self) -> tuple[int, ...]:
        """The numbers of the rows that are being continued."""
        return tuple(row.number for row in self._rows)

    @torch.inference_mode()
    def add(
        self,
        prompts: Sequence[Prompt],
        seed: int | Sequence[int] = 0,
        max_new_tokens: int | None = None,
    ) -> list[int]:
        """Read prompts and let their rows join.

        Args:
            prompts: as for `prefill`.
            seed: of row i: seed + i, or the i-th of a sequence.
            max_new_tokens: after so many a row leaves; None: only at a stop sequence.

        Returns:
            the rows' numbers.
        """
        require_count("max_new_tokens", max_new_tokens, optional=True)
        generators = [generator_of(s) for s in seeds_of(seed, number_of(prompts))]
        rows = [
            _Row(self._next_number + i, generator, max_new_tokens, 0, self._matcher(), self._past())
            for i, generator in enumerate(generators)
        ]
        logits, state = self._read(rows, prompts, None)
        self._next_number += len(rows)
        if self._rows:
            logits = torch.cat([self._advance(), logits])
            state = MegalodonState.cat([self._current(), state])
        self._rows += rows
        self._set(state, logits)
        return [row.number for row in rows]

    @torch.inference_mode()
    def extend(self, row: int, prompt: Prompt) -> None:
        """Let one row read more tokens, after those it has read and said.

        They end a match that has begun: stop sequences are found in what is said without a break.
        Tokens that were held for it come with the row's next event, or from `flush` before that.
        """
        index = self._index(row)
        old = self._advance()
        logits, state = self._read([self._rows[index]], [prompt], self._current().select(index))
        self._rows[index].early = self._rows[index].flush()
        if len(self._rows) > 1:
            parts = [self._current().select(i) for i in range(len(self._rows))]
            parts[index] = state
            state = MegalodonState.cat(parts)
            logits = torch.cat([old[:index], logits, old[index + 1 :]])
        self._set(state, logits)

    def seed(self, row: int, seed: int) -> None:
        """Give one row the random generator of another seed."""
        self._rows[self._index(row)].generator = generator_of(seed)

    def flush(self, row: int) -> tuple[int, ...]:
        """One row's tokens that are held back as a stop sequence's possible beginning: they are
        given out, and no longer count as one."""
        return self._rows[self._index(row)].flush()

    def remove(self, row: int) -> None:
        """Let one row leave."""
        index = self._index(row)
        self._keep([i for i in range(len(self._rows)) if i != index])

    @torch.inference_mode()
    def step(self, *, leave: bool = True) -> list[Event]:
        """Draw one token for every row, in one call of the model; finished rows leave.

        leave=False lets them stay, to be saved or extended: they go on behind a stop sequence.
        """
        rows = self._rows
        if not rows:
            return []
        logits = self._advance()
        histories = [row.history for row in rows if row.history is not None]
        drawn = sample(logits, self.sampling, [row.generator for row in rows], histories)
        events = [row.take(token) for row, token in zip(rows, drawn, strict=True)]
        self._logits = None
        if self._tokens is not None and len(rows) == 1:
            self._tokens.fill_(drawn[0])
        else:
            self._tokens = torch.tensor(drawn, device=logits.device).unsqueeze(1)
        if leave and any(event.finish for event in events):
            self._keep([i for i, event in enumerate(events) if event.finish is None])
        return events

    def _advance(self) -> Tensor:
        """The logits (B, V) to draw from next."""
        if self._logits is None:
            assert self._tokens is not None
            self._logits = self._decode(self._tokens)[:, -1]
        return self._logits

    def _decode(self, tokens: Tensor) -> Tensor:
        """One decoding step; prepared once the same rows have been together for a while."""
        if self._decoder is not None:
            return self._decoder(tokens)
        self._steps += 1
        if self._steps >= _SETTLED:
            self._decoder = self.model.decoder(self._current())
        logits: Tensor = self.model(tokens, self._current(), inplace_state=True)
        return logits

    def _current(self) -> MegalodonState:
        assert self._state is not None
        return self._state

    def _set(self, state: MegalodonState, logits: Tensor) -> None:
        self._change(state)
        self._logits, self._tokens = logits, None

    def _change(self, state: MegalodonState) -> None:
        """Other rows, in tensors of their own."""
        self._state, self._decoder, self._steps = state, None, 0

    @torch.inference_mode()
    def _keep(self, stay: list[int]) -> None:
        """Only these rows stay."""
        self._rows = [self._rows[i] for i in stay]
        index = torch.tensor(stay, dtype=torch.int64, device=self._current().device)
        self._change(self._current().index_select(index))
        if self._logits is not None:
            self._logits = self._logits.index_select(0, index)
        if self._tokens is not None:
            self._tokens = self._tokens.index_select(0, index)

    def _read(
        self, rows: list[_Row], prompts: Sequence[Prompt], state: MegalodonState | None
    ) -> tuple[Tensor, MegalodonState]:
        def note(index: int, tokens: Tensor) -> None:
            history = rows[index].history
            if history is not None:
                history.read(tokens)

        recent = self._recent_norms and state is None
        return prefill(
            self.model, prompts, state, piece=self._piece, on_tokens=note, recent_norms=recent
        )

    def _index(self, row: int) -> int:
        if row not in self.rows:
            raise ValueError(f"row: wanted one of {list(self.rows)}; got {row}")
        return self.rows.index(row)

    def _matcher(self) -> Matcher | None:
        return Matcher(self._stops) if self._stops.given else None

    def _past(self) -> History | None:
        if self.sampling.repetition_penalty == 1:
            return None
        return History(self.model.config.vocab_size, self.sampling.repetition_window)

    @torch.inference_mode()
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all rows to a safetensors file, whole or not at all: `load` goes on from there,
        token for token as this session would. Errors are those of `MegalodonState.save`."""
        state = self._current() if self._rows else self.model.init_state(0)
        logits = self._advance() if self._rows else torch.zeros(0, self.model.config.num_outputs)
        tensors = {_STATE + name: tensor for name, tensor in state.tensors().items()}
        tensors["logits"] = logits
        for i, row in enumerate(self._rows):
            tensors[f"rows.{i}.generator"] = row.generator.get_state()
            if row.history is not None:
                tensors[f"rows.{i}.counts"] = row.history.counts
                recent = torch.tensor(row.history.recent or (), dtype=torch.int64)
                tensors[f"rows.{i}.recent"] = recent
        about = {
            "rows": [
                {
                    "number": row.number,
                    "limit": row.limit,
                    "made": row.made,
                    "held": () if row.matcher is None else row.matcher.held,
                    "early": row.early,
                }
                for row in self._rows
            ],
            "next_number": self._next_number,
            "sampling": dataclasses.asdict(self.sampling),
            "stop": [s.hex() if isinstance(s, bytes) else s for s in self._stops.given],
        }
        metadata = {
            "format": _FORMAT,
            "version": _VERSION,
            "fingerprint": state.fingerprint,
            "num_layers": str(len(state.layers)),
            "session": json.dumps(about),
        }
        _files.write(path, tensors, metadata)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: Megalodon,
        sampling: Sampling | Mapping[str, Any] | None = None,
        *,
        stop: Sequence[Stop] | None = None,
        token_bytes: TokenBytes | None = None,
        piece: int = DEFAULT_PIECE,
    ) -> Session:
        """Go on from a file of `save`.

        Args:
            path: the file.
            model: of the config that the file was made with (its weights are not compared).
            sampling: None for the file's, another, or a mapping of the fields that differ.
            stop: None for the file's, or others; tokens that were held because of the file's come
                with the next event.
            token_bytes, piece: as for `Session`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, is no session, or belongs to another config or dtype; or the
                sampling has a repetition penalty for which the file does not know the tokens.
        """
        name = os.fspath(path)
        named, metadata = _files.read(path, _FORMAT, _VERSION)
        tensors = {n.removeprefix(_STATE): t for n, t in named.items() if n.startswith(_STATE)}
        state = MegalodonState.from_file(name, tensors, metadata, model.config)
        device = model.embed.weight.device
        try:
            about: dict[str, Any] = json.loads(metadata["session"])
            saved = Sampling(**about["sampling"])
            if not isinstance(sampling, Sampling):
                sampling = dataclasses.replace(saved, **(sampling or {}))
            stops = [bytes.fromhex(s) if isinstance(s, str) else s for s in about["stop"]]
            state = state.to(device)
            state.check(model.config, len(about["rows"]), model.init_state(0).dtype, device)
            session = cls(
                model,
                sampling,
                stop=stops if stop is None else stop,
                token_bytes=token_bytes,
                piece=piece,
            )
            session._next_number = int(about["next_number"])
            for i, entry in enumerate(about["rows"]):
                session._rows.append(session._restored(i, entry, named, saved, stop is None))
            session._set(state, named["logits"].to(device))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{name}: cannot be continued: {error}") from error
        return session

    def _restored(
        self,
        index: int,
        entry: dict[str, Any],
        named: dict[str, Tensor],
        saved: Sampling,
        same_stops: bool,
    ) -> _Row:
        generator = torch.Generator()
        generator.set_state(named[f"rows.{index}.generator"])
        matcher, history = self._matcher(), self._past()
        early, held = tuple(entry["early"]), tuple(entry["held"])
        if matcher is not None and same_stops:
            for token in held:
                matcher.feed(token)
        else:
            early += held
        if history is not None:
            if saved.repetition_penalty == 1 or (
                saved.repetition_window != self.sampling.repetition_window
            ):
                raise ValueError(
                    "repetition_penalty: the file was saved without one, or with another "
                    "repetition_window, so the tokens it would apply to are not known"
                )
            history.counts = named[f"rows.{index}.counts"].clone()
            if history.recent is not None:
                history.recent.extend(named[f"rows.{index}.recent"].tolist())
        return _Row(
            entry["number"], generator, entry["limit"], entry["made"], matcher, history, early
        )
