"""Measurements of judges: planted biases are found at their size, and the numbers are those of their definitions."""

from __future__ import annotations

from statistics import fmean

import numpy as np
import pytest

from prefopt.api import Comparison, Completion, Judge, Pair, Verdict
from prefopt.bench.judging.evaluate import ask_all
from prefopt.bench.judging.measures import Judged, measured, spent
from prefopt.bench.judging.rank import Meeting, controlled, over_prompts, strengths, won
from prefopt.config.judging import JudgingConfig
from prefopt.making.labels import in_drawn_order
from prefopt.making.work import Clock
from prefopt.stats import bootstrap, calibration_error, wilson


def row(chosen="good reply", rejected="bad", preference=1.0, i=0):
    return Comparison(prompt=f"p{i}", chosen=Completion(chosen), rejected=Completion(rejected), preference=preference)


def rows(n, seed=0):
    """Pairs whose better side is longer as often as shorter."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 200, size=(n, 2))
    return [row("a" * int(a), "b" * int(b), i=i) for i, (a, b) in enumerate(sizes)]


class Planted(Judge):
    """Knows the better side, by its letter; is told how often to go by length or by place instead."""

    name = "planted"
    longer: float = 0.0
    first: float = 0.0

    def compare(self, pairs):
        return [self._verdict(p) for p in pairs]

    def _verdict(self, pair):
        luck = np.random.default_rng([len(pair.a.text) + len(pair.b.text), int(pair.prompt[1:])]).random()
        if luck < self.longer:
            return Verdict(float(len(pair.a.text) > len(pair.b.text)))
        if luck < self.longer + self.first:
            return Verdict(1.0)
        return Verdict(float(pair.a.text.startswith("a")), usage={"calls": 1.0})


def config(**settings):
    from prefopt.builtin.judges import RewardModelJudge

    return JudgingConfig.model_construct(
        **{"judge": RewardModelJudge(path="m"), "both_orders": True, "repeats": 1, "batch": 64, "seed": 0, **settings}
    )


def judged(judge, n=1000, **settings):
    return ask_all(judge.compare, rows(n), config(**settings), lambda line: None)


def within(interval, value):
    return interval.low <= value <= interval.high


def test_a_perfect_judge_is_perfect():
    found = measured(judged(Planted(), 200))
    assert found["accuracy"].mean == found["kappa"].mean == found["order_consistency"].mean == 1.0
    assert found["position_bias"].mean == found["length_bias"].mean == found["brier"].mean == 0.0
    assert found["calibration_error"].mean == found["ties"].mean == 0.0


@pytest.mark.parametrize("share", [0.1, 0.3, 0.6])
def test_a_planted_position_bias_is_found_at_its_size(share):
    found = measured(judged(Planted(first=share)))
    assert within(found["position_bias"], share / 2)
    assert within(found["order_consistency"], 1 - share)
    assert within(found["ties"], share)
    assert within(found["length_bias"], 0.0)
    assert found["position_bias"].high - found["position_bias"].low < 0.05


@pytest.mark.parametrize("share", [0.1, 0.3, 0.6])
def test_a_planted_length_bias_is_found_at_its_size(share):
    """The longer side is the better one in half of the pairs: going by length moves the other half."""
    found = measured(judged(Planted(longer=share)))
    assert within(found["length_bias"], share / 2)
    assert found["position_bias"].mean == pytest.approx(0.0, abs=2e-3)  # sides of one length go by place
    assert within(found["accuracy"], 1 - share / 2)


def test_in_one_order_nothing_is_said_about_position():
    found = measured(judged(Planted(first=0.5), both_orders=False))
    assert "position_bias" not in found
    assert within(found["accuracy"], 0.75)


def test_missing_verdicts_are_left_out_and_counted():
    half = [Judged(row(i=i), Verdict(1.0) if i % 2 else Verdict(None, reason="cut")) for i in range(10)]
    found = measured(half)
    assert found["answered"].mean == 0.5
    assert (found["accuracy"].mean, found["accuracy"].n) == (1.0, 5)
    assert set(measured([Judged(row(), Verdict(None, reason="cut"))])) == {"answered"}


def test_self_consistency_is_agreement_with_itself():
    class Coin(Judge):
        name = "coin"

        def compare(self, pairs):
            return [Verdict(float((int(p.prompt[1:]) + p.draw) % 4 != 0)) for p in pairs]

    found = measured(judged(Coin(), 400, repeats=2, both_orders=False))
    assert "self_consistency" in found
    assert found["self_consistency"].n == 400


def test_kappa_and_calibration_are_those_of_their_definitions():
    rng = np.random.default_rng(1)
    values, labels = rng.uniform(size=300), rng.choice([0.0, 0.5, 1.0], size=300)
    cases = [
        Judged(row(preference=float(y), i=i), Verdict(float(v)))
        for i, (v, y) in enumerate(zip(values, labels, strict=True))
    ]
    found = measured(cases)
    both = [*values, *(1 - values)], [*labels, *(1 - labels)]
    assert found["calibration_error"].mean == pytest.approx(calibration_error(*both))
    assert found["brier"].mean == pytest.approx(fmean((values - labels) ** 2))
    said = np.where(values > 0.5, 2, 0)
    known = np.sign(labels - 0.5).astype(int) + 1
    said, known = np.concatenate([said, 2 - said]), np.concatenate([known, 2 - known])
    agree = float((said == known).mean())
    chance = sum(float((said == k).mean() * (known == k).mean()) for k in range(3))
    assert found["kappa"].mean == pytest.approx((agree - chance) / (1 - chance))


def test_intervals_cover_what_they_should():
    """Over 400 draws, 95 % intervals of both kinds hold the truth in 95 % +- 3."""
    rng = np.random.default_rng(2)
    for make in (lambda x: wilson(float(x.sum()), 80), lambda x: bootstrap(x[:, None], lambda m: m[..., 0], 0, 400)):
        hits = [within(make((rng.uniform(size=80) < 0.7).astype(float)), 0.7) for _ in range(400)]
        assert fmean(hits) == pytest.approx(0.95, abs=0.03)


def test_attacks_and_costs_are_added_up():
    cases = [
        Judged(row(i=i), Verdict(1.0, usage={"calls": 2.0, "canaries": 1.0, "fooled": float(i == 0)})) for i in range(4)
    ]
    assert spent(cases) == {"calls": 8.0, "canaries": 4.0, "fooled": 1.0}
    assert measured(cases)["attack_success"].mean == 0.25


def test_the_drawn_order_depends_on_the_texts_alone():
    seen = []

    def first(pairs):
        seen.extend(p.a.text for p in pairs)
        return [Verdict(1.0) for _ in pairs]

    pairs = [Pair("p", Completion(f"a{i}"), Completion(f"b{i}")) for i in range(400)]
    verdicts = in_drawn_order(first, 0)(pairs)
    assert fmean(v.a_better for v in verdicts) == pytest.approx(0.5, abs=0.1)
    again = in_drawn_order(first, 0)([p.turned() for p in pairs])
    assert seen[:400] != seen[400:]
    assert len(again) == 400


def test_bradley_terry_finds_the_strengths_that_made_the_data():
    truth, rng = np.array([1.0, 0.0, -1.0]), np.random.default_rng(3)
    meetings = []
    for prompt in range(600):
        for a, b in ((0, 1), (0, 2), (1, 2)):
            p = 1 / (1 + np.exp(truth[b] - truth[a]))
            meetings.append(Meeting(prompt, a, b, float(rng.uniform() < p), 0.0))
    found = over_prompts(meetings, lambda w: strengths(meetings, 3, w), 0)
    assert all(within(interval, true) for interval, true in zip(found, truth, strict=True))
    assert sum(interval.mean for interval in found) == pytest.approx(0.0, abs=1e-9)


def test_length_control_takes_out_what_length_alone_does():
    """A judge that goes by length alone, and a system whose replies are longer in most cases."""
    rng = np.random.default_rng(4)
    longer = rng.normal(100, 100, size=2000)
    values = 1 / (1 + np.exp(-2 * np.tanh(longer / longer.std())))
    meetings = [Meeting(i, 0, 1, float(v), float(x)) for i, (v, x) in enumerate(zip(values, longer, strict=True))]
    ones = np.ones(len(meetings))
    assert won(meetings, ones) > 0.65
    assert controlled(meetings, ones) == pytest.approx(0.5, abs=1e-3)


def test_the_rest_of_the_time_is_said_at_most_once_a_second():
    times, said = iter([0.0, 0.5, 2.0, 2.5, 4.0]), []
    clock = Clock(8, "rows", said.append, lambda: next(times))
    for done in (1, 4, 5, 8):
        clock.tick(done)
    assert said == ["4 of 8 rows, about 2 s left", "8 of 8 rows in 4 s"]
