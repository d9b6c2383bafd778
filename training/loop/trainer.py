"""The training loop: forward, loss, backward, gate, optimizer step. It never branches on the kind of a part.

    loss = 1/N sum_{b,t} avg(b,t)        N: positions of the global batch with a target for at least one head;
                                            with model.mtp.head_reduction=target the tokens that a head predicts

Each rank counts N in its own rows before the first forward, and every micro-batch is divided by the global count, so
the accumulated gradient is that of the global batch for any micro-batch size. Statistics are sums on the device, read
by the host every `log_every` steps; the gate is the only host synchronisation of a step.

The end of the loop is a place where state is kept, as every `checkpoint.every` steps are: the checkpoint after the last
step is written before the last validation. Whatever is kept is finite.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from functools import reduce
from itertools import islice

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from mtp_ce.hf.wrapper import MTPWrapper
from mtp_ce.next_token import NextToken
from mtp_ce.ops.rows import count_terms, row_targets
from mtp_ce.options import LossInputs, LossOptions
from mtp_ce.scorers.weights import TokenWeights, WeightStatistics
from mtp_ce.training.config.model import MTPConfig
from mtp_ce.training.config.schema import Recipe
from mtp_ce.training.data.rows import IGNORE, Batch, PackedRows, rows_of_step, seed_of
from mtp_ce.training.errors import StateRefusedError, StepRefusedError, StoppedError
from mtp_ce.training.interrupt import Stop
from mtp_ce.training.loop.checkpoint import state_tensors
from mtp_ce.training.loop.finite import refuse_not_finite
from mtp_ce.training.loop.ranks import Ranks
from mtp_ce.training.loop.weighing import NEUTRAL_BOUND, Weigh
from mtp_ce.training.loop.window import Window
from mtp_ce.training.metrics.head_scores import HeadResult, score_heads, validation_metrics
from mtp_ce.training.metrics.noise import NoiseSums
from mtp_ce.training.metrics.sums import HeadSums
from mtp_ce.training.models.optimizer import clip_gradients

# Allowed distance from 1 of the mean of a batch's token weights, which is a sum in fp32.
MEAN_TOLERANCE = 1e-3

# Takes the number of steps done and the metrics of the steps since the last call.
Log = Callable[[int, dict[str, float]], None]


@dataclass
class Trainer:
    """The training loop of one model.

    Attributes:
        recipe: steps, batch sizes, clipping, seed, logging and validation intervals.
        model: returns the weighted loss over H heads with its statistics; already on `device`.
        weigh: returns the token weights of a micro-batch.
        optimizer: over the model's parameters.
        schedule: the learning rate, advanced after every step.
        rows: training rows.
        held_out: validation rows.
        device: device of the model.
        log: receives metrics by name.
        tick: called after every step.
        weight_bounds: smallest and largest allowed weight of a supervised token.
        stop: set from outside, on any rank; the loop raises StoppedError before the next step is taken, or before the
            next batch of a validation.
        ranks: the ranks that run this loop together; the model is sharded over them.
        save_checkpoint: writes a checkpoint of this loop, and returns whether it could; called every
            `checkpoint.every` steps, after the last one, and when stopped.
        done: steps done, including those of earlier processes.
        validations: validation results by the number of steps done before.
    """

    recipe: Recipe
    model: MTPWrapper
    weigh: Weigh
    optimizer: Optimizer
    schedule: LambdaLR
    rows: PackedRows
    held_out: PackedRows
    device: torch.device
    log: Log
    tick: Callable[[], None] = lambda: None
    weight_bounds: tuple[float, float] = (0.0, math.inf)
    stop: Stop = field(default_factory=Stop)
    ranks: Ranks = field(default_factory=Ranks)
    save_checkpoint: Callable[[Trainer], bool] = lambda trainer: True
    done: int = 0
    validations: dict[int, list[HeadResult]] = field(default_factory=dict)

    def fit(self) -> list[HeadResult]:
        """Train until `recipe.train.steps` steps are done.

        Returns:
            The validation after the last step, one result per head.

        Raises:
            StepRefusedError: loss, gradient or token weights were out of bounds; the step was not taken.
            StateRefusedError: a parameter, an optimizer moment or a validation is not finite; it is not saved.
            StoppedError: `stop` was set.
        """
        train, every = self.recipe.train, self.recipe.checkpoint.every
        window = self._window()
        saved = self.done
        try:
            self._validate_if_due()
            while self.done < train.steps:
                self._stop_alone()
                self._step(self.done + 1, window)
                self.done += 1
                self.tick()
                last = self.done == train.steps
                saving = every is not None and (last or self.done % every == 0)
                # A checkpoint starts a new window, so that it need not store a partial one.
                if last or saving or self.done == 1 or self.done % train.log_every == 0:
                    self.log(self.done, window.metrics())
                    window = self._window()
                if not last:
                    self._validate_if_due()
                if last or saving:
                    self.refuse_not_finite()
                if saving and self.save_checkpoint(self):
                    saved = self.done
            # After the checkpoint: a validation may take long, and the steps are done.
            self._validate_if_due()
        except (StepRefusedError, StoppedError) as error:
            # Log the steps taken since the last line of metrics.
            if window.steps:
                self.log(self.done, window.metrics())
            if isinstance(error, StoppedError) and self.done > saved:
                self.refuse_not_finite()
                self.save_checkpoint(self)
            raise
        return self.validations[train.steps]

    def refuse_not_finite(self) -> None:
        """Refuse to keep parameters and optimizer moments that are not finite; all ranks call this together.

        Raises:
            StateRefusedError: one of them is not finite, on any rank.
        """
        # "model.NAME" and "optimizer.NAME.exp_avg" in a checkpoint.
        state = state_tensors(self.model, self.optimizer)
        refuse_not_finite(self.done, {name.partition(".")[2]: x for name, x in state.items()}, self.ranks)

    def _step(self, step: int, window: Window) -> None:
        """Take one optimizer step and add it to the window, or refuse it and add nothing."""
        train = self.recipe.train
        started = time.perf_counter()
        # Dropout and other random numbers follow from seed, step and rank, so a resumed run draws the same ones.
        torch.manual_seed(seed_of("step", self.recipe.seed, step, self.ranks.data_rank))
        rows = rows_of_step(step - 1, train.batch_size, len(self.rows), self.recipe.seed)
        batch = self.rows.batch(rows[self.ranks.slice(train.batch_size)])
        count = loss_count(batch, self.recipe.model.mtp).to(self.device)
        self.ranks.add(count)
        normalizer = torch.where(count > 0, count, 1).to(torch.float32)

        self.optimizer.zero_grad(set_to_none=True)
        loss, sums, weights, noise = self._accumulate(batch, normalizer)
        limit = self.recipe.optimizer.clip_norm
        norm = clip_gradients(self.model.parameters(), limit).to(self.device)
        loss, weights = self._combine_ranks(loss, weights)
        self._gate(step, loss, norm, weights)
        self.optimizer.step()

        window.add(
            loss=loss * normalizer,
            count=count,
            sums=sums,
            weights=weights,
            noise=noise,
            grad_norm=norm,
            lr=float(self.schedule.get_last_lr()[0]),
            seconds=time.perf_counter() - started,
        )
        self.schedule.step()

    def _accumulate(
        self, batch: Batch, normalizer: Tensor
    ) -> tuple[Tensor, HeadSums, WeightStatistics, NoiseSums | None]:
        """Accumulate gradients over the micro-batches of this rank.

        Args:
            batch: on the host.
            normalizer: [], N of the global batch.

        Returns:
            Loss, sums per head, weight statistics, and sums over planted noise, if it is known.
        """
        size = self.recipe.train.micro_batch_size or self.recipe.train.batch_size
        # Masked rows are left out of the loss, and their number is known before they are on the device.
        counts = [
            self.model.count_rows(
                input_ids=x.input_ids,
                labels=x.labels,
                document_ids=x.document_ids,
                token_weights=x.token_weights,
                left_halo=x.left_halo,
            )
            for x in batch.split(size)
        ]
        sums = HeadSums.zeros(self.recipe.model.mtp.horizon, self.device)
        noise = None if batch.noise is None else NoiseSums.zeros(self.device)
        weights: WeightStatistics | None = None
        loss = torch.zeros((), device=self.device)
        for micro, rows in zip(batch.to(self.device).split(size), counts, strict=True):
            scored: list[TokenWeights] = []

            # The model calls this with its own heads, whose cross entropies and drafts a scorer may need.
            def weigh(current: NextToken, micro: Batch = micro, scored: list[TokenWeights] = scored) -> Tensor:
                scored.append(self.weigh(micro, current))
                return micro.over_labels(scored[0].weights)

            out = self.model(
                micro.input_ids,
                position_ids=micro.position_ids,
                labels=micro.labels,
                token_weights=weigh,
                document_ids=micro.document_ids,
                next_input_ids=micro.next_input_ids,
                left_halo=micro.left_halo,
                # FSDP averages gradients over the slices of the batch, so each divides by N / slices.
                num_items_in_batch=normalizer / self.ranks.data_size,
                drop_dead_rows=rows,
                return_stats=True,
            )
            out.loss.backward()
            loss += out.loss.detach()
            sums.add(out.stats)
            if noise and micro.noise is not None:
                # Of the tokens that head 0 predicts in the row: its own ones but the first.
                own = slice(micro.left_halo + 1, micro.left_halo + micro.input_ids.shape[1])
                of_labels = micro.over_labels(scored[0].weights)
                noise.add(of_labels[:, own], micro.noise[:, own], out.stats.live[:, :-1, 0])
            statistics = scored[0].statistics
            weights = statistics if weights is None else weights.merge(statistics)
        assert weights is not None
        return loss, sums, weights, noise

    def _combine_ranks(self, loss: Tensor, weights: WeightStatistics) -> tuple[Tensor, WeightStatistics]:
        """Combine loss and weight statistics of all ranks; a signal on one rank stops all of them."""
        if self.ranks.size == 1:
            return loss, weights
        mine = [loss, *(getattr(weights, field.name) for field in fields(weights)), torch.tensor(self.stop.signal)]
        gathered = self.ranks.gather(torch.stack([x.double().to(self.device) for x in mine]))
        if (stops := gathered[:, -1]).any():
            raise StoppedError(int(stops.max()))
        # Ranks that share layers have the same rows.
        losses, *columns, _ = gathered[:: self.ranks.tensor_parallel].unbind(1)
        ranks = [WeightStatistics(*values) for values in zip(*columns, strict=True)]
        return losses.mean().to(loss.dtype), reduce(WeightStatistics.merge, ranks)

    def _gate(self, step: int, loss: Tensor, norm: Tensor, weights: WeightStatistics) -> None:
        """Refuse the step if a number is out of bounds; the one place where a step waits for the device."""
        low, high = self.weight_bounds
        neutral = weights.neutral / weights.count.clamp(min=1)
        # Weights come first: wrong weights are the cause of a wrong loss and gradient.
        allowed = {
            "train/weight_neutral_ratio": (neutral, 0.0, NEUTRAL_BOUND),
            "train/weight_mean": (weights.mean, 1 - MEAN_TOLERANCE, 1 + MEAN_TOLERANCE),
            "train/weight_min": (weights.min, low - MEAN_TOLERANCE, math.inf),
            "train/weight_max": (weights.max, -math.inf, high + MEAN_TOLERANCE),
            "train/loss": (loss, -math.inf, math.inf),
            "optim/grad_norm": (norm, -math.inf, math.inf),
        }
        *values, count = torch.stack([*(value.double() for value, _, _ in allowed.values()), weights.count]).tolist()
        for (quantity, (_, least, most)), value in zip(allowed.items(), values, strict=True):
            if not math.isfinite(value):
                raise StepRefusedError(step, quantity, value)
            # A batch without a supervised token has no weights to check.
            if count and not least <= value <= most:
                raise StepRefusedError(step, quantity, value, f"{least:g} to {most:g}")

    def validate(self, rows: PackedRows | None = None) -> list[HeadResult]:
        """Score every head on rows, all valid rows with the same weight.

        Args:
            rows: None means the held-out rows, at most `recipe.validation.rows` of them.

        Raises:
            StateRefusedError: the cross entropy of a head is not finite.
            StoppedError: `stop` was set.
        """
        self.model.eval()
        rows = self.held_out if rows is None else rows
        validation = self.recipe.validation
        batches = self._deal(rows.in_order(validation.batch_size, validation.rows))
        results = score_heads(self.model, batches, self.ranks.add)
        self.model.train()
        for h, head in enumerate(results):
            if head.ce is not None and not math.isfinite(head.ce):
                raise StateRefusedError(self.done, f"val/ce_head_{h}", head.ce)
        return results

    def _validate_if_due(self) -> None:
        validation, done = self.recipe.validation, self.done
        periodic = validation.every and done and done % validation.every == 0
        due = done == self.recipe.train.steps or periodic or (validation.at_start and done == 0)
        if due and done not in self.validations:
            self.validations[done] = self.validate()
            self.log(done, validation_metrics(self.validations[done]))

    def _deal(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Deal host batches to the ranks, the same number to each; a rank left over gets one without labels.

        Every rank must run every forward, because all ranks gather the sharded parameters together.
        """
        while dealt := list(islice(batches, self.ranks.data_size)):
            self.ranks.check(self.stop)
            mine = dealt[self.ranks.data_rank] if self.ranks.data_rank < len(dealt) else dealt[0].unlabelled()
            yield mine.to(self.device)

    def _window(self) -> Window:
        tokens = self.recipe.train.batch_size * self.rows.row_length
        return Window(HeadSums.zeros(self.recipe.model.mtp.horizon, self.device), self.ranks, tokens)

    def _stop_alone(self) -> None:
        # One rank of several may not leave the collective; they agree in `_combine_ranks`.
        if self.ranks.size == 1:
            self.stop.check()


def loss_count(batch: Batch, mtp: MTPConfig) -> Tensor:
    """Count what the loss is a mean over, positions with a target or predicted tokens: 0-d, on the batch's device."""
    options = LossOptions(head_reduction=mtp.head_reduction, left_halo=batch.left_halo, ignore_index=IGNORE)
    inputs = LossInputs(batch.labels, document_ids=batch.document_ids)
    _, _, valid = row_targets(inputs, options, batch.input_ids.shape[1], mtp.horizon)
    count = count_terms(valid, options, inputs)
    return count.float() if count.is_floating_point() else count
