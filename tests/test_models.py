"""The teaching models: one text in both worlds, the same first weights, the same curve, and they learn."""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest
import torch
from torch import Tensor

import dlkernels.nn
import dlkernels.train
from dlkernels import data
from dlkernels.bench.timing import Interrupted
from dlkernels.models import MODELS, ModelSpec
from dlkernels.models.mlp import MLP, PlainMLP, linear_relu
from dlkernels.train import FIRST_STEPS, compare, train

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")

specs = pytest.mark.parametrize("spec", MODELS.values(), ids=MODELS.keys())


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


def built_twice(spec: ModelSpec) -> tuple[torch.nn.Module, torch.nn.Module]:
    """(ours, native) from the same seed."""
    torch.manual_seed(7)
    ours = spec.build(dlkernels.nn)
    torch.manual_seed(7)
    return ours, spec.build(torch.nn)


@specs
def test_same_seed_same_parameters(spec: ModelSpec) -> None:
    ours, native = (model.state_dict() for model in built_twice(spec))
    assert list(ours) == list(native)
    for name in ours:
        assert torch.equal(ours[name], native[name]), name


@specs
def test_state_dict_moves_between_the_worlds(spec: ModelSpec) -> None:
    ours, native = spec.build(dlkernels.nn), spec.build(torch.nn)
    x, _ = spec.batch()
    native(x)  # moves BatchNorm's running statistics away from their start
    for source, target in ((native, ours), (ours, native)):
        target.load_state_dict(source.state_dict())
        torch.testing.assert_close(target.eval()(x), source.eval()(x), rtol=1e-5, atol=1e-5)
        for p in target.parameters():
            torch.nn.init.normal_(p, std=0.1)


@specs
def test_ours_runs_on_our_kernels(spec: ModelSpec) -> None:
    """Every matrix product in our graph is an operation of ours; native's graph has none."""

    def graph(model: torch.nn.Module) -> list[str]:
        todo, seen = [model(spec.batch()[0]).grad_fn], {}
        while todo:
            node = todo.pop()
            if node is not None and node not in seen:
                seen[node] = node.name()
                todo += [before for before, _ in node.next_functions]
        return list(seen.values())

    ours, native = (graph(model) for model in built_twice(spec))
    layers = sum(isinstance(m, torch.nn.Linear) for m in spec.build(torch.nn).modules())
    assert native.count("AddmmBackward0") == layers
    assert "AddmmBackward0" not in ours
    assert sum(name.startswith("_Linear") for name in ours) == layers


@specs
def test_learns_to_97_percent(spec: ModelSpec) -> None:
    history = train(spec, progress=False)
    assert len(history.val_accuracy) == spec.epochs
    assert history.val_accuracy[-1] >= 0.97
    assert history.train_loss[-1] < 0.2 * history.train_loss[0]


def without_dropout(model: torch.nn.Module) -> torch.nn.Module:
    for layer in model.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0
    return model


@specs
def test_same_curve_as_native(spec: ModelSpec) -> None:
    """Both follow the float64 run; ours strays from it no further than the design's rule allows beside native's own error. Without
    dropout, whose masks are not the same in the two worlds."""
    build = spec.build
    spec = dataclasses.replace(spec, build=lambda nn: without_dropout(build(nn)))
    exact = torch.tensor(train(spec, torch.nn, epochs=1, dtype=torch.float64, progress=False).first_losses)
    native = torch.tensor(train(spec, torch.nn, epochs=1, progress=False).first_losses)
    ours = torch.tensor(train(spec, epochs=1, progress=False).first_losses)
    native_error, our_error = (native - exact).abs().max(), (ours - exact).abs().max()
    assert len(exact) >= 20
    assert our_error <= 2 * native_error + 1e-5 * exact.abs().max(), f"ours {our_error:.1e}, native {native_error:.1e}"


def test_a_run_repeats_bit_for_bit_and_leaves_the_random_numbers_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    first = train("mlp", epochs=1, progress=False)
    assert torch.equal(torch.rand(4), expected)
    assert train("mlp", epochs=1, progress=False).first_losses == first.first_losses
    assert train("mlp", epochs=1, seed=1, progress=False).first_losses != first.first_losses


def test_compare_gives_the_rows_of_the_results_file() -> None:
    rows = compare("mlp_even_odd", epochs=5, progress=False, min_seconds=0.05).rows()
    assert json.loads(json.dumps(rows)) == rows
    assert [row["provider"] for row in rows] == ["eager", "dlkernels"]
    for row in rows:
        assert row["model"] == "mlp_even_odd"
        assert len(row["train_loss"]) == len(row["val_loss"]) == len(row["val_accuracy"]) == 5
        assert len(row["first_losses"]) == FIRST_STEPS
        assert row["parameters"] == sum(p.numel() for p in MLP(20, [128, 64, 32], 2).parameters())
        assert 0 < row["step"]["p20_s"] <= row["step"]["median_s"] <= row["step"]["p80_s"]
        assert row["step"]["batch"] == 64
        assert row["seconds"] > 0
        assert not row["interrupted"]


def test_ctrl_c_keeps_the_finished_epochs() -> None:
    calls = 0

    def impatient(logits: Tensor, y: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 60:  # an epoch is 23 training steps and one look at the held-out rows
            raise KeyboardInterrupt
        return torch.nn.functional.cross_entropy(logits, y)

    history = train(dataclasses.replace(MODELS["mlp"], loss=lambda nn: impatient), progress=False)
    assert history.interrupted
    assert len(history.train_loss) == len(history.val_accuracy) == 2


def test_ctrl_c_while_timing_keeps_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped_at_once(*_: object, **__: object) -> None:
        raise Interrupted({})

    monkeypatch.setattr(dlkernels.train.race, "interleave", stopped_at_once)
    both = compare("mlp", epochs=1, progress=False)
    assert both.native.interrupted
    assert both.ours.interrupted
    assert [len(row["train_loss"]) for row in both.rows()] == [1, 1]
    assert not any("step" in row for row in both.rows())


def test_threads_are_restored() -> None:
    before = torch.get_num_threads()
    train("mlp", epochs=1, threads=2, progress=False)
    assert torch.get_num_threads() == before


def test_split_is_fixed_disjoint_and_in_proportion() -> None:
    split = data.digits()
    assert (len(split.x_train), len(split.x_val)) == (1437, 360)
    assert split.x_train.min() == 0
    assert split.x_train.max() == 1
    assert split.y_val.bincount().min() >= 35
    data.digits.cache_clear()
    assert torch.equal(data.digits().x_val, split.x_val)
    train_rows = {tuple(row) for row in split.x_train.tolist()}
    assert not any(tuple(row) in train_rows for row in split.x_val.tolist())


def test_the_other_two_data_sets_are_the_same_digits() -> None:
    small, large, even_odd = data.digits(), data.digits_28x28(), data.digits_even_odd()
    assert torch.equal(large.x_val.reshape(-1, 28, 28)[:, 3:26:3, 3:26:3].reshape(-1, 64), small.x_val)
    assert large.x_val.sum().item() == pytest.approx(9 * small.x_val.sum().item())
    torch.testing.assert_close(even_odd.x_train.T.cov(), torch.eye(20), atol=1e-3, rtol=0)
    assert torch.equal(even_odd.y_val, small.y_val % 2)


def test_missing_scikit_learn_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    data.digits.cache_clear()
    with pytest.raises(ImportError, match=r"pip install dlkernels\[course\]"):
        data.digits()


def test_native_twin_of_linear_relu() -> None:
    layer, x = linear_relu(torch.nn, 5, 3), torch.randn(4, 5)
    assert isinstance(layer, torch.nn.Linear)
    assert torch.equal(layer(x), torch.relu(torch.nn.functional.linear(x, layer.weight, layer.bias)))
    assert type(linear_relu(dlkernels.nn, 5, 3)) is dlkernels.nn.LinearReLU


@pytest.mark.parametrize("model", [MLP, PlainMLP])
@pytest.mark.parametrize("sizes", [(0, [4], 2), (4, [-1], 2), (4, [3], 0), (4, [2.5], 1)])
def test_bad_sizes_are_named(model: type, sizes: tuple) -> None:
    with pytest.raises(ValueError, match="in_dim, hidden and out_dim must be positive integers, got"):
        model(*sizes)


def test_no_hidden_layer_is_a_linear_model() -> None:
    assert [tuple(p.shape) for p in PlainMLP(4, [], 2).parameters()] == [(2, 4), (2,)]


def test_unknown_model_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="mlp_plain"):
        train("resnet")
