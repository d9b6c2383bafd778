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
from torch.utils.flop_counter import register_flop_formula

from mtp_ce.options import LossInputs, LossOptions

COMPILES = torch.Tag.pt2_compliant_tag
NO_TRANSFORMS = (
    "The loss is called inside a transform of torch.func (grad, vjp, vmap, jvp, ...); expected a call outside of them: "
    "differentiate with loss.backward() or torch.autograd.grad, or pass impl='reference', which grad and vjp take."
)


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


def _without_autocast(name: str) -> None:
    """Switch torch.autocast off inside an operator, whose arguments have the dtypes that it computes in."""
    operator = getattr(torch.ops.mtp_ce, name.partition("::")[2]).default

    def run(*arguments: Any, **keywords: Any) -> Any:
        with torch._C._DisableAutocast():
            return operator(*arguments, **keywords)

    # Kernels of these keys are called where autocast is on, so that it costs nothing where it is off.
    torch.library.impl(name, ("AutocastCPU", "AutocastCUDA"), run)


def operator(
    *, fake: Callable[..., Any], flops: Callable[..., int] | None = None
) -> Callable[[Callable[..., Any]], Any]:
    """Register a function as an operator of its name, on any device, without a derivative and without autocast.

    Args:
        fake: takes the same objects; returns empty tensors of the shapes and dtypes that the function returns.
        flops: takes the same objects; returns the floating-point operations that torch's FlopCounterMode counts.
    """

    def register(function: Callable[..., Any]) -> Any:
        name, flat = f"mtp_ce::{function.__name__}", flattened(function)
        torch.library.define(name, torch.library.infer_schema(flat, mutates_args=()), tags=COMPILES)
        torch.library.impl(name, "default", flat)
        torch.library.register_fake(name, flattened(fake, like=function))
        _without_autocast(name)
        packet = getattr(torch.ops.mtp_ce, function.__name__)
        if flops is not None:
            count = flattened(flops, like=function)
            register_flop_formula(packet, get_raw=True)(lambda *arguments, out_val: count(*arguments))
        return packet.default

    return register


def mutating_operator(mutated: str) -> Callable[[Callable[..., None]], Any]:
    """Register a function that writes over an argument: torch then also moves that argument's version on."""

    def register(function: Callable[..., None]) -> Any:
        flat = flattened(function)
        schema = torch.library.infer_schema(flat, mutates_args=(mutated,))
        name = f"mtp_ce::{function.__name__}"
        whole = torch.library.custom_op(name, flat, mutates_args=(mutated,), schema=schema)
        _without_autocast(name)
        return whole

    return register


def differentiable(function: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
    """Return a function that applies a torch.autograd.Function, ready for torch.compile.

    Under torch.compile it is an operator of its name, which goes into the graph whole and is taken apart there; eagerly
    it is what it was.
    """

    def eager(*arguments: Any) -> list[Tensor]:
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError(NO_TRANSFORMS)
        return function(*arguments)

    name, flat = f"mtp_ce::{function.__name__}", flattened(eager, like=function)
    torch.library.define(name, torch.library.infer_schema(flat, mutates_args=()), tags=COMPILES)
    torch.library.impl(name, "CompositeImplicitAutograd", flat)
    whole = getattr(torch.ops.mtp_ce, function.__name__).default

    def call(*arguments: Any) -> list[Tensor]:
        if not torch.compiler.is_compiling():
            return eager(*arguments)
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


class Loss(torch.autograd.Function):
    """A loss without a forward-mode derivative, which says so."""

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        """Raise a RuntimeError."""
        raise RuntimeError("The loss has no forward-mode derivative; expected loss.backward() or torch.autograd.grad.")


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
