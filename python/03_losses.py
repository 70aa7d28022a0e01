"""Lesson 3: the forward pass and the loss, the one number that training makes small.

Training follows the loss's *gradient*, so the loss decides what a network cares about: which errors weigh most, and which it
never feels. You will compute a forward pass and each loss by hand, drag a line with outliers, break a loss with float32, and
see what the most common mistake with CrossEntropyLoss costs.

Read beside it: dlkernels/ops/losses.py, dlkernels/ops/cross_entropy.py
"""

# %%
import math
from functools import partial

import torch
from lesson import BLUE, GREY, ORANGE, QUICK, plt, save, title
from torch import Tensor

import dlkernels.functional as F
import dlkernels.nn as nn
import dlkernels.optim as optim
from dlkernels.data import digits

torch.manual_seed(0)
torch.set_num_threads(1)  # everything here is tiny: waking a second thread would cost more than it computes

# %% [markdown]
# ## A forward pass in numbers
# Linear, ReLU, Linear, softmax, loss. Two inputs, three hidden neurons, two classes; the right class is 1.

# %%
title("Forward, step by step")
x, target = torch.tensor([[1.0, 2.0]]), torch.tensor([1])
W1, b1 = torch.tensor([[1.0, -1.0], [0.5, 0.5], [-1.0, 1.0]]), torch.tensor([0.0, -0.5, 0.5])
W2, b2 = torch.tensor([[1.0, 2.0, -1.0], [0.0, 1.0, 1.0]]), torch.tensor([0.5, 0.0])
a = x @ W1.T + b1
h = a.clamp(min=0)
z = h @ W2.T + b2
p = z.exp() / z.exp().sum()
loss = -p[0, 1].log()
for name, value in {"x": x, "a = x W1^T + b1": a, "h = relu(a)": h, "z = h W2^T + b2": z, "p = softmax(z)": p}.items():
    print(f"  {name:16} {[round(number, 4) for number in value[0].tolist()]}")
kernels = F.cross_entropy(F.linear(F.linear_relu(x, W1, b1), W2, b2), target)
print(f"  loss = -log p[1] = {loss:.4f};  the kernels say {kernels:.4f}")
assert abs(kernels - loss) < 1e-5

# %% [markdown]
# ## Numbers: squared or absolute error?
# MSE averages e^2 and its derivative is 2 e: an error ten times as large pulls ten times as hard. MAE averages |e| and its
# derivative is +-1: every error pulls alike. If the prediction is a single constant, MSE chooses the *mean*, where the errors
# balance, and MAE the *median*, where there are as many above as below. Huber's loss is e^2 / 2 up to |e| = delta and a straight
# line beyond: MSE for small errors, MAE for large ones.

# %%
title("A line of slope 2 and intercept 1 through 40 points, 6 of them wrong")


def fit(loss, x: Tensor, y: Tensor) -> Tensor:
    line = torch.zeros(2, requires_grad=True)
    optimizer = optim.Adam([line], lr=0.1)
    scheduler = optim.lr_scheduler.CosineAnnealingLR(optimizer, 500)
    for _ in range(500):
        optimizer.zero_grad()
        loss(line[0] * x + line[1], y).backward()
        optimizer.step()
        scheduler.step()
    return line.detach()


constants = [fit(loss, torch.zeros(5), torch.tensor([1.0, 2.0, 3.0, 4.0, 10.0]))[1].item() for loss in (F.mse_loss, F.l1_loss)]
print("  one constant for 1, 2, 3, 4, 10: MSE {:.2f}, the mean; MAE {:.2f}, the median".format(*constants))
assert abs(constants[0] - 4) < 0.1 and abs(constants[1] - 3) < 0.1
x = torch.linspace(0, 4, 40)
y = 2 * x + 1 + 0.5 * torch.randn(40)
clean = fit(F.mse_loss, x, y)
y[-6:] -= 12
losses = {"MSE": (F.mse_loss, ORANGE), "MAE": (F.l1_loss, BLUE), "Huber, delta 3": (partial(F.huber_loss, delta=3.0), "black")}
lines = {name: fit(loss, x, y) for name, (loss, _) in losses.items()}
for name, (slope, intercept) in {"MSE without outliers": clean, **lines}.items():
    print(f"  {name:20}: slope {slope:5.2f}, intercept {intercept:.2f}")
deltas = [0.1, 1.0, 3.0, 30.0] if QUICK else [0.1, 0.3, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 30.0]
slopes = [fit(partial(F.huber_loss, delta=delta), x, y)[0].item() for delta in deltas]
mse, mae, between = (line[0].item() for line in lines.values())
assert abs(mse - 2) > 1 > 0.6 > abs(mae - 2) and mse < between < mae
assert abs(slopes[0] - mae) < 0.3 and abs(slopes[-1] - mse) < 0.1

figure, (shape, points, sweep) = plt.subplots(1, 3, figsize=(11, 3.2))
error = torch.linspace(-6, 6, 121)
points.scatter(x, y, s=10, color=GREY)
points.plot(x, 2 * x + 1, color=GREY, lw=4, alpha=0.4, label="true line")
for name, (loss, color) in losses.items():
    shape.plot(error, loss(error, torch.zeros(121), reduction="none"), color=color, label=name)
    points.plot(x, lines[name][0] * x + lines[name][1], color=color, label=name)
shape.set(xlabel="error", ylabel="loss", ylim=(0, 20))
points.set(xlabel="x", ylabel="y")
sweep.semilogx(deltas, slopes, "o-", ms=3, color="black", label="Huber")
sweep.axhline(mae, color=BLUE, label="MAE")
sweep.axhline(mse, color=ORANGE, label="MSE")
sweep.set(xlabel="delta", ylabel="slope of the fitted line")
for plot in (shape, points, sweep):
    plot.legend(fontsize=7)
save(figure, "03_outliers.png")

# %% [markdown]
# delta is the dial between the two. MSE is not wrong (for normally distributed noise it is the best); it believes every point.
#
# ## Yes or no: binary cross-entropy
# L = -(y log p + (1 - y) log(1 - p)). With y = 1 only -log p is left, the surprise of seeing something you gave probability p.
# Every further factor of ten costs log 10 more; confident *and* wrong is expensive, without limit.

# %%
title("Binary cross-entropy, y = 1")
for p in (0.99, 0.5, 0.1, 0.01, 0.001):
    by_hand, kernel = -math.log(p), F.binary_cross_entropy(torch.tensor([p]), torch.tensor([1.0])).item()
    print(f"  p = {p:5}: loss {by_hand:.4f}, F.binary_cross_entropy {kernel:.4f}")
    assert abs(by_hand - kernel) < 1e-4

# %% [markdown]
# p comes from a sigmoid, p = s(z). Computed one after the other, that fails in float32. s(-200) is smaller than the smallest
# float, hence 0, and log 0 is minus infinity. On the other side it is worse: s(20) rounds to 1, and log(1 - p) breaks at once.
# Together they simplify, and everything stays finite; the derivative is simply p - y:
#
#     L = max(z, 0) - y z + log(1 + e^-|z|)        dL/dz = s(z) - y
#
# BCEWithLogits computes that. F.binary_cross_entropy cannot: it sees p after the digits are lost. It stops the loss at 100, and
# the gradient that comes out of the sigmoid is 0: the worst mistake of all teaches nothing.


# %%
def textbook(z: Tensor, y: Tensor) -> Tensor:
    p = torch.sigmoid(z)
    return -(y * p.log() if y == 1 else (1 - y) * (1 - p).log()).mean()


title("Loss and gradient of one logit, in float32")
ways = {"textbook": textbook, "sigmoid, then loss": lambda z, y: F.binary_cross_entropy(torch.sigmoid(z), y)}
ways["with logits"] = F.binary_cross_entropy_with_logits
for z, y in ((-2.0, 1.0), (20.0, 0.0), (-200.0, 1.0)):
    exact, exact_gradient = max(z, 0) - y * z + math.log1p(math.exp(-abs(z))), 1 / (1 + math.exp(-z)) - y
    print(f"  z = {z:4.0f}, y = {y:.0f}: exact {exact:6.2f} {exact_gradient:5.2f}", end="")
    for name, way in ways.items():
        logit = torch.tensor([z], requires_grad=True)
        loss = way(logit, torch.tensor([y]))
        (gradient,) = torch.autograd.grad(loss, logit)
        print(f"   {name} {loss.item():6.2f} {gradient.item():5.2f}", end="")
        if name != "sigmoid, then loss":
            right = abs(loss.item() - exact) < 1e-4 and abs(gradient.item() - exact_gradient) < 1e-4
            assert right == (name == "with logits" or z == -2)
    print()

# %% [markdown]
# ## One of C classes: cross-entropy
# The same idea with C classes: L = -log p_t, where t is the right class and p = softmax(z). In terms of the logits
#
#     L = -z_t + log(sum_j e^z_j)        dL/dz = p - onehot(t)
#
# F.cross_entropy does both steps at once, and safely. It wants *raw logits* [M, C] and class numbers [M], and averages.

# %%
title("Cross-entropy by hand")
z = torch.tensor([[2.0, 1.0, 0.5], [0.0, 3.0, -1.0]], requires_grad=True)
t = torch.tensor([0, 2])
by_hand = [-row[right].item() + math.log(sum(math.exp(number) for number in row.tolist())) for row, right in zip(z, t)]
kernel = F.cross_entropy(z, t)
print(f"  rows {by_hand[0]:.4f} and {by_hand[1]:.4f}, mean {sum(by_hand) / 2:.4f};  F.cross_entropy {kernel.item():.4f}")
(dz,) = torch.autograd.grad(kernel, z)
formula = (torch.softmax(z, 1) - torch.eye(3)[t]).detach() / 2
rounded = [[round(number, 4) for number in row] for row in dz.tolist()]
print(f"  dL/dz {rounded};  difference to (softmax - onehot) / 2: {(dz - formula).abs().max():.0e}")
assert abs(sum(by_hand) / 2 - kernel.item()) < 1e-5 and (dz - formula).abs().max() < 1e-6

# %% [markdown]
# ## A free test: the first loss
# An untrained network knows nothing and says about 1/C to every class, so its loss is about -log(1/C) = log C. If yours starts
# far above, its last layer is too loud or the labels are not what you think.

# %%
title("The loss before any training")
data = digits()
for classes in (2, 10, 100):
    network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, classes))
    labels = torch.randint(classes, data.y_train.shape)
    first, loud = (F.cross_entropy(scale * network(data.x_train), labels).item() for scale in (1, 30))
    print(f"  C = {classes:3}: log C = {math.log(classes):.3f}, first loss {first:.3f};  with a last layer 30 times as large {loud:.3f}")
    assert abs(first - math.log(classes)) < 0.2 < loud - first

# %% [markdown]
# ## The most common mistake: softmax before CrossEntropyLoss
# CrossEntropyLoss applies its own softmax. Feed it probabilities p, and it computes
#
#     L = -p_t + log(sum_j e^p_j),        0 <= p_j <= 1,  sum_j p_j = 1
#
# No error message. But now the "logits" cannot differ by more than 1. The best possible answer, p = onehot(t), has
# L = -1 + log(e + C - 1) = log(1 + (C - 1) / e), which is not 0; and the worst, certainty in a wrong class, has L = log(e + C - 1),
# exactly 1 more. (Why the extremes? L is convex in p, so its largest value is at a corner. And for a given p_t, sum e^p_j is
# smallest when the rest is shared equally; then L falls as p_t grows.)
#
# The gradient has to pass the extra softmax: dL/dz = J (softmax(p) - onehot(t)) with J = diag(p) - p p^T. At the start all
# p = 1/C and J divides by C. Where the network is certain, p is a corner and J is 0: right or wrong, it stops learning.

# %%
title("Softmax first: the range of the loss and the size of the gradient, C = 10")
C = 10
floor, ceiling = math.log(1 + (C - 1) / math.e), math.log(math.e + C - 1)
sharpness = 10 ** torch.empty(100_000, 1).uniform_(-1, 2)
p = torch.softmax(sharpness * torch.randn(100_000, C), 1)
anywhere = F.cross_entropy(p, torch.zeros(100_000, dtype=torch.int64), reduction="none")
print(f"  floor log(1 + (C-1)/e) = {floor:.4f}, ceiling log(e + C-1) = {ceiling:.4f}")
print(f"  100,000 random p, from flat to certain: from {anywhere.min():.4f} to {anywhere.max():.4f}")
assert -1e-5 < anywhere.min() - floor < 1e-3 and -1e-5 < ceiling - anywhere.max() < 1e-3


def gradient_length(score: float, softmax_first: bool) -> float:
    """The length of dL/dz when a wrong class leads by ``score``."""
    z = (score * torch.eye(C)[1:2]).requires_grad_()
    loss = F.cross_entropy(F.softmax(z, 1) if softmax_first else z, torch.tensor([0]))
    return torch.autograd.grad(loss, z)[0].norm().item()


scores = range(0, 16, 5) if QUICK else range(16)
raw, first = ([gradient_length(float(score), softmax_first) for score in scores] for softmax_first in (False, True))
for score, one, other in list(zip(scores, raw, first))[:: 1 if QUICK else 5]:
    print(f"  a wrong class leads by {score:2}: |dL/dz| raw {one:.1e}, softmax first {other:.1e}, ratio {one / other:.1f}")
assert abs(raw[0] / first[0] - C) < 0.01 and raw[-1] > 1 and first[-1] < 1e-4

# %% [markdown]
# Now train on the digits: right, with the mistake, and with the mistake and a learning rate C times as large, to undo the 1/C.

# %%
title("Training with raw logits, and with softmax first")
SEEDS, EPOCHS = (1, 12) if QUICK else (5, 20)


def train(softmax_first: bool, learning_rate: float, seed: int) -> list[tuple[float, float, int]]:
    """Per epoch: the training loss, the held-out accuracy, and the number of classes that the network never answers."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, C), nn.Softmax(1) if softmax_first else nn.Identity())
    optimizer, history = optim.SGD(network.parameters(), lr=learning_rate), []
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(data.x_train)).split(32):
            optimizer.zero_grad()
            F.cross_entropy(network(data.x_train[rows]), data.y_train[rows]).backward()
            optimizer.step()
        loss, answers = F.cross_entropy(network(data.x_train), data.y_train), network(data.x_val).argmax(1)
        history.append((loss.item(), (answers == data.y_val).double().mean().item(), C - len(answers.unique())))
    return history


settings = {"raw logits": (False, 0.1, BLUE, "-"), "softmax first": (True, 0.1, ORANGE, "-")}
settings["softmax first, learning rate x 10"] = (True, 1.0, ORANGE, "--")
runs = {name: torch.tensor([train(*setting[:2], seed) for seed in range(SEEDS)]) for name, setting in settings.items()}
figure, (loss_plot, accuracy_plot, gradient_plot) = plt.subplots(1, 3, figsize=(12, 3.4))
for name, (_, _, color, style) in settings.items():
    for k, plot in enumerate((loss_plot, accuracy_plot)):
        plot.plot(range(1, EPOCHS + 1), runs[name].mean(0)[:, k], style, color=color, label=name)
        plot.fill_between(range(1, EPOCHS + 1), runs[name].amin(0)[:, k], runs[name].amax(0)[:, k], color=color, alpha=0.12, lw=0)
    loss, accuracy, _ = runs[name][:, -1].mean(0).tolist()
    missing = runs[name][:, -1, 2].int().tolist()
    print(f"  {name:34} loss {loss:.4f}, held-out accuracy {accuracy:.1%}, classes never answered, per run: {missing}")
right, mistake, faster = (runs[name][:, -1, 1].mean() for name in settings)
assert right > 0.9 and mistake < right - 0.05 and faster > mistake
assert min(runs[name][:, :, 0].min() for name in list(settings)[1:]) > floor
loss_plot.axhline(floor, color=GREY, ls=":", label=f"the floor, {floor:.3f}")
loss_plot.set(xlabel="epoch", ylabel="training loss", ylim=(0, 3.3))
accuracy_plot.set(xlabel="epoch", ylabel="held-out accuracy", ylim=(0, 1))
gradient_plot.semilogy(scores, raw, color=BLUE)
gradient_plot.semilogy(scores, first, color=ORANGE)
gradient_plot.set(xlabel="lead of a wrong class", ylabel="length of dL/dz", xticks=range(0, 16, 5))
loss_plot.legend(fontsize=7, loc="upper right")
save(figure, "03_softmax_first.png")

# %% [markdown]
# (Line: mean over the seeds. Band: smallest to largest.) The larger learning rate brings back most of the speed and none of the
# floor. It cannot bring back what J has set to 0 either: a class that the network confidently calls something else may never be
# heard again. Each such class leaves about 1/C of the rows at the ceiling.
#
# ## Label smoothing
# With onehot targets the loss reaches 0 only for infinitely large logits. Smoothing asks for 1 - eps + eps/C on the right class
# and eps/C on the others. The lowest loss is then the targets' entropy, reached where the right logit leads by a finite amount.

# %%
title("Label smoothing, eps = 0.1")
eps, t = 0.1, torch.tensor([3])
smooth = (1 - eps) * torch.eye(C)[t] + eps / C
lead = math.log(smooth[0, 3] / smooth[0, 0])
entropy = -(smooth * smooth.log()).sum().item()
for name, gap in {"no lead": 0.0, "the best lead": lead, "twice that": 2 * lead}.items():
    z = (gap * torch.eye(C)[t]).requires_grad_()
    loss = F.cross_entropy(z, t, label_smoothing=eps)
    by_hand = -(smooth * torch.log_softmax(z, 1)).sum().item()
    (dz,) = torch.autograd.grad(loss, z)
    print(f"  {name:14} {gap:5.2f}: loss {loss.item():.4f}, by hand {by_hand:.4f}, lowest {entropy:.4f};  |dL/dz| {dz.norm():.4f}")
    assert abs(by_hand - loss.item()) < 1e-5 and loss.item() > entropy - 1e-5

# %% [markdown]
# ## Keep
# * MSE believes every point, MAE the majority, Huber decides by size.
# * Give the loss raw logits: BCEWithLogits and CrossEntropy contain the sigmoid and the softmax, and stay finite.
# * The first loss should be near log C; one that never falls below log(1 + (C - 1) / e) has probably seen a softmax too many.
#
# Next: `04_autograd_demo.py`, where the gradients come from.
