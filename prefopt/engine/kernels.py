"""Kernels of our own for rows in progress on a CPU, in C++. `attention.cpp` reads each page of a prompt once for all
rows that have it, and of each row's own tokens as many as there are; `product.cpp` computes products of very few rows.
Knows what a step and its products know; no model.

They are compiled when they are first wanted, by the compiler that PyTorch's compiler uses.
"""

from __future__ import annotations

from ctypes import CDLL, Structure, byref, c_double, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prefopt.engine.fewrows import Product, Step, attention
from prefopt.engine.pages import PAGE
from prefopt.engine.shortrows import Asked

FEWEST = 4
"""Rows up to which memory is what a product waits for, however it is computed."""


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
    _attention(size, PAGE)(byref(call))
    return out


class Unpacked(Product):
    """Takes the matrices as they are for up to FEWEST rows, which is as fast as memory gives them."""

    def compute(self, input: Tensor) -> Tensor:
        rows, weights = input.numel() // input.shape[-1], [layer.weight for layer in self.layers]
        if rows > FEWEST or not all(weight.is_contiguous() for weight in weights):
            return super().compute(input)
        given, out, done = input.contiguous(), input.new_empty(*input.shape[:-1], sum(self.sizes)), 0
        for weight in weights:
            place = out.data_ptr() + done * out.itemsize
            _product()(given.data_ptr(), weight.data_ptr(), place, rows, input.shape[-1], len(weight), out.shape[-1])
            done += len(weight)
        return out if self.bias is None else out.add_(self.bias)


@cache
def _attention(size: int, page: int) -> Any:
    """For heads of that size, and pages of that many tokens."""
    return _compiled("attention", f"#define SIZE {size}\n#define PAGE {page}\n").attend


@cache
def _product() -> Any:
    found = _compiled("product").product
    found.argtypes = [c_void_p] * 3 + [c_int64] * 4
    return found


def _compiled(name: str, before: str = "") -> CDLL:
    """What is in the file of that name, with something before it. Kept on disk by PyTorch's compiler."""
    from torch._inductor.codecache import CppCodeCache  # takes seconds to import

    source = Path(__file__).with_name(f"{name}.cpp").read_text("utf-8")
    return CppCodeCache.load(before + source)  # type: ignore[no-any-return]
