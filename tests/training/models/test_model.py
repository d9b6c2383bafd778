"""The model: documents in one row don't see each other, and head 0 is the plain language model."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from mtp_ce import MTPWrapper, weighted_mtp_ce
from mtp_ce.training.config.recipe import load_recipe
from mtp_ce.training.config.schema import Recipe
from mtp_ce.training.data.rows import PackedRows
from mtp_ce.training.models.build import build_model


@pytest.fixture
def model(small) -> MTPWrapper:
    torch.manual_seed(0)
    model = build_model(small(["data.vocab_size=300"])).eval()
    with torch.no_grad():
        for parameter in model.heads.parameters():
            parameter.normal_(std=0.1)
    return model


def packed(*parts: torch.Tensor):
    """One row of exactly these documents."""
    rows = PackedRows(list(parts), row_length=sum(map(len, parts)), pad_id=0)
    return rows.batch(torch.tensor([0]))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_documents_logits_do_not_depend_on_its_neighbours(model, attention):
    """The same document beside different text, and alone: the same logits from every head."""
    model.causal.set_attn_implementation(attention)
    generator = torch.Generator().manual_seed(1)
    before, other, after = (torch.randint(300, (n,), generator=generator) for n in (9, 9, 5))
    document = torch.randint(300, (12,), generator=generator)
    with torch.no_grad():
        beside_one = packed(before, document, after)
        beside_other = packed(other, document, after.flip(0))
        alone = packed(document)
        first = model.head_logits(input_ids=beside_one.input_ids, position_ids=beside_one.position_ids)
        second = model.head_logits(input_ids=beside_other.input_ids, position_ids=beside_other.position_ids)
        third = model.head_logits(input_ids=alone.input_ids, position_ids=alone.position_ids)
    for one, two, three in zip(first, second, third, strict=True):
        # Masked keys weigh exactly 0, so what stands there can't change a bit; being alone changes the
        # order of summation and nothing else.
        assert torch.equal(one[:, 9:21], two[:, 9:21])
        torch.testing.assert_close(one[:, 9:21], three, rtol=0, atol=1e-6)
        # The test can fail: where the text differs, so do the logits.
        assert not torch.equal(one[:, :9], two[:, :9])


def test_a_document_of_one_token_is_isolated_too(model):
    """Its position is 0 like that of its neighbours: two borders with nothing between them."""
    one, other = torch.tensor([5]), torch.tensor([6])
    rest = torch.arange(10, 20)
    with torch.no_grad():
        first, second = (
            model.head_logits(input_ids=batch.input_ids, position_ids=batch.position_ids)
            for batch in (packed(one, one, rest), packed(other, one, rest))
        )
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a[:, 1:], b[:, 1:])


def test_head_0_is_the_trunks_own_next_token_head(model):
    tokens = torch.arange(40).reshape(2, 20)
    positions = torch.arange(20).expand(2, -1)
    with torch.no_grad():
        plain = model.causal(input_ids=tokens, labels=tokens, use_cache=False)
        heads = model.head_logits(input_ids=tokens, position_ids=positions)
    assert torch.equal(heads[0], plain.logits)
    assert not torch.equal(heads[1], plain.logits)
    torch.testing.assert_close(weighted_mtp_ce(heads[:1], tokens), plain.loss)
    torch.testing.assert_close(
        weighted_mtp_ce(heads[:1], tokens),
        F.cross_entropy(heads[0][:, :-1].flatten(0, 1), tokens[:, 1:].flatten()),
    )


def test_the_trunk_is_a_plain_transformers_model_of_the_recipes_sizes(model, small):
    recipe: Recipe = small(["data.vocab_size=300"])
    assert type(model.causal) is LlamaForCausalLM
    config = model.causal.config
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (300, 32, 2)
    assert config.num_key_value_heads == recipe.model.kv_heads
    assert config.max_position_embeddings == recipe.data.sequence_length
    for tied in (False, True):
        trunk = build_model(small(["data.vocab_size=300", f"model.tie_embeddings={str(tied).lower()}"])).causal
        assert (trunk.get_input_embeddings().weight is trunk.get_output_embeddings().weight) == tied


def test_the_seed_decides_the_initial_weights(small):
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return torch.cat([p.flatten() for p in build_model(small()).parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


@pytest.mark.parametrize("reduction", ["live", "horizon", "target"])
def test_saved_heads_are_trained_with_the_loss_of_the_recipe(model, tmp_path, reduction):
    model.save_pretrained(tmp_path)
    overrides = ["model.kind=pretrained", f"model.source={tmp_path}", f"model.mtp.head_reduction={reduction}"]
    recipe = load_recipe("tiny", [*overrides, "model.mtp.loss=logits", f"model.mtp.horizon={model.horizon}"])
    further = build_model(recipe, 3, tmp_path).eval()
    batch = packed(torch.arange(10, 19), torch.arange(20, 31))
    inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "labels": batch.labels}
    with torch.no_grad():
        losses = {name: model(**inputs, head_reduction=name).loss for name in ("live", "horizon", "target")}
        torch.testing.assert_close(further(**inputs).loss, losses[reduction])
    assert len({round(float(loss), 4) for loss in losses.values()}) == 3  # the test can fail
    assert further.loss == "logits"
