"""Triton's interpreter without the half of its time that it spends on nothing; what it computes stays the same in every bit.

It replaces the functions of ``triton.language`` by its own when a kernel starts, which is needed, and again at every call of a function
inside, which is needed once per kernel. And around every sum and product of integers it computes whether they overflow, for an assertion
that exists in its debug mode alone.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from triton.runtime import interpreter


def make_lean() -> None:
    builder, patch = interpreter.interpreter_builder, interpreter._patch_lang
    inside: set[Any] = set()
    if not builder.options.debug:
        builder.options = replace(builder.options, sanitize_overflow=False)

    class Executor(interpreter.GridExecutor):
        """Runs the programs of one start of a kernel."""

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            inside.clear()
            return super().__call__(*args, **kwargs)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        """A function called by a kernel."""
        if self.fn not in inside:
            patch(self.fn)
            inside.add(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.GridExecutor, interpreter.InterpretedFunction.__call__ = Executor, call
