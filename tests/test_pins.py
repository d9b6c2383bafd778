"""The pinned environment of `uv run`, and both ends of the package's own ranges."""

import os
import runpy
import shutil
import subprocess
import tomllib
import warnings
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PINS = runpy.run_path(str(ROOT / "scripts" / "pins.py"))
TEXT = (ROOT / "pyproject.toml").read_text()
pins, direct_dependencies, without_pins = PINS["pins"](TEXT), PINS["direct_dependencies"], PINS["without_pins"]


def uv(folder: Path, *arguments: str, timeout: float) -> subprocess.CompletedProcess[str]:
    """Run uv on the project in `folder`, whose environment is its own."""
    environment = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "TRITON_INTERPRET")}
    return subprocess.run(
        ["uv", *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout
    )


def test_every_direct_dependency_is_pinned_inside_its_range():
    requirements = direct_dependencies(TEXT)
    assert {requirement.name.lower() for requirement in requirements} <= pins.keys()
    for requirement in requirements:
        assert requirement.specifier.contains(pins[requirement.name.lower()]), requirement


def test_removing_the_pins_changes_nothing_else():
    tables = tomllib.loads(TEXT)
    assert tables["tool"]["uv"].pop("constraint-dependencies")
    assert tomllib.loads(without_pins(TEXT)) == tables


@pytest.mark.skipif(shutil.which("uv") is None, reason="uv is not installed")
def test_pins_older_than_what_the_ranges_allow_are_reported(tmp_path):
    """A warning, never a failure: whether to move the pins is decided by who runs the tests with newer versions."""
    (tmp_path / "pyproject.toml").write_text(without_pins(TEXT))
    for name in ("README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    try:
        run = uv(tmp_path, "lock", timeout=120)
        reason = run.stderr.strip().splitlines()[-1] if run.returncode else None
    except subprocess.TimeoutExpired:
        reason = "no answer in 120 s"
    if reason is not None:
        warnings.warn(f"the pins were not compared with the registry: uv lock: {reason}", stacklevel=1)
        return
    newest: dict[str, Version] = {}
    for package in tomllib.loads((tmp_path / "uv.lock").read_text())["package"]:
        name, version = canonicalize_name(package["name"]), Version(package["version"])
        newest[name] = max(version, newest.get(name, version))
    older = [
        f"{name} {version} < {newest[canonicalize_name(name)]}"
        for name, version in pins.items()
        if Version(version) < newest.get(canonicalize_name(name), Version(version))
    ]
    if older:
        warnings.warn(f"pins older than what the ranges allow: {', '.join(older)}", stacklevel=1)


@pytest.mark.slow
def test_the_library_passes_at_the_lowest_versions_of_its_ranges(tmp_path):
    """In a copy of the project, whose environment stands beside it."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.rstrip("\0").split("\0"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tmp_path / name, follow_symlinks=False)
    (tmp_path / "pyproject.toml").write_text(without_pins(TEXT))
    lowest = ("run", "--isolated", "--resolution", "lowest-direct")
    # The paths of the library only, so the number of workers is not chosen by tests/conftest.py.
    tests = ("pytest", "-q", "-n", "auto", "--dist", "loadfile", "tests/mtp_ce", "tests/kernels")
    run = uv(tmp_path, *lowest, *tests, timeout=3600)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
