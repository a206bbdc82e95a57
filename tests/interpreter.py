"""Triton's interpreter without two things that it does for nothing here, two fifths of its time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

__all__ = ["quicken"]


def quicken() -> None:
    """Each call of a function in a kernel looks at all of ``triton.language`` again, to put the
    interpreter's functions where they are already; and each sum and product of two integers is
    computed once more to see whether it has 32 bits, which it has at the sizes of the tests."""
    options = getattr(interpreter.interpreter_builder, "options", None)
    if getattr(options, "sanitize_overflow", False):
        interpreter.interpreter_builder.options = replace(options, sanitize_overflow=False)
    patch, scope = interpreter._patch_lang, getattr(interpreter, "_LangPatchScope", None)
    if scope is None:  # an older one
        return

    def patch_once(function: Any) -> Any:
        langs = [lang for lang in function.__globals__.values() if lang is tl or lang is tl.core]
        if langs and not any(tl.core.is_builtin(lang.load) for lang in langs):
            return scope()
        return patch(function)

    interpreter._patch_lang = patch_once
