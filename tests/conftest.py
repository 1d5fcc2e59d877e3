"""Shared fixtures. Tests use real components, small models and temporary folders; nothing reaches the network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefopt.config import RunConfig, run_from
from prefopt.config.yaml import parse
from prefopt.plugins import Plugins, load

TOGETHER = ("tests/test_wheels.py", "bench/test_suite.py", "invariance/test_ranks.py")
"""Files whose tests share something costly: one process runs them all."""
FIRST = (*TOGETHER, "test_commands_run_as_written")
"""What begins before the many short ones, so that no process is left with it at the end."""


def pytest_xdist_make_scheduler(config: Any, log: Any) -> Any:
    """Tests one by one to whichever process is free, but those of `TOGETHER` file by file, and all that take a method
    through the engine to one: they share its assembled run, and two processes."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return file if file.endswith(TOGETHER) else "engine" if "-engine_" in nodeid else nodeid

    return Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`FIRST`, in that order."""
    items.sort(key=lambda item: next((i for i, name in enumerate(FIRST) if name in item.nodeid), len(FIRST)))


@pytest.fixture(scope="session")
def plugins() -> Plugins:
    """Everything installed, without the progress display."""
    found = load()
    found.manager.unregister(name="prefopt:progress")
    return found


@pytest.fixture
def run_config(plugins: Plugins) -> Callable[[str], RunConfig]:
    """A run configuration from YAML text."""
    return lambda text: run_from(parse(text, "run.yaml"), plugins.find)


@pytest.fixture
def shared() -> Path:
    """The folder of real data and models; tests that need it skip where it is not."""
    import os

    root = Path(os.environ.get("PREFOPT_DATA", Path(__file__).parents[2] / "shared"))
    if not root.is_dir():
        pytest.skip(f"no real data at {root}; set PREFOPT_DATA")
    return root


@pytest.fixture
def install_plugin() -> Callable[..., None]:
    """Leaves a distribution with one module and one entry point in a folder, as an installer would."""

    def install(root: Path, name: str, code: str, version: str = "0.1") -> None:
        module = "made_" + name.replace("-", "_")
        (root / f"{module}.py").write_text(code)
        info = root / f"{module}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: made-{name}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[prefopt]\n{name} = {module}\n")

    return install
