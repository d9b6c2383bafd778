"""Every command of the documentation is run, or said to be run by something that the tree has."""

from __future__ import annotations

import gzip
import io
import json
import re
import shlex
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mtp_ce.training.cli import evaluate as eval_cli
from mtp_ce.training.cli import export as export_cli
from mtp_ce.training.cli import train as cli

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

# What makes a training of the default size one of a second. A page's own overrides stay, but for these keys.
SMALL = [
    f"data.corpus={sysconfig.get_path('stdlib')}/email", "data.holdout_fraction=0.2", "data.vocab_size=300",
    "data.sequence_length=32", "model.hidden_size=8", "model.intermediate_size=8",
    "model.layers=1", "model.attention_heads=2", "model.kv_heads=1", "train.steps=2", "train.device=cpu",
    "optimizer.warmup_steps=1", "validation.every=null", "validation.rows=4", "tracking.kind=none",
]  # fmt: skip
BRIEF = ["validation.rows=2", "validation.decoding={prompts: 1, prompt_tokens: 4, new_tokens: 4}", "tracking.kind=none"]


def parquet(rows: list[dict[str, str]]) -> bytes:
    """A table of rows as a file's bytes."""
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


# What commands read that stand in the folder where they are run, by name.
ROWS = [{"text": f"text {i}", "body": "a body", "question": "which? ", "answer": f"the {i}-th"} for i in range(200)]
CHAT = [{"role": "user", "content": "which?"}, {"role": "assistant", "content": "the first"}]
SHAREGPT = [{"from": "human", "value": "which?"}, {"from": "gpt", "value": "the first"}]
ALPACA = [{"instruction": f"Add {i}.", "input": "1", "output": str(i + 1)} for i in range(200)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
FILES = {
    "my_scorer.py": (ROOT / "docs" / "weights.md").read_bytes().partition(b"```python\n")[2].partition(b"```")[0],
    "my.yaml": (ROOT / "training" / "recipes" / "tiny.yaml").read_bytes(),
    "my/rows.jsonl": LINES,
    "my/pairs.jsonl": LINES,
    "my/deep/rows.jsonl.gz": gzip.compress(LINES),
    "my/table.csv": "".join(["text,body\n", *(f"{i},a body\n" for i in range(200))]).encode(),
    "my/alpaca.json": json.dumps(ALPACA).encode(),
    "my/chats.jsonl": json.dumps({"messages": CHAT}).encode(),
    "my/sharegpt.json": json.dumps([{"conversations": SHAREGPT}]).encode(),
    "my/chat_tokenizer/tokenizer.json": b"{}",
    "my/prompts.jsonl": b'{"prompt": "def parse(line):", "domain": "code"}\n{"prompt_token_ids": [1, 4, 29]}\n',
    **{f"my/{name}.parquet": parquet(ROWS) for name in ("a", "held_out")},
    **{f"my/texts/{i}.txt": row["text"].encode() for i, row in enumerate(ROWS)},
}

# Commands that something else runs: how they begin, the file that runs them, what it has to say.
ELSEWHERE = {
    "pip install uv": (".ci/run", "install --quiet uv"),
    "pip install .": ("tests/test_house.py", "test_the_wheel_has_one_top_level_name_and_holds_every_module"),
    "uv run pytest -m slow": ("tests/training/run/test_resume.py", "pytest.mark.slow"),
    "uv run pytest -m serving": ("tests/serving/test_vllm.py", "pytest.mark.serving"),
    "vllm serve": ("tests/serving/test_vllm.py", "test_the_printed_command_serves_over_http_what_eval_mtp_has_counted"),
    "uv run pytest": (".ci/run", "uv run pytest"),
    "uv run --group bench pytest benchmarks --benchmark-only": ("tests/test_benchmarks.py", "pytest"),
    "bash benchmarks/gpu_suite.sh": ("tests/test_benchmarks.py", "gpu_suite.sh"),
    "python -m benchmarks.report": ("tests/test_benchmark_report.py", 'load("report")'),
    "python scripts/planted_study.py": ("tests/training/run/test_planted_comparison.py", "planted_study"),
    "python -m benchmarks.predict": ("tests/test_predict.py", 'load("predict")'),
    "train-mtp smollm2 model.source=my/glm": (
        "tests/training/run/test_carried_module.py",
        "test_a_run_trains_the_module_of_its_source",
    ),
    "train-mtp --resume s3://": ("tests/training/run/test_resume.py", "test_a_run_goes_on_from_s3"),
    "sbatch docs/train.sbatch": ("tests/training/run/test_launch.py", "train.sbatch"),
    "python examples/finetune.py": ("tests/test_examples.py", "finetune"),
    "python examples/chat.py": ("tests/test_examples.py", 'load("chat")'),
    "eval-mtp HuggingFaceTB/": ("tests/training/models/test_sources.py", '"somebody/model"'),
    "export-mtp runs/second mimo": ("tests/training/cli/test_export_cli.py", '"mimo"'),
    "export-mtp runs/third deepseek": ("tests/training/cli/test_export_cli.py", '"deepseek"'),
    "export-mtp runs/first base s3://": ("tests/training/storage/test_storage_settings.py", "export-mtp"),
}


# Pages whose commands a test of their own runs: all of them, with the objects and the settings that they need.
PAGES_ELSEWHERE = {"s3.md": ("tests/training/storage/test_storage_settings.py", "test_every_command_of_the_page")}


@dataclass(frozen=True)
class Command:
    """A line of a page, with the variables that are set for it."""

    page: str
    line: str
    words: tuple[str, ...]
    environment: tuple[tuple[str, str], ...]


def blocks(text: str) -> list[str]:
    return re.findall(r"^```(?:bash|sh|shell|console)\b[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(page: str, text: str) -> Iterator[Command]:
    """Each command of the blocks; `A=b command` and `export A=b` are variables, those of a block go on in it."""
    for block in blocks(text):
        exported: dict[str, str] = {}
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words:
                end = next((i for i, word in enumerate(words) if word in ("&&", "|", ";", "&", ">", ">>")), len(words))
                # What a pipe or a file takes is what the command before it printed.
                rest = words[end + 1 :] if end < len(words) and words[end] in ("&&", ";") else []
                words, given = words[:end], dict(exported)
                if words[:1] == ["export"]:
                    exported |= dict(word.split("=", 1) for word in words[1:])
                    words = []
                while words and re.match(r"[A-Za-z_]\w*=", words[0]):
                    given |= [words[0].split("=", 1)]
                    words = words[1:]
                if words:
                    yield Command(page, line.strip(), tuple(words), tuple(given.items()))
                words = rest


def examples() -> Iterator[Command]:
    """Each example of --help: a command, two spaces, what it does."""
    for module in (cli, eval_cli, export_cli):
        for line in module._EPILOG.splitlines():
            if re.match(r"  (train|eval|export)-mtp\b", line):
                yield Command("--help", line.strip(), tuple(shlex.split(line.strip().split("  ")[0])), ())


def all_commands() -> list[Command]:
    pages = [page for page in PAGES if page.name not in PAGES_ELSEWHERE]
    found = [command for page in pages for command in commands(page.name, page.read_text(encoding="utf-8"))]
    found += examples()
    # One that several pages show is run once.
    return list({(command.words, command.environment): command for command in reversed(found)}.values())[::-1]


@pytest.fixture(scope="session")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tokenizers and stages made here don't mix with the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def finished(caches: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny run, which stands for every run that a page names."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert cli.main(["tiny", *SMALL, *BRIEF, "--output", str(folder)]) == 0
    return folder


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An S3 of our own."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    names = {"ENDPOINT_URL": f"http://{host}:{port}", "DEFAULT_REGION": "us-east-1"}
    for name, value in {**names, "ACCESS_KEY_ID": "testing", "SECRET_ACCESS_KEY": "testing"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    yield names["ENDPOINT_URL"]
    server.stop()


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caches: None) -> Path:
    """A folder with nothing but what the pages name."""
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def exit_code(main, words: list[str]) -> int:
    try:
        return main(words)
    except SystemExit as exit:
        return int(exit.code or 0)


def train(words: list[str]) -> int:
    """As it stands where it only prints; else as far as a dry run, which reads and sizes all that is named."""
    return exit_code(cli.main, words if {"--dry-run", "--print-config", "--help"} & {*words} else [*words, "--dry-run"])


def evaluate(words: list[str]) -> int:
    # An override that comes later wins.
    return exit_code(eval_cli.main, [*words, *BRIEF])


def several(words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """The launcher's own parser reads its options; what it starts is run as the first of as many ranks."""
    if words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        options = get_args_parser().parse_args(words[1:])
        ranks = int(options.nproc_per_node) * int(str(options.nnodes).split(":")[-1])
        started = [options.training_script, *options.training_script_args]
    else:
        from accelerate.commands.launch import launch_command_parser

        options = launch_command_parser().parse_args(words[2:])
        ranks = options.num_processes or 1
        started = [options.training_script, *options.training_script_args]
    for name, value in {"WORLD_SIZE": ranks, "RANK": 0, "LOCAL_RANK": 0}.items():
        monkeypatch.setenv(name, str(value))
    program = Path(started[0]).name
    assert program == "train-mtp" or program == "cli.py" or "-m" in words or "--module" in words
    return train(started[1:])


def parsed_by_mlflow(words: list[str]) -> int:
    """Its own parser reads every option before it shows the help."""
    from click.testing import CliRunner
    from mlflow.cli import cli as mlflow

    return CliRunner().invoke(mlflow, [*words[1:], "--help"]).exit_code


def put_objects(command: Command, endpoint: str) -> None:
    """Something below every address in S3 that a command names."""
    import boto3

    client = boto3.client("s3", endpoint_url=endpoint)
    for bucket, key in re.findall(r"s3://([\w.-]+)/?([\w./-]*)", command.line):
        client.create_bucket(Bucket=bucket)
        for name in (key, f"{key.rstrip('/')}/config.json"):
            client.put_object(Bucket=bucket, Key=name or "object", Body=b"{}")


def named_runs(words: list[str]) -> set[str]:
    """The runs that a command reads; --output names one that it makes."""
    made = dict(pairwise(words)).get("--output")
    named = {value for word in words for value in (word, word.partition("=")[2])}
    return {value for value in named if value.startswith("runs/") and value != made}


@pytest.mark.parametrize("command", all_commands(), ids=lambda command: f"{command.page}: {' '.join(command.words)}")
def test_a_command_of_the_documentation_works(command, workplace, monkeypatch, request):
    for name, value in command.environment:
        monkeypatch.setenv(name, value)
        if name == "PYTHONPATH":
            monkeypatch.syspath_prepend(value)
    words = list(command.words)
    if words[:2] == ["uv", "run"] and words[2] in ("train-mtp", "eval-mtp", "export-mtp", "mlflow", "torchrun"):
        words = words[2:]
    if "s3://" in command.line:
        put_objects(command, request.getfixturevalue("s3"))
    for run in named_runs(words):
        (workplace / run).parent.mkdir(parents=True, exist_ok=True)
        (workplace / run).symlink_to(request.getfixturevalue("finished"), target_is_directory=True)
    file, says = next((found for start, found in ELSEWHERE.items() if " ".join(words).startswith(start)), (None, None))
    match words[0]:
        case "train-mtp" if not file:
            assert train(words[1:]) == 0
        case "eval-mtp" if not file:
            assert evaluate(words[1:]) == 0
        case "export-mtp" if not file:
            assert exit_code(export_cli.main, words[1:]) == 0
        case "torchrun" | "accelerate":
            assert several(words, monkeypatch) == 0
        case "mlflow":
            assert parsed_by_mlflow(words) == 0
        case _:
            assert file, f"{command.page} shows '{command.line}', which no test runs"
            assert says in (ROOT / file).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES_ELSEWHERE)
def test_a_page_with_a_test_of_its_own_has_it(page):
    file, test = PAGES_ELSEWHERE[page]
    says = (ROOT / file).read_text(encoding="utf-8")
    assert f'"{page}"' in says
    assert f"def {test}" in says


def test_the_lines_of_a_block_are_read_as_a_shell_reads_them():
    block = "export A=1 B=2\nC=3 one 'a b' \\\n  --x  # why\npip install x && two | three > four\n"
    page = f"```bash\n{block}```\nwords\n```\nno command\n```\n"
    found = [(command.words, dict(command.environment)) for command in commands("page", page)]
    exported = {"A": "1", "B": "2"}
    assert found == [
        (("one", "a b", "--x"), {**exported, "C": "3"}),
        (("pip", "install", "x"), exported),
        (("two",), exported),
    ]
