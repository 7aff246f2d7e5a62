"""An Apple GPU that isn't there: tensors that say they are on it compute on the CPU, and are refused what it refuses.

That is float64, operations for which torch has no MPS kernel (by torch's own list of kernels), and tensors of two
devices in one operation.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torchgen
import yaml
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

MPS = torch.device("mps", 0)
KEYS = {"MPS", "CompositeImplicitAutograd", "CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional"}
"""Kinds of kernels that MPS can use."""

MOVING = {"to", "_to_copy", "copy_"}
"""Operations that take tensors of two devices."""


class Refused(Exception):
    """What an Apple GPU can't do was asked of it."""


class FakeTensor(torch.Tensor):
    """A tensor that says it is on an Apple GPU."""

    plain: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> FakeTensor:
        if inner.dtype in (torch.float64, torch.complex128):
            raise Refused(f"{inner.dtype} on an Apple GPU")
        made: FakeTensor = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=0, dtype=inner.dtype, device=torch.device("meta")
        )
        made.plain = inner
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Not what torch itself believes: it would look for the GPU before anything is dispatched."""
        return MPS

    def tolist(self) -> Any:
        return self.plain.tolist()

    def __setitem__(self, index: Any, values: Any) -> None:
        self.plain[tree_map(_inner, index)] = _inner(values)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        with FakeMps():
            return function(*args, **(kwargs or {}))


class FakeMps(TorchDispatchMode):
    """Refuse what an Apple GPU refuses, and remember which operations ran there, as long as it is active."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        values = tree_flatten((args, kwargs))[0]
        tensors = [each for each in values if isinstance(each, torch.Tensor)]
        fake = [each for each in tensors if isinstance(each, FakeTensor)]
        name = function._schema.name.removeprefix("aten::")
        wanted = [each for each in values if isinstance(each, torch.device)]
        if name in MOVING:
            # What torch itself believes of the tensor whose device was asked for.
            args, kwargs = tree_map(_believed, (args, kwargs))
            wanted = [_believed(each) for each in wanted]
        there = wanted[0].type == "mps" if wanted else bool(fake)
        if fake and name not in MOVING:
            # Numbers as tensors on the CPU are allowed.
            if any(each.dim() > 0 for each in tensors if not isinstance(each, FakeTensor)):
                raise Refused(f"{name} with tensors of two devices")
            full = name + (f".{function._overloadname}" if function._overloadname != "default" else "")
            self.seen.add(full)
            if not has_kernel(full):
                raise Refused(f"{full} has no MPS kernel")
        bare_args, bare = tree_map(_inner, args), tree_map(_inner, kwargs)
        result = function(*bare_args, **bare)
        if fake and not there:
            # It would see what is done to the other later.
            return result.clone()
        if not there:
            return result
        # What is changed in place stays the same tensor.
        known = {id(each.plain): each for each in fake}

        def wrap(each: Any) -> Any:
            if not isinstance(each, torch.Tensor):
                return each
            return known[id(each)] if id(each) in known else FakeTensor(each)

        return tree_map(wrap, result)


def _believed(each: Any) -> Any:
    return MPS if isinstance(each, torch.device) and each.type == "meta" else each


def _inner(each: Any) -> Any:
    if isinstance(each, torch.device) and each.type == "mps":
        return torch.device("cpu")
    return each.plain if isinstance(each, FakeTensor) else each


def has_kernel(name: str) -> bool:
    """Tell whether torch has a kernel of an operation ("add.Tensor") for Apple's GPUs, or makes it of others."""
    function = _functions()[name]
    if "structured_delegate" in function:
        return has_kernel(function["structured_delegate"])
    kernels = function.get("dispatch")
    return kernels is None or bool(KEYS & {key.strip() for keys in kernels for key in keys.split(",")})


@functools.cache
def _functions() -> Mapping[str, Mapping[str, Any]]:
    """Return torch's list of its operations and their kernels, by name."""
    listed = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native" / "native_functions.yaml"
    return {each["func"].partition("(")[0]: each for each in yaml.safe_load(listed.read_text("utf-8"))}


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    **_options: Any,
) -> torch.Tensor:
    """Do what torch's attention does, which looks for the device's kernel before anything is dispatched."""
    if enable_gqa:
        shared = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    return scores.softmax(-1) @ value
