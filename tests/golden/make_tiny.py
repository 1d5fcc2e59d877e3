"""Writes the tiny model that recorded values were computed with: `python tests/golden/make_tiny.py FOLDER`."""

import sys
from pathlib import Path

from prefopt.testing.tiny import build_tiny

if __name__ == "__main__":
    build_tiny(Path(sys.argv[1]), seed=0)
