from __future__ import annotations

from collections import Counter

import pytest
import torch
from scipy.stats import chisquare

from prefopt.api import Completion, DataError, Draw, LanguageModel, Request, Sampler
from prefopt.builtin.samplers import Plain
from prefopt.data.render import Tokens
from prefopt.data.streams import derive
from prefopt.engine.forward import Scorer, run
from prefopt.engine.models import open_model
from prefopt.testing.tiny import build_tiny

PROMPTS = [(5, 6, 7), (8,), (9, 10, 11, 12, 13), (5, 6)]


@pytest.fixture(scope="module")
def model(tiny_model):
    return open_model(str(tiny_model), torch.device("cpu"))


def requests(count: int) -> list[Request]:
    return [Request(PROMPTS[i % len(PROMPTS)], derive("test", i)) for i in range(count)]


def drawn(sampler: Sampler, model: LanguageModel, wanted: list[Request]) -> list[Completion]:
    found = dict(sampler.open(model)(wanted))
    return [found[i] for i in range(len(wanted))]


def test_the_first_token_follows_the_model_s_distribution(model):
    draws = 20_000
    found = drawn(Plain(max_new_tokens=1, batch=5000), model, [Request((5, 6, 7), derive(i)) for i in range(draws)])
    with torch.no_grad():
        p = torch.softmax(model.network(torch.tensor([[5, 6, 7]])).logits[0, -1].double(), -1)
    counts = Counter(c.ids[0] for c in found)
    observed = [counts[i] for i in range(len(p))]
    assert chisquare(observed, (p * draws / p.sum()).numpy() * sum(observed) / draws).pvalue > 0.001
    shifted = [counts[(i + 1) % len(p)] for i in range(len(p))]
    assert chisquare(shifted, (p * draws).numpy() * sum(shifted) / draws).pvalue < 1e-9  # an off-by-one is seen


def test_reported_log_probabilities_are_those_of_the_scorer(model):
    found = drawn(Plain(max_new_tokens=12), model, requests(8))
    tokens = [Tokens(r.prompt, c.ids) for r, c in zip(requests(8), found, strict=True)]
    scored = run(Scorer(model.network), tokens, ("logps",), torch.device("cpu"))["logps"]
    for row, completion in zip(scored.tolist(), found, strict=True):
        assert row[: len(completion.ids)] == pytest.approx(completion.logps, abs=1e-5)


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_the_same_key_gives_the_same_text_whatever_is_drawn_beside_it(model, batch):
    expected = drawn(Plain(max_new_tokens=16, batch=7), model, requests(12))
    found = drawn(Plain(max_new_tokens=16, batch=batch), model, requests(12))
    assert [c.ids for c in found] == [c.ids for c in expected]
    assert len({c.ids for c in expected}) > 8


def test_greedy_equals_transformers_generate(model):
    for prompt in PROMPTS:
        (found,) = drawn(Plain(max_new_tokens=10, greedy=True), model, [Request(prompt, 0)])
        ids = torch.tensor([prompt])
        expected = model.network.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False)
        assert list(found.ids) == expected[0, len(prompt) :].tolist()


def test_a_completion_ends_with_its_end_token_or_is_unfinished(model):
    found = drawn(Plain(max_new_tokens=40, temperature=1.5), model, requests(64))
    (end,) = model.end_ids
    ended = [c for c in found if c.finished]
    cut = [c for c in found if not c.finished]
    assert ended
    assert cut
    assert all(c.ids[-1] == end and end not in c.ids[:-1] for c in ended)
    assert all(len(c.ids) == 40 and end not in c.ids for c in cut)
    assert all(c.text == model.decode([i for i in c.ids if i != end]) for c in found)
    assert len({len(c.ids) for c in ended}) > 3


@pytest.mark.parametrize("shape", [{"model_type": "gpt2"}, {"model_type": "llama"}])
def test_a_completion_stops_where_the_model_can_read_no_further(tmp_path, shape):
    build_tiny(tmp_path / "short", max_position_embeddings=16, **shape)
    short = open_model(str(tmp_path / "short"), torch.device("cpu"))
    assert short.positions == 16
    found = drawn(Plain(max_new_tokens=40), short, requests(16))
    lengths = [len(r.prompt) + len(c.ids) for r, c in zip(requests(16), found, strict=True)]
    assert max(lengths) == 16
    assert all(size == 16 for size, c in zip(lengths, found, strict=True) if not c.finished)
    with pytest.raises(DataError, match="a prompt has 16 tokens, and the model can read 16"):
        drawn(Plain(), short, [Request((5,) * 16, 0)])


def test_temperature_sharpens(model):
    def mean_logp(temperature: float) -> float:
        found = drawn(Plain(max_new_tokens=8, temperature=temperature), model, requests(64))
        tokens = [Tokens(r.prompt, c.ids) for r, c in zip(requests(64), found, strict=True)]
        scored = run(Scorer(model.network), tokens, ("logps",), torch.device("cpu"))["logps"]
        return scored.sum().item() / sum(len(c.ids) for c in found)

    assert mean_logp(0.3) > mean_logp(1.0) + 0.1


def test_a_greedy_request_among_others_takes_the_most_probable_tokens(model):
    mixed = [*requests(4), Request(PROMPTS[0], 0, greedy=True)]
    found = drawn(Plain(max_new_tokens=10), model, mixed)
    assert [found[-1].ids] == [c.ids for c in drawn(Plain(max_new_tokens=10, greedy=True), model, mixed[-1:])]
    assert [c.ids for c in found[:4]] == [c.ids for c in drawn(Plain(max_new_tokens=10), model, mixed[:4])]


def test_a_mixture_is_the_normalised_product_of_powers(model, tmp_path):
    build_tiny(tmp_path / "other", seed=5)
    other = open_model(str(tmp_path / "other"), torch.device("cpu"))
    drawer = Plain(max_new_tokens=1, batch=500, temperature=0.7).open(model, other, 0.25)
    found = [c for _, c in sorted(drawer(requests(500)), key=lambda pair: pair[0])]
    with torch.no_grad():
        p, q = (
            torch.softmax(m.network(torch.tensor([[5, 6]])).logits[0, -1].double() / 0.7, -1) for m in (model, other)
        )
    product = p**0.75 * q**0.25
    expected = (product / product.sum()).log()
    seen = {c.ids[0]: c.logps[0] for i, c in enumerate(found) if PROMPTS[i % 4] == (5, 6)}
    assert seen == pytest.approx({token: float(expected[token]) for token in seen}, abs=1e-5)
    assert Plain().serves(Draw(source="mixture", mix=0.25))
