"""Files of models, read as transformers and PEFT read them, without leaving a parameter out.

    model         config.json, model.safetensors or shards with an index
    adapters      adapter_config.json, adapter_model.safetensors; those of a name in a folder of that name
    checkpoint    one of the two, mtp_heads.*, optimizer and schedule, and trainer_state.json, which is written last

The files of a mixture hold one tensor per expert, those of a vision-language model other names than its modules, so
that `load_state_dict` finds few of them: only `from_pretrained` of the model's own class converts them.
"""

from __future__ import annotations

import json
import re
import warnings
from functools import reduce
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.utils import cached_file

from mtp_ce.heads.kinds import CONFIG_FILE
from mtp_ce.heads.protocol import check_materialized
from mtp_ce.hf.causal import causal_model
from mtp_ce.hf.saved_heads import HUB_OPTIONS, SavedHeads

ADAPTER_CONFIG, ADAPTER_TENSORS = "adapter_config.json", "adapter_model"
STATE = "trainer_state.json"
_FOLDER = re.compile(r"checkpoint-(\d+)")


def load_model(source: str | Path, *, trainable: bool, trust_remote_code: bool = False, **options: Any) -> Any:
    """Load a causal language model of the class that its configuration names, with its adapters of PEFT.

    Args:
        source: the folder, or a name on the hub.
        trainable: whether adapters are trained further.
        trust_remote_code: run Python code from the model's files, if its class is not one of transformers.
        **options: for `from_pretrained` of the model's class.

    Returns:
        The model; a `PeftModel` where there are adapters.

    Raises:
        ValueError: a parameter is missing or is not the model's, the adapters name no base model, or the model needs
            code that may not run.
    """
    hub = {name: options[name] for name in HUB_OPTIONS if name in options}
    adapters = _adapters_of(source, hub)
    if not adapters:
        return _load_base(source, trust_remote_code, options)
    try:
        from peft import PeftConfig, get_peft_model
    except ImportError:
        raise ImportError(f"{source} has adapters, which PEFT reads; pip install 'mtp_ce[adapters]'") from None
    model: Any = None
    for name, (folder, where) in adapters.items():
        config = PeftConfig.from_pretrained(str(folder), **where)
        config.inference_mode = not trainable
        if model is None:
            base = _base_of_adapters(source, config, hub, trust_remote_code, options)
            model = get_peft_model(base, config, name)
        else:
            model.add_adapter(name, config)
        if trainable and (left_out := parameters_beside_adapters(model)):
            raise ValueError(f"{source} has adapters that can't be trained further: {left_out}")
        _read_adapter(model, folder, name, where)
    return model


def _base_of_adapters(
    source: str | Path, adapters: Any, hub: dict[str, Any], trust_remote_code: bool, options: dict[str, Any]
) -> Any:
    """Load the model beside the adapters, or else the one that they name."""
    if _located(source, "config.json", hub) is not None:
        return _load_base(source, trust_remote_code, options)
    if not adapters.base_model_name_or_path:
        raise ValueError(
            f"{source} has adapters of a model that was never saved: {ADAPTER_CONFIG} has no base_model_name_or_path. "
            "PeftModel.from_pretrained(model, folder) puts them on the model, and "
            "MTPWrapper.with_saved_heads(model, folder) the heads on both."
        )
    elsewhere = {name: x for name, x in options.items() if name not in ("revision", "subfolder")}
    if adapters.revision is not None:
        elsewhere["revision"] = adapters.revision
    return _load_base(adapters.base_model_name_or_path, trust_remote_code, elsewhere)


def load_into(model: Any, folder: Path) -> None:
    """Load the files of a checkpoint into the model that is trained.

    Args:
        model: with its adapters, which are all that is read where it has any.
        folder: the checkpoint.

    Raises:
        ValueError: a parameter is missing, is not the model's or has another shape, or the model has no values.
    """
    causal = causal_model(model)
    check_materialized(causal)
    if hasattr(model, "peft_config"):
        if left_out := parameters_beside_adapters(model):
            raise ValueError(f"{folder} has the adapters of a model that trains more than those: {left_out}")
        for name in model.peft_config:
            _read_adapter(model, folder if name == "default" else folder / name, name, {})
        return
    if getattr(causal, "is_quantized", False):  # not trained, and loaded as it was before
        return
    # Nothing is rounded on the way: the files are read in a dtype that holds all of the model's.
    dtype = reduce(torch.promote_types, {x.dtype for x in causal.state_dict().values() if x.is_floating_point()})
    saved = _whole(type(causal), folder, False, config=causal.config, dtype=dtype)
    causal.load_state_dict(saved.state_dict())


def parameters_beside_adapters(model: Any) -> str | None:
    """Return a sentence that names a parameter that is trained and that PEFT does not write; None where there is none.

    Args:
        model: any model, with or without adapters.
    """
    adapters = getattr(model, "peft_config", ())
    for name, x in model.named_parameters():
        # P-tuning, and prefix tuning with a projection.
        if name.startswith("prompt_encoder.") and not name.endswith(".embedding.weight") and x.requires_grad:
            return (
                f"{name} is trained, and PEFT writes only the virtual tokens that it computes; they can be used with "
                "trunk='frozen' or 'detached'."
            )
    trained = {
        name: x
        for name, x in model.named_parameters()
        if adapters and x.requires_grad and not any(f".{adapter}" in name for adapter in adapters)
    }
    if not trained:
        return None
    from peft.utils import get_peft_model_state_dict

    written = {x.data_ptr() for name in adapters for x in get_peft_model_state_dict(model, adapter_name=name).values()}
    name = next((name for name, x in trained.items() if x.data_ptr() not in written), None)
    if name is None:
        return None
    return f"{name} is trained, and PEFT does not write it; expected its module among modules_to_save of the adapters."


def _load_base(source: str | Path, trust_remote_code: bool, options: dict[str, Any]) -> Any:
    hub = {name: options[name] for name in HUB_OPTIONS if name in options}
    try:
        config = options.get("config")
        if config is None:
            config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code, **hub)
        return _whole(_class_of(config, trust_remote_code), source, trust_remote_code, **options)
    except ValueError as error:
        if "does not fit" in str(error):
            advice = (
                "MTPWrapper.with_saved_heads(model, folder) puts the heads on a model that is loaded in another way"
            )
            raise ValueError(f"{error}; {advice}.") from error
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{source} needs Python code from its own files, which is not run. Read it; then load the model with "
            "transformers and trust_remote_code=True, and wrap it: MTPWrapper(model, horizon)."
        ) from None


def _class_of(config: Any, trust_remote_code: bool) -> Any:
    """Return the class that wrote the files: AutoModelForCausalLM has none for most vision-language models."""
    own = getattr(config, "auto_map", None) or {}
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if trust_remote_code and auto.__name__ in own:
            return auto
    for name in config.architectures or ():
        named: Any = getattr(transformers, name, None)
        # A configuration may name a class without output embeddings, on which transformers puts new ones.
        known = isinstance(named, type) and issubclass(named, PreTrainedModel) and named.can_generate()
        if known and named.config_class is type(config):
            return named
    return AutoModelForCausalLM


def _whole(kind: Any, source: str | Path, trust_remote_code: bool, **options: Any) -> Any:
    """Load a model, and check that the files hold its parameters and no others."""
    ignores = options.pop("ignore_mismatched_sizes", False)
    options.update(output_loading_info=True, ignore_mismatched_sizes=True)
    try:
        model, report = kind.from_pretrained(source, trust_remote_code=trust_remote_code, **options)
    except RuntimeError as error:
        if "conversion of the weights" not in str(error):
            raise
        raise ValueError(
            f"{source} does not fit {kind.__name__}: tensors that are parts of one parameter are missing or have other "
            "shapes, and are named in transformers' log"
        ) from error
    wrong = [f"{name} is missing" for name in sorted(report["missing_keys"])]
    wrong += [f"{name} is not the model's" for name in sorted(report["unexpected_keys"])]
    wrong += [
        f"{name} is {list(theirs)}; expected {list(ours)}"
        for name, theirs, ours in sorted(report["mismatched_keys"])
        if not ignores
    ]
    _refuse(source, type(model).__name__, wrong)
    return model


def _refuse(source: str | Path, model: str, wrong: list[str]) -> None:
    if wrong:
        more = f", and {len(wrong) - 1} more like it" if len(wrong) > 1 else ""
        raise ValueError(f"{source} does not fit {model}: {wrong[0]}{more}")


def _located(source: str | Path, name: str, hub: dict[str, Any]) -> str | None:
    path: str | None = cached_file(source, name, _raise_exceptions_for_missing_entries=False, **hub)
    return path


def _adapters_of(source: str | Path, hub: dict[str, Any]) -> dict[str, tuple[str | Path, dict[str, Any]]]:
    """Return where each adapter is, by its name: PEFT writes "default" beside the heads, others into folders."""
    found: dict[str, tuple[str | Path, dict[str, Any]]] = {}
    if _located(source, ADAPTER_CONFIG, hub) is not None:
        found["default"] = source, hub
    elif _located(source, "config.json", hub) is not None:
        return {}
    folder = Path(source, hub.get("subfolder") or "")
    # A folder with heads is a wrapper of its own, such as a checkpoint in the output directory.
    inner = (path.parent for path in sorted(folder.glob(f"*/{ADAPTER_CONFIG}")))
    return found | {path.name: (path, {}) for path in inner if not (path / CONFIG_FILE).exists()}


def _read_adapter(model: Any, folder: str | Path, name: str, hub: dict[str, Any]) -> None:
    """Read one adapter into a model that has it, and check that what PEFT would write now is what it read."""
    from peft.utils import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

    saved: dict[str, Tensor] = load_peft_weights(str(folder), device="cpu", **hub)
    if not hasattr(model, "get_base_model"):
        # transformers put the adapters into the model itself, and writes them under the names of PEFT's wrapper.
        saved = {key.removeprefix("base_model.model."): x for key, x in saved.items()}
    current = get_peft_model_state_dict(model, adapter_name=name)
    wrong = [f"{key} is missing" for key in sorted(current.keys() - saved.keys())]
    wrong += [f"{key} is not the model's" for key in sorted(saved.keys() - current.keys())]
    wrong += [
        f"{key} is {list(saved[key].shape)}; expected {list(x.shape)}"
        for key, x in sorted(current.items())
        if key in saved and saved[key].shape != x.shape
    ]
    _refuse(folder, f"the model's adapter {name!r}", wrong)
    set_peft_model_state_dict(model, dict(saved), adapter_name=name)  # PEFT 0.20 removes what it renames
    current = get_peft_model_state_dict(model, adapter_name=name)
    wrong = [f"{key} was not read" for key, x in current.items() if not torch.equal(x, saved[key].to(x))]
    _refuse(folder, f"the model's adapter {name!r}", wrong)


def checkpoint_to_resume(requested: str | bool | None, output_dir: str | None, *, sharded: bool) -> str | None:
    """Return the checkpoint from which a training resumes; None where it starts anew.

    Args:
        requested: `resume_from_checkpoint`: a folder, or True for the newest complete checkpoint.
        output_dir: where the checkpoints are.
        sharded: whether the checkpoints are FSDP's or DeepSpeed's, with files of their own.

    Raises:
        ValueError: the folder is no complete checkpoint, or there is none.
    """
    if requested is None or requested is False:
        return None
    if requested is not True:
        if fault := _fault(Path(requested), sharded):
            raise ValueError(
                f"{requested} is no complete checkpoint: {fault}. resume_from_checkpoint=True resumes from the newest "
                "complete one in output_dir; a saved wrapper without a training loads with MTPWrapper.from_pretrained."
            )
        return str(requested)
    folders = Path(output_dir or ".").glob("*/")
    steps = {int(match[1]): path for path in folders if (match := _FOLDER.fullmatch(path.name))}
    for _, path in sorted(steps.items(), reverse=True):
        fault = _fault(path, sharded)
        if fault is None:
            return str(path)
        warnings.warn(f"{path} is no complete checkpoint, and is passed over: {fault}.", stacklevel=3)
    raise ValueError(
        f"resume_from_checkpoint is True, and output_dir {output_dir} has no complete checkpoint; expected one, or "
        "resume_from_checkpoint=None to begin a training."
    )


def _fault(folder: Path, sharded: bool) -> str | None:
    """Return what a checkpoint lacks, as one that was being written when its process was killed; None if nothing."""
    try:
        if not isinstance(json.loads((folder / STATE).read_bytes()), dict):
            return f"{STATE} is damaged"
        if sharded:
            return None
        SavedHeads.beside(folder)
        files = _tensor_files(folder)
    except FileNotFoundError as error:
        return str(error) if error.filename is None else f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    if not files:
        return "it has neither model.safetensors nor adapters"
    return next(
        (f"{path.name} is damaged or missing" for path in (*files, *folder.glob("*.pt")) if _broken(path)), None
    )


def _tensor_files(folder: Path) -> list[Path]:
    """Return the files of a model's or its adapters' tensors, those that an index names included."""
    names = (
        f"{stem}{suffix}" for stem in ("model", "pytorch_model", ADAPTER_TENSORS) for suffix in (".safetensors", ".bin")
    )
    found = [folder / name for name in names if (folder / name).exists()]
    for index in folder.glob("*.index.json"):
        found += sorted({folder / name for name in json.loads(index.read_bytes())["weight_map"].values()})
    return found + [path.parent / f"{ADAPTER_TENSORS}.safetensors" for path in folder.glob(f"*/{ADAPTER_CONFIG}")]


def _broken(path: Path) -> bool:
    if path.suffix != ".safetensors":
        return not is_zipfile(path)
    try:
        with safe_open(path, framework="pt"):  # reads the header, and compares it with the size of the file
            return False
    except (OSError, SafetensorError):
        return True
