"""Bad and unusual arguments of batch normalisation: what torch returns or raises, and nothing changed by a refused call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import isolated
from test_batch_norm import PAIRS, outcome
from torch import Tensor

import dlkernels
import dlkernels.functional as F


def ones(*shape: int, **options: Any) -> Tensor:
    return torch.ones(shape, **options)


C4 = (ones(4), ones(4))
BAD: dict[str, tuple[Any, ...]] = {
    "one value per channel": (ones(1, 4), *C4, None, None, True),
    "one value per channel, 4-D": (ones(1, 4, 1, 1), *C4, None, None, True),
    "no numbers": (ones(0, 4), *C4, ones(4), ones(4), True),
    "no positions": (ones(3, 4, 0), *C4, ones(4), ones(4), True),
    "no numbers in eval": (ones(0, 4), *C4),
    "no channels": (ones(3, 0), ones(0), ones(0), None, None, True),
    "no channels but weights": (ones(3, 0), ones(0), ones(0), ones(0), ones(0), True),
    "0-D": (ones(), ones(1), ones(1)),
    "0-D in training": (ones(), ones(1), ones(1), None, None, True),
    "1-D": (ones(4), *C4),
    "6-D": (torch.arange(96.0).view(2, 3, 2, 2, 2, 2), ones(3), ones(3), None, None, True),
    "running_mean longer": (ones(3, 4), ones(5), ones(4)),
    "running_var shorter": (ones(3, 4), ones(4), ones(3), None, None, True),
    "weight longer": (ones(3, 4), *C4, ones(5)),
    "bias shorter": (ones(3, 4), *C4, ones(4), ones(3), True),
    "weight 2-D": (ones(3, 4), *C4, ones(2, 2)),
    "statistics missing in eval": (ones(3, 4), None, None),
    "running_var missing": (ones(3, 4), ones(4), None, None, None, True),
    "running_mean missing": (ones(3, 4), None, ones(4), None, None, True),
    "running_var missing in eval": (ones(3, 4), ones(4), None),
    "eps 0 in training": (ones(3, 4), *C4, None, None, True, 0.1, 0.0),
    "eps 0 in eval": (ones(3, 4), *C4, None, None, False, 0.1, 0.0),
    "eps negative": (ones(3, 4), *C4, None, None, False, 0.1, -1.0),
    "momentum None": (ones(3, 4), *C4, None, None, True, None),
    "int64": (ones(3, 4, dtype=torch.int64), *C4),
    "weight float64": (ones(3, 4), *C4, ones(4, dtype=torch.float64)),
    "bias bfloat16": (ones(3, 4), *C4, None, ones(4, dtype=torch.bfloat16)),
    "half with mixed parameters": (ones(3, 4).half(), *C4, ones(4).half(), ones(4), True),
    "half weight, float statistics": (ones(3, 4).bfloat16(), *C4, ones(4).bfloat16(), None, True),
    "input None": (None, *C4),
    "input a list": ([[1.0]], *C4),
    "running_mean a list": (ones(3, 4), [1.0] * 4, ones(4)),
    "weight a number": (ones(3, 4), *C4, 1.0),
    "running_mean requires grad": (ones(3, 4), ones(4, requires_grad=True), ones(4), None, None, True),
    "running_mean requires grad in eval": (ones(3, 4), ones(4, requires_grad=True), ones(4)),
    "sparse": (ones(3, 4).to_sparse(), *C4),
    "meta": (ones(3, 4, device="meta"), *(t.to("meta") for t in C4), None, None, True),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_and_unusual_arguments(case: str) -> None:
    """The result of torch or its kind of exception; a refused call leaves the running statistics alone."""
    found = []
    for function in PAIRS["batch_norm"]:
        args = [arg.clone() if isinstance(arg, Tensor) and arg.is_leaf and not arg.requires_grad else arg for arg in BAD[case]]
        found.append(outcome(function, *args))
        if isinstance(found[-1], Exception):
            kept = [(a, b) for a, b in zip(args[1:3], BAD[case][1:3], strict=True) if isinstance(a, Tensor)]
            assert all(torch.equal(a, b) for a, b in kept)
    ours, theirs = found
    if isinstance(theirs, Exception):
        assert type(ours) is type(theirs) and str(ours).strip(), f"torch raises {theirs!r}, ours {ours!r}"
    else:
        assert not isinstance(ours, Exception), f"torch returns, ours raises {ours!r}"
        assert (ours.shape, ours.dtype, ours.device) == (theirs.shape, theirs.dtype, theirs.device)
        if theirs.device.type != "meta":
            torch.testing.assert_close(ours, theirs)


def test_messages_name_the_argument() -> None:
    words_of = {"running_mean longer": "running_mean", "weight longer": "weight", "bias bfloat16": "bias has dtype torch.bfloat16"}
    for case, words in words_of.items():
        with pytest.raises(RuntimeError, match=words):
            F.batch_norm(*BAD[case])
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        F.batch_norm(*BAD["one value per channel"])


def test_explain() -> None:
    assert dlkernels.explain("batch_norm", ones(3, 4), None, None, True).implementation != "reference"
    assert dlkernels.explain("batch_norm", ones(2, 4, 1, 1, 1, 1), None, None, True).implementation == "reference"


@isolated
def test_raw_ops_refuse_spoiled_arguments() -> None:
    """torch.ops.dlkernels.batch_norm_* without the Python in front: every argument of wrong size, rank, dtype or layout raises."""
    ops = torch.ops.dlkernels
    x, dy, channel, stats = torch.randn(5, 6, 2, 3), torch.randn(5, 6, 2, 3), torch.ones(6), torch.ones(3, 6)
    calls: list[tuple[Any, list[Any]]] = [
        (ops.batch_norm_train, [x, channel, channel, channel.clone(), channel.clone(), 0.1, 1e-5, True]),
        (ops.batch_norm_eval, [x, channel, channel, channel, channel, 1e-5, False]),
        (ops.batch_norm_backward, [dy, x, channel, channel, stats, True, 1e-5, True, True, True, True]),
    ]
    for op, args in calls:
        op(*args)
        for i, arg in enumerate(args):
            if not isinstance(arg, Tensor):
                continue
            wrong = [arg[:, :-1] if arg.dim() > 1 else arg[:-1], torch.cat([arg, arg], -1), arg.flatten()[None, None]]
            wrong += [torch.ones(()), torch.ones(0)]
            wrong += [arg.to(dtype) for dtype in (torch.float64, torch.bfloat16, torch.int64, torch.complex64)] + [arg.to_sparse()]
            for spoiled in wrong:
                if i == 0 and op is not ops.batch_norm_backward and (spoiled.shape == (5, 6, 2, 6) or spoiled.dtype == torch.bfloat16):
                    continue  # nothing fixes the number of positions, and float32 may stand beside a half type
                try:
                    op(*args[:i], spoiled, *args[i + 1 :])
                except (RuntimeError, TypeError, NotImplementedError):
                    continue
                raise AssertionError(f"{op} argument {i} {spoiled.dtype} {tuple(spoiled.shape)} {spoiled.layout} {spoiled.device}")
