"""The documentation runs, and the shapes in the signature are the shapes of the tensors."""

import doctest
import inspect
from collections.abc import Sequence
from typing import Any, get_args, get_origin, get_type_hints

import pytest
import torch
from torch import Tensor

import mtp_ce.loss
from mtp_ce import MTPLoss, MTPStats, WeightedMTPLoss, weighted_mtp_ce


def test_examples_in_the_docstrings_run() -> None:
    """Every `>>>` of mtp_ce/loss.py."""
    results = doctest.testmod(mtp_ce.loss)
    assert results.attempted >= 6
    assert results.failed == 0


@pytest.mark.parametrize("documented", [weighted_mtp_ce, WeightedMTPLoss])
def test_every_argument_is_documented(documented: Any) -> None:
    """By name, in the docstring's Args."""
    text = inspect.getdoc(documented)
    assert text is not None
    for name in inspect.signature(documented).parameters:
        assert f"{name}: " in text, name


@pytest.fixture
def hints() -> dict[str, Any]:
    """The annotations of weighted_mtp_ce, which are strings until jaxtyping is there to read them."""
    jaxtyping = pytest.importorskip("jaxtyping")
    names = {name: getattr(jaxtyping, name) for name in ("Bool", "Float", "Int")}
    known = {**vars(mtp_ce.loss), **names}
    return {
        "call": get_type_hints(weighted_mtp_ce, known),
        "module": get_type_hints(WeightedMTPLoss.forward, known),
        "stats": get_type_hints(MTPStats, known),
    }


def fits(value: Any, hint: Any) -> bool:
    """Is value of the annotated type? Names of dimensions are those bound around the call."""
    members = get_args(hint)
    if get_origin(hint) is Sequence:
        return isinstance(value, (list, tuple)) and all(fits(item, members[0]) for item in value)
    if members:
        return any(fits(value, member) for member in members)
    return isinstance(value, hint)


def shapes_agree(arguments: dict[str, Any], hints: dict[str, Any]) -> bool:
    """All arguments fit their annotations at once, with one B, S, H, V."""
    from jaxtyping import jaxtyped

    with jaxtyped("context"):
        return all(fits(value, hints[name]) for name, value in arguments.items())


B, S, H, V = 2, 5, 3, 11
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
        {"labels": torch.zeros(B, S + 1, dtype=torch.int64)},
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
