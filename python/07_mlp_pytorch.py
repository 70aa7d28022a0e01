"""Lesson 7: a multi-layer perceptron that reads handwritten digits.

You will build the network, count its parameters, see why the first weights must be neither too small nor too large, train it
with the six steps that train everything from here to a Transformer, look at its mistakes, and run the whole thing once more
on PyTorch's own kernels: same curve, different clock.

Read beside it: dlkernels/models/mlp.py (this network, for any sizes) and dlkernels/train/ (this loop, for any model).
"""

# %%
import torch
from lesson import BLUE, GREY, ORANGE, QUICK, plt, save, title

import dlkernels.functional as F
import dlkernels.nn as nn
import dlkernels.optim as optim
from dlkernels.data import digits
from dlkernels.models.mlp import MLP, parameter_count
from dlkernels.train import compare

torch.manual_seed(0)
torch.set_num_threads(1)  # batches of 64 rows are small: a second thread would mostly wait

# %% [markdown]
# ## The data
# 1797 digits, 8 x 8 pixels, written by 13 people. 360 of them are held out: the network is judged on what it has not seen.

# %%
title("Data")
data = digits()
print(f"  to learn from {tuple(data.x_train.shape)}, held out {tuple(data.x_val.shape)}")
print(f"  held-out digits per class {data.y_val.bincount().tolist()}")
for row in data.x_train[0].reshape(8, 8).tolist():
    print("  ", "".join(" .:-=+*#@"[round(8 * grey)] * 2 for grey in row))
print(f"   somebody's {data.y_train[0].item()}")

# %% [markdown]
# ## The network
# Per hidden layer: Linear, BatchNorm, ReLU, Dropout. `__init__` says what there is, `forward` says in what order.
#
# | part | what it does to a batch [M, N] | what it learns |
# |---|---|---|
# | Linear(K, N) | x W^T + b | N K weights, N biases |
# | BatchNorm1d(N) | each column to mean 0, variance 1, then times gamma plus beta | 2 N |
# | ReLU | max(x, 0) | nothing |
# | Dropout(p) | in training, zeroes each number with probability p and divides the rest by 1 - p | nothing |

# %%
title("Parameters")
hidden, dropout = [128, 64, 32], 0.3
layers = []
in_features = 64
for N in hidden:
    layers += [nn.Linear(in_features, N), nn.BatchNorm1d(N), nn.ReLU(), nn.Dropout(dropout)]
    in_features = N
network = nn.Sequential(*layers, nn.Linear(in_features, 10))  # no activation at the end: the loss wants raw scores

by_hand = sum(K * N + N + 2 * N for K, N in [(64, 128), (128, 64), (64, 32)]) + 32 * 10 + 10
packaged = parameter_count(MLP(64, hidden, 10, dropout))
print(f"  counted by hand {by_hand:,}, by PyTorch {parameter_count(network):,}, in dlkernels.models {packaged:,}")
assert by_hand == parameter_count(network) == packaged

# %% [markdown]
# ## The first weights
# Feed numbers of size 1 into a layer with K inputs and weights of standard deviation s. Each output is a sum of K products, so
# its variance is K s^2 times the mean square of the input; a ReLU then halves the mean square. Per layer, then,
#
#     mean square  ->  (K s^2 / 2) * mean square
#
# and only s = sqrt(2 / K) neither starves nor floods a deep network. That is He initialisation.

# %%
title("Size of the activations, layer by layer")
WIDTH, DEPTH = 256, 8 if QUICK else 24
gains = {"half of He": 0.5, "He": 1.0, "twice He": 2.0}
sizes = {name: [] for name in gains}
for name, gain in gains.items():
    h = torch.randn(512, WIDTH)
    for _ in range(DEPTH):
        layer = nn.LinearReLU(WIDTH, WIDTH)
        nn.init.normal_(layer.weight, std=gain * (2 / WIDTH) ** 0.5)
        nn.init.zeros_(layer.bias)
        h = layer(h).detach()
        sizes[name].append(h.square().mean().sqrt().item())
    shown = [1, 2, 4, 8] if QUICK else [1, 2, 4, 8, 16, 24]
    print(f"  {name:10} " + "   ".join(f"layer {depth}: {sizes[name][depth - 1]:.1e}" for depth in shown))

figure, plot = plt.subplots(figsize=(5.5, 3.2))
for (name, row), color in zip(sizes.items(), (ORANGE, BLUE, "black")):
    plot.semilogy(range(1, DEPTH + 1), row, color=color, label=name)
plot.set(xlabel="layer", ylabel="root mean square of h", title="ReLU layers before any training")
plot.legend()
save(figure, "07_initialisation.png")


# %%
def he_init(module: torch.nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")  # s = sqrt(2 / K)
        nn.init.zeros_(module.bias)


network.apply(he_init)

# %% [markdown]
# ## Six steps
# Clear, predict, compare, differentiate, clip, move. Everything you will ever train goes around this circle. `train()` and
# `eval()` matter: dropout and BatchNorm behave differently when they learn and when they are used.

# %%
title("Training")
EPOCHS = 3 if QUICK else 30
optimizer = optim.AdamW(network.parameters(), lr=1e-2, weight_decay=0.1)
scheduler = optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=EPOCHS)

for epoch in range(EPOCHS):
    network.train()
    losses = []
    for rows in torch.randperm(len(data.x_train)).split(64):
        optimizer.zero_grad()  # 1. forget the last batch's gradients: backward() adds
        logits = network(data.x_train[rows])  # 2. predict
        loss = F.cross_entropy(logits, data.y_train[rows])  # 3. how wrong, as one number
        loss.backward()  # 4. d loss / d parameter, for every parameter
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)  # 5. a leash for wild batches
        optimizer.step()  # 6. every parameter a little downhill
        losses.append(loss.item())
    scheduler.step()

    network.eval()
    with torch.no_grad():
        answers = network(data.x_val).argmax(1)
    accuracy = (answers == data.y_val).double().mean()
    if epoch % 5 == 0 or epoch == EPOCHS - 1:
        print(f"  epoch {epoch:2d}   loss {sum(losses) / len(losses):.4f}   held-out accuracy {accuracy:.1%}")

# %% [markdown]
# Two questions worth asking of the first line. An untrained network that says 1/10 to everything has loss log 10 = 2.30: is the
# first loss below that? And the loss *with* dropout is higher than the network's real one: it is taking the exam with a third of its
# neurons missing.
#
# ## Its mistakes
# The confusion matrix: row = what was written, column = what the network read.

# %%
title("Mistakes")
confusion = torch.zeros(10, 10, dtype=torch.int64)
confusion.index_put_((data.y_val, answers), torch.ones_like(answers), accumulate=True)
print("      " + "".join(f"{digit:4d}" for digit in range(10)))
for digit, row in enumerate(confusion.tolist()):
    print(f"  {digit}   " + "".join(f"{count:4d}" if count else "   ." for count in row))
wrong = (answers != data.y_val).nonzero()[:, 0]
print(f"  {len(wrong)} of {len(data.y_val)} wrong:", ", ".join(f"{data.y_val[i]} read as {answers[i]}" for i in wrong[:6].tolist()))

figure, (matrix, *pictures) = plt.subplots(1, 5, figsize=(10, 2.9), width_ratios=[2, 1, 1, 1, 1])
matrix.imshow(confusion, cmap="Blues")
matrix.set(xlabel="read", ylabel="written", xticks=range(10), yticks=range(10), title=f"{accuracy:.1%} right")
for plot in pictures:
    plot.axis("off")
for plot, i in zip(pictures, wrong.tolist()):
    plot.imshow(data.x_val[i].reshape(8, 8), cmap="gray_r")
    plot.set_title(f"{data.y_val[i]} read as {answers[i]}", fontsize=9)
save(figure, "07_mistakes.png")

# %% [markdown]
# ## Ours and native
# The same text once with `nn=torch.nn`, once with `nn=dlkernels.nn`, from the same seed: same first weights, same batches, same
# dropout. What differs is the order in which sums are taken, hence the last bit; training amplifies it slowly, so the curves
# start identical and drift apart by noise, not by skill. Two networks, because the answer to "how much faster?" depends on
# what share of a step is matrix product; the rest is optimizer, clipping and Python. One thread, in turns.

# %%
title("The same training on PyTorch's kernels and on ours")
figure, plots = plt.subplots(1, 2, figsize=(9, 3.2))
for plot, name in zip(plots, ("mlp_plain", "mlp")):
    both = compare(name, epochs=2 if QUICK else None, threads=1, progress=False, min_seconds=0.2 if QUICK else 1.0)
    ours, native = both.ours, both.native
    gap = max(abs(a - b) for a, b in zip(ours.first_losses[:20], native.first_losses[:20]))
    step, native_step = both.steps["dlkernels"].median, both.steps["eager"].median
    print(f"  {name:10} {ours.parameters:,} parameters; losses of the first 20 steps differ by at most {gap:.0e}")
    print(f"  {'':10} held-out accuracy: ours {ours.val_accuracy[-1]:.1%}, native {native.val_accuracy[-1]:.1%}")
    print(f"  {'':10} one step: ours {1e6 * step:.0f} us, native {1e6 * native_step:.0f} us, ratio {native_step / step:.2f}")
    plot.semilogy(native.train_loss, color=GREY, lw=4, label="native")
    plot.semilogy(ours.train_loss, color=BLUE, label="dlkernels")
    plot.set(xlabel="epoch", ylabel="training loss", title=name)
    plot.legend()
save(figure, "07_ours_and_native.png")

# %% [markdown]
# ## Keep
# * Count parameters and check the first loss against log(classes) before you train for an hour.
# * sqrt(2 / K) for layers that end in ReLU; the 2 is the half that ReLU throws away.
# * Six steps. `train()` before learning, `eval()` and `no_grad()` before judging.
# * Judge on rows the network has never seen, and look at the mistakes: some of those digits *you* would not read either.
#
# Next: `08_training_loop.py`, the six steps taken apart, and what a long run needs around them.
