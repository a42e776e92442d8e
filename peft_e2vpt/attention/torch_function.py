# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""How rows join keys and values where an attention does its own arithmetic instead of asking transformers for it.

While such an attention runs, a `TorchFunctionMode` watches its calls of torch. It joins the rows to a call of
`scaled_dot_product_attention`, or follows the scores from the product of queries and keys through the softmax to the
product with the values: the scores of the rows are computed beside them, take part in the softmax, and add their
values to the result. What the attention itself does with its scores, their shape and their mask stay as they are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .._compat import forward_slot
from ..backbones.sites import WeakModule
from .rows import RowOwner, Rows, causal_mask, join_rows, per_sequence


PRODUCTS = ("matmul", "__matmul__", "bmm", "einsum")
SCALINGS = ("mul", "__mul__", "__rmul__", "__imul__", "mul_", "div", "__truediv__", "__itruediv__", "div_")
# a position bias or mask shifts single scores, and not those of the rows, which have no position and are seen by all
SHIFTS = ("add", "__add__", "__radd__", "__iadd__", "add_", "sub", "__sub__", "__isub__", "sub_")
MASKINGS = ("masked_fill", "masked_fill_", "where")
RESHAPINGS = ("view", "reshape", "unsqueeze", "squeeze", "flatten", "view_as", "reshape_as")
# what treats all scores alike, or mixes them over other dimensions than that of the keys
COPYINGS = (
    "permute",
    "transpose",
    "linear",
    "linear_dynamic",  # of torch's quantised layers
    "linear_dynamic_fp16",
    "quantize_per_tensor",
    "dequantize",
    "to",
    "float",
    "type",
    "type_as",
    "contiguous",
    "clone",
    "dropout",
    "tanh",
)


OF_ROWS = "_e2vpt_of_rows"  # attribute of scores and weights with those of the rows, which so live as long as they do


def _followed(arguments: Iterable[Any]) -> tuple[Tensor, Tensor] | None:
    """Scores or weights among the arguments of a call, and those of the rows."""
    for argument in arguments:
        for part in argument if isinstance(argument, (list, tuple)) else (argument,):
            if isinstance(part, Tensor) and (of_rows := getattr(part, OF_ROWS, None)) is not None:
                return part, of_rows
    return None


def _follow_no_more(output: Any) -> None:
    """Forgets the rows of weights that an attention returns."""
    for part in output if isinstance(output, tuple) else (output,):
        if isinstance(part, Tensor) and hasattr(part, OF_ROWS):
            delattr(part, OF_ROWS)


def _with_heads(rows: Rows, heads: int) -> Rows:
    """Repeats rows as grouped-query attention has repeated its keys and values."""
    groups = heads // rows.key.shape[1]
    if groups == 1:
        return rows
    return rows._replace(key=rows.key.repeat_interleave(groups, 1), value=rows.value.repeat_interleave(groups, 1))


def _mask_of(kwargs: dict[str, Any], num_sequences: int, num_heads: int, dtype: torch.dtype) -> Tensor | None:
    """The masks of `nn.MultiheadAttention`, in which True hides, as one that is added: (B, 1 or H, 1 or N, N)."""
    padding, mask = kwargs["key_padding_mask"], kwargs["attn_mask"]
    masks = []
    if padding is not None:
        masks.append(padding[:, None, None, :])
    if mask is not None:
        masks.append(mask.unflatten(0, (num_sequences, num_heads)) if mask.dim() == 3 else mask[None, None])
    added = [
        torch.zeros_like(part, dtype=dtype).masked_fill(part, -torch.inf) if part.dtype == torch.bool else part
        for part in masks
    ]
    return sum(added[1:], added[0]).expand(num_sequences, -1, -1, -1) if added else None


def _like(rows: Tensor, query: Tensor) -> Tensor:
    """Brings rows (B, H, P, d) to the dimensions that the attention gives its queries."""
    if query.dim() == 3:  # (B H, N, d)
        return rows.flatten(0, 1)
    if query.dim() == 5:  # (B, H, windows, N, d)
        return rows[:, :, None]
    return rows


class _Interception(TorchFunctionMode):
    """Watches one forward pass of one attention.

    Attributes:
        rows: the rows, once the attention has come to its scores.
        joined: whether they have taken part.
    """

    def __init__(self, owner: RowOwner, name: str, heads: int) -> None:
        super().__init__()
        self.owner, self.name, self.heads = owner, name, heads
        self.rows: Rows | None = None
        self.asked = self.joined = False
        self._num_keys = 0
        self._bias: Tensor | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "scaled_dot_product_attention":
            return self._fused(func, *args, **kwargs)
        if name == "multi_head_attention_forward":
            return self._multi_head(func, *args, **kwargs)
        followed = _followed((*args, *kwargs.values())) if self.rows is not None else None
        if followed is not None:
            return self._follow(func, name, *followed, args, kwargs)
        if name in PRODUCTS and not self.asked:
            return self._scores(func, args, kwargs)
        return func(*args, **kwargs)

    # ---------------------------------------------------------------------------------------------------- one kernel
    def _fused(
        self,
        func: Callable[..., Tensor],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        self.asked = True
        self.rows = self.owner.rows(key.shape[0], key.dtype)
        if self.rows is not None:
            rows = _with_heads(self.rows, key.shape[1])
            if is_causal:
                attn_mask = causal_mask(query.shape[2], key.shape[2], key.device)
            key, value, attn_mask = join_rows(rows, key, value, attn_mask, query.dtype)
            is_causal, self.joined = False, True
        return func(query, key, value, attn_mask, dropout_p, is_causal, **kwargs)

    def _multi_head(
        self,
        func: Callable[..., Any],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        embed_dim: int,
        num_heads: int,
        weight: Tensor,
        bias: Tensor | None,
        *others: Any,
        **kwargs: Any,
    ) -> Any:
        """The function behind `nn.MultiheadAttention`, (N, B, D), which takes finished keys and values (B H, N, d)."""
        self.asked = True
        num_keys, num_sequences, _ = key.shape
        self.rows = self.owner.rows(num_sequences, key.dtype)
        if self.rows is not None:
            _, *weights = weight.chunk(3)
            biases = [None, None] if bias is None else bias.chunk(3)[1:]
            key, value = (
                F.linear(tokens, w, b).view(num_keys, num_sequences, num_heads, -1).permute(1, 2, 0, 3)
                for tokens, w, b in zip((key, value), weights, biases, strict=True)
            )
            mask = _mask_of(kwargs, num_sequences, num_heads, query.dtype)
            key, value, mask = join_rows(self.rows._replace(num_behind=0), key, value, mask, query.dtype)
            if mask is not None:
                mask = mask.expand(-1, num_heads, len(query), -1).flatten(0, 1)
            kwargs.update(static_k=key.flatten(0, 1), static_v=value.flatten(0, 1), attn_mask=mask, is_causal=False)
            kwargs["key_padding_mask"] = None
            self.joined = True
            # not used where finished ones are given, but their length is checked against the mask
            key = value = query.new_zeros(key.shape[2], num_sequences, embed_dim)
        return func(query, key, value, embed_dim, num_heads, weight, bias, *others, **kwargs)

    # ------------------------------------------------------------------------------------------- scores, step by step
    def _scores(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The product of queries and keys: the first of two equally shaped batches of matrices."""
        product = func(*args, **kwargs)
        tensors = args[1] if isinstance(args[-1], (list, tuple)) else args  # einsum takes both forms
        query, key = tensors[-2:]
        if query.dim() < 3 or query.dim() != key.dim() or query.shape[:-2] != key.shape[:-2]:
            return product
        self.asked = True
        num_sequences = query.shape[0] // (self.heads if query.dim() == 3 else 1)
        self.rows = self.owner.rows(num_sequences, query.dtype)
        if self.rows is not None:
            keys = _like(per_sequence(self.rows.key.to(query.dtype), num_sequences), query)
            self._num_keys = product.shape[-1]
            setattr(product, OF_ROWS, query @ keys.transpose(-2, -1))
            if self.rows.score_bias is not None:
                bias = per_sequence(self.rows.score_bias, num_sequences)[:, None, None, :]
                self._bias = _like(bias.expand(-1, self.heads, -1, -1), query)
        return product

    def _follow(
        self,
        func: Callable[..., Any],
        name: str,
        scores: Tensor,
        of_rows: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if name in PRODUCTS:
            return self._product(func(*args, **kwargs), scores, of_rows, args)
        if name == "softmax" and (kwargs["dim"] if "dim" in kwargs else args[1]) in (-1, scores.dim() - 1):
            return self._softmax(func, scores, of_rows, args, kwargs)
        result = func(*args, **kwargs)
        if not isinstance(result, Tensor) or name == "amax" or name.startswith("new_") or name.endswith("_like"):
            return result
        if name in COPYINGS or (name in SCALINGS + SHIFTS and self._treats_all_keys_alike(scores, args)):
            parts = [of_rows if argument is scores else argument for argument in args]
            of_rows = func(*parts, **kwargs)
        elif name in RESHAPINGS:
            if result.shape[-1] == scores.shape[-1]:
                of_rows = of_rows.reshape(*result.shape[:-1], of_rows.shape[-1])
        elif name not in SHIFTS + MASKINGS:
            raise NotImplementedError(
                f"{self.name} applies torch's {name} to its attention scores, and what that means for prompts is not "
                "known: leave this attention out with exclude_modules."
            )
        setattr(result, OF_ROWS, of_rows)
        return result

    def _treats_all_keys_alike(self, scores: Tensor, args: tuple[Any, ...]) -> bool:
        """Whether what scores are multiplied with or added to is a number for all keys of a query."""
        others = [argument for argument in args if argument is not scores]
        keys_are_last = scores.shape[-1] == self._num_keys  # not where they are unfolded to a map
        return all(
            not isinstance(other, Tensor) or other.dim() == 0 or (keys_are_last and other.shape[-1] == 1)
            for other in others
        )

    def _softmax(
        self,
        func: Callable[..., Tensor],
        scores: Tensor,
        of_rows: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        of_rows = of_rows if self._bias is None else of_rows + self._bias.to(of_rows.dtype)
        together = torch.cat([of_rows.to(scores.dtype), scores], dim=-1)
        parts = [together if argument is scores else argument for argument in args]
        if "input" in kwargs:
            kwargs = {**kwargs, "input": together}
        softmax = func(*parts, **kwargs)
        weights = softmax[..., of_rows.shape[-1] :]
        setattr(weights, OF_ROWS, softmax[..., : of_rows.shape[-1]])
        return weights

    def _product(self, product: Tensor, weights: Tensor, of_rows: Tensor, args: tuple[Any, ...]) -> Tensor:
        """The product of weights and values, or of the transposes of both."""
        assert self.rows is not None
        self.joined = True
        num_sequences = of_rows.shape[0] // (self.heads if of_rows.dim() == 3 else 1)
        values = _like(per_sequence(self.rows.value, num_sequences), of_rows).to(of_rows.dtype)
        of_values = values.transpose(-2, -1) @ of_rows if args[-1] is weights else of_rows @ values
        total: Tensor = product + of_values
        return total


class _LastPass(threading.local):
    """Whose rows the last intercepted forward of a thread has used."""

    owner: int | None = None


_last = _LastPass()


def has_run_for(owner: RowOwner) -> bool:
    """Whether the attention call that ends now has come through the forward that joins the owner's rows."""
    ran, _last.owner = _last.owner == id(owner), None
    return ran


class AdaptedForward:
    """The forward of an attention that does its own arithmetic, with rows.

    Once its owner is detached, it is the forward that it stood before: something that has been put around it
    meanwhile, a hook of Accelerate's or a function of the user's, may still call it.

    Raises:
        RuntimeError: when called; the attention came to no scores, so that its prompts had no effect.
    """

    def __init__(self, attention: nn.Module, owner: RowOwner, name: str, heads: int, before: Any) -> None:
        self.attention = WeakModule(attention)
        self.owner, self.name, self.heads = owner, name, heads
        self.before = before  # a forward that the instance had, not its class

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.owner.is_attached:
            return self._forward(*args, **kwargs)
        interception = _Interception(self.owner, self.name, self.heads)
        with interception:
            output = self._forward(*args, **kwargs)
        if not torch.compiler.is_compiling():
            _follow_no_more(output)
            _last.owner = id(self.owner)
        if not interception.asked or (interception.rows is not None and not interception.joined):
            raise RuntimeError(
                f"{self.name} ({type(self.attention()).__name__}) has not used its prompts: it computes its attention "
                "in a way that E2VPT cannot follow. Leave it out with exclude_modules."
            )
        return output

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.before is not None:
            return self.before(*args, **kwargs)
        attention = self.attention()
        return type(attention).forward(attention, *args, **kwargs)


class UncompiledForward(AdaptedForward):
    """The same, left alone by torch.compile, for an attention that it cannot see as one graph."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return torch.compiler.disable(super().__call__)(*args, **kwargs)


def attach(attention: nn.Module, owner: RowOwner, name: str, heads: int, one_graph: bool) -> None:
    """Lets `owner` give rows to every later call of `attention`, whose Accelerate hook, if any, stays outermost."""
    kind = AdaptedForward if one_graph else UncompiledForward
    slot = forward_slot(attention)
    attention.__dict__[slot] = kind(attention, owner, name, heads, attention.__dict__.get(slot))


def detach(attention: nn.Module) -> None:
    """Gives `attention` the forward back that it had before `attach`, if nobody has put something around it."""
    slot = forward_slot(attention)
    forward = attention.__dict__.get(slot)
    if isinstance(forward, AdaptedForward):
        if forward.before is None and slot == "forward":
            del attention.__dict__[slot]
        else:
            attention.__dict__[slot] = forward.before or type(attention).forward.__get__(attention)
