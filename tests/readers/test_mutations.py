"""A few of the damaged files that benchmarks/mutations.py makes by the thousand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "mutations.py"


@pytest.mark.skipif(sys.platform == "win32", reason="memory and alarms are watched in the way of POSIX")
def test_damaged_files_do_no_harm() -> None:
    command = [sys.executable, str(SCRIPT), "--count", "400", "--seed", "7", "--jobs", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=SCRIPT.parents[1])
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("400 damaged files: ")
    assert "inspected" in done.stdout
