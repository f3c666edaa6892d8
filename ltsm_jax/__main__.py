"""`python -m ltsm_jax` is the command `ltsm`."""

import sys

from ltsm_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
