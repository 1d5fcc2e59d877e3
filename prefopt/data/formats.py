"""From a record to a row: a literal table of formats. A format is recognised by the fields a record has, or named; its
parser is a pure function. Nothing is guessed: what no format fits is refused, and a field that is wrong is named.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from prefopt.data import fields as f
from prefopt.data.fields import BadField
from prefopt.data.read import Fields
from prefopt.rows import Comparison, Completion, Demonstration, Judgement, Message, Prompt, Ranking, Row, Text

TURN: Final = "\n\nAssistant:"
PAIR_NUMBERS: Final = ("preference", "margin", "votes")


@dataclass(frozen=True, slots=True)
class Format:
    """What a record looks like (`needs`, and `when` where the names of fields do not tell), and how it becomes a
    row. `implicit` formats have no prompt of their own: it is what both sides share."""

    name: str
    kind: type[Row]
    needs: frozenset[str]
    parse: Callable[[Fields], Row]
    when: Callable[[Fields], bool] = field(default=lambda data: True)
    implicit: bool = False


def recognised(data: Fields) -> Format | None:
    """The first format of the table that fits."""
    return next((form for form in FORMATS if form.needs <= data.keys() and form.when(data)), None)


def described(data: Fields) -> str:
    """The fields of a record, in words."""
    return f"fields {', '.join(f'`{k}`' for k in list(data)[:8])}" if data else "no fields"


def common(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How far two texts, or two conversations, are the same."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # halving compares whole pieces at a time, which is much quicker than one by one
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low


# --- shared pieces ----------------------------------------------------------------------------------------------------


def _shared(data: Fields, prompt: Text, *used: str) -> Fields:
    """What every row has: its weight, and the columns no parser used."""
    weight = f.number(data, "weight", 0.0)
    rest = data.keys() - used
    extra = {k: v for k, v in data.items() if k in rest and k not in ("prompt", "weight")} if rest else {}
    return {"prompt": prompt, "weight": 1.0 if weight is None else weight, "extra": extra}


def _compared(data: Fields, prompt: Text, chosen: Completion, rejected: Completion, *used: str) -> Comparison:
    """A comparison with its numbers: `preference`, or the share of `votes`, or certainty."""
    preference, votes = f.number(data, "preference", 0.0, 1.0), f.votes(data)
    if preference is None:
        preference = 1.0 if votes is None else (votes[0] + votes[2] / 2) / sum(votes)
    if chosen.text == rejected.text and preference != 0.5:
        raise BadField("identical sides", "rejected", "is the same text as the chosen side")
    return Comparison(
        **_shared(data, prompt, "prompt", "chosen", "rejected", *PAIR_NUMBERS, *used),
        chosen=chosen,
        rejected=rejected,
        preference=preference,
        margin=f.number(data, "margin"),
        votes=votes,
    ).upright()


# --- pairs ------------------------------------------------------------------------------------------------------------


def _preference(data: Fields) -> Row:
    prompt = f.text(data["prompt"], "prompt")
    sides = [f.completion(data[name], name, prompt) for name in ("chosen", "rejected")]
    return _compared(data, prompt, sides[0], sides[1])


def _implicit(data: Fields) -> Row:
    """Two texts, or two conversations: the prompt is what they share."""
    if isinstance(data["chosen"], list) or isinstance(data["rejected"], list):
        return _two_conversations(data, "chosen", "rejected")
    chosen, rejected = (f.plain(data[name], name) for name in ("chosen", "rejected"))
    return _split_at(data, chosen, rejected, _seam(chosen, rejected))


def _seam(a: str, b: str) -> int:
    """Where two texts part, moved back to the beginning of the word they part in and of the space before it."""
    cut = common(a, b)
    if (a[cut : cut + 1] + b[cut : cut + 1]).isalnum():
        word = re.search(r"\w*$", a[:cut])
        cut = word.start() if word else cut
    return cut - (a[:cut].endswith(" "))


def _split_at(data: Fields, chosen: str, rejected: str, cut: int) -> Row:
    if not chosen[:cut].strip():
        what = "begins unlike `rejected`: the two share no prompt"
        raise BadField("no shared prompt", "chosen", what, "Write the prompt into a field of its own, `prompt`.")
    return _compared(data, chosen[:cut], Completion(chosen[cut:]), Completion(rejected[cut:]))


def _two_conversations(data: Fields, *names: str) -> Row:
    """The messages both begin with, and one answer each."""
    sides = [f.messages(data[name], name) for name in names]
    same = common(*sides)
    same -= same == min(map(len, sides))  # the last answer is never part of the prompt
    for name, side in zip(names, sides, strict=True):
        if len(side) != same + 1 or side[-1].role != "assistant":
            what = f"has {len(side) - same} messages behind the {same} that both share, and one answer is wanted"
            raise BadField("no shared prompt", name, what)
    if not same:
        raise BadField("no shared prompt", names[0], "begins unlike the other side: the two share no prompt")
    prompt = f.asked(sides[0][:same], names[0])
    chosen, rejected = (Completion(side[-1].content) for side in sides)
    return _compared(data, prompt, chosen, rejected, *names)


def _dialogues(data: Fields) -> Row:
    """Anthropic-HH: the prompt reaches to the last `Assistant:` both share; a pair that parts earlier keeps the turns
    after it in its completions."""
    chosen, rejected = (f.plain(data[name], name) for name in ("chosen", "rejected"))
    place = chosen[: common(chosen, rejected)].rfind(TURN)
    if place < 0:
        raise BadField("no shared prompt", "chosen", "shares no turn of the assistant with `rejected`")
    return _split_at(data, chosen, rejected, place + len(TURN))


def _message_pairs(data: Fields) -> Row:
    return _two_conversations(data, "chosen_messages", "rejected_messages")


def _binarized(data: Fields) -> Row:
    """UltraFeedback as pairs: whole conversations with the prompt repeated beside them, and both scores."""
    row = _two_conversations(data, "chosen", "rejected")
    asked = [m.content for m in row.prompt if isinstance(m, Message) and m.role == "user"]
    if asked[-1:] != [data["prompt"]]:
        raise BadField("no shared prompt", "prompt", "is not what the user asks last in both conversations")
    return row


def _scores_apart(data: Fields) -> Fields:
    """`score_chosen` and `score_rejected` as a margin, unless the row has one."""
    scores = [f.number(data, name) for name in ("score_chosen", "score_rejected")]
    if data.get("margin") is not None or scores[0] is None or scores[1] is None:
        return data
    return {**data, "margin": scores[0] - scores[1]}


def _labelled_pair(data: Fields) -> Row:
    """Two replies, `a` and `b`, and which is better: one `label`, or one of each of several `raters`."""
    prompt = f.text(data["prompt"], "prompt")
    a, b = (f.completion(data[name], name, prompt) for name in "ab")
    raters = data.get("raters", [data.get("label")])
    if not isinstance(raters, list) or not raters:
        raise BadField("label", "raters", "must be a list of at least one label")
    marks = [f.one_of(mark, ("a", "b", "tie"), "raters" if "raters" in data else "label") for mark in raters]
    counts = [marks.count(mark) for mark in ("a", "b", "tie")]
    used = {**data, "votes": counts if "raters" in data else None, "preference": _share(counts)}
    return _compared(used, prompt, a, b, "a", "b", "raters", "label")


def _share(counts: list[int]) -> float:
    return (counts[0] + counts[2] / 2) / sum(counts)


# --- rankings ---------------------------------------------------------------------------------------------------------


def _ranking(data: Fields) -> Row:
    texts = data["completions"]
    if not isinstance(texts, list) or len(texts) < 2:
        raise BadField("too few", "completions", "must be a list of at least two completions")
    prompt = f.text(data["prompt"], "prompt")
    scores = data.get("scores")
    known: list[float | None] = [None] * len(texts) if scores is None else [*f.numbers(scores, "scores", len(texts))]
    replies = tuple(
        replace(f.completion(text, f"completions[{i}]", prompt), score=known[i]) for i, text in enumerate(texts)
    )
    votes = _rater_ranks(data, len(texts))
    shared = _shared(data, prompt, "completions", "ranks", "scores", "votes")
    return Ranking(**shared, completions=replies, ranks=_ranks(data, votes, len(texts)), votes=votes)


def _rater_ranks(data: Fields, size: int) -> tuple[tuple[int, ...], ...]:
    """One list of ranks for each rater."""
    votes = data.get("votes")
    if votes is None:
        return ()
    if not isinstance(votes, list) or not votes:
        raise BadField("votes", "votes", "must be a list with the ranks that each rater gave")
    return tuple(f.places(f.numbers(vote, f"votes[{i}]", size), best_first=True) for i, vote in enumerate(votes))


def _ranks(data: Fields, votes: tuple[tuple[int, ...], ...], size: int) -> tuple[int, ...]:
    """From `ranks`, else from `scores`, else from the mean rank the raters gave."""
    if data.get("ranks") is not None:
        return f.places(f.numbers(data["ranks"], "ranks", size), best_first=True)
    if data.get("scores") is not None:
        return f.places(f.numbers(data["scores"], "scores", size), best_first=False)
    if not votes:
        what = "is missing: a ranking needs `ranks` (0 the best), `scores` (more is better) or `votes`"
        raise BadField("wrong fields", "ranks", what)
    return f.places([sum(places) for places in zip(*votes, strict=True)], best_first=True)


def _ultrafeedback(data: Fields) -> Row:
    """UltraFeedback: each completion is an object with a `response` and an `overall_score`."""
    items = data["completions"]
    if not isinstance(items, list):
        raise BadField("too few", "completions", "must be a list of at least two completions")
    for i, item in enumerate(items):
        if not isinstance(item, dict) or not {"response", "overall_score"} <= item.keys():
            raise BadField("wrong fields", f"completions[{i}]", "must have `response` and `overall_score`")
    flat = {"completions": [i["response"] for i in items], "scores": [i["overall_score"] for i in items]}
    prompt = [{"role": "user", "content": data["instruction"]}]
    rest = {k: v for k, v in data.items() if k not in ("completions", "instruction")}
    wrapped = [[{"role": "assistant", "content": text}] for text in flat["completions"]]
    return _ranking({**rest, **flat, "prompt": prompt, "completions": wrapped})


# --- single replies ---------------------------------------------------------------------------------------------------


def _unpaired(data: Fields) -> Row:
    desirable = f.truth(data["label"], "label")
    prompt = f.text(data["prompt"], "prompt")
    reply = f.completion(data["completion"], "completion", prompt)
    return Judgement(**_shared(data, prompt, "completion", "label"), completion=reply, desirable=desirable)


def _prompt_completion(data: Fields) -> Row:
    prompt = f.text(data["prompt"], "prompt")
    reply = f.completion(data["completion"], "completion", prompt)
    return Demonstration(**_shared(data, prompt, "completion"), completion=reply)


def _text(data: Fields) -> Row:
    return Demonstration(**_shared(data, "", "text"), completion=Completion(f.plain(data["text"], "text")))


def _messages(data: Fields) -> Row:
    prompt, reply = f.answered(f.messages(data["messages"], "messages"), "messages")
    return Demonstration(**_shared(data, prompt, "messages"), completion=reply)


def _judged_messages(data: Fields) -> Row:
    desirable = f.truth(data["label"], "label")
    prompt, reply = f.answered(f.messages(data["messages"], "messages"), "messages")
    return Judgement(**_shared(data, prompt, "messages", "label"), completion=reply, desirable=desirable)


def _prompt(data: Fields) -> Row:
    return Prompt(**_shared(data, f.text(data["prompt"], "prompt")))


# --- sharegpt and alpaca ----------------------------------------------------------------------------------------------


def _sharegpt(data: Fields) -> Row:
    prompt, reply = f.answered(f.spoken(data["conversations"], "conversations", data), "conversations")
    return Demonstration(**_shared(data, prompt, "conversations", "system"), completion=reply)


def _sharegpt_pair(data: Fields) -> Row:
    prompt = f.asked(f.spoken(data["conversations"], "conversations", data), "conversations")
    sides = [f.turn(data[name], name) for name in ("chosen", "rejected")]
    for name, side in zip(("chosen", "rejected"), sides, strict=True):
        if side.role != "assistant":
            raise BadField("messages", name, "must be from gpt")
    chosen, rejected = (Completion(side.content) for side in sides)
    return _compared(data, prompt, chosen, rejected, "conversations", "system")


def _sharegpt_judged(data: Fields) -> Row:
    prompt, reply = f.answered(f.spoken(data["conversations"], "conversations", data), "conversations")
    used = ("conversations", "system", "kto_tag")
    return Judgement(**_shared(data, prompt, *used), completion=reply, desirable=f.truth(data["kto_tag"], "kto_tag"))


ALPACA: Final = ("instruction", "input", "output", "system", "history")


def _instructed(data: Fields) -> tuple[Message, ...]:
    """An alpaca row's prompt: system, the turns of `history`, then the instruction with its input on the next line."""
    parts = [f.plain(data[name], name) for name in ("instruction", "input") if data.get(name) is not None]
    turns = []
    for i, pair in enumerate(_history(data)):
        told, replied = (f.plain(text, f"history[{i}]") for text in pair)
        turns += [Message("user", told), Message("assistant", replied)]
    return (*f.system(data), *turns, Message("user", "\n".join(part for part in parts if part)))


def _history(data: Fields) -> list[list[Any]]:
    history = data.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise BadField("messages", "history", "must be a list of pairs of an instruction and its answer")
    return history


def _alpaca(data: Fields) -> Row:
    reply = f.completion(data["output"], "output")
    return Demonstration(**_shared(data, _instructed(data), *ALPACA), completion=reply)


def _alpaca_pair(data: Fields) -> Row:
    chosen, rejected = (Completion(f.plain(data[name], name)) for name in ("chosen", "rejected"))
    return _compared(data, _instructed(data), chosen, rejected, *ALPACA)


# --- the table --------------------------------------------------------------------------------------------------------


def _is_dialogue(data: Fields) -> bool:
    sides = (data["chosen"], data["rejected"])
    return all(isinstance(side, str) and side.startswith("\n\nHuman:") and TURN in side for side in sides)


def _has_objects(data: Fields) -> bool:
    items = data["completions"]
    return isinstance(items, list) and any(isinstance(item, dict) for item in items)


def _has_conversations(data: Fields) -> bool:
    return isinstance(data["prompt"], str) and isinstance(data["chosen"], list) and len(data["chosen"]) > 1


def _fields(names: str) -> frozenset[str]:
    return frozenset(names.split())


FORMATS: Final[tuple[Format, ...]] = (
    Format("ultrafeedback", Ranking, _fields("instruction completions"), _ultrafeedback, _has_objects),
    Format(
        "ultrafeedback_binarized",
        Comparison,
        _fields("prompt chosen rejected score_chosen score_rejected"),
        lambda data: _binarized(_scores_apart(data)),
        _has_conversations,
        implicit=True,
    ),
    Format("sharegpt_preference", Comparison, _fields("conversations chosen rejected"), _sharegpt_pair),
    Format("sharegpt_unpaired", Judgement, _fields("conversations kto_tag"), _sharegpt_judged),
    Format("sharegpt", Demonstration, _fields("conversations"), _sharegpt),
    Format("alpaca_preference", Comparison, _fields("instruction chosen rejected"), _alpaca_pair),
    Format("alpaca", Demonstration, _fields("instruction output"), _alpaca),
    Format("preference", Comparison, _fields("prompt chosen rejected"), _preference),
    Format("labelled_pair", Comparison, _fields("prompt a b"), _labelled_pair),
    Format("ranking", Ranking, _fields("prompt completions"), _ranking),
    Format("unpaired", Judgement, _fields("prompt completion label"), _unpaired),
    Format("prompt_completion", Demonstration, _fields("prompt completion"), _prompt_completion),
    Format("unpaired_messages", Judgement, _fields("messages label"), _judged_messages),
    Format("messages", Demonstration, _fields("messages"), _messages),
    Format("hh", Comparison, _fields("chosen rejected"), _dialogues, _is_dialogue, implicit=True),
    Format("preference_implicit", Comparison, _fields("chosen rejected"), _implicit, implicit=True),
    Format("message_pairs", Comparison, _fields("chosen_messages rejected_messages"), _message_pairs, implicit=True),
    Format("text", Demonstration, _fields("text"), _text),
    Format("prompt", Prompt, _fields("prompt"), _prompt),
)
BY_NAME: Final[Mapping[str, Format]] = {form.name: form for form in FORMATS}
KNOWN: Final = "Known: " + "; ".join(f"{', '.join(sorted(form.needs))} ({form.name})" for form in FORMATS) + "."
