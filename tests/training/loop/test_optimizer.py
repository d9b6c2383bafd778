"""AdamW: what is decayed, how the learning rate moves, and the norm by which gradients are clipped."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.nn import Parameter

from mtp_ce.training.models.build import build_model
from mtp_ce.training.models.optimizer import build_optimizer, build_schedule, clip_gradients, resume_schedule


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


def test_a_schedule_goes_on_with_other_groups_of_parameters(small):
    """How many there are depends on how parameters are sharded."""
    recipe = small(["optimizer.lr=1e-2", "optimizer.heads_lr=3e-2", "optimizer.warmup_steps=4"])
    schedules = []
    for split in (False, True):
        optimizer = build_optimizer(build_model(recipe), recipe.optimizer)
        if split:
            last = optimizer.param_groups[-1]
            optimizer.add_param_group({**last, "params": [last["params"].pop()]})
        schedules.append(build_schedule(optimizer, recipe.optimizer, steps=24))
    begun, goes_on = schedules
    for _ in range(9):
        begun.optimizer.step()
        begun.step()
    resume_schedule(goes_on, begun.state_dict())
    for _ in range(2):
        rates = [[group["lr"] for group in schedule.optimizer.param_groups] for schedule in schedules]
        assert rates[1] == [*rates[0], rates[0][-1]]
        assert goes_on.get_last_lr() == rates[1]
        for schedule in schedules:
            schedule.optimizer.step()
            schedule.step()


def test_gradients_are_clipped_by_their_norm_to_the_last_digit():
    """torch's own sum in fp32 is off by 1e-4 here, so that the norm would depend on the number of ranks."""
    drawn = torch.randn(2**20, generator=torch.Generator().manual_seed(0))
    parameters = [Parameter(torch.zeros(2**20)), Parameter(torch.zeros(3)), Parameter(torch.zeros(2))]
    parameters[0].grad, parameters[1].grad = drawn * 1e-3, torch.tensor([0.0, 2.0, -1.0])
    exact = sum(float((x.grad.double() ** 2).sum()) for x in parameters[:2]) ** 0.5
    assert float(clip_gradients(parameters, None)) == pytest.approx(exact, rel=1e-7)
    assert parameters[1].grad[1] == 2
    assert float(clip_gradients(parameters, 0.5)) == pytest.approx(exact, rel=1e-7)
    assert float(clip_gradients(parameters, None)) == pytest.approx(0.5, rel=1e-5)
    assert float(clip_gradients([Parameter(torch.zeros(2))], 1.0)) == 0
