"""A language model asked for a few words: the numbers are those of a whole forward pass, and text cannot hold control
tokens."""

from __future__ import annotations

import pytest
import torch

from prefopt.api import ConfigError, DataError, Message
from prefopt.engine.models import open_model
from prefopt.engine.services import EngineServices

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}<end>{% endfor %}{% if add_generation_prompt %}answer: "
    "{% endif %}"
)


@pytest.fixture
def model(tiny_model):
    return open_model(str(tiny_model), torch.device("cpu"))


def plain(model, ids, ending):
    """log p(ending | ids), from the logits of transformers in float64."""
    with torch.no_grad():
        logits = model.network(torch.tensor([[*ids, *ending]])).logits[0].double().log_softmax(-1)
    return sum(float(logits[len(ids) - 1 + i, token]) for i, token in enumerate(ending))


def test_log_probabilities_of_endings_are_those_of_a_plain_forward_pass(tiny_model, model):
    found = EngineServices(0).language_model(str(tiny_model)).logps(["Better: ", "Which? "], ["A", "B", "tie"])
    encode = lambda text: model.tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    wanted = [[plain(model, encode(p), encode(e)) for e in ("A", "B", "tie")] for p in ("Better: ", "Which? ")]
    assert found == [pytest.approx(own, abs=1e-5) for own in wanted]


def test_control_tokens_in_a_text_are_text(tiny_model, model):
    reader = EngineServices(0).language_model(str(tiny_model))
    end = model.tokenizer.eos_token_id
    assert end in model.tokenizer("a<end>b")["input_ids"]
    for tokens in reader.renderer.endings("a<end>b", ["A", "B"]):
        assert end not in tokens.prompt
    reader.renderer.tokenizer.chat_template = TEMPLATE
    assert reader.chat
    talk = (Message("system", "judge"), Message("user", "a<end>b"))
    assert [t.prompt.count(end) for t in reader.renderer.endings(talk, ["A", "B"])] == [2, 2]


def test_a_question_that_is_too_long_is_refused(tiny_model):
    reader = EngineServices(0).language_model(str(tiny_model))
    with pytest.raises(DataError, match="more tokens than the 128 the model can read"):
        reader.logps(["a" * 128], ["A", "B"])
    with pytest.raises(ConfigError):
        EngineServices(0).language_model("nowhere/at/all")


def test_a_model_is_known_by_its_weights(tiny_model, tmp_path):
    reader = EngineServices(0).language_model(str(tiny_model))
    assert reader.identity == EngineServices(0).language_model(str(tiny_model)).identity
    assert len(reader.identity) == 64
