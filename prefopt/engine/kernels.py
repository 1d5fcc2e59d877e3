"""Kernels of our own for rows in progress on a CPU, in C++. `attention.cpp` reads a page of a prompt once for up to
sixteen rows with the same pages, and of a row's own tokens as many as it has; `product.cpp` computes products from
matrices that lie as it reads them. Knows what a step and its products know; no model.

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


class Call(Structure):
    """The struct `Call` of `attention.cpp`, field by field."""

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
        ("threads", c_int64),
        ("scale", c_double),
        ("out", c_void_p),
    )


def attend(asked: Asked, step: Step) -> Tensor:
    """The same as `fewrows.attention`, up to rounding; [n, H, 1, D]."""
    (_, heads, _, size), kinds = asked.query.shape, asked.key.shape[1]
    if asked.value.stride() != asked.key.stride() or asked.key.stride()[2:] != (size, 1):
        return attention(asked, step)
    assert asked.attn_mask is not None
    groups, query = step.sharing.groups, asked.query.contiguous()
    bias, out = step.bias(asked.attn_mask), torch.empty_like(query)
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
        threads=torch.get_num_threads(),
        scale=asked.factor,
    )
    _attention_kernel(size, PAGE)(byref(call))
    return out


class Panels(Product):
    """Matrices lie in panels, as `product.cpp` has them: for few rows as fast as memory gives them, and up to
    128 no slower than what `Product` takes."""

    def pack(self, matrix: Tensor) -> Tensor:
        (high, wide), (kernel, panel) = matrix.shape, _product_kernel()
        given, found = matrix.contiguous(), matrix.new_empty(-(-high // panel), wide, panel)
        kernel.pack(given.data_ptr(), found.data_ptr(), wide, high, torch.get_num_threads())
        return found

    def compute(self, input: Tensor) -> Tensor:
        (kernel, panel), high, wide = _product_kernel(), sum(self.sizes), input.shape[-1]
        assert self.packed is not None
        if input.dtype != torch.float32 or self.packed.shape[:2] != (-(-high // panel), wide):
            raise RuntimeError(f"rows of {wide} numbers in {input.dtype} do not fit the matrix")
        given, out = input.contiguous(), input.new_empty(*input.shape[:-1], high)
        pointers = (x.data_ptr() for x in (given, self.packed, out))
        kernel.product(*pointers, input.numel() // wide, wide, high, torch.get_num_threads())
        return out if self.bias is None else out.add_(self.bias)


@cache
def _attention_kernel(size: int, page: int) -> Any:
    """For heads of that size, and pages of that many tokens."""
    return _library("attention", f"#define SIZE {size}\n#define PAGE {page}\n").attend


@cache
def _product_kernel() -> tuple[CDLL, int]:
    """With how many outputs a panel has."""
    library = _library("product")
    library.pack.argtypes = [c_void_p] * 2 + [c_int64] * 3
    library.product.argtypes = [c_void_p] * 3 + [c_int64] * 4
    return library, int(library.panel())


def _library(name: str, before: str = "") -> CDLL:
    """What is in the file of that name, with something before it. Kept on disk by PyTorch's compiler."""
    from torch._inductor.codecache import CppCodeCache  # takes seconds to import

    source = Path(__file__).with_name(f"{name}.cpp").read_text("utf-8")
    return CppCodeCache.load(before + source)  # type: ignore[no-any-return]
