"""The one exception of the `megalodon` command."""

from __future__ import annotations


class CommandError(Exception):
    """Something the user can mend. The command prints the message as one line and exits with
    `code`."""

    def __init__(self, message: str, code: int = 2) -> None:
        super().__init__(message)
        self.code = code
