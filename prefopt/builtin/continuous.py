"""Continuous batching: rows of different lengths are drawn side by side, and the place of one that ends goes to the
next request. Knows requests, slots and tokens; how a model keeps what it has read is the arena's business.

Every prompt is read once, however many completions are drawn for it: its last token is read with the rows' steps, what
stands before it serves all rows that begin with it. Tensors of the rows stay on the device; the host looks at them
every few steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as List
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from prefopt.api import Arena, Completion, Draw, Drawer, LanguageModel, Request, Sampler, lazy_import
from prefopt.builtin.drawing import draw, most_probable, near_the_best, nucleus
from prefopt.builtin.samplers import room, uniforms

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_import("torch")

LOOK = 16
"""Steps after which the host looks which rows have ended, where it would have to wait for the device to do so."""
SMALL = 10_000_000
SLOTS = {"small": 512, "cpu": 128, "cuda": 256}
"""Rows side by side, by number of weights and device."""
Share = Annotated[float, Field(gt=0, le=1)]


class Continuous(Sampler):
    """Ancestral sampling with continuous batching: many completions side by side, each prompt read once.

    Every request has its own random numbers, from its key alone, as with `plain`: one uniform number for each token.
    The text does not depend on what else is drawn beside it, up to rounding. Log-probabilities are those of the
    distribution that was drawn from, after all filters.
    """

    name = "continuous"
    tells_own_logps = True

    temperature: PositiveFloat = 1.0
    """Divides the logits."""
    top_k: PositiveInt | None = None
    """Draw from that many most probable tokens alone."""
    top_p: Share | None = None
    """Draw from the fewest most probable tokens alone that hold this share of what `top_k` leaves."""
    min_p: Share | None = None
    """Draw from tokens alone that are at least this many times as probable as the most probable one."""
    max_new_tokens: PositiveInt = 64
    """A completion that reaches it, or the most tokens the model can read, without an end-of-sequence token or a stop
    string is cut and marked unfinished."""
    min_new_tokens: NonNegativeInt = 0
    """No end-of-sequence token is drawn before so many others."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """A completion ends with the token that completes one of these strings. Its text ends before the string."""
    greedy: bool = False
    """Take the most probable token instead of drawing one."""
    slots: PositiveInt | None = None
    """Rows drawn side by side. Default: 512 with less than 10 million weights; with more of them 128 on a CPU, 256 on
    a GPU. Memory for keys and values grows with them."""
    refill: bool = True
    """Give the slot of a row that has ended to the next request at once, instead of waiting for all rows to end."""

    @property
    def density(self) -> float | None:
        filtered = self.greedy or self.top_k or self.top_p or self.min_p or self.min_new_tokens
        return None if filtered else self.temperature

    def serves(self, draw: Draw) -> bool:
        return True

    def open(self, model: LanguageModel, other: LanguageModel | None = None, mix: float = 0.0) -> Drawer:
        models = [model] if other is None else [model, other]
        return lambda requests: _Drawing(self, models, mix, requests).run() if requests else iter(())

    def distribution(self, logits: List[Tensor], mix: float) -> Tensor:
        """What is drawn from, [n, V] in float32. A geometric mixture adds logits: both normalisers cancel."""
        one = logits[0] if len(logits) == 1 else torch.lerp(logits[0].float(), logits[1].float(), mix)
        p = torch.softmax(one if self.temperature == 1 else one / self.temperature, dim=-1, dtype=torch.float32)
        if self.top_k is not None:
            p = most_probable(p, self.top_k)
        if self.top_p is not None:
            p = nucleus(p, self.top_p)
        if self.min_p is not None:
            p = near_the_best(p, self.min_p)
        return p


def _usual_slots(model: LanguageModel) -> int:
    small = sum(p.numel() for p in model.network.parameters()) < SMALL
    return SLOTS["small" if small else "cpu" if model.device.type == "cpu" else "cuda"]


@dataclass(frozen=True)
class _Rows:
    """The rows in the slots, [slots] or [slots, room + 1] each; the last column takes what an ended row still draws.

    `base` is the place of the prompt's last token; `last` the token to read next, `count` how many were drawn.
    """

    base: Tensor
    last: Tensor
    count: Tensor
    room: Tensor
    greedy: Tensor
    over: Tensor
    ids: Tensor
    uniforms: Tensor
    logps: Tensor

    @classmethod
    def empty(cls, slots: int, room: int, device: torch.device) -> _Rows:
        def zeros(dtype: torch.dtype, *more: int) -> Tensor:
            return torch.zeros(slots, *more, dtype=dtype, device=device)

        base, last, count, rooms = (zeros(torch.long) for _ in range(4))
        greedy, over = (zeros(torch.bool) for _ in range(2))
        numbers, logps = (zeros(torch.double, room + 1) for _ in range(2))
        return cls(base, last, count, rooms, greedy, over, zeros(torch.long, room + 1), numbers, logps)

    def start(self, slot: int, request: Request, room: int, greedy: bool) -> None:
        self.base[slot], self.last[slot] = len(request.prompt) - 1, request.prompt[-1]
        self.count[slot], self.room[slot] = 0, room
        self.greedy[slot], self.over[slot] = greedy or request.greedy, False
        self.uniforms[slot, :room] = torch.from_numpy(uniforms(request, room))

    def add(self, n: int, tokens: Tensor, logps: Tensor, ends: Tensor) -> None:
        """A token for each of the first n rows; one that is over stays as it is."""
        rows, count, going = torch.arange(n, device=tokens.device), self.count[:n], ~self.over[:n]
        self.ids[rows, count], self.logps[rows, count] = tokens, logps.double()
        self.last[:n] = torch.where(going, tokens, self.last[:n])
        count += going
        self.over[:n] |= torch.isin(tokens, ends) | (count == self.room[:n])

    def move(self, source: int, target: int) -> None:
        for x in vars(self).values():
            x[target] = x[source]


class _Drawing:
    """The requests of one call on their way through the slots."""

    def __init__(self, sampler: Continuous, models: List[LanguageModel], mix: float, requests: List[Request]) -> None:
        self.sampler, self.model, self.mix, self.requests = sampler, models[0], mix, requests
        self.some_greedy = sampler.greedy or any(request.greedy for request in requests)
        self.rooms = [room(models, request, sampler.max_new_tokens) for request in requests]
        self.queue = sorted(range(len(requests)), key=lambda i: (len(requests[i].prompt), requests[i].prompt))
        slots = min(sampler.slots or _usual_slots(self.model), len(requests))
        longest, most = max(len(request.prompt) for request in requests), max(self.rooms)
        self.capacity = max(len(r.prompt) + room for r, room in zip(requests, self.rooms, strict=True))
        self.arenas: list[Arena] = [model.arena(slots, longest, most, self.capacity) for model in models]
        self.rows = _Rows.empty(slots, most, self.model.device)
        self.ends = torch.tensor(sorted(self.model.end_ids), dtype=torch.long, device=self.model.device)
        self.owner: list[int | None] = [None] * slots
        self.held: list[tuple[int, ...] | None] = [None] * slots
        """The prompt at the beginning of each slot, whether its row goes on or not."""
        self.checked = [0] * slots
        """How many tokens of each row the host has seen."""

    def run(self) -> Iterator[tuple[int, Completion]]:
        look = 1 if self.model.device.type == "cpu" else LOOK
        while True:
            self._admit()
            n = self._close_gaps()
            if n == 0:
                return
            width = max(len(self._request(s).prompt) + self.checked[s] for s in range(n))
            for k in range(look):
                self._step(n, min(width + k, self.capacity))
            yield from self._ended(n)

    def _request(self, slot: int) -> Request:
        owner = self.owner[slot]
        assert owner is not None
        return self.requests[owner]

    # --- slots ------------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Gives free slots to the next requests, a slot that holds the same prompt first."""
        free = [slot for slot, owner in enumerate(self.owner) if owner is None]
        if not self.sampler.refill and len(free) < len(self.owner):
            return
        taken = [self.queue.pop() for _ in range(min(len(free), len(self.queue)))]
        for i in self._settled(taken, free):
            slot = free.pop()
            self.held[slot] = None
            self._start(slot, i)
        self._fill()

    def _settled(self, taken: list[int], free: list[int]) -> list[int]:
        """Puts requests into free slots that hold their prompt; returns the others."""
        others = []
        for i in taken:
            slot = next((s for s in free if self.held[s] == self.requests[i].prompt), None)
            if slot is None:
                others.append(i)
            else:
                free.remove(slot)
                self._start(slot, i)
        return others

    def _start(self, slot: int, i: int) -> None:
        self.owner[slot], self.checked[slot] = i, 0
        self.rows.start(slot, self.requests[i], self.rooms[i], self.sampler.greedy)

    def _fill(self) -> None:
        """Reads prompts that no slot holds, each into one slot, and copies them into the others that want them."""
        wanting: dict[tuple[int, ...], list[int]] = {}
        for slot, owner in enumerate(self.owner):
            if owner is not None and self.held[slot] is None:
                wanting.setdefault(self.requests[owner].prompt, []).append(slot)
        unread = {prompt: slots.pop(0) for prompt, slots in wanting.items() if prompt not in self.held}
        for arena in self.arenas:
            if unread:
                arena.read([prompt[:-1] for prompt in unread], [*unread.values()])
        for prompt, slot in unread.items():
            self.held[slot] = prompt
        for prompt, slots in wanting.items():
            if slots:
                self._copy(self.held.index(prompt), slots, len(prompt) - 1)

    def _copy(self, source: int, targets: list[int], length: int) -> None:
        for arena in self.arenas:
            arena.copy(source, targets, length)
        for target in targets:
            self.held[target] = self.held[source]

    def _close_gaps(self) -> int:
        """Moves the last rows into slots that stay free; returns how many rows there are."""
        n = sum(owner is not None for owner in self.owner)
        gaps = [slot for slot in range(n) if self.owner[slot] is None]
        moved = [slot for slot in range(n, len(self.owner)) if self.owner[slot] is not None]
        for source, target in zip(moved, gaps, strict=True):
            self._copy(source, [target], len(self._request(source).prompt) - 1 + self.checked[source])
            self.rows.move(source, target)
            self.owner[target], self.checked[target] = self.owner[source], self.checked[source]
            self.owner[source] = None
        return n

    # --- tokens -----------------------------------------------------------------------------------------------------

    def _step(self, n: int, width: int) -> None:
        """One token more for each of the first n rows."""
        rows = self.rows
        positions = rows.base[:n] + rows.count[:n]
        logits = [arena.advance(rows.last[:n], positions, width) for arena in self.arenas]
        if self.sampler.min_new_tokens:
            early = rows.count[:n, None] < self.sampler.min_new_tokens
            for x in logits:
                x[:, self.ends] = x[:, self.ends].masked_fill(early, -torch.inf)
        p = self.sampler.distribution(logits, self.mix)
        uniform = rows.uniforms.gather(1, rows.count[:, None])[:n, 0]
        rows.add(n, *draw(p, uniform, rows.greedy[:n] if self.some_greedy else None), self.ends)

    def _ended(self, n: int) -> Iterator[tuple[int, Completion]]:
        """Looks at the first n rows and hands out those that have ended."""
        over, counts = self.rows.over[:n].tolist(), self.rows.count[:n].tolist()
        for slot, count in enumerate(counts):
            stopped = self._stopped(slot, count) if self.sampler.stop else None
            self.checked[slot] = count
            if stopped or over[slot]:
                owner, self.owner[slot] = self.owner[slot], None
                assert owner is not None
                yield owner, self._completion(slot, count, stopped)

    def _stopped(self, slot: int, count: int) -> tuple[int, str] | None:
        """With how many tokens a stop string was complete, and the text before it."""
        ids = self.rows.ids[slot, :count].tolist()
        if self._before_stop(ids) is None:
            return None
        sizes = range(self.checked[slot] + 1, count + 1)
        return next((size, text) for size in sizes if (text := self._before_stop(ids[:size])) is not None)

    def _before_stop(self, ids: list[int]) -> str | None:
        """The text before the first stop string; None where there is none."""
        text = self.model.decode(ids)
        places = [place for stop in self.sampler.stop if (place := text.find(stop)) >= 0]
        return text[: min(places)] if places else None

    def _completion(self, slot: int, count: int, stopped: tuple[int, str] | None) -> Completion:
        size = stopped[0] if stopped else count
        ids, logps = self.rows.ids[slot, :size].tolist(), self.rows.logps[slot, :size].tolist()
        ended = ids[-1] in self.model.end_ids
        text = stopped[1] if stopped else self.model.decode(ids[:-1] if ended else ids)
        return Completion(text, tuple(ids), tuple(logps), ended or stopped is not None, source=Continuous.name)
