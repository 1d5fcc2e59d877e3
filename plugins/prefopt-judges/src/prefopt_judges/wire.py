"""What is sent to an OpenAI-compatible server, and what its reply says. Pure: JSON in, probabilities out.

A reply is read strictly. What is not exactly one of the allowed answers is no answer, whatever it might have meant.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeAlias

from prefopt_judges.questions import Question

Form: TypeAlias = Literal["label", "json"]
MOST_ALTERNATIVES = 20
JSON_TOKENS = 64


class NoAnswer(Exception):
    """A reply says nothing; the message says why."""


class NoProbabilities(NoAnswer):
    """A reply has an answer, or something like one, but not its probabilities."""


def body(question: Question, model: str, temperature: float, form: Form, completions: bool) -> dict[str, Any]:
    """The request: for an answer of one token with its alternatives, or for JSON."""
    shared: dict[str, Any] = {"model": model, "temperature": temperature, "seed": question.draw}
    if completions:
        return {**shared, "prompt": question.plain(), "max_tokens": 1, "logprobs": MOST_ALTERNATIVES}
    if form == "json":
        messages = _messages(question, f' Write it as JSON: {{"answer": "{question.labels[0]}"}}, for example.')
        return {**shared, "messages": messages, "max_tokens": JSON_TOKENS, "response_format": _schema(question.labels)}
    alternatives = {"max_tokens": 1, "logprobs": True, "top_logprobs": MOST_ALTERNATIVES}
    return {**shared, "messages": _messages(question, ""), **alternatives}


def _messages(question: Question, more: str) -> list[dict[str, str]]:
    talk = [{"role": message.role, "content": message.content} for message in question.chat()]
    return [*talk[:-1], {**talk[-1], "content": talk[-1]["content"] + more}]


def _schema(labels: tuple[str, ...]) -> dict[str, Any]:
    properties = {"answer": {"type": "string", "enum": list(labels)}}
    schema = {"type": "object", "properties": properties, "required": ["answer"], "additionalProperties": False}
    return {"type": "json_schema", "json_schema": {"name": "verdict", "strict": True, "schema": schema}}


def choice(reply: Any) -> dict[str, Any]:
    """The first choice of a reply. Raises `NoAnswer` when it is no reply of this kind."""
    try:
        found = reply["choices"][0]
    except (KeyError, IndexError, TypeError):
        raise NoAnswer("the reply has no choices") from None
    if not isinstance(found, dict):
        raise NoAnswer("the reply has no choices")
    return found


def tokens(reply: Any) -> tuple[int, int] | None:
    """How many tokens a server says it read and wrote; None when it does not say."""
    usage = reply.get("usage") if isinstance(reply, dict) else None
    match usage:
        case {"prompt_tokens": int(read), "completion_tokens": int(wrote)} if min(read, wrote) >= 0:
            return read, wrote
        case _:
            return None


def chances(found: Mapping[str, Any], labels: tuple[str, ...], form: Form) -> dict[str, float]:
    """The probability of each allowed answer. Raises `NoAnswer`, and `NoProbabilities` where they were wanted."""
    _refuse(found)
    if form == "json":
        return {_strict(_text(found), labels): 1.0}
    alternatives = dict(_alternatives(found.get("logprobs")))
    if not alternatives:
        raise NoProbabilities("the server gives no probabilities")
    sums: dict[str, float] = defaultdict(float)
    for token, logp in alternatives.items():
        if token.strip() in labels:
            sums[token.strip()] += math.exp(logp)
    if not sums:
        raise NoAnswer(f"none of {', '.join(labels)} is among the likely answers")
    total = sum(sums.values())
    return {label: sums.get(label, 0.0) / total for label in labels}


def written(found: Mapping[str, Any], labels: tuple[str, ...]) -> dict[str, float]:
    """The answer that is written out, of a server that gives no probabilities. Raises `NoAnswer`."""
    _refuse(found)
    text = _text(found).strip()
    if text not in labels:
        raise NoAnswer(f"the answer {text[:40]!r} is none of {', '.join(labels)}")
    return {text: 1.0}


def _refuse(found: Mapping[str, Any]) -> None:
    message = found.get("message")
    refused = message.get("refusal") if isinstance(message, dict) else None
    if refused or found.get("finish_reason") == "content_filter":
        raise NoAnswer("the model refused to answer")


def _text(found: Mapping[str, Any]) -> str:
    message = found.get("message")
    text = message.get("content") if isinstance(message, dict) else found.get("text")
    if not isinstance(text, str):
        raise NoAnswer("the reply has no text")
    return text


def _strict(text: str, labels: tuple[str, ...]) -> str:
    try:
        answer = json.loads(text)
    except (ValueError, RecursionError):
        raise NoAnswer(f"the answer {text[:40]!r} is not JSON") from None
    if not isinstance(answer, dict) or set(answer) != {"answer"} or answer["answer"] not in labels:
        raise NoAnswer(f'the answer {text[:40]!r} is not {{"answer": {" or ".join(labels)}}}')
    return str(answer["answer"])


def _alternatives(logprobs: Any) -> Iterator[tuple[str, float]]:
    """The first token's alternatives with their log-probabilities, as chat or as completions have them."""
    if not isinstance(logprobs, dict):
        return
    first = next(iter(logprobs.get("content") or logprobs.get("top_logprobs") or ()), None)
    if not isinstance(first, dict):
        return
    listed = first.get("top_logprobs", first)
    pairs = (
        [(x.get("token"), x.get("logprob")) for x in listed if isinstance(x, dict)]
        if isinstance(listed, list)
        else listed.items()
    )
    for token, logp in pairs:
        if isinstance(token, str) and isinstance(logp, int | float) and not isinstance(logp, bool) and logp <= 1e-6:
            yield token, float(logp)
