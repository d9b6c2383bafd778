"""AdamW: what is decayed, and how the learning rate moves."""

from __future__ import annotations

from itertools import pairwise

import pytest

from mtp_ce.training.models.build import build_model
from mtp_ce.training.models.optimizer import build_optimizer, build_schedule


@pytest.mark.parametrize("tied", ["true", "false"])
def test_weight_decay_pulls_on_matrices_alone(small, tied):
    recipe = small([f"model.tie_embeddings={tied}", "optimizer.weight_decay=0.3"])
    model = build_model(recipe)
    groups = build_optimizer(model, recipe.optimizer).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    names = {name: decay[id(p)] for name, p in model.named_parameters()}
    assert len(decay) == len(names), "every parameter once, tied ones too"
    for name, value in names.items():
        plain = "norm" in name or "embed" in name or "lm_head" in name or name.endswith("bias")
        assert value == (0.0 if plain else 0.3), name


def test_the_learning_rate_rises_to_its_peak_and_comes_down_to_its_final_share(small):
    recipe = small(["optimizer.lr=1e-2", "optimizer.warmup_steps=4", "optimizer.final_lr_ratio=0.1"])
    optimizer = build_optimizer(build_model(recipe), recipe.optimizer)
    schedule = build_schedule(optimizer, recipe.optimizer, steps=24)
    rates = []
    for _ in range(24):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[:5] == pytest.approx([0, 0.25e-2, 0.5e-2, 0.75e-2, 1e-2])
    assert all(later < earlier for earlier, later in pairwise(rates[4:]))
    assert rates[14] == pytest.approx(0.55e-2), "half way down"
    assert rates[23] == pytest.approx(0.1055e-2, rel=1e-3), "of the last step, one before the end"
    assert schedule.get_last_lr()[0] == pytest.approx(0.1e-2)


def test_extra_heads_can_learn_at_a_rate_of_their_own(small):
    recipe = small(["optimizer.lr=1e-4", "optimizer.heads_lr=2e-3", "optimizer.final_lr_ratio=0.5"])
    model = build_model(recipe)
    optimizer = build_optimizer(model, recipe.optimizer)
    schedule = build_schedule(optimizer, recipe.optimizer, steps=10)
    assert schedule.get_last_lr()[0] < 1e-4
    for _ in range(10):
        optimizer.step()
        schedule.step()
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert rates[id(parameter)] == pytest.approx(1e-3 if name.startswith("heads.") else 0.5e-4), name
    assert schedule.get_last_lr()[0] == pytest.approx(0.5e-4), "what is logged is the trunk's"
