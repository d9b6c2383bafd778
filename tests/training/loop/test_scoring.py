"""Frozen models of a scorer, as a training holds them: in its precision, whole or sharded."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from mtp_ce.next_token import NextToken
from mtp_ce.scorers.weights import TokenWeights
from mtp_ce.training.config.frozen import CriticConfig, ReferenceConfig
from mtp_ce.training.config.loop import StageTrainConfig
from mtp_ce.training.config.scorers.critic import CriticScorerConfig
from mtp_ce.training.config.scorers.rho1 import Rho1ScorerConfig
from mtp_ce.training.critic.training import build_critic
from mtp_ce.training.data.rows import Batch, PackedRows
from mtp_ce.training.errors import RecipeError
from mtp_ce.training.loop.ranks import ALONE, join_ranks
from mtp_ce.training.loop.weighing import build_weighing
from mtp_ce.training.models.build import build_model

CPU = torch.device("cpu")


def a_batch(vocabulary: int) -> Batch:
    """Three packed rows."""
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(vocabulary, (n,), generator=generator) for n in (20, 61, 3, 12)]
    return PackedRows(documents, 32, 0).batch(torch.arange(3))


def saved(model: PreTrainedModel, folder: Path) -> Path:
    """A model of large weights, whose losses differ from token to token."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("given", [False, True])
def test_a_reference_that_is_the_model_in_training_has_no_excess_loss(small, tmp_path, precision, given):
    """To the last bit: a reference of another precision would add its rounding."""
    torch.manual_seed(0)
    recipe = small([f"train.precision={precision}"])
    recipe = recipe.model_copy(
        update={
            "scorer": Rho1ScorerConfig(name="rho1_excess", current="given" if given else None),
            "reference": ReferenceConfig(source="given"),
        }
    )
    model = build_model(recipe)
    folder = saved(model.causal, tmp_path / "model")
    batch, parts = a_batch(recipe.data.vocab_size), {}
    with join_ranks(CPU, recipe.train) as ranks:
        models = {"reference": folder, "current": folder}
        weighing = build_weighing(recipe, models, CPU, ranks)
        ranks.shard(model, recipe.train)

        def weigh(current: NextToken) -> torch.Tensor:
            parts.update(weighing.explain(batch, current))
            return weighing.weigh(batch, current).weights

        model(batch.input_ids, position_ids=batch.position_ids, labels=batch.labels, token_weights=weigh)
    score = parts["score"][~parts["score"].isnan()]
    assert (score == 0).all()
    assert parts["ce"][~parts["ce"].isnan()].std() > 0.1
    assert len(score) > 80


@pytest.mark.parametrize("sharded", [False, True])
def test_a_critic_in_bf16_weighs_nearly_as_in_fp32(small, tmp_path, sharded):
    torch.manual_seed(0)
    scorer = {"scorer": CriticScorerConfig(name="critic_delta"), "critic": CriticConfig(source="given")}
    critic = build_critic(small(), end_of_text=0)
    torch.nn.init.normal_(critic.score.weight)
    folder, batch = saved(critic, tmp_path / "critic"), a_batch(512)

    def weigh(precision: str) -> TokenWeights:
        recipe = small([f"train.precision={precision}"]).model_copy(update=scorer)
        if not sharded:
            return build_weighing(recipe, {"critic": folder}, CPU, ALONE).weigh(batch)
        with join_ranks(CPU, recipe.train) as ranks:
            return build_weighing(recipe, {"critic": folder}, CPU, ranks).weigh(batch)

    exact, rounded = weigh("fp32").weights, weigh("bf16").weights
    assert not torch.equal(exact, rounded), "it is another precision"
    assert (rounded - exact).abs().mean() < 0.05 < 0.3 < exact.std()


@pytest.mark.parametrize("role", ["reference", "current", "critic", "trained"])
def test_a_frozen_model_that_is_not_finite_is_refused_with_its_key_and_its_parameter(small, tmp_path, role):
    """It would make every score NaN, and every weight the neutral 1."""
    recipe = small()
    good, bad = tmp_path / "good" / "model", tmp_path / "bad" / "model"
    model = build_critic(recipe, end_of_text=0) if role == "critic" else build_model(recipe).causal
    model.save_pretrained(good)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = torch.nan
    model.save_pretrained(bad)
    rho1 = Rho1ScorerConfig(name="rho1_excess", current="given")
    parts = {"scorer": rho1, "reference": ReferenceConfig(source="given")}
    if role == "critic":
        parts = {"scorer": CriticScorerConfig(name="critic_delta"), "critic": CriticConfig(source="given")}
    if role == "trained":
        parts["reference"] = ReferenceConfig(train=StageTrainConfig(steps=1, batch_size=1))
    wrong = "reference" if role == "trained" else role
    models = {name: bad if name == wrong else good for name in ("reference", "current", "critic")}
    named = {
        "reference": "reference.source 'given' has nan",
        "current": "scorer.current 'given' has nan",
        "critic": "critic.source 'given' has nan",
        "trained": f"the reference in {bad.parent} has nan",
    }
    way_out = "delete that folder, and the stage is trained again" if role == "trained" else "give another model"
    with pytest.raises(RecipeError, match=re.escape(named[role])) as raised:
        build_weighing(recipe.model_copy(update=parts), models, CPU)
    assert "in its parameter model.layers.1.mlp.up_proj.weight; expected finite numbers" in str(raised.value)
    assert str(raised.value).endswith(way_out)
    build_weighing(recipe.model_copy(update=parts), dict.fromkeys(models, good), CPU)
