"""Labels beyond the inputs of a wrapper: the rows that a longer input would have, from the positions that are there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from mtp_ce import MTPTrainer, MTPWrapper, weighted_mtp_linear_ce

V, B, S, H = 31, 2, 7, 3
SIZES = {"vocab_size": V, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


def wrap(heads: str = "residual", **options: Any) -> MTPWrapper:
    torch.manual_seed(0)
    model = MTPWrapper(LlamaForCausalLM(LlamaConfig(**SIZES)), H, heads=heads, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.fixture(scope="module")
def text() -> Tensor:
    """Tokens [B, S + H]."""
    return torch.randint(V, (B, S + H), generator=torch.Generator().manual_seed(3))


def gradients(model: MTPWrapper, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {name: x for name, x in zip(names, found, strict=True) if x is not None}


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(
    ("heads", "options", "halo"),
    [
        ("residual", {}, H),
        ("residual", {"loss": "logits"}, H),
        ("layer", {}, H),
        ("sequential", {}, H),
        ("sequential", {"activation_checkpointing": True}, H),
        ("sequential", {"shared": True}, 2),
        ("teacher_forcing", {}, 1),
        ("residual", {"trunk": "detached", "targets": "trunk"}, 1),
    ],
    ids=lambda value: str(value),
)
def test_a_halo_adds_the_rows_that_a_longer_input_has(text, heads: str, options: Any, halo: int, shifted: bool) -> None:
    """Loss and gradients of S positions with a halo are those of the longer input, of which only these positions count.

    In the longer input the tokens after the halo are no targets, and the positions after the first S have weight 0.
    """
    model = wrap(heads, head_reduction="horizon", **options)
    assert model.label_halo == halo
    ids = torch.zeros_like(text)
    if not shifted:  # the document of a position would be that of its label
        ids[1, 3:] = 1
    labels = text.clone()
    labels[0, S] = labels[1, 2] = -100
    long = labels.masked_fill(torch.arange(S + H) >= S + halo, -100)
    weights = (torch.arange(S + H) < S).float().expand(B, -1)
    if heads == "teacher_forcing":
        weights = torch.ones(B, S + H)  # rows of later positions have no target below S + 1
    whole = model(
        text, labels=long, document_ids=ids, token_weights=weights, weight_alignment="position", num_items_in_batch=5
    ).loss
    name, first = ("shift_labels", 1) if shifted else ("labels", 0)
    part = model(
        text[:, :S],
        document_ids=ids[:, first : S + halo],
        next_input_ids=text[:, S:],
        num_items_in_batch=5,
        **{name: labels[:, first : S + halo]},
    )
    torch.testing.assert_close(part.loss, whole)
    expected = gradients(model, whole)
    for parameter, found in gradients(model, part.loss).items():
        torch.testing.assert_close(found, expected[parameter], msg=lambda m, name=parameter: f"{name}: {m}")


def test_left_halo_reaches_the_loss(text) -> None:
    """Under "target" a token is divided by the heads of the positions before, too."""
    model = wrap()
    call = {"document_ids": torch.zeros_like(text[:, : S + 2]), "left_halo": 2}
    labels = text[:, : S + 2]
    loss = model(text[:, 2 : S + 2], labels=labels, **call).loss
    hidden = model.head_hidden_states(input_ids=text[:, 2 : S + 2])
    unembed = model.get_output_embeddings().weight
    expected = weighted_mtp_linear_ce(hidden, unembed, labels, head_reduction="target", left_halo=2)
    torch.testing.assert_close(loss, expected)
    alone = weighted_mtp_linear_ce(hidden, unembed, labels[:, 2:], head_reduction="target")
    assert not torch.allclose(loss, alone)


@pytest.mark.parametrize(
    ("heads", "options", "arguments", "message"),
    [
        (
            "residual",
            {},
            {"position_ids": torch.arange(S)[None]},
            r"document_ids is None .* document_ids \[B, T\] = \[",
        ),
        ("residual", {}, {"cu_seq_lens_q": torch.tensor([0, 2 * S])}, "document_ids is None .* cu_seq_lens_q has no"),
        ("residual", {}, {"document_ids": torch.zeros(B, S, dtype=torch.int64)}, r"document_ids is \[2, 7\]; expected"),
        ("sequential", {}, {}, r"next_input_ids is None .* the 2 tokens after input_ids, \[B, 2\]"),
        ("sequential", {}, {"next_input_ids": torch.zeros(B, 1, dtype=torch.int64)}, r"next_input_ids is \[2, 1\]"),
        (
            "sequential",
            {"shared": True},
            {"next_input_ids": torch.zeros(B, 2, dtype=torch.int64)},
            "expected at most 2",
        ),
        ("teacher_forcing", {}, {}, "with 3 tokens beyond them; expected at most 1 with heads='teacher_forcing'"),
        ("residual", {"trunk": "frozen", "targets": "trunk"}, {}, "expected at most 1 with targets='trunk'"),
    ],
)
def test_a_halo_that_cannot_be_trained_on_is_refused(text, heads: str, options: Any, arguments: Any, message) -> None:
    """By name, before anything is computed."""
    with pytest.raises(ValueError, match=message):
        wrap(heads, **options)(text[:, :S], labels=text, **arguments)


def test_next_input_ids_without_labels_are_refused(text) -> None:
    """Nothing would read them."""
    with pytest.raises(ValueError, match="next_input_ids is given without labels"):
        wrap()(text[:, :S], next_input_ids=text[:, S:])


@pytest.mark.parametrize("head_reduction", ["live", "target"])
def test_a_trainer_trains_and_evaluates_on_labels_with_a_halo(text, tmp_path, head_reduction: str) -> None:
    """Its loss is the wrapper's, divided by the tokens that head 0 predicts: those of a halo are in other slices."""
    model = wrap("sequential", head_reduction=head_reduction)
    rows = [{"input_ids": row[:S].tolist(), "next_input_ids": row[S:].tolist(), "labels": row.tolist()} for row in text]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=B, per_device_eval_batch_size=B, report_to=[],
        save_strategy="no", use_cpu=True, disable_tqdm=True, learning_rate=0.0, remove_unused_columns=True,
    )  # fmt: skip
    trainer = MTPTrainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
    items = B * S
    expected = model.eval()(text[:, :S], labels=text, next_input_ids=text[:, S:], num_items_in_batch=items).loss
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(expected), rel=1e-5)
    assert trainer.train().training_loss > 0


def test_padding_of_labels_is_no_halo(text) -> None:
    """A halo of ignored labels changes nothing."""
    model = wrap()
    plain = model(text[:, :S], labels=text[:, :S]).loss
    padded = F.pad(text[:, :S], (0, H), value=-100)
    torch.testing.assert_close(model(text[:, :S], labels=padded).loss, plain)
