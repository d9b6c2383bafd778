"""The protocol of prediction heads. A kind subclasses `Heads` and overrides what differs from the defaults.

    class Scaled(Heads):
        def __init__(self, hidden_size, horizon):
            super().__init__(hidden_size, horizon)
            self.scales = nn.Parameter(torch.ones(horizon - 1, hidden_size))

        def forward(self, hidden, trunk=None):
            return [hidden, *(hidden * scale for scale in self.scales)]

    MTPWrapper(model, horizon=4, heads="my_package.heads:Scaled")

Such heads train, draft, and are saved and loaded: tests/extending/test_own_head.py does all of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mtp_ce.heads.drafting import Drafter, HiddenStateDrafter
from mtp_ce.heads.kinds import CONFIG_FILE, PATHS, TENSORS_FILE
from mtp_ce.heads.trunk import TrunkPass
from mtp_ce.loss import MTPStats
from mtp_ce.options import LossInputs, LossOptions
from mtp_ce.registry import load_class
from mtp_ce.unembedding import Unembedding


class HeadsLoss(NamedTuple):
    """The loss of a call, and its statistics where they are requested."""

    loss: Tensor  # []
    stats: MTPStats | None


# The fused loss of hidden states, H x [B, S, D].
FusedLoss = Callable[[list[Tensor], LossInputs, LossOptions], HeadsLoss]


class Heads(nn.Module):
    """H prediction heads on a trunk; head 0 is the model's own next-token head.

    Args:
        hidden_size: D, the trunk's hidden size.
        horizon: H, the number of heads including head 0.

    Attributes:
        kind: the name or class path under which the heads are saved and loaded.
        drafts: whether the heads can draft in speculative decoding.
        reads_last_layer: whether forward needs a `TrunkPass`: the last decoder layer's call, the final norm and the
            token embeddings.
        may_have_routers: whether the heads may hold routers of a mixture of experts. No model's balancing loss covers
            those, so that such heads are not trained with it.
        residual_blocks: one `nn.Linear` per extra head with hidden_h = hidden + SiLU(block(hidden)), as Medusa layouts
            store them; None for heads of another form.
        mtp_modules: one mapping per module for heads that are MTP modules as checkpoints have them: "hidden_norm",
            "token_norm", "projection" and "decoder", as `mtp_ce.heads.modules.layout.ModuleLayout` names their parts,
            with a projection that reads [hidden; embedding]; None for heads of another form.
        can_share: whether `of_model` takes `shared=True`: one module for all extra heads.
        shared: whether these heads are one module, which drafts to any depth.
        reads_checkpoint: whether `of_model` takes `stored`, the files of the model, and a horizon of None.
        stored_names: of the tensors that `module_tensors` returns.
        stored_in: the source that they were read from.
        reads_next_tokens: whether head h reads the embedding of the token at t + h, so that labels beyond a row need
            the tokens there, too: `TrunkPass.next_tokens`.
        layer_index: index of the decoder layer of the model whose call `TrunkPass` has; -1 is the last one.
        format: see `mtp_ce.heads.kinds.HeadKind`.
        file_metadata: metadata of the safetensors file.
        checkpoints_layers: whether forward runs every head in `checkpointed`, its decoder layer included, which then
            has no activation checkpoint of its own.
        gradient_checkpointing: whether `checkpointed` makes checkpoints; transformers sets it on every module that has
            it, with `_gradient_checkpointing_func`.
    """

    kind: str = ""
    checkpoints_layers: ClassVar[bool] = False
    gradient_checkpointing: bool = False
    _gradient_checkpointing_func: Any = partial(checkpoint, use_reentrant=False)
    shared: bool = False
    drafts: ClassVar[bool] = True
    can_share: ClassVar[bool] = False
    reads_checkpoint: ClassVar[bool] = False
    layer_index: int = -1
    stored_names: tuple[str, ...] = ()
    stored_in: str = ""
    format: ClassVar[int] = 1
    reads_last_layer: ClassVar[bool] = False
    reads_next_tokens: ClassVar[bool] = False
    may_have_routers: ClassVar[bool] = False
    file_metadata: ClassVar[dict[str, str] | None] = {"format": "pt"}

    def __init__(self, hidden_size: int, horizon: int) -> None:
        super().__init__()
        self.hidden_size, self.horizon = hidden_size, horizon

    @classmethod
    def of_model(cls, model: Any, horizon: int) -> Self:
        """Build the heads of a causal language model, on the device and in the dtype of its output embeddings.

        Args:
            model: the model, without PEFT's wrapper.
            horizon: H.

        Raises:
            ValueError: the model cannot have heads of this kind.
        """
        unembed = model.get_output_embeddings().weight
        return cls(unembed.shape[1], horizon).to(device=unembed.device, dtype=unembed.dtype)

    def forward(self, hidden: Tensor, trunk: TrunkPass | None = None) -> list[Tensor]:
        """Return the hidden states of the heads, tensors [B, S, D]; the first one is `hidden` itself.

        Args:
            hidden: [B, S, D], the trunk's last hidden state, after its final norm.
            trunk: present where `reads_last_layer` is True.
        """
        raise NotImplementedError

    def checkpointed(self, head: Callable[..., Any], *inputs: Tensor) -> Any:
        """Run one head, with `gradient_checkpointing` in a checkpoint: backward has the activations of one at a time.

        Args:
            head: a function of tensors.
            *inputs: the tensors that a gradient is to reach; saved, and read again in backward.
        """
        if not (self.gradient_checkpointing and self.training and torch.is_grad_enabled()):
            return head(*inputs)
        run: Any = self._gradient_checkpointing_func
        if getattr(run, "keywords", {}).get("use_reentrant", True) and not any(x.requires_grad for x in inputs):
            # Such a checkpoint records nothing where none of its inputs requires a gradient, as behind a frozen trunk.
            inputs = (inputs[0].detach().requires_grad_(), *inputs[1:])
        return run(head, *inputs)

    def checkpoint_activations(self, enable: bool = True) -> None:
        """Have `checkpointed` make checkpoints, or not."""
        self.gradient_checkpointing = enable
        for layer in self.decoder_layers if self.checkpoints_layers else ():
            if hasattr(layer, "gradient_checkpointing"):
                layer.gradient_checkpointing = False  # type: ignore[assignment]

    @property
    def output_count(self) -> int:
        """How many tensors `forward` returns, each multiplied with the unembedding: H, or 1 that serves all heads."""
        return self.horizon

    @property
    def label_halo(self) -> int:
        """How many tokens beyond a row its positions can be trained to predict: H, or 0 with a loss of one's own."""
        return self.horizon if type(self).loss is Heads.loss else 0

    @property
    def decoder_layers(self) -> Sequence[nn.Module]:
        """Layers of the model's own class: FSDP groups of their own, with attention of their own."""
        return ()

    @property
    def layer_runs(self) -> Sequence[int]:
        """Length of every call of a decoder layer in `forward`, in rows of S positions."""
        return [1] * len(self.decoder_layers)

    @property
    def residual_blocks(self) -> nn.ModuleList | None:
        """See the class."""
        return None

    @property
    def mtp_modules(self) -> Sequence[Mapping[str, nn.Module]] | None:
        """See the class."""
        return None

    def loss(self, fused: FusedLoss, hidden: list[Tensor], inputs: LossInputs, options: LossOptions) -> HeadsLoss:
        """Return the loss over all heads, with statistics of H heads where `fused` returns any.

        Args:
            fused: the fused loss of hidden states.
            hidden: what `forward` returned.
            inputs: labels [B, S], or longer by at most `label_halo`, token weights and the other tensors of the call.
            options: options of the loss.
        """
        return fused(hidden, inputs, options)

    @classmethod
    def count_rows(cls, rows: Tensor, shift: int) -> Tensor | None:
        """Return how many rows `loss` multiplies with the unembedding, []; None where a loss of one's own decides it.

        Args:
            rows: [B, S, H] bool, those that are not masked.
            shift: of the labels.
        """
        return rows.sum() if cls.loss is Heads.loss else None

    @contextmanager
    def drafter(self, causal: Any, new_cache: Callable[[], Any]) -> Iterator[Drafter]:
        """Yield the drafter; inside the block it follows the model's forwards.

        Args:
            causal: the model that decodes.
            new_cache: returns an empty cache of the model's configuration.
        """
        yield HiddenStateDrafter(self, Unembedding.of(causal))

    def module_tensors(
        self, model: Any, state: Mapping[str, Tensor] | None = None, model_state: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Return the parameters that belong into the files of the model, by their names there; {} where none do.

        Args:
            model: the causal language model.
            state: the heads' parameters where they were gathered from elsewhere; None takes their own.
            model_state: likewise of the model.
        """
        return {}

    def load_stored(self, model: Any, stored: Any) -> None:
        """Read the parameters again from files of the model, as `module_tensors` returns them.

        Args:
            model: the causal language model.
            stored: the files, as `mtp_ce.heads.native.StoredTensors`.
        """
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Sizes and kind, for `print(model)`."""
        return f"hidden_size={self.hidden_size}, horizon={self.horizon}, kind={self.kind!r}"

    def save_pretrained(
        self, folder: str | Path, state_dict: dict[str, Tensor] | None = None, in_model: bool = False
    ) -> None:
        """Write `mtp_heads.json` and `mtp_heads.safetensors` into `folder`, beside a saved model.

        Args:
            folder: created where it is missing.
            state_dict: the parameters, where they were gathered from elsewhere; None takes the module's own.
            in_model: whether the parameters are among the model's files, so that `mtp_heads.json` alone is written.

        Raises:
            ModuleNotFoundError: safetensors is not installed; `pip install 'mtp_ce[train]'` brings it.
            ValueError: the parameters are on the meta device.
        """
        from safetensors.torch import save_file

        if state_dict is None:
            check_materialized(self)
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config: dict[str, Any] = {"kind": self.kind, "hidden_size": self.hidden_size, "horizon": self.horizon}
        if self.format > 1:
            config["format"] = self.format
        if self.shared and self.can_share:
            config["shared"] = True
        if in_model:
            config["in_model"] = True
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
        if in_model:  # those of an earlier save
            (folder / TENSORS_FILE).unlink(missing_ok=True)
            return
        tensors = self.state_dict() if state_dict is None else state_dict
        tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        save_file(tensors, folder / TENSORS_FILE, metadata=self.file_metadata)


def check_materialized(module: nn.Module) -> None:
    """Check that the parameters have values to be written, or memory to be read into.

    Raises:
        ValueError: one is on the meta device.
    """
    for name, x in module.named_parameters():
        if x.is_meta:
            raise ValueError(
                f"{type(module).__name__} is on the meta device: {name} has no values. Expected parameters in memory: "
                "module.to_empty(device=...) allocates them."
            )


class ModelWithHeads(Protocol):
    """A causal language model and its prediction heads, such as `MTPWrapper`: all that decoding and export need."""

    model: Any  # with PEFT's wrapper, where there is one
    heads: Heads
    carried: Any  # `mtp_ce.serving.carried.CarriedModule`

    @property
    def causal(self) -> Any:
        """The causal language model, without PEFT's wrapper."""
        ...

    @property
    def trunk(self) -> str:
        """What is trained: "joint" includes the model."""
        ...


def heads_class(kind: str, argument: str = "heads") -> type[Heads]:
    """Import the class of a kind.

    Args:
        kind: a name of `mtp_ce.heads.kinds.KINDS`, or `package.module:Class` of a subclass of `Heads`.
        argument: the argument or recipe key that the kind came from, for the message.

    Raises:
        TypeError: the class is no subclass of `Heads`.
        ValueError: the name is unknown, or its class can't be imported.
    """
    loaded = load_class(kind, PATHS, argument)
    if not (isinstance(loaded, type) and issubclass(loaded, Heads)):
        raise TypeError(f"{argument} is {kind!r}; expected a subclass of mtp_ce.heads.protocol.Heads.")
    return loaded


def build_heads(kind: str, model: Any, horizon: int | None, shared: bool = False, stored: Any = None) -> Heads:
    """Build the heads of a model.

    Args:
        kind: as in `heads_class`.
        model: the causal language model, without PEFT's wrapper.
        horizon: H; None where the files of the model say it.
        shared: whether one module serves all extra heads.
        stored: the files that the model was loaded from, as `mtp_ce.heads.native.StoredTensors`.

    Raises:
        TypeError, ValueError: as `heads_class`, the model can't have such heads, or they can't be shared.
    """
    loaded = heads_class(kind)
    if shared and not loaded.can_share:
        raise ValueError(f"shared is True with heads={kind!r}; expected heads='sequential', or shared=False.")
    options: dict[str, Any] = {"shared": True} if shared else {}
    if loaded.reads_checkpoint:
        options["stored"] = stored
    elif horizon is None:
        raise ValueError(f"horizon is None with heads={kind!r}; expected the number of heads, head 0 included.")
    of_model: Any = loaded.of_model
    heads: Heads = of_model(model, horizon, **options)
    heads.kind = kind
    return heads
