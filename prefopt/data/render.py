"""From sequences to tokens. The only place, beside the engine, that holds a tokenizer; it knows no algorithm and no
model.

Prompt and completion are tokenized together, so that the tokens are those the model would have read; the prompt is what
both tokenizations share. A completion that was sampled keeps its own tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from collections.abc import Sequence as List
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

from prefopt.errors import ConfigError, DataError
from prefopt.rows import Completion, Message, Role, Sequence, Text, show_text

REMEMBERED = 20_000

Tokenizer = Any
"""A transformers tokenizer."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """One sequence as token ids. The completion is what is scored; it ends with the end-of-sequence token unless
    cut. `trained` says which of its tokens count, where not all do: the turns of others lie between; it begins and ends
    with True."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    trained: tuple[bool, ...] | None = None

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)


def load_tokenizer(path: str, trust_remote_code: bool = False) -> Tokenizer:
    """The tokenizer in a model folder. Raises `ConfigError` when there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        first = str(error).partition("\n")[0]
        raise ConfigError(f"no tokenizer could be loaded from `{path}`: {first}", where="model.path") from None


@dataclass
class Renderer:
    """Tokenizes sequences. `counts` says how many rows were cut or dropped, and how many prompts merged with their
    reply. With `plain`, control tokens that stand in a text are read as plain text."""

    tokenizer: Tokenizer
    max_length: int | None = None
    overflow: Literal["stop", "drop", "truncate"] = "stop"
    train_on: Literal["last", "all"] = "last"
    counts: Counter[str] = field(default_factory=Counter)
    plain: bool = False

    def render(self, sequences: Iterable[Sequence], drop: bool = False) -> tuple[list[Sequence], list[Tokens]]:
        """The sequences that fit, and their tokens. When one sequence of a group does not fit, its group is dropped;
        with `drop`, a group that cannot be used is dropped too, and counted. An opening of one token, which nothing
        predicts, is left out."""
        listed = [s for s in sequences if s.role != Role.OPENING or len(self._begun(s.completion.text)) > 1]
        kept: dict[int, Tokens] = {}
        for places in _groups(listed):
            found = self._usable([listed[i] for i in places], drop)
            kept |= zip(places, found, strict=True) if found is not None else ()
            self.counts["rows/dropped"] += found is None
        order = sorted(kept)
        return [listed[i] for i in order], [kept[i] for i in order]

    def _usable(self, group: List[Sequence], drop: bool) -> list[Tokens] | None:
        try:
            return self._group(group)
        except DataError:
            if not drop:
                raise
            return None

    def _group(self, group: List[Sequence]) -> list[Tokens] | None:
        """The tokens of the sequences of one row, None when one of them is too long."""
        found = [self._fitted(s, self._of(s)) for s in group]
        kept = [tokens for tokens in found if tokens is not None]
        if len(kept) < len(found):
            return None
        sides = {s.role: tokens for s, tokens in zip(group, kept, strict=True) if s.fields.get("preference") != 0.5}
        if Role.CHOSEN in sides and sides[Role.CHOSEN] == sides.get(Role.REJECTED):
            raise DataError("chosen and rejected have the same tokens", where=f"prompt {_start_of(group[0].prompt)}")
        return kept

    def _of(self, sequence: Sequence) -> Tokens:
        several = self.train_on == "all" and sequence.role == Role.DEMONSTRATION
        if several and not isinstance(sequence.prompt, str) and any(m.role == "assistant" for m in sequence.prompt):
            found, merged = self._turns((*sequence.prompt, Message("assistant", sequence.completion.text)))
            self.counts["prompts/merged"] += merged
            return found
        return self.tokens(sequence.prompt, sequence.completion)

    def prompt_ids(self, prompt: Text) -> tuple[int, ...]:
        """The tokens a model reads before it replies."""
        return self._prompted(prompt)

    @cached_property
    def _prompted(self) -> Callable[[Text], tuple[int, ...]]:
        """What is read before a reply, remembered: many replies are drawn for one prompt."""
        return lru_cache(maxsize=REMEMBERED)(self._tokenize_prompt)

    def _tokenize_prompt(self, prompt: Text) -> tuple[int, ...]:
        if isinstance(prompt, str):
            return tuple(self._begun(prompt))
        return self._conversation(prompt, generate=True)

    def opening(self, prompt: Text) -> tuple[int, ...] | None:
        """The tokens that replies are drawn from: of a prompt that alone is too long its last ones, None when it is to
        be dropped. Raises `DataError` when neither was asked for."""
        ids = self.prompt_ids(prompt)
        if self.max_length is None or len(ids) <= self.max_length:
            return ids
        if self.overflow == "stop":
            raise self._too_long("the prompt has", len(ids), prompt)
        return ids[-self.max_length :] if self.overflow == "truncate" else None

    def tokens(self, prompt: Text, completion: Completion) -> Tokens:
        """Prompt and completion as tokens; a completion that was drawn, behind what it was drawn from. Raises
        `DataError` when nothing is left to score."""
        if completion.ids is not None:
            return Tokens(self.opening(prompt) or self.prompt_ids(prompt), completion.ids)
        found, merged = self._split(prompt, completion.text, completion.finished)
        self.counts["prompts/merged"] += merged
        return found

    def endings(self, prompt: Text, endings: List[str]) -> list[Tokens]:
        """Several ways for a reply to begin, behind the tokens that all of them share with the prompt."""
        before = self.prompt_ids(prompt)
        if isinstance(prompt, str):
            whole = [tuple(self._begun(prompt + ending)) for ending in endings]
        else:
            whole = [(*before, *self._encode(ending)) for ending in endings]
        shared = max(1, min(_common_prefix(before, ids) for ids in whole))
        return [Tokens(ids[:shared], ids[shared:]) for ids in whole]

    @cached_property
    def _split(self) -> Callable[[Text, str, bool], tuple[Tokens, bool]]:
        """`_tokenize`, which remembers what it has seen lately: the same rows come back every epoch."""
        return lru_cache(maxsize=REMEMBERED)(self._tokenize)

    def _tokenize(self, prompt: Text, text: str, finished: bool) -> tuple[Tokens, bool]:
        """Prompt and text as tokens, and whether they merge at the seam."""
        before = self.prompt_ids(prompt)
        whole = self._whole(prompt, text, finished)
        common = _common_prefix(before, whole)
        shared = max(common, 1)  # the first token of all has nothing to be predicted from
        if shared >= len(whole):
            raise DataError(f"the completion {text[:40]!r} has no tokens", where=f"prompt {_start_of(prompt)}")
        return Tokens(whole[:shared], whole[shared:]), common < len(before)

    @cached_property
    def _turns(self) -> Callable[[tuple[Message, ...]], tuple[Tokens, bool]]:
        return lru_cache(maxsize=REMEMBERED)(self._tokenize_turns)

    def _tokenize_turns(self, talk: tuple[Message, ...]) -> tuple[Tokens, bool]:
        """A conversation in which every assistant turn is trained on, each to its end-of-sequence token; and whether a
        turn merges with what stands before it."""
        whole = tuple(self._ended(list(self._conversation(talk, generate=False)), plain=False))
        spans = [self._span(talk, i, whole) for i, m in enumerate(talk) if m.role == "assistant"]
        start, end = max(spans[0][0], 1), spans[-1][1]
        trained = tuple(any(a <= i < b for a, b, _ in spans) for i in range(start, end))
        return Tokens(whole[:start], whole[start:end], trained), any(merged for _, _, merged in spans)

    def _span(self, talk: tuple[Message, ...], i: int, whole: tuple[int, ...]) -> tuple[int, int, bool]:
        """Where turn `i` begins and ends among the tokens of the whole conversation, and whether it merges. Raises
        `DataError` when the template writes an earlier turn differently once more turns follow."""
        before = self._conversation(talk[:i], generate=True)
        after = tuple(self._ended(list(self._conversation(talk[: i + 1], generate=False)), plain=False))
        start, end = _common_prefix(before, whole), len(after)
        if after != whole[:end] or start >= end:
            raise DataError(
                f"the chat template writes turn {i} differently once more turns follow, so it cannot be trained on",
                where=f"prompt {_start_of(talk[:1])}",
                fix="Set data.train_on to last.",
            )
        return start, end, start < len(before)

    # --- the pieces -------------------------------------------------------------------------------------------------

    def _encode(self, text: str) -> list[int]:
        options = {"split_special_tokens": True} if self.plain else {}
        return list(self.tokenizer(text, add_special_tokens=False, **options)["input_ids"])

    def _begun(self, text: str) -> list[int]:
        """The tokens of plain text behind exactly one beginning-of-sequence token, which the text may hold itself."""
        ids = self._encode(text)
        return ids if self._start and tuple(ids[:1]) == self._start else [*self._start, *ids]

    @cached_property
    def _start(self) -> tuple[int, ...]:
        """The beginning-of-sequence token, when this tokenizer adds one by itself."""
        bos = self.tokenizer.bos_token_id
        added = self.tokenizer("a", add_special_tokens=True)["input_ids"]
        return (bos,) if bos is not None and added[:1] == [bos] else ()

    def _whole(self, prompt: Text, text: str, finished: bool) -> tuple[int, ...]:
        if isinstance(prompt, str):
            ids = self._begun(prompt + text)
        else:
            ids = list(self._conversation((*prompt, Message("assistant", text)), generate=False))
        return tuple(self._ended(ids, isinstance(prompt, str)) if finished else ids)

    def _ended(self, ids: list[int], plain: bool) -> list[int]:
        """`ids` with the end-of-sequence token last. A chat template may have put it there, with white space behind
        it."""
        end = self.tokenizer.eos_token_id
        if end is None:
            return ids
        if not plain and end in ids:
            last = len(ids) - 1 - ids[::-1].index(end)
            if not self.tokenizer.decode(ids[last + 1 :]).strip():
                return ids[: last + 1]
        return ids if ids and ids[-1] == end else [*ids, end]

    def _conversation(self, messages: List[Message], generate: bool) -> tuple[int, ...]:
        if not self.tokenizer.chat_template:
            raise DataError(
                "the rows are conversations, but the model's tokenizer has no chat template",
                fix="Use a chat model, or write prompts as text.",
            )
        turns = [{"role": m.role, "content": m.content} for m in messages]
        return self._templated(turns, generate)

    def _templated(self, turns: list[dict[str, str]], generate: bool) -> tuple[int, ...]:
        from jinja2 import TemplateError

        options = {"sanitize_control_tokens": True} if self.plain else {}
        try:
            encoded = self.tokenizer.apply_chat_template(
                turns, add_generation_prompt=generate, tokenize=True, return_dict=True, **options
            )
        except (TemplateError, ValueError) as error:
            where = f"prompt {turns[0]['content'][:60]!r}"
            raise DataError(f"the chat template refuses the conversation: {error}", where=where) from None
        return tuple(encoded["input_ids"])

    def _fitted(self, sequence: Sequence, tokens: Tokens) -> Tokens | None:
        counted = len(tokens) if sequence.completion.ids is None else len(tokens.prompt)  # what was drawn is not cut
        if self.max_length is None or counted <= self.max_length:
            return tokens
        probe = sequence.role == Role.PROBE  # made of two rows that fit: no reason to lose either
        if self.overflow == "drop" and not probe:
            return None
        if self.overflow == "stop" and not probe:
            raise self._too_long("prompt and completion have", len(tokens), sequence.prompt)
        self.counts["rows/truncated"] += not probe
        room = max(1, self.max_length - len(tokens.completion))
        prompt = tokens.prompt[-room:]
        return _cut(prompt, tokens, max(1, self.max_length - len(prompt)))

    def _too_long(self, what: str, length: int, prompt: Text) -> DataError:
        return DataError(
            f"{what} {length} tokens, more than data.max_length = {self.max_length}",
            where=f"prompt {_start_of(prompt)}",
            fix="Set data.overflow to drop or truncate, or raise data.max_length.",
        )


def _cut(prompt: tuple[int, ...], tokens: Tokens, room: int) -> Tokens:
    """At most `room` tokens of the completion, the last of them trained."""
    if tokens.trained is None:
        return Tokens(prompt, tokens.completion[:room])
    while not tokens.trained[:room][-1]:
        room -= 1
    return Tokens(prompt, tokens.completion[:room], tokens.trained[:room])


def _groups(sequences: List[Sequence]) -> list[list[int]]:
    """The places of the sequences of each row."""
    groups: dict[int, list[int]] = {}
    for i, sequence in enumerate(sequences):
        groups.setdefault(sequence.group, []).append(i)
    return list(groups.values())


def _common_prefix(a: List[int], b: List[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _start_of(prompt: Text) -> str:
    return repr(show_text(prompt)[:60])


def find_model(path: str) -> Path | None:
    """The folder of a local model; None when `path` is not a folder with a `config.json`."""
    folder = Path(path).expanduser()
    return folder if (folder / "config.json").is_file() else None
