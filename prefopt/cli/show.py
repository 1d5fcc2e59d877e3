"""The first step of a run, as a person can check it: every token that is read and every token that is trained on."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from prefopt.config import RunConfig
from prefopt.data.render import Tokenizer, Tokens
from prefopt.engine.inputs import Inputs
from prefopt.engine.models import reader
from prefopt.engine.services import EngineServices
from prefopt.errors import DataError
from prefopt.plugins import Plugins
from prefopt.preflight import world_recipe
from prefopt.rows import Role


def first_batch(config: RunConfig, plugins: Plugins, shown: int = 4) -> Iterator[str]:
    """Lines about the first step: its size, then its first groups with roles, tokens and masks."""
    tokenizer, positions = reader(config.model, world_recipe(config.model.path, plugins.find))
    inputs = Inputs.of(config, tokenizer, positions, EngineServices(config.run.seed))
    if config.draws:
        yield from _prompts(config, inputs, tokenizer, shown)
        return
    built = inputs.assembler(inputs.order.step(0))
    if built is None:
        raise DataError("nothing is left of the first step's rows", where="data")
    counts = ", ".join(f"{int(n)} {unit}" for unit, n in built.batch.counts.items() if n)
    yield f"{config.algorithm.name}, step 1 of {inputs.total}: {counts}; {sum(map(len, built.tokens))} tokens read"
    yield from inputs.verdicts()
    yield "[prompt] is read, <completion> is trained on, token by token; {between} is read on the way"
    groups = list(dict.fromkeys(built.batch.group.tolist()))
    for i, tokens in enumerate(built.tokens):
        group = groups.index(int(built.batch.group[i]))
        if group < shown:
            yield from _sequence(tokenizer, group, Role(int(built.batch.role[i])), tokens)
    if len(groups) > shown:
        yield f"\n... and {len(groups) - shown} more groups"


def _prompts(config: RunConfig, inputs: Inputs, tokenizer: Tokenizer, shown: int) -> Iterator[str]:
    """What replies are drawn for. The replies are the run's own: `rollouts.parquet` keeps them."""
    index = inputs.order.step(0)
    replies = ", ".join(f"{draw.n} of the {draw.source}{', greedy' * draw.greedy}" for draw in config.draws)
    yield f"{config.algorithm.name}, step 1 of {inputs.total}: {len(index)} prompts; replies for each: {replies}"
    yield from inputs.verdicts()
    for i in index[:shown]:
        ids = inputs.assembler.renderer.opening(inputs.assembler.rows[i].prompt)
        yield f"[{tokenizer.decode(list(ids))}]" if ids is not None else f"row {i} is too long and left out"
    if len(index) > shown:
        yield f"\n... and {len(index) - shown} more prompts"


def _sequence(tokenizer: Tokenizer, group: int, role: Role, tokens: Tokens) -> Iterator[str]:
    yield ""
    yield f"group {group}, {role.name.lower()}: {len(tokens.prompt)} + {len(tokens.completion)} tokens"
    yield f"[{tokenizer.decode(list(tokens.prompt))}]"
    yield "".join(_spans(tokenizer, tokens))


def _spans(tokenizer: Tokenizer, tokens: Tokens) -> Iterator[str]:
    """The completion, its trained spans token by token."""
    marks = tokens.trained or (True,) * len(tokens.completion)
    for trained, span in groupby(zip(tokens.completion, marks, strict=True), key=lambda pair: pair[1]):
        words = [tokenizer.decode([token]) for token, _ in span]
        yield f"<{'|'.join(words)}>" if trained else f"{{{''.join(words)}}}"
