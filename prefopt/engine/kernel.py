"""Attention of rows in progress by a kernel of our own, `attention.cpp`: each page of a prompt is read once for all
rows that have it, each row's own tokens as far as there are any. Knows what a step knows; no model.

It is compiled for a size of heads when it is first wanted, by the compiler that PyTorch's compiler uses.
"""

from __future__ import annotations

from ctypes import POINTER, Structure, byref, c_double, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prefopt.engine.fewrows import Step, attention
from prefopt.engine.pages import PAGE
from prefopt.engine.shortrows import Asked

SOURCE = Path(__file__).with_name("attention.cpp")


class Call(Structure):
    """What the kernel is told, as there."""

    _fields_ = (
        ("query", c_void_p),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("row_step", c_int64),
        ("head_step", c_int64),
        ("page_keys", c_void_p),
        ("page_values", c_void_p),
        ("bias", c_void_p),
        ("columns", c_int64),
        ("longest", c_int64),
        ("own", c_void_p),
        ("rows", c_void_p),
        ("row_starts", c_void_p),
        ("pages", c_void_p),
        ("page_starts", c_void_p),
        ("groups", c_int64),
        ("heads", c_int64),
        ("queries", c_int64),
        ("scale", c_double),
        ("out", c_void_p),
    )


def attend(asked: Asked, step: Step) -> Tensor:
    """The same as `fewrows.attention`, up to rounding; [n, H, 1, D]."""
    (n, heads, _, size), kinds = asked.query.shape, asked.key.shape[1]
    if asked.value.stride() != asked.key.stride() or asked.key.stride()[2:] != (size, 1):
        return attention(asked, step)
    assert asked.attn_mask is not None
    groups, query = step.sharing.groups, asked.query.contiguous()
    bias, out = step.bias(asked.attn_mask), torch.empty(n, heads, 1, size)
    pages = step.prompts if step.longest else (query, query)
    told = {"query": query, "keys": asked.key, "values": asked.value, "page_keys": pages[0], "page_values": pages[1]}
    told |= {"bias": bias, "own": step.counts, "out": out} | groups._asdict()
    call = Call(
        **{name: x.data_ptr() for name, x in told.items()},
        row_step=asked.key.stride(0),
        head_step=asked.key.stride(1),
        columns=bias.shape[-1],
        longest=step.longest,
        groups=len(groups.row_starts) - 1,
        heads=kinds,
        queries=heads // kinds,
        scale=asked.factor,
    )
    _kernel(size, PAGE)(byref(call))
    return out


@cache
def _kernel(size: int, page: int) -> Any:
    """For heads of that size, and pages of that many tokens."""
    from torch._inductor.codecache import CppCodeCache  # takes seconds to import

    library = CppCodeCache.load(f"#define SIZE {size}\n#define PAGE {page}\n{SOURCE.read_text('utf-8')}")
    library.attend.argtypes, library.attend.restype = [POINTER(Call)], None
    return library.attend
