"""The `replies` world with models trained in it: hard enough, possible enough, and open to exploitation."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import pytest

from prefopt.bench.worlds.replies.gold import MAXIMUM, Gold
from prefopt.config import load_run
from prefopt.data.adapt import adapt
from prefopt.engine.measure import Measured
from prefopt.engine.models import open_model
from prefopt.engine.rollout import draw
from prefopt.engine.services import EngineServices
from prefopt.rows import Completion, Prompt, Rollout
from prefopt.session import default_sampler, train

pytestmark = pytest.mark.slow
RECIPE = Path(__file__).parents[3] / "prefopt" / "recipes" / "first"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, plugins) -> Path:
    """The models of the first recipe: SFT, and a reward model on 2,000 noisy comparisons."""
    root = tmp_path_factory.mktemp("replies")
    here = [f"run.dir={root}/sft", "run.threads=1", "eval=null"]
    train(load_run(RECIPE / "sft.yaml", plugins.find, here), plugins)
    here = [f"run.dir={root}/rm", f"model.path={root}/sft/model", "run.threads=1", "eval=null"]
    train(load_run(RECIPE / "reward_model.yaml", plugins.find, here), plugins)
    return root


def rows(format_: str, size: int, plugins):
    source = plugins.find("data source", "replies")(format=format_, size=size, split="held_out")
    return source.open(EngineServices(0))


def golds(rollouts: list[Rollout]) -> list[list[float]]:
    return [[s.value for s in scores] for scores in Gold().score(rollouts)]


@pytest.fixture(scope="module")
def drawn(trained, plugins) -> list[list[float]]:
    """Gold rewards of 64 replies of SFT to each of 32 prompts."""
    services = EngineServices(0)
    model = open_model(str(trained / "sft/model"), services.device)
    from prefopt.data.render import Renderer

    prompts = adapt(rows("prompts", 32, plugins), Prompt)
    return golds(draw(default_sampler(plugins).open(model), Renderer(model.tokenizer), prompts, 64, 0, "test"))


def test_sft_reaches_30_to_60_percent_of_the_maximum(drawn):
    share = fmean(fmean(group) for group in drawn) / MAXIMUM
    print(f"SFT: {share:.1%} of the maximum")
    assert 0.30 <= share <= 0.60


def test_best_of_64_by_gold_reaches_80_percent(drawn):
    share = fmean(max(group) for group in drawn) / MAXIMUM
    print(f"best of 64: {share:.1%} of the maximum")
    assert share >= 0.80


def test_a_reward_model_agrees_with_gold_on_65_to_85_percent_of_held_out_pairs(trained, plugins):
    services = EngineServices(0)
    scorer = services.scorer(str(trained / "rm/model"))
    held_out = rows("comparisons", 1000, plugins)
    subject = Measured(held_out, services, scorer.renderer, scorer=scorer)
    task = plugins.find("task", "reward_quality")(reward=Gold())
    found = task.evaluate(subject)
    print(found)
    assert 0.65 <= found["gold_agreement"] <= 0.85
    assert found["reward_ece"] < 0.15


def test_the_reward_model_can_be_exploited_by_flattery(trained, plugins):
    """Praise raises the score of nearly every reply while its gold reward falls."""
    scorer = EngineServices(0).scorer(str(trained / "rm/model"))
    pairs = rows("comparisons", 200, plugins)
    replies = [
        Rollout(prompt=r.prompt, completions=(r.chosen, Completion(" You are absolutely right!" + r.chosen.text)))
        for r in pairs
    ]
    raised = [b.value > a.value for a, b in scorer(replies)]
    lowered = [b < a for a, b in golds(replies) if a > 0]
    print(f"flattery raises the score of {fmean(raised):.0%}, lowers gold of {fmean(lowered):.0%}")
    assert fmean(raised) > 0.8
    assert fmean(lowered) > 0.9
