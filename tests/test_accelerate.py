"""accelerate: the same outputs and gradients from our kernels, nothing else changed, and a way back."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import RawCalls
from torch import Tensor

import dlkernels
import dlkernels.nn
from dlkernels.acceleration import swap
from dlkernels.models.mlp import MLP

nn = torch.nn
F = torch.nn.functional


class Block(nn.Module):
    """A residual block of a Transformer, and all its ways to be called."""

    def __init__(self, width: int = 8, dropout: float = 0.0) -> None:
        super().__init__()
        self.up, self.down, self.act = nn.Linear(width, 2 * width), nn.Linear(2 * width, width), nn.GELU()
        self.norm, self.dropout, self.scale = nn.LayerNorm(width), nn.Dropout(dropout), 2.0

    def forward(self, x: Tensor) -> Tensor:
        h = self.down(self.act(self.up(x)))
        if self.scale != 1.0:
            h = h * self.scale
        return self.norm(x + self.dropout(h))


class PreNorm(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(F.gelu(self.up(x), approximate="tanh"))
        return x + self.dropout(self.norm(x))


class Residual(nn.Module):
    """torchvision's BasicBlock."""

    def __init__(self, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, 4, 3, stride, 1, bias=False), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.downsample = nn.Sequential(nn.Conv2d(channels, 4, 1, stride, bias=False), nn.BatchNorm2d(4)) if channels != 4 else None
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        identity = x

        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)

        out = self.conv2(out)
        out = self.bn2(out)

        if self.downsample is not None:
            identity = self.downsample(x)

        out += identity
        out = self.relu(out)

        return out


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {  # and how many neighbours of layers are fused in it
    "mlp": (lambda: MLP(12, [16, 8], 4, 0.0, nn=torch.nn), (6, 12), 2),
    "resnet": (lambda: nn.Sequential(Residual(3, 2), Residual(4), nn.AvgPool2d(2)), (2, 3, 20, 24), 5),
    "sequential": (lambda: nn.Sequential(nn.Linear(5, 7), nn.LeakyReLU(0.2), nn.Linear(7, 7), nn.Sigmoid(), nn.LayerNorm(7)), (4, 5), 2),
    "block": (Block, (2, 3, 8), 2),
    "pre-norm": (PreNorm, (2, 3, 8), 2),
    "padded": (lambda: nn.Sequential(nn.Conv2d(2, 4, 3, padding_mode="circular"), nn.BatchNorm2d(4), nn.SiLU()), (2, 2, 9, 9), 1),
    "encoder": (lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), (2, 5, 8), 0),
}
each_model = pytest.mark.parametrize("name", MODELS)


def made(name: str) -> tuple[nn.Module, Tensor]:
    make, shape, _ = MODELS[name]
    model = make()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for value in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
                torch.Tensor.uniform_(value.data, 0.5, 1.5)  # type: ignore[union-attr]
    return model, torch.randn(shape)


def results(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output and gradients, and the buffers after the call."""
    x = x.clone().requires_grad_()
    y = model(x)
    names, parameters = zip(*model.named_parameters(remove_duplicate=True))
    grads = torch.autograd.grad(y, (x, *parameters), torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))
    return {"y": y.detach(), **dict(zip(("dx", *names), grads)), **{name: value.clone() for name, value in model.named_buffers()}}


def assert_near(ours: dict[str, Tensor], native: dict[str, Tensor], exact: dict[str, Tensor], scale: float = 0.0) -> None:
    assert ours.keys() == native.keys()
    for name, value in exact.items():
        error, other = ((found[name] - value).abs().max() for found in (ours, native))
        assert error <= 2 * other + 1e-5 * max(value.abs().max().item(), scale), f"{name}: {error:.1e}, native {other:.1e}"


@each_model
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_outputs_gradients_and_buffers_are_the_same(name: str, training: bool) -> None:
    model, x = made(name)
    model.train(training)
    ours, exact = copy.deepcopy(model), results(copy.deepcopy(model).double(), x.double())
    report = dlkernels.accelerate(ours)
    assert len(report.fused) == MODELS[name][2], report
    scale = max(value.abs().max().item() for name, value in exact.items() if "." in name)  # a bias before a norm has gradient 0
    assert_near(results(ours, x), results(model, x), exact, scale)
    with torch.no_grad():
        exact_y = copy.deepcopy(ours).double()(x.double())
        assert_near({"y": ours.eval()(x)}, {"y": model.eval()(x)}, {"y": copy.deepcopy(model).double().eval()(x.double())})
        assert exact_y.shape == ours(x).shape


@each_model
def test_nothing_but_classes_changes_and_undo_brings_those_back(name: str) -> None:
    model, x = made(name)
    handle = model.register_forward_hook(lambda module, args, y: seen.append(y))
    seen: list[Tensor] = []

    def all_of_it() -> list[Any]:
        objects = [*model.named_modules(), *model.named_parameters(), *model.named_buffers()]
        return [(name, id(thing)) for name, thing in objects] + [{k: id(v) for k, v in vars(m).items()} for m in model.modules()]

    before, classes, keys = all_of_it(), [type(m) for m in model.modules()], list(model.state_dict())
    report = dlkernels.accelerate(model)
    assert all_of_it() == before and list(model.state_dict()) == keys
    assert [type(m) for m in model.modules()] != classes
    assert all(isinstance(m, kind) for m, kind in zip(model.modules(), classes))
    model(x)
    assert len(seen) == 1
    report.undo()
    report.undo()
    assert [type(m) for m in model.modules()] == classes and all_of_it() == before
    dlkernels.accelerate(model)
    dlkernels.unaccelerate(model)
    assert [type(m) for m in model.modules()] == classes
    with RawCalls() as recorded:
        model(x)
    assert recorded.calls == []
    handle.remove()


def samples() -> dict[type, tuple[nn.Module, tuple[Any, ...]]]:
    """A layer of every class that can be swapped, and arguments."""
    x, image = torch.randn(4, 6), torch.randn(2, 6, 8, 8)
    labels, pair, words = torch.randint(6, (4,)), (torch.rand(4, 6), torch.rand(4, 6)), torch.randn(3, 4, 6)
    made: dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]] = {
        **dict.fromkeys(("ELU", "GELU", "LeakyReLU", "ReLU", "SiLU", "Sigmoid", "Softplus", "Tanh", "Dropout"), ((), (x,))),
        **dict.fromkeys(("BCELoss", "BCEWithLogitsLoss", "HuberLoss", "L1Loss", "MSELoss", "SmoothL1Loss"), ((), pair)),
        **dict.fromkeys(("Softmax", "LogSoftmax"), ((1,), (x,))),
        **dict.fromkeys(("LayerNorm", "RMSNorm", "BatchNorm1d"), ((6,), (x,))),
        **dict.fromkeys(("AdaptiveAvgPool2d", "AdaptiveMaxPool2d", "AvgPool2d", "MaxPool2d"), ((2,), (image,))),
        **{name: ((6, 5), (torch.randn(3, 4, 6),)) for name in ("LSTM", "GRU", "RNN")},
        **dict.fromkeys(("LSTMCell", "GRUCell", "RNNCell"), ((6, 5), (x,))),
        **{name: ((), (x.log_softmax(1), labels)) for name in ("CrossEntropyLoss", "NLLLoss")},
        "MultiheadAttention": ((6, 2), (words, words, words)),
        "TransformerEncoderLayer": ((6, 2, 8), (words,)), "TransformerDecoderLayer": ((6, 2, 8), (words, words)),
        "TransformerEncoder": ((nn.TransformerEncoderLayer(6, 2, 8), 1), (words,)),
        "TransformerDecoder": ((nn.TransformerDecoderLayer(6, 2, 8), 1), (words, words)),
        "Transformer": ((6, 2, 1, 1, 8), (words, words)),
        "ConvTranspose1d": ((6, 4, 3), (torch.randn(2, 6, 9),)), "ConvTranspose2d": ((6, 4, 3), (image,)),
        "Linear": ((6, 3), (x,)),
        "Conv1d": ((6, 4, 3), (torch.randn(2, 6, 9),)),
        "Conv2d": ((6, 4, 3), (image,)),
        "BatchNorm2d": ((6,), (image,)),
        "BatchNorm3d": ((6,), (torch.randn(2, 6, 3, 4, 5),)),
        "Embedding": ((9, 4), (labels,)),
        "LinearCrossEntropyLoss": ((6, 6), (x, labels)),
    }
    return {kind: (kind(*made[kind.__name__][0]), made[kind.__name__][1]) for kind in swap.OURS if kind.__module__.startswith("torch.")}


def test_every_class_can_take_over_a_layer_of_torch() -> None:
    for kind, (layer, args) in samples().items():
        layer.eval()
        y = layer(*args)
        dlkernels.accelerate(layer)
        assert type(layer) is getattr(dlkernels.nn, kind.__name__)
        with RawCalls() as recorded:
            torch.testing.assert_close(layer(*args), y, rtol=1e-4, atol=1e-5)
        assert recorded.calls or kind is nn.Dropout, kind
        torch.testing.assert_close(pickle.loads(pickle.dumps(layer))(*args), layer(*args), rtol=0, atol=0)


def kernels(model: nn.Module, x: Tensor) -> list[str]:
    with RawCalls() as recorded:
        model(x)
    return [call[0].__name__.split(".")[0] for call in recorded.calls]


def test_neighbours_run_as_one_kernel_only_while_nothing_is_in_between() -> None:
    first, last, x = nn.Linear(4, 5), nn.Linear(5, 3), torch.randn(2, 4)
    model = nn.Sequential(first, nn.ReLU(inplace=True), last)
    dlkernels.accelerate(model)
    assert kernels(model, x) == ["linear_forward"] * 2
    seen: list[Tensor] = []
    for layer in (model[0], model[1]):
        handle = layer.register_forward_hook(lambda module, args, y: seen.append(y.clone()))
        y = model(x)
        handle.remove()
    assert seen[0].min() < 0 <= seen[1].min()
    torch.testing.assert_close(last(seen[1]), y)
    assert kernels(model, x) == ["linear_forward"] * 2
    torch.testing.assert_close(model[:1](x), F.linear(x, first.weight, first.bias))
    model[1] = nn.Tanh()
    torch.testing.assert_close(model(x), last(torch.tanh(first(x))))
    assert kernels(model, x) == ["linear_forward"] * 2, "the new layer is torch's"


def test_a_norm_is_folded_in_evaluation_and_takes_its_relu_in_training() -> None:
    norm, x = nn.BatchNorm2d(4), torch.randn(2, 3, 12, 12)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU())
    dlkernels.accelerate(model)
    assert kernels(model, x) == ["conv2d_forward", "batch_norm_train"]
    model.eval()
    with torch.no_grad():
        assert kernels(model, x) == ["conv2d_forward"]
        before = model(x)
        norm.get_buffer("running_mean").add_(1)  # noticed, as nothing is kept
        assert not torch.allclose(model(x), before)


def test_tied_weights_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
            self.head.weight = self.embedding.weight
            self.again = self.head

        def forward(self, x: Tensor) -> Tensor:
            return self.again(self.embedding(x))

    model, x = Tied(), torch.randint(7, (3,))
    y = model(x)
    dlkernels.accelerate(model)
    assert model.head.weight is model.embedding.weight and model.again is model.head
    torch.testing.assert_close(model(x), y)


def test_nothing_is_changed_by_what_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = made("resnet")
    classes = [type(m) for m in model.modules()]

    class Foreign:
        __slots__ = ("forward",)  # stored otherwise than a layer, so none can become one

    monkeypatch.setitem(swap.OURS, nn.AvgPool2d, Foreign)  # the last layer of all
    with pytest.raises(TypeError):
        dlkernels.accelerate(model)
    assert [type(m) for m in model.modules()] == classes
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got int"):
        dlkernels.accelerate(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="nothing in this Sequential was accelerated"):
        dlkernels.unaccelerate(model)


def test_a_class_changed_since_stays_and_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    report = dlkernels.accelerate(model)
    nn.utils.parametrizations.weight_norm(model[1])
    classes = [type(m) for m in model.modules()]
    with pytest.raises(RuntimeError, match="has become a .*ParametrizedLinear since"):
        report.undo()
    assert [type(m) for m in model.modules()] == classes


@pytest.mark.parametrize("name", ["resnet", "block", "sequential"])
def test_it_can_be_compiled_copied_and_autocast(name: str) -> None:
    model, x = made(name)
    dlkernels.accelerate(model.eval())
    y = model(x)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(x), y, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(copy.deepcopy(model)(x), y, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(x).float(), y, rtol=0.1, atol=0.1)


def test_the_report_is_a_table() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Softsign())
    lines = str(dlkernels.accelerate(model)).splitlines()
    assert [line.split()[0] for line in lines] == ["swapped", "swapped", "fused", "left"]
    assert "1 x Linear -> dlkernels.nn.Linear" in lines[0]
    assert "Linear + ReLU, in Sequential" in lines[2] and "(the model itself)" in lines[2]
    assert str(dlkernels.accelerate(nn.Sequential(nn.Identity()))) == "nothing to accelerate"
