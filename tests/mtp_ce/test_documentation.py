"""The documentation runs, and the shapes in the signature are the shapes of the tensors."""

import doctest
import inspect
from collections.abc import Sequence
from types import ModuleType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from torch import Tensor

import mtp_ce.linear
import mtp_ce.loss
from mtp_ce import MTPLoss, MTPStats, WeightedMTPLoss, token_ce, weighted_mtp_ce, weighted_mtp_linear_ce


@pytest.mark.parametrize("module", [mtp_ce.loss, mtp_ce.linear], ids=["loss", "linear"])
def test_examples_in_the_docstrings_run(module: ModuleType) -> None:
    """Every `>>>` of the public functions."""
    results = doctest.testmod(module)
    assert results.attempted >= 6
    assert results.failed == 0


@pytest.mark.parametrize("documented", [weighted_mtp_ce, WeightedMTPLoss, weighted_mtp_linear_ce, token_ce])
def test_every_argument_is_documented(documented: Any) -> None:
    """By name, in the docstring's Args."""
    text = inspect.getdoc(documented)
    assert text is not None
    for name in inspect.signature(documented).parameters:
        assert f"{name}: " in text, name


@pytest.fixture
def hints() -> dict[str, Any]:
    """The annotations of the public functions, which are strings until jaxtyping is there to read them."""
    jaxtyping = pytest.importorskip("jaxtyping")
    names = {name: getattr(jaxtyping, name) for name in ("Bool", "Float", "Int")}
    known = {**vars(mtp_ce.loss), **vars(mtp_ce.linear), **names}
    return {
        "call": get_type_hints(weighted_mtp_ce, known),
        "linear": get_type_hints(weighted_mtp_linear_ce, known),
        "token_ce": get_type_hints(token_ce, known),
        "module": get_type_hints(WeightedMTPLoss.forward, known),
        "stats": get_type_hints(MTPStats, known),
    }


def fits(value: Any, hint: Any) -> bool:
    """Is value of the annotated type? Names of dimensions are those bound around the call."""
    members = get_args(hint)
    if get_origin(hint) is Sequence:
        return isinstance(value, (list, tuple)) and all(fits(item, members[0]) for item in value)
    if get_origin(hint) is Literal:
        return value in members
    if members:
        return any(fits(value, member) for member in members)
    return isinstance(value, hint)


def shapes_agree(arguments: dict[str, Any], hints: dict[str, Any]) -> bool:
    """All arguments fit their annotations at once, with one B, S, H, V."""
    from jaxtyping import jaxtyped

    with jaxtyped("context"):
        return all(fits(value, hints[name]) for name, value in arguments.items())


B, S, H, D, V = 2, 5, 3, 7, 11
CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "weights": {"token_weights": torch.ones(B, S)},
    "row_weights": {"token_weights": torch.ones(B, S, H)},
    "list": {"logits": [torch.zeros(B, S, V) for _ in range(H)]},
    "everything": {
        "token_weights": torch.ones(B, S).bfloat16(), "head_weights": torch.ones(H), "normalizer": torch.tensor(4.0),
        "seq_lens": torch.tensor([5, 3]), "document_ids": torch.zeros(B, S, dtype=torch.int32), "softcap": 3.0,
    },
    "none": {"reduction": "none"},
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_annotated_shapes_are_the_shapes_that_work(hints, name: str) -> None:
    """What the signature admits is admitted, and what comes back has the annotated shape."""
    from jaxtyping import jaxtyped

    arguments = {"logits": torch.zeros(B, S, H, V), "labels": torch.zeros(B, S, dtype=torch.int64), **CALLS[name]}
    assert shapes_agree(arguments, hints["call"])
    result = weighted_mtp_ce(**arguments, return_stats=True)
    assert isinstance(result, MTPLoss)
    with jaxtyped("context"):
        assert fits(arguments["labels"], hints["call"]["labels"])
        for field, value in result.stats._asdict().items():
            assert fits(value, hints["stats"][field]), field
    known = inspect.signature(WeightedMTPLoss.forward).parameters
    assert shapes_agree({key: value for key, value in arguments.items() if key in known}, hints["module"])


@pytest.mark.parametrize(
    "spoiled",
    [
        {"labels": torch.zeros(B + 1, S, dtype=torch.int64)},
        {"labels": torch.zeros(B, S)},
        {"token_weights": torch.ones(B)},
        {"head_weights": torch.ones(H + 1)},
        {"seq_lens": torch.zeros(B + 1, dtype=torch.int64)},
        {"document_ids": torch.zeros(S, dtype=torch.int64)},
        {"normalizer": torch.ones(1)},
    ],
    ids=lambda spoiled: next(iter(spoiled)),
)
def test_annotated_shapes_refuse_what_the_function_refuses(hints, spoiled: dict[str, Tensor]) -> None:
    """The annotation and the check say the same."""
    arguments = {"logits": torch.zeros(B, S, H, V), "labels": torch.zeros(B, S, dtype=torch.int64), **spoiled}
    assert not shapes_agree(arguments, hints["call"])
    with pytest.raises((TypeError, ValueError)):
        weighted_mtp_ce(**arguments)


LINEAR_CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "list": {"hidden": [torch.zeros(B, S, D) for _ in range(H)]},
    "everything": {
        "token_weights": torch.ones(B, S), "bias": torch.zeros(V), "chunk_bytes": 10**6, "grad_dtype": torch.float64,
        "drop_dead_rows": 12, "head_weights": torch.ones(H), "seq_lens": torch.tensor([5, 3]), "softcap": 3.0,
        "document_ids": torch.zeros(B, S, dtype=torch.int32), "normalizer": torch.tensor(4.0),
        "logits_dtype": torch.float32,
    },
    "words": {"drop_dead_rows": "auto", "reduction": "none"},
    "flags": {"drop_dead_rows": False, "validate": True},
}  # fmt: skip


def linear_arguments(**spoiled: Any) -> dict[str, Any]:
    labels = torch.zeros(B, S, dtype=torch.int64)
    return {"hidden": torch.zeros(B, S, H, D), "unembed": torch.zeros(V, D), "labels": labels, **spoiled}


@pytest.mark.parametrize("name", LINEAR_CALLS)
def test_annotated_shapes_of_the_linear_path_are_the_shapes_that_work(hints, name: str) -> None:
    """One B, S, H, D, V for all arguments; token_ce takes those that it names, and gives what it says."""
    arguments = linear_arguments(**LINEAR_CALLS[name])
    assert shapes_agree(arguments, hints["linear"])
    result = weighted_mtp_linear_ce(**arguments, return_stats=True)
    assert isinstance(result, MTPLoss)
    known = inspect.signature(token_ce).parameters
    arguments = {key: value for key, value in arguments.items() if key in known}
    assert shapes_agree(arguments, hints["token_ce"])
    assert shapes_agree({**arguments, "return": token_ce(**arguments)}, hints["token_ce"])


@pytest.mark.parametrize(
    "spoiled",
    [
        {"unembed": torch.zeros(D, V)},
        {"unembed": torch.zeros(V, D, 1)},
        {"bias": torch.zeros(V + 1)},
        {"bias": torch.zeros(D)},
        {"labels": torch.zeros(B + 1, S, dtype=torch.int64)},
        {"chunk_bytes": 1.5},
        {"drop_dead_rows": "all"},
        {"grad_dtype": "float32"},
        {"logits_dtype": "float32"},
    ],
    ids=lambda spoiled: next(iter(spoiled)),
)
def test_annotated_shapes_of_the_linear_path_refuse_what_the_function_refuses(hints, spoiled: dict[str, Any]) -> None:
    """The annotation and the check say the same."""
    arguments = linear_arguments(**spoiled)
    assert not shapes_agree(arguments, hints["linear"])
    with pytest.raises((TypeError, ValueError)):
        weighted_mtp_linear_ce(**arguments)


def test_both_paths_and_the_overloads_name_the_same_options() -> None:
    """What weighted_mtp_ce takes, the linear path takes, but for overwriting logits; with the same defaults."""
    logits, linear = (inspect.signature(function).parameters for function in (weighted_mtp_ce, weighted_mtp_linear_ce))
    assert set(logits) - set(linear) == {"logits", "inplace_backward"}
    assert set(linear) - set(logits) == {
        "hidden", "unembed", "bias", "chunk_bytes", "grad_dtype", "logits_dtype", "drop_dead_rows"
    }  # fmt: skip
    for name in set(logits) & set(linear):
        assert logits[name].default == linear[name].default, name
        assert logits[name].kind == linear[name].kind, name
    options = mtp_ce.linear.LinearOptions.__optional_keys__
    assert options == {name for name in linear if linear[name].kind is inspect.Parameter.KEYWORD_ONLY} - {
        "return_stats"
    }
    alone = inspect.signature(token_ce).parameters
    for name in set(alone):
        assert alone[name].default == linear[name].default, name
