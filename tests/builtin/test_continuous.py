"""The sampler with continuous batching against the plain one, against exact probabilities and against the scorer."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from prefopt.api import Completion, DataError, Draw, LanguageModel, Request, Sampler
from prefopt.builtin.continuous import Continuous
from prefopt.builtin.drawing import draw
from prefopt.builtin.samplers import Plain, uniforms
from prefopt.data.render import Tokens
from prefopt.data.streams import derive
from prefopt.engine.forward import Scorer, run
from prefopt.engine.models import Model, open_model
from prefopt.testing.tiny import build_tiny

PROMPTS = [(5, 6, 7), (8,), (9, 10, 11, 12, 13), (5, 6)]
CPU = torch.device("cpu")
CLOSE = 1e-5


@pytest.fixture(scope="module")
def model(tiny_model) -> Model:
    return open_model(str(tiny_model), CPU)


def requests(count: int) -> list[Request]:
    return [Request(PROMPTS[i % len(PROMPTS)], derive("test", i)) for i in range(count)]


def drawn(sampler: Sampler, model: LanguageModel, wanted: list[Request]) -> list[Completion]:
    found = dict(sampler.open(model)(wanted))
    return [found[i] for i in range(len(wanted))]


def probabilities(model: LanguageModel, ids: tuple[int, ...], temperature: float = 1.0) -> torch.Tensor:
    """Of the token behind `ids`, in double precision. [V]"""
    with torch.no_grad():
        logits = model.network(torch.tensor([ids])).logits[0, -1]
    return torch.softmax(logits.double() / temperature, -1)


def close_calls(
    model: LanguageModel, wanted: list[Request], a: list[Completion], b: list[Completion], temperature: float
) -> int:
    """How many texts differ; all of them from a token on whose uniform number lies within 1e-5 of a boundary."""
    count = 0
    for request, x, y in zip(wanted, a, b, strict=True):
        if x.ids == y.ids:
            continue
        place = next(k for k, pair in enumerate(zip(x.ids, y.ids, strict=False)) if len(set(pair)) > 1)
        edges = probabilities(model, request.prompt + x.ids[:place], temperature).cumsum(0)
        assert float((edges - uniforms(request, place + 1)[place]).abs().min()) < CLOSE
        count += 1
    return count


class TwoWords:
    """A model whose second token is the first word with probability `p`, at temperature 1.3."""

    def __init__(self, p: float) -> None:
        self.p = p

    def network(self, ids: torch.Tensor) -> SimpleNamespace:
        p = self.p if ids.tolist() == [[*PROMPTS[0], 1]] else 0.5
        logits = 1.3 * torch.tensor([p, 1 - p], dtype=torch.double).log()
        return SimpleNamespace(logits=logits.expand(1, ids.shape[1], 2))


@pytest.mark.parametrize("away", [-5e-6, 5e-6])
def test_texts_that_part_near_a_boundary_are_counted(away):
    request = Request(PROMPTS[0], derive("test", 0))
    model = TwoWords(uniforms(request, 2)[1] + away)
    one, other = Completion("", ids=(1, 0)), Completion("", ids=(1, 1))
    assert close_calls(model, [request] * 3, [one] * 3, [other, one, other], 1.3) == 2


@pytest.mark.parametrize(("away", "temperature"), [(-5e-5, 1.3), (5e-5, 1.3), (5e-6, 1.0)])
def test_texts_that_part_elsewhere_are_no_close_call(away, temperature):
    """Nor are those at a boundary of another temperature."""
    request = Request(PROMPTS[0], derive("test", 0))
    model = TwoWords(uniforms(request, 2)[1] + away)
    with pytest.raises(AssertionError):
        close_calls(model, [request], [Completion("", ids=(1, 0))], [Completion("", ids=(1, 1))], temperature)


# --- the same text ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def expected(model) -> list[Completion]:
    return drawn(Plain(max_new_tokens=24, temperature=1.3), model, requests(70))


@pytest.mark.parametrize(("slots", "refill"), [(1, True), (7, True), (7, False), (64, True), (64, False)])
def test_the_text_is_that_of_the_plain_sampler_whatever_is_drawn_beside_it(model, expected, slots, refill):
    wanted = requests(70)[: 12 * slots]
    found = drawn(Continuous(max_new_tokens=24, temperature=1.3, slots=slots, refill=refill), model, wanted)
    assert close_calls(model, wanted, found, expected[: len(wanted)], 1.3) <= 1
    assert len({len(c.ids) for c in found}) > 2
    for a, b in zip(found, expected, strict=False):
        if a.ids == b.ids:
            assert (a.text, a.finished) == (b.text, b.finished)
            assert a.logps == pytest.approx(b.logps, abs=1e-5)


class Counted:
    """A model whose arenas count what they read."""

    def __init__(self, model: Model) -> None:
        self.model, self.read, self.copied, self.steps = model, 0, 0, 0

    def __getattr__(self, name: str):
        return getattr(self.model, name)

    def arena(self, *sizes: int):
        inner, counts = self.model.arena(*sizes), self

        class Arena:
            def read(self, prompts, slots):
                counts.read += len(prompts)
                inner.read(prompts, slots)

            def copy(self, source, targets, length):
                counts.copied += len(targets)
                inner.copy(source, targets, length)

            def advance(self, tokens, positions, width):
                counts.steps += 1
                return inner.advance(tokens, positions, width)

        return Arena()


def test_completions_are_handed_out_as_they_end(model):
    counted = Counted(model)
    drawer = Continuous(max_new_tokens=24, temperature=1.3, slots=8).open(counted)
    steps = [(counted.steps, i) for i, _ in drawer(requests(30))]
    assert sorted(i for _, i in steps) == list(range(30))
    assert len({step for step, _ in steps}) > 10
    assert list(drawer([])) == []


# --- distributions ----------------------------------------------------------------------------------------------------


def exact(p: torch.Tensor, **filters: float) -> torch.Tensor:
    """What is left of one distribution, in double precision, word by word from the best one down."""
    ranked = sorted(range(len(p)), key=lambda i: -float(p[i]))
    kept = ranked[: int(filters.get("top_k", len(ranked)))]
    left, before, nucleus = sum(float(p[i]) for i in kept), 0.0, []
    for i in kept:
        if before < filters.get("top_p", 1.0) * left:
            nucleus.append(i)
        before += float(p[i])
    kept = [i for i in nucleus if float(p[i]) >= filters.get("min_p", 0.0) * float(p[ranked[0]])]
    found = torch.zeros_like(p)
    found[kept] = p[kept] / p[kept].sum()
    return found


FILTERS = [
    {"temperature": 0.7},
    {"top_k": 5},
    {"top_p": 0.6},
    {"min_p": 0.3},
    {"top_k": 20, "top_p": 0.8, "min_p": 0.1},
]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_a_hundred_thousand_draws_follow_the_filtered_distribution(filters):
    """And not the one whose filter keeps one word more or less, nor the next temperature."""
    sampler, draws = Continuous(**filters), 100_000
    logits = torch.randn(1, 97, generator=torch.Generator().manual_seed(1)) * 2
    p = sampler.distribution([logits], 0.0).expand(draws, -1)
    u = torch.from_numpy(np.random.Generator(np.random.Philox(key=7)).random(draws))
    tokens, logps = draw(p, u)
    counts = torch.bincount(tokens, minlength=97).double()
    full = torch.softmax(logits[0].double() / filters.get("temperature", 1.0), -1)
    expected = exact(full, **filters)
    assert fits(counts, expected) > 0.001
    assert torch.allclose(logps, expected.log()[tokens].to(logps), atol=1e-5)
    kept = int((expected > 0).sum())
    for wrong in (exact(full, top_k=kept - 1), exact(full, top_k=kept + 1)) if kept < 97 else (counts.roll(1) / draws,):
        assert fits(counts, wrong) < 1e-9


def fits(counts: torch.Tensor, p: torch.Tensor) -> float:
    """The chi-squared test's probability of counts so far from `p`; 0 where a word was drawn that has none."""
    if bool((counts[p == 0] > 0).any()):
        return 0.0
    some = p > 0
    return float(chisquare(counts[some].numpy(), (p[some] / p[some].sum() * counts.sum()).numpy()).pvalue)


def test_the_first_token_of_a_model_follows_its_filtered_distribution(model):
    wanted = [Request((5, 6, 7), derive(i)) for i in range(4000)]
    found = drawn(Continuous(max_new_tokens=1, slots=500, top_k=12, temperature=0.8), model, wanted)
    counts = torch.bincount(torch.tensor([c.ids[0] for c in found]), minlength=len(probabilities(model, (5,)))).double()
    expected = exact(probabilities(model, (5, 6, 7), 0.8), top_k=12)
    assert fits(counts, expected) > 0.001
    assert all(c.logps[0] == pytest.approx(float(expected[c.ids[0]].log()), abs=1e-5) for c in found[:500])


@pytest.mark.parametrize("words", [3, 255, 256, 257, 1000])
def test_a_token_is_the_inverse_of_the_cumulative_distribution_for_every_vocabulary(words):
    """Against one sum over all words in double precision; no word without probability is drawn, even at the ends."""
    p = torch.rand(400, words, generator=torch.Generator().manual_seed(words))
    p[:, 0], p[:, -1] = 0, 0
    u = torch.rand(400, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    u[0], u[1] = 0, 1 - 2**-53
    tokens, _ = draw(p, u)
    edges = p.double().cumsum(-1)
    expected = torch.searchsorted(edges, (u * edges[:, -1])[:, None], right=True)[:, 0]
    differ = tokens != expected.clamp(max=words - 2)
    assert (edges / edges[:, -1:] - u[:, None]).abs().amin(-1)[differ].le(1e-6).all()
    assert int(differ.sum()) <= 2
    assert bool((p.gather(1, tokens[:, None]) > 0).all())


def test_log_probabilities_are_those_of_the_scorer(model):
    found = drawn(Continuous(max_new_tokens=12, temperature=0.7), model, requests(40))
    tokens = [Tokens(r.prompt, c.ids) for r, c in zip(requests(40), found, strict=True)]
    scored = run(Scorer(model.network), tokens, ("logps",), CPU, temperature=0.7)["logps"]
    for row, completion in zip(scored.tolist(), found, strict=True):
        assert row[: len(completion.ids)] == pytest.approx(completion.logps, abs=1e-5)


def test_there_is_a_density_without_filters_alone():
    assert Continuous(temperature=0.7, stop=("a",)).density == 0.7
    for off in ({"greedy": True}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}, {"min_new_tokens": 2}):
        assert Continuous(**off).density is None


# --- requests ---------------------------------------------------------------------------------------------------------


def test_greedy_equals_the_plain_sampler_and_one_request_may_be_greedy(model):
    greedy = [Request(prompt, 0) for prompt in PROMPTS]
    expected = drawn(Plain(max_new_tokens=10, greedy=True), model, greedy)
    assert [c.ids for c in drawn(Continuous(max_new_tokens=10, greedy=True), model, greedy)] == [
        c.ids for c in expected
    ]
    mixed = [*requests(4), Request(PROMPTS[0], 0, greedy=True)]
    found = drawn(Continuous(max_new_tokens=10), model, mixed)
    assert found[-1].ids == expected[0].ids
    assert [c.ids for c in found[:4]] == [c.ids for c in drawn(Plain(max_new_tokens=10), model, mixed[:4])]


def test_a_mixture_is_that_of_the_plain_sampler(model, tmp_path):
    build_tiny(tmp_path / "other", seed=5)
    other = open_model(str(tmp_path / "other"), CPU)
    plain, own = (
        dict(kind(max_new_tokens=8, temperature=0.7).open(model, other, 0.25)(requests(40)))
        for kind in (Plain, Continuous)
    )
    assert sum(plain[i].ids != own[i].ids for i in range(40)) <= 1
    for i in range(40):
        if plain[i].ids == own[i].ids:
            assert own[i].logps == pytest.approx(plain[i].logps, abs=1e-5)
    assert Continuous().serves(Draw(source="mixture", mix=0.25))


def test_no_end_is_drawn_before_the_minimum_length(model):
    end = next(iter(model.end_ids))
    free = drawn(Continuous(max_new_tokens=24, temperature=1.5), model, requests(60))
    found = drawn(Continuous(max_new_tokens=24, temperature=1.5, min_new_tokens=16), model, requests(60))
    assert min(len(c.ids) for c in free) < 16
    assert all(end not in c.ids[:16] for c in found)
    assert any(c.finished for c in found)
    soon = drawn(Continuous(max_new_tokens=3, temperature=1.5, min_new_tokens=2), model, requests(2000))
    assert any(c.ids[2:] == (end,) for c in soon)
    first = probabilities(model, PROMPTS[0], 1.5)
    first[end] = 0
    assert found[0].logps[0] == pytest.approx(float((first / first.sum()).log()[found[0].ids[0]]), abs=1e-5)


def test_a_stop_string_ends_a_completion_and_its_text_ends_before_it(model):
    whole = drawn(Continuous(max_new_tokens=30, temperature=1.5), model, requests(60))
    stop = whole[0].text[3:5]
    found = drawn(Continuous(max_new_tokens=30, temperature=1.5, stop=(stop, "never this")), model, requests(60))
    assert (found[0].text, found[0].finished) == (whole[0].text[: whole[0].text.index(stop)], True)
    assert model.decode(found[0].ids).endswith(stop)
    for a, b in zip(found, whole, strict=True):
        assert a.ids == b.ids[: len(a.ids)]
        assert (stop in b.text) == (a.ids != b.ids or b.text.endswith(stop))
        assert stop not in a.text


@pytest.mark.parametrize("shape", [{"model_type": "gpt2"}, {"model_type": "llama"}])
def test_a_completion_stops_where_the_model_can_read_no_further(tmp_path, shape):
    build_tiny(tmp_path / "short", max_position_embeddings=16, **shape)
    short = open_model(str(tmp_path / "short"), CPU)
    found = drawn(Continuous(max_new_tokens=40, slots=3), short, requests(16))
    lengths = [len(r.prompt) + len(c.ids) for r, c in zip(requests(16), found, strict=True)]
    assert max(lengths) == 16
    assert all(size == 16 for size, c in zip(lengths, found, strict=True) if not c.finished)
    with pytest.raises(DataError, match="a prompt has 16 tokens, and the model can read 16"):
        drawn(Continuous(), short, [Request((5,) * 16, 0)])


def test_each_prompt_is_read_once_and_slots_do_not_wait(model):
    prompts = [(5, 6, 7, 8), (9, 10, 11), (12, 13)]
    wanted = [Request(prompt, derive("n", i)) for i in range(6) for prompt in prompts]
    for refill in (True, False):
        counted = Counted(model)
        found = drawn(Continuous(max_new_tokens=40, temperature=1.5, slots=4, refill=refill), counted, wanted)
        tokens = sum(len(c.ids) for c in found)
        assert counted.read == 3
        if refill:
            assert counted.steps < 1.4 * max(tokens / 4, max(len(c.ids) for c in found))
            fast = counted.steps
    assert fast < counted.steps
