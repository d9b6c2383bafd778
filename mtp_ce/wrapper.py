"""Prediction heads on any Hugging Face causal language model, which stays what it is.

    hidden   = base_model(input_ids).last_hidden_state          [B, S, D]
    hidden_h = head_h(hidden)                                   H x [B, S, D], hidden_0 = hidden
    loss     = weighted_mtp_linear_ce(hidden_0 .. hidden_{H-1}, unembed, labels, token_weights)

Nothing of the model is replaced or patched: its own forward generates, and its files load without the heads. The loss
is computed inside forward, from hidden states, because whoever gathers sharded parameters does so around forward; the
logits of H heads never exist, unless they are asked for.

"teacher_forcing" adds no parameters. Head h's loss at t is the model's own next-token loss h tokens further on, where
the tokens in between are given. So one next-token pass has all of it, with other weights:

    loss = 1/N sum_j c(j) ce(j)         c(j) = sum_h w / K(j - h) over live (j - h, h)
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Unpack, get_args

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import ModelOutput, cached_file

from mtp_ce.heads import CONFIG_FILE, TENSORS_FILE, MTPHeads
from mtp_ce.layer_heads import LayerHeads, decoder_layers, watched
from mtp_ce.linear import weighted_mtp_linear_ce
from mtp_ce.loss import CallOptions, MTPLoss, MTPStats, weighted_mtp_ce
from mtp_ce.rows import row_coefficients, row_targets
from mtp_ce.scorers.next_token import NextToken
from mtp_ce.speculative import generate_speculatively
from mtp_ce.unembedding import Unembedding

HeadKind = Literal["none", "teacher_forcing", "residual", "layer", "sequential"]
TrunkMode = Literal["joint", "detached", "frozen"]
LossPath = Literal["linear", "logits"]

IGNORE = -100


@dataclass
class MTPOutput(ModelOutput):
    """What `MTPWrapper.forward` gives for labels.

    Attributes:
        loss: [] fp32, weighted, over all heads.
        logits: [B, S, V] of head 0, where they were asked for.
        stats: per-head statistics, where they were asked for.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    stats: MTPStats | None = None


class MTPWrapper(PreTrainedModel):
    """A Hugging Face causal language model with H prediction heads and the weighted loss over all of them.

    Args:
        model: any causal language model of transformers with a base model that gives `last_hidden_state`; one that
            PEFT has put adapters into, too.
        horizon: H, the number of heads; head 0 is the model's own, head h predicts the token h + 1 further on.
        heads: "residual": one small block per extra head (arXiv:2401.10774). "layer": a decoder layer of the model's
            own class per extra head (arXiv:2404.19737). "sequential": such layers in a chain, each given the token that
            the one before predicts (arXiv:2412.19437). "teacher_forcing": no new parameters, the model's own
            next-token loss h tokens further on. "none": H = 1.
        trunk: "joint": all of the model learns. "detached": the heads learn and the loss does not reach the model.
            "frozen": likewise, and the model's parameters no longer want gradients.
        loss: "linear" never builds the logits of the heads; "logits" builds them. The same loss.

    Raises:
        TypeError: `model` is no causal language model with output embeddings.
        ValueError: an encoder-decoder model, one that asks for a router's loss, one whose logits are made by more than
            a linear layer, a scale and a softcap, a horizon below 1, an unknown kind or mode, or nothing left to train.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = MTPWrapper(LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes)), horizon=3)
        >>> tokens = torch.randint(50, (2, 10))
        >>> model(tokens, labels=tokens).loss.shape
        torch.Size([])
        >>> model.generate(tokens, max_new_tokens=2, min_new_tokens=2, do_sample=False).shape
        torch.Size([2, 12])
    """

    main_input_name = "input_ids"
    supports_gradient_checkpointing = True

    def __init__(
        self,
        model: nn.Module,
        horizon: int,
        heads: HeadKind = "residual",
        trunk: TrunkMode = "joint",
        loss: LossPath = "linear",
    ) -> None:
        for name, value, known in (("heads", heads, HeadKind), ("trunk", trunk, TrunkMode), ("loss", loss, LossPath)):
            if value not in get_args(known):
                raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, get_args(known)))}.")
        if isinstance(horizon, bool) or not isinstance(horizon, int) or horizon < 1:
            raise ValueError(f"horizon is {horizon!r}; expected at least 1: head 0 is the model's own.")
        causal = _causal_model(model)
        if heads == "none" and horizon > 1:
            warnings.warn(f"horizon is {horizon} with heads='none'; there is one head.", stacklevel=2)
            horizon = 1
        if trunk != "joint" and (heads == "teacher_forcing" or horizon == 1):
            raise ValueError(f"trunk is {trunk!r} with heads={heads!r} and horizon {horizon}; nothing would learn.")
        super().__init__(causal.config)
        self.model = model
        self.generation_config = causal.generation_config
        self.horizon, self.kind, self.trunk, self.loss = horizon, heads, trunk, loss
        unembed = Unembedding.checked(causal).weight
        if heads in ("layer", "sequential"):
            self.heads: MTPHeads | LayerHeads = LayerHeads(causal, horizon, heads)
        else:
            self.heads = MTPHeads(unembed.shape[1], horizon if heads == "residual" else 1)
            self.heads.to(device=unembed.device, dtype=unembed.dtype)
        if trunk == "frozen":
            model.requires_grad_(False)

    # Which attention and which experts run was settled when the model was made, on the configuration that both share.
    def _check_and_adjust_attn_implementation(self, attn_implementation: Any, *_: Any, **__: Any) -> Any:
        return attn_implementation

    def _check_and_adjust_experts_implementation(self, experts_implementation: Any, *_: Any, **__: Any) -> Any:
        return experts_implementation

    @property
    def causal(self) -> Any:
        """The causal language model itself, without the wrapper of PEFT."""
        return _causal_model(self.model)

    def forward(
        self,
        input_ids: Tensor | None = None,  # [B, S]
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,  # [B, S]
        labels: Tensor | None = None,  # [B, S]
        shift_labels: Tensor | None = None,  # [B, S]
        token_weights: Tensor | Callable[[NextToken], Tensor] | None = None,  # [B, S] or [B, S, H]
        document_ids: Tensor | None = None,  # [B, S]
        num_items_in_batch: Tensor | int | None = None,
        *,
        weight_alignment: Literal["target", "position"] = "target",
        return_logits: bool = False,
        return_stats: bool = False,
        **arguments: Any,
    ) -> Any:
        """Give the loss over all heads; without labels, what the model itself gives.

        Args:
            input_ids: the tokens.
            attention_mask: as the model takes it. Packed rows need none, but position_ids.
            position_ids: where they begin again a new document begins, which no head looks across.
            labels: `input_ids` with -100 at what is not to be learnt, unshifted.
            shift_labels: instead of labels: those that are shifted by one already, as transformers' sequence
                parallelism makes them.
            token_weights: weights of the tokens that stand there; None means ones. With shift_labels they are shifted
                as those are. Or a function that makes them of this forward's own next-token head, which scorers ask.
            document_ids: borders of packed documents; None takes them from position_ids.
            num_items_in_batch: what the sum over positions is divided by; None means the positions with a target.
            weight_alignment: "target": a weight belongs to the token predicted; "position": to where it is predicted.
            return_logits: whether head 0's logits [B, S, V] are wanted beside the loss.
            return_stats: whether per-head statistics are wanted.
            **arguments: for the model.

        Returns:
            `MTPOutput`, or the model's own output where there are no labels.

        Raises:
            ValueError: both labels and shift_labels are given.
        """
        if labels is not None and shift_labels is not None:
            raise ValueError("labels and shift_labels are both given; expected one of them.")
        inputs: dict[str, Any] = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            **arguments,
        }
        targets, shift = (labels, 1) if shift_labels is None else (shift_labels, 0)
        if targets is None:
            return self.model(**inputs)
        hidden = self._hidden_states(**inputs)
        output = Unembedding.of(self.causal)
        if document_ids is None and position_ids is not None and position_ids.shape == targets.shape:
            document_ids = _documents(position_ids)
        weights = token_weights
        if callable(weights):
            weights = weights(NextToken(output.scaled(hidden[0]), output.weight, output.bias, output.softcap))
        rows = _Rows(targets, weights, document_ids, shift, weight_alignment, num_items_in_batch)
        loss, stats = self._loss(hidden, output, rows)
        return MTPOutput(
            loss=loss,
            logits=output.logits(hidden[0]) if return_logits else None,
            stats=stats if return_stats else None,
        )

    def head_hidden_states(self, **inputs: Any) -> list[Tensor]:
        """Give the hidden states of every head, H tensors [B, S, D]; one for "teacher_forcing".

        Args:
            **inputs: what the model's forward takes.
        """
        return self._hidden_states(**inputs)

    # Apart from the public method, around which sharded parameters are gathered: forward has gathered them already.
    def _hidden_states(self, **inputs: Any) -> list[Tensor]:
        inputs.setdefault("use_cache", False)
        causal, reaches = self.causal, self.trunk == "joint"
        learns = torch.is_grad_enabled() and reaches
        if isinstance(self.heads, MTPHeads):
            with torch.set_grad_enabled(learns):
                hidden = causal.base_model(**inputs).last_hidden_state
            side_by_side: list[Tensor] = self.heads(hidden)
            return side_by_side
        layers, norm = decoder_layers(causal)
        with torch.set_grad_enabled(learns), watched(layers[-1]) as call:
            hidden = causal.base_model(**inputs).last_hidden_state
            tokens = inputs.get("inputs_embeds")
            if tokens is None:
                tokens = causal.get_input_embeddings()(inputs["input_ids"])
        layered: list[Tensor] = self.heads(hidden, call, norm if reaches else _detached(norm), tokens)
        return layered

    def head_logits(self, **inputs: Any) -> list[Tensor]:
        """Give the logits of every head, H tensors [B, S, V]; one for "teacher_forcing". Arguments as in forward."""
        output = Unembedding.of(self.causal)
        return [output.logits(hidden) for hidden in self.head_hidden_states(**inputs)]

    def _loss(self, hidden: list[Tensor], output: Unembedding, rows: _Rows) -> MTPLoss:
        if self.trunk != "joint":
            bias = None if output.bias is None else output.bias.detach()
            output = output._replace(weight=output.weight.detach(), bias=bias)
        if self.kind == "teacher_forcing":
            return self._teacher_forced(hidden, output, rows)
        return self._fused(
            hidden, output, rows, rows.token_weights,
            weight_alignment=rows.weight_alignment, document_ids=rows.document_ids, normalizer=rows.normalizer,
        )  # fmt: skip

    def _fused(
        self,
        hidden: list[Tensor],
        output: Unembedding,
        rows: _Rows,
        token_weights: Tensor | None,
        **rule: Unpack[CallOptions],
    ) -> MTPLoss:
        rule |= {"softcap": output.softcap, "shift": rows.shift}
        scaled = [output.scaled(x) for x in hidden]
        if self.loss == "linear":
            return weighted_mtp_linear_ce(
                scaled, output.weight, rows.labels, token_weights, bias=output.bias, return_stats=True, **rule
            )
        logits = [nn.functional.linear(x, output.weight, output.bias) for x in scaled]
        # Nobody else sees these logits, so the gradient may have their place.
        inplace = any(x.requires_grad for x in logits)
        return weighted_mtp_ce(logits, rows.labels, token_weights, inplace_backward=inplace, return_stats=True, **rule)

    def _teacher_forced(self, hidden: list[Tensor], output: Unembedding, rows: _Rows) -> MTPLoss:
        B, S = rows.labels.shape
        place, _, live = row_targets(
            rows.labels, None, rows.document_ids, H=self.horizon, shift=rows.shift, ignore_index=IGNORE
        )
        _, coefficient = row_coefficients(
            place, live, rows.token_weights, None,
            over_horizon=False, target_weights=rows.weight_alignment == "target", dtype=torch.float32,
        )  # fmt: skip
        moved = coefficient.new_zeros(B, S)
        for h in range(min(self.horizon, S)):
            moved = moved + nn.functional.pad(coefficient[:, : S - h, h], (h, 0))
        loss, stats = self._fused(hidden, output, rows, moved, reduction="sum")
        positions = live.any(-1).sum().clamp(min=1) if rows.normalizer is None else rows.normalizer
        source = (place - rows.shift).clamp(min=0)  # [S, H], the position whose next token is the target
        ce, lse = (torch.where(live, part[:, source, 0], 0.0) for part in (stats.ce, stats.lse))
        return MTPLoss(loss / positions, MTPStats(ce, live, lse, torch.where(live, stats.top1[:, source, 0], -1)))

    def generate(self, *arguments: Any, speculative: bool = False, **options: Any) -> Any:
        """Generate with the model itself, as its own `generate` does, or give the same with fewer forwards.

        Args:
            *arguments: as the model's `generate` takes them.
            speculative: whether the heads draft and the model checks; takes the options of
                `mtp_ce.speculative.generate_speculatively`, which also says how well they drafted.
            **options: as the model's `generate` takes them.

        Returns:
            Tokens [B, S + new], the prompt included, or what the options ask the model for.
        """
        if not speculative:
            return self.model.generate(*arguments, **options)
        return generate_speculatively(self, *arguments, **options).sequences

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | Path, *, state_dict: dict[str, Tensor] | None = None, **options: Any
    ) -> None:
        """Write the model, which loads alone, and the heads beside it.

        Args:
            save_directory: folder for both.
            state_dict: of the wrapper, where it was gathered from elsewhere; None takes the wrapper's own.
            **options: for the model's `save_pretrained`.
        """
        parts: dict[str, dict[str, Tensor] | None] = {"model.": None, "heads.": None}
        if state_dict is not None:
            parts = {
                prefix: {name.removeprefix(prefix): x for name, x in state_dict.items() if name.startswith(prefix)}
                for prefix in parts
            }
        model: Any = self.model
        model.save_pretrained(save_directory, state_dict=parts["model."], **options)
        self.heads.save_pretrained(save_directory, state_dict=parts["heads."])
        config = {"kind": self.kind, "hidden_size": self.heads.hidden_size, "horizon": self.horizon}
        (Path(save_directory) / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, source: str | Path, *, trunk: TrunkMode = "joint", **options: Any
    ) -> MTPWrapper:
        """Read back what `save_pretrained` wrote.

        Args:
            source: the folder, or a name on the hub.
            trunk: see `MTPWrapper`.
            **options: for `AutoModelForCausalLM.from_pretrained`.

        Raises:
            FileNotFoundError: there are no heads beside the model.
            ValueError: the heads are not of this model: of another hidden size, kind or number.
        """
        found, tensors = (
            cached_file(source, name, _raise_exceptions_for_missing_entries=False)
            for name in (CONFIG_FILE, TENSORS_FILE)
        )
        if found is None or tensors is None:
            raise FileNotFoundError(
                f"{source} has no {CONFIG_FILE} and {TENSORS_FILE}; MTPWrapper(model, ...) adds heads."
            )
        config = json.loads(Path(found).read_text(encoding="utf-8"))
        model = AutoModelForCausalLM.from_pretrained(source, **options)
        width = Unembedding.of(model).weight.shape[1]
        if config["hidden_size"] != width:
            raise ValueError(
                f"{source} has heads of hidden size {config['hidden_size']} and a model of {width}; they are not of "
                "one wrapper."
            )
        wrapper = cls(model, config["horizon"], heads=config["kind"], trunk=trunk)
        saved, wanted = load_file(tensors), wrapper.heads.state_dict()
        wrong = [name for name, x in wanted.items() if name not in saved or saved[name].shape != x.shape]
        if wrong := wrong or sorted(saved.keys() - wanted.keys()):
            shapes = (list(part[wrong[0]].shape) if wrong[0] in part else "not there" for part in (saved, wanted))
            raise ValueError(
                f"{source} has heads that do not fit its model: {wrong[0]} is {next(shapes)} in {TENSORS_FILE}; "
                f"expected {next(shapes)} for {config['horizon']} heads of the kind {config['kind']!r}."
            )
        wrapper.heads.load_state_dict(saved)
        return wrapper

    def get_input_embeddings(self) -> nn.Module:
        """Give the model's own."""
        embeddings: nn.Module = self.causal.get_input_embeddings()
        return embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Set the model's own."""
        self.causal.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """Give the model's own, which all heads share."""
        embeddings: nn.Module = self.causal.get_output_embeddings()
        return embeddings

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Set the model's own, which all heads share."""
        self.causal.set_output_embeddings(value)

    def resize_token_embeddings(self, *arguments: Any, **options: Any) -> Any:
        """Resize the model's own."""
        return self.causal.resize_token_embeddings(*arguments, **options)


@dataclass(frozen=True)
class _Rows:
    """What the loss is told about the rows of one batch."""

    labels: Tensor
    token_weights: Tensor | None
    document_ids: Tensor | None
    shift: int
    weight_alignment: str
    num_items: Tensor | int | None

    @property
    def normalizer(self) -> Tensor | float | None:
        return self.num_items.float() if isinstance(self.num_items, Tensor) else self.num_items


def _causal_model(model: Any) -> Any:
    """The causal language model of transformers, also inside PEFT's wrapper; TypeError or ValueError if it is none."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(causal, PreTrainedModel):
        raise TypeError(f"model is {type(causal).__name__}; expected a causal language model of transformers.")
    if causal.config.is_encoder_decoder:
        raise ValueError(f"model is {type(causal).__name__}, an encoder-decoder; expected a causal language model.")
    if causal.get_output_embeddings() is None or causal.base_model is causal:
        raise TypeError(
            f"model is {type(causal).__name__} without output embeddings over a base model; expected a causal "
            "language model, such as AutoModelForCausalLM gives."
        )
    if getattr(causal.config, "output_router_logits", False):
        raise ValueError(
            "config.output_router_logits is True, which asks for the router's balancing loss; MTPWrapper does not add "
            "it. Set it to False, and balance the experts elsewhere."
        )
    return causal


def _detached(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """A module whose parameters feel nothing of what is made with them."""
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}
    return lambda hidden: torch.func.functional_call(module, parameters, (hidden,))


def _documents(position_ids: Tensor) -> Tensor:  # [B, S]
    """Number the documents of packed rows: one begins wherever a position is not the one before plus 1."""
    begins = torch.zeros_like(position_ids)
    begins[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    return begins.cumsum(1)
