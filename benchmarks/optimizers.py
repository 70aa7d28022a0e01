"""Race the optimizers against torch's fastest: ``python benchmarks/optimizers.py``. One step on four sets of parameters, in turns.

    GPT, 25M     the weights of a small GPT: 25 million numbers in 25 tensors       12 x 1M, 1000 x 1k, 10000 x 64     as they say
    step         the update alone                 tail     undo a loss scale, clip to norm 1, update, zero the gradients

Every opponent's result is compared with ours after one step, before the timed ones.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import dlkernels
from dlkernels.bench.timing import interleave
from dlkernels.report.data import geomean

GPT: list[tuple[int, ...]] = [(12564, 512), *[(512, 1536), (512, 512), (512, 2048), (2048, 512)] * 6]
SETS: dict[str, list[tuple[int, ...]]] = {
    "GPT, 25M": GPT, "12 x 1M": [(1 << 20,)] * 12, "1000 x 1k": [(1000,)] * 1000, "10000 x 64": [(64,)] * 10000,
}  # fmt: skip
MOMENTUM = {"lr": 1e-3, "momentum": 0.9}
OPTIMIZERS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {  # its arguments, and torch's variants of it
    "AdamW": ({}, ("fused", "default")), "Adam": ({}, ("fused",)), "SGD": (MOMENTUM, ("fused", "default")),
    "RMSprop": (MOMENTUM, ("foreach", "default")),
}  # fmt: skip
SCALE = 1024.0


def parameters(shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)
    return params


def native_tail(optimizer: torch.optim.Optimizer, params: list[Tensor]) -> Callable[[], object]:
    """torch's best way: the fused step divides by the scale, so gradients are clipped to a norm that is scaled too."""
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(SCALE), torch.tensor(0.0)  # type: ignore[attr-defined]

    def tail() -> None:
        torch.nn.utils.clip_grad_norm_(params, SCALE, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    return tail


def race(name: str, shapes: Sequence[tuple[int, ...]], tail: bool, seconds: float) -> dict[str, float]:
    """Seconds of a step by provider. Raises RuntimeError where results differ."""
    options, variants = OPTIMIZERS[name]
    params = {"dlkernels": parameters(shapes)}
    ours = getattr(dlkernels.optim, name)(params["dlkernels"], **options)
    calls: dict[str, Callable[[], object]] = {"dlkernels": ours.step}
    if tail:
        calls["dlkernels"] = lambda: ours.step(grad_scale=SCALE, max_norm=1.0, zero_grad=True)
    for variant in variants[:1] if tail else variants:
        params[variant] = parameters(shapes)
        optimizer = getattr(torch.optim, name)(params[variant], **options, **({} if variant == "default" else {variant: True}))
        calls[variant] = native_tail(optimizer, params[variant]) if tail else optimizer.step
    for call in calls.values():
        call()
    for variant in params:
        a, b = (torch.cat([p.detach().flatten() for p in params[which]]) for which in ("dlkernels", variant))
        if not torch.allclose(a, b, rtol=1e-5, atol=1e-6):
            raise RuntimeError(f"{name} ({variant}) and ours differ by {(a - b).abs().max():.2g}")
    return {provider: timing.median for provider, timing in interleave(calls, min_seconds=seconds, min_samples=11).items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Race the optimizers against torch's fastest.")
    parser.add_argument("--seconds", type=float, default=2.0, help="at least, for each race (default: %(default)s)")
    parser.add_argument("--sets", nargs="*", default=list(SETS), choices=list(SETS), help="default: all")
    given = parser.parse_args(arguments)
    jobs = [(name, False) for name in OPTIMIZERS] + [("AdamW", True)]
    for name, tail in jobs:
        title = f"{name:8s} {'tail' if tail else 'step'}"
        ratios: dict[str, list[float]] = {}
        for label in given.sets:
            found = race(name, SETS[label], tail, given.seconds)
            ours = found.pop("dlkernels")
            for variant, other in found.items():
                ratios.setdefault(variant, []).append(other / ours)
            others = "   ".join(f"torch {variant} {other * 1e3:8.2f} ms  {other / ours:5.2f}x" for variant, other in found.items())
            print(f"{title}  {label:11s} {ours * 1e3:8.2f} ms   {others}", flush=True)
        means = "   ".join(f"torch {variant} {geomean(r):.2f}x" for variant, r in ratios.items())
        print(f"{title}  geometric mean: {means}\n", flush=True)


if __name__ == "__main__":
    main()
