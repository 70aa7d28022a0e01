"""What is peculiar to cross_entropy, nll_loss and linear_cross_entropy: every option against torch, labels out of range, memory."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as native
from support import threads
from torch import Tensor

import dlkernels.functional as F
from dlkernels import nn
from dlkernels.backend import TRITON_ON_CPU

REDUCTIONS = ("none", "mean", "sum")
Function = Callable[..., Tensor]
INF, NAN = float("inf"), float("nan")
cpu_only = pytest.mark.skipif(TRITON_ON_CPU, reason="on a GPU labels are not looked at before the kernel starts")
interpreted = pytest.mark.skipif(not TRITON_ON_CPU, reason="what the Triton kernels do")
compiled_only = pytest.mark.skipif(TRITON_ON_CPU, reason="the interpreter leaves nothing to compile")


def results(function: Function, leaves: list[Tensor], *args: Any, **options: Any) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in leaves]
    loss = function(*leaves, *args, **options)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, torch.linspace(1, 2, loss.numel(), dtype=loss.dtype).view(loss.shape))]


def compare(ours: Function, theirs: Function, leaves: list[Tensor], *args: Any, **options: Any) -> None:
    for found, wanted in zip(results(ours, leaves, *args, **options), results(theirs, leaves, *args, **options)):
        torch.testing.assert_close(found, wanted, equal_nan=True)


def labels_for(x: Tensor) -> Tensor:
    shape = x.shape[:1] + x.shape[2:] if x.dim() > 1 else ()
    return torch.randint(0, x.shape[1 if x.dim() > 1 else 0], shape)


SHAPES = [(7,), (5, 7), (9, 33), (3, 5, 4), (2, 4, 3, 37)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


@pytest.mark.isa
@each_shape
def test_every_option_with_labels(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    target, weight = labels_for(x), torch.rand(x.shape[1 if x.dim() > 1 else 0], dtype=torch.float64)
    for reduction, w, ignored, smoothing in itertools.product(REDUCTIONS, (None, weight), (-100, 1), (0.0, 0.3, 1.0)):
        options: dict[str, Any] = {"reduction": reduction, "weight": w, "ignore_index": ignored}
        compare(F.cross_entropy, native.cross_entropy, [x], target, **options, label_smoothing=smoothing)
        if smoothing == 0:
            compare(F.nll_loss, native.nll_loss, [x], target, **options)


@pytest.mark.isa
@each_shape
def test_every_option_with_probabilities(shape: tuple[int, ...]) -> None:
    x, p = torch.randn(2, *shape, dtype=torch.float64)
    p, weight = p.softmax(0), torch.rand(x.shape[1 if x.dim() > 1 else 0], dtype=torch.float64)
    for reduction, w, smoothing in itertools.product(REDUCTIONS, (None, weight), (0.0, 0.3, 1.0)):
        compare(F.cross_entropy, native.cross_entropy, [x, p], reduction=reduction, weight=w, label_smoothing=smoothing)
        only_x = results(lambda x: F.cross_entropy(x, p, w, reduction=reduction, label_smoothing=smoothing), [x])  # noqa: B023
        torch.testing.assert_close(only_x[1], results(F.cross_entropy, [x, p], w, reduction=reduction, label_smoothing=smoothing)[1])


@pytest.mark.parametrize("ours, theirs", [(F.cross_entropy, native.cross_entropy), (F.nll_loss, native.nll_loss)], ids=["ce", "nll"])
def test_deprecated_reductions_warn_as_torch(ours: Function, theirs: Function) -> None:
    x, target = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    for average, reduce in itertools.product((None, True, False), repeat=2):
        if average is None and reduce is None:
            continue
        with pytest.warns(UserWarning, match="size_average and reduce args will be deprecated"):
            found = ours(x, target, size_average=average, reduce=reduce)
        with pytest.warns(UserWarning):
            torch.testing.assert_close(found, theirs(x, target, size_average=average, reduce=reduce))


@pytest.mark.isa
@pytest.mark.parametrize("behind", [(), (3,)], ids=["rows", "strips"])
def test_logits_in_the_thousands(behind: tuple[int, ...]) -> None:
    """The loss of an offset row is that of the row, to float's accuracy: log sum exp itself is rounded to a thousandth there."""
    x = torch.randn(6, 40, *behind)
    target = torch.arange(6).view(6, *([1] * len(behind))).expand(6, *behind).contiguous()
    exact = results(native.cross_entropy, [x.double()], target)
    for offset in (0, 8192, -8192):
        moved = x + offset  # exact in float64, rounded here: compare with what was rounded
        exact = results(native.cross_entropy, [moved.double()], target)
        for found, wanted in zip(results(F.cross_entropy, [moved], target), exact):
            torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    assert len(exact) == 2


@pytest.mark.isa
@pytest.mark.parametrize("smoothing", [0.0, 0.25])
def test_infinities_and_nan(smoothing: float) -> None:
    rows = [[-INF, 0, 1], [0, -INF, 1], [-INF] * 3, [INF, 0, 1], [0, INF, 1], [NAN, 0, 1], [0, 1, NAN], [1e4, -1e4, 0], [-1e4, 1e4, 0]]
    x, target = torch.tensor(rows, dtype=torch.float64), torch.zeros(9, dtype=torch.int64)
    for reduction in REDUCTIONS:
        compare(F.cross_entropy, native.cross_entropy, [x], target, reduction=reduction, label_smoothing=smoothing)


@pytest.mark.parametrize("ours, theirs", [(F.cross_entropy, native.cross_entropy), (F.nll_loss, native.nll_loss)], ids=["ce", "nll"])
def test_no_label_counts(ours: Function, theirs: Function) -> None:
    x = torch.randn(4, 3, dtype=torch.float64)
    for reduction in REDUCTIONS:
        compare(ours, theirs, [x], torch.full((4,), -100), reduction=reduction)
        compare(ours, theirs, [x[:0]], torch.zeros(0, dtype=torch.int64), reduction=reduction)


BAD_LABELS = [5, -1, 2**40, -(2**63), 2**63 - 1]


@cpu_only
@pytest.mark.parametrize("label", BAD_LABELS)
def test_a_bad_label_is_named(label: int) -> None:
    x, target = torch.randn(4, 5), torch.tensor([0, 1, label, 2])
    message = f"Target {label} is out of bounds: number 2 of target must be 0 to 4 for the 5 classes"
    for function in (F.cross_entropy, F.nll_loss):
        with pytest.raises(IndexError, match=re.escape(message)):
            function(x.requires_grad_(), target)
        with pytest.raises(IndexError, match=re.escape(message)):
            function(x.detach()[..., None], target[:, None])
    with pytest.raises(IndexError, match=re.escape(message)):
        F.linear_cross_entropy(torch.randn(4, 3), torch.randn(5, 3), target)


@interpreted
@pytest.mark.parametrize("label", BAD_LABELS)
def test_a_bad_label_gives_nan_on_a_gpu(label: int) -> None:
    """Only in its row; nothing is read or written elsewhere."""
    x, target = torch.randn(4, 5), torch.tensor([0, 1, label, 2])
    for ours, theirs in ((F.cross_entropy, native.cross_entropy), (F.nll_loss, native.nll_loss)):
        loss, dx = results(ours, [x], target, reduction="none")
        wanted, wanted_dx = results(theirs, [x], target.where(target != label, 0), reduction="none")
        wanted[2], wanted_dx[2] = NAN, NAN
        torch.testing.assert_close((loss, dx), (wanted, wanted_dx), equal_nan=True)
        assert ours(x, target).isnan()


X, LABELS = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
BAD: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "too few labels": ((X, LABELS[:3]), {}),
    "labels like logits": ((X, torch.zeros(4, 3, dtype=torch.int64)), {}),
    "labels of floats": ((X, LABELS.float()), {}),
    "labels of int32": ((X, LABELS.int()), {}),
    "weight of another size": ((X, LABELS, torch.ones(4)), {}),
    "weight of another dtype": ((X, LABELS, torch.ones(3).double()), {}),
    "integers": ((X.long(), LABELS), {}),
    "no classes": ((torch.ones(4, 0), LABELS), {}),
    "a number": ((torch.ones(()), torch.tensor(0)), {}),
    "unknown reduction": ((X, LABELS), {"reduction": "average"}),
    "reduction None": ((X, LABELS), {"reduction": None}),
    "input a list": (([[1.0]], LABELS), {}),
    "target None": ((X, None), {}),
    "weight a list": ((X, LABELS, [1.0, 1.0, 1.0]), {}),
}
BAD_SMOOTHING: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "smoothing above 1": ((X, LABELS), {"label_smoothing": 1.5}),
    "ignored probabilities": ((X, X), {"ignore_index": 1}),
    "smoothing below 0": ((X, LABELS), {"label_smoothing": -0.5}),
    "probabilities of another dtype": ((X, X.double()), {}),
}


@pytest.mark.parametrize("ours, theirs", [(F.cross_entropy, native.cross_entropy), (F.nll_loss, native.nll_loss)], ids=["ce", "nll"])
@pytest.mark.parametrize("case", [*BAD, *BAD_SMOOTHING])
def test_bad_input_as_torch(ours: Function, theirs: Function, case: str) -> None:
    """Torch's result, or an exception of its kind that names an argument."""
    if ours is F.nll_loss and case in BAD_SMOOTHING:
        return
    args, options = (BAD | BAD_SMOOTHING)[case]
    try:
        wanted = theirs(*args, **options)
    except Exception as error:
        with pytest.raises((type(error), RuntimeError) if isinstance(error, RuntimeError) else type(error)) as found:
            ours(*args, **options)
        assert re.search("input|target|weight|label_smoothing|reduction|average|ignore_index|None", str(found.value), re.IGNORECASE)
    else:
        torch.testing.assert_close(ours(*args, **options), wanted)


def test_a_weight_that_requires_grad_runs_in_torch() -> None:
    x, p, w = torch.randn(4, 3), torch.rand(4, 3), torch.rand(3, requires_grad=True)
    (found,) = torch.autograd.grad(F.cross_entropy(x, p, w), w)
    torch.testing.assert_close(found, torch.autograd.grad(native.cross_entropy(x, p, w), w)[0])


def test_threads_do_not_change_a_bit() -> None:
    x, deep = torch.randn(700, 33), torch.randn(3, 5, 4001 if not TRITON_ON_CPU else 70)
    hidden, classifier = torch.randn(300, 16), torch.randn(70, 16)

    def everything() -> list[Tensor]:
        linear = results(F.linear_cross_entropy, [hidden, classifier], torch.arange(300) % 70)
        return [*results(F.cross_entropy, [x], torch.arange(700) % 33), *results(F.cross_entropy, [deep], labels), *linear]

    labels = labels_for(deep)
    with threads(1):
        one = everything()
    with threads(2):
        assert all(torch.equal(a, b) for a, b in zip(one, everything()))


def test_layers_are_torchs() -> None:
    x, target, w = torch.randn(4, 3), torch.tensor([0, 2, 1, 1]), torch.rand(3)
    cases: list[tuple[str, dict[str, Any]]] = [
        ("CrossEntropyLoss", {"weight": w, "label_smoothing": 0.1}), ("CrossEntropyLoss", {"ignore_index": 2, "reduction": "none"}),
        ("NLLLoss", {"weight": w}), ("NLLLoss", {"reduction": "sum", "ignore_index": 1}),
    ]  # fmt: skip
    for name, options in cases:
        layer, wanted = getattr(nn, name)(**options), getattr(torch.nn, name)(**options)
        torch.testing.assert_close(layer(x, target), wanted(x, target))
        assert repr(layer) == repr(wanted) and layer.state_dict().keys() == wanted.state_dict().keys()


def test_raw_ops_refuse_nonsense() -> None:
    ops, x, t = torch.ops.dlkernels, torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    loss, kept = ops.cross_entropy_forward(x, t, None, 1, -100, 0.0)
    good: list[Any] = [loss, x, t, None, kept, 1, -100, 0.0, True, False]
    wrong: dict[int, list[Any]] = {
        0: [torch.ones(4), loss.double(), loss.bool()], 1: [x[:3], x.double(), x[0, 0], torch.ones(4, 0)],
        2: [t[:3], t.int(), x[:3], x.double(), t[None]], 3: [torch.ones(2), torch.ones(3).double(), t[:3]],
        4: [kept[:4], kept.double(), kept[None]], 5: [-1, 3, 2**40],
    }  # fmt: skip
    for i, values in wrong.items():
        for value in values:
            with pytest.raises((RuntimeError, TypeError)):
                ops.cross_entropy_backward(*good[:i], value, *good[i + 1 :])
            if i in (2, 3, 5) or (i == 1 and value.dtype == torch.float32):  # other logits would set another dtype
                with pytest.raises((RuntimeError, TypeError)):
                    ops.cross_entropy_forward(*[value if i == j else good[j] for j in (1, 2, 3, 5)], -100, 0.0)
    with pytest.raises(RuntimeError, match="labels have no gradient"):
        ops.cross_entropy_backward(*good[:9], True)
    with pytest.raises((RuntimeError, TypeError)):
        ops.nll_loss_forward(x, x, None, 1, -100)


# ---- compiled for GPUs that are not there ---------------------------------------------------------------------------------------------


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@compiled_only
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("shape", [(4096, 1000), (512, 128256), (8, 21, 128, 128)], ids=str)
def test_kernels_fit_the_registers_and_address_64_bits(target: str, shape: tuple[int, ...]) -> None:
    pytest.importorskip("triton")
    from dlkernels.gpu import aot
    from dlkernels.gpu import cross_entropy as kernels
    from dlkernels.gpu import nll_loss as nll

    x, weight, labels = meta(*shape), meta(shape[1]), meta(*shape[:1], *shape[2:], dtype=torch.int64)
    kept, divisor = meta(2 * labels.numel() + 1, dtype=torch.float32), meta(1, dtype=torch.float32)
    calls = (
        lambda: kernels.forward(x, labels, None, 1, -100, 0.0), lambda: kernels.forward(x, x, weight, 1, -100, 0.1),
        lambda: kernels.backward(meta(), x, labels, weight, kept, 1, -100, 0.1, True, False),
        lambda: kernels.backward(meta(), x, x, None, kept, 1, -100, 0.0, True, True),
        lambda: nll.forward(x, labels, weight, 1, -100), lambda: nll.backward(meta(), x, labels, weight, divisor, 1, -100),
    )  # fmt: skip
    for launch in (launch for call in calls for launch in aot.record(call, target)):
        compiled = aot.compile_launch(launch, target)
        assert compiled.spilled == 0, f"{compiled}: spills"
        if launch.kernel.__name__ not in ("reduce", "total_weight"):
            offsets = re.findall(r"tt\.addptr .*: tensor<[\dx]+!tt\.ptr<\w+>>, tensor<[\dx]*x(i\d+)>", compiled.text("ttir"))
            assert offsets and "i64" in offsets
