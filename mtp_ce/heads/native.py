"""The MTP modules that a checkpoint came with, read from its files, trained, and written back under their names.

    hidden_0 = the trunk's hidden state after its final norm                            [B, S, D]
    z_h      = layer_h(P_h [norm_a(hidden_{h-1}); norm_b(embed(token t + h))])          h = 1..H-1
    hidden_h = norm_h(z_h)                                                              the module's own norm

These are the heads of `mtp_ce.heads.sequential` with norms of their own. The layout of the checkpoint
(`mtp_ce.heads.modules`) says under which names they are stored, whether the projection reads the hidden state or the
embedding first, whether a further depth reads hidden_h or z_h, and whether the embedding at position 0 is zero.

A checkpoint with one module drafts to any depth with it, as engines run it; n modules are heads 1 to n. Their decoder
layers are of the model's own class. Embeddings and output layer are the model's: copies in the files are checked to be
that, and written back as the model's are then.

Source: vLLM's deepseek_mtp.py, qwen3_next_mtp.py and mimo_mtp.py; transformers' `MtpModel`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn

from mtp_ce.heads.modules.conversion import LayerFiles, names_in_files
from mtp_ce.heads.modules.table import MODULE_LAYOUTS, stored_modules
from mtp_ce.heads.protocol import Heads
from mtp_ce.heads.sequential import SequentialHeads
from mtp_ce.heads.trunk import decoder_layers

_CARRIED = "with other heads, such as heads='sequential', save_pretrained carries the module over"
# What a module has beside its decoder layer: its names in `ModuleLayout` and in `NativeHeads`.
_PARTS = {
    "hidden_norm": "hidden_norms",
    "token_norm": "token_norms",
    "projection": "projections",
    "output_norm": "output_norms",
}


class StoredTensors(Protocol):
    """The files of a model, such as `mtp_ce.serving.carried.CarriedModule`.

    Attributes:
        source: where they are.
        names: of the tensors that are the MTP module's.
    """

    @property
    def source(self) -> str: ...  # noqa: D102
    @property
    def names(self) -> tuple[str, ...]: ...  # noqa: D102

    def read(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Read tensors of the model or its module; those that are not there are left out."""
        ...


class NativeHeads(SequentialHeads):
    """The MTP modules of a checkpoint.

    Args:
        model: the causal language model, loaded by transformers.
        horizon: H; None means one more than there are modules.
        stored: the files that the model was loaded from.

    Raises:
        ValueError: the files have no module, one that is in no layout of `mtp_ce.heads.modules` or does not fit the
            model, or fewer modules than the horizon needs.
    """

    kind = "native"
    can_share: ClassVar[bool] = False
    reads_checkpoint: ClassVar[bool] = True
    format: ClassVar[int] = 1

    def __init__(self, model: Any, horizon: int | None, stored: StoredTensors) -> None:
        layers, norm = decoder_layers(model)
        found = stored_modules(stored.names, len(layers))
        if found is None:
            raise _no_module(model, stored)
        modules = len(found.prefixes)
        if horizon is not None and modules > 1 and horizon > modules + 1:
            raise ValueError(
                f"horizon is {horizon} and {stored.source} has {modules} MTP modules; expected at most {modules + 1}."
            )
        Heads.__init__(self, model.get_output_embeddings().weight.shape[1], horizon or modules + 1)
        self.config = model.config.get_text_config(decoder=True)
        self.layout, self.prefixes = found.layout.of(self.config.model_type), found.prefixes[: self.horizon - 1]
        self.shared = modules == 1 and self.horizon > 1
        self.layer_index = _place(self.config, len(layers), stored.source)
        D, count, unembed = self.hidden_size, len(self.prefixes), model.get_output_embeddings().weight
        self.layers = nn.ModuleList(self._new_layer(model) for _ in range(count))
        with torch.device("meta"):
            self.projections = nn.ModuleList(nn.Linear(2 * D, D, bias=False) for _ in range(count))
        self.hidden_norms, self.token_norms, self.output_norms = (
            nn.ModuleList(copy.deepcopy(norm) for _ in range(count)) for _ in range(3)
        )
        self.to(dtype=unembed.dtype, device="meta")
        self.load_state_dict(self._read(model, stored), assign=True)
        left = [name for name, x in self.named_buffers() if x.is_meta]
        if left and not unembed.is_meta:
            raise _misfit(stored, f"{left[0]} of its layer is computed when a model is built, and is in no file")

    def _new_layer(self, model: Any) -> nn.Module:
        """Return a decoder layer of the model's class on the meta device, in the dtype of its output layer."""
        layers, _ = decoder_layers(model)
        with torch.device("meta"), _configured_as_module(self.config, self.layer_index):
            layer: nn.Module = type(layers[self.layer_index])(self.config, self.layer_index)
        return layer.to(model.get_output_embeddings().weight.dtype)

    @classmethod
    def of_model(cls, model: Any, horizon: int | None, **options: Any) -> Self:
        """See `Heads.of_model`; options are those of the class."""
        heads = cls(model, horizon, **options)
        heads.check_on(model)
        return heads

    def load_stored(self, model: Any, stored: StoredTensors) -> None:
        """Read the modules again, from other files of the model, such as a checkpoint's.

        Args:
            model: the causal language model.
            stored: the files.

        Raises:
            ValueError: a tensor is missing, is not the module's, or has another shape.
        """
        self.load_state_dict(self._read(model, stored))

    def _read(self, model: Any, stored: StoredTensors) -> dict[str, Tensor]:
        """Return the parameters as files of the model have them."""
        unembed = model.get_output_embeddings().weight
        self.stored_names, self.stored_in = (), stored.source
        self.conversions: list[list[Any]] = []
        self.copies: dict[str, str] = {}
        state: dict[str, Tensor] = {}
        for k, prefix in enumerate(self.prefixes):
            own = [name for name in stored.names if name.startswith(prefix)]
            tensors = {name.removeprefix(prefix): x for name, x in stored.read(own).items()}
            self.stored_names += tuple(own)
            if packed := [name for name, x in tensors.items() if x.element_size() == 1]:
                kind = str(tensors[packed[0]].dtype).removeprefix("torch.")
                raise _misfit(stored, f"{prefix}{packed[0]} is quantised ({kind}), which can't be trained")
            for name, whose in self.layout.copies.items():
                if (x := tensors.pop(f"{name}.weight", None)) is not None:
                    self._check_copy(model, stored, f"{prefix}{name}.weight", x, whose)
            for part, modules in _PARTS.items():
                name, parameter = f"{getattr(self.layout, part)}.weight", f"{modules}.{k}.weight"
                wanted, x = self.get_parameter(parameter).shape, tensors.pop(name, None)
                if x is None or x.shape != wanted:
                    found = "is missing" if x is None else f"is {list(x.shape)}"
                    raise _misfit(stored, f"{prefix}{name} {found}; expected {list(wanted)}")
                state[parameter] = x.to(unembed)
            decoder = self.layout.decoder.format(k=k)
            if unknown := [name for name in tensors if not name.startswith(decoder)]:
                raise _misfit(stored, f"{prefix}{min(unknown)} is unknown")
            layer = self._new_layer(model)
            files = LayerFiles(model, self.layer_index, layer)
            inner = {name.removeprefix(decoder): x for name, x in tensors.items()}
            if wrong := files.read(inner, model, unembed.device):
                more = f", and {len(wrong) - 1} more like it" if len(wrong) > 1 else ""
                raise _misfit(stored, f"{prefix}{decoder}{wrong[0]}{more}")
            self.conversions.append(files.conversions)
            state |= {f"layers.{k}.{name}": x for name, x in layer.state_dict().items()}
        meta = {name: torch.empty_like(x, device="meta") for name, x in state.items()}
        if changed := sorted(self.module_tensors(model, meta).keys() ^ set(self.stored_names)):
            raise _misfit(stored, f"{changed[0]} can't be written back as it was read")
        return state

    def _check_copy(self, model: Any, stored: StoredTensors, name: str, x: Tensor, whose: str) -> None:
        """Check that a tensor in the files is a copy of the model's embeddings or output layer in the same files."""
        modules = [model.get_input_embeddings()]
        if whose == "output":  # with tied embeddings there is no tensor of its own
            modules.insert(0, model.get_output_embeddings())
        candidates = [stored_name for module in modules for stored_name in names_in_files(model, module.weight)]
        original = stored.read(candidates)
        ours = next((original[candidate] for candidate in candidates if candidate in original), None)
        if ours is None or not torch.equal(ours, x.to(ours.dtype)):
            raise _misfit(stored, f"{name} differs from the model's own, which such a module would have to share")
        self.copies[name] = whose

    def module_tensors(
        self, model: Any, state: Mapping[str, Tensor] | None = None, model_state: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """See `Heads.module_tensors`."""
        state = self.state_dict() if state is None else state
        tensors: dict[str, Tensor] = {}
        for k, prefix in enumerate(self.prefixes):
            for part, modules in _PARTS.items():
                tensors[f"{prefix}{getattr(self.layout, part)}.weight"] = state[f"{modules}.{k}.weight"]
            files = LayerFiles(model, self.layer_index, self.layers[k], self.conversions[k])
            own = f"layers.{k}."
            parameters = {name.removeprefix(own): x for name, x in state.items() if name.startswith(own)}
            for name, x in files.written(parameters).items():
                decoder = self.layout.decoder.format(k=k)
                tensors[f"{prefix}{decoder}{name.removeprefix(files.file_prefix)}"] = x
        for name, whose in self.copies.items():
            module = model.get_input_embeddings() if whose == "embed" else model.get_output_embeddings()
            names = [n for n, x in model.named_parameters(remove_duplicate=False) if x is module.weight]
            own_state = {} if model_state is None else model_state
            # Of tied weights one name may be there.
            tensors[name] = next((own_state[n] for n in names if n in own_state), module.weight).detach().clone()
        return {name: x.detach().contiguous() for name, x in tensors.items()}

    def _check(self, model: Any) -> None:
        try:
            super()._check(model)
        except ValueError:
            if self.horizon != 2 or not self.shared:
                raise
            self.shared = False  # what several depths need is not needed for one
            super()._check(model)

    def _unsupported(self, model: Any, reason: str) -> ValueError:
        use = "use horizon=2, or other heads: " if self.horizon > 2 and self.shared else "use other heads: "
        return ValueError(
            f"{type(model).__name__} has decoder layers that can't be those of MTP modules: {reason}; {use}{_CARRIED}."
        )

    def normed(self, h: int, z: Tensor, norm: Any) -> tuple[Tensor, Tensor]:  # [B, S, D], all
        """See `SequentialHeads.normed`: every module has a norm of its own."""
        own: Any = self.output_norms
        return super().normed(h, z, own[min(h, len(own)) - 1])


def _place(config: Any, layers: int, source: str) -> int:
    """Return the index of the model's last layer whose attention is that of the module.

    Raises:
        ValueError: there is none.
    """
    kinds = getattr(config, "layer_types", None)
    if not kinds:
        return layers - 1
    own = getattr(config, "mtp_layer_types", None)
    # Where the configuration does not say it: an indexer has tensors of its own, and a window has not.
    wanted = own or ["indexed_attention" if "indexed_attention" in kinds else "full_attention"]
    places = [i for i, kind in enumerate(kinds) if kind == wanted[0]]
    if not places or len(set(wanted)) > 1:
        raise ValueError(
            f"{source} has an MTP module with attention {', '.join(map(repr, sorted(set(wanted))))}, and the model's "
            f"layers have {', '.join(map(repr, sorted(set(kinds))))}; expected one kind that the model has; {_CARRIED}."
        )
    return places[-1]


@contextmanager
def _configured_as_module(config: Any, index: int) -> Iterator[None]:
    """Let a configuration describe the layer of an MTP module at a place of the model's, inside the block."""
    changed: dict[str, Any] = {}
    mlp, own = getattr(config, "mlp_layer_types", None), getattr(config, "mtp_mlp_layer_types", None)
    if mlp and own:
        changed["mlp_layer_types"] = [*mlp[:index], own[0], *mlp[index + 1 :]]
    if getattr(config, "first_k_dense_replace", None) is not None:
        changed["first_k_dense_replace"] = min(config.first_k_dense_replace, index)
    before = {name: getattr(config, name) for name in changed}
    try:
        for name, value in changed.items():
            setattr(config, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


def _no_module(model: Any, stored: StoredTensors) -> ValueError:
    source = stored.source or type(model).__name__
    if not stored.names:
        return ValueError(
            f"{source} has no MTP module; heads='native' trains the one that the files of a model have, which "
            "from_pretrained has loaded; expected such files, or heads='sequential', which makes a new one."
        )
    return ValueError(
        f"{source} has an MTP module in a layout that is not supported, {stored.names[0]} to {stored.names[-1]}; "
        f"expected one of {', '.join(map(repr, MODULE_LAYOUTS))}; {_CARRIED}."
    )


def _misfit(stored: StoredTensors, fault: str) -> ValueError:
    return ValueError(f"{stored.source} has an MTP module that does not fit the model: {fault}; {_CARRIED}.")
