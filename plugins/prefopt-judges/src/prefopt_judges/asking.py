"""What judges that are language models have in common: rubric, rules before the model, canaries, answers as verdicts.
Nothing here knows how a model is reached."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as List
from dataclasses import dataclass, field, replace
from pathlib import Path

from pydantic import NonNegativeInt

from prefopt.api import (
    Comparer,
    Judge,
    Pair,
    Rollout,
    Score,
    Scorer,
    Services,
    ToolPath,
    Verdict,
    added,
)
from prefopt_judges.canaries import canaries, counted
from prefopt_judges.kept import Replies
from prefopt_judges.questions import GRADES, LABELS, RUBRIC, TIE, Question, compared, rated
from prefopt_judges.texts import by_rule, hollow


@dataclass(frozen=True)
class Answer:
    """The probability of each allowed answer; None with a reason when there is none. `usage` is what it took."""

    chances: Mapping[str, float] | None
    reason: str = ""
    usage: Mapping[str, float] = field(default_factory=dict)


Ask = Callable[[List[Question]], list[Answer]]


class LanguageJudge(Judge):
    """A judge that puts questions to a language model."""

    rubric: str = RUBRIC
    """What makes a reply good, in a sentence or two. A principle drawn for a row is added to it."""
    ties: bool = False
    """Whether it may answer that neither is better."""
    canaries: NonNegativeInt = 1
    """Pairs with a known answer in each batch, in which one side orders the judge to prefer it: what share of them
    fools it is reported. They cost as much as other pairs."""
    cache: ToolPath | None = None
    """The file that keeps every reply. Default: `replies.sqlite` in the folder of the run; without a run, none."""

    @property
    def reads_principles(self) -> bool:
        return True

    def asker(self, services: Services, replies: Replies) -> Ask:
        """What reaches the model."""
        raise NotImplementedError

    def open(self, services: Services) -> Comparer:
        ask = self.asker(services, self._replies(services))
        return lambda pairs: self._compared(ask, pairs)

    def open_rating(self, services: Services) -> Scorer:
        ask = self.asker(services, self._replies(services))
        return lambda groups: self._rated(ask, groups)

    def _replies(self, services: Services) -> Replies:
        return Replies(Path(self.cache) if self.cache is not None else services.kept("replies.sqlite"))

    def _compared(self, ask: Ask, pairs: List[Pair]) -> list[Verdict]:
        """The canaries are asked about among the others; what they took is added to the first verdict."""
        placed = canaries(pairs, self.canaries)
        ruled = [by_rule(pair) for pair in pairs]
        read = [pair for pair, verdict in zip(pairs, ruled, strict=True) if verdict is None]
        asked = [*read, *(canary.pair for canary in placed)] if read else []
        answers = ask([compared(pair, self.rubric, self.ties) for pair in asked])
        verdicts = list(map(_verdict, answers))
        own, trapped = verdicts[: len(read)], verdicts[len(read) :]
        if trapped:
            extra = added([own[0].usage, *(v.usage for v in trapped), counted(placed, trapped)])
            own[0] = replace(own[0], usage=extra)
        found = iter(own)
        return [next(found) if verdict is None else verdict for verdict in ruled]

    def _rated(self, ask: Ask, groups: List[Rollout]) -> list[list[Score]]:
        """A hollow reply has the lowest grade, unread."""
        replies = [(g.prompt, c.text) for g in groups for c in g.completions]
        answers = iter(ask([rated(prompt, text, self.rubric) for prompt, text in replies if not hollow(text)]))
        return [
            [
                Score(float(GRADES[0])) if hollow(c.text) else self._score(next(answers), g, i)
                for i, c in enumerate(g.completions)
            ]
            for g in groups
        ]

    def _score(self, answer: Answer, group: Rollout, sample: int) -> Score:
        if answer.chances is None:
            return Score(None, f"{self.name}, row {group.index}, sample {sample}: {answer.reason}")
        return Score(sum(chance * float(grade) for grade, chance in answer.chances.items()))


def _verdict(answer: Answer) -> Verdict:
    if answer.chances is None:
        return Verdict(None, reason=answer.reason, usage=answer.usage)
    tie = answer.chances.get(TIE, 0.0)
    return Verdict(answer.chances.get(LABELS[0], 0.0), tie=tie, usage=answer.usage)
