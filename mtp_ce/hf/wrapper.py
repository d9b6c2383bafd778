"""Prediction heads on any Hugging Face causal language model, without changing the model.

    hidden   = base_model(input_ids).last_hidden_state          [B, S, D]
    hidden_h = head_h(hidden)                                   H x [B, S, D], hidden_0 = hidden
    loss     = weighted_mtp_linear_ce(hidden_0 .. hidden_{H-1}, unembed, labels, token_weights)

Nothing of the model is replaced or patched: its own forward generates, and its files load without the heads. The loss
is computed inside forward, from hidden states, because FSDP and DeepSpeed gather sharded parameters around forward. The
logits of H heads are never built, unless they are requested.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import ModelOutput

from mtp_ce.decoding.speculative import generate_speculatively
from mtp_ce.heads.kinds import PATHS
from mtp_ce.heads.protocol import Heads, build_heads
from mtp_ce.hf.causal import causal_model
from mtp_ce.hf.documents import packed_documents
from mtp_ce.hf.head_loss import fused_loss, loss_normalizer
from mtp_ce.hf.hidden_states import head_hidden_states
from mtp_ce.hf.router_loss import coefficient, wants_router_loss
from mtp_ce.hf.saved_heads import SavedHeads
from mtp_ce.loss import MTPLoss, MTPStats
from mtp_ce.next_token import NextToken
from mtp_ce.options import LossInputs, LossOptions
from mtp_ce.registry import check_name
from mtp_ce.unembedding import Unembedding

TrunkMode = Literal["joint", "detached", "frozen"]
LossPath = Literal["linear", "logits"]


@dataclass
class MTPOutput(ModelOutput):
    """Output of `MTPWrapper.forward` with labels.

    Attributes:
        loss: [] fp32, weighted, over all heads, plus the routers' loss times the model's coefficient.
        logits: [B, S, V] of head 0, where `return_logits` is True.
        stats: per-head statistics, where `return_stats` is True.
        aux_loss: [] balancing loss of the model's routers, where it is requested.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    stats: MTPStats | None = None
    aux_loss: Tensor | None = None


class MTPWrapper(PreTrainedModel):
    """A Hugging Face causal language model with H prediction heads and the weighted loss over all of them.

    Args:
        model: any causal language model of transformers whose base model returns `last_hidden_state`, adapters of PEFT
            included.
        horizon: H, the number of heads; head 0 is the model's own, head h predicts the token at t + 1 + h.
        heads: "residual": one small block per extra head (arXiv:2401.10774). "layer": a decoder layer of the model's
            own class per extra head (arXiv:2404.19737). "sequential": such layers in a chain, each given the token that
            the one before predicts (arXiv:2412.19437). "teacher_forcing": no new parameters, the model's own
            next-token loss h tokens further on. "none": H = 1. Or `package.module:Class`, a subclass of
            `mtp_ce.heads.protocol.Heads`.
        trunk: "joint": model and heads are trained. "detached": the heads are trained, and no gradient reaches the
            model. "frozen": likewise, and the model's parameters no longer require gradients.
        loss: "linear" never builds the logits of the heads; "logits" builds them. The same loss.
        label_smoothing: e in [0, 1) of the loss, in evaluation too; see `weighted_mtp_ce`.
        z_loss: factor >= 0 of logsumexp**2 in the loss.

    Raises:
        TypeError: `model` is no causal language model with output embeddings, or `heads` no subclass of `Heads`.
        ValueError: an encoder-decoder model, one whose logits are more than a linear layer, a scale and a softcap, an
            argument out of its range, nothing to train, or output_router_logits in the configuration of a model without
            that loss or with heads that have routers of their own.

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
        heads: str = "residual",
        trunk: TrunkMode = "joint",
        loss: LossPath = "linear",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        head_reduction: str = "target",
    ) -> None:
        check_name(heads, PATHS, "heads")
        for name, value, known in (("trunk", trunk, TrunkMode), ("loss", loss, LossPath)):
            if value not in get_args(known):
                raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, get_args(known)))}.")
        if isinstance(horizon, bool) or not isinstance(horizon, int) or horizon < 1:
            raise ValueError(f"horizon is {horizon!r}; expected at least 1: head 0 is the model's own.")
        LossOptions(label_smoothing=label_smoothing, z_loss=z_loss, head_reduction=head_reduction)  # checks them
        causal = causal_model(model)
        Unembedding.checked(causal)
        built = build_heads(heads, causal, horizon)
        if trunk != "joint" and next(built.parameters(), None) is None:
            raise ValueError(
                f"trunk is {trunk!r} with heads={heads!r} and horizon {horizon}; nothing would be trained."
            )
        if wants_router_loss(causal, built):
            coefficient(causal)
        super().__init__(causal.config)
        # Trainer then counts the targets of a batch as it does for a causal language model.
        self.loss_type = "ForCausalLM"
        self.model = model
        self.generation_config = causal.generation_config
        self.trunk, self.loss = trunk, loss
        self.label_smoothing, self.z_loss, self.head_reduction = label_smoothing, z_loss, head_reduction
        self.heads: Heads = built
        if trunk == "frozen":
            model.requires_grad_(False)

    # The implementations of attention and experts were chosen when the model was built, in the shared configuration.
    def _check_and_adjust_attn_implementation(self, attn_implementation: Any, *_: Any, **__: Any) -> Any:
        return attn_implementation

    def _check_and_adjust_experts_implementation(self, experts_implementation: Any, *_: Any, **__: Any) -> Any:
        return experts_implementation

    @property
    def horizon(self) -> int:
        """H, the number of heads."""
        return self.heads.horizon

    @property
    def kind(self) -> str:
        """The kind of the heads: a name or a class path."""
        return self.heads.kind

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
        """Return the loss over all heads; without labels, the model's own output.

        Args:
            input_ids: the tokens.
            attention_mask: as the model takes it. Packed rows need none, but position_ids.
            position_ids: a document begins wherever they restart, and no head predicts across its border.
            labels: `input_ids`, unshifted, with -100 at tokens that are not trained on.
            token_weights: weights of the tokens at these positions; None means ones. With shift_labels they are shifted
                as those are. Or a function that computes them from this forward's own next-token head, for scorers.
            document_ids: borders of packed documents; None takes them from cu_seq_lens_q or position_ids.
            num_items_in_batch: what the sum over positions is divided by; None means the positions with a target.
            weight_alignment: "target": a weight belongs to the predicted token; "position": to the position that
                predicts.
            return_logits: whether to return head 0's logits [B, S, V].
            return_stats: whether to return per-head statistics.
            **arguments: for the model, with two exceptions. shift_labels [B, S] replace labels: they are shifted by
                one already, as transformers' sequence parallelism makes them. (They are no parameter, because Trainer
                evaluates only batches that have every parameter with "label" in its name.) cu_seq_lens_q, for flash
                attention, also sets the borders of documents.

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
        normalizer = loss_normalizer(num_items_in_batch, targets)
        if targets is None:
            return self.model(**inputs)
        hidden, router_loss = self._hidden_states(**inputs)
        output = Unembedding.of(self.causal)
        if document_ids is None:
            document_ids = packed_documents(targets.shape, position_ids, arguments.get("cu_seq_lens_q"))
        weights = token_weights
        if callable(weights):
            weights = weights(NextToken(output.scaled(hidden[0]), output.weight, output.bias, output.softcap))
        options = LossOptions(
            shift=shift, weight_alignment=weight_alignment,
            softcap=output.softcap, z_loss=self.z_loss, label_smoothing=self.label_smoothing,
            head_reduction=self.head_reduction,
        )  # fmt: skip
        loss_inputs = LossInputs(targets, weights, document_ids=document_ids, normalizer=normalizer)
        loss, stats = self._loss(hidden, output, loss_inputs, options)
        if router_loss is not None:
            fraction = 1 if normalizer is None else stats.live.any(-1).sum() / normalizer
            loss = loss + fraction * coefficient(self.causal) * router_loss.to(loss)
        result = MTPOutput(
            loss=loss,
            logits=output.logits(hidden[0]) if return_logits else None,
            stats=stats if return_stats else None,
            aux_loss=router_loss,
        )
        return result if self._returns_dict(inputs) else result.to_tuple()

    def head_hidden_states(self, **inputs: Any) -> list[Tensor]:
        """Return the hidden states of every head, H tensors [B, S, D]; one for "teacher_forcing".

        Args:
            **inputs: arguments of the model's forward.
        """
        return self._hidden_states(**inputs)[0]

    # Separate from the public method, around which FSDP gathers parameters: in forward they are gathered already.
    def _hidden_states(self, **inputs: Any) -> tuple[list[Tensor], Tensor | None]:
        inputs.setdefault("use_cache", False)
        if not self._returns_dict(inputs):
            inputs["return_dict"] = True
        return head_hidden_states(self.causal, self.heads, inputs, joint=self.trunk == "joint")

    def _returns_dict(self, inputs: dict[str, Any]) -> bool:
        requested = inputs.get("return_dict")
        return bool(self.config.return_dict if requested is None else requested)

    def head_logits(self, **inputs: Any) -> list[Tensor]:
        """Return the logits of every head, H tensors [B, S, V]; one for "teacher_forcing". Arguments as in forward."""
        output = Unembedding.of(self.causal)
        return [output.logits(hidden) for hidden in self.head_hidden_states(**inputs)]

    def _loss(self, hidden: list[Tensor], output: Unembedding, inputs: LossInputs, options: LossOptions) -> MTPLoss:
        if self.trunk != "joint":
            bias = None if output.bias is None else output.bias.detach()
            output = output._replace(weight=output.weight.detach(), bias=bias)
        return self.heads.loss(fused_loss(output, linear=self.loss == "linear"), hidden, inputs, options)

    def generate(self, *arguments: Any, speculative: bool = False, **options: Any) -> Any:
        """Generate with the model's own `generate`, or the same text in fewer forwards.

        Args:
            *arguments: as the model's `generate` takes them.
            speculative: whether the heads draft and the model verifies; takes the options of
                `mtp_ce.decoding.speculative.generate_speculatively`, which also returns how many drafts were accepted.
            **options: as the model's `generate` takes them.

        Returns:
            Tokens [B, S + new], the prompt included, or what the options request from the model.
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
        """Write the model, which loads without the heads, and the heads beside it.

        Args:
            save_directory: folder for both.
            is_main_process: whether this process writes; others take part in gathering the model.
            state_dict: of the wrapper, where it was gathered from elsewhere; None takes the wrapper's own. An empty one
                writes no heads.
            **options: for the model's `save_pretrained`.

        Raises:
            ValueError: `push_to_hub`, which is a separate method of the wrapper.
        """
        if options.get("push_to_hub"):
            raise ValueError(
                "push_to_hub is True; expected False: the model would be on the hub before its heads are written. "
                "The wrapper's push_to_hub(repo_id) uploads both."
            )
        split: dict[str, dict[str, Tensor] | None] = {"model.": None, "heads.": None}
        if state_dict is not None:
            split = {
                prefix: {name.removeprefix(prefix): x for name, x in state_dict.items() if name.startswith(prefix)}
                for prefix in split
            }
        model: Any = self.model
        model.save_pretrained(save_directory, is_main_process=is_main_process, state_dict=split["model."], **options)
        # DeepSpeed passes an empty one where it keeps the parameters in files of its own.
        if is_main_process and state_dict != {}:
            self.heads.save_pretrained(save_directory, state_dict=split["heads."])

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        source: str | Path,
        *,
        trunk: TrunkMode = "joint",
        loss: LossPath = "linear",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> MTPWrapper:
        """Load what `save_pretrained` wrote. Adapters of PEFT are trained further where `trunk` is "joint".

        Args:
            source: the folder, or a name on the hub.
            trunk: see `MTPWrapper`; like all that follow it is not saved.
            loss: "linear" or "logits".
            label_smoothing: of the loss.
            z_loss: of the loss.
            trust_remote_code: run Python code from the model's files, if its class is not one of transformers. Read
                that code first.
            **options: for `AutoModelForCausalLM.from_pretrained`. Those that locate files apply to the heads' too.

        Raises:
            FileNotFoundError: there are no heads beside the model.
            ValueError: the heads do not fit the model: another hidden size, kind or number; or their class is the
                author's own and `source` is no local folder; or the model needs code that may not run.
        """
        saved = SavedHeads.beside(source, **options)
        saved.check_trusted()
        try:
            model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=trust_remote_code, **options)
        except ValueError as error:
            if "trust_remote_code" not in str(error):
                raise
            raise ValueError(
                f"{source} needs Python code from its own files, which is not run. Read it; then load the model with "
                "transformers and trust_remote_code=True, and wrap it: MTPWrapper(model, horizon)."
            ) from None
        if trunk == "joint" and hasattr(model, "peft_config"):
            # transformers loads adapters for inference.
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
            ValueError: none of the wrapper's names is there, as in the files of a saved model.
        """
        names = {name for name, _ in (*self.named_parameters(remove_duplicate=False), *self.named_buffers())}
        if state_dict and names.isdisjoint(state_dict):
            raise ValueError(
                f"state_dict has none of the wrapper's own names, such as {min(names)!r}; it begins with "
                f"{min(state_dict)!r}. If it comes from a folder of save_pretrained, MTPWrapper.from_pretrained loads "
                "model and heads, and mtp_ce.MTPTrainer resumes in place of transformers.Trainer."
            )
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def get_input_embeddings(self) -> nn.Module:
        """Return the model's input embeddings."""
        embeddings: nn.Module = self.causal.get_input_embeddings()
        return embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Set the model's input embeddings."""
        self.causal.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """Return the model's output embeddings."""
        embeddings: nn.Module = self.causal.get_output_embeddings()
        return embeddings

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Set the model's output embeddings."""
        self.causal.set_output_embeddings(value)

    def resize_token_embeddings(self, *arguments: Any, **options: Any) -> Any:
        """Resize the model's embeddings; arguments as the model's own method takes them."""
        return self.causal.resize_token_embeddings(*arguments, **options)
