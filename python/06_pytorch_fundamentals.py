"""Lesson 6: tensors, and what a kernel sees of them.

A tensor is a block of memory and a way to walk through it: a start, a shape, and for every dimension a stride, the number of
elements to the next neighbour. Almost everything convenient about tensors (transposing, slicing, broadcasting) changes the
walk and leaves the memory alone, and almost everything about their *speed* comes from the walk, too.

Read beside it: dlkernels/ops/linear.py for what a kernel promises, csrc/cpu/gemm.h for how one deals with strides.
"""

# %%
import time
from collections.abc import Callable

import numpy as np
import torch
from lesson import GREY, QUICK, plt, save, title
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import dlkernels
import dlkernels.functional as F
import dlkernels.nn as nn
from dlkernels.data import digits

torch.manual_seed(0)

# %% [markdown]
# ## Making them
# Every tensor has a shape, a dtype and a device. Read shapes aloud: "a batch of 64 rows with 20 features".

# %%
title("Shape, dtype, device")
X = torch.randn(64, 20)
W = torch.zeros(10, 20)
for name, t in {"X": X, "W": W, "labels": torch.tensor([3, 1, 4]), "mask": X > 0}.items():
    print(f"  {name:7} shape {tuple(t.shape)!s:9} dtype {t.dtype!s:14} device {t.device}   {t.numel() * t.element_size():5} bytes")
print(f"  X @ W.T, a layer's product, has shape {tuple((X @ W.T).shape)};  X.mean(dim=0), one per feature, {tuple(X.mean(dim=0).shape)}")

# %% [markdown]
# A dtype is a bargain between digits and bytes. float32 holds 7 digits, float64 16, bfloat16 under 3 but in half the memory.
# 1/3 shows it; so does a sum that stops growing, which is why kernels read bfloat16 but *add up* in float32.

# %%
for dtype in (torch.float64, torch.float32, torch.bfloat16):
    ones = torch.zeros((), dtype=dtype)
    for _ in range(1000):
        ones += 1
    print(f"  {dtype!s:14} 1/3 = {torch.tensor(1 / 3, dtype=dtype).item():.16f}   1 + 1 + ... (1000 times) = {ones.item():.0f}")

# %% [markdown]
# ## Broadcasting
# Shapes are lined up from the right. A dimension of size 1, or one that is not there, is repeated. Nothing is copied: the
# repeated dimension gets stride 0, so every step along it lands on the same element.

# %%
title("Broadcasting")
b = torch.tensor([10.0, 20.0, 30.0])
print("  [2, 3] + [3]    the bias of a layer, added to every row:", (torch.ones(2, 3) + b).tolist())
print("  [3, 1] * [3]    every pair:                            ", (b[:, None] * torch.tensor([1.0, 2.0, 3.0])).tolist())
print("  b.expand(2, 3)  has strides", b.expand(2, 3).stride(), "and needs no new memory:", b.expand(2, 3).data_ptr() == b.data_ptr())

prediction, target = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([1.0, 2.0, 3.0])
wrong, right = prediction - target, prediction[:, 0] - target
print(f"  the classic trap: a perfect prediction of shape [3, 1], minus a target [3], has shape {tuple(wrong.shape)}")
print(f"                    mean square 'error' {wrong.square().mean():.2f}; with equal shapes {right.square().mean():.2f}")

# %% [markdown]
# ## Views and strides
# Element [i, j] lives at  start + i * stride[0] + j * stride[1].  A transpose swaps the strides, a slice moves the start, a
# step multiplies a stride. All of them are views: write through one, and all the others see it.

# %%
title("One block of memory, many tensors")
x = torch.arange(12.0).reshape(3, 4)
views = {"x": x, "x.T": x.T, "x[:, 1:3]": x[:, 1:3], "x[::2]": x[::2], "x[1].expand(3, 4)": x[1].expand(3, 4)}
for name, view in views.items():
    start, contiguous = view.storage_offset(), view.is_contiguous()
    print(f"  {name:18} shape {tuple(view.shape)!s:7} strides {view.stride()!s:7} starts at {start}   contiguous {contiguous}")
x.T[3, 0] = 99
print("  after x.T[3, 0] = 99, x[0, 3] is", x[0, 3].item())
print("  x.reshape(12) is a view:", x.reshape(12).data_ptr() == x.data_ptr())
print("  x.T.reshape(12) cannot be one, so it copies:", x.T.reshape(12).data_ptr() != x.data_ptr())

figure, axes = plt.subplots(1, len(views), figsize=(11, 2.6))
for plot, (name, view) in zip(axes, views.items()):
    rows, columns = (torch.arange(size) for size in view.shape)
    address = view.storage_offset() + rows[:, None] * view.stride(0) + columns * view.stride(1)
    plot.imshow(address, cmap="viridis", vmin=0, vmax=11)
    for i in range(view.shape[0]):
        for j in range(view.shape[1]):
            plot.text(j, i, address[i, j].item(), ha="center", va="center", color="white" if address[i, j] < 8 else "black", fontsize=9)
    plot.set(title=f"{name}\nstrides {view.stride()}", xticks=[], yticks=[])
figure.suptitle("where in memory each element of a view lives", color=GREY)
save(figure, "06_strides.png")

# %% [markdown]
# ## Where a kernel meets a stride
# Memory reaches the processor in lines of 64 bytes: 16 floats, used or not. A sum over neighbours uses all 16, a whole vector
# register at a time; a sum over elements 16 apart uses one, and throws 15 away.


# %%
def best_milliseconds(call: Callable[[], object], repeats: int = 5 if QUICK else 30) -> float:
    """The fastest of ``repeats`` runs: what the machine can do when nobody else wants it."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1000 * min(times)


title("The price of a stride")
torch.set_num_threads(1)
big = torch.randn(1024, 1024)
near, far = big.flatten()[:65536], big.flatten()[::16][:65536]
print(f"  sum of 65536 neighbours            {best_milliseconds(near.sum):.4f} ms")
print(f"  sum of 65536 elements, 16 apart    {best_milliseconds(far.sum):.4f} ms")

# %% [markdown]
# A matrix product can do better, because it uses each element many times. The kernel first copies a block of x and a block of
# W into the order in which it will read them ("packing"); after that, strides no longer matter. Packing reads each element
# once and the product uses it N or M times, so any strides are welcome, at almost no cost. That is also why `x @ W.T` needs
# no transposed copy: the transpose is a stride.

# %%
M, K, N = 256, 512, 512
weight, bias = torch.randn(N, K), torch.randn(N)
layouts = {
    "contiguous": torch.randn(M, K),
    "transposed": torch.randn(K, M).T,
    "every 2nd column": torch.randn(M, 2 * K)[:, ::2],
    "one row, expanded": torch.randn(1, K).expand(M, K),
}
print(f"\n  linear_relu, [{M}, {K}] times [{N}, {K}] transposed")
for name, t in layouts.items():
    exact = torch.relu(t.double() @ weight.double().T + bias.double())
    error = (F.linear_relu(t, weight, bias).double() - exact).abs().max() / exact.max()
    choice = dlkernels.explain("linear_relu", t, weight, bias)
    milliseconds = best_milliseconds(lambda t=t: F.linear_relu(t, weight, bias))
    print(f"    {name:18} strides {t.stride()!s:9} {milliseconds:7.3f} ms   error {error:.0e}   runs on {choice.implementation}")
    assert error < 1e-5

# %% [markdown]
# ## NumPy
# `from_numpy` and `.numpy()` share memory: no copy, and what one side writes the other side sees.

# %%
title("NumPy and PyTorch, one memory")
array = np.array([1, 2, 3], dtype=np.float32)
shared, copied = torch.from_numpy(array), torch.tensor(array)
array[0] = 100
print("  from_numpy sees the change:", shared.tolist(), "  torch.tensor made a copy:", copied.tolist())
print("  same address:", shared.data_ptr() == array.ctypes.data, "  back again, still shared:", np.shares_memory(shared.numpy(), array))
tracked = torch.ones(2, requires_grad=True)
try:
    tracked.numpy()
except RuntimeError as error:
    print("  a tensor with a history refuses:", str(error).split(".")[0], "-> .detach().cpu().numpy()", tracked.detach().cpu().numpy())

# %% [markdown]
# ## Autograd in four words
# A *leaf* is a tensor you made; a *result* remembers in `grad_fn` how it was made; `detach()` forgets; `no_grad()` never
# writes down. Lesson 4 has the mathematics.

# %%
title("Autograd")
w = torch.ones(3, requires_grad=True)
loss = (w * torch.tensor([1.0, 2.0, 3.0])).sum()
loss.backward()
print(f"  w is a leaf: {w.is_leaf}, w.grad = {w.grad.tolist()}")
print(f"  loss was made by {loss.grad_fn.name()}; detached, by {loss.detach().grad_fn}")
with torch.no_grad():
    print(f"  inside no_grad, (w * 2).requires_grad is {(w * 2).requires_grad}")

# %% [markdown]
# What the backward pass will need is kept, not copied. Overwriting it in between would give a wrong gradient, so PyTorch counts
# the writes to each tensor and refuses. Our kernels keep their inputs the same way and are protected by the same count.


# %%
def gradient_after_overwriting(x: Tensor) -> str:
    y = F.linear(x, torch.ones(2, 3, requires_grad=True))
    x.mul_(2)  # dW = dy^T x needs the old x
    try:
        y.sum().backward()
    except RuntimeError as error:
        return str(error).split(":")[0]
    return "a wrong gradient, and nobody noticed"


print("  overwrite x between forward and backward:", gradient_after_overwriting(torch.ones(4, 3)))

# %% [markdown]
# ## DataLoader
# A data set answers "give me row i"; a loader shuffles the rows and stacks them into batches. `num_workers=2` would prepare
# batches in other processes, worth it when reading a row is slow (pictures on disk), not when the rows are already here.

# %%
title("DataLoader")
data = digits()
loader = DataLoader(TensorDataset(data.x_train, data.y_train), batch_size=64, shuffle=True, generator=torch.Generator().manual_seed(0))
batches = [(tuple(x.shape), tuple(y.shape)) for x, y in loader]
print(f"  {len(data.x_train)} rows make {len(batches)} batches; the first is {batches[0]}, the last {batches[-1]}")
x, y = next(iter(loader))
print(f"  x: {x.dtype}, {x.min():.0f} to {x.max():.0f};  y: {y.dtype}, class numbers such as {y[:8].tolist()}")

# %% [markdown]
# ## The device line
# One line decides where the work is done. The layer does not change; the kernel behind it does: C++ with SIMD on a CPU, Triton
# on a GPU. Model and data must be on the same device, or you get an error that says so.

# %%
title("The device line")
device = "cuda" if torch.cuda.is_available() else "cpu"
layer = nn.LinearReLU(64, 10).to(device)
output = layer(x.to(device))
choice = dlkernels.explain("linear_relu", x.to(device), layer.weight, layer.bias)
print(f"  output {tuple(output.shape)} on {output.device}; it came from: {choice.implementation} ({choice.reason})")

# %% [markdown]
# ## Keep
# * tensor = memory + start + shape + strides. Views are free; `reshape` copies only when no strides can describe the result.
# * Broadcasting lines shapes up from the right. Print shapes when a loss looks strange.
# * A kernel that reuses its data packs it and takes any strides; one that streams through it wants them contiguous.
#
# Next: `07_mlp_pytorch.py` builds a network and trains it.
