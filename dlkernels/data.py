"""Real data for the teaching models, out of packages, so that nothing is downloaded.

digits*   1797 handwritten digits, 8 x 8 pixels, written by 13 people; with scikit-learn. Source: the test part of E. Alpaydin and
          C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998.
faces     100 faces and 100 pieces of photographs without one, 25 x 25 pixels; with scikit-image. Source: G. B. Huang et al., "Labeled
          Faces in the Wild", 2007.
eeg       800 samples of the voltages at four places of a head; with matplotlib, among its sample data.

Texts are in data_text.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class Split:
    """Features ``x`` float32 [M, K] or [M, C, H, W] and class numbers ``y`` int64 [M], to learn from and to be judged by.

    Of texts ``x`` holds token numbers, int64 [M, T], and ``y`` may have one for each of them.
    """

    x_train: Tensor
    y_train: Tensor
    x_val: Tensor
    y_val: Tensor

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Split:
        """The same split with its features in ``dtype``, on ``device``; token numbers stay whole numbers."""
        kept = dtype if self.x_train.is_floating_point() else self.x_train.dtype
        return Split(self.x_train.to(device, kept), self.y_train.to(device), self.x_val.to(device, kept), self.y_val.to(device))


@lru_cache(maxsize=4)
def digits(seed: int = 0, held_out: float = 0.2) -> Split:
    """The digits as rows of 64 grey values in [0, 1]: 1437 to train on, 360 held out, every class in proportion.

    Raises ``ImportError`` when scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError("the handwritten digits come with scikit-learn, which is missing: pip install dlkernels[course]") from error
    pixels, labels = load_digits(return_X_y=True)  # grey values 0 .. 16
    x_train, x_val, y_train, y_val = train_test_split(pixels / 16, labels, test_size=held_out, stratify=labels, random_state=seed)
    return Split(
        torch.tensor(x_train, dtype=torch.float32),
        torch.tensor(y_train, dtype=torch.int64),
        torch.tensor(x_val, dtype=torch.float32),
        torch.tensor(y_val, dtype=torch.int64),
    )


def digits_28x28(seed: int = 0) -> Split:
    """The digits on MNIST's canvas, [M, 784]: every pixel drawn 3 x 3, with a margin of 2."""

    def enlarge(x: Tensor) -> Tensor:
        canvas = x.reshape(-1, 8, 8).repeat_interleave(3, 1).repeat_interleave(3, 2)
        return torch.nn.functional.pad(canvas, (2, 2, 2, 2)).reshape(-1, 784)

    small = digits(seed)
    return Split(enlarge(small.x_train), small.y_train, enlarge(small.x_val), small.y_val)


def digits_images(seed: int = 0) -> Split:
    """``digits_28x28`` as images of one channel, [M, 1, 28, 28]."""
    rows = digits_28x28(seed)
    return Split(rows.x_train.view(-1, 1, 28, 28), rows.y_train, rows.x_val.view(-1, 1, 28, 28), rows.y_val)


@lru_cache(maxsize=4)
def faces(seed: int = 0, held_out: int = 50) -> Split:
    """Is it a face (1) or not (0)? Grey images [M, 1, 25, 25] in [0, 1]; of each class ``held_out`` are held out.

    A face seen in the mirror is a face, so those to learn from are there twice, the second time mirrored.

    Raises ``ImportError`` when scikit-image is missing.
    """
    try:
        from skimage.data import lfw_subset
    except ImportError as error:
        raise ImportError("the faces come with scikit-image, which is missing: pip install dlkernels[course]") from error
    faces, others = torch.tensor(lfw_subset(), dtype=torch.float32).unsqueeze(1).chunk(2)
    order = torch.randperm(len(faces), generator=torch.Generator().manual_seed(seed))
    learn, judge = order[held_out:], order[:held_out]
    x_train, x_val = torch.cat([others[learn], faces[learn]]), torch.cat([others[judge], faces[judge]])
    y_train, y_val = torch.arange(2).repeat_interleave(len(learn)), torch.arange(2).repeat_interleave(len(judge))
    return Split(torch.cat([x_train, x_train.flip(-1)]), y_train.repeat(2), x_val, y_val)


@lru_cache(maxsize=4)
def eeg(window: int = 20, held_out: float = 0.25) -> Split:
    """The next four voltages [M, 4] from the last ``window`` of each [M, window, 4]; the end of the record is held out.

    Mean and scale come from the part to learn from, and no window reaches from there into the other.

    Raises ``ImportError`` when matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("the voltages come with matplotlib, which is missing: pip install dlkernels[course]") from error
    file = Path(matplotlib.get_data_path()) / "sample_data" / "eeg.dat"
    record = torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.float64).view(-1, 4)
    first = int(len(record) * (1 - held_out))
    record = ((record - record[:first].mean(0)) / record[:first].std(0)).float()

    def windows(part: Tensor) -> tuple[Tensor, Tensor]:
        return part[:-1].unfold(0, window, 1).transpose(1, 2).contiguous(), part[window:]

    return Split(*windows(record[:first]), *windows(record[first:]))


def digits_even_odd(components: int = 20, seed: int = 0) -> Split:
    """Is the digit even (0) or odd (1)? From its first principal components, each scaled to variance 1, [M, components].

    Mean, directions and scale come from the training rows alone, so that the held-out rows stay unseen.
    """
    small = digits(seed)
    mean = small.x_train.mean(0)
    _, _, directions = torch.linalg.svd(small.x_train - mean, full_matrices=False)
    directions = directions[:components].T
    scale = ((small.x_train - mean) @ directions).std(0)

    def project(x: Tensor) -> Tensor:
        return (x - mean) @ directions / scale

    return Split(project(small.x_train), small.y_train % 2, project(small.x_val), small.y_val % 2)
