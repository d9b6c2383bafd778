"""Bad input: an error that names the argument and what was expected, before anything is computed."""

import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from mtp_ce import token_ce, weighted_mtp_ce, weighted_mtp_linear_ce

B, S, H, D, V = 2, 5, 3, 7, 11
NAN, INF = float("nan"), float("inf")
INPLACE, TRITON = {"inplace_backward": True}, {"impl": "triton"}


@pytest.fixture(autouse=True)
def nothing_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reaching an implementation fails the test."""

    def reached(*_: Any, **__: Any) -> None:
        raise AssertionError("bad input reached the implementation")

    monkeypatch.setattr("mtp_ce.loss.logits_loss", reached)
    monkeypatch.setattr("mtp_ce.loss.reference_weighted_mtp_ce", reached)
    monkeypatch.setattr("mtp_ce.linear.linear_loss", reached)
    monkeypatch.setattr("mtp_ce.linear.F.linear", reached)


def f32(*shape: int) -> Tensor:
    return torch.zeros(shape)


def i64(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64)


def leaf(*shape: int) -> Tensor:
    return torch.zeros(shape, requires_grad=True)


def zero3_shard(*shape: int) -> Tensor:
    """A parameter between two uses under DeepSpeed's ZeRO-3: no elements, and its shape beside it."""
    shard = torch.nn.Parameter(torch.empty(0))
    shard.ds_id, shard.ds_shape = 3, torch.Size(shape)
    return shard


def layer(*shape: int) -> Tensor:
    """What a layer returns: no leaf, but with a gradient."""
    return leaf(*shape) * 1


def good() -> dict[str, Any]:
    """Arguments that are right; each row of the tables below spoils some."""
    return {"logits": f32(B, S, H, V), "labels": i64(B, S)}


def good_linear() -> dict[str, Any]:
    """The same of the linear path."""
    return {"hidden": f32(B, S, H, D), "unembed": f32(V, D), "labels": i64(B, S)}


Row = tuple[str, Callable[[], dict[str, Any]]]  # what the message says ("..." stands for anything), what is spoiled

WRONG_TYPES: dict[str, Row] = {
    "logits_None": ("logits is NoneType; expected", lambda: {"logits": None}),
    "logits_text": ("logits is str; expected", lambda: {"logits": "logits"}),
    "logits_numbers": ("logits[0] is float; expected", lambda: {"logits": [1.0, 2.0]}),
    "logits_int": ("logits is torch.int64; expected", lambda: {"logits": i64(B, S, H, V)}),
    "logits_bool": ("logits is torch.bool; expected", lambda: {"logits": f32(B, S, H, V).bool()}),
    "logits_complex": ("logits is torch.complex64; expected", lambda: {"logits": f32(B, S, H, V) * 1j}),
    "logits_float8": ("logits is torch.float8_e5m2; expected", lambda: {"logits": f32(B, S, V).to(torch.float8_e5m2)}),
    "logits_float64_for_triton": (
        "logits is torch.float64; expected",
        lambda: {"logits": f32(B, S, V).double()} | TRITON,
    ),
    "head_int": ("logits... expected", lambda: {"logits": [i64(B, S, V)]}),
    "labels_float": ("labels is torch.float32; expected an integer dtype", lambda: {"labels": f32(B, S)}),
    "labels_bool": ("labels is torch.bool; expected an integer dtype", lambda: {"labels": i64(B, S).bool()}),
    "labels_list": ("labels is list; expected a torch.Tensor", lambda: {"labels": [[0] * S] * B}),
    "labels_None": ("labels is NoneType; expected", lambda: {"labels": None}),
    "weights_complex": ("token_weights is torch.complex64; expected", lambda: {"token_weights": f32(B, S) * 1j}),
    "weights_number": ("token_weights is float; expected", lambda: {"token_weights": 1.0}),
    "head_weights_list": ("head_weights is list; expected", lambda: {"head_weights": [1.0] * H}),
    "head_weights_int": ("head_weights is torch.int64; expected", lambda: {"head_weights": i64(H)}),
    "seq_lens_float": ("seq_lens is torch.float32; expected", lambda: {"seq_lens": f32(B)}),
    "seq_lens_list": ("seq_lens is list; expected", lambda: {"seq_lens": [S] * B}),
    "document_ids_float": ("document_ids is torch.float32; expected", lambda: {"document_ids": f32(B, S)}),
    "normalizer_text": ("normalizer is str; expected", lambda: {"normalizer": "mean"}),
    "normalizer_bool": ("normalizer is bool; expected", lambda: {"normalizer": True}),
    "shift_float": ("shift is float; expected an int", lambda: {"shift": 1.0}),
    "left_halo_float": ("left_halo is float; expected an int", lambda: {"left_halo": 2.0}),
    "shift_bool": ("shift is bool; expected an int", lambda: {"shift": True}),
    "shift_tensor": ("shift is Tensor; expected", lambda: {"shift": i64()}),
    "ignore_index_float": ("ignore_index is float; expected", lambda: {"ignore_index": -100.0}),
    "ignore_index_None": ("ignore_index is NoneType; expected", lambda: {"ignore_index": None}),
    "softcap_text": ("softcap is str; expected", lambda: {"softcap": "30"}),
    "softcap_bool": ("softcap is bool; expected", lambda: {"softcap": True}),
    "z_loss_None": ("z_loss is NoneType; expected", lambda: {"z_loss": None}),
    "loss_scale_list": ("loss_scale is list; expected", lambda: {"loss_scale": [1.0]}),
    "loss_scale_bool": ("loss_scale is torch.bool; expected a number or a 0-d", lambda: {"loss_scale": f32().bool()}),
    "z_loss_numpy_bool": ("z_loss is bool; expected a float", lambda: {"z_loss": numpy.bool_(True)}),
    "softcap_complex": ("softcap is torch.complex64; expected a number or a 0-d", lambda: {"softcap": f32() * 1j}),
    "text_beside_a_tensor": ("softcap is str; expected", lambda: {"softcap": "30", "z_loss": f32()}),
    "inplace_number": ("inplace_backward is int; expected a bool", lambda: {"inplace_backward": 1}),
    "validate_text": ("validate is str; expected a bool", lambda: {"validate": "no"}),
    "return_stats_text": ("return_stats is str; expected a bool", lambda: {"return_stats": "no"}),
}

WRONG_SHAPES: dict[str, Row] = {
    "logits_2d": ("logits is [5, 11]; expected [B, S, H, V], [B, S, V]", lambda: {"logits": f32(S, V)}),
    "logits_5d": ("logits is [1, 2, 5, 3, 11]; expected", lambda: {"logits": f32(1, B, S, H, V)}),
    "head_4d": ("logits[0] is [2, 5, 1, 11]; expected [B, S, V]", lambda: {"logits": [f32(B, S, 1, V)] * 2}),
    "heads_of_two_shapes": ("logits[1] is ... expected", lambda: {"logits": [f32(B, S, V), f32(B, S, V + 1)]}),
    "heads_of_two_dtypes": ("logits[1] is ... expected", lambda: {"logits": [f32(B, S, V), f32(B, S, V).half()]}),
    "no_heads": ("logits has H = 0 heads; expected", lambda: {"logits": f32(B, S, 0, V)}),
    "empty_list": ("logits has H = 0 heads; expected", lambda: {"logits": []}),
    "no_vocabulary": ("logits is ... V = 0; expected", lambda: {"logits": f32(B, S, H, 0)}),
    "no_vocabulary_in_a_list": ("logits is ... V = 0; expected", lambda: {"logits": [f32(B, S, 0)]}),
    "labels_1d": ("labels is [5]; expected [B, S] = [2, 5]", lambda: {"labels": i64(S)}),
    "labels_of_another_batch": ("labels is [3, 5]; expected", lambda: {"labels": i64(B + 1, S)}),
    "short_labels": ("labels is [2, 4]; expected [B, S] = [2, 5] ... or more", lambda: {"labels": i64(B, S - 1)}),
    "labels_without_left_halo": (
        "labels is [2, 6]; expected [B, left_halo 2 + S] = [2, 7]",
        lambda: {"labels": i64(B, S + 1), "left_halo": 2},
    ),
    "labels_by_head": ("labels is [2, 5, 3]; expected", lambda: {"labels": i64(B, S, H)}),
    "weights_by_sequence": ("token_weights is [2]; expected", lambda: {"token_weights": f32(B)}),
    "weights_of_another_length": ("token_weights is [2, 4]; expected", lambda: {"token_weights": f32(B, S - 1)}),
    "position_weights_with_a_halo": (
        "token_weights is [2, 7]; expected [B, S] = [2, 5] or ... weights of the positions",
        lambda: {"labels": i64(B, S + 2), "token_weights": f32(B, S + 2)},
    ),
    "target_weights_without_a_halo": (
        "token_weights is [2, 5]; expected [2, 7], as labels, for weights of the targets",
        lambda: {"labels": i64(B, S + 2), "token_weights": f32(B, S), "weight_alignment": "target"},
    ),
    "weights_of_another_horizon": ("token_weights is ... [2, 5, 3]", lambda: {"token_weights": f32(B, S, H + 1)}),
    "weights_by_vocabulary": ("token_weights is ... expected", lambda: {"token_weights": f32(B, S, H, V)}),
    "head_weights_too_many": ("head_weights is [4]; expected [H] = [3]", lambda: {"head_weights": f32(H + 1)}),
    "head_weights_2d": ("head_weights is [1, 3]; expected [H]", lambda: {"head_weights": f32(1, H)}),
    "head_weights_0d": ("head_weights is []; expected [H]", lambda: {"head_weights": f32()}),
    "seq_lens_2d": ("seq_lens is [2, 1]; expected [B] = [2]", lambda: {"seq_lens": i64(B, 1)}),
    "seq_lens_of_another_batch": ("seq_lens is [3]; expected", lambda: {"seq_lens": i64(B + 1)}),
    "document_ids_1d": ("document_ids is [5]; expected [2, 5], as labels", lambda: {"document_ids": i64(S)}),
    "document_ids_without_a_halo": (
        "document_ids is [2, 5]; expected [2, 6], as labels",
        lambda: {"labels": i64(B, S + 1), "document_ids": i64(B, S)},
    ),
    "loss_scale_1d": ("loss_scale is [1]; expected a 0-d tensor or a number", lambda: {"loss_scale": f32(1)}),
    "softcap_by_token": ("softcap is [2, 5]; expected a 0-d tensor", lambda: {"softcap": f32(B, S)}),
    "normalizer_1d": ("normalizer is [1]; expected a 0-d tensor", lambda: {"normalizer": f32(1)}),
}

WRONG_VALUES: dict[str, Row] = {
    "shift_negative": ("shift is -1; expected", lambda: {"shift": -1}),
    "left_halo_negative": ("left_halo is -1; expected", lambda: {"left_halo": -1}),
    "softcap_0": ("softcap is 0.0; expected a number above 0", lambda: {"softcap": 0.0}),
    "softcap_negative": ("softcap is -30.0; expected", lambda: {"softcap": -30.0}),
    "softcap_nan": ("softcap is nan; expected", lambda: {"softcap": NAN}),
    "softcap_inf": ("softcap is inf; expected", lambda: {"softcap": INF}),
    "z_loss_negative": ("z_loss is -0.0001; expected", lambda: {"z_loss": -1e-4}),
    "z_loss_nan": ("z_loss is nan; expected", lambda: {"z_loss": NAN}),
    "label_smoothing_negative": ("label_smoothing is -0.1; expected", lambda: {"label_smoothing": -0.1}),
    "label_smoothing_1": ("label_smoothing is 1.0; expected", lambda: {"label_smoothing": 1.0}),
    "loss_scale_inf": ("loss_scale is inf; expected", lambda: {"loss_scale": INF}),
    "normalizer_0": ("normalizer is 0; expected", lambda: {"normalizer": 0}),
    "normalizer_negative": ("normalizer is -3.0; expected", lambda: {"normalizer": -3.0}),
    "normalizer_nan": ("normalizer is nan; expected", lambda: {"normalizer": NAN}),
    "loss_scale_learned": ("loss_scale requires a gradient", lambda: {"loss_scale": leaf()}),
    "softcap_learned": ("softcap requires a gradient...softcap.detach()", lambda: {"softcap": leaf()}),
    "z_loss_learned": ("z_loss requires a gradient", lambda: {"z_loss": leaf()}),
    "label_smoothing_learned": ("label_smoothing requires a gradient", lambda: {"label_smoothing": leaf()}),
    "number_beside_a_tensor": ("z_loss is -1.0; expected", lambda: {"softcap": f32(), "z_loss": -1.0}),
    "normalizer_learned": ("normalizer requires a gradient", lambda: {"normalizer": leaf()}),
    "head_weights_learned": ("head_weights requires a gradient", lambda: {"head_weights": leaf(H)}),
    "reduction_unknown": ("reduction is 'avg'; expected one of 'mean'", lambda: {"reduction": "avg"}),
    "reduction_None": ("reduction is None; expected one of", lambda: {"reduction": None}),
    "alignment_unknown": ("weight_alignment is 'token'; expected one of", lambda: {"weight_alignment": "token"}),
    "head_reduction_unknown": ("head_reduction is 'mean'; expected one of", lambda: {"head_reduction": "mean"}),
    "impl_unknown": ("impl is 'cuda'; expected one of", lambda: {"impl": "cuda"}),
}

EXCLUSIVE: dict[str, Row] = {
    "horizon_and_head_weights": (
        "head_reduction is 'horizon' and head_weights is given; expected one",
        lambda: {"head_reduction": "horizon", "head_weights": f32(H)},
    ),
    "normalizer_with_sum": (
        "normalizer ... expected reduction='mean'",
        lambda: {"normalizer": 2.0, "reduction": "sum"},
    ),
    "normalizer_with_none": (
        "normalizer ... expected reduction='mean'",
        lambda: {"normalizer": f32(), "reduction": "none"},
    ),
    "row_weights_by_target": (
        "weight_alignment is 'target' and token_weights is [2, 5, 3]; expected",
        lambda: {"token_weights": f32(B, S, H), "weight_alignment": "target"},
    ),
    "inplace_reference": (
        "inplace_backward is True; expected False with impl='reference'",
        lambda: {"logits": layer(B, S, H, V), "impl": "reference"} | INPLACE,
    ),
}

# In place, over memory that is not the loss's to overwrite, or that two heads share.
NOT_IN_PLACE: dict[str, Row] = {
    "leaf": ("inplace_backward ... leaf ... expected", lambda: {"logits": leaf(B, S, H, V)} | INPLACE),
    "leaf_in_a_list": ("inplace_backward ... leaf", lambda: {"logits": [layer(B, S, V), leaf(B, S, V)]} | INPLACE),
    "leaf_that_is_a_view": (
        "inplace_backward ... leaf",
        lambda: {"logits": f32(B * S * H * V).view(B, S, H, V).requires_grad_()} | INPLACE,
    ),
    "view_of_a_leaf": ("inplace_backward ... leaf", lambda: {"logits": leaf(B, S, H * V).view(B, S, H, V)} | INPLACE),
    "expanded": ("inplace_backward ... expand or", lambda: {"logits": layer(B, S, 1, V).expand(B, S, H, V)} | INPLACE),
    "overlapping_rows": (
        "inplace_backward ... rows of logits share memory",
        lambda: {"logits": layer(B * S * 2 + V).unfold(0, V, 2)[: B * S].view(B, S, V)} | INPLACE,
    ),
    "one_tensor_twice": ("inplace_backward ... two heads", lambda: {"logits": [layer(B, S, V)] * 2} | INPLACE),
    "overlapping_heads": (
        "inplace_backward ... expected",
        lambda: {"logits": [(x := layer(B, S, V + 1))[..., :-1], x[..., 1:]]} | INPLACE,
    ),
}

# What only a look at the values tells.
VALIDATED: dict[str, Row] = {
    "softcap_negative": ("softcap is -1.0; expected a number above 0", lambda: {"softcap": f32() - 1}),
    "z_loss_nan": ("z_loss is nan; expected a finite", lambda: {"z_loss": f32() + NAN}),
    "label_smoothing_1": ("label_smoothing is 1.0; expected", lambda: {"label_smoothing": f32() + 1}),
    "normalizer_0": ("normalizer is 0.0; expected", lambda: {"normalizer": f32()}),
    "normalizer_nan": ("normalizer is nan; expected", lambda: {"normalizer": f32() + NAN}),
    "lengths_too_long": ("seq_lens[1] is 6; expected ... [0, 5]", lambda: {"seq_lens": torch.tensor([S, S + 1])}),
    "lengths_negative": ("seq_lens[0] is -1; expected", lambda: {"seq_lens": torch.tensor([-1, S])}),
    "weight_nan": ("token_weights[0, 0] is nan; expected", lambda: {"token_weights": f32(B, S) + NAN}),
    "row_weight_inf": ("token_weights[0, 0, 0] is -inf; expected", lambda: {"token_weights": f32(B, S, H) - INF}),
    "head_weight_nan": ("head_weights[1] is nan; expected", lambda: {"head_weights": torch.tensor([1.0, NAN, 1.0])}),
}

ELSEWHERE: dict[str, Row] = {
    "labels": ("labels is on meta; expected cpu", lambda: {"labels": i64(B, S).to("meta")}),
    "token_weights": ("token_weights is on meta; expected cpu", lambda: {"token_weights": f32(B, S).to("meta")}),
    "head_weights": ("head_weights is on meta; expected cpu", lambda: {"head_weights": f32(H).to("meta")}),
    "seq_lens": ("seq_lens is on meta; expected cpu", lambda: {"seq_lens": i64(B).to("meta")}),
    "document_ids": ("document_ids is on meta; expected cpu", lambda: {"document_ids": i64(B, S).to("meta")}),
    "normalizer": ("normalizer is on meta; expected cpu", lambda: {"normalizer": f32().to("meta")}),
    "loss_scale": ("loss_scale is on meta; expected cpu", lambda: {"loss_scale": f32().to("meta")}),
    "heads": ("logits[1] ... meta; expected ... cpu", lambda: {"logits": [f32(B, S, V), f32(B, S, V).to("meta")]}),
    "everything": (
        "logits is on meta, where tensors have no values; expected a CPU or GPU tensor. Load the model's weights",
        lambda: {"logits": f32(B, S, V).to("meta"), "labels": i64(B, S).to("meta")},
    ),
}

TABLES: list[tuple[type[Exception], str, dict[str, Row]]] = [
    (TypeError, "type", WRONG_TYPES),
    (ValueError, "shape", WRONG_SHAPES),
    (ValueError, "value", WRONG_VALUES),
    (ValueError, "exclusive", EXCLUSIVE),
    (ValueError, "in_place", NOT_IN_PLACE),
    (ValueError, "validated", VALIDATED),
    (ValueError, "device", ELSEWHERE),
]
ROWS = {f"{kind}-{name}": (error, *row) for error, kind, rows in TABLES for name, row in rows.items()}


@pytest.mark.parametrize("name", ROWS)
def test_bad_input_is_named_before_anything_is_computed(name: str) -> None:
    """The argument, what came, what was expected."""
    error, message, spoil = ROWS[name]
    arguments = {**good(), **spoil(), **({"validate": True} if name.startswith("validated") else {})}
    with pytest.raises(error, match=re.escape(message).replace(r"\.\.\.", ".*")):
        weighted_mtp_ce(**arguments)


def shared(rows: dict[str, Row]) -> dict[str, Row]:
    """Those that spoil what both paths take."""
    return {name: row for name, row in rows.items() if not {"logits", "inplace_backward"} & set(row[1]())}


HIDDEN_TYPES: dict[str, Row] = {
    "hidden_None": ("hidden is NoneType; expected", lambda: {"hidden": None}),
    "hidden_text": ("hidden is str; expected", lambda: {"hidden": "hidden"}),
    "hidden_numbers": ("hidden[0] is float; expected", lambda: {"hidden": [1.0, 2.0]}),
    "hidden_int": ("hidden is torch.int64; expected", lambda: {"hidden": i64(B, S, H, D)}),
    "hidden_complex": ("hidden is torch.complex64; expected", lambda: {"hidden": f32(B, S, H, D) * 1j}),
    "hidden_float8": ("hidden is torch.float8_e5m2; expected", lambda: {"hidden": f32(B, S, D).to(torch.float8_e5m2)}),
    "hidden_float64_for_triton": (
        "hidden is torch.float64; expected",
        lambda: {"hidden": f32(B, S, D).double(), "unembed": f32(V, D).double()} | TRITON,
    ),
    "head_int": ("hidden... expected", lambda: {"hidden": [i64(B, S, D)]}),
    "unembed_None": ("unembed is NoneType; expected a torch.Tensor", lambda: {"unembed": None}),
    "unembed_layer": ("unembed is Linear; expected a torch.Tensor", lambda: {"unembed": torch.nn.Linear(D, V)}),
    "unembed_int": ("unembed is torch.int64; expected torch.float32, as hidden", lambda: {"unembed": i64(V, D)}),
    "unembed_half": ("unembed is torch.float16; expected torch.float32", lambda: {"unembed": f32(V, D).half()}),
    "hidden_half": ("unembed is torch.float32; expected torch.bfloat16", lambda: {"hidden": f32(B, S, D).bfloat16()}),
    "bias_number": ("bias is float; expected a torch.Tensor", lambda: {"bias": 0.5}),
    "bias_double": ("bias is torch.float64; expected torch.float32, as hidden", lambda: {"bias": f32(V).double()}),
    "bias_int": ("bias is torch.int64; expected torch.float32", lambda: {"bias": i64(V)}),
    "chunk_bytes_float": ("chunk_bytes is float; expected an int", lambda: {"chunk_bytes": 2.0**20}),
    "chunk_bytes_bool": ("chunk_bytes is bool; expected an int", lambda: {"chunk_bytes": True}),
    "chunk_bytes_text": ("chunk_bytes is str; expected an int", lambda: {"chunk_bytes": "1GiB"}),
    "grad_dtype_text": ("grad_dtype is str; expected a torch.dtype", lambda: {"grad_dtype": "float32"}),
    "grad_dtype_None": ("grad_dtype is NoneType; expected a torch.dtype", lambda: {"grad_dtype": None}),
    "logits_dtype_text": ("logits_dtype is str; expected torch.float32, or None", lambda: {"logits_dtype": "float32"}),
    "drop_text": ("drop_dead_rows is 'all'; expected 'auto', True, False", lambda: {"drop_dead_rows": "all"}),
    "drop_None": ("drop_dead_rows is None; expected", lambda: {"drop_dead_rows": None}),
    "drop_float": ("drop_dead_rows is 3.0; expected", lambda: {"drop_dead_rows": 3.0}),
    "drop_tensor": ("drop_dead_rows is tensor(3); expected", lambda: {"drop_dead_rows": torch.tensor(3)}),
}

HIDDEN_SHAPES: dict[str, Row] = {
    "hidden_2d": ("hidden is [5, 7]; expected [B, S, H, D], [B, S, D]", lambda: {"hidden": f32(S, D)}),
    "hidden_5d": ("hidden is [1, 2, 5, 3, 7]; expected", lambda: {"hidden": f32(1, B, S, H, D)}),
    "head_4d": ("hidden[0] is [2, 5, 1, 7]; expected [B, S, D]", lambda: {"hidden": [f32(B, S, 1, D)] * 2}),
    "heads_of_two_shapes": ("hidden[1] is ... expected", lambda: {"hidden": [f32(B, S, D), f32(B, S, D + 1)]}),
    "heads_of_two_dtypes": ("hidden[1] is ... expected", lambda: {"hidden": [f32(B, S, D), f32(B, S, D).half()]}),
    "no_heads": ("hidden has H = 0 heads; expected", lambda: {"hidden": f32(B, S, 0, D)}),
    "empty_list": ("hidden has H = 0 heads; expected", lambda: {"hidden": []}),
    "unembed_transposed": ("unembed is [7, 11]; expected [V, D] with D = 7", lambda: {"unembed": f32(D, V)}),
    "unembed_of_another_size": ("unembed is [11, 8]; expected [V, D] with D = 7", lambda: {"unembed": f32(V, D + 1)}),
    "unembed_1d": ("unembed is [7]; expected [V, D]", lambda: {"unembed": f32(D)}),
    "unembed_by_head": ("unembed is [3, 11, 7]; expected [V, D]", lambda: {"unembed": f32(H, V, D)}),
    "no_vocabulary": ("unembed is [0, 7]; expected ... at least 1", lambda: {"unembed": f32(0, D)}),
    "no_features": (
        "unembed is [11, 0]; expected ... at least 1",
        lambda: {"hidden": f32(B, S, H, 0), "unembed": f32(V, 0)},
    ),
    "bias_too_long": ("bias is [12]; expected [V] = [11] from unembed", lambda: {"bias": f32(V + 1)}),
    "bias_of_features": ("bias is [7]; expected [V] = [11]", lambda: {"bias": f32(D)}),
    "bias_2d": ("bias is [1, 11]; expected [V] = [11]", lambda: {"bias": f32(1, V)}),
    "bias_0d": ("bias is []; expected [V] = [11]", lambda: {"bias": f32()}),
    "labels_1d": ("labels is [5]; expected [B, S] = [2, 5] from hidden", lambda: {"labels": i64(S)}),
}

HIDDEN_VALUES: dict[str, Row] = {
    "chunk_bytes_0": ("chunk_bytes is 0; expected at least 44, one row of logits", lambda: {"chunk_bytes": 0}),
    "chunk_bytes_negative": ("chunk_bytes is -1; expected at least 44", lambda: {"chunk_bytes": -1}),
    "chunk_bytes_below_a_row": ("chunk_bytes is 43; expected at least 44", lambda: {"chunk_bytes": 43}),
    "grad_dtype_int": ("grad_dtype is torch.int64; expected float32", lambda: {"grad_dtype": torch.int64}),
    "grad_dtype_float8": ("grad_dtype is torch.float8", lambda: {"grad_dtype": torch.float8_e5m2}),
    "logits_dtype_half": (
        "logits_dtype is torch.bfloat16 and hidden is torch.float32; expected torch.float32, or None",
        lambda: {"logits_dtype": torch.bfloat16},
    ),
    "logits_dtype_narrow": (
        "logits_dtype is torch.float32 and hidden is torch.float64; expected torch.float64, or None",
        lambda: {"hidden": f32(B, S, D).double(), "unembed": f32(V, D).double(), "logits_dtype": torch.float32},
    ),
    "chunk_bytes_below_a_row_of_fp32": (
        "chunk_bytes is 43; expected at least 44, one row of logits",
        lambda: {
            "hidden": f32(B, S, D).half(),
            "unembed": f32(V, D).half(),
            "chunk_bytes": 43,
            "logits_dtype": torch.float32,
        },
    ),
    "drop_negative": ("drop_dead_rows is -1; expected a number of rows", lambda: {"drop_dead_rows": -1}),
}

HIDDEN_ELSEWHERE: dict[str, Row] = {
    "unembed": (
        "unembed is on meta, where tensors have no values; expected ... inside the forward of the module that owns",
        lambda: {"unembed": f32(V, D).to("meta")},
    ),
    "hidden": ("hidden is on meta, where tensors have no values", lambda: {"hidden": f32(B, S, D).to("meta")}),
    "bias": ("bias is on meta, where tensors have no values", lambda: {"bias": f32(V).to("meta")}),
    "shard": (
        "unembed is an empty shard of ZeRO-3, of [11, 7]...parameter(module, unembed)",
        lambda: {"unembed": zero3_shard(V, D)},
    ),
    "shard_of_the_bias": ("bias is an empty shard of ZeRO-3, of [11]", lambda: {"bias": zero3_shard(V)}),
    "heads": ("hidden[1] ... meta; expected ... cpu", lambda: {"hidden": [f32(B, S, D), f32(B, S, D).to("meta")]}),
    "labels": ("labels is on meta; expected cpu, where hidden is", lambda: {"labels": i64(B, S).to("meta")}),
    "everything": (
        "hidden is on meta, where tensors have no values",
        lambda: {name: value.to("meta") for name, value in good_linear().items()},
    ),
}

HIDDEN_TABLES: list[tuple[type[Exception], str, dict[str, Row]]] = [
    (TypeError, "hidden_type", HIDDEN_TYPES),
    (ValueError, "hidden_shape", HIDDEN_SHAPES),
    (ValueError, "hidden_value", HIDDEN_VALUES),
    (ValueError, "hidden_device", HIDDEN_ELSEWHERE),
    *((error, kind, shared(rows)) for error, kind, rows in TABLES if kind != "in_place"),
]
HIDDEN_ROWS = {f"{kind}-{name}": (error, *row) for error, kind, rows in HIDDEN_TABLES for name, row in rows.items()}


@pytest.mark.parametrize("name", HIDDEN_ROWS)
def test_bad_input_of_the_linear_path_is_named_before_anything_is_computed(name: str) -> None:
    """As above; and token_ce says the same of the arguments that it takes."""
    error, message, spoil = HIDDEN_ROWS[name]
    spoiled = {**spoil(), **({"validate": True} if name.startswith("validated") else {})}
    pattern = re.escape(message).replace(r"\.\.\.", ".*")
    with pytest.raises(error, match=pattern):
        weighted_mtp_linear_ce(**{**good_linear(), **spoiled})
    if set(spoiled) <= set(inspect.signature(token_ce).parameters):
        with pytest.raises(error, match=pattern):
            token_ce(**{**good_linear(), **spoiled})


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
@pytest.mark.parametrize(
    ("label", "message"),
    [
        (V, "labels[1, 3] is 11; expected ignore_index (-100) or a class in [0, V) = [0, 11)"),
        (-1, "labels[1, 3] is -1"),
    ],
)
def test_validation_finds_a_label_that_is_no_class(impl: str, device: torch.device, label: int, message: str) -> None:
    """IndexError naming its place, on every device."""
    arguments = {name: value.to(device) for name, value in good().items()}
    arguments["labels"][1, 3] = label
    with pytest.raises(IndexError, match=re.escape(message)):
        weighted_mtp_ce(**arguments, validate=True, impl=impl)
    on_hidden = {name: value.to(device) for name, value in good_linear().items()} | {"labels": arguments["labels"]}
    for function in (weighted_mtp_linear_ce, token_ce):
        with pytest.raises(IndexError, match=re.escape(message)):
            function(**on_hidden, validate=True, impl=impl)


def test_a_mistake_is_refused_for_an_empty_batch_too() -> None:
    """B = 0 takes the same checks."""
    with pytest.raises(ValueError, match="labels is"):
        weighted_mtp_ce(f32(0, S, H, V), i64(0, S - 1))
    with pytest.raises(ValueError, match="labels is"):
        weighted_mtp_linear_ce(f32(0, S, H, D), f32(V, D), i64(0, S - 1))
    with pytest.raises(ValueError, match="unembed is"):
        token_ce(f32(B, 0, H, D), f32(V, D + 1), i64(B, 0))


def test_arguments_after_the_tensors_are_keywords() -> None:
    """One more positional argument would be read as something else one day."""
    with pytest.raises(TypeError, match="positional"):
        weighted_mtp_ce(*good().values(), None, 1)
    with pytest.raises(TypeError, match="weight"):
        weighted_mtp_ce(**good(), weight=torch.ones(B, S))
    with pytest.raises(TypeError, match="positional"):
        weighted_mtp_linear_ce(*good_linear().values(), None, f32(V))
    with pytest.raises(TypeError, match="positional"):
        token_ce(*good_linear().values(), 1)


def test_the_linear_path_has_nothing_to_overwrite() -> None:
    """inplace_backward is an option of logits."""
    with pytest.raises(TypeError, match="inplace_backward"):
        weighted_mtp_linear_ce(**good_linear(), inplace_backward=True)


@pytest.fixture(scope="module")
def shard() -> Iterator[Callable[..., Tensor]]:
    """A tensor as a DTensor, replicated or as named, on a mesh of one process and one dimension or two."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    meshes = {
        "tp": init_device_mesh("cpu", (1,), mesh_dim_names=("tp",)),
        "dp, tp": init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "tp")),
    }
    kinds: dict[Any, Any] = {"R": Replicate(), "P": Partial()} | {dim: Shard(dim) for dim in range(4)}

    def placed(tensor: Tensor, *placements: int | str) -> Tensor:
        mesh = meshes["dp, tp" if len(placements) == 2 else "tp"]
        return DTensor.from_local(tensor, mesh, [kinds[p] for p in placements or "R"], run_check=False)

    yield placed
    dist.destroy_process_group()


TENSORS: dict[str, Callable[[], Tensor]] = {
    "labels": lambda: i64(B, S),
    "token_weights": lambda: f32(B, S),
    "head_weights": lambda: f32(H),
    "seq_lens": lambda: i64(B),
    "document_ids": lambda: i64(B, S),
    "normalizer": lambda: f32(),
}


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("linear", [False, True])
def test_a_dtensor_of_what_belongs_to_the_batch_is_refused_with_the_way_out(name: str, linear: bool, shard) -> None:
    """Named, with the way out."""
    function, given = (weighted_mtp_linear_ce, good_linear()) if linear else (weighted_mtp_ce, good())
    with pytest.raises(TypeError, match=rf"{name} is a DTensor; expected a plain tensor.*to_local"):
        function(**{**given, name: shard(TENSORS[name]())})


# Layouts: where each tensor is sharded, "R" replicated, "P" partial, None a plain tensor; then what the error says.
LOGITS_LAYOUTS = {
    "replicated": (("R",), r"logits is a DTensor with Replicate\(\) over 'tp'; expected Shard\(3\)"),
    "partial": (("P",), r"logits is a DTensor with Partial\(sum\) over 'tp'; expected Shard\(3\)"),
    "by batch": ((0,), r"Shard\(dim=0\) over 'tp'; expected Shard\(3\).*redistribute\(placements=\[Shard\(3\)\]\)"),
    "two dimensions": ((0, 3), r"over 'dp', .* over 'tp'; expected Shard\(3\) on a mesh of one dimension"),
}
LAYER_LAYOUTS = {
    "replicated": ((None, "R", None), r"unembed is a DTensor with Replicate\(\) over 'tp'; expected Shard\(0\).*full_"),
    "by features": ((None, 1, None), r"unembed .*Shard\(dim=1\).*expected Shard\(0\)"),
    "partial": ((None, "P", None), r"unembed .*Partial\(sum\).*expected Shard\(0\)"),
    "two dimensions": (
        (None, ("R", 0), None),
        r"unembed .*expected Shard\(0\) on a mesh of one dimension.*mesh\['tp'\]",
    ),
    "plain bias": ((None, 0, None), "bias is a plain tensor and unembed is a DTensor; expected both as DTensors"),
    "plain unembed": ((None, None, 0), r"bias is a DTensor and unembed is a plain tensor.*bias.full_tensor"),
    "replicated bias": ((None, 0, "R"), r"bias is a DTensor with Replicate\(\).*expected Shard\(0\)"),
    "another mesh": ((None, 0, (0, "R")), "bias is on .*expected one mesh"),
    "hidden by sequence": ((1, 0, 0), r"hidden is a DTensor with Shard\(dim=1\).*expected Replicate\(\).*redistribute"),
    "hidden alone": (("R", None, None), r"hidden is a DTensor and unembed is a plain tensor.*hidden.full_tensor"),
}


@pytest.mark.parametrize("name", LOGITS_LAYOUTS)
def test_logits_that_are_not_sharded_over_the_vocabulary_are_refused(name: str, shard) -> None:
    """With the placement that they have, and the one that is supported."""
    placements, message = LOGITS_LAYOUTS[name]
    with pytest.raises(ValueError, match=message):
        weighted_mtp_ce(**{**good(), "logits": shard(f32(B, S, H, V), *placements)})


def test_heads_are_all_sharded_or_none_is(shard) -> None:
    """A list names the head."""
    heads = [shard(f32(B, S, V), 2), f32(B, S, V)]
    with pytest.raises(ValueError, match=r"logits\[1\] is a plain tensor and logits\[0\] is a DTensor"):
        weighted_mtp_ce(**{**good(), "logits": heads})


@pytest.mark.parametrize("name", LAYER_LAYOUTS)
@pytest.mark.parametrize("function", [weighted_mtp_linear_ce, token_ce])
def test_layers_that_are_not_sharded_over_the_vocabulary_are_refused(function: Any, name: str, shard) -> None:
    """With the placement that they have, and the one that is supported; a local shard of another layout is wrong."""
    layout, message = LAYER_LAYOUTS[name]
    tensors = {"hidden": f32(B, S, H, D), "unembed": f32(V, D), "bias": f32(V)}
    for (argument, tensor), placements in zip([*tensors.items()], layout, strict=True):
        if placements is not None:
            several = placements if isinstance(placements, tuple) else (placements,)
            tensors[argument] = shard(tensor, *several)
    with pytest.raises(ValueError, match=message) as caught:
        function(tensors.pop("hidden"), tensors.pop("unembed"), i64(B, S), **tensors)
    assert "to_local" not in str(caught.value)


WITHOUT_INTERPRETER = """
import torch
from mtp_ce import weighted_mtp_ce, weighted_mtp_linear_ce
x, y = torch.zeros(1, 2, 1, 3), torch.zeros(1, 2, dtype=torch.int64)
for name, call in {"logits": weighted_mtp_ce, "hidden": lambda *tensors, **how: weighted_mtp_linear_ce(
    tensors[0], torch.zeros(5, 3), tensors[1], **how
)}.items():
    try:
        call(x, y, impl="triton")
    except ValueError as error:
        assert f"impl is 'triton': {name} is on cpu" in str(error)
        print(error)
"""


def test_triton_on_cpu_tensors_without_the_interpreter_says_why_not() -> None:
    """It names the argument, the variable that would help and the implementations that run here."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_INTERPRETER], env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("impl is 'triton'") == 2
    assert run.stdout.count("expected a GPU, or TRITON_INTERPRET=1") == 2
    assert run.stdout.count("'cpu'") == 2
