"""The loop: forward, loss, backward, gate, step. It is given its parts and knows none of their kinds.

    loss = 1/N sum_{b,t} avg(b,t)        N: positions of the whole batch with a target for some head

N is counted before the first forward, by each rank in its rows, and handed to every micro-batch, so their gradients add
up to the gradient of the whole batch, whatever the micro-batch size. Statistics are sums on the device, read by the
host every `log_every` steps; the one value that the host awaits in each step is the gate's.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from functools import reduce
from itertools import islice

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from mtp_ce.hf.wrapper import MTPWrapper
from mtp_ce.next_token import NextToken
from mtp_ce.ops.rows import row_targets
from mtp_ce.scorers.weights import TokenWeights, WeightStatistics
from mtp_ce.training.config.schema import Recipe
from mtp_ce.training.data.rows import IGNORE, Batch, PackedRows, rows_of_step, seed_of
from mtp_ce.training.errors import StepRefusedError, StoppedError
from mtp_ce.training.interrupt import Stop
from mtp_ce.training.loop.ranks import Ranks, local
from mtp_ce.training.loop.weighing import Weigh
from mtp_ce.training.metrics.head_scores import HeadResult, score_heads, validation_metrics
from mtp_ce.training.metrics.sums import HeadSums

# How far the mean of a batch's weights, a sum in fp32, may be from 1.
MEAN_TOLERANCE = 1e-3

# Takes the steps done and the metrics of the last log_every of them.
Log = Callable[[int, dict[str, float]], None]


@dataclass
class Trainer:
    """One run's loop.

    Attributes:
        recipe: steps, batch sizes, clipping, seed, how often to log and to validate.
        model: gives the weighted loss of H heads and its statistics; already on `device`.
        weigh: gives the token weights of a micro-batch.
        optimizer: over the model's parameters.
        schedule: the learning rate, moved on after every step.
        rows: what is trained on.
        held_out: what is validated on, all of it each time.
        device: where the model is.
        log: takes metrics by name.
        tick: called after every step.
        weight_bounds: smallest and largest weight that a supervised token may have.
        stop: set from outside, on any rank; the loop ends with StoppedError before the next step is taken.
        ranks: who else runs this loop; the model is sharded over them.
        keep: writes a checkpoint of this loop as it is; called every `checkpoint.every` steps, and where it is stopped.
        done: steps done, by an earlier process, too.
        validations: what validations found, by the steps done before them.
    """

    recipe: Recipe
    model: MTPWrapper
    weigh: Weigh
    optimizer: Optimizer
    schedule: LRScheduler
    rows: PackedRows
    held_out: PackedRows
    device: torch.device
    log: Log
    tick: Callable[[], None] = lambda: None
    weight_bounds: tuple[float, float] = (0.0, math.inf)
    stop: Stop = field(default_factory=Stop)
    ranks: Ranks = field(default_factory=Ranks)
    keep: Callable[[Trainer], object] = lambda trainer: None
    done: int = 0
    validations: dict[int, list[HeadResult]] = field(default_factory=dict)

    def fit(self) -> list[HeadResult]:
        """Train until `recipe.train.steps` steps are done.

        Returns:
            The validation after the last step, one result per head.

        Raises:
            StepRefusedError: before the step that would have used the value.
            StoppedError: `stop` was set.
        """
        train, every = self.recipe.train, self.recipe.checkpoint.every
        window = self._window()
        kept = self.done
        try:
            self._validate_where_due()
            while self.done < train.steps:
                self._stop_alone()
                self._step(self.done + 1, window)
                self.done += 1
                self.tick()
                last = self.done == train.steps
                keeping = every is not None and self.done % every == 0 and not last
                # A checkpoint begins a new line of metrics, so that it need not hold half of one.
                if last or keeping or self.done == 1 or self.done % train.log_every == 0:
                    self.log(self.done, window.metrics())
                    window = self._window()
                self._validate_where_due()
                if keeping:
                    self.keep(self)
                    kept = self.done
        except (StepRefusedError, StoppedError) as error:
            # The steps that were taken since the last line are part of the record too.
            if window.steps:
                self.log(window.last_step, window.metrics())
            if isinstance(error, StoppedError) and self.done > kept:
                self.keep(self)
            raise
        return self.validations[train.steps]

    def _validate_where_due(self) -> None:
        validation, done = self.recipe.validation, self.done
        periodic = validation.every and done and done % validation.every == 0
        due = done == self.recipe.train.steps or periodic or (validation.at_start and done == 0)
        if due and done not in self.validations:
            self.validations[done] = self.validate()
            self.log(done, validation_metrics(self.validations[done]))

    def validate(self, rows: PackedRows | None = None) -> list[HeadResult]:
        """Score rows, each live row with the same weight.

        Args:
            rows: None means those that are held out, as many as `recipe.validation.rows` says.

        Raises:
            StoppedError: `stop` was set.
        """
        self.model.eval()
        rows = self.held_out if rows is None else rows
        validation = self.recipe.validation
        batches = self._batches(rows.in_order(validation.batch_size, validation.rows))
        results = score_heads(self.model, batches, self.ranks.add)
        self.model.train()
        return results

    def _batches(self, on_host: Iterator[Batch]) -> Iterator[Batch]:
        """Deal batches out to the ranks, as many to each; where they don't go round, some get one without labels."""
        while together := list(islice(on_host, self.ranks.size)):
            self._stop_alone()
            mine = together[self.ranks.rank] if self.ranks.rank < len(together) else together[0].unlabelled()
            yield mine.to(self.device)

    def _step(self, step: int, window: _Window) -> None:
        """Take one optimizer step and count it, or refuse it and count nothing."""
        train = self.recipe.train
        started = time.perf_counter()
        # Whatever draws random numbers, such as dropout, draws the same ones after a resume.
        torch.manual_seed(seed_of("step", self.recipe.seed, step, self.ranks.rank))
        rows = rows_of_step(step - 1, train.batch_size, len(self.rows), self.recipe.seed)
        batch = self.rows.batch(rows[self.ranks.slice(train.batch_size)])
        positions = scored_positions(batch, self.recipe.model.mtp.horizon).to(self.device)
        self.ranks.add(positions)
        batch = batch.to(self.device)
        normalizer = positions.clamp(min=1).to(torch.float32)

        sums = HeadSums.zeros(self.recipe.model.mtp.horizon, self.device)
        weights: WeightStatistics | None = None
        loss = torch.zeros((), device=self.device)
        self.optimizer.zero_grad(set_to_none=True)
        for micro in batch.split(train.micro_batch_size or train.batch_size):
            scored: list[TokenWeights] = []

            def weigh(current: NextToken, micro: Batch = micro, scored: list[TokenWeights] = scored) -> Tensor:
                scored.append(self.weigh(micro, current))
                return scored[0].weights

            out = self.model(
                micro.input_ids,
                position_ids=micro.position_ids,
                labels=micro.labels,
                token_weights=weigh,
                document_ids=micro.document_ids,
                # Gradients are averaged over the ranks.
                num_items_in_batch=normalizer / self.ranks.size,
                return_stats=True,
            )
            out.loss.backward()
            loss += out.loss.detach()
            sums.add(out.stats)
            statistics = scored[0].statistics
            weights = statistics if weights is None else weights.merge(statistics)
        assert weights is not None

        limit = self.recipe.optimizer.clip_norm
        norm = local(clip_grad_norm_(self.model.parameters(), math.inf if limit is None else limit)).to(self.device)
        loss, weights = self._together(loss, weights)
        self._gate(step, loss, norm, weights)
        self.optimizer.step()

        window.add(
            step=step,
            loss=loss * normalizer,
            positions=positions,
            tokens=train.batch_size * self.rows.row_length,
            sums=sums,
            weights=weights,
            grad_norm=norm,
            lr=float(self.schedule.get_last_lr()[0]),
            seconds=time.perf_counter() - started,
        )
        self.schedule.step()

    def _together(self, loss: Tensor, weights: WeightStatistics) -> tuple[Tensor, WeightStatistics]:
        """The loss and the weights of all ranks; where one of them was stopped, all are, by the same signal."""
        if self.ranks.size == 1:
            return loss, weights
        mine = [loss, *(getattr(weights, field.name) for field in fields(weights)), torch.tensor(self.stop.signal)]
        losses, *parts, stops = self.ranks.gather(torch.stack([x.double().to(self.device) for x in mine])).unbind(1)
        if stops.any():
            raise StoppedError(int(stops.max()))
        ranks = [WeightStatistics(*values) for values in zip(*parts, strict=True)]
        return losses.mean().to(loss.dtype), reduce(WeightStatistics.merge, ranks)

    def _gate(self, step: int, loss: Tensor, norm: Tensor, weights: WeightStatistics) -> None:
        """Refuse the step where a number is out of its bounds; the one place where a step awaits the device."""
        low, high = self.weight_bounds
        # Weights come first: where they are wrong, they are the cause of what else is.
        allowed = {
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
            # A batch without a supervised token has no weights.
            if count and not least <= value <= most:
                raise StepRefusedError(step, quantity, value, f"{least:g} to {most:g}")

    def _window(self) -> _Window:
        return _Window(HeadSums.zeros(self.recipe.model.mtp.horizon, self.device), self.ranks)

    def _stop_alone(self) -> None:
        # Of several ranks none can leave the others; they agree in `_together`.
        if self.ranks.size == 1:
            self.stop.check()


def scored_positions(batch: Batch, horizon: int) -> Tensor:
    """Count the positions at which at least one head has a target: 0-d int64, on the batch's device."""
    _, _, live = row_targets(batch.labels, None, batch.document_ids, H=horizon, shift=1, ignore_index=IGNORE)
    return live.any(-1).sum()


@dataclass
class _Window:
    """The steps since the last line of metrics."""

    sums: HeadSums
    ranks: Ranks
    steps: int = 0
    last_step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    lr: float = 0.0
    loss: Tensor | float = 0.0
    positions: Tensor | int = 0
    grad_norm: Tensor | float = 0.0
    weights: WeightStatistics | None = None

    def add(
        self,
        *,
        step: int,
        loss: Tensor,  # [], the sum over positions
        positions: Tensor,  # []
        tokens: int,
        sums: HeadSums,
        weights: WeightStatistics,
        grad_norm: Tensor,  # []
        lr: float,
        seconds: float,
    ) -> None:
        self.steps += 1
        self.last_step = step
        self.tokens += tokens
        self.seconds += seconds
        self.lr = lr
        self.loss = self.loss + loss
        self.positions = self.positions + positions
        self.grad_norm = grad_norm
        self.weights = weights if self.weights is None else self.weights.merge(weights)
        self.sums.merge(sums)

    def metrics(self) -> dict[str, float]:
        """Read everything to the host, under the names that MLflow shows.

        Losses and cross entropies in nats over all steps of the window, divided once; weights over supervised
        tokens; valid_token_ratio the share of positions with a target; lr and grad_norm (before clipping) of
        the last step; tokens_per_s over the steps alone, without validation.
        """
        assert self.weights is not None
        positions = int(self.positions)
        self.ranks.add(self.sums.ce, self.sums.rows)
        return {
            "train/loss": float(self.loss) / max(positions, 1),
            "train/ce_mean": self.sums.ce_mean(),
            **{f"train/ce_head_{h}": ce for h, ce in enumerate(self.sums.ce_of_heads())},
            "train/weight_mean": float(self.weights.mean),
            "train/weight_min": float(self.weights.min),
            "train/weight_max": float(self.weights.max),
            "train/weight_ess": float(self.weights.ess),
            "train/weight_clipped_ratio": float(self.weights.clipped / self.weights.count.clamp(min=1)),
            "train/valid_token_ratio": positions / self.tokens,
            "optim/lr": self.lr,
            "optim/grad_norm": float(self.grad_norm),
            "perf/tokens_per_s": self.tokens / self.seconds,
            "perf/peak_memory_mb": peak_memory_mb(),
        }


def peak_memory_mb() -> float:
    """Give the most memory that the run has held so far, in 10^6 bytes: on the GPU, or without one in RAM."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e6
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
