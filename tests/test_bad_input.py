"""Bad and unusual arguments: each works exactly as torch.nn.functional.linear does, or raises what that raises, with a message that says
which argument is wrong, what it is and what it needs to be. Nothing crashes and nothing returns garbage."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import Args, arguments, middle, threads
from torch import Tensor

import dlkernels.functional as F
from dlkernels import OPS

native = torch.nn.functional.linear
NAMES = ("input", "weight", "bias", "x", "mat1", "mat2", "vec")


def ones(*shape: int, **options: Any) -> Tensor:
    return torch.ones(shape, **options)


def outcome(function: Callable[..., Any], args: Args) -> Tensor | Exception:
    try:
        return function(*args)
    except Exception as error:
        return error


def check_as_torch(*args: Any) -> None:
    """The same result as torch, of the same type, dtype, device and shape, or the same kind of exception."""
    ours, theirs = outcome(F.linear, args), outcome(native, args)
    if isinstance(theirs, Exception):
        assert isinstance(ours, Exception), f"torch raises {theirs!r}, ours returns {tuple(ours.shape)}"
        assert isinstance(ours, type(theirs)) or isinstance(theirs, type(ours)), f"torch raises {theirs!r}, ours {ours!r}"
        assert str(ours).strip()
        return
    assert not isinstance(ours, Exception), f"torch returns {tuple(theirs.shape)}, ours raises {ours!r}"
    kinds = [(type(t), t.dtype, t.device, t.layout, t.shape) for t in (ours, theirs)]
    assert kinds[0] == kinds[1]
    if theirs.device.type != "meta":
        torch.testing.assert_close(ours, theirs, equal_nan=True)


SIZES = {
    "K differs": (ones(2, 3), ones(4, 5)),
    "K differs, 1-D input": (ones(3), ones(4, 5)),
    "K differs, 4-D input": (ones(2, 3, 4, 6), ones(4, 5)),
    "K differs, empty input": (ones(0, 3), ones(4, 5)),
    "weight 1-D": (ones(2, 3), ones(3)),
    "weight 1-D and bias": (ones(2, 3), ones(3), ones(2)),
    "weight 1-D of another size": (ones(2, 3), ones(5)),
    "weight 3-D": (ones(2, 3), ones(2, 4, 3)),
    "weight 0-D": (ones(2, 3), ones()),
    "input 0-D": (ones(), ones(4, 3)),
    "input and weight 1-D": (ones(3), ones(3)),
    "bias longer": (ones(2, 3), ones(4, 3), ones(5)),
    "bias shorter": (ones(2, 3), ones(4, 3), ones(3)),
    "bias of one number": (ones(2, 3), ones(4, 3), ones(1)),
    "bias 0-D": (ones(2, 3), ones(4, 3), ones()),
    "bias 2-D": (ones(2, 3), ones(4, 3), ones(2, 4)),
    "bias empty": (ones(2, 3), ones(4, 3), ones(0)),
    "bias longer, input 3-D": (ones(2, 2, 3), ones(4, 3), ones(5)),
}
EMPTY = {
    "M = 0": (ones(0, 3), ones(4, 3), ones(4)),
    "K = 0": (ones(2, 0), ones(4, 0), ones(4)),
    "N = 0": (ones(2, 3), ones(0, 3), ones(0)),
    "all 0": (ones(0, 0), ones(0, 0), ones(0)),
    "K = 0, no bias": (ones(2, 0), ones(4, 0)),
    "K = 0, 1-D input": (ones(0), ones(4, 0), ones(4)),
    "batch 0 of 3-D": (ones(5, 0, 3), ones(4, 3), ones(4)),
    "batch 0 and K = 0": (ones(5, 0, 0), ones(4, 0), ones(4)),
    "3-D, K = 0": (ones(2, 5, 0), ones(4, 0), ones(4)),
}
DTYPES = {
    **{f"all {dtype}": (ones(2, 3, dtype=dtype), ones(4, 3, dtype=dtype), ones(4, dtype=dtype)) for dtype in (
        torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool, torch.complex64, torch.complex128, torch.float8_e4m3fn,
    )},
    "float32 with float64": (ones(2, 3), ones(4, 3, dtype=torch.float64)),
    "float32 with bfloat16": (ones(2, 3), ones(4, 3, dtype=torch.bfloat16)),
    "float16 with bfloat16": (ones(2, 3, dtype=torch.float16), ones(4, 3, dtype=torch.bfloat16)),
    "float32 with int64": (ones(2, 3), ones(4, 3, dtype=torch.int64)),
    "int64 with float32": (ones(2, 3, dtype=torch.int64), ones(4, 3)),
    "float32 with complex64": (ones(2, 3), ones(4, 3, dtype=torch.complex64)),
    "bias float64": (ones(2, 3), ones(4, 3), ones(4, dtype=torch.float64)),
    "bias int64": (ones(2, 3), ones(4, 3), ones(4, dtype=torch.int64)),
    "empty, mixed": (ones(0, 3), ones(4, 3, dtype=torch.float64)),
}
PLACES = {
    "all meta": (ones(2, 3, device="meta"), ones(4, 3, device="meta"), ones(4, device="meta")),
    "bias meta": (ones(2, 3), ones(4, 3), ones(4, device="meta")),
    "meta, K differs": (ones(2, 3, device="meta"), ones(4, 5, device="meta")),
    "sparse weight": (ones(2, 3), ones(4, 3).to_sparse()),
    "sparse input": (ones(2, 3).to_sparse(), ones(4, 3)),
}
with warnings.catch_warnings():  # torch warns that these are in beta, or on their way out
    warnings.simplefilter("ignore")
    PLACES |= {
        "CSR weight": (ones(2, 3), ones(4, 3).to_sparse_csr()),
        "CSR weight, K differs": (ones(2, 5), ones(4, 3).to_sparse_csr()),
        "quantized": (torch.quantize_per_tensor(ones(2, 3), 0.1, 0, torch.qint8), ones(4, 3)),
    }
VALUES = {
    "NaN everywhere": (ones(5, 3) * float("nan"), ones(4, 3), ones(4)),
    "NaN weight": (ones(5, 3), ones(4, 3) * float("nan"), ones(4)),
    "infinities of both signs": (torch.tensor([[float("inf"), 1.0, float("-inf")]]), ones(4, 3), ones(4)),
    "overflow": (ones(5, 3) * 3e38, ones(4, 3) * 3e38, ones(4)),
    "denormal": (ones(5, 3) * 1e-42, ones(4, 3), None),
    "expanded": (ones(1, 1).expand(5, 3), ones(1).expand(4, 3), ones(1).expand(4)),
    "overlapping": (torch.arange(8.0).as_strided((5, 3), (1, 1)), torch.arange(8.0).as_strided((4, 3), (1, 2)), None),
    "one storage for all": (torch.arange(12.0).view(4, 3), torch.arange(12.0).view(4, 3), torch.arange(4.0)),
}
OBJECTS = {
    "input None": (None, ones(4, 3)),
    "weight None": (ones(2, 3), None),
    "input a list": ([[1.0, 1.0, 1.0]], ones(4, 3)),
    "weight a list": (ones(2, 3), [[1.0, 1.0, 1.0]]),
    "bias a list": (ones(2, 3), ones(4, 3), [1.0] * 4),
    "input a number": (1.0, ones(4, 3)),
    "weight a number": (ones(2, 3), 2),
    "bias a number": (ones(2, 3), ones(4, 3), 1.0),
    "bias False": (ones(2, 3), ones(4, 3), False),
    "input an array": (ones(2, 3).numpy(), ones(4, 3)),
}
CASES: dict[str, Args] = SIZES | EMPTY | DTYPES | PLACES | VALUES | OBJECTS


@pytest.mark.parametrize("case", CASES)
def test_as_torch(case: str) -> None:
    check_as_torch(*CASES[case])


@pytest.mark.parametrize("case", [name for name in CASES if name not in OBJECTS])
def test_gradients_as_torch(case: str) -> None:
    """What does not raise has torch's gradients too, and what raises only with grad raises in both."""
    gradients: list[tuple[Tensor, ...] | None] = []
    for function in (native, F.linear):
        try:
            leaves: Args = tuple(arg.detach().clone().requires_grad_() if isinstance(arg, Tensor) else arg for arg in CASES[case])
        except RuntimeError:
            return  # integers have no gradient
        try:
            y = function(*leaves)
            gradients.append(torch.autograd.grad(y, [t for t in leaves if t is not None], torch.ones_like(y)))
        except (RuntimeError, NotImplementedError):
            gradients.append(None)
    assert (gradients[0] is None) == (gradients[1] is None), "one of torch and ours raises"
    for theirs, ours in zip(*(found or () for found in gradients)):
        assert (ours.shape, ours.dtype, ours.device, ours.layout) == (theirs.shape, theirs.dtype, theirs.device, theirs.layout)
        if theirs.device.type != "meta":
            torch.testing.assert_close(ours.to_dense(), theirs.to_dense(), equal_nan=True)


MESSAGES = {  # case: what the message must tell: the argument and what it got
    "K differs": ("weight", "(4, 5)", "3"),
    "K differs, 1-D input": ("weight", "(4, 5)", "3"),
    "K differs, 4-D input": ("weight", "(4, 5)", "6"),
    "weight 3-D": ("weight", "(2, 4, 3)"),
    "weight 0-D": ("weight", "()"),
    "input 0-D": ("input", "()"),
    "bias longer": ("bias", "(5)", "4"),
    "bias shorter": ("bias", "(3)", "4"),
    "float32 with float64": ("weight", "Double", "Float"),
    "bias float64": ("bias", "Double", "Float"),
    "input None": ("input", "None"),
    "weight a list": ("weight", "list", "Tensor"),
    "bias a number": ("bias", "float", "Tensor"),
}


@pytest.mark.parametrize("case", MESSAGES)
def test_message_names_the_argument(case: str) -> None:
    error = outcome(F.linear, CASES[case])
    assert isinstance(error, Exception)
    missing = [word for word in MESSAGES[case] if word.lower() not in str(error).lower().replace("(5,)", "(5)").replace("(3,)", "(3)")]
    assert not missing, f"{str(error)!r} does not say {missing}"


@pytest.mark.parametrize("other", ["weight", "input"])
def test_meta_beside_cpu_is_refused(other: str) -> None:
    """The one place where torch does worse: it reads the memory that a meta weight does not have, and takes a cpu weight for a meta one."""
    args = (ones(2, 3, device="meta" if other == "input" else "cpu"), ones(4, 3, device="meta" if other == "weight" else "cpu"))
    with pytest.raises(RuntimeError, match=r"weight is on (meta|cpu) and input on (meta|cpu); all tensors must be on one device"):
        F.linear(*args)


@pytest.mark.parametrize("activation", ["ReLU", "", "softmax", None, 1])
def test_unknown_activation(activation: Any) -> None:
    with pytest.raises(ValueError, match=r"activation must be one of none, relu.*got"):
        F.linear_act(ones(2, 3), ones(4, 3), activation=activation)


def test_wrong_number_of_arguments() -> None:
    for args in ((), (ones(2, 3),), (ones(2, 3), ones(4, 3), None, 1)):
        with pytest.raises(TypeError):
            F.linear(*args)
    with pytest.raises(TypeError):
        F.linear(ones(2, 3), ones(4, 3), b=None)


def test_every_op_refuses_what_does_not_fit() -> None:
    """Each op of the table, one argument at a time shortened, of another dtype, or no tensor: an exception or a result as native's."""
    for op in OPS.values():
        args = arguments(op, middle(op), torch.float32)
        for i, arg in enumerate(args):
            if isinstance(arg, Tensor):
                for wrong in (arg[..., :-1], arg.double(), "text", object()):
                    some = (*args[:i], wrong, *args[i + 1 :])
                    ours, theirs = outcome(op.call, some), outcome(op.native, some)
                    if isinstance(theirs, Exception):
                        assert isinstance(ours, Exception), f"{op.name}: argument {i} as {wrong}"
                        assert isinstance(ours, (type(theirs), RuntimeError, TypeError)), f"{op.name}: {ours!r}, native {theirs!r}"
                    # torch's lstm reads past the end of what is too small; attention's native is arithmetic, which takes any dtype
                    elif op.name not in ("lstm", "attention") or not isinstance(ours, RuntimeError):
                        torch.testing.assert_close(ours, theirs)


def test_a_refused_call_changes_nothing() -> None:
    """After an exception the next call works, and no argument has changed."""
    x, weight = torch.randn(5, 7), torch.randn(3, 6)
    copies = x.clone(), weight.clone()
    with threads(2):
        for _ in range(20):
            with pytest.raises(RuntimeError):
                F.linear_relu(x, weight)
            torch.testing.assert_close(F.linear_relu(x[:, :6], weight), torch.relu(native(x[:, :6], weight)))
    assert torch.equal(x, copies[0]) and torch.equal(weight, copies[1])
