"""`export-mtp`: write a part of a trained checkpoint as a folder that other programs load.

The parts are the layouts of mtp_ce/serving/layouts.py, each described in its own file. As in `train-mtp`, errors that
need no model to detect are reported before torch is loaded: one line on stderr, exit code 2.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from mtp_ce.heads.kinds import CONFIG_FILE, KINDS, TENSORS_FILE
from mtp_ce.heads.saved import check_tensors, read_config
from mtp_ce.registry import load_class
from mtp_ce.serving.layouts import LAYOUTS, PATHS, Serving
from mtp_ce.training.addresses import shown
from mtp_ce.training.cli.command import (
    EXIT_CRASH,
    EXIT_DONE,
    EXIT_INTERRUPTED,
    EXIT_USAGE,
    Parser,
    missing_packages,
    system_reason,
)
from mtp_ce.training.cli.output import unfailing_output
from mtp_ce.training.errors import RecipeError
from mtp_ce.training.storage.atomic import whole_folder
from mtp_ce.training.storage.paths import user_path

if TYPE_CHECKING:
    from mtp_ce.hf.wrapper import MTPWrapper

# As training/storage/s3.py has it, which imports pydantic.
_S3 = "s3://"
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")

_EPILOG = """\
parts:
{parts}

examples:
  export-mtp runs/first base served/model
  export-mtp runs/first medusa served/medusa
  export-mtp runs/second mimo served/mimo
  export-mtp runs/first base s3://bucket/models/first
  vllm serve served/model --speculative-config \\
    '{{"method": "medusa", "model": "served/medusa", "num_speculative_tokens": 3}}'

exit codes:
  0 success   1 crash   2 error in the command line, nothing was written   130 Ctrl-C
"""


class ExportError(ValueError):
    """A user error; the message is one line."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        argv: the arguments without the program's name; None takes them from the process.
    """
    with unfailing_output():
        return _main(argv)


def _main(argv: Sequence[str] | None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        print(_export(arguments.checkpoint, arguments.part, arguments.folder))
    except ExportError as error:
        print(f"export-mtp: error: {shown(' '.join(str(error).split()))}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        print("export-mtp: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        if reason := system_reason(error, Path(arguments.folder)):
            print(f"export-mtp: error: {shown(reason)}", file=sys.stderr)
            return EXIT_CRASH
        raise
    return EXIT_DONE


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="export-mtp",
        description="Write a part of a checkpoint as a folder that other programs load.",
        epilog=_EPILOG.format(parts="\n".join(f"  {name:<8}  {layout.about}" for name, layout in LAYOUTS.items())),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="a run directory, or a folder written by MTPWrapper.save_pretrained, local or at an s3:// address",
    )
    parser.add_argument("part", choices=tuple(LAYOUTS), help="what to write")
    parser.add_argument("folder", metavar="DIR", help="output folder or s3:// address; must not exist")
    return parser


def _export(checkpoint: str, part: str, folder: str) -> str:
    source = _model_folder(_fetch(checkpoint))
    _check_heads(source, part)
    if folder.startswith(_S3):
        with _storage() as storage, tempfile.TemporaryDirectory(prefix="export-mtp.") as here:
            storage.check_free("DIR", folder)
            serving = _write_whole(source, part, Path(here) / "export")
            storage.upload_folder("DIR", Path(here) / "export", folder)
    else:
        folder = str(_path("DIR", folder))
        _check_new(Path(folder))
        serving = _write_whole(source, part, Path(folder))
    if serving is None:
        return f"{folder}: the {LAYOUTS[part].what} of {checkpoint}"
    return _served(checkpoint, folder, serving)


def _served(checkpoint: str, folder: str, serving: Serving) -> str:
    what = f"{folder}: the model of {checkpoint} with its heads as the MTP module."
    if serving.beside:
        what = f"{folder}: a draft model of the heads of {checkpoint}, for BASE of export-mtp {checkpoint} base BASE."
    return "\n".join(filter(None, [what, serving.note, *serving.commands(folder)]))


def _fetch(checkpoint: str) -> Path:
    if not checkpoint.startswith(_S3):
        return _path("CHECKPOINT", checkpoint)
    with _storage() as storage:
        return Path(storage.fetch_folder("CHECKPOINT", checkpoint))


def _path(argument: str, text: str) -> Path:
    try:
        return user_path(argument, text)
    except RecipeError as error:
        raise ExportError(str(error)) from None


@contextmanager
def _storage() -> Iterator[ModuleType]:
    """Yield the module that reads and writes S3; local exports need none of its packages."""
    if missing := missing_packages("boto3", "pydantic"):
        raise ExportError(missing)
    from mtp_ce.training.storage import folders as storage

    try:
        yield storage
    except RecipeError as error:
        raise ExportError(str(error)) from None


def _write_whole(source: Path, part: str, folder: Path) -> Serving | None:
    copied = LAYOUTS[part].copied
    wrapper = None if copied else _load(source)
    try:
        with whole_folder(folder, manifest=False) as aside:
            if wrapper is None:
                for name in copied:
                    shutil.copyfile(source / name, aside / name)
                return None
            return _write(wrapper, part, source, aside)
    except (FileExistsError, FileNotFoundError, ValueError) as error:
        raise ExportError(str(error)) from None


def _model_folder(checkpoint: Path) -> Path:
    written = "a folder that train-mtp or MTPWrapper.save_pretrained wrote"
    if not checkpoint.is_dir():
        raise ExportError(f"checkpoint {checkpoint} is not a folder; expected {written}")
    for folder in (checkpoint, checkpoint / "model"):
        if (folder / CONFIG_FILE).is_file():
            return folder
    raise ExportError(f"checkpoint {checkpoint} has no {CONFIG_FILE}, and no model/{CONFIG_FILE}; expected {written}")


def _check_heads(source: Path, part: str) -> None:
    """Check that `part` can be exported from the heads, as far as their configuration and files show."""
    try:
        heads = read_config(source / CONFIG_FILE)
    except (OSError, ValueError) as error:
        raise ExportError(str(error)) from None
    kind, horizon = heads.kind, heads.horizon
    # Heads of a class of your own are checked by the export function, once the class is loaded.
    supported = kind not in KINDS or part in KINDS[kind].layouts
    if LAYOUTS[part].of_heads and (not supported or horizon < 2):
        able = " or ".join(repr(name) for name, known in KINDS.items() if part in known.layouts)
        kept = KINDS[kind].layouts if kind in KINDS else ()
        unserved = f"; no serving engine runs {kind!r} heads" if kept == ("heads",) else ""
        made = "residual" if part in KINDS["residual"].layouts else "sequential model.mtp.shared=true"
        raise ExportError(
            f"{source} has {kind!r} heads with horizon {horizon}; {part} needs {able} heads and a horizon above 1, as "
            f"train-mtp model.mtp.kind={made} model.mtp.horizon=4 makes them{unserved}"
        )
    models = () if LAYOUTS[part].copied else (("config.json", "adapter_config.json"),)
    tensors = () if heads.in_model else ((TENSORS_FILE,),)
    for names in (*tensors, *models):
        if not any((source / name).is_file() for name in names):
            raise ExportError(f"{source} has {CONFIG_FILE} but no {names[0]}; the checkpoint is incomplete")
    if find_spec("safetensors") is None:
        return
    try:
        check_tensors(source / TENSORS_FILE, heads)
    except (OSError, ValueError) as error:
        raise ExportError(str(error)) from None


def _check_new(folder: Path) -> None:
    if folder.exists() or folder.is_symlink():
        raise ExportError(f"folder {folder} exists already; name another one")
    for parent in folder.parents:
        if parent.exists() and not parent.is_dir():
            raise ExportError(f"folder {folder} can't be created: {parent} is a file; name another one")


def _load(source: Path) -> MTPWrapper:
    packages = {"transformers": "'mtp_ce[train]'", "safetensors": "'mtp_ce[train]'"}
    if (source / "adapter_config.json").is_file():
        packages["peft"] = "peft"
    for name, cure in packages.items():
        if find_spec(name) is None:
            raise ExportError(f"exporting {source} needs {name}: pip install {cure}")
    # Torch and transformers load here, after all cheap checks.
    from transformers.utils import logging

    from mtp_ce.hf.wrapper import MTPWrapper

    logging.disable_progress_bar()
    try:
        wrapper = MTPWrapper.from_pretrained(source)
    except Exception as error:  # damaged files raise anything
        raise ExportError(f"{source} can't be loaded: {type(error).__name__}: {error}") from error
    # Nothing is trained here, so an MTP module that is carried over stays as it is marked in the checkpoint.
    wrapper.trunk = "detached"
    return wrapper


def _write(wrapper: MTPWrapper, part: str, source: Path, folder: Path) -> Serving | None:
    serving: Serving | None = load_class(part, PATHS, "part")(wrapper, folder)
    if LAYOUTS[part].tokenizer and any((source / name).is_file() for name in _TOKENIZER):
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(source, trust_remote_code=False).save_pretrained(folder)
    return serving


if __name__ == "__main__":
    sys.exit(main())
