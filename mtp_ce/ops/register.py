"""How a function of options and inputs becomes a torch operator, and one that is differentiable.

A schema takes tensors and scalars only. A parameter that is `LossOptions` or a NamedTuple stands in the schema field by
field and is put together again inside, so that no operator spells out the options.

torch.library.custom_op and register_autograd do the rest in two lines, and take 15 and 140 microseconds more a call on
a host where the launch of a kernel takes 15: more than the loss of a small batch.
"""

import inspect
from collections.abc import Callable
from typing import Any, get_type_hints

import torch
from torch import Tensor

from mtp_ce.options import LossInputs, LossOptions

COMPILES = torch.Tag.pt2_compliant_tag


def _field_types(kind: Any) -> dict[str, Any] | None:
    """Types of the fields of `LossOptions` or a NamedTuple, by name; None for a type that a schema takes."""
    if kind is not LossOptions and not hasattr(kind, "_fields"):
        return None
    types = get_type_hints(kind, localns={"Tensor": Tensor})
    if kind is LossInputs:
        types["normalizer"] = Tensor | None  # a number never gets here: see `fold_normalizer`
    return types


def flattened(function: Callable[..., Any], like: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """Return the function of flat arguments, with a signature that a schema can be inferred from.

    Args:
        function: takes objects.
        like: the function whose annotations name them, where `function` has none.
    """
    hints = get_type_hints(like or function)
    parameters: list[inspect.Parameter] = []
    arguments: list[str] = []  # of `function`, as source
    builders: dict[str, Any] = {"_function": function}
    for name in inspect.signature(like or function).parameters:
        kind = hints[name]
        types = _field_types(kind)
        for field, annotation in ({name: kind} if types is None else types).items():
            parameters.append(inspect.Parameter(field, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=annotation))
        if types is None:
            arguments.append(name)
        else:
            builders[f"_{name}"] = LossOptions.from_values if kind is LossOptions else kind
            arguments.append(f"_{name}({', '.join(types)})")

    # Source, as dataclasses build __init__: a loop over slices of the values takes 3 microseconds more a call.
    call = eval(f"lambda {', '.join(p.name for p in parameters)}: _function({', '.join(arguments)})", builders)
    returned = None if hints["return"] is type(None) else hints["return"]
    call.__signature__ = inspect.Signature(parameters, return_annotation=returned)
    return call


def operator(*, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Register a function as an operator of its name, on any device, without a derivative.

    Args:
        fake: takes the same objects; returns empty tensors of the shapes and dtypes that the function returns.
    """

    def register(function: Callable[..., Any]) -> Any:
        name, flat = f"mtp_ce::{function.__name__}", flattened(function)
        torch.library.define(name, torch.library.infer_schema(flat, mutates_args=()), tags=COMPILES)
        torch.library.impl(name, "default", flat)
        torch.library.register_fake(name, flattened(fake, like=function))
        return getattr(torch.ops.mtp_ce, function.__name__).default

    return register


def mutating_operator(mutated: str) -> Callable[[Callable[..., None]], Any]:
    """Register a function that writes over an argument: torch then also moves that argument's version on."""

    def register(function: Callable[..., None]) -> Any:
        flat = flattened(function)
        schema = torch.library.infer_schema(flat, mutates_args=(mutated,))
        return torch.library.custom_op(f"mtp_ce::{function.__name__}", flat, mutates_args=(mutated,), schema=schema)

    return register


def differentiable(function: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
    """Return a function that applies a torch.autograd.Function, ready for torch.compile.

    Under torch.compile it is an operator of its name, which goes into the graph whole and is taken apart there; eagerly
    it is what it was.
    """
    name, flat = f"mtp_ce::{function.__name__}", flattened(function)
    torch.library.define(name, torch.library.infer_schema(flat, mutates_args=()), tags=COMPILES)
    torch.library.impl(name, "CompositeImplicitAutograd", flat)
    whole = getattr(torch.ops.mtp_ce, function.__name__).default

    def call(*arguments: Any) -> list[Tensor]:
        if not torch.compiler.is_compiling():
            return function(*arguments)
        values: list[Any] = []
        for argument in arguments:
            if isinstance(argument, LossOptions):
                values.extend(argument.values())
            elif isinstance(argument, tuple):
                values.extend(argument)
            else:
                values.append(argument)
        return whole(*values)

    return call


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError("The loss has no second derivative: its gradient was computed with create_graph=True.")


def once_differentiable(gradients: Callable[..., tuple[Any, ...]], *arguments: Any) -> tuple[Any, ...]:
    """Return what `gradients` returns; under create_graph it depends on the tensors of the arguments, and raises."""
    return _Once.apply(gradients, *arguments) if torch.is_grad_enabled() else gradients(*arguments)
