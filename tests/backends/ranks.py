"""What runs in ranks differ by from those in one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.processes import torchrun


def differences(folder: Path, options: dict[str, Any], *names: str, ranks: int = 2) -> dict[str, dict[str, Any]]:
    """What `cases.py` finds: how much runs in ranks differ from those in one process."""
    out = folder / "differences.json"
    ran = torchrun(Path(__file__).with_name("cases.py"), json.dumps(options), str(out), *names, ranks=ranks)
    assert ran.returncode == 0, ran.stderr[-6000:]
    return json.loads(out.read_text())
