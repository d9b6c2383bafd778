"""Prediction heads on any Hugging Face causal language model, which stays what it is.

    hidden   = base_model(input_ids).last_hidden_state          [B, S, D]
    hidden_h = head_h(hidden)                                   H x [B, S, D], hidden_0 = hidden
    loss     = weighted_mtp_linear_ce(hidden_0 .. hidden_{H-1}, unembed, labels, token_weights)

Nothing of the model is replaced or patched: its own forward generates, and its files load without the heads. The loss
is computed inside forward, from hidden states, because whoever gathers sharded parameters does so around forward; the
logits of H heads never exist, unless they are asked for.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Unpack, get_args

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import ModelOutput

from mtp_ce.checks import saved_tensors_are_hooked
from mtp_ce.decoding.speculative import generate_speculatively
from mtp_ce.heads.layers import LayerHeads, decoder_layers, watched
from mtp_ce.heads.residual import CONFIG_FILE, MTPHeads
from mtp_ce.heads.teacher_forcing import teacher_forced
from mtp_ce.hf.causal import causal_model
from mtp_ce.hf.documents import packed_documents
from mtp_ce.hf.router_loss import coefficient, routed, wants_router_loss
from mtp_ce.hf.saved_heads import SavedHeads
from mtp_ce.linear import weighted_mtp_linear_ce
from mtp_ce.loss import MTPLoss, MTPStats, weighted_mtp_ce
from mtp_ce.options import CallOptions, LossOptions
from mtp_ce.scorers.next_token import NextToken
from mtp_ce.unembedding import Unembedding

HeadKind = Literal["none", "teacher_forcing", "residual", "layer", "sequential"]
TrunkMode = Literal["joint", "detached", "frozen"]
LossPath = Literal["linear", "logits"]


@dataclass
class MTPOutput(ModelOutput):
    """What `MTPWrapper.forward` gives for labels.

    Attributes:
        loss: [] fp32, weighted, over all heads; with the routers' loss times the model's coefficient.
        logits: [B, S, V] of head 0, where they were asked for.
        stats: per-head statistics, where they were asked for.
        aux_loss: [] balancing loss of the model's routers, where its configuration asks for it.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    stats: MTPStats | None = None
    aux_loss: Tensor | None = None


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
        label_smoothing: e in [0, 1) of the loss, in evaluation too; see `weighted_mtp_ce`.
        z_loss: factor >= 0 of logsumexp**2 in the loss.

    Raises:
        TypeError: `model` is no causal language model with output embeddings.
        ValueError: an encoder-decoder model, one whose logits are made by more than a linear layer, a scale and a
            softcap, a horizon below 1, an unknown kind or mode, nothing left to train, a term of the loss out of its
            range, or output_router_logits in the configuration of a model without that loss, or with heads that have
            routers of their own.

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
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
    ) -> None:
        for name, value, known in (("heads", heads, HeadKind), ("trunk", trunk, TrunkMode), ("loss", loss, LossPath)):
            if value not in get_args(known):
                raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, get_args(known)))}.")
        if isinstance(horizon, bool) or not isinstance(horizon, int) or horizon < 1:
            raise ValueError(f"horizon is {horizon!r}; expected at least 1: head 0 is the model's own.")
        LossOptions(label_smoothing=label_smoothing, z_loss=z_loss)  # checks them
        causal = causal_model(model)
        if heads == "none" and horizon > 1:
            warnings.warn(f"horizon is {horizon} with heads='none'; there is one head.", stacklevel=2)
            horizon = 1
        if trunk != "joint" and (heads == "teacher_forcing" or horizon == 1):
            raise ValueError(f"trunk is {trunk!r} with heads={heads!r} and horizon {horizon}; nothing would learn.")
        super().__init__(causal.config)
        # Trainer then counts the targets of a batch as it does for a causal language model.
        self.loss_type = "ForCausalLM"
        self.model = model
        self.generation_config = causal.generation_config
        self.horizon, self.kind, self.trunk, self.loss = horizon, heads, trunk, loss
        self.label_smoothing, self.z_loss = label_smoothing, z_loss
        unembed = Unembedding.checked(causal).weight
        if heads in ("layer", "sequential"):
            self.heads: MTPHeads | LayerHeads = LayerHeads(causal, horizon, heads)
        else:
            self.heads = MTPHeads(unembed.shape[1], horizon if heads == "residual" else 1)
            self.heads.to(device=unembed.device, dtype=unembed.dtype)
        if wants_router_loss(causal, self.heads):
            coefficient(causal)
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
        return causal_model(self.model)

    def forward(
        self,
        input_ids: Tensor | None = None,  # [B, S]
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,  # [B, S]
        labels: Tensor | None = None,  # [B, S]
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
            token_weights: weights of the tokens that stand there; None means ones. With shift_labels they are shifted
                as those are. Or a function that makes them of this forward's own next-token head, which scorers ask.
            document_ids: borders of packed documents; None takes them from cu_seq_lens_q or position_ids.
            num_items_in_batch: what the sum over positions is divided by; None means the positions with a target.
            weight_alignment: "target": a weight belongs to the token predicted; "position": to where it is predicted.
            return_logits: whether head 0's logits [B, S, V] are wanted beside the loss.
            return_stats: whether per-head statistics are wanted.
            **arguments: for the model. But shift_labels [B, S] goes instead of labels: shifted by one already, as
                transformers' sequence parallelism makes them. No parameter, because Trainer evaluates where it finds
                every parameter that has "label" in its name. cu_seq_lens_q, for flash attention, has borders of
                documents, too.

        Returns:
            `MTPOutput`, or the model's own output where there are no labels; a tuple where `return_dict=False`.

        Raises:
            TypeError, ValueError: as the loss; both labels and shift_labels; or num_items_in_batch without labels.
        """
        shift_labels = arguments.pop("shift_labels", None)
        if labels is not None and shift_labels is not None:
            raise ValueError("labels and shift_labels are both given; expected one of them.")
        inputs: dict[str, Any] = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            **arguments,
        }
        targets, shift = (labels, 1) if shift_labels is None else (shift_labels, 0)
        normalizer = _normalizer(num_items_in_batch, targets)
        if targets is None:
            return self.model(**inputs)
        hidden, router_loss = self._hidden_states(**inputs)
        output = Unembedding.of(self.causal)
        if document_ids is None:
            document_ids = packed_documents(targets.shape, position_ids, arguments.get("cu_seq_lens_q"))
        weights = token_weights
        if callable(weights):
            weights = weights(NextToken(output.scaled(hidden[0]), output.weight, output.bias, output.softcap))
        loss, stats = self._loss(
            hidden, output, targets, weights,
            shift=shift, weight_alignment=weight_alignment, document_ids=document_ids, normalizer=normalizer,
        )  # fmt: skip
        if router_loss is not None:
            share = 1 if normalizer is None else stats.live.any(-1).sum() / normalizer
            loss = loss + share * coefficient(self.causal) * router_loss.to(loss)
        found = MTPOutput(
            loss=loss,
            logits=output.logits(hidden[0]) if return_logits else None,
            stats=stats if return_stats else None,
            aux_loss=router_loss,
        )
        return found if self._returns_dict(inputs) else found.to_tuple()

    def head_hidden_states(self, **inputs: Any) -> list[Tensor]:
        """Give the hidden states of every head, H tensors [B, S, D]; one for "teacher_forcing".

        Args:
            **inputs: what the model's forward takes.
        """
        return self._hidden_states(**inputs)[0]

    # Apart from the public method, around which sharded parameters are gathered: forward has gathered them already.
    def _hidden_states(self, **inputs: Any) -> tuple[list[Tensor], Tensor | None]:
        """Those of the heads, and the routers' loss where the trunk is to feel it."""
        inputs.setdefault("use_cache", False)
        if not self._returns_dict(inputs):
            inputs["return_dict"] = True
        causal, reaches = self.causal, self.trunk == "joint"
        learns = torch.is_grad_enabled() and reaches
        router_loss = None
        balances = wants_router_loss(causal, self.heads, inputs.get("output_router_logits"))
        if isinstance(self.heads, MTPHeads):
            with torch.set_grad_enabled(learns):
                if reaches and balances:
                    hidden, router_loss = routed(causal, inputs)
                else:
                    hidden = causal.base_model(**inputs).last_hidden_state
            side_by_side: list[Tensor] = self.heads(hidden)
            return side_by_side, router_loss
        layers, norm = decoder_layers(causal)
        with torch.set_grad_enabled(learns), watched(layers[-1]) as call:
            hidden = causal.base_model(**inputs).last_hidden_state
            tokens = inputs.get("inputs_embeds")
            if tokens is None:
                tokens = causal.get_input_embeddings()(inputs["input_ids"])
        layered: list[Tensor] = self.heads(hidden, call, norm if reaches else _detached(norm), tokens)
        return layered, None

    def _returns_dict(self, inputs: dict[str, Any]) -> bool:
        asked = inputs.get("return_dict")
        return bool(self.config.return_dict if asked is None else asked)

    def head_logits(self, **inputs: Any) -> list[Tensor]:
        """Give the logits of every head, H tensors [B, S, V]; one for "teacher_forcing". Arguments as in forward."""
        output = Unembedding.of(self.causal)
        return [output.logits(hidden) for hidden in self.head_hidden_states(**inputs)]

    def _loss(
        self,
        hidden: list[Tensor],
        output: Unembedding,
        labels: Tensor,
        token_weights: Tensor | None,
        **rule: Any,
    ) -> MTPLoss:
        if self.trunk != "joint":
            bias = None if output.bias is None else output.bias.detach()
            output = output._replace(weight=output.weight.detach(), bias=bias)
        if self.kind == "teacher_forcing":
            next_token = partial(self._fused, hidden, output, labels, shift=rule["shift"], reduction="sum")
            return teacher_forced(next_token, hidden[0], labels, token_weights, H=self.horizon, **rule)
        return self._fused(hidden, output, labels, token_weights, **rule)

    def _fused(
        self,
        hidden: list[Tensor],
        output: Unembedding,
        labels: Tensor,
        token_weights: Tensor | None,
        **rule: Unpack[CallOptions],
    ) -> MTPLoss:
        rule |= {"softcap": output.softcap, "label_smoothing": self.label_smoothing, "z_loss": self.z_loss}
        scaled = [output.scaled(x) for x in hidden]
        if self.loss == "linear":
            return weighted_mtp_linear_ce(
                scaled, output.weight, labels, token_weights, bias=output.bias, return_stats=True, **rule
            )
        logits = [nn.functional.linear(x, output.weight, output.bias) for x in scaled]
        # Nobody else sees these logits, so the gradient may have their place, if no checkpoint around this keeps them.
        inplace = any(x.requires_grad for x in logits) and not saved_tensors_are_hooked()
        return weighted_mtp_ce(logits, labels, token_weights, inplace_backward=inplace, return_stats=True, **rule)

    def generate(self, *arguments: Any, speculative: bool = False, **options: Any) -> Any:
        """Generate with the model itself, as its own `generate` does, or give the same with fewer forwards.

        Args:
            *arguments: as the model's `generate` takes them.
            speculative: whether the heads draft and the model checks; takes the options of
                `mtp_ce.decoding.speculative.generate_speculatively`, which also says how well they drafted.
            **options: as the model's `generate` takes them.

        Returns:
            Tokens [B, S + new], the prompt included, or what the options ask the model for.
        """
        if not speculative:
            return self.model.generate(*arguments, **options)
        return generate_speculatively(self, *arguments, **options).sequences

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        *,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        **options: Any,
    ) -> None:
        """Write the model, which loads alone, and the heads beside it.

        Args:
            save_directory: folder for both.
            is_main_process: whether this process writes; others join in gathering the model.
            state_dict: of the wrapper, where it was gathered from elsewhere; None takes the wrapper's own. An empty one
                writes no heads.
            **options: for the model's `save_pretrained`.

        Raises:
            ValueError: `push_to_hub`, which is another method here.
        """
        if options.get("push_to_hub"):
            raise ValueError(
                "push_to_hub is True; expected False: the model would be on the hub before its heads are written. "
                "The wrapper's push_to_hub(repo_id) uploads both."
            )
        parts: dict[str, dict[str, Tensor] | None] = {"model.": None, "heads.": None}
        if state_dict is not None:
            parts = {
                prefix: {name.removeprefix(prefix): x for name, x in state_dict.items() if name.startswith(prefix)}
                for prefix in parts
            }
        model: Any = self.model
        model.save_pretrained(save_directory, is_main_process=is_main_process, state_dict=parts["model."], **options)
        # DeepSpeed gives an empty one where it keeps the parameters in files of its own.
        if not is_main_process or state_dict == {}:
            return
        self.heads.save_pretrained(save_directory, state_dict=parts["heads."])
        config = {"kind": self.kind, "hidden_size": self.heads.hidden_size, "horizon": self.horizon}
        (Path(save_directory) / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        source: str | Path,
        *,
        trunk: TrunkMode = "joint",
        loss: LossPath = "linear",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        **options: Any,
    ) -> MTPWrapper:
        """Read back what `save_pretrained` wrote. Adapters of PEFT learn on where `trunk` is "joint".

        Args:
            source: the folder, or a name on the hub.
            trunk: see `MTPWrapper`, like all that follow; nothing of it is saved.
            loss: "linear" or "logits".
            label_smoothing: of the loss.
            z_loss: of the loss.
            **options: for `AutoModelForCausalLM.from_pretrained`. Those that say where files are hold for the heads'.

        Raises:
            FileNotFoundError: there are no heads beside the model.
            ValueError: the heads are not of this model: of another hidden size, kind or number.
        """
        saved = SavedHeads.beside(source, **options)
        model = AutoModelForCausalLM.from_pretrained(source, **options)
        if trunk == "joint" and hasattr(model, "peft_config"):
            # transformers reads adapters as what is to be used alone.
            for config in model.peft_config.values():
                config.inference_mode = False
            model.set_adapter(model.active_adapters())
        wrapper = cls(
            model, saved.horizon, heads=saved.kind, trunk=trunk, loss=loss, label_smoothing=label_smoothing,
            z_loss=z_loss,
        )  # fmt: skip
        saved.load_into(wrapper)
        return wrapper

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load parameters by the wrapper's own names, as its `state_dict` has them; arguments as `torch.nn.Module`'s.

        Raises:
            ValueError: there is none of the wrapper's names, as in the files of a saved model.
        """
        own = {name for name, _ in (*self.named_parameters(remove_duplicate=False), *self.named_buffers())}
        if state_dict and own.isdisjoint(state_dict):
            raise ValueError(
                f"state_dict has none of the wrapper's own names, such as {min(own)!r}; it begins with "
                f"{min(state_dict)!r}. Where it is the model's own, out of a folder of save_pretrained: "
                "MTPWrapper.from_pretrained reads both, and mtp_ce.MTPTrainer resumes in place of transformers.Trainer."
            )
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

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


def _normalizer(num_items: Tensor | float | None, targets: Tensor | None) -> Tensor | float | None:
    if num_items is None:
        return None
    if targets is None:
        raise ValueError(
            "num_items_in_batch is given without labels; expected labels. Trainer takes them away for "
            "label_smoothing_factor and compute_loss_func, with which no head would be trained: "
            "MTPWrapper(label_smoothing=...) smooths the loss of all heads."
        )
    if isinstance(num_items, Tensor):
        return num_items.float()
    if not num_items > 0:
        raise ValueError(f"num_items_in_batch is {num_items}; expected a number of targets above 0, or None.")
    return num_items


def _detached(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """A module whose parameters feel nothing of what is made with them."""
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}
    return lambda hidden: torch.func.functional_call(module, parameters, (hidden,))
