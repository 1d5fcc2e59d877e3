"""The loader, on plugins made for it: each loads alone, a bad one is kept with its reason and hurts nobody."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from prefopt import plugins
from prefopt.errors import PluginError
from prefopt.plugins import load


def good(name: str) -> str:
    """A plugin with one method that has no loss."""
    return f"""
from prefopt.api import Algorithm, Comparison, Needs, hookimpl
class Good(Algorithm):
    name, eats = "{name}", Comparison
@hookimpl
def prefopt_algorithms():
    return [Good]
"""


BAD = {
    "no-module": "import a_module_that_is_not_there",
    "syntax": "def (",
    "exits": "import sys; sys.exit(3)",
    "misspelt": "from prefopt.api import hookimpl\n@hookimpl\ndef prefopt_algoritms(): return []",
    "no-hook": "x = 1",
    "no-mark": "def prefopt_algorithms(): return []",
    "signature": "from prefopt.api import hookimpl\n@hookimpl\ndef prefopt_algorithms(extra): return []",
    "not-a-class": "from prefopt.api import hookimpl\n@hookimpl\ndef prefopt_algorithms(): return [3]",
    "wrong-kind": good("x").replace("prefopt_algorithms", "prefopt_rewards"),
    "no-name": good(""),
    "bad-name": good("a b"),
    "raises": "from prefopt.api import hookimpl\n@hookimpl\ndef prefopt_algorithms(): raise RuntimeError('no')",
    "bad-needs": "raise ValueError('at import')",
    "bad-field": good("x").replace("Comparison\n@", "Comparison\n    field: open\n@"),
    "returns-none": "from prefopt.api import hookimpl\n@hookimpl\ndef prefopt_algorithms(): return 5",
}


@pytest.fixture
def site(tmp_path, monkeypatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_a_good_plugin_is_found_with_its_owner(site, install_plugin):
    install_plugin(site, "good", good("good"), "1.2")
    entry = load().registry.find("algorithm", "good")
    assert (entry.distribution, entry.version) == ("made-good", "1.2")


@pytest.mark.parametrize("name", BAD)
def test_a_bad_plugin_is_kept_with_its_reason_and_hurts_nobody(site, install_plugin, name):
    install_plugin(site, name, BAD[name])
    install_plugin(site, "good", good("good"))
    registry = load().registry
    assert [b.distribution for b in registry.broken] == [f"made-{name}"]
    assert registry.broken[0].reason
    assert "good" in registry.names("algorithm")
    assert "dpo" in registry.names("algorithm")


def test_nothing_of_a_half_good_plugin_stays(site, install_plugin):
    code = good("half") + "\n@hookimpl\ndef prefopt_rewards():\n    return [3]\n"
    install_plugin(site, "half", code)
    assert "half" not in load().registry.names("algorithm")


def test_what_is_not_loaded_whole_is_asked_when_a_kind_is_looked_up(site, install_plugin):
    hook = "asked = []\n@hookimpl\ndef prefopt_rewards():\n    asked.append(1)\n    raise RuntimeError('no scale')\n"
    install_plugin(site, "late", good("late") + hook)
    registry = load(whole=False).registry
    assert registry.find("algorithm", "late").distribution == "made-late"
    asked = sys.modules["made_late"].asked
    assert (asked, registry.broken) == ([], [])
    with pytest.raises(PluginError, match="RuntimeError: no scale"):
        registry.find("reward", "late")
    assert (registry.names("reward"), asked) == (load().registry.names("reward"), [1, 1])


def test_a_misspelt_hook_is_named(site, install_plugin):
    install_plugin(site, "misspelt", BAD["misspelt"])
    assert "prefopt_algoritms" in load().registry.broken[0].reason


def test_two_entry_points_to_one_module_load_it_once(site, install_plugin):
    install_plugin(site, "good", good("good"))
    points = next(site.glob("*.dist-info")) / "entry_points.txt"
    points.write_text(points.read_text() + "twice = made_good\n")
    registry = load().registry
    assert len(registry.entries["algorithm", "good"]) == 1
    assert [b.reason for b in registry.broken] == ["ValueError: `made_good` is loaded already, as `made-good:good`"]


def test_distributions_are_named_as_installers_compare_names(site, install_plugin, monkeypatch):
    monkeypatch.setenv("PREFOPT_PLUGINS", "Prefopt_DPO")
    found = load().registry
    assert "dpo" in found.names("algorithm")
    assert found.find("algorithm", "prefopt.dpo:dpo").distribution == "prefopt-dpo"


def test_lists_of_allowed_plugins_limit_what_is_imported(site, install_plugin, monkeypatch):
    (site / "trace").write_text("")
    install_plugin(site, "spy", f"open({str(site / 'trace')!r}, 'a').write('x')\n" + good("spy"))
    install_plugin(site, "good", good("good"))
    found = load(allow=["made-good"]).registry
    assert {"good", "sft"} <= set(found.names("algorithm"))
    assert {"made-spy", "prefopt-dpo"} <= set(found.hidden)
    monkeypatch.setenv("PREFOPT_PLUGINS", "made-spy, prefopt-dpo")
    assert "dpo" not in load(allow=["made-spy"]).registry.names("algorithm")
    monkeypatch.setenv("PREFOPT_PLUGINS", "")
    assert load().registry.names("algorithm") == ["dft", "reward_model", "reward_model_listwise", "sft"]
    assert (site / "trace").read_text() == "x"  # imported once, when it was allowed


def test_an_observer_that_fails_is_reported_and_the_others_still_hear(site, install_plugin):
    code = (
        "from prefopt.api import hookimpl\nheard = []\n@hookimpl\ndef prefopt_step_finished(step, metrics):\n    {}\n"
    )
    install_plugin(site, "broken-observer", code.format("raise RuntimeError('tracker down')"))
    install_plugin(site, "observer", code.format("heard.append((step, dict(metrics)))"))
    found, failures = load(), []
    found.manager.unregister(name="prefopt:progress")
    found.notify(
        "prefopt_step_finished", lambda name, e: failures.append((name, str(e))), run=None, step=3, metrics={"a": 1.0}
    )
    assert failures == [("made-broken-observer:broken-observer", "tracker down")]
    assert sys.modules["made_observer"].heard == [(3, {"a": 1.0})]


def test_first_party_plugins_are_listed_and_validated_without_torch(tmp_path):
    """In a process that cannot import torch at all."""
    data = tmp_path / "pairs.jsonl"
    data.write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n')
    config = tmp_path / "run.yaml"
    config.write_text(f"""
prefopt: 1
model: {{path: "world:replies"}}
data: {{source: jsonl, path: {data}}}
algorithm: {{name: dpo}}
run: {{dir: {tmp_path}/run}}
""")
    code = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in ('torch', 'transformers', 'accelerate', 'datasets'):
            raise ImportError('blocked: ' + name)
sys.meta_path.insert(0, Block())
from prefopt.cli import main
sys.argv = ['prefopt', *sys.argv[1:]]
main()
"""
    for arguments in (["plugins", "list", "--all"], ["validate", str(config)], ["schema"], ["explain", "dpo"]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert "Direct Preference Optimization" in done.stdout


def test_the_core_declares_its_own_components_through_entry_points():
    names = {(e.group, e.value) for e in plugins.entry_points(group="prefopt") if e.dist.name == "prefopt"}
    assert ("prefopt", "prefopt.builtin") in names
