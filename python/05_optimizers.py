"""Lesson 5: optimizers, or what to do with a gradient once you have it.

The gradient says which way is downhill from here, and how steep it is. It does not say how far to go. SGD goes a fixed
multiple of the gradient; momentum goes on in the direction it was going; RMSprop and Adam give every weight its own
step length; AdamW is Adam with a weight decay that does what it says.

You will write each rule by hand and compare it with its kernel, send all of them down the same valley, see what Adam's bias
correction and AdamW's decoupling change, let the learning rate follow a schedule, and count what a step costs.

Read beside it: csrc/cpu/optimizers.cpp. The rules below stand there again, each in a few lines.
The valley, the training loop and the counting of operations are in python/descent.py.
"""

# %%
import math
import time
from functools import partial

import torch
from descent import CountOperations, animate_paths, arrival, draw_paths, draw_schedules, print_schedules, shaking, train_digits, walk
from lesson import BLUE, GREY, ORANGE, QUICK, save, title
from torch import Tensor

import dlkernels.nn as nn
import dlkernels.optim as optim

torch.manual_seed(0)
torch.set_num_threads(1)  # most of this is tiny: waking a second thread would cost more than it computes
GREEN, PURPLE = "#2e8b57", "#8e5bb5"

# %% [markdown]
# ## The rules, by hand
# **SGD.** Near w the loss is about L(w) + g . d for a small step d. To make that small without going too far, add a price for
# long steps, |d|^2 / (2 lr), and set the derivative by d to zero: g + d / lr = 0, so d = -lr g.
#
# **Momentum.** b <- mu b + g sums the past gradients, each counting mu times as much as the one after it. Where they agree,
# b grows towards g (1 + mu + mu^2 + ...) = g / (1 - mu): ten times g for mu = 0.9. Where they alternate in sign, they cancel.
# **Nesterov** steps by g + mu b instead of b: one step of the velocity ahead.
#
# **RMSprop.** v <- alpha v + (1 - alpha) g^2 is a running average of g^2. Divide by its root and the step no longer depends on
# how large a weight's gradients are, only on how steady they are: a weight with tiny gradients moves as fast as any other.
#
# **Adam** is both: a running average m of g, divided by the root of a running average v of g^2. Both begin at 0 and are
# corrected for that, see below. **AdamW** first shrinks the weight by the factor 1 - lr * decay.


# %%
def sgd(w: Tensor, g: Tensor, s: dict, lr: float) -> Tensor:
    return w - lr * g


def momentum(w: Tensor, g: Tensor, s: dict, lr: float, mu: float = 0.9) -> Tensor:
    s["b"] = mu * s.get("b", 0) + g
    return w - lr * s["b"]


def nesterov(w: Tensor, g: Tensor, s: dict, lr: float, mu: float = 0.9) -> Tensor:
    s["b"] = mu * s.get("b", 0) + g
    return w - lr * (g + mu * s["b"])


def rmsprop(w: Tensor, g: Tensor, s: dict, lr: float, alpha: float = 0.99, eps: float = 1e-8) -> Tensor:
    s["v"] = alpha * s.get("v", 0) + (1 - alpha) * g**2
    return w - lr * g / (s["v"].sqrt() + eps)


def adam(w: Tensor, g: Tensor, s: dict, lr: float, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8) -> Tensor:
    s["t"] = s.get("t", 0) + 1
    s["m"] = beta1 * s.get("m", 0) + (1 - beta1) * g
    s["v"] = beta2 * s.get("v", 0) + (1 - beta2) * g**2
    m, v = s["m"] / (1 - beta1 ** s["t"]), s["v"] / (1 - beta2 ** s["t"])  # bias correction
    return w - lr * m / (v.sqrt() + eps)


def adamw(w: Tensor, g: Tensor, s: dict, lr: float, decay: float = 0.01) -> Tensor:
    return adam(w * (1 - lr * decay), g, s, lr)


sgd_momentum = partial(optim.SGD, momentum=0.9)
RULES = {
    "SGD": (sgd, optim.SGD),
    "SGD + momentum": (momentum, sgd_momentum),
    "SGD + Nesterov": (nesterov, partial(optim.SGD, momentum=0.9, nesterov=True)),
    "RMSprop": (rmsprop, optim.RMSprop),
    "Adam": (adam, optim.Adam),
    "AdamW": (adamw, optim.AdamW),
}
title("By hand, against the kernels: 100 steps with lr 0.01 along random gradients, float64")
for name, (by_hand, by_kernel) in RULES.items():
    generator, state = torch.Generator().manual_seed(1), {}
    start = torch.randn(50, 7, generator=generator, dtype=torch.float64)
    w, parameter = start.clone(), start.clone().requires_grad_()
    optimizer = by_kernel([parameter], lr=0.01)
    for _ in range(100):
        gradient = torch.randn(50, 7, generator=generator, dtype=torch.float64)
        w, parameter.grad = by_hand(w, gradient, state, lr=0.01), gradient
        optimizer.step()
    difference = (w - parameter).abs().max().item()
    print(f"  {name:15} moved {(w - start).abs().max():5.2f} at most, largest difference {difference:.0e}")
    assert difference < 1e-12

# %% [markdown]
# Where people start, and what each is used for. Then find your own learning rate: powers of ten first, factors of 2 or 3 next.
#
#     SGD + momentum    lr 0.01 to 0.1, momentum 0.9     vision, fine-tuning; wants a schedule
#     RMSprop           lr 0.001, alpha 0.99             recurrent networks, losses that change while one learns
#     Adam              lr 0.001, betas 0.9 and 0.999    the first try for almost anything
#     AdamW             lr 0.0001, decay 0.01            Transformers and language models, with a warm-up
#
# ## Bias correction
# m and v are averages that begin at 0. For a constant gradient m = (1 - beta1^t) g after t steps, and v = (1 - beta2^t) g^2:
# both too small, v for much longer. Dividing each by its bracket makes them averages from the first step on. Without that, the
# step would be (1 - beta1^t) / sqrt(1 - beta2^t) times as long: at step 1, 0.1 / sqrt(0.001). (RMSprop has no correction.)

# %%
AT = (1, 2, 5, 10, 30, 100, 1000, 3000)
title("Steps of Adam, in units of lr, for a constant gradient")
w, positions = torch.zeros(1, dtype=torch.float64, requires_grad=True), [0.0]
optimizer = optim.Adam([w], lr=1.0)
for _ in range(AT[-1]):
    w.grad = torch.full_like(w, 0.02)
    optimizer.step()
    positions.append(w.item())
corrected = [positions[t - 1] - positions[t] for t in AT]
uncorrected = [(1 - 0.9**t) / math.sqrt(1 - 0.999**t) for t in AT]
for name, row in (("step", AT), ("corrected (kernel)", corrected), ("without (formula)", uncorrected)):
    print(f"  {name:20}" + "".join(f"{x:7}" if name == "step" else f"{x:7.2f}" for x in row))
assert max(abs(length - 1) for length in corrected) < 1e-5

# %% [markdown]
# Whatever the gradient's size, the first corrected step is lr long. Adam's learning rate is the length of a step, in the
# units of the weights; SGD's is a factor of the gradient. That is why one cannot take one's learning rate to the other.
#
# ## Down the same valley
# L = (1 - w1)^2 + 10 (w2 - w1^2)^2 has steep walls and a bottom that bends and hardly falls. A step small enough for the walls
# is too small for the bottom; that is what "ill-conditioned" means. Which learning rates get there, and when?

# %%
LIMIT, STEPS, RATES = 0.01, (150 if QUICK else 1000), (0.02, 0.2) if QUICK else (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
title(f"From which step on is the loss below {LIMIT}? Learning rate across, at most {STEPS} steps")
print(f"  {'':15}" + "".join(f"{lr:>9}" for lr in RATES))
for name, (_, make) in RULES.items():
    print(f"  {name:15}" + "".join(f"{arrival(walk(make, lr, STEPS)[1], LIMIT):>9}" for lr in RATES))

# %% [markdown]
# "-" is not there, or not there to stay. RMSprop's v forgets the steep beginning within some hundred steps, Adam's within some
# thousand. Once it has, g / sqrt(v) no longer shrinks when g does, and at a constant learning rate the weights hop about: with
# lr 0.02 RMSprop is there before step 300 (next table), but hops out again and again. Look for the widest row, too: not who is
# fastest at its best, but who forgives a wrong learning rate.
#
# Five of them, from one start. AdamW has ten times its default decay here, or its path would lie on Adam's.

# %%
DRAWN = {
    "SGD, lr 0.01": (optim.SGD, 0.01, GREY),
    "SGD + momentum, lr 0.005": (sgd_momentum, 0.005, ORANGE),
    "RMSprop, lr 0.02": (optim.RMSprop, 0.02, GREEN),
    "Adam, lr 0.1": (optim.Adam, 0.1, BLUE),
    "AdamW, lr 0.1, decay 0.1": (partial(optim.AdamW, weight_decay=0.1), 0.1, PURPLE),
}
title("One valley, five paths")
STOPS = (10, 30, 100, 300)
paths = {name: walk(make, lr, max(STOPS)) for name, (make, lr, _) in DRAWN.items()}
print(f"  {'loss after':24}" + "".join(f"{f'{n} steps':>11}" for n in STOPS) + f"{f'below {LIMIT}':>14}")
for name, (_, losses) in paths.items():
    row = "".join(f"{losses[n]:11.1e}" for n in STOPS) + f"{arrival(losses, LIMIT):>14}"
    print(f"  {name:24}" + row)
colors = {name: color for name, (_, _, color) in DRAWN.items()}
save(draw_paths(paths, colors), "05_paths.png")
save(animate_paths(paths, colors, [0, 10, 30] if QUICK else [*range(40), *range(40, 100, 3), *range(100, 301, 10)]), "05_paths.gif")

# %% [markdown]
# AdamW all but stops short of the minimum at (1, 1): the decay pulls both weights towards 0 by lr * decay of their size, and
# near the minimum Adam's step is no longer than that. AdamW has another goal than the loss alone.
#
# ## Decay, coupled and decoupled
# An L2 penalty adds decay * w to the gradient. For SGD that is the same as shrinking w by 1 - lr * decay. For Adam it is not:
# what was added is divided by sqrt(v) with the rest, so a weight whose gradients are 10 in size decays a tenth as much, and
# one whose gradients are 0.1 ten times as much. AdamW shrinks the weight apart from the gradient.
#
# Three kinds of weights, all 1 at first. Their gradients are noise of size 10, 1 and 0.1 around 0, so that only decay is left.
# (10,000 weights of each kind, the noise of every second one mirrored, to see the mean and not the noise.)

# %%
LR, DECAY, COUNT, SIZES = 0.01, 0.01, (200 if QUICK else 1000), (10.0, 1.0, 0.1)
title(f"How much each kind of weight decays in {COUNT} steps, in units of lr * decay * steps")
print(f"  {'gradients of size':20}" + "".join(f"{size:10}" for size in SIZES))
shrunk = {}
for name in ("SGD", "Adam", "AdamW"):
    w, generator = torch.ones(3, 10_000, requires_grad=True), torch.Generator().manual_seed(2)
    optimizer = getattr(optim, name)([w], lr=LR, weight_decay=DECAY)
    for _ in range(COUNT):
        noise = torch.randn(3, 5000, generator=generator)
        w.grad = torch.tensor(SIZES)[:, None] * torch.cat([noise, -noise], 1)
        optimizer.step()
    shrunk[name] = -w.detach().double().mean(1).log() / (LR * DECAY * COUNT)
    print(f"  {name:20}" + "".join(f"{s:10.2f}" for s in shrunk[name]))
assert (shrunk["AdamW"] - 1).abs().max() < 0.2 and shrunk["Adam"][0] < 0.3 < 3 < shrunk["Adam"][2]

# %% [markdown]
# Why it matters: coupled to Adam, decay holds those weights back least whose gradients are largest, and one number means
# something else for every weight. Multiply the loss by 10 and Adam hardly notices, but the penalty now counts a tenth.
# AdamW's decay stays what it was.
#
# ## Schedules
# A batch's gradient is the whole gradient plus noise, so the weights never come to rest. Take L = w^2 / 2 and noise of size 1
# in every gradient: after many steps of SGD, the mean of w^2 is lr / (2 - lr). Momentum averages the noise, but its steps are
# 1 / (1 - mu) times as long; at a tenth of the learning rate, and so the same speed, it shakes as much as SGD if lr is small.

# %%
title("How far the weights keep shaking: the mean of w^2, 20,000 weights at once")
for lr in (0.5, 0.1, 0.02):
    plain, with_momentum = (shaking(make, rate, 60 if QUICK else 300) for make, rate in ((optim.SGD, lr), (sgd_momentum, lr / 10)))
    print(f"  lr {lr:4}: SGD {plain:.4f} (formula {lr / (2 - lr):.4f})     momentum at lr {lr / 10:5}: {with_momentum:.4f}")

# %% [markdown]
# Only a smaller learning rate gets closer. So: large steps first, to get there; small ones later, to come to rest.
# CosineAnnealingLR follows half a cosine down to 0. ReduceLROnPlateau multiplies by a factor, here 0.3, when the validation
# loss has not improved for some epochs, here two. OneCycleLR climbs from a 25th of the top, then comes down to almost nothing
# (and moves the momentum the other way). They are PyTorch's and set `lr` in the optimizer's param groups, from which our
# kernels read it. `dlkernels.train.make_schedule` makes them by name; lesson 8 uses it.

# %%
SEEDS, EPOCHS, TOPS = (range(2), 2, (0.03, 0.3)) if QUICK else (range(8), 12, (0.03, 0.1, 0.3))
schedulers = torch.optim.lr_scheduler
SCHEDULES = {
    "constant": (None, GREY),
    "CosineAnnealingLR": (lambda o, steps: schedulers.CosineAnnealingLR(o, steps), BLUE),
    "ReduceLROnPlateau": (lambda o, steps: schedulers.ReduceLROnPlateau(o, factor=0.3, patience=1), GREEN),
    "OneCycleLR": (lambda o, steps: schedulers.OneCycleLR(o, o.param_groups[0]["lr"], total_steps=steps), ORANGE),
}
title(f"The digits, SGD with Nesterov momentum, {EPOCHS} epochs: held-out accuracy in %, mean and deviation of {len(SEEDS)} seeds")
runs = {
    name: {lr: [train_digits(schedule, lr, seed, EPOCHS) for seed in SEEDS] for lr in TOPS} for name, (schedule, _) in SCHEDULES.items()
}
print_schedules(runs)
save(draw_schedules(runs, {name: color for name, (_, color) in SCHEDULES.items()}, TOPS[-1]), "05_schedules.png")

# %% [markdown]
# "Chosen" is the learning rate whose last validation loss is lowest; the accuracy is that of pictures which chose nothing, and
# the last column compares it seed by seed with the constant rate's own best choice (paired t test at 5 %, as in lesson 9). Look
# along the rows, too: a schedule is worth most where the constant learning rate is too large to come to rest.
#
# ## What a step costs
# Written in tensor operations, Adam reads and writes the same numbers again and again. Our kernel is called once for all
# tensors, and PyTorch's own with `fused=True` does the same. It reads w, g, m and v and writes w, m and v: 7 floats of 4 bytes,
# 28 bytes a parameter, for some 15 operations of arithmetic. So the way to and from memory decides, and whatever else is to be
# done to the gradient is done while it passes: `max_grad_norm=` clips within the update, at the price of one pass for the norm;
# `step(zero_grad=True)` clears the gradients.

# %%
title("One step of AdamW")
model = nn.Sequential(*(nn.Linear(200, 200) for _ in range(10 if QUICK else 50)))
for p in model.parameters():
    p.grad = torch.randn_like(p)
ADAMWS = {"torch.optim": torch.optim.AdamW, "torch.optim, fused": partial(torch.optim.AdamW, fused=True), "dlkernels.optim": optim.AdamW}
for name, make in ADAMWS.items():
    optimizer = make(model.parameters())
    optimizer.step()
    with CountOperations() as count:
        optimizer.step()
    times = []
    for _ in range(5 if QUICK else 30):
        began = time.perf_counter()
        optimizer.step()
        times.append(time.perf_counter() - began)
    each = sorted(times)[len(times) // 2] / sum(p.numel() for p in model.parameters())
    print(f"  {name:18} calls for {len(optimizer.state)} tensors: {len(count.names):4}; {each * 1e9:5.2f} ns a parameter")
print(f"  28 bytes in that time: {28e-9 / each:.1f} GB/s, on one thread")

clipped = [torch.ones(300, requires_grad=True) for _ in range(2)]
for w in clipped:
    w.grad = torch.full((300,), 2.0)
inside, outside = optim.SGD([clipped[0]], lr=0.1, max_grad_norm=1.0), optim.SGD([clipped[1]], lr=0.1)
inside.step()
torch.nn.utils.clip_grad_norm_([clipped[1]], 1.0)
outside.step()
apart = (clipped[0] - clipped[1]).abs().max().item()
print(f"  clipping inside the step: norm {inside.grad_norm:.2f} before, step 0.1 allowed, {(1 - clipped[0]).norm():.4f} taken;")
print(f"  torch's clipping and then the step: weights differ by {apart:.0e} at most")
assert apart < 1e-6

# %% [markdown]
# ## Keep
# * Momentum sums what gradients agree on; RMSprop and Adam divide by their usual size, weight by weight.
# * Adam's learning rate is a step length, SGD's a factor of the gradient. Search for it anew when you change the optimizer.
# * A weight decay with Adam is AdamW. Adam's own `weight_decay` is an L2 penalty, divided by each weight's gradient size.
# * Noise keeps the weights shaking in proportion to the learning rate: start large, end small. Any of the three schedules does.
#
# Next: `06_pytorch_fundamentals.py`, the tensors under all this.
