"""Draw, score, keep: the part of a step that comes before tokens, in a run that samples while it trains. It knows rows,
draws and scores; no tokens, no loss. Every rank makes its share and gets all of it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as List
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from operator import itemgetter
from statistics import fmean
from typing import Any

from prefopt.batch import Draw
from prefopt.components import Score, Scorer
from prefopt.config.models import RolloutConfig
from prefopt.data.render import Renderer
from prefopt.data.streams import Order, derive, generator
from prefopt.engine.alarms import completion_metrics
from prefopt.engine.journal import Collected, Journal, Unused
from prefopt.engine.ranks import Ranks
from prefopt.errors import PluginError, ServiceError
from prefopt.rows import Completion, Role, Rollout, Row
from prefopt.sampling import Drawer, Request

Drawn = tuple[int, Rollout]
"""The group of a row, with the row's place among those that are drawn for."""
Scored = tuple[Rollout, list[Score]]


@dataclass
class Collector:
    """Makes the scored rollouts of a step. What it draws depends on the seed, the step, the row and the policy alone.

    `drawer` opens the sampler for a draw; `keep` says which groups are worth the step.
    """

    rows: List[Row]
    order: Order
    renderer: Renderer
    draws: tuple[Draw, ...]
    drawer: Callable[[Draw], Drawer]
    score: Scorer
    keep: Callable[[Rollout], bool]
    settings: RolloutConfig
    ranks: Ranks
    journal: Journal
    seed: int
    drawn: Callable[[int, List[Rollout]], None] = lambda step, rollouts: None
    """Is shown the rollouts of each step."""
    warn: Callable[[str], None] = lambda text: None
    """Hears of each step whose replies could not all be scored."""
    again: bool = False
    """Whether a step that is in the journal is drawn again, for what drawing computes."""
    _opened: dict[Draw, Drawer] = field(default_factory=dict)

    def __call__(self, step: int) -> Collected:
        """The rollouts of a step, from the journal if it has been drawn before."""
        found = self.journal.read(step, self._row)
        if found is None:
            found = self._collected(step)
            self.journal.write(step, found)
        elif self.again and found.rollouts:
            for index in [self.order.step(step)] if found.drawn is None else found.drawn:
                opened = self._opened_rows([(place, self._row(i)) for place, i in enumerate(index)])
                deque(self._drawn(step, [(row, ids) for _, row, ids in opened]), maxlen=0)
        self.drawn(step, found.rollouts)
        return found

    def _row(self, index: int) -> Row:
        return replace(self.rows[index], index=index)

    def _collected(self, step: int) -> Collected:
        wanted = self.order.step(step)
        taken, kept, scored, unused, refused, drawn = set(wanted), [], [], [], 0, []
        for attempt in range(self.settings.redraws + 1):
            drawn.append(wanted)
            new = self._scored(step, wanted)
            scored += new
            usable = [self._usable(step, *pair) for pair in new]
            good = [None if group is None or not self.keep(group) else group for group in usable]
            kept += [group for group in good if group is not None]
            unused += [
                left
                for pair, whole, group in zip(new, usable, good, strict=True)
                if (left := _unused(*pair, whole, group))
            ]
            again = good.count(None) - usable.count(None)
            refused += again
            wanted = self._others(step, attempt, again, taken)
            if not wanted:
                break
        self._tell(step, scored)
        sampled = sum(_tokens(group) for group, _ in scored)
        return Collected(kept, _metrics(scored, refused), sampled, drawn, unused)

    def _tell(self, step: int, scored: List[Scored]) -> None:
        """Warns of replies without a score, naming the first."""
        lacking = [(group, k, x) for group, own in scored for k, x in enumerate(own) if x.value is None]
        if lacking:
            group, k, score = lacking[0]
            more = f", and {len(lacking) - 1} more (rollouts.parquet will have them all)" if len(lacking) > 1 else ""
            self.warn(f"{_place(step, group)}: {_lack(group, k, score)}{more}")

    def _others(self, step: int, attempt: int, count: int, taken: set[int]) -> list[int]:
        """Rows to draw from in place of `count` groups that were not kept, none of them used in this step."""
        if not count or attempt == self.settings.redraws:
            return []
        shuffled = generator(self.seed, "redraw", step, attempt).permutation(len(self.order.rows))
        fresh = [i for i in (self.order.rows[k] for k in shuffled) if i not in taken][:count]
        taken.update(fresh)
        return fresh

    # --- one share of it --------------------------------------------------------------------------------------------

    def _scored(self, step: int, index: List[int]) -> list[Scored]:
        """The groups of these rows in their order, drawn and scored by all ranks together."""
        places = range(self.ranks.rank, len(index), self.ranks.world)
        opened = self._opened_rows([(place, self._row(index[place])) for place in places])
        drawn = self._drawn(step, [(row, ids) for _, row, ids in opened])
        scored = self._overlapping(drawn) if self.settings.overlap else self._scored_at_once(list(drawn))
        mine = [(place, *scored[i]) for i, (place, _, _) in enumerate(opened)]
        return [(group, own) for _, group, own in sorted(self.ranks.gather(mine), key=lambda item: item[0])]

    def _scored_at_once(self, drawn: List[Drawn]) -> dict[int, Scored]:
        """By the places of their rows, and scored in the order of these."""
        whole = dict(sorted(drawn, key=itemgetter(0)))
        found = zip(whole.values(), self._scores([*whole.values()]), strict=True)
        return dict(zip(whole, found, strict=True))

    def _overlapping(self, drawn: Iterator[Drawn]) -> dict[int, Scored]:
        """Some are scored while others are drawn: `overlap` at a time in the order in which they are whole. What is
        drawn and how says which come together, no clock."""
        asked: list[Future[dict[int, Scored]]] = []
        pool = ThreadPoolExecutor(1)
        try:
            while some := list(islice(drawn, self.settings.overlap)):
                asked.append(pool.submit(self._scored_at_once, some))
                for one in asked:
                    if one.done():
                        one.result()  # what failed ends the drawing too
            return {i: scored for one in asked for i, scored in one.result().items()}
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _opened_rows(self, rows: List[tuple[int, Row]]) -> list[tuple[int, Row, tuple[int, ...]]]:
        """Those whose prompts fit, with their tokens."""
        return [(place, row, ids) for place, row in rows if (ids := self.renderer.opening(row.prompt)) is not None]

    def _drawn(self, step: int, opened: List[tuple[Row, tuple[int, ...]]]) -> Iterator[Drawn]:
        """The group of each row, as soon as it is whole. Raises `PluginError` unless a sampler gives one completion for
        each request."""
        roles = tuple(draw.role for draw in self.draws for _ in range(draw.n))
        replies: list[dict[int, Completion]] = [{} for _ in opened]
        before = 0
        for number, draw in enumerate(self.draws):
            for at, completion in self._open(draw)(self._requests(step, number, draw, opened)):
                i, k = divmod(at, draw.n)
                _promised(before + k not in replies[i])
                replies[i][before + k] = replace(completion, source=draw.source)
                if len(replies[i]) == len(roles):
                    yield i, _group(opened[i][0], [replies[i][j] for j in range(len(roles))], roles)
            before += draw.n
            _promised(all(len(own) == before for own in replies))

    def _requests(self, step: int, number: int, draw: Draw, opened: List[tuple[Row, tuple[int, ...]]]) -> list[Request]:
        return [
            Request(ids, derive(self.seed, "rollout", step, number, row.index, k), draw.greedy)
            for row, ids in opened
            for k in range(draw.n)
        ]

    def _open(self, draw: Draw) -> Drawer:
        if draw not in self._opened:
            self._opened[draw] = self.drawer(draw)
        return self._opened[draw]

    def _scores(self, groups: List[Rollout]) -> list[list[Score]]:
        """One score for each completion; where `retry` is asked for, groups that lack one are scored again."""
        scores = self._asked(groups) if groups else []
        for _ in range(self.settings.retries if self.settings.on_missing == "retry" else 0):
            lacking = [i for i, own in enumerate(scores) if any(score.value is None for score in own)]
            again = self._asked([groups[i] for i in lacking]) if lacking else []
            for i, own in zip(lacking, again, strict=True):
                scores[i] = own
        return scores

    def _asked(self, groups: List[Rollout]) -> list[list[Score]]:
        found = self.score(groups)
        if list(map(len, found)) != [len(group.completions) for group in groups]:
            raise ServiceError("the reward gave another number of scores than there were replies", where="reward")
        return [[_finite(score) for score in own] for own in found]

    # --- what becomes of missing scores -----------------------------------------------------------------------------

    def _usable(self, step: int, group: Rollout, scores: List[Score]) -> Rollout | None:
        """The group with its scores, without what could not be scored; None when it cannot be used."""
        missing = [k for k, score in enumerate(scores) if score.value is None]
        if missing and self.settings.on_missing in ("abort", "retry"):
            raise self._unscored(step, group, missing[0], scores[missing[0]])
        whole = group.scored([score.value for score in scores])
        compared = any(group.roles[k] != Role.SAMPLE for k in missing)
        if missing and (compared or self.settings.on_missing == "drop_group"):
            return None
        kept = whole.select([k for k in range(len(scores)) if k not in missing])
        return kept if kept.completions else None

    def _unscored(self, step: int, group: Rollout, k: int, score: Score) -> ServiceError:
        asked = f" {self.settings.retries + 1} times" if self.settings.on_missing == "retry" else ""
        return ServiceError(
            _lack(group, k, score, asked),
            where=_place(step, group),
            fix="Mend the reward, or set rollout.on_missing to retry, drop_sample or drop_group.",
        )


def _promised(kept: bool) -> None:
    if not kept:
        raise PluginError("the sampler did not give one completion for each request", where="sampler")


def _group(row: Row, replies: List[Completion], roles: tuple[Role, ...]) -> Rollout:
    shared: dict[str, Any] = {"prompt": row.prompt, "index": row.index, "weight": row.weight, "extra": row.extra}
    return Rollout(**shared, completions=tuple(replies), roles=roles)


def _place(step: int, group: Rollout) -> str:
    return f"step {step + 1}, row {group.index}"


def _lack(group: Rollout, k: int, score: Score, asked: str = "") -> str:
    return f"reply {k + 1} of {len(group.completions)} could not be scored{asked}: {score.reason}"


def _unused(group: Rollout, scores: List[Score], usable: Rollout | None, kept: Rollout | None) -> Unused | None:
    """The replies that the step goes without: all unless some of the group are kept, else those without a score."""
    left = [k for k, score in enumerate(scores) if kept is None or score.value is None]
    if not left:
        return None
    with_score = "another reply of its group has no score" if usable is None else "its group was refused"
    reasons = [with_score if scores[k].value is not None else scores[k].reason or "no score" for k in left]
    return Unused(group.scored([score.value for score in scores]).select(left), reasons)


def _finite(score: Score) -> Score:
    if score.value is None or math.isfinite(score.value):
        return score
    return Score(None, f"the score is {score.value}", score.parts)


def _tokens(group: Rollout) -> int:
    return sum(len(c.ids or ()) for c in group.completions)


def _metrics(scored: List[Scored], refused: int) -> dict[str, float]:
    """What was drawn, whether or not it is kept."""
    pairs = [(c, score) for group, scores in scored for c, score in zip(group.completions, scores, strict=True)]
    found = {"reward/missing": float(sum(score.value is None for _, score in pairs)), "groups/refused": float(refused)}
    if pairs:
        found |= completion_metrics([c.ids or () for c, _ in pairs])
        found["completion/finished"] = fmean(c.finished for c, _ in pairs)
    values = [score.value for _, score in pairs if score.value is not None]
    if values:
        found["reward/mean"] = fmean(values)
    return found | {f"reward/{name}": fmean(x) for name, x in _parts(score for _, score in pairs).items()}


def _parts(scores: Iterator[Score]) -> dict[str, list[float]]:
    parts: dict[str, list[float]] = {}
    for score in scores:
        for name, x in score.parts.items():
            parts.setdefault(name, []).append(x)
    return dict(sorted(parts.items()))
