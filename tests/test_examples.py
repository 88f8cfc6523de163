"""The examples run as their docstrings say; each checks its own number."""

from __future__ import annotations

import doctest
import importlib
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import kerastorch

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
MODULES = [name for _, name, _ in pkgutil.walk_packages(kerastorch.__path__, "kerastorch.")]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(path, tmp_path):
    # Small networks: a second thread only waits.
    environment = os.environ | {"MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, path], check=True, timeout=120, cwd=tmp_path, env=environment)
    assert (tmp_path / f"{path.stem}.png").stat().st_size > 1000


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_docstrings_are_true(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0
