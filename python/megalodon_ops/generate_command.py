"""What `megalodon generate` does with its arguments: prints the text of a `Session`."""

from __future__ import annotations

import codecs
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from megalodon_ops._prefill import DEFAULT_PIECE
from megalodon_ops.beam import beam_search
from megalodon_ops.model import Megalodon
from megalodon_ops.sampling import Sampling
from megalodon_ops.session import Session
from megalodon_ops.tokenizer import BYTES, Tokenizer
from megalodon_ops.training.errors import CommandError

# What an empty prompt means: text begins after a line break.
EMPTY_PROMPT = b"\n"
EXIT_INTERRUPTED = 130
EXIT_PIPE_CLOSED = 141  # 128 + SIGPIPE, as a shell reports it


@dataclass(frozen=True)
class Request:
    """The command's arguments. sampling: the fields of `Sampling` that were given."""

    prompt: str
    prompt_file: str | None
    max_new_tokens: int | None
    sampling: dict[str, Any]
    stop: tuple[bytes, ...]
    seed: int | None
    beams: int
    length_penalty: float
    load_state: str | None
    save_state: str | None
    echo: bool
    timing: bool

    def check(self) -> None:
        """Raise CommandError where arguments contradict each other or are out of range."""
        if self.prompt and self.prompt_file is not None:
            raise CommandError("give --prompt or --prompt-file, not both")
        if b"" in self.stop:
            raise CommandError("--stop must not be empty: it would match everywhere")
        try:
            Sampling(**self.sampling)
        except ValueError as error:
            name, _, rest = str(error).partition(" ")
            raise CommandError(f"--{name.replace('_', '-')} {rest}") from error
        if self.beams == 0:
            return
        for given, name in (
            (self.load_state, "--load-state"),
            (self.save_state, "--save-state"),
            (self.sampling, "the options of sampling"),
        ):
            if given:
                raise CommandError(f"--beams searches instead of drawing: it excludes {name}")
        if self.max_new_tokens is None:
            raise CommandError("--beams needs a --max-new-tokens above 0")

    def pieces(self) -> Iterator[bytes]:
        """The prompt's bytes, in pieces that are each read in one call of the model."""
        if self.prompt_file is None:
            # surrogateescape: bytes of the command line that are no UTF-8 come back as they were.
            data = self.prompt.encode("utf-8", "surrogateescape")
            for at in range(0, len(data), DEFAULT_PIECE):
                yield data[at : at + DEFAULT_PIECE]
            return
        try:
            with open(0 if self.prompt_file == "-" else self.prompt_file, "rb") as file:
                while piece := file.read(DEFAULT_PIECE):
                    yield piece
        except OSError as error:
            raise CommandError(
                f"cannot read the prompt {self.prompt_file}: {error.strerror}"
            ) from error


class _Text:
    """Standard output, as text: a character may span several tokens and is printed when it is
    complete; bytes that are no UTF-8 become the replacement character."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def show(self, data: bytes, final: bool = False) -> None:
        # Straight to the binary stream: the locale's encoding may not have the character.
        sys.stdout.buffer.write(self._decoder.decode(data, final).encode())
        sys.stdout.buffer.flush()

    def close(self) -> None:
        self.show(b"", final=True)
        sys.stdout.buffer.write(b"\n")
        sys.stdout.buffer.flush()


@dataclass
class _Clock:
    """Tokens and seconds of the prompt and of decoding."""

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    tokens: int = 0
    seconds: float = 0.0


def run(model: Megalodon, request: Request, tokenizer: Tokenizer = BYTES) -> int:
    """Generate and print; returns the exit code. Raises CommandError and OSError."""
    try:
        return _run(model, request, tokenizer)
    except ValueError as error:  # an argument, a state or a model that does not fit
        raise CommandError(str(error)) from error
    except BrokenPipeError:
        # The reader (`| head`) has enough. Python must not fail once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE_CLOSED


def _run(model: Megalodon, request: Request, tokenizer: Tokenizer) -> int:
    text, clock = _Text(), _Clock()
    seed = request.seed
    if seed is None and request.load_state is None:
        seed = int.from_bytes(os.urandom(4), "little")
    session = _session(model, request, tokenizer, seed)

    def echoed() -> Iterator[bytes]:
        for piece in request.pieces():
            # What a loaded state held for a stop sequence was said before this.
            for row in session.rows:
                text.show(tokenizer.decode(session.flush(row)))
            if request.echo:
                text.show(piece)
            yield piece

    def tokens() -> Iterator[Sequence[int]]:
        for part in tokenizer.stream(echoed()):
            clock.prompt_tokens += len(part)
            yield part
        if not clock.prompt_tokens and request.load_state is None:
            yield tokenizer.encode(EMPTY_PROMPT)

    begin = time.perf_counter()
    if request.beams:
        return _search(model, request, tokenizer, tokens(), text)
    _read(session, tokens(), 0 if seed is None else seed)
    clock.prompt_seconds = time.perf_counter() - begin
    interrupted = _stream(session, request, tokenizer, text, clock)
    if request.save_state is not None:
        session.save(request.save_state)
    text.close()
    if request.timing:
        told = "of the state" if seed is None else str(seed)
        print(
            f"prompt: {clock.prompt_tokens} tokens in {1e3 * clock.prompt_seconds:.1f} ms; then "
            f"{clock.tokens} tokens at {1e3 * clock.seconds / max(1, clock.tokens):.3f} ms/token "
            f"(seed {told})",
            file=sys.stderr,
        )
    return EXIT_INTERRUPTED if interrupted else 0


def _session(model: Megalodon, request: Request, tokenizer: Tokenizer, seed: int | None) -> Session:
    """A session without a row, or of the one row of a loaded state."""
    if request.load_state is None:
        return Session(
            model,
            Sampling(**request.sampling),
            stop=request.stop,
            token_bytes=tokenizer.token_bytes,
        )
    session = Session.load(
        request.load_state,
        model,
        request.sampling,
        stop=request.stop or None,
        token_bytes=tokenizer.token_bytes,
    )
    if len(session.rows) != 1:
        raise ValueError(f"{request.load_state}: holds {len(session.rows)} rows; wanted one")
    if seed is not None:
        session.seed(session.rows[0], seed)
    return session


def _read(session: Session, prompt: Iterator[Sequence[int]], seed: int) -> None:
    """Let the session's row read the prompt, or a first row, of that seed."""
    if not session.rows:
        session.add([prompt], seed)
        return
    first = next(prompt, None)
    if first is not None:
        session.extend(session.rows[0], _chained(first, prompt))


def _chained(first: Sequence[int], rest: Iterator[Sequence[int]]) -> Iterator[Sequence[int]]:
    yield first
    yield from rest


def _stream(
    session: Session, request: Request, tokenizer: Tokenizer, text: _Text, clock: _Clock
) -> bool:
    """Print tokens until the limit, a stop sequence or Ctrl-C; whether it was Ctrl-C."""
    limit = request.max_new_tokens
    with _ctrl_c(deferred=request.save_state is not None) as asked:
        try:
            while (limit is None or clock.tokens < limit) and not asked:
                begin = time.perf_counter()
                event = session.step(leave=False)[0]
                clock.tokens += 1
                clock.seconds += time.perf_counter() - begin
                text.show(tokenizer.decode(event.tokens) + event.rest)
                if event.finish is not None:
                    break
        except KeyboardInterrupt:
            return True
    if request.save_state is None:
        text.show(tokenizer.decode(session.flush(session.rows[0])))
    return bool(asked)


@contextmanager
def _ctrl_c(deferred: bool) -> Iterator[list[int]]:
    """Whether Ctrl-C was pressed. Deferred: only noted the first time, so that the state which is
    saved then is that of a whole step."""
    asked: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    if not deferred:
        yield asked
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def _search(
    model: Megalodon,
    request: Request,
    tokenizer: Tokenizer,
    prompt: Iterator[Sequence[int]],
    text: _Text,
) -> int:
    assert request.max_new_tokens is not None
    best = beam_search(
        model,
        [prompt],
        request.max_new_tokens,
        beams=request.beams,
        length_penalty=request.length_penalty,
        stop=request.stop,
        token_bytes=tokenizer.token_bytes,
    )[0][0]
    text.show(tokenizer.decode(best.tokens) + best.rest)
    text.close()
    if request.timing:
        print(
            f"log probability {best.log_probability:.4f}, score {best.score:.4f}", file=sys.stderr
        )
    return 0
