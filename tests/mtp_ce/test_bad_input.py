"""Bad input: an error that names the argument and what was expected, before anything is computed."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mtp_ce import weighted_mtp_ce

B, S, H, V = 2, 5, 3, 11
NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def nothing_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reaching an implementation fails the test."""

    def reached(*_: Any, **__: Any) -> None:
        raise AssertionError("bad input reached the implementation")

    monkeypatch.setattr("mtp_ce.loss.logits_forward", reached)
    monkeypatch.setattr("mtp_ce.loss.reference_weighted_mtp_ce", reached)


def good() -> dict[str, Any]:
    """Arguments that are right; each row of the tables below spoils some."""
    return {"logits": torch.zeros(B, S, H, V), "labels": torch.zeros(B, S, dtype=torch.int64)}


def leaf(*shape: int) -> Tensor:
    return torch.zeros(shape, requires_grad=True)


def layer(*shape: int) -> Tensor:
    """What a layer returns: no leaf, but with a gradient."""
    return leaf(*shape) * 1


# (what is spoiled, the error, what its message says)
SHAPES: dict[str, tuple[Callable[[], dict[str, Any]], type[Exception], str]] = {
    "logits_2d": (lambda: {"logits": torch.zeros(S, V)}, ValueError, r"logits is \[5, 11\]; expected \[B, S, H, V\]"),
    "logits_5d": (lambda: {"logits": torch.zeros(1, B, S, H, V)}, ValueError, "logits is .*expected"),
    "head_4d": (lambda: {"logits": [torch.zeros(B, S, 1, V)] * 2}, ValueError, r"logits\[0\] is .*expected \[B, S, V\]"),
    "heads_of_two_shapes": (
        lambda: {"logits": [torch.zeros(B, S, V), torch.zeros(B, S, V + 1)]}, ValueError, r"logits\[1\] is .*expected",
    ),
    "heads_of_two_dtypes": (
        lambda: {"logits": [torch.zeros(B, S, V), torch.zeros(B, S, V).bfloat16()]}, ValueError, r"logits\[1\] is .*expected",
    ),
    "no_heads": (lambda: {"logits": torch.zeros(B, S, 0, V)}, ValueError, "logits has H = 0 heads; expected"),
    "empty_list": (lambda: {"logits": []}, ValueError, "logits has H = 0 heads; expected"),
    "no_vocabulary": (lambda: {"logits": torch.zeros(B, S, H, 0)}, ValueError, "logits is .*V = 0; expected"),
    "no_vocabulary_in_a_list": (lambda: {"logits": [torch.zeros(B, S, 0)]}, ValueError, "V = 0; expected"),
    "labels_1d": (lambda: {"labels": torch.zeros(S).long()}, ValueError, r"labels is \[5\]; expected \[B, S\] = \[2, 5\]"),
    "labels_of_another_batch": (lambda: {"labels": torch.zeros(B + 1, S).long()}, ValueError, "labels is .*expected"),
    "labels_of_another_length": (lambda: {"labels": torch.zeros(B, S + 1).long()}, ValueError, "labels is .*expected"),
    "labels_by_head": (lambda: {"labels": torch.zeros(B, S, H).long()}, ValueError, "labels is .*expected"),
    "weights_by_sequence": (lambda: {"token_weights": torch.ones(B)}, ValueError, "token_weights is .*expected"),
    "weights_of_another_length": (lambda: {"token_weights": torch.ones(B, S - 1)}, ValueError, "token_weights is .*expected"),
    "weights_of_another_horizon": (
        lambda: {"token_weights": torch.ones(B, S, H + 1)}, ValueError, r"token_weights is .*\[B, S, H\] = \[2, 5, 3\]",
    ),
    "weights_by_vocabulary": (lambda: {"token_weights": torch.ones(B, S, H, V)}, ValueError, "token_weights is .*expected"),
    "head_weights_too_many": (lambda: {"head_weights": torch.ones(H + 1)}, ValueError, "head_weights is .*expected"),
    "head_weights_2d": (lambda: {"head_weights": torch.ones(1, H)}, ValueError, "head_weights is .*expected"),
    "head_weights_0d": (lambda: {"head_weights": torch.ones(())}, ValueError, "head_weights is .*expected"),
    "seq_lens_2d": (lambda: {"seq_lens": torch.ones(B, 1).long()}, ValueError, "seq_lens is .*expected"),
    "seq_lens_of_another_batch": (lambda: {"seq_lens": torch.ones(B + 1).long()}, ValueError, "seq_lens is .*expected"),
    "document_ids_1d": (lambda: {"document_ids": torch.ones(S).long()}, ValueError, "document_ids is .*expected"),
    "normalizer_1d": (lambda: {"normalizer": torch.ones(1)}, ValueError, "normalizer is .*expected a 0-d tensor"),
}  # fmt: skip

TYPES: dict[str, tuple[Callable[[], dict[str, Any]], type[Exception], str]] = {
    "logits_None": (lambda: {"logits": None}, TypeError, "logits is NoneType; expected"),
    "logits_text": (lambda: {"logits": "logits"}, TypeError, "logits is str; expected"),
    "logits_of_numbers": (lambda: {"logits": [1.0, 2.0]}, TypeError, r"logits\[0\] is float; expected"),
    "logits_int": (lambda: {"logits": torch.zeros(B, S, H, V).int()}, TypeError, "logits is torch.int32; expected a floating"),
    "logits_bool": (lambda: {"logits": torch.zeros(B, S, H, V).bool()}, TypeError, "logits is torch.bool; expected"),
    "logits_complex": (lambda: {"logits": torch.zeros(B, S, H, V) * 1j}, TypeError, "logits is torch.complex64; expected"),
    "logits_float8": (
        lambda: {"logits": torch.zeros(B, S, H, V).to(torch.float8_e4m3fn)}, TypeError, "logits is torch.float8_e4m3fn; expected",
    ),
    "labels_float": (lambda: {"labels": torch.zeros(B, S)}, TypeError, "labels is torch.float32; expected an integer"),
    "labels_bool": (lambda: {"labels": torch.zeros(B, S).bool()}, TypeError, "labels is torch.bool; expected an integer"),
    "labels_list": (lambda: {"labels": [[0] * S] * B}, TypeError, "labels is list; expected a torch.Tensor"),
    "labels_None": (lambda: {"labels": None}, TypeError, "labels is NoneType; expected"),
    "weights_int": (lambda: {"token_weights": torch.ones(B, S).int()}, TypeError, "token_weights is torch.int32; expected"),
    "weights_bool": (lambda: {"token_weights": torch.ones(B, S).bool()}, TypeError, "token_weights is torch.bool; expected"),
    "weights_number": (lambda: {"token_weights": 1.0}, TypeError, "token_weights is float; expected"),
    "head_weights_list": (lambda: {"head_weights": [1.0] * H}, TypeError, "head_weights is list; expected"),
    "head_weights_int": (lambda: {"head_weights": torch.ones(H).int()}, TypeError, "head_weights is torch.int32; expected"),
    "head_weights_learned": (lambda: {"head_weights": leaf(H)}, ValueError, "head_weights requires a gradient"),
    "seq_lens_float": (lambda: {"seq_lens": torch.ones(B)}, TypeError, "seq_lens is torch.float32; expected"),
    "seq_lens_list": (lambda: {"seq_lens": [S] * B}, TypeError, "seq_lens is list; expected"),
    "document_ids_float": (lambda: {"document_ids": torch.ones(B, S)}, TypeError, "document_ids is torch.float32; expected"),
    "normalizer_text": (lambda: {"normalizer": "mean"}, TypeError, "normalizer is str; expected"),
    "normalizer_bool": (lambda: {"normalizer": True}, TypeError, "normalizer is bool; expected"),
    "normalizer_learned": (lambda: {"normalizer": leaf()}, ValueError, "normalizer requires a gradient"),
    "shift_float": (lambda: {"shift": 1.0}, TypeError, "shift is float; expected"),
    "shift_bool": (lambda: {"shift": True}, TypeError, "shift is bool; expected"),
    "shift_tensor": (lambda: {"shift": torch.tensor(1)}, TypeError, "shift is Tensor; expected"),
    "ignore_index_float": (lambda: {"ignore_index": -100.0}, TypeError, "ignore_index is float; expected"),
    "ignore_index_None": (lambda: {"ignore_index": None}, TypeError, "ignore_index is NoneType; expected"),
    "softcap_text": (lambda: {"softcap": "30"}, TypeError, "softcap is str; expected"),
    "softcap_bool": (lambda: {"softcap": True}, TypeError, "softcap is bool; expected"),
    "z_loss_None": (lambda: {"z_loss": None}, TypeError, "z_loss is NoneType; expected"),
    "loss_scale_tensor": (lambda: {"loss_scale": torch.tensor(1.0)}, TypeError, "loss_scale is Tensor; expected"),
    "inplace_number": (lambda: {"inplace_backward": 1}, TypeError, "inplace_backward is int; expected"),
    "validate_text": (lambda: {"validate": "no"}, TypeError, "validate is str; expected"),
    "return_stats_text": (lambda: {"return_stats": "no"}, TypeError, "return_stats is str; expected"),
}  # fmt: skip

VALUES: dict[str, tuple[Callable[[], dict[str, Any]], type[Exception], str]] = {
    "shift_negative": (lambda: {"shift": -1}, ValueError, "shift is -1; expected"),
    "softcap_0": (lambda: {"softcap": 0.0}, ValueError, "softcap is 0.0; expected a number above 0"),
    "softcap_negative": (lambda: {"softcap": -30.0}, ValueError, "softcap is -30.0; expected"),
    "softcap_nan": (lambda: {"softcap": NAN}, ValueError, "softcap is nan; expected"),
    "softcap_inf": (lambda: {"softcap": INF}, ValueError, "softcap is inf; expected"),
    "z_loss_negative": (lambda: {"z_loss": -1e-4}, ValueError, "z_loss is -0.0001; expected"),
    "z_loss_nan": (lambda: {"z_loss": NAN}, ValueError, "z_loss is nan; expected"),
    "label_smoothing_negative": (lambda: {"label_smoothing": -0.1}, ValueError, "label_smoothing is -0.1; expected"),
    "label_smoothing_1": (lambda: {"label_smoothing": 1.0}, ValueError, "label_smoothing is 1.0; expected"),
    "loss_scale_inf": (lambda: {"loss_scale": INF}, ValueError, "loss_scale is inf; expected"),
    "normalizer_0": (lambda: {"normalizer": 0}, ValueError, "normalizer is 0; expected"),
    "normalizer_negative": (lambda: {"normalizer": -3.0}, ValueError, "normalizer is -3.0; expected"),
    "normalizer_nan": (lambda: {"normalizer": NAN}, ValueError, "normalizer is nan; expected"),
    "reduction_unknown": (lambda: {"reduction": "avg"}, ValueError, "reduction is 'avg'; expected one of 'mean'"),
    "reduction_None": (lambda: {"reduction": None}, ValueError, "reduction is None; expected one of"),
    "alignment_unknown": (lambda: {"weight_alignment": "token"}, ValueError, "weight_alignment is 'token'; expected one of"),
    "head_reduction_unknown": (lambda: {"head_reduction": "mean"}, ValueError, "head_reduction is 'mean'; expected one of"),
    "impl_unknown": (lambda: {"impl": "cuda"}, ValueError, "impl is 'cuda'; expected one of"),
    # Options that exclude each other.
    "horizon_and_head_weights": (
        lambda: {"head_reduction": "horizon", "head_weights": torch.ones(H)}, ValueError, "head_reduction is 'horizon' and head_weights",
    ),
    "normalizer_with_sum": (lambda: {"normalizer": 2.0, "reduction": "sum"}, ValueError, "normalizer .*expected reduction='mean'"),
    "normalizer_with_none": (
        lambda: {"normalizer": torch.tensor(2.0), "reduction": "none"}, ValueError, "normalizer .*expected reduction='mean'",
    ),
    "row_weights_by_target": (
        lambda: {"token_weights": torch.ones(B, S, H), "weight_alignment": "target"}, ValueError, "weight_alignment is 'target' and token_weights",
    ),
    "inplace_reference": (
        lambda: {"logits": layer(B, S, H, V), "inplace_backward": True, "impl": "reference"}, ValueError, "inplace_backward .*impl='reference'",
    ),
    # In place, over memory that is not the loss's to overwrite.
    "inplace_leaf": (
        lambda: {"logits": leaf(B, S, H, V), "inplace_backward": True}, ValueError, "inplace_backward .*leaf.*expected",
    ),
    "inplace_leaf_in_a_list": (
        lambda: {"logits": [layer(B, S, V), leaf(B, S, V)], "inplace_backward": True}, ValueError, "inplace_backward .*leaf",
    ),
    "inplace_view_of_a_leaf": (
        lambda: {"logits": leaf(B, S, H * V).view(B, S, H, V), "inplace_backward": True}, ValueError, "inplace_backward .*leaf",
    ),
    "inplace_expanded": (
        lambda: {"logits": layer(B, S, 1, V).expand(B, S, H, V), "inplace_backward": True}, ValueError, "inplace_backward .*expanded",
    ),
    "inplace_one_tensor_twice": (
        lambda: {"logits": [layer(B, S, V)] * 2, "inplace_backward": True}, ValueError, "inplace_backward .*two heads",
    ),
    "inplace_overlapping_heads": (
        lambda: {"logits": [(x := layer(B, S, V + 1))[..., :-1], x[..., 1:]], "inplace_backward": True}, ValueError, "inplace_backward",
    ),
    # What only a look at the values tells: validate=True.
    "validated_normalizer_0": (lambda: {"normalizer": torch.tensor(0.0), "validate": True}, ValueError, "normalizer is 0.0; expected"),
    "validated_normalizer_nan": (lambda: {"normalizer": torch.tensor(NAN), "validate": True}, ValueError, "normalizer is nan; expected"),
    "validated_lengths_too_long": (
        lambda: {"seq_lens": torch.tensor([S, S + 1]), "validate": True}, ValueError, r"seq_lens\[1\] is 6; expected .*\[0, 5\]",
    ),
    "validated_lengths_negative": (
        lambda: {"seq_lens": torch.tensor([-1, S]), "validate": True}, ValueError, r"seq_lens\[0\] is -1; expected",
    ),
    "validated_weight_nan": (
        lambda: {"token_weights": torch.tensor([[1.0] * S, [1, 1, NAN, 1, 1]]), "validate": True}, ValueError, r"token_weights\[1, 2\] is nan; expected",
    ),
    "validated_weight_inf": (
        lambda: {"token_weights": torch.full((B, S, H), -INF), "validate": True}, ValueError, r"token_weights\[0, 0, 0\] is -inf; expected",
    ),
    "validated_head_weight_nan": (
        lambda: {"head_weights": torch.tensor([1.0, NAN, 1.0]), "validate": True}, ValueError, r"head_weights\[1\] is nan; expected",
    ),
    "validated_label_too_large": (
        lambda: {"labels": torch.full((B, S), V), "validate": True}, IndexError, r"labels\[0, 1\] is 11; expected .*\[0, 11\)",
    ),
    "validated_label_negative": (
        lambda: {"labels": torch.full((B, S), -1), "validate": True}, IndexError, r"labels\[0, 1\] is -1; expected ignore_index \(-100\)",
    ),
}  # fmt: skip

DEVICES: dict[str, tuple[Callable[[], dict[str, Any]], type[Exception], str]] = {
    "labels": (lambda: {"labels": torch.zeros(B, S, device="meta").long()}, ValueError, "labels is on meta; expected cpu"),
    "token_weights": (lambda: {"token_weights": torch.ones(B, S, device="meta")}, ValueError, "token_weights is on meta; expected cpu"),
    "head_weights": (lambda: {"head_weights": torch.ones(H, device="meta")}, ValueError, "head_weights is on meta; expected cpu"),
    "seq_lens": (lambda: {"seq_lens": torch.ones(B, device="meta").long()}, ValueError, "seq_lens is on meta; expected cpu"),
    "document_ids": (lambda: {"document_ids": torch.ones(B, S, device="meta").long()}, ValueError, "document_ids is on meta; expected cpu"),
    "normalizer": (lambda: {"normalizer": torch.ones((), device="meta")}, ValueError, "normalizer is on meta; expected cpu"),
    "heads": (
        lambda: {"logits": [torch.zeros(B, S, V), torch.zeros(B, S, V, device="meta")]}, ValueError, r"logits\[1\] is .*meta; expected .*cpu",
    ),
    "impl_cpu_elsewhere": (
        lambda: {"logits": torch.zeros(B, S, H, V, device="meta"), "labels": torch.zeros(B, S, device="meta").long(), "impl": "cpu"},
        ValueError, "impl is 'cpu' and logits is on meta; expected CPU tensors",
    ),
    "triton_float64": (lambda: {"logits": torch.zeros(B, S, H, V).double(), "impl": "triton"}, (TypeError, ValueError), "logits is .*expected"),
}  # fmt: skip

TABLE = {f"{kind}-{name}": row for kind, rows in
         {"shape": SHAPES, "type": TYPES, "value": VALUES, "device": DEVICES}.items() for name, row in rows.items()}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_bad_input_is_named_before_anything_is_computed(name: str) -> None:
    """The argument, what came, what was expected."""
    spoil, error, message = TABLE[name]
    with pytest.raises(error, match=message):
        weighted_mtp_ce(**{**good(), **spoil()})


def test_a_mistake_is_not_excused_by_an_empty_batch() -> None:
    """B = 0 takes the same checks."""
    with pytest.raises(ValueError, match="labels is"):
        weighted_mtp_ce(torch.zeros(0, S, H, V), torch.zeros(0, S + 1, dtype=torch.int64))


def test_arguments_after_the_third_are_keywords() -> None:
    """A fourth positional argument would be read as something else one day."""
    with pytest.raises(TypeError, match="positional"):
        weighted_mtp_ce(*good().values(), None, 1)
    with pytest.raises(TypeError, match="weight"):
        weighted_mtp_ce(**good(), weight=torch.ones(B, S))


@pytest.fixture(scope="module")
def shard() -> Iterator[Callable[[Tensor], Tensor]]:
    """A tensor as a DTensor on a mesh of one process."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    yield lambda tensor: distribute_tensor(tensor, mesh, [Replicate()])
    dist.destroy_process_group()


TENSORS: dict[str, Callable[[], Tensor]] = {
    "logits": lambda: torch.zeros(B, S, H, V),
    "labels": lambda: torch.zeros(B, S, dtype=torch.int64),
    "token_weights": lambda: torch.ones(B, S),
    "head_weights": lambda: torch.ones(H),
    "seq_lens": lambda: torch.full((B,), S),
    "document_ids": lambda: torch.zeros(B, S, dtype=torch.int64),
    "normalizer": lambda: torch.ones(()),
}


@pytest.mark.parametrize("name", [*TENSORS, "logits[1]"])
def test_a_dtensor_is_told_what_to_do(name: str, shard) -> None:
    """Named, with the way out, for every tensor argument."""
    if name == "logits[1]":
        spoiled: dict[str, Any] = {"logits": [torch.zeros(B, S, V), shard(torch.zeros(B, S, V))]}
    else:
        spoiled = {name: shard(TENSORS[name]())}
    with pytest.raises(TypeError, match=name.replace("[", r"\[") + r" is a DTensor; expected a plain tensor.*to_local"):
        weighted_mtp_ce(**{**good(), **spoiled})


WITHOUT_INTERPRETER = """
import torch
from mtp_ce import weighted_mtp_ce
try:
    weighted_mtp_ce(torch.zeros(1, 2, 1, 3), torch.zeros(1, 2, dtype=torch.int64), impl="triton")
except ValueError as error:
    print(error)
"""


def test_triton_on_cpu_tensors_without_the_interpreter_says_why_not() -> None:
    """It names the argument, the variable that would help and the implementations that run here."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_INTERPRETER], env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    assert "impl is 'triton'" in run.stdout
    assert "expected a GPU, or TRITON_INTERPRET=1" in run.stdout
    assert "'cpu'" in run.stdout
