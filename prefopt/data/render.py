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
from prefopt.rows import Completion, Message, Sequence, Text, show_text

REMEMBERED = 20_000

Tokenizer = Any
"""A transformers tokenizer."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """One sequence as token ids. The completion is what is scored; it ends with the end-of-sequence token unless
    cut."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]

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
    reply."""

    tokenizer: Tokenizer
    max_length: int | None = None
    overflow: Literal["stop", "drop", "truncate"] = "stop"
    counts: Counter[str] = field(default_factory=Counter)

    def render(self, sequences: Iterable[Sequence]) -> tuple[list[Sequence], list[Tokens]]:
        """The sequences that fit, and their tokens. When one sequence of a group does not fit, its group is dropped."""
        pairs = [(s, self._fitted(s, self.tokens(s.prompt, s.completion))) for s in sequences]
        dropped = {s.group for s, tokens in pairs if tokens is None}
        self.counts["rows/dropped"] += len(dropped)
        kept = [(s, tokens) for s, tokens in pairs if tokens is not None and s.group not in dropped]
        return [s for s, _ in kept], [tokens for _, tokens in kept]

    def prompt_ids(self, prompt: Text) -> tuple[int, ...]:
        """The tokens a model reads before it replies."""
        if isinstance(prompt, str):
            return (*self._start, *self._encode(prompt))
        return self._conversation(prompt, generate=True)

    def tokens(self, prompt: Text, completion: Completion) -> Tokens:
        """Prompt and completion as tokens. Raises `DataError` when nothing is left to score."""
        if completion.ids is not None:
            return Tokens(self.prompt_ids(prompt), completion.ids)
        found, merged = self._split(prompt, completion.text, completion.finished)
        self.counts["prompts/merged"] += merged
        return found

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

    # --- the pieces -------------------------------------------------------------------------------------------------

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    @cached_property
    def _start(self) -> tuple[int, ...]:
        """The beginning-of-sequence token, when this tokenizer adds one by itself."""
        bos = self.tokenizer.bos_token_id
        added = self.tokenizer("a", add_special_tokens=True)["input_ids"]
        return (bos,) if bos is not None and added[:1] == [bos] else ()

    def _whole(self, prompt: Text, text: str, finished: bool) -> tuple[int, ...]:
        if isinstance(prompt, str):
            ids = [*self._start, *self._encode(prompt + text)]
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
        encoded = self.tokenizer.apply_chat_template(
            turns, add_generation_prompt=generate, tokenize=True, return_dict=True
        )
        return tuple(encoded["input_ids"])

    def _fitted(self, sequence: Sequence, tokens: Tokens) -> Tokens | None:
        if self.max_length is None or len(tokens) <= self.max_length:
            return tokens
        if self.overflow == "drop":
            return None
        if self.overflow == "stop":
            raise DataError(
                f"prompt and completion have {len(tokens)} tokens, more than data.max_length = {self.max_length}",
                where=f"prompt {_start_of(sequence.prompt)}",
                fix="Set data.overflow to drop or truncate, or raise data.max_length.",
            )
        self.counts["rows/truncated"] += 1
        room = max(1, self.max_length - len(tokens.completion))
        prompt = tokens.prompt[-room:]
        return Tokens(prompt, tokens.completion[: max(1, self.max_length - len(prompt))])


def _common_prefix(a: List[int], b: List[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _start_of(prompt: Text) -> str:
    return repr(show_text(prompt)[:60])


def find_model(path: str) -> Path | None:
    """The folder of a local model; None when `path` is not a folder with a `config.json`."""
    folder = Path(path).expanduser()
    return folder if (folder / "config.json").is_file() else None
