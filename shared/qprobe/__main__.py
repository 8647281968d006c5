"""`python -m qprobe` is the command `qprobe`."""

import sys

from qprobe.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
