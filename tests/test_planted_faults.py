"""The faults of scripts/plant_faults.py still name places of the program, each exactly one."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_fault_can_be_planted() -> None:
    faults = runpy.run_path(str(ROOT / "scripts" / "plant_faults.py"))["FAULTS"]
    assert len(faults) >= 30
    for fault in faults:
        text = (ROOT / "src" / "reasonrun" / fault.file).read_text("utf-8")
        assert text.count(fault.old) == 1, f"{fault.promise}, {fault.what}: {fault.file}"
        assert fault.new != fault.old
        for path in [word for word in fault.tests.split() if word.startswith("tests/")]:
            assert (ROOT / path.partition("::")[0]).is_file(), path
