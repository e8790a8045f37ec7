"""`python -m megalodon_ops` is the `megalodon` command."""

import sys

from megalodon_ops.cli import main

if __name__ == "__main__":
    sys.exit(main())
