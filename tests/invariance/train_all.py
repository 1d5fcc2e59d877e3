"""Trains several configurations in one process of a distributed launch: `torchrun ... train_all.py RUN.YAML...`."""

import sys
from pathlib import Path

from prefopt.config import load_run
from prefopt.plugins import load
from prefopt.session import train

if __name__ == "__main__":
    plugins = load()
    plugins.manager.unregister(name="prefopt:progress")
    for path in sys.argv[1:]:
        train(load_run(Path(path), plugins.find), plugins)
