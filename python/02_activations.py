"""Lesson 2: activation functions, what they are for and how they fail.

An activation is the bend between two linear layers. You will collapse a deep network that has none, draw the usual ones with
their derivatives, kill a network with one careless learning rate, watch a gradient fade through twenty sigmoids, and compute
a softmax that does not overflow.

Read beside it: dlkernels/ops/activations.py, the kernels of the functions drawn below.
"""

# %%
import torch
from lesson import BLUE, GREY, ORANGE, QUICK, plt, save, title
from torch import Tensor

import dlkernels.functional as F
import dlkernels.nn as nn
import dlkernels.optim as optim
from dlkernels.data import digits

torch.manual_seed(0)
torch.set_num_threads(1)  # everything here is tiny: waking a second thread would cost more than it computes
data = digits()

# %% [markdown]
# ## Without a bend, depth is an illusion
# A layer without activation is x W^T + b. Two of them:
#
#     (x W1^T + b1) W2^T + b2  =  x (W2 W1)^T + (W2 b1 + b2)
#
# which is again *one* layer, with weight W2 W1 and bias W2 b1 + b2. Repeat, and any number of layers collapses.

# %%
title("Five linear layers are one linear layer")
deep = nn.Sequential(*[nn.Linear(64, 64) for _ in range(4)], nn.Linear(64, 10))
weight, bias = torch.eye(64), torch.zeros(64)
for layer in deep:
    weight, bias = layer.weight @ weight, layer.weight @ bias + layer.bias
merged = F.linear(data.x_val, weight, bias)
difference = (deep(data.x_val) - merged).abs().max().item()
print(f"  five layers: {sum(p.numel() for p in deep.parameters()):,} parameters;  merged into one: {weight.numel() + bias.numel():,}")
print(f"  outputs for {len(merged)} digits, as large as {merged.abs().max():.3f}, differ by at most {difference:.1e}")
assert difference < 1e-5

# %% [markdown]
# Training cannot help what the formula forbids. Three layers, asked to follow a sine: without activation the answer is a
# straight line. ReLU bends it at the points where a neuron switches on; GELU bends it smoothly.

# %%
title("A sine, fitted with three layers")
t = torch.linspace(-3, 3, 121)[:, None]
wave = torch.sin(2 * t)
figure, plots = plt.subplots(1, 3, figsize=(11, 2.6), sharey=True)
for plot, (name, bend) in zip(plots, {"no activation": nn.Identity(), "relu": nn.ReLU(), "gelu": nn.GELU()}.items()):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(1, 32), bend, nn.Linear(32, 32), bend, nn.Linear(32, 1))
    optimizer = optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(200 if QUICK else 500):
        optimizer.zero_grad()
        loss = F.mse_loss(model(t), wave)
        loss.backward()
        optimizer.step()
    plot.plot(t, wave, color=GREY, lw=4, alpha=0.5)
    plot.plot(t, model(t).detach(), color=BLUE)
    plot.set(title=f"{name}: mean square error {loss.item():.4f}", xlabel="x (grey: the sine)")
    print(f"  {name:13} mean square error {loss.item():.4f}")
    assert (loss < 0.1) == (name != "no activation")
save(figure, "02_bend.png")

# %% [markdown]
# ## The functions and their derivatives
# The forward pass uses the function; *learning* uses only its derivative, because the gradient is multiplied by it in every
# layer. So look at the orange curves first. sigmoid is 1 / (1 + e^-z); silu is z times sigmoid; gelu is z Phi(z), where Phi is
# the normal distribution's cdf. Each line below has the function and, worked out by hand, its derivative.

# %%
normal = torch.distributions.Normal(0.0, 1.0)
ACTIVATIONS = {
    "relu": (F.relu, lambda z: (z > 0).float()),
    "leaky_relu": (F.leaky_relu, lambda z: torch.where(z > 0, 1.0, 0.01)),
    "sigmoid": (F.sigmoid, lambda z: z.sigmoid() * (1 - z.sigmoid())),
    "tanh": (F.tanh, lambda z: 1 - z.tanh() ** 2),
    "gelu": (F.gelu, lambda z: normal.cdf(z) + z * normal.log_prob(z).exp()),
    "silu": (F.silu, lambda z: z.sigmoid() * (1 + z * (1 - z.sigmoid()))),
}


def derivative(function, z: Tensor) -> Tensor:
    z = z.clone().requires_grad_()
    return torch.autograd.grad(function(z).sum(), z)[0]


title("Derivatives: autograd's, and the largest difference to the formula")
z = torch.linspace(-6, 6, 1200)  # an even number of points: 0, where relu has no derivative, is not among them
for name, (function, formula) in ACTIVATIONS.items():
    points = "".join(f"{derivative(function, torch.tensor([at])).item():9.4f}" for at in (-5.0, -2.0, -0.5, 0.5, 2.0, 5.0))
    difference = (derivative(function, z) - formula(z)).abs().max().item()
    print(f"  {name:10} at -5, -2, -0.5, 0.5, 2, 5: {points}   difference {difference:.0e}")
    assert difference < 1e-5

figure, axes = plt.subplots(2, 4, figsize=(11, 4.8))
*plots, softmax_plot, left_side = axes.flat
for plot, (name, (function, _)) in zip(plots, ACTIVATIONS.items()):
    plot.plot(z, function(z), color=BLUE, label="value")
    plot.plot(z, derivative(function, z), color=ORANGE, label="derivative")
    plot.set(title=name, ylim=(-1.3, 3), xlim=(-4, 4))
    plot.axhline(0, color=GREY, lw=0.5)
plots[0].legend(fontsize=8)
p = F.softmax(torch.stack([z, torch.zeros_like(z), torch.ones_like(z)], 1), 1)
for curve, color, label in zip(p.T, (BLUE, GREY, "black"), ("of z", "of 0", "of 1")):
    softmax_plot.plot(z, curve, color=color, label=label)
softmax_plot.set(title="softmax of (z, 0, 1)", xlabel="z")
softmax_plot.legend(fontsize=8)
for name, style in {"leaky_relu": "-", "sigmoid": "--", "silu": ":", "gelu": "-."}.items():
    left_side.semilogy(z[z < 0], derivative(ACTIVATIONS[name][0], z[z < 0]).abs(), style, color=ORANGE, label=name)
left_side.set(xlim=(-6, 0), ylim=(1e-7, 2), title="|derivative| for z < 0\n(relu: exactly 0)", xlabel="z")
left_side.legend(fontsize=7, loc="lower right")
save(figure, "02_functions.png")

# %% [markdown]
# ## Dying ReLU
# Call a neuron *silent* if z <= 0 for every row of the training set. A silent ReLU neuron has derivative 0 on every row, so the
# gradient of its weights is exactly 0. In the first layer, whose inputs never change, that is a death certificate: no later
# step of plain gradient descent on these rows can move it.
#
# What kills? A step that is too large. Pixels are >= 0, so a step that lowers every weight of a neuron lowers its z for *all*
# pictures at once. Below, the learning rate is 2 for some epochs, which is too much, and then a harmless 0.3. The question
# is who comes back.


# %%
def one_epoch(model: torch.nn.Module, learning_rate: float, inputs: Tensor = data.x_train) -> None:
    optimizer = optim.SGD(model.parameters(), lr=learning_rate)  # no momentum: it remembers nothing between epochs
    for rows in torch.randperm(len(inputs)).split(32):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs[rows]), data.y_train[rows]).backward()
        optimizer.step()


def accuracy(model: torch.nn.Module, inputs: Tensor = data.x_val) -> float:
    return (model(inputs).argmax(1) == data.y_val).double().mean().item()


def silent(model: torch.nn.Module) -> float:
    return (model[0](data.x_train) <= 0).all(0).double().mean().item()


SEEDS, SHOCK, CURE = (2, 6, 8) if QUICK else (6, 8, 12)
title(f"{SHOCK} epochs with learning rate 2, then {CURE} with 0.3")
contestants = {"relu": (nn.ReLU(), ORANGE), "leaky_relu": (nn.LeakyReLU(), BLUE), "gelu": (nn.GELU(), "black")}
history = {}
for name, (activation, _) in contestants.items():
    runs = []
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 64), activation, nn.Linear(64, 10))
        runs.append([(silent(model), accuracy(model))])
        for epoch in range(SHOCK + CURE):
            one_epoch(model, 2.0 if epoch < SHOCK else 0.3)
            runs[-1].append((silent(model), accuracy(model)))
    history[name] = torch.tensor(runs)  # [seed, epoch, (silent, accuracy)]
    for epoch in (0, SHOCK, SHOCK + CURE):
        share, right = history[name][:, epoch].mean(0).tolist()
        print(f"  {name:10} after {epoch:2d} epochs: silent {share:6.1%}   held-out accuracy {right:6.1%}")
(relu_silent, relu), (leaky_silent, leaky), (_, gelu) = (runs[:, -1].mean(0).tolist() for runs in history.values())
assert relu_silent > 0.85 and leaky_silent > 0.5 and relu < 0.5 and relu < gelu < leaky + 0.1 and leaky > relu + 0.3

figure, plots = plt.subplots(1, 2, figsize=(9, 3.2))
for k, (plot, label) in enumerate(zip(plots, ("share of silent neurons", "held-out accuracy"))):
    for name, (_, color) in contestants.items():
        curves = history[name][:, :, k]
        plot.plot(curves.mean(0), color=color, label=name)
        plot.fill_between(range(SHOCK + CURE + 1), curves.amin(0), curves.amax(0), color=color, alpha=0.12, lw=0)
    plot.axvline(SHOCK, color=GREY, lw=0.8, ls="--")
    plot.set(xlabel="epoch (dashed: learning rate 2 becomes 0.3)", ylabel=label, ylim=(-0.02, 1.02), xticks=range(0, SHOCK + CURE + 1, 4))
plots[0].legend(fontsize=8, loc="lower right")
save(figure, "02_dying.png")

# %% [markdown]
# (Line: mean over the seeds. Band: smallest to largest.) Silent is not dead. Most of the leaky neurons are on for no row either,
# yet that network recovers, because its derivative there is 0.01 and not 0. GELU stands between: its derivative
# is as good as zero far to the left (last panel of the picture before), and a shock throws neurons far to the left.
#
# The same without the accident: start every neuron with bias -2, so that all are silent, and train gently.

# %%
title(f"Every neuron silent at the start, {CURE} epochs with learning rate 0.5")
starts = {"relu": nn.ReLU(), "leaky, 0.01": nn.LeakyReLU(), "leaky, 0.1": nn.LeakyReLU(0.1), "gelu": nn.GELU()}
moved, recovered = {}, {}
for name, activation in starts.items():
    model = nn.Sequential(nn.Linear(64, 64), activation, nn.Linear(64, 10))
    nn.init.constant_(model[0].bias, -2.0)
    assert silent(model) == 1
    before = model[0].weight.detach().clone()
    for _ in range(CURE):
        one_epoch(model, 0.5)
    moved[name], recovered[name] = (model[0].weight - before).norm().item(), accuracy(model)
    print(f"  {name:12} weights moved by {moved[name]:8.5f}   still silent {silent(model):6.1%}   accuracy {recovered[name]:6.1%}")
assert moved["relu"] == 0 and moved["leaky, 0.01"] > 0 and recovered["gelu"] > 0.6 > 0.3 > recovered["relu"]

# %% [markdown]
# Not one of the ReLU's hidden weights has moved. A slope of 0.01 does move them, slowly. Remedies, in this order: a smaller
# learning rate, He's initial weights with bias 0 (lesson 7), then another activation.
#
# ## Vanishing: the sigmoid through twenty layers
# Backpropagation takes the gradient from layer l + 1 to layer l:  dz[l] = (dz[l+1] W[l+1]) * act'(z[l]).
#
# Make every W orthogonal: a rotation or reflection, which keeps lengths. Then only act' is left, and the sigmoid's is at most
# 1/4. So k layers before the last, the gradient is at most 0.25^k as long: a theorem, measured below. "Then use larger
# weights!" Four times as large, they cancel the 1/4, but they also push z into the tails, where the derivative is far below
# 1/4. tanh and relu get the gains that PyTorch recommends.

# %%
title("Length of the gradient dz at layer l, compared with layer 20")
DEPTH, EPOCHS = 20, 2 if QUICK else 10
x_train, x_val = ((x - data.x_train.mean(0)) / data.x_train.std() for x in (data.x_train, data.x_val))
settings = {
    "sigmoid": (nn.Sigmoid(), 1.0, ORANGE, "-"),
    "sigmoid, weights times 4": (nn.Sigmoid(), 4.0, ORANGE, "--"),
    "tanh": (nn.Tanh(), nn.init.calculate_gain("tanh"), "black", "-"),
    "relu": (nn.ReLU(), nn.init.calculate_gain("relu"), BLUE, "-"),
}


def orthogonal(gain: float) -> torch.nn.Module:
    layer = nn.Linear(64, 64)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


figure, plot = plt.subplots(figsize=(6, 3.8))
bound = [0.25 ** (DEPTH - layer) for layer in range(1, DEPTH + 1)]
lengths = {}
for name, (activation, gain, color, style) in settings.items():
    h, pre_activations = x_train, []
    for _ in range(DEPTH):
        pre_activations.append(orthogonal(gain)(h))
        h = activation(pre_activations[-1])
    gradients = torch.autograd.grad(F.cross_entropy(nn.Linear(64, 10)(h), data.y_train), pre_activations)
    lengths[name] = [(g.norm() / gradients[-1].norm()).item() for g in gradients]
    print(f"  {name:25}" + "".join(f"  l={layer}: {lengths[name][layer - 1]:.0e}" for layer in (19, 15, 10, 5, 1)))
    plot.semilogy(range(1, DEPTH + 1), lengths[name], style, color=color, label=name)
assert all(length <= 1.001 * limit for length, limit in zip(lengths["sigmoid"], bound))
assert lengths["sigmoid, weights times 4"][0] < 0.01 and min(lengths["tanh"][0], lengths["relu"][0]) > 0.1
plot.semilogy(range(1, DEPTH + 1), bound, color=GREY, lw=4, alpha=0.5, label="0.25^k, the sigmoid's bound", zorder=0)
plot.set(xlabel="layer (the loss is on the right)", ylabel="length of dz, layer 20 = 1", xticks=[1, 5, 10, 15, 20])
plot.legend(fontsize=8, loc="lower right")
save(figure, "02_vanishing.png")

# %% [markdown]
# Does it matter? Train them. A network whose first layers receive nothing learns nothing through them. The last row puts a
# softmax between the layers: its 64 outputs share a sum of 1, and its derivatives, at most p (1 - p), are as small.

# %%
title(f"Held-out accuracy after {EPOCHS} epochs with learning rate 0.05, for 1, 3 and 6 hidden layers")
reached = {}
for name, (activation, gain, *_) in {**settings, "softmax": (nn.Softmax(dim=1), 1.0)}.items():
    for depth in (1, 3, 6):
        model = nn.Sequential(*[part for _ in range(depth) for part in (orthogonal(gain), activation)], nn.Linear(64, 10))
        for _ in range(EPOCHS):
            one_epoch(model, 0.05, x_train)
        reached[name, depth] = accuracy(model, x_val)
    print(f"  {name:25}" + "".join(f"{reached[name, depth]:8.1%}" for depth in (1, 3, 6)))
assert min(reached["relu", 6], reached["tanh", 6]) > 0.7 and max(reached["sigmoid", 6], reached["softmax", 6]) < 0.4

# %% [markdown]
# ## Softmax: at the end, and safely
# Softmax turns C scores (*logits*) into probabilities, p_i = e^z_i / sum_j e^z_j. Adding the same c to all logits changes
# nothing: e^c cancels. With two classes, what remains is the sigmoid of the difference.
#
# But float32 has no e^z beyond z = log(largest float), and infinity / infinity is not a number. The remedy is the invariance
# itself: subtract the largest logit. Then the largest term is e^0 = 1; nothing overflows, and the sum is never 0.

# %%
title("Softmax")
print(f"  the largest z with a finite e^z in float32: {torch.tensor(torch.finfo(torch.float32).max).log():.2f}")
z, naive = torch.tensor([2.0, 1.0, 0.5]), {}
for name, logits in {"z": z, "z + 50": z + 50, "z + 1e4": z + 1e4, "z + 1e4 - max": z + 1e4 - (z + 1e4).max()}.items():
    naive[name] = logits.exp() / logits.exp().sum()
    print(f"  {name:13} by the formula {naive[name]!s:33} F.softmax {F.softmax(logits, dim=0)}")
    assert torch.allclose(F.softmax(logits, dim=0), naive["z"], atol=1e-6)
assert naive["z + 1e4"].isnan().all() and torch.allclose(naive["z + 1e4 - max"], naive["z"])
print(f"  two classes: {F.softmax(z[:2], dim=0)[0]:.6f}, and the sigmoid of the difference: {torch.sigmoid(z[0] - z[1]):.6f}")

# %% [markdown]
# ## Which, when
# | where | use | beware |
# |---|---|---|
# | hidden layers | relu | dead neurons: mind the learning rate, or leaky_relu |
# | hidden layers of Transformers | gelu, silu | more to compute than a maximum |
# | recurrent networks | tanh, sigmoid for gates | small derivatives in the tails |
# | output | sigmoid for yes or no, softmax for one of C classes | while training, inside the loss (lesson 3) |
# | output, a number | none | |
#
# ## Keep
# * Linear layers without a bend between them are one linear layer.
# * A ReLU neuron that is on for no row gets a gradient of exactly 0 and stays that way.
# * Depth multiplies derivatives: the sigmoid's are at most 1/4.
#
# Next: `03_losses.py`, the number that training makes small.
