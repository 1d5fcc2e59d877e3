"""A language model on this machine as a judge. Its verdict is the log-probability of each allowed answer: nothing is
written and nothing is parsed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence as List
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from prefopt.api import ConfigError, DataError, Services, TextModel, UserPath
from prefopt_judges.asking import Answer, Ask, LanguageJudge
from prefopt_judges.kept import Replies, request_hash
from prefopt_judges.questions import VERSION, Question

TOGETHER = 32


class Local(LanguageJudge):
    """A Hugging Face model, asked for the probabilities of its answers."""

    name = "local"
    paper = "Answers by log-probability: Lee et al. 2023, arXiv:2309.00267, section 3.1"

    path: UserPath
    """The folder of the model."""
    template: Literal["auto", "chat", "base"] = "auto"
    """How it is asked: through its chat template, as text to go on with, or by whether it has a template."""

    def asker(self, services: Services, replies: Replies) -> Ask:
        """Raises `ConfigError` when there is no model, or no chat template where one is asked for."""
        model = services.language_model(self.path)
        if self.template == "chat" and not model.chat:
            fix = "Write template: base, or name a chat model."
            raise ConfigError(f"`{self.path}` has no chat template", where="local: template", fix=fix)
        return Reading(model, model.chat if self.template == "auto" else self.template == "chat", replies)


@dataclass
class Reading:
    """Asks a model."""

    model: TextModel
    chat: bool
    replies: Replies

    def __call__(self, questions: List[Question]) -> list[Answer]:
        """A few at a time: what was answered is kept when the rest is cut short."""
        found: list[Answer] = []
        for start in range(0, len(questions), TOGETHER):
            found += self._some(questions[start : start + TOGETHER])
        return found

    def _some(self, questions: List[Question]) -> list[Answer]:
        names = [self._name(question) for question in questions]
        known = {name: reply for name in names if (reply := self.replies.get(name)) is not None}
        new = {name: q for name, q in zip(names, questions, strict=True) if name not in known}
        told = dict(zip(new, self._read(list(new.values())), strict=True))
        for name, answer in told.items():
            if isinstance(answer, dict):
                self.replies.add(name, self._identity, VERSION, answer, {})
        return [
            _answer(known[name][0], {"cached": 1.0}) if name in known else _answer(told[name], {"calls": 1.0})
            for name in names
        ]

    def _name(self, question: Question) -> str:
        shown = question.plain() if not self.chat else [question.system, question.user]
        return request_hash(model=self._identity, words=VERSION, question=shown, labels=question.labels)

    @cached_property
    def _identity(self) -> str:
        return self.model.identity

    def _read(self, questions: List[Question]) -> list[dict[str, float] | str]:
        """The log-probabilities of the answers to each question, or why there are none."""
        if not questions:
            return []
        try:
            return list(self._logps(questions))
        except DataError as error:
            return [str(error)] if len(questions) == 1 else [self._read([question])[0] for question in questions]

    def _logps(self, questions: List[Question]) -> list[dict[str, float]]:
        labels = questions[0].labels
        endings = list(labels) if self.chat else [f" {label}" for label in labels]
        prompts = [question.chat() if self.chat else question.plain() for question in questions]
        return [dict(zip(labels, logps, strict=True)) for logps in self.model.logps(prompts, endings)]


def _answer(logps: Mapping[str, float] | str, usage: Mapping[str, float]) -> Answer:
    """The allowed answers share all of the probability."""
    if isinstance(logps, str):
        return Answer(None, logps, usage)
    top = max(logps.values())
    weights = {label: math.exp(logp - top) for label, logp in logps.items()}
    return Answer({label: weight / sum(weights.values()) for label, weight in weights.items()}, usage=usage)
