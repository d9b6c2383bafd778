"""The house: what may import what, what a wheel holds, and that words in the tree point at something."""

import ast
import os
import re
import subprocess
import sys
import zipfile
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = {
    "kernels": {"torch", "triton", "mtp_ce.kernels", "mtp_ce.options"},
    # safetensors comes with the extra `train`; only saving heads asks for it, in a function.
    "mtp_ce": {"torch", "triton", "jaxtyping", "safetensors", "mtp_ce"},
}
# What works on models of transformers; loaded when it is first asked for.
OF_TRANSFORMERS = {
    f"mtp_ce/{name}.py"
    for name in (
        *("hf/arguments", "hf/causal", "hf/checkpoint", "hf/files", "hf/output", "hf/saved_heads", "hf/trainer"),
        *("hf/trainer_arguments", "hf/wrapper", "decoding/speculative", "serving/carried"),
        *("heads/modules/conversion", "serving/mimo"),
    )
}
CLASS_PATH = re.compile(r"mtp_ce(\.\w+)+:\w+")

# Package -> the packages that it may import, over the floor's own packages and top-level modules.
ARROWS = {
    "training": {
        "cli": {"run", "models", "data", "tracking", "storage", "config", "interrupt", "errors", "addresses"},
        "run": {
            *("loop", "report", "critic", "metrics", "models", "data", "tracking", "storage", "config"),
            *("console", "interrupt", "errors"),
        },
        "loop": {"metrics", "models", "data", "storage", "config", "interrupt", "errors"},
        "report": {"metrics", "console"},
        "critic": {"models", "data", "config", "interrupt", "errors"},
        "metrics": {"data"},
        "models": {"storage", "config", "errors"},
        "data": {"storage", "config", "errors"},
        "tracking": {"config", "errors", "addresses"},
        "config": {"storage", "errors", "addresses"},
        "storage": {"errors", "addresses"},
        "interrupt": {"errors"},
        "console": {"errors", "addresses"},
        "errors": {"addresses"},
        "addresses": set(),
    },
    # `loss` stands for the modules of the public functions and what they are made of.
    "mtp_ce": {
        "hf": {"heads", "decoding", "serving", "scorers", "loss", "ops", "options", "registry"},
        "decoding": {"heads", "loss", "registry"},
        "serving": {"heads", "loss", "registry"},
        "heads": {"loss", "ops", "options", "registry"},
        "scorers": {"loss", "options", "registry"},
        "loss": {"ops", "kernels", "options"},
        "ops": {"kernels", "options"},
        "kernels": {"options"},
        "options": set(),
        "registry": set(),
    },
}
LOSS_MODULES = {"loss", "linear", "checks", "reference", "unembedding", "next_token", "vocabulary"}


def sources(folder: str) -> list[Path]:
    """Python files of a folder, not through the links to the other floors."""
    return [path for path in (ROOT / folder).rglob("*.py") if not any(part.is_symlink() for part in path.parents)]


def statements(path: Path) -> list[tuple[int, str]]:
    """Line and module of every import statement of a file: at the top, lazy, or for type checkers alone."""
    imported = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides its floor"
            imported += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Constant) and CLASS_PATH.fullmatch(str(node.value)):
            # A table of parts imports them by name.
            imported.append((node.lineno, str(node.value).replace(":", ".")))
    return imported


def imports(path: Path) -> set[str]:
    """Modules that a file imports from outside the standard library, wherever the statement stands."""
    return {name for _, name in statements(path) if name.partition(".")[0] not in sys.stdlib_module_names}


@pytest.mark.parametrize("floor", FLOORS)
def test_imports_point_down(floor):
    files = sources(floor)
    assert files
    for path in files:
        for name in imports(path):
            more = {"transformers", "peft"} if path.relative_to(ROOT).as_posix() in OF_TRANSFORMERS else set()
            roots = FLOORS[floor] | more
            allowed = any(name == root or name.startswith(root + ".") for root in roots)
            upward = floor == "mtp_ce" and (name + ".").startswith("mtp_ce.training.")
            assert allowed > upward, f"{path.relative_to(ROOT)} imports {name}"


def package(floor: str, name: str) -> str | None:
    """The package or top-level module of a floor that a dotted name lies in; None for names outside the floor."""
    prefix = "mtp_ce.training." if floor == "training" else "mtp_ce."
    first = name.removeprefix(prefix).partition(".")[0]
    if not name.startswith(prefix) or (floor == "mtp_ce" and first == "training"):
        return None
    return "loss" if floor == "mtp_ce" and first in LOSS_MODULES else first


@pytest.mark.parametrize("floor", ARROWS)
def test_packages_import_along_the_listed_arrows(floor):
    """Lazy imports, those under TYPE_CHECKING and class paths in tables count like any other."""
    arrows = ARROWS[floor]
    files = [ROOT / "mtp_ce" / path.relative_to(ROOT) for path in sources("training")]
    if floor == "mtp_ce":
        files = [ROOT / "mtp_ce" / path.relative_to(ROOT) for path in sources("kernels")]
        # The package's own __init__ exports every floor above.
        files += [path for path in sources("mtp_ce") if path != ROOT / "mtp_ce" / "__init__.py"]
    offences = []
    for path in files:
        importer = package(floor, ".".join(path.relative_to(ROOT).with_suffix("").parts))
        assert importer in arrows, f"{path.relative_to(ROOT)} lies in a package without a list of arrows"
        for line, name in statements(path):
            imported = package(floor, name)
            if imported not in (None, importer, *arrows[importer]):
                offences.append(f"{path.relative_to(ROOT)}:{line} imports {name}: {importer} -> {imported}")
    assert not offences, "\n".join(offences)


@pytest.mark.parametrize("floor", ARROWS)
def test_the_arrows_make_no_cycle(floor):
    # A cycle raises CycleError, which names its packages.
    order = [*TopologicalSorter(ARROWS[floor]).static_order()]
    assert sorted(order) == sorted(ARROWS[floor])


def test_importing_the_library_loads_no_training_package():
    program = (
        "import sys; from mtp_ce import weighted_mtp_ce, WeightedMTPLoss, MTPHeads, UniformScorer; print(*sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    # torch._dynamo takes as long as torch itself, and only torch.compile needs it.
    heavy = {"transformers", "datasets", "mlflow", "boto3", "accelerate", "pydantic", "torch._dynamo", "sympy"}
    assert not heavy & set(run.stdout.split())


def test_public_names_resolve_and_no_others_exist():
    import mtp_ce

    for name in mtp_ce.__all__:
        assert getattr(mtp_ce, name).__module__.startswith("mtp_ce.")
    with pytest.raises(AttributeError, match="no attribute 'weight'"):
        _ = mtp_ce.weight


@pytest.mark.parametrize("folder", ["kernels", "training"])
def test_top_level_folders_shadow_no_other_distribution(folder):
    assert not (ROOT / folder / "__init__.py").exists()
    assert (ROOT / "mtp_ce" / folder).is_symlink()


def test_transformers_imports_its_own_kernels_package_beside_ours():
    """From the repository root, where a bare folder `kernels` lies first on sys.path."""
    program = (
        # The operators register their FLOPs with torch's counter, a file of its own.
        "import sys, kernels, transformers, mtp_ce, torch.utils.flop_counter\n"
        "from transformers import LlamaForCausalLM\n"
        "print(kernels.__file__); before = set(sys.modules); mtp_ce.MTPWrapper\n"
        "print({name.partition('.')[0] for name in set(sys.modules) - before})"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    file, more = run.stdout.splitlines()
    assert "site-packages" in file
    assert more == "{'mtp_ce'}", "the wrapper imports nothing that a model of transformers does not"


def test_the_wheel_has_one_top_level_name_and_holds_every_module(tmp_path):
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    # A copy, so that no build folder of an earlier layout leaks into the wheel or out of it.
    for name in [*tracked]:
        source, target = ROOT / name, tmp_path / "tree" / name
        if source.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(os.readlink(source)) if source.is_symlink() else target.write_bytes(source.read_bytes())
    build = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        tmp_path / "dist",
        tmp_path / "tree",
    ]
    run = subprocess.run(build, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert {name.partition("/")[0] for name in held} == {"mtp_ce"}
    for folder in ("kernels", "training"):
        modules = {f"mtp_ce/{name}" for name in tracked if re.fullmatch(rf"{folder}/.*\.(py|yaml)", name)}
        assert modules
        assert modules <= held
    assert "mtp_ce/py.typed" in held


def test_paths_named_in_sources_and_docs_exist():
    """A path in a docstring, comment or page that points nowhere misleads its reader."""
    pattern = re.compile(r"\b(?:kernels|mtp_ce|training|tests|benchmarks|docs)/[\w./-]*\.(?:py|md|yaml|sh|json)\b")
    texts = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
    for folder in ("kernels", "mtp_ce", "training", "tests", "benchmarks"):
        texts += sources(folder)
    missing = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in texts
        for name in pattern.findall(path.read_text())
        if path != Path(__file__) and not (ROOT / name).exists()
    }
    assert not missing


def test_no_call_that_loads_from_files_may_run_code_in_them():
    """transformers asks on stdin where `trust_remote_code` is left out. MTPWrapper and MTPHeads default to False."""
    ours = {"MTPWrapper", "MTPHeads", "PeftConfig"}  # PEFT reads a file of JSON
    calls, offences = 0, []
    for path in [*sources("mtp_ce"), *sources("training")]:
        for function in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(function, ast.Call) and isinstance(function.func, ast.Attribute)):
                continue
            owner = function.func.value
            if function.func.attr not in ("from_pretrained", "from_config") or getattr(owner, "id", "") in ours:
                continue
            calls += 1
            said = [ast.unparse(keyword.value) for keyword in function.keywords if keyword.arg == "trust_remote_code"]
            # The argument of MTPWrapper.from_pretrained.
            if said != ["False"] and (said, path.name) != (["trust_remote_code"], "checkpoint.py"):
                offences.append(f"{path.relative_to(ROOT)}:{function.lineno}")
    assert calls > 10
    assert not offences, offences
    from inspect import signature

    from mtp_ce import MTPWrapper

    assert signature(MTPWrapper.from_pretrained).parameters["trust_remote_code"].default is False
