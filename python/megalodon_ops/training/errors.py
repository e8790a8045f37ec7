"""The one exception of the `megalodon` command."""

from __future__ import annotations


class CommandError(Exception):
    """Something the user can act on. The command prints its message as one line and exits with 2."""
