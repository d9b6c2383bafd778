"""The evaluation of a model with prediction heads: at the end of training, and by `eval-mtp` of a checkpoint."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from mtp_ce.training.metrics.acceptance import Acceptance, AcceptanceResult
from mtp_ce.training.metrics.decoding import DecodingResult
from mtp_ce.training.metrics.head_scores import HeadResult


@dataclass(frozen=True)
class Evaluation:
    """Measurements of a model with prediction heads.

    Attributes:
        heads: one result per head, on held-out text.
        unigram: cross entropy of the held-out tokens under the training tokens' frequencies, nats.
        before: the heads before training, if that was measured.
        decoding: results of speculative decoding; None if no head drafts, or the model can't verify drafts.
        acceptance: what a serving engine counts; None if no head drafts.
    """

    heads: list[HeadResult]
    unigram: float
    before: list[HeadResult] | None = None
    decoding: DecodingResult | None = None
    acceptance: AcceptanceResult | None = None

    @property
    def tokens_per_forward(self) -> float | None:
        """Return the tokens per forward that the heads' agreement with head 0 predicts.

        None if no head drafts, or if a head has no row to agree on.
        """
        agrees = [head.agrees for head in self.heads]
        return None if len(agrees) == 1 or None in agrees else sum(ratio for ratio in agrees if ratio is not None)

    def metrics(self) -> dict[str, float]:
        """Return the metrics that `validation_metrics` does not have, by name."""
        metrics = {"val/unigram_entropy": self.unigram}
        if self.tokens_per_forward is not None:
            metrics["val/tokens_per_forward"] = self.tokens_per_forward
        if self.decoding:
            speculation = self.decoding.speculation
            metrics |= {
                "decoding/tokens_per_forward": speculation.tokens_per_forward,
                "decoding/acceptance_length": speculation.acceptance_length,
                "perf/decoding_speedup": self.decoding.speedup,
                "decoding/identical_ratio": self.decoding.identical / self.decoding.prompts,
            }
            for h, (kept, accepted) in enumerate(zip(self.decoding.kept, speculation.acceptance, strict=True), start=1):
                metrics |= {f"decoding/kept_head_{h}": kept, f"decoding/acceptance_head_{h}": accepted}
        if self.acceptance:
            total = self.acceptance.total
            metrics["val/accepted_length"] = total.mean_length
            metrics |= {f"val/accepted_head_{h}": rate for h, rate in enumerate(total.rates, start=1)}
        return metrics

    def as_json(self) -> dict[str, Any]:
        """Return all results as plain values; one that does not exist, overflows or is no number is null."""

        def head(h: int, result: HeadResult) -> dict[str, Any]:
            scores = asdict(result) | {"perplexity": result.perplexity}
            return {"head": h, "distance": h + 1, **{name: _finite(value) for name, value in scores.items()}}

        decoding = None
        if self.decoding:
            speculation = self.decoding.speculation
            decoding = asdict(self.decoding) | {
                "tokens_per_forward": speculation.tokens_per_forward,
                "acceptance_length": speculation.acceptance_length,
                "acceptance": [_finite(ratio) for ratio in speculation.acceptance],
                "kept": [_finite(ratio) for ratio in self.decoding.kept],
                "speedup": self.decoding.speedup,
            }

        def counted(counts: Acceptance) -> dict[str, Any]:
            rates = [_finite(rate) for rate in counts.rates]
            return asdict(counts) | {"rates": rates, "mean_length": _finite(counts.mean_length)}

        acceptance = None
        if self.acceptance:
            domains = {name: counted(counts) for name, counts in self.acceptance.domains.items() if name}
            total = counted(self.acceptance.total)
            acceptance = {"draft_tokens": self.acceptance.draft_tokens, **total, "domains": domains}
        return {
            "unigram_entropy": _finite(self.unigram),
            "tokens_per_forward": self.tokens_per_forward,
            "heads": [head(h, result) for h, result in enumerate(self.heads)],
            "before": self.before and [head(h, result) for h, result in enumerate(self.before)],
            "decoding": decoding,
            "acceptance": acceptance,
        }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
