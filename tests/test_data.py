"""The images that models learn from: shared out, scaled, and what is said where their package is missing."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from dlkernels import data

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
pytest.importorskip("skimage", reason="the faces come with scikit-image")


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


def test_digits_as_images_are_the_same_rows() -> None:
    assert torch.equal(data.digits_images().x_val.flatten(1), data.digits_28x28().x_val)


def test_faces_are_shared_out_and_mirrored_for_learning_alone() -> None:
    split = data.faces()
    assert (split.x_train.shape, split.x_val.shape) == ((200, 1, 25, 25), (100, 1, 25, 25))
    assert (split.x_train.min(), split.x_train.max()) == (0, 1)
    assert split.y_train.bincount().tolist() == [100, 100]
    assert split.y_val.bincount().tolist() == [50, 50]
    assert torch.equal(split.x_train[:100].flip(-1), split.x_train[100:])
    seen = {tuple(image.flatten().tolist()) for image in split.x_train}
    assert not any(tuple(image.flatten().tolist()) in seen for image in split.x_val)


@pytest.mark.parametrize(("module", "load"), [("sklearn.datasets", data.digits), ("skimage.data", data.faces)])
def test_missing_package_says_what_to_install(module: str, load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    load.cache_clear()
    with pytest.raises(ImportError, match=r"pip install dlkernels\[course\]"):
        load()
