"""What the command lines of the benchmarks have in common."""

from __future__ import annotations

import argparse
import time

import torch

from .measure import Clock

__all__ = ["add_timing", "clock_of", "parser_of"]


def parser_of(command: str, says: str | None) -> argparse.ArgumentParser:
    """Of ``python -m benchmarks`` with that word; what it says is the module's own docstring."""
    return argparse.ArgumentParser(
        prog=f"python -m benchmarks {command}".rstrip(),
        description=says,
        formatter_class=argparse.RawTextHelpFormatter,
    )


def add_timing(parser: argparse.ArgumentParser, each: str, processor_time: bool = False) -> None:
    """How steps are timed; ``each``: what is waited for, one after another."""
    parser.add_argument("--threads", type=int, help="default: PyTorch's")
    if processor_time:
        parser.add_argument(
            "--processor-time",
            action="store_true",
            help="one thread, by its processor time: for a machine that is never quiet",
        )
    parser.add_argument(
        "--wait",
        type=float,
        default=0,
        help=f"seconds to wait, {each}, for a quiet machine",
    )


def clock_of(options: argparse.Namespace) -> Clock:
    """Sets the number of threads, and returns what to time with."""
    if options.threads:
        torch.set_num_threads(options.threads)
    if getattr(options, "processor_time", False):
        torch.set_num_threads(1)
        return time.process_time
    return time.perf_counter
