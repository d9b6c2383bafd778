"""The loop: micro-batches add up, nothing that is not finite reaches the optimizer, a stop is a stop."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from mtp_ce import Rho1ExcessScorer, ShuffledWeights, weighted_mtp_ce
from mtp_ce.hf.wrapper import MTPWrapper
from mtp_ce.ops.chunks import CPU_SUM_BYTES
from mtp_ce.scorers.uniform import UniformScorer
from mtp_ce.scorers.weights import TokenWeights, WeightStatistics
from mtp_ce.training.config.model import MTPConfig
from mtp_ce.training.config.recipe import load_recipe
from mtp_ce.training.config.schema import Recipe
from mtp_ce.training.data.rows import IGNORE, PackedRows, rows_of_step
from mtp_ce.training.errors import StateRefusedError, StepRefusedError, StoppedError
from mtp_ce.training.interrupt import Stop
from mtp_ce.training.loop import trainer as loop
from mtp_ce.training.loop.trainer import Trainer, loss_count
from mtp_ce.training.loop.weighing import Weighing, stored
from mtp_ce.training.metrics.head_scores import HeadResult
from mtp_ce.training.models.build import build_model
from mtp_ce.training.models.optimizer import build_optimizer, build_schedule
from mtp_ce.training.run.fitting import label_halos


def make_trainer(recipe: Recipe, log, **parts) -> Trainer:
    """A trainer on random documents of uneven length, no tokenizer needed."""
    torch.manual_seed(recipe.seed)
    generator = torch.Generator().manual_seed(7)
    lengths = torch.randint(2, 90, (40,), generator=generator).tolist()
    documents = [torch.randint(recipe.data.vocab_size, (n,), generator=generator) for n in lengths]
    model = build_model(recipe)
    optimizer = build_optimizer(model, recipe.optimizer)
    fixed = {
        "recipe": recipe,
        "model": model,
        "weigh": Weighing(UniformScorer()).weigh,
        "optimizer": optimizer,
        "schedule": build_schedule(optimizer, recipe.optimizer, recipe.train.steps),
        "rows": PackedRows(documents[:30], recipe.data.sequence_length, 0),
        "held_out": PackedRows(documents[30:], recipe.data.sequence_length, 0),
        "device": torch.device("cpu"),
        "log": log,
    }
    return Trainer(**{**fixed, **parts})


class Log(list):
    """What the trainer logs, in order."""

    def __call__(self, step: int, metrics: dict[str, float]) -> None:
        self.append((step, metrics))

    def series(self, name: str) -> list[tuple[int, float]]:
        return [(step, metrics[name]) for step, metrics in self if name in metrics]


FEW = ["train.steps=4", "train.log_every=1", "validation.every=null", "data.vocab_size=300"]


@pytest.mark.parametrize(
    ("micro_batch_size", "head_reduction", "halos"),
    [(1, "live", (0, 0)), (2, "target", (0, 0)), (4, "live", (0, 3)), (1, "target", (2, 3))],
)
def test_micro_batches_add_up_to_the_batch(small, micro_batch_size, head_reduction, halos):
    """Rows with few targets count by their targets: a mean of micro-batch means would drift at once."""
    whole, parts = Log(), Log()
    options = [*FEW, f"model.mtp.head_reduction={head_reduction}"]
    for log, more in ((whole, []), (parts, [f"train.micro_batch_size={micro_batch_size}"])):
        trainer = make_trainer(small([*options, *more]), log)
        trainer.rows = trainer.rows.with_halos(*halos)
        trainer.fit()
    assert whole.series("train/weight_mean") == parts.series("train/weight_mean")
    for name in ("train/loss", "train/ce_mean", "train/ce_head_2", "optim/grad_norm", "val/ce_head_0"):
        for (step, expected), (same_step, value) in zip(whole.series(name), parts.series(name), strict=True):
            assert step == same_step
            assert value == pytest.approx(expected, rel=2e-5), name


@pytest.mark.parametrize("kind", ["residual", "sequential"])
def test_a_step_on_rows_with_halos_trains_on_every_target(small, kind):
    """Of the step's rows, each head has those of the text beyond them, too; a scorer weighs what it can see."""
    seen = []
    trainer = make_trainer(small([*FEW, f"model.mtp.kind={kind}"]), Log())
    halos = label_halos(trainer.model)
    trainer.rows = trainer.rows.with_halos(*halos)
    assert halos == (0, 3)
    original = trainer._accumulate

    def accumulate(batch, normalizer):
        found = original(batch, normalizer)
        seen.append((batch, found[1].rows.tolist(), float(normalizer)))
        return found

    trainer._accumulate = accumulate
    trainer.fit()
    for batch, rows, normalizer in seen:
        documents, own = batch.document_ids, batch.document_ids[:, : batch.input_ids.shape[1]]
        S = own.shape[1]
        is_label = batch.labels != IGNORE
        wanted = [(documents[:, 1 + h : 1 + h + S] == own) & is_label[:, 1 + h : 1 + h + S] for h in range(3)]
        assert rows == [int(head.sum()) for head in wanted]
        assert normalizer == int(torch.stack(wanted).any(0).sum())


def test_stored_weights_of_the_tokens_beyond_a_row_are_theirs(small):
    """Not the neutral ones of tokens that nothing has scored; statistics count every token in its own row alone."""
    recipe = small(FEW)
    rows = make_trainer(recipe, Log()).rows.with_halos(0, 3)
    rows.token_weights = torch.linspace(0.5, 1.5, len(rows.tokens))
    batch = rows.batch(torch.arange(4))
    found = stored(recipe)(batch, None)
    assert torch.equal(found.weights, batch.token_weights)
    assert torch.equal(found.weights[0, -3:], rows.token_weights[64:67])
    assert int(found.statistics.count) == int((batch.without_halos().labels != IGNORE).sum())


@pytest.mark.parametrize("stored", [False, True])
def test_the_loss_of_every_micro_batch_is_told_its_rows(small, stored, monkeypatch):
    """Counted before the batch is on the device; stored weights of 0 leave their rows out, too."""
    told: list[tuple[int, int]] = []
    original = MTPWrapper.forward

    def forward(self, *arguments, drop_dead_rows, **options):
        assert type(drop_dead_rows) is int
        output = original(self, *arguments, drop_dead_rows=drop_dead_rows, **options)
        told.append((drop_dead_rows, int((output.stats.top1 >= 0).sum())))
        return output

    monkeypatch.setattr(MTPWrapper, "forward", forward)
    recipe = small([*FEW, "train.micro_batch_size=1"])
    parts = {}
    if stored:
        parts["weigh"] = lambda batch, current: TokenWeights(
            batch.token_weights, WeightStatistics.of(torch.ones(3), torch.ones(3) > 0, torch.ones(3) > 1)
        )
    trainer = make_trainer(recipe, Log(), **parts)
    if stored:
        trainer.rows.token_weights = (torch.arange(len(trainer.rows.tokens)) % 2).float()
    trainer.fit()
    assert len(told) == recipe.train.steps * recipe.train.batch_size
    assert all(passed == computed for passed, computed in told)
    assert len({passed for passed, _ in told}) > 1


def tiny(loss: str, *overrides: str) -> Recipe:
    """The shipped recipe's model and batch, for a few steps more than its warm-up."""
    return load_recipe(
        "tiny", ["train.steps=32", "train.log_every=1", "validation.every=null", f"model.mtp.loss={loss}", *overrides]
    )


def test_linear_and_logits_path_train_alike():
    """Losses of the shipped recipe's model in 16 steps agree to 1e-5."""
    linear, logits = Log(), Log()
    for path, log in (("linear", linear), ("logits", logits)):
        make_trainer(tiny(path, "train.steps=16", "optimizer.warmup_steps=8"), log).fit()
    for name in ("train/loss", "train/ce_mean", "train/ce_head_3"):
        pairs = zip(linear.series(name), logits.series(name), strict=True)
        for (step, one), (_, other) in pairs:
            assert one == pytest.approx(other, rel=1e-5), (name, step)
    losses = [loss for _, loss in linear.series("train/loss")]
    assert len(losses) == 16
    assert losses[-1] < losses[0] - 0.1


def largest_allocation(run: Callable[[], Any]) -> int:
    """Bytes; of torch's allocator, so inside custom operators too."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    return max(event.nbytes() for event in events if event.name() == "[memory]")


@pytest.mark.parametrize("loss", ["linear", "logits"])
def test_no_tensor_of_a_training_step_has_the_size_of_all_logits(loss):
    """On the linear path; the logits path, whose heads come one by one, has H tensors of a quarter of it."""
    recipe = tiny(loss, "train.batch_size=8")
    trainer = make_trainer(recipe, Log())
    largest = largest_allocation(lambda: trainer._step(1, trainer._window()))
    rows = recipe.train.batch_size * recipe.data.sequence_length
    one_head = rows * recipe.data.vocab_size * 4
    if loss == "linear":
        # The chunk is bounded whatever the batch is; this batch's logits are 4 * 34 MB.
        assert largest < 1.15 * CPU_SUM_BYTES < recipe.model.mtp.horizon * one_head
    else:
        assert largest >= one_head


def test_a_line_of_metrics_is_the_sum_of_its_steps_divided_once(small):
    """Steps differ in rows, so the mean of the steps' means would be another number."""
    every, window = Log(), Log()
    make_trainer(small([*FEW, "train.batch_size=1", "train.steps=9"]), every).fit()
    make_trainer(small([*FEW, "train.batch_size=1", "train.steps=9", "train.log_every=9"]), window).fit()
    assert [step for step, _ in window.series("train/loss")] == [1, 9]
    trainer = make_trainer(small([*FEW, "train.batch_size=1", "train.steps=9"]), Log())
    batches = (trainer.rows.batch(rows_of_step(step, 1, len(trainer.rows), 0)) for step in range(9))
    counts = [int(loss_count(batch, MTPConfig(horizon=3))) for batch in batches]
    assert len(set(counts)) > 1
    losses = [loss for _, loss in every.series("train/loss")]
    expected = sum(n * loss for n, loss in zip(counts[1:], losses[1:], strict=True)) / sum(counts[1:])
    assert window.series("train/loss")[1][1] == pytest.approx(expected, rel=1e-6)


def test_the_loss_is_a_mean_over_positions_with_a_target_or_over_predicted_tokens():
    documents = [torch.arange(n) for n in (5, 1, 3)]
    batch = PackedRows(documents, row_length=10, pad_id=0).batch(torch.tensor([0]))
    # 4 of the first document, none of the single token, 2 of the last, none of the padding.
    assert int(loss_count(batch, MTPConfig(horizon=3))) == 6
    # The last token of the first document is an answer: three positions see it.
    batch.labels[:, 1:4] = batch.labels[:, 6:] = IGNORE
    assert int(loss_count(batch, MTPConfig(horizon=3))) == 3
    assert int(loss_count(batch, MTPConfig(horizon=3, head_reduction="target"))) == 1


@pytest.mark.parametrize("poison", ["loss", "gradient"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_never_reaches_the_optimizer(small, poison, value):
    """Planted before step 3: the parameters are bit for bit those after step 2, and so is the optimizer."""
    log = Log()
    trainer = make_trainer(small(FEW), log)
    saved = {}

    def plant() -> None:
        trainer.tick_count = getattr(trainer, "tick_count", 0) + 1
        if trainer.tick_count < 2:
            return
        if poison == "loss":
            with torch.no_grad():
                trainer.model.causal.model.norm.weight[0] = value
        else:
            trainer.model.heads.blocks[0].weight.register_hook(lambda gradient: gradient * value)
        saved["model"] = copy.deepcopy(trainer.model.state_dict())
        saved["optimizer"] = copy.deepcopy(trainer.optimizer.state_dict())

    trainer.tick = plant
    with pytest.raises(StepRefusedError) as raised:
        trainer.fit()
    assert raised.value.step == 3
    assert raised.value.quantity == ("train/loss" if poison == "loss" else "optim/grad_norm")
    assert not math.isfinite(raised.value.value)
    assert "step was not taken" in str(raised.value)
    assert "\n" not in str(raised.value)
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor.nan_to_num(1.5), saved["model"][name].nan_to_num(1.5)), name
    for index, state in trainer.optimizer.state_dict()["state"].items():
        for name, tensor in state.items():
            assert torch.equal(tensor, saved["optimizer"]["state"][index][name])
            assert tensor.isfinite().all()
    assert [step for step, _ in log.series("train/loss")] == [1, 2]
    assert all(math.isfinite(v) for _, metrics in log for v in metrics.values())


WRONG_WEIGHTS = {
    "nan": ("train/weight_mean", lambda w: w.index_fill(1, torch.tensor([3]), math.nan)),
    "infinite": ("train/weight_mean", lambda w: w.index_fill(1, torch.tensor([3]), math.inf)),
    "mean too high": ("train/weight_mean", lambda w: w * 1.01),
    "mean too low": ("train/weight_mean", lambda w: w * 0.99),
    "negative": ("train/weight_min", lambda w: w + torch.linspace(2, -2, w.numel()).view_as(w)),
    "above the cap": ("train/weight_max", lambda w: w + torch.linspace(-0.9, 0.9, w.numel()).view_as(w)),
}


@pytest.mark.parametrize("mistake", WRONG_WEIGHTS)
def test_weights_that_break_their_promise_never_reach_the_optimizer(small, mistake):
    """Rows without padding, so that every place is supervised."""
    quantity, spoil = WRONG_WEIGHTS[mistake]
    recipe = small(FEW)

    def weigh(batch, current):
        weights = spoil(torch.ones_like(batch.labels, dtype=torch.float32))
        return TokenWeights(weights, WeightStatistics.of(weights, torch.ones_like(weights, dtype=torch.bool)))

    rows = PackedRows([torch.arange(64 * 8) % 300], recipe.data.sequence_length, 0)
    trainer = make_trainer(recipe, Log(), weigh=weigh, rows=rows, weight_bounds=(0.0, 1.5))
    before = copy.deepcopy(trainer.model.state_dict())
    with pytest.raises(StepRefusedError) as raised:
        trainer.fit()
    assert (raised.value.step, raised.value.quantity) == (1, quantity)
    assert "step was not taken" in str(raised.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())


def test_a_scorer_that_fails_is_refused_and_not_taken_for_uniform_weights(small):
    """One NaN in the reference makes every weight the neutral 1, which breaks no other promise."""
    recipe = small(FEW)
    reference = build_model(recipe).causal
    with torch.no_grad():
        reference.model.norm.weight[0] = math.nan
    trainer = make_trainer(recipe, Log(), weigh=Weighing(Rho1ExcessScorer(reference)).weigh)
    with pytest.raises(StepRefusedError, match=r"expected 0 to 0\.01; the step was not taken") as raised:
        trainer.fit()
    assert (raised.value.step, raised.value.quantity) == (1, "train/weight_neutral_ratio")
    assert raised.value.value > 0.9


POISONS = {
    "parameter": ("model.model.norm.weight", lambda t: t.model.causal.model.norm.weight.data),
    "moment": (
        "model.model.norm.weight.exp_avg",
        lambda t: t.optimizer.state[t.model.causal.model.norm.weight]["exp_avg"],
    ),
}
# What is about to be kept: step, overrides, whether the loop is stopped there.
KEEPINGS = {
    "a checkpoint": (2, ["checkpoint.every=2"], False),
    "the last step": (4, ["checkpoint.every=null"], False),
    "a stop": (3, [], True),
}


@pytest.mark.parametrize("keeping", KEEPINGS)
@pytest.mark.parametrize("poison", POISONS)
def test_a_state_that_is_not_finite_is_never_kept(small, poison, keeping):
    """Planted after a step that was in order, as an optimizer does that overflows."""
    step, options, stopped = KEEPINGS[keeping]
    name, tensor = POISONS[poison]
    saved = []
    trainer = make_trainer(
        small([*FEW, *options]), Log(), save_checkpoint=lambda trainer: not saved.append(trainer.done)
    )

    def plant() -> None:
        if trainer.done == step:
            tensor(trainer)[-1] = math.nan
            if stopped:
                trainer.stop.set()

    trainer.tick = plant
    with pytest.raises(StateRefusedError, match="nothing of it is saved") as raised:
        trainer.fit()
    assert (raised.value.step, raised.value.quantity) == (step, name)
    assert saved == []


def test_a_validation_that_is_not_finite_is_refused_and_not_logged(small, monkeypatch):
    log = Log()
    trainer = make_trainer(small([*FEW, "validation.every=2"]), log)
    bad = [
        HeadResult(2.0, 0.5, 0.5, 1.0, 9),
        HeadResult(math.inf, 0.5, 0.5, 0.5, 8),
        HeadResult(None, None, None, None, 0),
    ]
    monkeypatch.setattr(loop, "score_heads", lambda *_: bad)
    with pytest.raises(StateRefusedError) as raised:
        trainer.fit()
    assert (raised.value.step, raised.value.quantity, raised.value.value) == (2, "val/ce_head_1", math.inf)
    assert not any("val/ce_mean" in metrics for _, metrics in log)


@pytest.mark.parametrize(("every", "kept"), [("2", [2, 4]), ("3", [3, 4]), ("null", [4])])
def test_a_stop_in_the_last_validation_loses_no_step(small, every, kept):
    """The state is kept before that validation, or, without checkpoints, by the stop."""
    saved = []

    class Impatient(Trainer):
        def validate(self, rows=None):
            assert every == "null" or saved == kept
            self.stop.set()
            return super().validate(rows)

    usual = make_trainer(small([*FEW, f"checkpoint.every={every}"]), Log())
    trainer = Impatient(**{**vars(usual), "save_checkpoint": lambda trainer: not saved.append(trainer.done)})
    with pytest.raises(StoppedError):
        trainer.fit()
    assert saved == kept


def test_a_head_without_a_target_has_no_cross_entropy(small):
    """Documents of two tokens have a target for head 0 alone."""
    documents, log = [torch.arange(2)] * 64, Log()
    rows = PackedRows(documents, 64, 0)
    make_trainer(small([*FEW, "train.batch_size=2"]), log, rows=rows, held_out=rows).fit()
    for side in ("train", "val"):
        for h, missing in enumerate([False, True, True]):
            assert all(math.isnan(ce) == missing for _, ce in log.series(f"{side}/ce_head_{h}")), (side, h)
    assert all(math.isfinite(ce) for _, ce in log.series("train/ce_mean"))
    assert log.series("val/ce_mean")[0][1] == log.series("val/ce_head_0")[0][1]


def test_a_refused_step_keeps_the_metrics_of_the_steps_before_it(small):
    log = Log()
    trainer = make_trainer(small([*FEW, "train.log_every=100"]), log)
    done = []

    def plant() -> None:
        done.append(1)
        if len(done) == 3:
            with torch.no_grad():
                trainer.model.causal.model.norm.weight.fill_(math.nan)

    trainer.tick = plant
    with pytest.raises(StepRefusedError):
        trainer.fit()
    assert [step for step, _ in log] == [1, 3]


def test_a_stop_ends_the_loop_between_two_steps_and_keeps_its_metrics(small):
    log, stop = Log(), Stop()
    trainer = make_trainer(small([*FEW, "train.steps=50", "train.log_every=100"]), log, stop=stop)
    ticks = []

    def stop_after_three() -> None:
        ticks.append(1)
        if len(ticks) == 3:
            stop.set()

    trainer.tick = stop_after_three
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert len(ticks) == 3
    assert [step for step, _ in log] == [1, 3]


def test_validation_reads_every_held_out_row_whatever_the_batch_size(small):
    results = []
    for batch_size in (1, 3, 64):
        trainer = make_trainer(small([*FEW, f"validation.batch_size={batch_size}"]), Log())
        results.append(trainer.validate())
    tokens = len(trainer.held_out.tokens)
    for h in range(3):
        assert len({result[h].rows for result in results}) == 1
        assert results[0][h].rows < tokens
        assert [result[h].ce for result in results] == pytest.approx([results[0][h].ce] * 3, rel=1e-6)
        assert len({result[h].top1 for result in results}) == 1
    assert trainer.model.training, "validation hands the model back as it was"


def test_clipping_bounds_the_step_but_not_the_logged_norm(small):
    free, clipped = Log(), Log()
    make_trainer(small([*FEW, "optimizer.clip_norm=null"]), free).fit()
    trainer = make_trainer(small([*FEW, "optimizer.clip_norm=1e-3"]), clipped)
    trainer.fit()
    assert free.series("optim/grad_norm")[0] == clipped.series("optim/grad_norm")[0]
    assert free.series("optim/grad_norm")[0][1] > 1e-2
    norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in trainer.model.parameters()]))
    assert float(norm) == pytest.approx(1e-3, rel=1e-3)


class EvenTokens:
    """A scorer with an opinion: even tokens share all weight, odd ones have none."""

    def run(self, input_ids, labels, document_ids=None, **context):
        even = (labels != -100) & (input_ids % 2 == 0)
        weights = even * ((labels != -100).sum() / even.sum())
        return TokenWeights(weights, WeightStatistics.of(weights, labels != -100))


def test_a_scorers_weights_are_those_of_the_token_predicted(small):
    log = Log()
    recipe = small([*FEW, "train.steps=2", "optimizer.warmup_steps=1"])
    trainer = make_trainer(recipe, log, weigh=Weighing(EvenTokens()).weigh)
    batch = trainer.rows.batch(rows_of_step(0, recipe.train.batch_size, len(trainer.rows), recipe.seed))
    with torch.no_grad():
        logits = trainer.model.head_logits(input_ids=batch.input_ids, position_ids=batch.position_ids)
    weights, _ = EvenTokens().run(batch.input_ids, batch.labels)
    losses = {
        alignment: weighted_mtp_ce(
            logits,
            batch.labels,
            weights,
            weight_alignment=alignment,
            document_ids=batch.document_ids,
            impl="reference",
        ).item()
        for alignment in ("target", "position")
    }
    trainer.fit()
    assert log.series("train/loss")[0][1] == pytest.approx(losses["target"], rel=1e-5)
    assert losses["position"] != pytest.approx(losses["target"], rel=1e-4)
    for name, expected in (("min", 0.0), ("mean", 1.0), ("max", float(weights.max()))):
        assert log.series(f"train/weight_{name}")[0][1] == pytest.approx(expected)
    # All weight on half the tokens: half the effective sample.
    assert log.series("train/weight_ess")[0][1] == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("control", [False, True])
def test_excess_loss_over_a_reference_weighs_the_training(small, control):
    """The reference is another model of the recipe: weights differ, and their mean is 1 in every line."""
    recipe = small([*FEW, "train.micro_batch_size=4"])
    torch.manual_seed(99)
    scorer = Rho1ExcessScorer(build_model(recipe).causal)
    log, uniform = Log(), Log()
    make_trainer(recipe, log, weigh=Weighing(ShuffledWeights(scorer) if control else scorer).weigh).fit()
    make_trainer(recipe, uniform).fit()
    assert all(value == 0 for _, value in log.series("train/weight_neutral_ratio")), "first tokens are not counted"
    for name, low, high in (("mean", 1 - 1e-5, 1 + 1e-5), ("min", 0.05, 0.9), ("max", 1.1, 3), ("ess", 0.3, 0.99)):
        assert all(low <= value <= high for _, value in log.series(f"train/weight_{name}")), name
    assert all(value == 0 for _, value in uniform.series("train/weight_clipped_ratio"))
    assert log.series("train/loss")[0] != uniform.series("train/loss")[0]
    # The first step's cross entropies know nothing of the weights.
    assert log.series("train/ce_head_1")[0][1] == pytest.approx(uniform.series("train/ce_head_1")[0][1], rel=1e-6)
