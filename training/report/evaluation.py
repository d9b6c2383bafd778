"""What a model with prediction heads is worth: what a training reports at its end, and `eval-mtp` of a checkpoint."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mtp_ce.hf.wrapper import MTPWrapper
from mtp_ce.training.config.groups import DecodingConfig
from mtp_ce.training.console import say
from mtp_ce.training.metrics.decoding import DecodingResult, choose_prompts, measure_decoding
from mtp_ce.training.metrics.head_scores import HeadResult
from mtp_ce.training.run.inputs import Inputs


@dataclass(frozen=True)
class Evaluation:
    """Everything that was measured.

    Attributes:
        heads: one result per head, on held-out text.
        unigram: cross entropy of the held-out tokens under the training tokens' frequencies, nats.
        before: the heads before training, where that was measured.
        decoding: what decoding with drafts found; None where nothing drafts.
    """

    heads: list[HeadResult]
    unigram: float
    before: list[HeadResult] | None = None
    decoding: DecodingResult | None = None

    @property
    def tokens_per_forward(self) -> float | None:
        """What the heads' agreement with head 0 would give; None where nothing drafts."""
        agrees = [head.agrees for head in self.heads]
        return None if len(agrees) == 1 or None in agrees else sum(share for share in agrees if share is not None)

    def metrics(self) -> dict[str, float]:
        """Name what is not in `validation_metrics`."""
        metrics = {"val/unigram_entropy": self.unigram}
        if self.tokens_per_forward is not None:
            metrics["val/tokens_per_forward"] = self.tokens_per_forward
        if self.decoding:
            found = self.decoding.speculation
            metrics |= {
                "decoding/tokens_per_forward": found.tokens_per_forward,
                "decoding/acceptance_length": found.acceptance_length,
                "perf/decoding_speedup": self.decoding.speedup,
                "decoding/identical_ratio": self.decoding.identical / self.decoding.prompts,
            }
            for h, (kept, accepted) in enumerate(zip(self.decoding.kept, found.acceptance, strict=True), start=1):
                metrics |= {f"decoding/kept_head_{h}": kept, f"decoding/acceptance_head_{h}": accepted}
        return metrics

    def as_json(self) -> dict[str, Any]:
        """Give everything as plain values; a perplexity that overflows is null."""

        def head(h: int, result: HeadResult) -> dict[str, Any]:
            finite = result.perplexity if result.ce < 700 else None
            return {"head": h, "distance": h + 1, **asdict(result), "perplexity": finite}

        decoding = None
        if self.decoding:
            found = self.decoding.speculation
            decoding = asdict(self.decoding) | {
                "tokens_per_forward": found.tokens_per_forward,
                "acceptance_length": found.acceptance_length,
                "acceptance": found.acceptance,
                "kept": self.decoding.kept,
                "speedup": self.decoding.speedup,
            }
        return {
            "unigram_entropy": self.unigram,
            "tokens_per_forward": self.tokens_per_forward,
            "heads": [head(h, result) for h, result in enumerate(self.heads)],
            "before": self.before and [head(h, result) for h, result in enumerate(self.before)],
            "decoding": decoding,
        }

    def write(self, folder: Path, title: str) -> list[Path]:
        """Write evaluation.json and evaluation.png, and give the two paths."""
        # matplotlib writes a font cache when it is first imported; a dry run writes nothing.
        from mtp_ce.training.report.plot import draw_evaluation

        table, picture = folder / "evaluation.json", folder / "evaluation.png"
        table.write_text(json.dumps(self.as_json(), indent=2) + "\n", encoding="utf-8")
        draw_evaluation(self, picture, title)
        return [table, picture]


def decode(model: MTPWrapper, inputs: Inputs, config: DecodingConfig) -> DecodingResult | None:
    """Decode from held-out text with the heads drafting; None where nothing drafts or no prompt is asked for.

    Prompt and continuation are cut to the positions that the model knows, half of them each.
    """
    if not config.prompts or model.horizon == 1 or not model.heads.drafts:
        return None
    most = getattr(model.causal.config, "max_position_embeddings", None) or config.prompt_tokens + config.new_tokens
    prompt_tokens = min(config.prompt_tokens, most // 2)
    prompts = choose_prompts(inputs.tokens.held_out, config.prompts, prompt_tokens)
    if not prompts:
        say(inputs.console, f"decoding    no held-out document has {prompt_tokens} tokens for a prompt")
        return None
    new_tokens = min(config.new_tokens, most - prompt_tokens)
    model.eval()
    return measure_decoding(model, [prompt.to(inputs.device) for prompt in prompts], new_tokens)
