"""``python -m benchmarks NAME …`` with one of the names below; without a name, the step."""

from __future__ import annotations

import sys
from importlib import import_module

NAMES = (
    *("step", "grid", "scaling", "ablation", "accuracy", "soundness"),
    *("peers", "zoo", "compiled", "pages"),
)


def main() -> None:
    named = len(sys.argv) > 1 and sys.argv[1] in NAMES
    name = sys.argv[1] if named else "step"
    import_module(f"benchmarks.{name}").main(sys.argv[2 if named else 1 :])


if __name__ == "__main__":
    main()
