"""`eval-mtp`: evaluate the heads of a checkpoint on held-out text and in speculative decoding.

As in `train-mtp`, errors that need no model to detect are reported before torch is loaded: one line on stderr, exit
code 2.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from mtp_ce.training.cli.command import (
    EXIT_CRASH,
    EXIT_DONE,
    EXIT_INTERRUPTED,
    EXIT_USAGE,
    Parser,
    file_argument,
    folder_argument,
    missing_packages,
    output_folder,
    sort_out,
    system_reason,
)
from mtp_ce.training.cli.output import unfailing_output
from mtp_ce.training.errors import RecipeError

_EPILOG = """\
a checkpoint is a run directory, its model folder, another folder or GGUF file, package:NAME/FILE, an s3:// address, or
a hub name. The recipe of a run names the held-out text; for other checkpoints the defaults of --print-config hold.

examples:
  eval-mtp runs/first
  eval-mtp runs/first validation.rows=16 validation.decoding.new_tokens=128
  eval-mtp runs/first --prompts my/prompts.jsonl validation.decoding.draft_tokens=2
  eval-mtp HuggingFaceTB/SmolLM2-135M data.corpus=my/texts data.suffix=.txt tracking.kind=none --output here

exit codes:
  0 success   1 crash   2 error in the command line, nothing was measured   130 Ctrl-C
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        argv: the arguments without the program's name; None takes them from the process.
    """
    with unfailing_output():
        try:
            return _main(argv)
        except KeyboardInterrupt:
            return _complain("interrupted", EXIT_INTERRUPTED)


def _main(argv: Sequence[str] | None) -> int:
    arguments = _parser().parse_intermixed_args(argv)
    if missing := missing_packages():
        return _complain(missing, EXIT_USAGE)
    from mtp_ce.training.config.recipe import load_evaluation, to_yaml
    from mtp_ce.training.data.prompts import read_prompts
    from mtp_ce.training.data.reader import find_corpus
    from mtp_ce.training.models.sources import find_checkpoint
    from mtp_ce.training.tracking.tracker import build_tracker

    try:
        checkpoints, overrides = sort_out(arguments.what)
        if len(checkpoints) != 1:
            raise RecipeError(f"expected one checkpoint and overrides a.b=c, got {len(checkpoints)} checkpoints")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise RecipeError("eval-mtp runs in one process; start it without a launcher")
        source, beside = find_checkpoint(checkpoints[0])
        recipe = load_evaluation(beside, overrides)
        if arguments.print_config:
            print(to_yaml(recipe), end="")
            return EXIT_DONE
        build_tracker(recipe.tracking)
        output = output_folder("eval", arguments.output)
        find_corpus(recipe.data)
        prompts = read_prompts(arguments.prompts) if arguments.prompts else None
        # Torch and transformers load here, after all cheap checks.
        from mtp_ce.training.run.evaluate import evaluate

        evaluate(source, recipe, output, prompts=prompts)
    except RecipeError as error:
        return _complain(str(error), EXIT_USAGE)
    except Exception as error:
        if reason := system_reason(error, arguments.output or Path("runs")):
            return _complain(reason, EXIT_CRASH)
        raise
    return EXIT_DONE


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="eval-mtp",
        usage="eval-mtp CHECKPOINT [a.b=c ...] [--prompts FILE] [--print-config] [--output DIR]",
        description="Measure every prediction head of a checkpoint: cross entropy, accuracy, speculative decoding, and "
        "the acceptance that a serving engine will count.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "what",
        nargs="*",
        metavar="CHECKPOINT | a.b=c",
        help="the checkpoint, and overrides of data, validation, tracking and device with YAML values",
    )
    parser.add_argument(
        "--prompts",
        type=file_argument,
        metavar="FILE",
        help="prompts to decode in place of held-out text: JSON lines with prompt, messages or prompt_token_ids, and a "
        "domain if you like",
    )
    parser.add_argument(
        "--print-config",
        action="store_true",
        help="print the evaluation recipe with every default and override, as YAML",
    )
    parser.add_argument(
        "--output",
        type=folder_argument,
        metavar="DIR",
        help="folder for evaluation.json and evaluation.png; must not exist (default: runs/eval-<UTC time>)",
    )
    return parser


def _complain(message: str, code: int) -> int:
    print(f"eval-mtp: {'error: ' if code != EXIT_INTERRUPTED else ''}{message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
