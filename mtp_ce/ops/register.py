"""How a function becomes a torch operator, and a pair of operators a differentiable one.

torch.library.custom_op and register_autograd do the same in two lines, and take 15 and 140 microseconds more a call on
a host where a launch of a kernel takes 15: more than the loss of a small batch.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

COMPILES = torch.Tag.pt2_compliant_tag


def operator(function: Callable[..., Any]) -> Any:
    """A torch operator on any device, of the function's name and signature, without a derivative."""
    name = f"mtp_ce::{function.__name__}"
    torch.library.define(name, torch.library.infer_schema(function, mutates_args=()), tags=COMPILES)
    torch.library.impl(name, "default", function)
    return getattr(torch.ops.mtp_ce, function.__name__).default


def differentiable(
    name: str, function: type[torch.autograd.Function], forward: Any, *, tensors: int
) -> Callable[..., tuple[Tensor, ...]]:
    """`function.apply` as a function of what the operator `forward` takes: a list, as many `tensors`, and options.

    The Function gets the list's length, the options as a tuple, and the tensors one by one; it returns tensors. Under
    torch.compile it is an operator of that name, which goes into the graph whole and is taken apart there.
    """

    def apply(given: list[Tensor], *rest: Any) -> Any:
        return function.apply(len(given), rest[tensors:], *given, *rest[:tensors])

    arguments, _, _ = str(forward._schema).removeprefix(forward.name()).partition(" -> ")
    torch.library.define(f"mtp_ce::{name}", f"{arguments} -> Tensor[]", tags=COMPILES)
    torch.library.impl(f"mtp_ce::{name}", "CompositeImplicitAutograd", lambda *given: [*apply(*given)])
    whole = getattr(torch.ops.mtp_ce, name).default

    def call(given: list[Tensor], *rest: Any) -> Any:
        return whole(given, *rest) if torch.compiler.is_compiling() else apply(given, *rest)

    return call


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError("The loss has no second derivative: its gradient was computed with create_graph=True.")


def once_differentiable(gradients: Callable[..., tuple[Any, ...]], *arguments: Any) -> tuple[Any, ...]:
    """What `gradients` returns; under create_graph it depends on the tensors of the arguments, and raises there."""
    return _Once.apply(gradients, *arguments) if torch.is_grad_enabled() else gradients(*arguments)
