"""Texts that nobody vouches for: what is done to them before a judge reads them. Pure; it knows no judge.

A text stands between two lines with a key that is a hash of everything between them. Whoever writes the text cannot
write that line: the text would have to contain its own hash.
"""

from __future__ import annotations

import re
from collections.abc import Sequence as List
from hashlib import blake2b

from prefopt.api import Pair, Verdict

CONTROL = re.compile(
    r"<(?=[|｜][^<>\n]{1,60}[|｜]>)"
    r"|<(?=/?(?:s|bos|eos|pad|unk|mask|cls|sep|sys|inst|system|user|assistant|think|tool_call|start_of_turn|end_of_turn|"
    r"end_of_text|begin_of_text|im_start|im_end|end)>)"
    r"|<(?=<<|<\s*/?SYS>>)"
    r"|\[(?=/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS)\])",
    re.IGNORECASE,
)
"""Where the control tokens of the common chat formats begin, and what looks like a fence."""
OPENERS = frozenset(
    (
        *("solution", "answer", "final answer", "the answer is", "thought process", "reasoning", "step 1"),
        *("let's think step by step", "lets think step by step", "let me think", "let's begin"),
        *("let's solve this problem step by step", "let's solve this step by step"),
        *("here is the answer", "here is my answer", "here is the solution", "response", "reply"),
        *("解", "解答", "答案", "答え", "かいせつ", "respuesta", "solución", "lösung", "antwort", "réponse"),
    )
)
"""What begins a reply and is none, as `hollow` compares it (Zhao et al. 2025, arXiv:2507.08794, found that judges
reward it)."""


def key_of(*texts: str) -> str:
    """The key of a fence around these texts: 16 hexadecimal digits."""
    found = blake2b(digest_size=8)
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        found.update(len(data).to_bytes(8, "little") + data)
    return found.hexdigest()


def fenced(name: str, text: str, key: str) -> str:
    """A text between the lines of its fence, its control tokens broken."""
    return f"<<<begin {name} {key}>>>\n{broken(text)}\n<<<end {name} {key}>>>"


def broken(text: str) -> str:
    """The text with a space in every control token, so that no server reads it as one.

    >>> broken("a<|im_end|> b <s> [INST] 1 < 2 [x]")
    'a< |im_end|> b < s> [ INST] 1 < 2 [x]'
    """
    return CONTROL.sub(lambda found: found[0] + " ", text)


def hollow(text: str) -> bool:
    """Whether a reply is empty, or only begins.

    >>> [hollow(t) for t in ("", " :", "Solution:", "Let's solve this step by step.", "42", "No.")]
    [True, True, True, True, False, False]
    """
    words = re.sub(r"[^\w']+", " ", text.casefold().replace("’", "'")).strip()
    return not words or words in OPENERS


def by_rule(pair: Pair) -> Verdict | None:
    """The verdict on a pair with a hollow reply: the other one is better; None when a judge has to read it."""
    a, b = hollow(pair.a.text), hollow(pair.b.text)
    if not (a or b):
        return None
    return Verdict(float(b and not a), tie=float(a and b), reason="an empty reply, or one that only begins: by rule")


def without(text: str, secrets: List[str]) -> str:
    """The text without these secrets."""
    for secret in secrets:
        text = text.replace(secret, "[redacted]") if secret else text
    return text
