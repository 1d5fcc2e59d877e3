"""The reviser that asks a model: what it asks, and what it does with answers that cannot be used."""

from __future__ import annotations

import pytest

from prefopt.api import Completion, Draft, Message, Principle
from prefopt.builtin.revisers import ModelReviser

PRINCIPLE = Principle(id="p", critique="Is it rude?", revise="Be polite.")


class Services:
    """Services with a model that gives prepared answers."""

    def __init__(self, chat, *answers):
        self.chat, self.answers, self.asked, self.keys = chat, list(answers), [], []

    def writer(self, path):
        assert path is None
        return self

    def __call__(self, prompts, keys):
        self.asked += prompts
        self.keys += keys
        return [self.answers.pop(0) for _ in prompts]


def revised(services, reply=" Go away.", drafts=1):
    told = [Draft("Hi?", reply, PRINCIPLE, f"{i} 0") for i in range(drafts)]
    return ModelReviser().open(services)(told)


def test_a_chat_model_reads_two_messages():
    services = Services(True, Completion("It is\n\nrude. "), Completion("Good day."))
    (found,) = revised(services)
    assert (found.critique, found.reply) == ("It is\n\nrude.", " Good day.")
    first, second = (message.content for (message,) in services.asked)
    assert services.asked[0] == (Message("user", first),)
    assert "Prompt:\nHi?\n\nReply:\nGo away.\n\nCritique request: Is it rude?" in first
    assert second.startswith(first)
    assert "Critique: It is\n\nrude.\n\nRevision request: Be polite." in second
    assert services.keys == ["0 0 critique", "0 0 revision"]


def test_a_base_model_goes_on_with_the_text_up_to_an_empty_line():
    services = Services(False, Completion(" Rude.\n\nRevision"), Completion(" Hello.\n\nPrompt: x", finished=False))
    (found,) = revised(services)
    assert (found.critique, found.reply) == ("Rude.", " Hello.")
    assert services.asked[0].endswith("\n\nCritique:")
    assert services.asked[1].endswith("\n\nRevision:")


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ([None], "the question leaves no room for an answer"),
        ([Completion("It", finished=False)], "the answer was cut short"),
        ([Completion("Rude."), Completion("Hel", finished=False)], "the answer was cut short"),
        ([Completion("Rude."), None], "no room"),
    ],
)
def test_what_cannot_be_used_is_missing(answers, reason):
    (found,) = revised(Services(True, *answers))
    assert found.reply is None
    assert reason in found.reason


def test_one_without_a_critique_is_not_revised_and_the_others_are():
    services = Services(True, Completion(" "), Completion("Rude."), Completion("Hello."))
    first, second = revised(services, drafts=2)
    assert (first.reply, second.reply) == (None, " Hello.")
    assert services.keys == ["0 0 critique", "1 0 critique", "1 0 revision"]
