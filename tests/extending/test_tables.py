"""The tables of trackers and readers: every class that they name exists, and naming one loads nothing heavy."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys
from mtp_ce.registry import load_class
from mtp_ce.training.data.reader import READERS
from mtp_ce.training.tracking.tracker import TRACKERS

for table in (READERS, TRACKERS):
    for name in table:
        load_class(name, table, "name")
print(*sorted({"torch", "transformers", "datasets", "pyarrow", "mlflow", "boto3"} & sys.modules.keys()))
"""


def test_every_class_of_the_tables_loads_without_torch():
    """The command line builds a tracker and a reader before it imports torch, so that a mistake costs a second."""
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "\n", "")
