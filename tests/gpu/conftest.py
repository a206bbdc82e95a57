"""What must be set before the first product on a device."""

from __future__ import annotations

import os

# The tests poison uninitialised memory, which PyTorch does in its deterministic mode alone, and
# there cuBLAS refuses to work without this.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
