"""Arguments of the wrapper beside tokens: mistakes are refused by name, borders of documents are respected."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DataCollatorWithFlattening, LlamaConfig, LlamaForCausalLM

from mtp_ce import MTPWrapper, weighted_mtp_ce

V, H = 61, 3
KINDS = ["residual", "sequential", "teacher_forcing"]


def wrap(kind: Any = "residual", **options: Any) -> MTPWrapper:
    """A tiny model and heads, all of it other than at initialisation."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    wrapper = MTPWrapper(LlamaForCausalLM(LlamaConfig(vocab_size=V, **sizes)), H, heads=kind, **options)
    with torch.no_grad():
        for parameter in wrapper.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return wrapper.eval()


TOKENS = torch.randint(2, V, (2, 12), generator=torch.Generator().manual_seed(1))
MISTAKES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a misspelt alignment": (
        {"token_weights": torch.rand(2, 12), "weight_alignment": "targets"},
        ValueError,
        "weight_alignment is 'targets'",
    ),
    "weights of one row": ({"token_weights": torch.rand(1, 12)}, ValueError, r"token_weights is \[1, 12\]"),
    "short weights": ({"token_weights": torch.rand(2, 11)}, ValueError, r"token_weights is \[2, 11\]"),
    "complex weights": ({"token_weights": torch.ones(2, 12).cfloat()}, TypeError, "token_weights is torch.complex64"),
    "weights of rows, aligned": (
        {"token_weights": torch.rand(2, 12, H)},
        ValueError,
        r"weight_alignment is 'target' and token_weights is \[2, 12, 3\]",
    ),
    "weights of other heads": (
        {"token_weights": torch.rand(2, 12, H + 1), "weight_alignment": "position"},
        ValueError,
        r"token_weights is \[2, 12, 4\]; expected .* \[B, S, H\] = \[2, 12, 3\]",
    ),
    "documents of one row": ({"document_ids": TOKENS[:1]}, ValueError, r"document_ids is \[1, 12\]"),
    "documents in fractions": ({"document_ids": torch.zeros(2, 12)}, TypeError, "document_ids is torch.float32"),
    "no targets at all": ({"num_items_in_batch": 0}, ValueError, "num_items_in_batch is 0; expected .* above 0"),
    "fewer than none": ({"num_items_in_batch": -3}, ValueError, "num_items_in_batch is -3"),
    "short labels": ({"labels": TOKENS[:, :11]}, ValueError, r"labels is \[2, 11\]"),
    "labels in fractions": ({"labels": TOKENS.float()}, TypeError, "labels is torch.float32"),
    "both labels": ({"shift_labels": TOKENS}, ValueError, "labels and shift_labels are both given"),
    "labels that were taken away": (
        {"labels": None, "num_items_in_batch": torch.tensor(4)},
        ValueError,
        "num_items_in_batch is given without labels; .*label_smoothing_factor.*compute_loss_func.*MTPWrapper",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_whatever_the_heads(mistake, kind):
    given, error, words = MISTAKES[mistake]
    with pytest.raises(error, match=words):
        wrap(kind)(TOKENS, **{"labels": TOKENS, **given})


def test_weights_of_rows_are_those_of_the_heads_where_tokens_between_are_given():
    """[B, S, H] weights of "teacher_forcing" belong to the rows that the contract numbers."""
    wrapper, weights = wrap("teacher_forcing"), torch.rand(2, 12, H)
    logits = wrapper(TOKENS).logits
    rolled = [torch.roll(logits, -h, 1) for h in range(H)]
    expected = weighted_mtp_ce(rolled, TOKENS, weights, head_reduction="target", impl="reference")
    given = wrapper(TOKENS, labels=TOKENS, token_weights=weights, weight_alignment="position")
    torch.testing.assert_close(given.loss, expected)


def test_labels_is_all_that_trainers_take_for_labels():
    """They take every parameter that is named so, and want all of them before they compute a loss."""
    named = [name for name in inspect.signature(MTPWrapper.forward).parameters if "label" in name]
    assert named == ["labels"]


@pytest.mark.parametrize("loss", ["linear", "logits"])
@pytest.mark.parametrize("kind", KINDS)
def test_smoothing_and_z_loss_are_the_contracts(kind, loss):
    """For all heads; statistics report the cross entropy without them."""
    wrapper = wrap(kind, loss=loss, label_smoothing=0.1, z_loss=1e-2)
    output = wrapper(TOKENS, labels=TOKENS, return_stats=True)
    if kind == "teacher_forcing":
        logits = [torch.roll(wrapper(TOKENS).logits, -h, 1) for h in range(H)]
    else:
        logits = wrapper.head_logits(input_ids=TOKENS)
    options = {"weight_alignment": "target", "head_reduction": "target", "impl": "reference", "return_stats": True}
    expected = weighted_mtp_ce(logits, TOKENS, label_smoothing=0.1, z_loss=1e-2, **options)
    torch.testing.assert_close(output.loss, expected.loss)
    torch.testing.assert_close(output.stats.ce, expected.stats.ce, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("option", ["label_smoothing", "z_loss"])
def test_an_impossible_term_of_the_loss_is_refused_when_the_wrapper_is_made(option):
    with pytest.raises(ValueError, match=f"{option} is -0.1"):
        wrap(**{option: -0.1})


@pytest.mark.parametrize("kind", KINDS)
def test_one_row_of_positions_has_borders_for_every_row(kind):
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    wrapper = wrap(kind)
    loss = wrapper(TOKENS, labels=TOKENS, position_ids=positions).loss
    assert torch.equal(loss, wrapper(TOKENS, labels=TOKENS, position_ids=positions.expand(2, -1)).loss)
    ids = torch.tensor([[0] * 5 + [1] * 7]).expand(2, -1)
    assert torch.equal(loss, wrapper(TOKENS, labels=TOKENS, position_ids=positions, document_ids=ids).loss)


@pytest.mark.parametrize("kind", KINDS)
def test_no_head_looks_across_a_border_that_only_flash_attention_is_told(kind):
    """transformers flattens documents into one row and can leave the positions out."""
    texts = [{"input_ids": TOKENS[0, :5].tolist()}, {"input_ids": TOKENS[1, :7].tolist()}]
    collate = DataCollatorWithFlattening(return_position_ids=False, return_flash_attn_kwargs=True)
    batch = collate(texts)
    assert "position_ids" not in batch
    ids = torch.tensor([[0] * 5 + [1] * 7])
    wrapper = wrap(kind)
    live = wrapper(**batch, return_stats=True).stats.live
    plain = {"input_ids": batch["input_ids"], "labels": batch["labels"], "return_stats": True}
    assert torch.equal(live, wrapper(**plain, document_ids=ids).stats.live)
    assert not torch.equal(live, wrapper(**plain).stats.live)


def test_borders_of_several_flattened_rows_run_on_through_them():
    """As flash attention counts them: over all tokens of the batch."""
    wrapper = wrap()
    live = wrapper(TOKENS, labels=TOKENS, cu_seq_lens_q=torch.tensor([0, 5, 12, 15, 24]), return_stats=True).stats.live
    ids = torch.tensor([[0] * 5 + [1] * 7, [2] * 3 + [3] * 9])
    assert torch.equal(live, wrapper(TOKENS, labels=TOKENS, document_ids=ids, return_stats=True).stats.live)


def test_shifted_labels_are_taken_though_no_parameter_has_their_name():
    shifted = nn.functional.pad(TOKENS[:, 1:], (0, 1), value=-100)
    wrapper = wrap()
    torch.testing.assert_close(wrapper(TOKENS, shift_labels=shifted).loss, wrapper(TOKENS, labels=TOKENS).loss)


def test_generation_options_reach_the_model_and_the_drafting_alike():
    wrapper = wrap()
    options = {"max_new_tokens": 4, "do_sample": False}
    plain = wrapper.generate(TOKENS[:1], **options)
    assert torch.equal(wrapper.generate(input_ids=TOKENS[:1], **options), plain)
    assert torch.equal(wrapper.generate(input_ids=TOKENS[:1], speculative=True, **options), plain)
