"""A corpus of bytes: one file, or every file of a folder, a document each, read in constant memory;
windows of it, packed.
"""

from __future__ import annotations

import bisect
import hashlib
import os
import stat
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch

from megalodon_ops._atomic import replacing
from megalodon_ops.loss import IGNORE_INDEX
from megalodon_ops.tokenizer import Tokenizer
from megalodon_ops.training.errors import CommandError

# The default corpus is source text: third-party packages are not the standard library, and the
# tests (which some distributions leave out) are mostly data, such as tables of characters.
STDLIB_SKIPPED = frozenset(
    {"__pycache__", "dist-packages", "idle_test", "site-packages", "test", "tests"}
)
FINGERPRINT_HEAD = 1 << 16


@dataclass(frozen=True)
class Corpus:
    """Files read as one run of bytes.

    `starts[i]` is the position of the first byte of `files[i]`; `starts[-1]` is the total. Sizes
    are taken once: a file that shrinks afterwards is an error, not a shift of every later byte.
    """

    name: str
    files: tuple[Path, ...]
    starts: tuple[int, ...]
    unit: ClassVar[str] = "bytes"

    @property
    def size(self) -> int:
        return self.starts[-1]

    def read(self, start: int, length: int) -> bytes:
        """The bytes `[start, start + length)`; raises CommandError when a file has changed."""
        pieces = []
        stop = start + length
        index = bisect.bisect_right(self.starts, start) - 1
        while start < stop:
            take = min(stop, self.starts[index + 1]) - start
            if take > 0:
                pieces.append(_read_file(self.files[index], start - self.starts[index], take))
            start += take
            index += 1
        return b"".join(pieces)

    def window(self, start: int, length: int) -> np.ndarray:
        """The tokens, which are bytes, `[start, start + length)`."""
        return np.frombuffer(self.read(start, length), np.uint8)

    def pieces(self, start: int, stop: int, piece: int) -> Iterator[bytes]:
        """The bytes `[start, stop)` in pieces of `piece` bytes, the last one shorter."""
        for at in range(start, stop, piece):
            yield self.read(at, min(piece, stop - at))

    def fingerprint(self) -> str:
        """A hash of the files' order, sizes and first 64 KiB each: equal means the same corpus.

        Names are left out, so a corpus that was moved is still the same corpus.
        """
        digest = hashlib.sha256()
        for index, file in enumerate(self.files):
            size = self.starts[index + 1] - self.starts[index]
            digest.update(size.to_bytes(8, "little"))
            digest.update(_read_file(file, 0, min(size, FINGERPRINT_HEAD)))
        return digest.hexdigest()


def _read_file(file: Path, offset: int, length: int) -> bytes:
    try:
        with file.open("rb") as handle:
            handle.seek(offset)
            data = handle.read(length)
    except OSError as error:
        raise CommandError(f"cannot read {file}: {error.strerror}") from error
    if len(data) != length:
        raise CommandError(f"{file} became shorter while it was being read")
    return data


def _walk(folder: Path, skipped: frozenset[str], suffix: str) -> list[Path]:
    def fail(error: OSError) -> None:
        raise CommandError(f"cannot read {error.filename}: {error.strerror}") from error

    found = []
    for where, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if name[0] != "." and name not in skipped]
        found += [Path(where, name) for name in names if name[0] != "." and name.endswith(suffix)]
    # Sorted by the path's bytes: the same order on every machine, whatever the locale.
    return sorted(found, key=lambda file: os.fsencode(file.relative_to(folder)))


def open_corpus(path: str | None) -> Corpus:
    """The corpus at `path` (a file, or a folder with its hidden files left out), or, for None, the
    source text of the running Python's standard library.

    Raises CommandError when something cannot be read or there is no byte at all.
    """
    if path is None:
        root, skipped, suffix = Path(sysconfig.get_paths()["stdlib"]), STDLIB_SKIPPED, ".py"
        name = "the Python standard library"
    else:
        root, skipped, suffix, name = Path(path), frozenset[str](), "", path
    try:
        mode = root.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise CommandError(f"cannot read the corpus {name!r}: {reason}") from error
    if stat.S_ISDIR(mode):
        candidates = _walk(root, skipped, suffix)
    elif stat.S_ISREG(mode):
        candidates = [root]
    else:
        raise CommandError(f"cannot read the corpus {name!r}: neither a file nor a folder")

    files, starts = [], [0]
    for file in candidates:
        try:
            status = file.stat()
        except OSError as error:
            raise CommandError(f"cannot read {file}: {error.strerror}") from error
        if stat.S_ISREG(status.st_mode) and status.st_size:
            _read_file(file, 0, 1)  # a file without permission is found now, not after an hour
            files.append(file)
            starts.append(starts[-1] + status.st_size)
    if not files:
        raise CommandError(f"the corpus {name!r} is empty")
    return Corpus(name, tuple(files), tuple(starts))


def split_point(corpus: Corpus, held_out_percent: float) -> int:
    """Where the held-out part begins: it is the last `held_out_percent` of the bytes, one whole
    tail, so that no window of training text overlaps it."""
    return corpus.size - round(corpus.size * held_out_percent / 100)


class TokenFile:
    """The tokens of a part of a corpus, in a file that is mapped into memory.

    Every document is encoded alone; `starts` is that of `Corpus`, in tokens. The file is made anew
    by every session of a run: it holds nothing that corpus and tokenizer do not.
    """

    unit = "tokens"

    def __init__(self, path: Path, corpus: Corpus, stop: int, tokenizer: Tokenizer) -> None:
        self.name = corpus.name
        starts = [0]
        with replacing(path) as temporary, temporary.open("wb") as file:
            for begin, end in pairwise(corpus.starts):
                if begin >= stop:
                    break
                count = starts[-1]
                pieces = corpus.pieces(begin, min(end, stop), FINGERPRINT_HEAD)
                for tokens in tokenizer.stream(pieces):
                    np.asarray(tokens, np.uint32).tofile(file)
                    count += len(tokens)
                starts.append(count)
        self.starts = tuple(starts)
        size = path.stat().st_size // 4
        self._tokens = np.memmap(path, np.uint32, "r") if size else np.zeros(0, np.uint32)

    @property
    def size(self) -> int:
        return len(self._tokens)

    def window(self, start: int, length: int) -> np.ndarray:
        """The tokens `[start, start + length)`."""
        return self._tokens[start : start + length]


class Batch(NamedTuple):
    """What one step of training reads.

    tokens, targets: int64 of one shape, targets one token later and IGNORE_INDEX where a document
    ends. cu_seqlens: the bounds of the documents in tokens (1, T), or None where tokens (B, L) are
    rows of one document each.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    cu_seqlens: torch.Tensor | None = None


class Windows:
    """Random windows of `length + 1` tokens from the first `stop` tokens of a corpus.

    Step `i` draws from the counter-based generator Philox with the key (seed, i), so a batch
    depends on nothing but the seed and the step: a resumed run sees the text it would have seen.

    With `pack`, the documents in a window are packed: none sees another, and the last token of one
    has no target. Without, a window is read as one text.
    """

    def __init__(
        self,
        corpus: Corpus | TokenFile,
        stop: int,
        length: int,
        batch_size: int,
        seed: int,
        pack: bool = True,
    ) -> None:
        if stop < length + 1:
            raise CommandError(
                f"the corpus {corpus.name!r} is shorter than a window: its training part has "
                f"{stop} {corpus.unit} and a window needs {length + 1} (--seq-len {length} and one "
                "more)"
            )
        self._corpus, self._length, self._batch_size, self._seed = corpus, length, batch_size, seed
        self._choices = stop - length
        self._starts = np.unique(np.array(corpus.starts if pack else (0,), np.int64))

    def batch(self, step: int) -> Batch:
        """The windows of a step: tokens (batch_size, length), or packed (1, batch_size * length).

        They are packed where a document begins inside a window.
        """
        # Raw 64-bit draws: NumPy keeps them the same for ever, which it does not promise of
        # Generator.integers. The bias of the remainder is below size / 2^64.
        draws = np.random.Philox(key=[self._seed, step]).random_raw(self._batch_size)
        begins = [int(draw) % self._choices for draw in draws]
        rows = [self._corpus.window(begin, self._length + 1) for begin in begins]
        both = torch.from_numpy(np.stack(rows).astype(np.int64))
        tokens, targets = both[:, :-1].clone(), both[:, 1:].clone()  # one row would share memory
        bounds = []
        for row, begin in enumerate(begins):
            inside = self._starts_between(begin + 1, begin + self._length) - begin
            targets[row, inside - 1] = IGNORE_INDEX
            bounds += [row * self._length + at for at in (0, *inside) if at < self._length]
        if len(bounds) == self._batch_size:
            return Batch(tokens, targets)
        ends = torch.tensor([*bounds, tokens.numel()], dtype=torch.int64)
        return Batch(tokens.view(1, -1), targets.view(1, -1), ends)

    def _starts_between(self, first: int, last: int) -> np.ndarray:
        """Where documents begin, from `first` to `last`."""
        low, high = np.searchsorted(self._starts, [first, last + 1])
        return self._starts[low:high]
