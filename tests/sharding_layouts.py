"""Cases of sharding_worker.py: functions in every layout that their arguments may have, and what compares them.

A case compares functions of DTensors with the same functions of the whole plain tensors, which every process has.
Longer than other files, since it is one list, with a case for every function.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from support import as_tuple, differentiable
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

import dlkernels.functional as F

CASES: dict[str, Callable[[DeviceMesh], None]] = {}
WHOLE = Replicate()


def case(function: Callable[[DeviceMesh], None]) -> Callable[[DeviceMesh], None]:
    CASES[function.__name__] = function
    return function


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def whole(t: Any) -> Any:
    return t.full_tensor() if isinstance(t, DTensor) else t


def spread(mesh: DeviceMesh, t: Any, placement: Placement = WHOLE) -> Any:
    return distribute_tensor(t.detach(), mesh, [placement]).requires_grad_(t.is_floating_point()) if isinstance(t, Tensor) else t


def compare(
    mesh: DeviceMesh, function: Callable[..., Any], args: Sequence[Any], placements: Sequence[Placement], outputs: Placement | None = None
) -> Any:
    """Values and gradients of ``function`` on arguments laid out so are those of the whole ones; the DTensors that it returns."""
    leaves = [t.detach().clone().requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t for t in args]
    shards = [spread(mesh, t, p) for t, p in zip(args, placements, strict=True)]
    wanted, found = as_tuple(function(*leaves)), as_tuple(function(*shards))
    assert len(wanted) == len(found)
    dys = [torch.randn(y.shape, generator=torch.Generator().manual_seed(i), dtype=y.dtype) for i, y in enumerate(wanted)]
    for y, right in zip(found, wanted):
        assert outputs is None or y.placements == (outputs,), y.placements
        assert y.shape == right.shape
        torch.testing.assert_close(whole(y), right, rtol=1e-10, atol=1e-13, equal_nan=True)
    torch.autograd.backward(wanted, dys)
    lying = [p if p.is_shard() and not p.is_partial() else WHOLE for p in (y.placements[0] for y in found)]
    torch.autograd.backward(found, [distribute_tensor(dy, mesh, [p]) for dy, p in zip(dys, lying)])
    for i in differentiable(tuple(args)):
        assert (shards[i].grad is None) == (leaves[i].grad is None), f"the gradient of argument {i} is there in one of two cases"
        if leaves[i].grad is not None:
            torch.testing.assert_close(whole(shards[i].grad), leaves[i].grad, rtol=1e-10, atol=1e-13, equal_nan=True)
    return found


def refused(call: Callable[[], Any], *words: str, kinds: Any = (RuntimeError, ValueError, TypeError)) -> None:
    try:
        call()
    except kinds as error:
        assert all(word in str(error) for word in words), f"{error!r} does not speak of {words}"
    else:
        raise AssertionError(f"nothing was raised; {words} should have been spoken of")


@case
def linear_columns(mesh: DeviceMesh) -> None:
    x, weight, bias = randn(2, 3, 7), randn(5, 7), randn(5)
    for activation in ("none", "relu", "gelu"):
        act = functools.partial(F.linear_act, activation=activation)
        compare(mesh, act, (x, weight, bias), (WHOLE, Shard(0), Shard(0)), Shard(2))
        compare(mesh, act, (x, weight, bias), (WHOLE, Shard(0), WHOLE), Shard(2))
        compare(mesh, act, (x, weight, None), (WHOLE, Shard(0), WHOLE), Shard(2))


@case
def linear_sum_over_K(mesh: DeviceMesh) -> None:
    x, weight, bias = randn(2, 3, 7), randn(5, 7), randn(5)
    compare(mesh, F.linear, (x, weight, bias), (Shard(2), Shard(1), WHOLE), Partial())
    compare(mesh, F.linear, (x, weight, None), (Shard(2), Shard(1), WHOLE), Partial())
    compare(mesh, F.linear, (x, weight, bias), (WHOLE, Shard(1), WHOLE), Partial())
    for activation in ("relu", "gelu", "tanh"):
        compare(mesh, functools.partial(F.linear_act, activation=activation), (x, weight, bias), (Shard(2), Shard(1), WHOLE), WHOLE)


@case
def any_placements(mesh: DeviceMesh) -> None:
    """Layouts that fit no rule are changed; the result is right all the same."""
    x, weight, bias = randn(4, 6), randn(6, 6), randn(6)
    for first in (WHOLE, Shard(0), Shard(1)):
        for second in (WHOLE, Shard(0), Shard(1)):
            for third in (WHOLE, Shard(0)):
                compare(mesh, F.linear, (x, weight, bias), (first, second, third))
                compare(mesh, F.linear_relu, (x, weight, bias), (first, second, third))
                compare(mesh, lambda x, w, b: F.layer_norm(x, (6,), w[0], b), (x, weight, bias), (first, second, third))
                compare(mesh, lambda x, t, b: F.cross_entropy(x, t.softmax(1), b.detach()), (x, weight[:4], bias), (first, second, third))
                compare(mesh, lambda x, t, b: F.mse_loss(x + b, t), (x, weight[:4], bias), (first, second, third))
    compare(mesh, lambda x, w: F.gelu(F.linear(x, w)), (x, weight), (Shard(1), Shard(1)), WHOLE)  # of a Partial


@case
def attention(mesh: DeviceMesh) -> None:
    q, k, v, shared, mask = randn(3, 4, 5, 6), randn(3, 4, 7, 6), randn(3, 4, 7, 2), randn(1, 4, 5, 7), randn(3, 1, 5, 7)
    call = F.scaled_dot_product_attention
    for d in (0, 1):
        compare(mesh, call, (q, k, v), [Shard(d)] * 3, Shard(d))
        compare(mesh, functools.partial(call, is_causal=True), (q, k, v), [Shard(d)] * 3, Shard(d))
        compare(mesh, call, (q, k, v, mask), [Shard(d)] * 3 + [WHOLE if d else Shard(0)], Shard(d))
        compare(mesh, call, (q, k, v, shared), [Shard(d)] * 3 + [Shard(1) if d else WHOLE], Shard(d))
    compare(mesh, call, (q, k, v), [Shard(2), WHOLE, WHOLE])
    compare(mesh, functools.partial(call, enable_gqa=True), (q, k[:, :2], v[:, :2]), [WHOLE] * 3, WHOLE)
    part = call(*(spread(mesh, t, Shard(0)) for t in (q, k, v)), dropout_p=0.5)
    assert part.placements == (Shard(0),) and not torch.equal(part.full_tensor(), call(q, k, v))
    refused(lambda: call(spread(mesh, q), k, v), "scaled_dot_product_attention", "key is a plain Tensor")


@case
def attention_variants(mesh: DeviceMesh) -> None:
    """Slopes are cut with the heads, or are the same in every process; packed sequences are cut by heads alone."""
    q, k, v, slopes, starts = randn(3, 4, 5, 6), randn(3, 4, 7, 6), randn(3, 4, 7, 2), randn(4), torch.tensor([0, 2, 2, 5])

    def dense(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
        return F.attention(q, k, v, alibi_slopes=slopes.detach(), causal=True, softcap=2.0)

    def packed(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
        return F.varlen_attention(q, k, v, starts, starts, alibi_slopes=slopes.detach(), window_size=(2, 0))

    for d, cut in ((0, WHOLE), (1, Shard(0)), (1, WHOLE)):
        compare(mesh, dense, (q, k, v, slopes), [*[Shard(d)] * 3, cut], Shard(d))
    tokens = randn(5, 4, 6), randn(5, 4, 6), randn(5, 4, 2)
    for d in (0, 1):
        compare(mesh, packed, (*tokens, slopes), [*[Shard(d)] * 3, Shard(0)], Shard(1) if d else None)
        compare(mesh, lambda q, k, v: packed(q, k, v, slopes), tokens, [Shard(d)] * 3)
    part = F.varlen_attention(*(spread(mesh, t, Shard(1)) for t in tokens), starts, starts, None, None, 0.5)
    assert part.placements == (Shard(1),)


@case
def rope(mesh: DeviceMesh) -> None:
    x, shared, own = randn(4, 2, 5, 6), (randn(5, 3), randn(5, 3)), (randn(4, 5, 2), randn(4, 5, 2))
    for d in (0, 1, 2):
        for angles in (shared, own):
            compare(mesh, lambda x, angles=angles: F.rope(x, *(t.detach() for t in angles)), (x,), (Shard(d),), Shard(d))
    compare(mesh, lambda x, *angles: F.rope(x, *(t.detach() for t in angles), True), (x, *own), (Shard(0), Shard(0), Shard(0)), Shard(0))


@case
def qkv_projection(mesh: DeviceMesh) -> None:
    """Cut by rows, or parameters by heads, where they are shared out evenly."""
    x, own, shared = randn(4, 5, 6), (randn(4, 5, 2), randn(4, 5, 2)), (randn(5, 2), randn(5, 2))
    parameters = randn(16, 6), randn(8, 6), randn(8, 6), randn(16), randn(8), randn(8)

    def qkv(x: Tensor, *others: Any, head_dim: int = 4, cos: Any = shared[0], sin: Any = shared[1]) -> Any:
        return F.qkv_projection(x, *others, head_dim=head_dim, cos=cos.detach(), sin=sin.detach())

    def with_tables(x: Tensor, cos: Tensor, sin: Tensor, *others: Tensor) -> Any:
        return qkv(x, *others, cos=cos, sin=sin)

    for cut, out in ((Shard(0), Shard(0)), (Shard(1), Shard(2))):
        compare(mesh, qkv, (x, *parameters), (cut, *[WHOLE] * 6), out)
        compare(mesh, with_tables, (x, *own, *parameters), (cut, cut, cut, *[WHOLE] * 6), out)
    compare(mesh, qkv, (x, *parameters), (WHOLE, *[Shard(0)] * 6), Shard(1))
    compare(mesh, functools.partial(qkv, head_dim=8), (x, *parameters), (WHOLE, *[Shard(0)] * 6))  # one head of keys


@case
def embedding(mesh: DeviceMesh) -> None:
    weight, indices = randn(7, 5), torch.tensor([[1, 2, 1], [6, 1, 0], [3, 1, 1]])
    for by_freq in (False, True):
        call = functools.partial(F.embedding, padding_idx=2, scale_grad_by_freq=by_freq)
        compare(mesh, call, (indices, weight), (WHOLE, Shard(1)), Shard(2))
        compare(mesh, call, (indices, weight), (Shard(0), WHOLE), WHOLE if by_freq else Shard(0))
        compare(mesh, call, (indices, weight), (WHOLE, Shard(0)))
    options: list[dict[str, Any]] = [{"sparse": True}, {"max_norm": 1.0}]
    for option in options:
        refused(functools.partial(F.embedding, spread(mesh, indices), spread(mesh, weight), **option), "embedding", *option)
    refused(lambda: F.embedding(spread(mesh, indices + 7), spread(mesh, weight)), "out of range", kinds=IndexError)


@case
def batch_norm(mesh: DeviceMesh) -> None:
    x, numbers = randn(5, 3, 2), [randn(3), randn(3).square() + 1, randn(3), randn(3)]

    def call(training: bool, function: Any = F.batch_norm) -> Any:
        return lambda x, mean, var, weight, bias: function(x, mean.detach(), var.detach(), weight, bias, training)

    for function in (F.batch_norm, F.batch_norm_relu):
        compare(mesh, call(False, function), (x, *numbers), (Shard(0), *[WHOLE] * 4), Shard(0))
        compare(mesh, call(False, function), (x, *numbers), (Shard(2), *[WHOLE] * 4), Shard(2))
        for training in (False, True):
            compare(mesh, call(training, function), (x, *numbers), (Shard(1), *[Shard(0)] * 4), Shard(1))
    right, found = [t.clone() for t in numbers], {WHOLE: x, Shard(0): x, Shard(1): x}
    F.batch_norm(x, *right, True)
    for placement in found:
        spreads = [spread(mesh, t.clone(), Shard(0) if placement == Shard(1) else WHOLE).detach() for t in numbers]
        before = [t._version for t in spreads[:2]]
        F.batch_norm(spread(mesh, x, placement), *spreads, True)
        for t, wanted in zip(spreads, right):
            torch.testing.assert_close(t.full_tensor(), wanted, rtol=1e-12, atol=1e-13)
        assert all(t._version > version for t, version in zip(spreads, before))
    sums = [DTensor.from_local(t, mesh, [Partial()]) for t in numbers[:2]]
    refused(lambda: F.batch_norm(spread(mesh, x), *sums, training=True), "batch_norm", "running_mean", kinds=NotImplementedError)


@case
def pooling(mesh: DeviceMesh) -> None:
    """Planes are shared out by batch or by channels, also where a process gets none; cut planes are gathered."""
    functions = (
        lambda x: F.max_pool2d(x, 3, 2, 1), lambda x: F.avg_pool2d(x, 2), lambda x: F.adaptive_max_pool2d(x, 2),
        lambda x: F.adaptive_avg_pool2d(x, (None, 2)), lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
    )  # fmt: skip
    for function in functions:
        for shape in ((3, 2, 5, 4), (1, 3, 4, 4), (2, 1, 4, 4), (3, 5, 4)):
            x = randn(*shape)
            for d in range(len(shape)):
                compare(mesh, function, (x,), (Shard(d),), Shard(d) if d < len(shape) - 2 else None)
    x = randn(3, 2, 5, 4)
    found, wanted = F.max_pool2d(spread(mesh, x, Shard(1)), 2, return_indices=True)[1], F.max_pool2d(x, 2, return_indices=True)[1]
    assert found.placements == (Shard(1),) and torch.equal(found.full_tensor(), wanted)
    refused(lambda: F.max_pool2d(spread(mesh, x, Shard(0)), 7), "too small")


@case
def losses_of_labels(mesh: DeviceMesh) -> None:
    """Rows that cannot be shared out evenly, one process without a label that counts, and weights."""
    for M in (1, 2, 5):
        x, head, class_weight = randn(M, 6), randn(4, 6), randn(4).square()
        labels = torch.tensor([3, 1, 0, 0, 0])[:M]
        for reduction in ("none", "mean", "sum"):
            out = {"none": Shard(0)}.get(reduction, Partial())
            for weight in (None, class_weight):
                options: dict[str, Any] = {"reduction": reduction, "ignore_index": 0}

                def ce(x: Tensor, t: Tensor, w: Tensor | None, options: Any = options) -> Tensor:
                    return F.cross_entropy(x[:, :4], t, w if w is None else w.detach(), label_smoothing=0.25, **options)

                def nll(x: Tensor, t: Tensor, w: Tensor | None, options: Any = options) -> Tensor:
                    return F.nll_loss(x[:, :4], t, w if w is None else w.detach(), **options)

                def lce(x: Tensor, t: Tensor, w: Tensor | None, head: Tensor, bias: Tensor, options: Any = options) -> Tensor:
                    return F.linear_cross_entropy(x, head, t, linear_bias=bias, weight=w if w is None else w.detach(), **options)

                for function in (ce, nll):
                    compare(mesh, function, (x, labels, weight), (Shard(0), Shard(0), WHOLE), out)
                compare(mesh, lce, (x, labels, weight, head, randn(4)), (Shard(0), Shard(0), WHOLE, WHOLE, WHOLE), out)
    half = distribute_tensor(torch.full((5, 4), 60000.0, dtype=torch.float16), mesh, [Shard(0)])
    y = F.nll_loss(-half, distribute_tensor(torch.zeros(5, dtype=torch.int64), mesh, [Shard(0)]))
    assert y.dtype == torch.float16 and y.full_tensor() == 60000, "the sum is beyond float16, the mean is not"


@case
def losses(mesh: DeviceMesh) -> None:
    for M in (1, 2, 5):
        x, t, weight = randn(M, 3, 2), randn(M, 3, 2), randn(3, 1).square()
        for reduction in ("none", "mean", "sum"):
            for d in (0, 1):
                out = Shard(d) if reduction == "none" else Partial()
                for function in (F.mse_loss, F.smooth_l1_loss, F.huber_loss, F.l1_loss, F.binary_cross_entropy_with_logits):
                    compare(mesh, functools.partial(function, reduction=reduction), (x, t), (Shard(d), Shard(d)), out)

                def bce(x: Tensor, t: Tensor, w: Tensor, p: Tensor, reduction: str = reduction) -> Tensor:
                    return F.binary_cross_entropy_with_logits(x, t, w.detach(), reduction=reduction, pos_weight=p.detach())

                compare(mesh, bce, (x, t, weight, weight[0]), (Shard(d), WHOLE if d else Shard(0), WHOLE, WHOLE))
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of sizes that differ
                    compare(mesh, functools.partial(F.mse_loss, reduction=reduction), (x, t[0, :1]), (Shard(d), WHOLE), out)
    refused(lambda: F.binary_cross_entropy(spread(mesh, randn(2, 3)), spread(mesh, randn(2, 2))), "binary_cross_entropy")


@case
def dropout(mesh: DeviceMesh) -> None:
    """Processes that hold the same numbers drop the same, others others, whatever the state of their generators."""
    for same in (True, False):
        torch.manual_seed(0 if same else dist.get_rank())
        ones = torch.ones(200, 30, dtype=torch.float64)
        for function in (F.dropout, lambda x, p: F.dropout_add_layer_norm(x, x.detach() * 0, p, (30,))[1]):
            for placement in (WHOLE, Shard(0)):
                x = distribute_tensor(ones, mesh, [placement]).requires_grad_()
                y = function(x, 0.25)
                assert y.placements == (placement,)
                y.sum().backward()
                torch.testing.assert_close(whole(x.grad), whole(y))
                kept = [torch.empty_like(y.to_local()) for _ in range(mesh.size())]
                dist.all_gather(kept, y.to_local().detach())
                assert torch.equal(kept[0], kept[1]) == (placement == WHOLE)
                assert abs((y.full_tensor() == 0).double().mean() - 0.25) < 0.03
        x = distribute_tensor(ones, mesh, [Shard(0)])
        assert F.dropout(x, 0.5, inplace=True) is x and (x.full_tensor() == 0).any()
        assert F.dropout(x, 0.5, training=False) is x


@case
def in_place(mesh: DeviceMesh) -> None:
    x = randn(5, 3)
    for function in (F.relu_, F.elu_, lambda x: F.silu(x, inplace=True), lambda x: F.leaky_relu(x, -0.5, inplace=True)):
        for placement in (WHOLE, Shard(0), Shard(1)):
            compare(mesh, lambda x, function=function: function(x * 1), (x,), (placement,), placement)
    refused(lambda: F.relu_(spread(mesh, x)), "leaf")
