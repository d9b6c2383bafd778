"""ranks.py beside this file, as a module."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="session")
def ranks_file() -> ModuleType:
    """ranks.py as a module."""
    spec = importlib.util.spec_from_file_location("ranks", HERE / "ranks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
