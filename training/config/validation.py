"""Recipe keys of validation and of decoding at the end."""

from __future__ import annotations

from pydantic import Field

from mtp_ce.training.config.group import Group


class DecodingConfig(Group):
    """Greedy decoding from held-out text, by the model alone and with the heads drafting."""

    prompts: int = Field(default=8, ge=0, description="number of prompts, spread over the held-out files; 0: none")
    prompt_tokens: int = Field(default=64, ge=1, description="tokens of held-out text in a prompt")
    new_tokens: int = Field(default=64, ge=2, description="maximum number of tokens decoded per prompt")
    draft_tokens: int | None = Field(
        default=None,
        ge=1,
        description="tokens of a draft (num_speculative_tokens of serving engines) for which accepted tokens are "
        "counted as they count them; null: one per extra head, which is the most unless they are one module",
    )


class ValidationConfig(Group):
    """Scoring of the held-out files, unweighted; it always runs after the last step."""

    every: int | None = Field(
        default=None, ge=1, description="steps between two validations; null: after the last step only"
    )
    at_start: bool = Field(default=False, description="whether to validate before the first step, too")
    rows: int | None = Field(
        default=None, ge=1, description="number of rows, spread over the held-out files; null: all of them"
    )
    batch_size: int = Field(default=8, ge=1, description="rows per forward; changes memory, not results")
    decoding: DecodingConfig = Field(
        default_factory=DecodingConfig, description="acceptance of the heads in speculative decoding, at the end"
    )
