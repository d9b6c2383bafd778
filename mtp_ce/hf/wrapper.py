"""Prediction heads on any Hugging Face causal language model, without changing the model.

    hidden   = base_model(input_ids).last_hidden_state          [B, S, D]
    hidden_h = head_h(hidden)                                   H x [B, S, D], hidden_0 = hidden
    loss     = weighted_mtp_linear_ce(hidden_0 .. hidden_{H-1}, unembed, labels, token_weights)

Nothing of the model is replaced or patched: its own forward generates, and its files load without the heads. The loss
is computed inside forward, from hidden states, because FSDP and DeepSpeed gather sharded parameters around forward. The
logits of H heads are never built, unless they are requested.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

from torch import Tensor, nn

from mtp_ce.decoding.speculative import generate_speculatively
from mtp_ce.heads.kinds import PATHS
from mtp_ce.heads.protocol import Heads, build_heads
from mtp_ce.heads.virtual_tokens import check_virtual_tokens
from mtp_ce.hf.arguments import LossArguments, ModelArguments
from mtp_ce.hf.causal import causal_model, check_in_memory, check_trainable
from mtp_ce.hf.documents import packed_documents
from mtp_ce.hf.files import LossPath, Targets, TrunkMode, WrapperFiles
from mtp_ce.hf.head_loss import LossCall, fixed_head_weights, fused_loss, loss_normalizer, trunk_targets
from mtp_ce.hf.hidden_states import head_hidden_states
from mtp_ce.hf.output import MTPOutput
from mtp_ce.hf.router_loss import coefficient, normalized_fraction, wants_router_loss
from mtp_ce.hf.row_count import RowCount, positions_of
from mtp_ce.next_token import NextToken
from mtp_ce.ops.chunks import GPU_ROWS
from mtp_ce.options import LossInputs, LossOptions
from mtp_ce.registry import check_name
from mtp_ce.serving.carried import CarriedModule
from mtp_ce.unembedding import Unembedding


class MTPWrapper(WrapperFiles):
    """A Hugging Face causal language model with H prediction heads and the weighted loss over all of them.

    Args:
        model: any causal language model of transformers whose base model returns `last_hidden_state`, adapters of PEFT
            included.
        horizon: H, the number of heads; head 0 is the model's own, head h predicts the token at t + 1 + h. May be left
            out with heads="native": one more than the model has MTP modules.
        heads: "residual": one small block per extra head (arXiv:2401.10774). "layer": a decoder layer of the model's
            own class per extra head (arXiv:2404.19737). "sequential": such layers in a chain, each given the token that
            the one before predicts, as serving engines run them (arXiv:2412.19437). "native": the MTP modules in the
            files that the model was loaded from, which are written back there. "teacher_forcing": no new parameters,
            the model's own next-token loss h tokens further on. "none": H = 1. Or `package.module:Class`, a subclass of
            `mtp_ce.heads.protocol.Heads`.
        trunk: "joint": model and heads are trained. "detached": the heads are trained, and no gradient reaches the
            model. "frozen": likewise, and the model's parameters no longer require gradients.
        loss: "linear" never builds the logits of the heads; "logits" builds them. The same loss.
        label_smoothing: e in [0, 1) of the loss, in evaluation too; see `weighted_mtp_ce`.
        z_loss: factor >= 0 of logsumexp**2 in the loss.
        head_reduction: "target": every predicted token has weight 1, whatever is masked around it, as trainers count
            them in `num_items_in_batch`. "live" and "horizon": every position has; see `weighted_mtp_ce`.
        head_weights: H constants: a mean over heads becomes a weighted one.
        shared: for "sequential": one module for all extra heads, fed its own output, which drafts to any depth. It is
            saved with the heads.
        targets: "text": the heads learn the labels. "trunk": they learn the token that head 0 finds most likely in each
            place, which is what verification of a greedy draft compares with; for a trunk that is not trained. Loss and
            statistics are those of these tokens. It costs one more pass of head 0 over the output layer.
        activation_checkpointing: of the heads: each is run again in backward, so that the activations of one head exist
            at a time, at any horizon. `activation_checkpointing_enable()` is for the model and its heads.

    Raises:
        TypeError: `model` is no causal language model with output embeddings, or `heads` no subclass of `Heads`.
        ValueError: an encoder-decoder model, one whose logits are more than a linear layer, a scale and a softcap, an
            argument out of its range, nothing to train, output_router_logits in the configuration of a model without
            that loss or with heads that have routers of their own, a quantised output layer, a quantised model without
            adapters and a joint trunk, or virtual tokens of PEFT that the heads can't follow.

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
        horizon: int | None = None,
        heads: str = "residual",
        trunk: TrunkMode = "joint",
        loss: LossPath = "linear",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        head_reduction: str = "target",
        head_weights: Sequence[float] | Tensor | None = None,
        shared: bool = False,
        targets: Targets = "text",
        activation_checkpointing: bool = False,
    ) -> None:
        check_name(heads, PATHS, "heads")
        choices = (("trunk", trunk, TrunkMode), ("loss", loss, LossPath), ("targets", targets, Targets))
        for name, value, known in choices:
            if value not in get_args(known):
                raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, get_args(known)))}.")
        if horizon is not None and (isinstance(horizon, bool) or not isinstance(horizon, int) or horizon < 1):
            raise ValueError(f"horizon is {horizon!r}; expected at least 1: head 0 is the model's own.")
        options = LossOptions(head_reduction=head_reduction, label_smoothing=label_smoothing, z_loss=z_loss)
        causal = causal_model(model)
        check_in_memory(causal)
        Unembedding.checked(causal)
        carried = CarriedModule.of(causal)
        if heads == "native" and carried.names and carried.is_dropped(causal):
            raise ValueError(
                f"heads is 'native', and the model's configuration has 0 MTP modules where {carried.source} has "
                "others; expected their number, as from_pretrained reads it."
            )
        built = build_heads(heads, causal, horizon, shared, carried)
        if trunk != "joint" and next(built.parameters(), None) is None:
            raise ValueError(
                f"trunk is {trunk!r} with heads={heads!r} and horizon {built.horizon}; nothing would be trained."
            )
        if targets == "trunk" and trunk == "joint":
            raise ValueError(
                "targets is 'trunk' with trunk='joint'; expected trunk='detached' or 'frozen': a trunk that is trained "
                "on its own greedy tokens learns nothing of the text."
            )
        balances = wants_router_loss(causal, built)
        if balances:
            coefficient(causal)
        check_virtual_tokens(model, built.reads_last_layer, balances)
        if trunk == "joint":
            check_trainable(model)
        super().__init__(causal.config)
        # Trainer then counts the targets of a batch as it does for a causal language model.
        self.loss_type = "ForCausalLM"
        self.model = model
        self.generation_config = causal.generation_config
        self.trunk, self.loss, self.targets = trunk, loss, targets
        self.loss_options = options
        self.heads: Heads = built
        if activation_checkpointing:
            built.checkpoint_activations()
        # A constant of this run, not saved.
        self.register_buffer("head_weights", fixed_head_weights(head_weights, built, options), persistent=False)
        self._model_arguments = ModelArguments.of(model, causal, MTPWrapper.forward)
        self.carried = carried.without(built.stored_names)
        self.carried.report(causal, trained=trunk == "joint")
        if trunk == "frozen":
            model.requires_grad_(False)

    # The implementations of attention and experts were chosen when the model was built, in the shared configuration.
    def _check_and_adjust_attn_implementation(self, attn_implementation: Any, *_: Any, **__: Any) -> Any:
        return attn_implementation

    def _check_and_adjust_experts_implementation(self, experts_implementation: Any, *_: Any, **__: Any) -> Any:
        return experts_implementation

    def _set_gradient_checkpointing(self, *arguments: Any, **options: Any) -> None:
        super()._set_gradient_checkpointing(*arguments, **options)
        # A head is one checkpoint, with the layer in it.
        self.heads.checkpoint_activations(self.heads.gradient_checkpointing)

    @property
    def horizon(self) -> int:
        """H, the number of heads."""
        return self.heads.horizon

    @property
    def kind(self) -> str:
        """The kind of the heads: a name or a class path."""
        return self.heads.kind

    @classmethod
    def can_generate(cls) -> bool:
        """Return True: pipelines call `generate`."""
        return True

    def add_model_tags(self, tags: list[str] | str) -> None:
        """Add tags for the hub, as TRL's trainers do when they are constructed.

        Raises:
            TypeError: the tags are those of a trainer that computes a loss of its own from the model's logits.
        """
        if "trl" in tags and "mtp_ce" not in tags:
            raise TypeError(
                f"model is MTPWrapper in a trainer of TRL ({', '.join(tags)}) that computes a loss of its own, which "
                "trains no head; expected class T(MTPTrainer, SFTTrainer) for SFTTrainer, and model=wrapper.model for "
                "all others: train the heads afterwards, with trunk='detached'."
            )
        super().add_model_tags(tags)

    def forward(
        self,
        input_ids: Tensor | None = None,  # [B, S]
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,  # [B, S]
        labels: Tensor | None = None,  # [B, S], or [B, T] with a halo
        token_weights: Tensor | Callable[[NextToken], Tensor] | None = None,  # like labels, or [B, S, H]
        document_ids: Tensor | None = None,  # like labels
        num_items_in_batch: Tensor | int | None = None,
        *,
        next_input_ids: Tensor | None = None,  # [B, n]
        weight_alignment: Literal["target", "position"] = "target",
        return_logits: bool = False,
        return_stats: bool = False,
        return_entropy: bool = False,
        **arguments: Any,
    ) -> Any:
        """Return the loss over all heads; without labels, the model's own output.

        Args:
            input_ids: the tokens.
            attention_mask: as the model takes it. Packed rows need none, but position_ids.
            position_ids: a document begins wherever they restart, and no head predicts across its border.
            labels: `input_ids`, unshifted, with -100 at tokens that are not trained on. They may go on beyond the
                inputs, [B, S + halo], where those are a slice of a longer sequence or a row of a packed text: the last
                positions then have targets, too. With `left_halo` of the loss they begin that many tokens before.
            token_weights: weights of the tokens at these positions; None means ones. With shift_labels they are shifted
                as those are. Or a function that computes them from this forward's own heads, for scorers.
            document_ids: borders of packed documents; None takes them from cu_seq_lens_q or position_ids.
            next_input_ids: the tokens after `input_ids`, for heads that read the tokens before their targets, such as
                "sequential": halo - 1 of them, at most H - 1. Other heads ignore them.
            num_items_in_batch: what the sum of the loss is divided by; None means the predicted tokens of this batch,
                or the positions with a target for another `head_reduction` than "target".
            weight_alignment: "target": a weight belongs to the predicted token; "position": to the position that
                predicts.
            return_logits: whether to return head 0's logits [B, S, V].
            return_stats: whether to return per-head statistics.
            return_entropy: whether to return the entropy of head 0's distribution, which reads its logits once more.
            **arguments: of the loss, by their names in `weighted_mtp_ce`: head_reduction, head_weights, seq_lens,
                ignore_index, label_smoothing, left_halo, loss_scale, z_loss, and drop_dead_rows, see `count_rows`.
                shift_labels [B, S] replace labels: they are shifted by one already, as transformers' sequence
                parallelism makes them. (They are no parameters, because Trainer evaluates only batches that have every
                parameter with "label" in its name.) All others are for the model; cu_seq_lens_q, for flash attention,
                also sets the borders of documents.

        Returns:
            `MTPOutput`, or the model's own output where there are no labels; a tuple where `return_dict=False`.

        Raises:
            TypeError: as the loss; or an argument that neither the wrapper nor its model reads.
            ValueError: as the loss; both labels and shift_labels; arguments of the loss without labels; a halo that
                these heads can't be trained on, or without the tokens or borders of documents that are in it.
        """
        call = LossArguments.take(labels, arguments)
        inputs: dict[str, Any] = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            **arguments,
        }
        normalizer = loss_normalizer(num_items_in_batch, call.targets)
        if call.targets is None:
            call.refuse(
                token_weights=token_weights, document_ids=document_ids, next_input_ids=next_input_ids,
                return_stats=return_stats or None, return_entropy=return_entropy or None,
            )  # fmt: skip
            self._model_arguments.check_own(arguments)
            return self.model(**inputs)
        S = positions_of(call.targets, call.options.get("left_halo", 0), inputs)
        what = "targets='trunk'" if self.targets == "trunk" else f"heads={self.kind!r}"
        call.check_halo(S, self.horizon, self.label_halo, what)
        if self.heads.reads_next_tokens:
            call.check_next_tokens(S, self.horizon, next_input_ids, what)
        if document_ids is None and call.targets.dim() == 2:
            document_ids = packed_documents(call.targets.shape, S, position_ids, arguments.get("cu_seq_lens_q"))
        hidden, router_loss = self._hidden_states(next_input_ids=next_input_ids, **inputs)
        output = Unembedding.of(self.causal)
        weights = token_weights(self._next_token(hidden, output)) if callable(token_weights) else token_weights
        options = replace(
            self.loss_options, shift=call.shift, weight_alignment=weight_alignment, softcap=output.softcap,
            **call.options,
        )  # fmt: skip
        tensors = {"head_weights": self.head_weights, **call.tensors}
        loss_inputs = LossInputs(call.targets, weights, document_ids=document_ids, normalizer=normalizer, **tensors)
        if self.targets == "trunk":
            loss_inputs = loss_inputs._replace(labels=trunk_targets(hidden[0], output, loss_inputs, options))
        layer = output if self.trunk == "joint" else output.detached()
        with_stats = return_stats or return_entropy or router_loss is not None
        fused = fused_loss(layer, LossCall(self.loss == "linear", with_stats, call.drop_dead_rows))
        loss, stats = self.heads.loss(fused, hidden, loss_inputs, options)
        entropy = None
        if stats is not None and router_loss is not None:
            fraction = normalized_fraction(stats.live, loss_inputs, options)
            loss = loss + fraction * coefficient(self.causal) * router_loss.to(loss)
        if stats is not None and return_entropy:
            entropy = self._next_token(hidden, output).entropy(stats.live[:, :, 0])
        result = MTPOutput(
            loss=loss,
            logits=output.logits(hidden[0]) if return_logits else None,
            stats=stats if return_stats else None,
            aux_loss=router_loss,
            entropy=entropy,
        )
        return result if self._returns_dict(inputs) else result.to_tuple()

    @property
    def label_halo(self) -> int:
        """How many tokens beyond the inputs labels may have: H for most heads, as far as any of them predicts.

        Less where rows beyond the inputs would be needed: 1 with "teacher_forcing" or targets="trunk", 2 with shared
        modules, 0 with heads that have a loss of their own.
        """
        return min(self.heads.label_halo, 1) if self.targets == "trunk" else self.heads.label_halo

    @property
    def row_count(self) -> RowCount:
        """What `count_rows` counts with: a function of a mapping of arguments, for collators."""
        multiple = 1 if self.device.type == "cpu" else GPU_ROWS
        return RowCount(type(self.heads), self.horizon, self.loss_options, multiple)

    def count_rows(self, **arguments: Any) -> int | None:
        """Return how many rows of the loss are not masked, which `drop_dead_rows` of forward takes.

        On a GPU, masked rows are left out of the products where the number of the others is passed: it can't be counted
        there without waiting. On a CPU they are left out without it. `MTPTrainer` passes it.

        Args:
            **arguments: of forward, on the host: labels or shift_labels, token_weights, document_ids, position_ids,
                cu_seq_lens_q, seq_lens, ignore_index, left_halo; input_ids where labels have a halo. Others are
                ignored.

        Returns:
            An upper bound, on a GPU a multiple of the rows of a tile; None with `loss="logits"`, heads with a loss of
            their own, or weights that require a gradient.

        Example:
            rows = model.count_rows(**batch)
            loss = model(**{name: x.cuda() for name, x in batch.items()}, drop_dead_rows=rows).loss
        """
        return self.row_count(arguments) if self.loss == "linear" else None

    def head_hidden_states(self, *, horizon: int | None = None, **inputs: Any) -> list[Tensor]:
        """Return the hidden states of every head, H tensors [B, S, D]; one for "teacher_forcing".

        Args:
            horizon: instead of the heads' own H, where they are one module that drafts to any depth.
            **inputs: arguments of the model's forward.
        """
        return self._hidden_states(horizon, **inputs)[0]

    # Separate from the public method, around which FSDP gathers parameters: in forward they are gathered already.
    def _hidden_states(
        self, horizon: int | None = None, next_input_ids: Tensor | None = None, **inputs: Any
    ) -> tuple[list[Tensor], Tensor | None]:
        self._model_arguments.check_base(inputs)
        inputs.setdefault("use_cache", False)
        if not self._returns_dict(inputs):
            inputs["return_dict"] = True
        return head_hidden_states(self.model, self.heads, inputs, self.trunk == "joint", horizon, next_input_ids)

    def _returns_dict(self, inputs: dict[str, Any]) -> bool:
        requested = inputs.get("return_dict")
        return bool(self.config.return_dict if requested is None else requested)

    def head_logits(self, **inputs: Any) -> list[Tensor]:
        """Return the logits of every head, H tensors [B, S, V]; one for "teacher_forcing". Arguments as in forward."""
        output = Unembedding.of(self.causal)
        return [output.logits(hidden) for hidden in self.head_hidden_states(**inputs)]

    def next_token(self, **inputs: Any) -> NextToken:
        """Return the next-token head and the heads that draft, as scorers read them; arguments as in forward."""
        return self._next_token(self.head_hidden_states(**inputs), Unembedding.of(self.causal))

    def _next_token(self, hidden: list[Tensor], output: Unembedding) -> NextToken:
        first, *further = map(output.scaled, hidden)
        drafting = tuple(further) if self.heads.drafts else ()
        return NextToken(first, output.weight, output.bias, output.softcap, drafting)

    def generate(self, *arguments: Any, speculative: bool = False, **options: Any) -> Any:
        """Generate with the model's own `generate`, or the same text in fewer forwards.

        Args:
            *arguments: as the model's `generate` takes them.
            speculative: whether the heads draft and the model verifies, under the same generation_config, with options
                as of `mtp_ce.decoding.speculative.generate_speculatively`, which also returns how many drafts were
                accepted.
            **options: as the model's `generate` takes them.

        Returns:
            Tokens [B, S + new], the prompt included, or what the options request from the model.
        """
        if not speculative:
            return self.model.generate(*arguments, **options)
        return generate_speculatively(self, *arguments, **options).sequences

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
