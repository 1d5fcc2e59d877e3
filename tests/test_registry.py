from __future__ import annotations

import pytest

from prefopt.api import Algorithm, Comparison, RewardSource
from prefopt.errors import ConfigError, PluginError
from prefopt.registry import BrokenPlugin, Registry, field_docs


class Alpha(Algorithm):
    """The first method."""

    name, eats = "alpha", Comparison

    beta: float = 0.1
    """How much
    of it."""
    plain: int = 1


class Beta(Alpha):
    name = "beta"

    beta: float = 0.5
    """Another meaning."""


class AlphaReward(RewardSource):
    name = "alpha"


@pytest.fixture
def registry() -> Registry:
    made = Registry()
    made.add(Alpha, "dist-a", "1.0")
    made.add(AlphaReward, "dist-a", "1.0")
    made.add(Beta, "dist-b", "2.0")
    return made


def test_kinds_have_names_of_their_own(registry):
    assert registry.find("algorithm", "alpha").cls is Alpha
    assert registry.find("reward", "alpha").cls is AlphaReward
    assert registry.find("algorithm", "dist-b:beta").version == "2.0"
    assert [e.cls.name for e in registry.all()] == ["alpha", "beta", "alpha"]


def test_an_unknown_name_gets_a_suggestion(registry):
    with pytest.raises(ConfigError, match="unknown algorithm `alpa`") as caught:
        registry.find("algorithm", "alpa")
    assert caught.value.problems[0].fix == "Did you mean `alpha`?"
    with pytest.raises(ConfigError, match="unknown algorithm `dist-b:alpha`"):
        registry.find("algorithm", "dist-b:alpha")


def test_a_clash_names_both_owners_and_either_can_be_chosen(registry):
    registry.add(Beta, "dist-c", "3.0")
    with pytest.raises(PluginError, match="two plugins offer algorithm `beta`") as caught:
        registry.find("algorithm", "beta")
    assert caught.value.problems[0].fix == "Choose one: `dist-b:beta`, `dist-c:beta`."
    assert registry.find("algorithm", "dist-c:beta").version == "3.0"


@pytest.mark.parametrize("name", ["gamma", "my-gamma:gamma", "prefopt-gamma:other"])
def test_a_broken_plugin_behind_a_name_is_fatal_with_its_reason(registry, name):
    registry.broken.append(BrokenPlugin("gamma", "my-gamma", "0.3", "ImportError: no module named x"))
    registry.broken.append(BrokenPlugin("other", "prefopt-gamma", "0.1", "SyntaxError: bad"))
    with pytest.raises(PluginError, match=r"could not be loaded: (my|prefopt)-gamma 0\.\d") as caught:
        registry.find("algorithm", name)
    assert "plugins doctor" in caught.value.problems[0].fix


def test_other_broken_or_forbidden_plugins_are_mentioned_only(registry):
    registry.broken.append(BrokenPlugin("gamma", "my-gamma", "0.3", "ImportError"))
    registry.hidden.append("prefopt-x")
    with pytest.raises(ConfigError) as caught:
        registry.find("algorithm", "zzz")
    fix = caught.value.problems[0].fix
    assert "Not loaded: my-gamma" in fix
    assert "Not allowed to load: prefopt-x." in fix


def test_the_string_under_a_field_is_its_documentation():
    assert field_docs(Alpha) == {"beta": "How much of it."}
    assert field_docs(Beta)["beta"] == "Another meaning."


def test_an_entry_says_where_its_class_stands(registry):
    assert registry.find("algorithm", "alpha").source.startswith(__file__ + ":")


def test_settings_that_make_no_sense_are_met_when_a_component_is_asked_for():
    class Senseless(Algorithm):
        name = "senseless"
        knob: NeverDefined = None  # type: ignore[name-defined]  # noqa: F821

    registry = Registry()
    registry.add(Senseless, "my-senseless", "0.1")
    with pytest.raises(PluginError, match=r"algorithm `senseless` of my-senseless: .*NeverDefined"):
        registry.find("algorithm", "senseless")
