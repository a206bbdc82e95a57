"""The kernels compile for a device that is not here, and without spilling.

A quick part of the table that ``make kernels`` prints in full.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")


def _report(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "monokernel.backends.triton.compile_report", *arguments],
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")
def test_the_shipped_configurations_compile() -> None:
    report = _report("--quick")
    assert report.returncode == 0, report.stdout + report.stderr
    assert "network_backward" in report.stdout
    assert "pairs_down" in report.stdout
    assert "every kernel passes" in report.stdout
