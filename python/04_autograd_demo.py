"""Lesson 4: backpropagation, by hand and by machine.

A gradient answers one question: if I turn this number up a little, how much does the loss go up? Backpropagation asks it for
every number in the network at once, from the loss backwards, one layer at a time.

You will take one derivative by hand, then a whole two-layer network, compare every gradient with what the kernels return,
and see with your own eyes how gradients vanish and explode with depth.

Read beside it: dlkernels/ops/linear.py. The four backward lines at its top are the ones derived below.
"""

# %%
import torch
from lesson import BLUE, GREY, ORANGE, QUICK, plt, save, title
from torch import Tensor

import dlkernels.functional as F
import dlkernels.nn as nn

torch.manual_seed(0)
torch.set_num_threads(1)  # everything here is tiny: waking a second thread would cost more than it computes

# %% [markdown]
# ## One weight
# L = (w x - y)^2 with w = 2, x = 3, y = 9. Name the steps, differentiate each, multiply:
#
#     p = w x        e = p - y        L = e^2
#
#     dL/de = 2 e = -6      de/dp = 1      dp/dw = x = 3        dL/dw = -6 * 1 * 3 = -18

# %%
title("One weight, three ways")
w = torch.tensor(2.0, requires_grad=True)
x, y = torch.tensor(3.0), torch.tensor(9.0)

loss = (w * x - y) ** 2
loss.backward()
by_chain_rule = 2 * (w.item() * x - y) * 1 * x


def loss_at(w: float) -> float:
    return (w * x.item() - y.item()) ** 2


nudge = 1e-4
by_nudging = (loss_at(2 + nudge) - loss_at(2 - nudge)) / (2 * nudge)
print(f"chain rule {by_chain_rule.item():.1f}   autograd {w.grad.item():.1f}   nudging w and looking {by_nudging:.4f}")
assert w.grad.item() == by_chain_rule.item() == -18

# %% [markdown]
# Nudging needs two evaluations of the loss *per weight*: two million for a network with a million weights. Backpropagation
# needs one backward pass for all of them, at about the price of two forward passes.
#
# ## Gradients add up
# `backward()` adds to `.grad`. That is right when one weight is used twice, and a classic bug when a training loop forgets
# `zero_grad()`.

# %%
title("backward() adds")
for call in (2, 3):
    ((w * x - y) ** 2).backward()
    print(f"  after call {call} without zero_grad: w.grad = {w.grad.item():.0f}")

# %% [markdown]
# ## A two-layer network, by hand
#
#     a = x W1^T + b1         x [M, K]   W1 [H, K]   b1 [H]   a [M, H]
#     h = relu(a)             h [M, H]
#     z = h W2^T + b2         W2 [N, H]   b2 [N]   z [M, N]
#     L = cross_entropy(z, t) = -mean_m log p[m, t_m],   p = softmax(z)
#
# Backwards. Write d<name> for dL/d<name>; it always has the shape of <name>, and that alone tells you which side to transpose.
#
#     dz  = (p - onehot(t)) / M          "how wrong", as for the single neuron in lesson 1
#     dW2 = dz^T h                       [N, M] [M, H]
#     db2 = sum_m dz                     b2 was added to every row, so it collects from every row
#     dh  = dz W2                        [M, N] [N, H]
#     da  = dh * (a > 0)                 relu passes the gradient where it passed the signal
#     dW1 = da^T x      db1 = sum_m da      dx = da W1

# %%
title("Two layers by hand, against the kernels")
M, K, H, N = 32, 20, 16, 5


def two_layers(dtype: torch.dtype) -> dict[str, Tensor]:
    """x, the parameters and the labels t, the same numbers in every dtype."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"x": (M, K), "W1": (H, K), "b1": (H,), "W2": (N, H), "b2": (N,)}
    values = {name: (torch.randn(*shape, generator=generator) / 2).to(dtype).requires_grad_() for name, shape in shapes.items()}
    return values | {"t": torch.randint(N, (M,), generator=generator)}


def gradients_by_hand(x: Tensor, W1: Tensor, b1: Tensor, W2: Tensor, b2: Tensor, t: Tensor) -> dict[str, Tensor]:
    a = x @ W1.T + b1
    h = a.clamp(min=0)
    z = h @ W2.T + b2
    p = torch.softmax(z, 1)

    dz = (p - torch.eye(N, dtype=x.dtype)[t]) / M
    dW2, db2 = dz.T @ h, dz.sum(0)
    dh = dz @ W2
    da = dh * (a > 0)
    dW1, db1 = da.T @ x, da.sum(0)
    dx = da @ W1
    return {"x": dx, "W1": dW1, "b1": db1, "W2": dW2, "b2": db2}


def gradients_by_kernels(x: Tensor, W1: Tensor, b1: Tensor, W2: Tensor, b2: Tensor, t: Tensor) -> dict[str, Tensor]:
    h = F.linear_relu(x, W1, b1)
    z = F.linear(h, W2, b2)
    loss = F.cross_entropy(z, t)
    grads = torch.autograd.grad(loss, (x, W1, b1, W2, b2))
    return dict(zip(("x", "W1", "b1", "W2", "b2"), grads))


print("largest difference, relative to the largest gradient:")
print(f"  {'':4} {'shape':>10} {'float64':>10} {'float32':>10}")
exact = {name: g.detach() for name, g in gradients_by_hand(**two_layers(torch.float64)).items()}
errors = {}
for dtype in (torch.float64, torch.float32):
    for name, g in gradients_by_kernels(**two_layers(dtype)).items():
        errors[name, dtype] = ((g - exact[name]).abs().max() / exact[name].abs().max()).item()
for name, g in exact.items():
    print(f"  d{name:3} {tuple(g.shape)!s:>10} {errors[name, torch.float64]:10.1e} {errors[name, torch.float32]:10.1e}")
assert max(error for (_, dtype), error in errors.items() if dtype == torch.float64) < 1e-13
assert max(errors.values()) < 1e-5

# %% [markdown]
# The differences are rounding: float64 keeps 16 digits, float32 keeps 7. Same mathematics, same numbers.
#
# ## What the machine remembers
# While the forward pass runs, PyTorch writes down which operation made each tensor. `loss.backward()` walks that list from
# the end. A layer of ours is *one* entry, with its own backward; PyTorch's own two calls are several.

# %%
title("The graph behind a loss")


def operations(tensor: Tensor) -> list[str]:
    """Names of the recorded operations on the way back from ``tensor``, along the input that was computed and not given."""
    names, node = [], tensor.grad_fn
    while node is not None:
        names.append(node.name())
        node = next((before for before, _ in node.next_functions if before and "AccumulateGrad" not in before.name()), None)
    return names


v = two_layers(torch.float32)
ours = F.cross_entropy(F.linear(F.linear_relu(v["x"], v["W1"], v["b1"]), v["W2"], v["b2"]), v["t"])
native_h = torch.relu(torch.nn.functional.linear(v["x"], v["W1"], v["b1"]))
native = F.cross_entropy(torch.nn.functional.linear(native_h, v["W2"], v["b2"]), v["t"])
print("  ours  ", " <- ".join(operations(ours)))
print("  native", " <- ".join(operations(native)))

# %% [markdown]
# ## Vanishing
# The gradient that reaches layer 1 of a deep network has passed one factor W^T and one factor act'(a) per layer. The
# sigmoid's derivative is s(1 - s) <= 1/4, so even with well-chosen weights every layer takes three quarters away. The ReLU's
# is 0 or 1: what passes, passes whole, and He's weights (lesson 7) make up for what does not.

# %%
title("How much gradient reaches the first of D layers?")
WIDTH = 64


def first_layer_gradient(depth: int, activation: str, gain: float) -> float:
    """Length of dL/dx after ``depth`` layers, with L chosen so that it starts at length 1 behind the last layer."""
    generator = torch.Generator().manual_seed(depth)
    x = torch.randn(128, WIDTH, generator=generator, requires_grad=True)
    h = x
    for _ in range(depth):
        weight = torch.randn(WIDTH, WIDTH, generator=generator) * gain / WIDTH**0.5
        h = F.linear_act(h, weight, torch.zeros(WIDTH), activation=activation)
    dy = torch.randn(h.shape, generator=generator)
    (dx,) = torch.autograd.grad(h, x, dy / dy.norm())
    return dx.norm().item()


settings = {
    "sigmoid, gain 1": ("sigmoid", 1.0, ORANGE),
    "tanh, gain 1": ("tanh", 1.0, GREY),
    "relu, gain sqrt 2 (He)": ("relu", 2**0.5, BLUE),
    "relu, gain 2 (too large)": ("relu", 2.0, "black"),
}
depths = [1, 2, 5, 10] if QUICK else [1, 2, 3, 5, 8, 12, 16, 20, 25, 30]
lengths = {name: [first_layer_gradient(d, act, gain) for d in depths] for name, (act, gain, _) in settings.items()}
print(f"  {'':26}" + "".join(f"{f'D={d}':>9}" for d in depths))
for name, row in lengths.items():
    print(f"  {name:26}" + "".join(f"{length:9.0e}" for length in row))

figure, plot = plt.subplots(figsize=(6, 3.6))
for name, (_, _, color) in settings.items():
    plot.semilogy(depths, lengths[name], "o-", color=color, label=name, ms=3)
plot.axhline(1, color=GREY, lw=0.5)
plot.set(xlabel="layers between the loss and the input", ylabel="length of the gradient", title="Vanishing and exploding")
plot.legend(fontsize=8)
save(figure, "04_vanishing.png")

# %% [markdown]
# A straight line on a logarithmic axis: exponential, in both directions.
#
# ## Exploding, and the leash
# Too large a gain is as bad the other way. Clipping is the cheap remedy: if the gradient of all parameters together is longer
# than a limit, shorten it to the limit. Its *direction* is kept.

# %%
title("Clipping")
layers = [nn.LinearReLU(WIDTH, WIDTH) for _ in range(10)]
model = nn.Sequential(*layers, nn.Linear(WIDTH, N))
for p in model.parameters():
    if p.dim() == 2:
        torch.nn.init.normal_(p, std=2 / WIDTH**0.5)
F.cross_entropy(model(torch.randn(128, WIDTH)), torch.randint(N, (128,))).backward()
before = torch.cat([p.grad.flatten() for p in model.parameters()])
reported = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
after = torch.cat([p.grad.flatten() for p in model.parameters()])
cosine = torch.dot(before, after) / (before.norm() * after.norm())
print(f"  length {before.norm():.1f} (clip_grad_norm_ reports {reported:.1f}) -> {after.norm():.4f}")
print(f"  cosine of the angle between the gradient before and after: {cosine:.6f}")

# %% [markdown]
# ## Keep
# * d<name> has the shape of <name>. Matrix product forward: two matrix products backward.
# * A sum forward is a copy backward; a copy (broadcast) forward is a sum backward. That is db = sum_m dz.
# * Depth multiplies. Keep every layer's factor near 1: ReLU with He weights, normalisation, skip connections; clip the rest.
#
# Next: `05_optimizers.py`, what to do with a gradient once you have it.
