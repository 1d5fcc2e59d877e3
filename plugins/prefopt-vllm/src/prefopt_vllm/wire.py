"""What is sent to vLLM's token interface, and what its replies say. Pure: JSON in, tokens out.

A reply is read strictly: what does not fit together is refused, never mended, and nothing is filled in.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from collections.abc import Sequence as List
from dataclasses import dataclass
from typing import Any

from prefopt.api import Request

LEAST = -9000.0
"""vLLM writes -9999 for what has no finite log-probability."""
ROUNDING = 1e-6


class Broken(Exception):
    """A reply that cannot be right, however often one asks."""


class Stale(Exception):
    """A reply of other weights than those that were to be drawn from, or one that was cut short by a change."""


@dataclass(frozen=True)
class Asked:
    """One completion that is asked for: at most `room` tokens, of the model `name`, with the weights `version`."""

    request: Request
    room: int
    ends: Collection[int]
    name: str
    version: str

    def body(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The request. `settings` are those of the distribution. What is cached of a prompt is cached for these
        weights alone."""
        sampling = {"max_tokens": self.room, "logprobs": 0, "ignore_eos": True, "stop_token_ids": sorted(self.ends)}
        sampling |= {"seed": self.request.key % 2**63, **settings}
        return {
            "model": self.name,
            "token_ids": list(self.request.prompt),
            "cache_salt": self.version,
            "sampling_params": sampling,
        }


@dataclass(frozen=True)
class Drawn:
    """The tokens of a completion, their log-probabilities, and whether it ended by itself."""

    ids: tuple[int, ...]
    logps: tuple[float, ...]
    finished: bool


def drawn(reply: Any, asked: Asked) -> Drawn:
    """What a reply says. Raises `Broken` or `Stale`."""
    choice = _choice(reply)
    ids = _ids(choice.get("token_ids"))
    _same_prompt(reply, asked)
    if choice.get("finish_reason") not in ("stop", "length"):
        raise Stale(f"a completion was cut short: {choice.get('finish_reason')}")
    _same_weights(choice.get("weight_versions"), len(ids), asked.version)
    finished = choice["finish_reason"] == "stop"
    if not 1 <= len(ids) <= asked.room or (not finished and len(ids) != asked.room):
        raise Broken(f"a completion has {len(ids)} tokens where {asked.room} were asked for")
    if any(token in asked.ends for token in ids[:-1]) or (finished != (ids[-1] in asked.ends) and not _by_text(choice)):
        raise Broken("a completion does not end where its model ends it")
    return Drawn(ids, _logps(choice.get("logprobs"), ids), finished)


def prompt_logps(reply: Any, ids: List[int]) -> list[float]:
    """The log-probabilities of a prompt's tokens but the first. Raises `Broken`."""
    listed = reply.get("prompt_logprobs") if isinstance(reply, dict) else None
    if not isinstance(listed, list) or len(listed) != len(ids):
        raise Broken("the reply does not have the prompt's log-probabilities")
    found = [part.get(str(token)) if isinstance(part, dict) else None for token, part in zip(ids, listed, strict=True)]
    return [_logp(part.get("logprob") if isinstance(part, dict) else None) for part in found[1:]]


def version(reply: Any) -> str:
    """The version of the weights a server holds. Raises `Broken`."""
    found = reply.get("weight_version") if isinstance(reply, dict) else None
    if not isinstance(found, str):
        raise Broken("the server does not say which weights it holds")
    return found


def digests(reply: Any) -> dict[str, str]:
    """The checksums of a server's weights, by name; each part of a server that is spread out has its own. Raises
    `Broken`."""
    found = reply.get("checksums") if isinstance(reply, dict) else None
    if not isinstance(found, dict) or not all(isinstance(x, str) for x in found.values()):
        raise Broken("the server gives no checksums")
    return dict(found)


def setup(reply: Any) -> tuple[str, str]:
    """What a server's log-probabilities are, and the type of its weights. Raises `Broken`."""
    match reply:
        case {"vllm_config": {"model_config": {"logprobs_mode": str(mode), "dtype": str(dtype)}}}:
            return mode, dtype.removeprefix("torch.")
        case _:
            raise Broken("the server does not say how it is set up")


def served(reply: Any) -> str:
    """The name of the model a server serves. Raises `Broken`."""
    match reply:
        case {"data": [{"id": str(name)}, *_]}:
            return name
        case _:
            raise Broken("the server names no model")


def _choice(reply: Any) -> dict[str, Any]:
    match reply:
        case {"choices": [dict(choice)]}:
            return choice
        case _:
            raise Broken("the reply does not have one choice")


def _ids(found: Any) -> tuple[int, ...]:
    if not isinstance(found, list) or not found or not all(type(token) is int and token >= 0 for token in found):
        raise Broken("the reply has no tokens")
    return tuple(found)


def _same_prompt(reply: Any, asked: Asked) -> None:
    match reply.get("usage"):
        case {"prompt_tokens": int(read)} if read == len(asked.request.prompt):
            return
        case _:
            raise Broken("the server did not read the prompt as it was sent")


def _same_weights(spans: Any, count: int, wanted: str) -> None:
    named = [span.get("version") if isinstance(span, dict) else None for span in spans or ()]
    if not named or not all(isinstance(name, str) for name in named):
        raise Broken("a completion does not say with which weights it was drawn")
    if others := set(named) - {wanted}:
        raise Stale(f"a completion was drawn with the weights {', '.join(sorted(map(str, others)))}, not {wanted}")
    if spans != [{"version": wanted, "start": 0, "end": count}]:
        raise Broken("a completion has another number of tokens than were drawn")


def _by_text(choice: Mapping[str, Any]) -> bool:
    return isinstance(choice.get("stop_reason"), str)


def _logps(found: Any, ids: List[int]) -> tuple[float, ...]:
    content = found.get("content") if isinstance(found, dict) else None
    if not isinstance(content, list) or len(content) != len(ids):
        raise Broken("a completion does not have one log-probability for each token")
    if any(
        not isinstance(part, dict) or part.get("token_id") != token for part, token in zip(content, ids, strict=True)
    ):
        raise Broken("the log-probabilities belong to other tokens")
    return tuple(_logp(part.get("logprob")) for part in content)


def _logp(found: Any) -> float:
    if not isinstance(found, int | float) or isinstance(found, bool) or not LEAST < found <= ROUNDING:
        raise Broken(f"{found!r} is no log-probability")
    return min(float(found), 0.0)
