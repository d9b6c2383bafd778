"""targets="trunk": the heads learn what the trunk itself would write."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from mtp_ce import MTPWrapper

V = 40
SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def wrapped(**options) -> MTPWrapper:
    torch.manual_seed(0)
    trunk = LlamaForCausalLM(LlamaConfig(vocab_size=V, initializer_range=0.3, **SIZES))
    return MTPWrapper(trunk, 3, heads="sequential", trunk="detached", **options)


@pytest.fixture
def batch() -> dict[str, Tensor]:
    tokens = torch.randint(V, (2, 14), generator=torch.Generator().manual_seed(1))
    documents = torch.tensor([[0] * 6 + [1] * 8, [0] * 14])
    positions = torch.tensor([[*range(6), *range(8)], [*range(14)]])
    labels = tokens.clone()
    labels[0, 7:9] = -100
    labels[1, 12:] = V + 7  # beyond seq_lens, where nothing reads it
    return {"input_ids": tokens, "labels": labels, "document_ids": documents, "position_ids": positions}


def greedy(wrapper: MTPWrapper, batch: dict[str, Tensor]) -> Tensor:
    """Labels in which every supervised token is the argmax of the logits before it."""
    logits = wrapper.head_logits(input_ids=batch["input_ids"], position_ids=batch["position_ids"])[0]
    labels = batch["labels"].clone()
    labels[:, 1:] = torch.where(labels[:, 1:] == -100, -100, logits[:, :-1].argmax(-1))
    return labels


@pytest.mark.parametrize("path", ["linear", "logits"])
@pytest.mark.parametrize("shifted", [False, True])
def test_the_loss_is_that_of_the_trunks_greedy_tokens(batch, path, shifted) -> None:
    """Every head's loss and gradient equal those of labels that are replaced by hand; masks and borders stay."""
    lengths = torch.tensor([14, 11 if shifted else 12])

    def run(wrapper: MTPWrapper, labels: Tensor):
        names = {"shift_labels" if shifted else "labels": labels.roll(-1, 1) if shifted else labels}
        if shifted:
            names["shift_labels"][:, -1] = -100
        out = wrapper(**{**batch, "labels": None, **names}, seq_lens=lengths, return_stats=True)
        out.loss.backward()
        return out

    text, trunk = wrapped(loss=path), wrapped(loss=path, targets="trunk")
    expected, found = run(text, greedy(text, batch)), run(trunk, batch["labels"])
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(found.stats.ce, expected.stats.ce)
    assert torch.equal(found.stats.live, expected.stats.live)
    for one, other in zip(trunk.heads.parameters(), text.heads.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    assert all(p.grad is None for p in trunk.causal.parameters())
    assert run(wrapped(loss=path), batch["labels"]).loss != found.loss, "the text says something else"
    assert (found.stats.ce[..., 0] < 4).all(), "nothing is more likely to head 0 than its own argmax"


def test_a_batch_without_a_target_has_a_loss_of_0(batch) -> None:
    masked = torch.full_like(batch["labels"], -100)
    for short in (masked, masked[:, :1], batch["labels"][:, :1]):
        inputs = {name: x[:, : short.shape[1]] for name, x in batch.items()}
        assert wrapped(targets="trunk")(**{**inputs, "labels": short}).loss == 0


def test_targets_are_refused_where_the_trunk_would_learn_them_and_kept_when_loading(batch, tmp_path) -> None:
    trunk = LlamaForCausalLM(LlamaConfig(vocab_size=V, **SIZES))
    with pytest.raises(ValueError, match=r"targets is 'trunk' with trunk='joint'; expected trunk='detached' or"):
        MTPWrapper(trunk, 3, targets="trunk")
    with pytest.raises(ValueError, match="targets is 'own'; expected one of 'text', 'trunk'"):
        MTPWrapper(trunk, 3, trunk="frozen", targets="own")
    wrapped().save_pretrained(tmp_path)
    loaded = MTPWrapper.from_pretrained(tmp_path, trunk="frozen", targets="trunk")
    batch["labels"][1, 12:] = -100
    assert loaded(**batch).loss == wrapped(targets="trunk")(**batch).loss
