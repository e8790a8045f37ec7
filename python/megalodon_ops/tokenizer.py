"""Text to tokens and back: bytes, a `tokenizers` file (tokenizer.json), or a SentencePiece model.

All are streamed: a text of any length is encoded in constant memory, and every token stands for
certain bytes, whatever is beside it, so that text can be printed, and stop sequences found, one
token at a time.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

# Longest part of a text that is encoded at once; it ends after a line break where there is one.
SEGMENT = 1 << 14

_ESCAPED = re.compile("([\udc80-\udcff]+)")
_SPACE = "\u2581"  # how SentencePiece writes a space
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


class Tokenizer:
    """Bytes: token i is byte i. The other tokenizers are subclasses.

    Attributes:
        vocab_size: V, the number of tokens.
        file_name: the name under which a run keeps its file; empty for bytes.
        data: that file's contents.
    """

    vocab_size = 256
    file_name = ""
    data = b""

    def encode(self, text: bytes) -> list[int]:
        """The tokens of a text by itself. Not UTF-8: those bytes become tokens of a byte each.

        Raises:
            ValueError: the tokenizer has no token for such a byte.
        """
        return list(text)

    def stream(self, pieces: Iterable[bytes]) -> Iterator[Sequence[int]]:
        """Tokens of the pieces end to end, as soon as they are sure; the same for any pieces."""
        for piece in pieces:
            if piece:
                yield piece

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for; none for a token beyond the vocabulary."""
        return bytes([token]) if token < 256 else b""

    def decode(self, tokens: Iterable[int]) -> bytes:
        """The bytes of these tokens; they may end in the middle of a character."""
        return b"".join(map(self.token_bytes, tokens))

    def identity(self) -> dict[str, str] | None:
        """What a checkpoint says of its tokenizer: file name and hash; None for bytes."""
        if not self.file_name:
            return None
        return {"file": self.file_name, "sha256": hashlib.sha256(self.data).hexdigest()}


BYTES = Tokenizer()


class _OfFile(Tokenizer):
    """A tokenizer of text: one that is made from a file, and has a token for some single bytes.

    A text is encoded in segments, which end after the last line break of each 16 KiB, and then
    depend on nothing outside them.
    """

    def __init__(self, data: bytes, file_name: str, pieces: list[bytes], of_byte: dict[int, int]):
        self.data, self.file_name = data, file_name
        self.vocab_size = len(pieces)
        self._pieces = pieces
        self._of_byte = of_byte

    def _encode_text(self, text: str) -> list[int]:
        raise NotImplementedError

    def encode(self, text: bytes) -> list[int]:
        tokens: list[int] = []
        for index, part in enumerate(_ESCAPED.split(text.decode("utf-8", "surrogateescape"))):
            if index % 2 == 0:
                tokens += self._encode_text(part) if part else []
                continue
            for byte in part.encode("utf-8", "surrogateescape"):
                if byte not in self._of_byte:
                    raise ValueError(
                        f"{self.file_name}: the text is not UTF-8, and this tokenizer has no token "
                        f"for the byte {byte:#04x}"
                    )
                tokens.append(self._of_byte[byte])
        return tokens

    def stream(self, pieces: Iterable[bytes]) -> Iterator[Sequence[int]]:
        held = b""
        for piece in pieces:
            held += piece
            while len(held) > SEGMENT:
                cut = _cut(held)
                yield self.encode(held[:cut])
                held = held[cut:]
        if held:
            yield self.encode(held)

    def token_bytes(self, token: int) -> bytes:
        return self._pieces[token] if token < len(self._pieces) else b""


def _cut(text: bytes) -> int:
    """Where the first segment of a longer text ends: after a line break, or before a character."""
    line = text.rfind(b"\n", 0, SEGMENT) + 1
    if line:
        return line
    # Back to a byte that begins a character, at most three; further back it is no UTF-8 anyway.
    for cut in range(SEGMENT, SEGMENT - 4, -1):
        if text[cut] & 0xC0 != 0x80:
            return cut
    return SEGMENT


class _HuggingFace(_OfFile):
    """A tokenizer.json of the `tokenizers` library."""

    def __init__(self, data: bytes) -> None:
        from tokenizers import Tokenizer as Backend

        self._backend = Backend.from_buffer(data)
        self._backend.no_truncation()
        self._backend.no_padding()
        # What looks like a special token in a text is text.
        self._backend.encode_special_tokens = True
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        added = {token.content for token in self._backend.get_added_tokens_decoder().values()}
        pieces = [b""] * (1 + max(vocabulary.values(), default=-1))
        of_piece = _piece_reader(json.loads(data))
        of_byte = {}
        for piece, token in vocabulary.items():
            if piece in added:
                pieces[token] = piece.encode()
                continue
            pieces[token] = of_piece(piece)
            if len(pieces[token]) == 1 and (len(piece) == 1 or _BYTE_PIECE.fullmatch(piece)):
                of_byte[pieces[token][0]] = token
        super().__init__(data, "tokenizer.json", pieces, of_byte)

    def _encode_text(self, text: str) -> list[int]:
        tokens: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return tokens


def _piece_reader(fields: dict[str, Any]) -> Callable[[str], bytes]:
    """How this tokenizer's pieces spell bytes, by its decoder."""
    decoder = fields.get("decoder") or {}
    kinds = {part.get("type") for part in decoder.get("decoders", [decoder])}
    if "ByteLevel" in kinds:
        of_letter = {letter: byte for byte, letter in byte_letters().items()}
        return lambda piece: b"".join(
            bytes([of_letter[c]]) if c in of_letter else c.encode() for c in piece
        )
    if kinds & {"Metaspace", "ByteFallback", "Replace"}:
        return _sentence_piece
    found = ", ".join(sorted(map(str, kinds - {None}))) or "none"
    raise ValueError(
        "decoder: wanted one whose tokens stand for certain bytes (ByteLevel, Metaspace, "
        f"ByteFallback); got {found}"
    )


def _sentence_piece(piece: str) -> bytes:
    byte = _BYTE_PIECE.fullmatch(piece)
    return bytes.fromhex(byte[1]) if byte else piece.replace(_SPACE, " ").encode()


class _SentencePiece(_OfFile):
    """A .model file of SentencePiece."""

    def __init__(self, data: bytes) -> None:
        from sentencepiece import SentencePieceProcessor

        self._backend = SentencePieceProcessor()
        self._backend.LoadFromSerializedProto(data)
        pieces, of_byte = [], {}
        for token in range(self._backend.vocab_size()):
            if self._backend.is_control(token):
                pieces.append(b"")
                continue
            pieces.append(_sentence_piece(self._backend.id_to_piece(token)))
            if self._backend.is_byte(token):
                of_byte[pieces[-1][0]] = token
            elif self._backend.is_unknown(token):
                pieces[-1] = "\ufffd".encode()
        super().__init__(data, "tokenizer.model", pieces, of_byte)

    def _encode_text(self, text: str) -> list[int]:
        tokens: list[int] = self._backend.encode(text, out_type=int)
        return tokens


def byte_letters() -> dict[int, str]:
    """The letter by which byte-level tokenizers write each byte (as GPT-2 does)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    return letters | {byte: chr(256 + i) for i, byte in enumerate(others)}


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a file: JSON is a tokenizer.json, anything else a SentencePiece model.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged, or of a kind whose tokens stand for no certain bytes.
        ImportError: `tokenizers`, or `sentencepiece`, is not installed.
    """
    data = Path(path).read_bytes()
    kind = _HuggingFace if data.lstrip()[:1] == b"{" else _SentencePiece
    try:
        return kind(data)
    except ImportError as error:
        raise ImportError(
            f"{path}: needs {error.name}; pip install 'megalodon-ops[tokenizers]'", name=error.name
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # the libraries raise plain Exception, RuntimeError and others
        wanted = "a tokenizer.json" if kind is _HuggingFace else "a SentencePiece model"
        raise ValueError(f"{path}: not {wanted} that can be used: {error}") from error
