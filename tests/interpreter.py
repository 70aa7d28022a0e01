"""Importing this takes out of Triton's interpreter half of its time, which goes into nothing; what it computes stays the same in every bit.

When a kernel starts, and at every call of a function inside it, the interpreter replaces the functions of ``triton.language`` by its own,
and puts the old ones back at the end; in a process where every kernel is interpreted they may stay. And around sums and products of
integers it computes whether they overflow, for an assertion that exists in its debug mode alone.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from triton.runtime import interpreter

_replace_language = interpreter._patch_lang
_seen: set[Any] = set()


def _replace_language_once(function: Any) -> Any:
    """Returns what would put the old functions back: nothing."""
    if function not in _seen:
        _seen.add(function)
        _replace_language(function)
    return interpreter._LangPatchScope()


interpreter._patch_lang = _replace_language_once
if not interpreter.interpreter_builder.options.debug:
    interpreter.interpreter_builder.options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
