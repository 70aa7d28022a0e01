"""Lesson 9: regularization, or how to keep a network from learning its training pictures by heart.

A network with thousands of weights and a hundred pictures can be right about every one of them for no good reason. What
counts is the gap: how much worse it does on pictures it has not seen. You will make that gap large on purpose, and then try
early stopping, dropout, weight decay, augmentation, BatchNorm and LayerNorm on it, one at a time, everything else equal. Some
help here and some do not; the table at the end says which, and how sure one can be.

Read beside it: dlkernels/ops/dropout.py and dlkernels/ops/batch_norm.py, what our kernels for these two promise.
The split, the six steps, the network and the table are in python/few_digits.py.
"""

# %%
import copy
import math

import torch
from few_digits import Run, draw_table, epochs, judge, loss_after_sgd, network, print_table, split
from lesson import BLUE, GREY, ORANGE, QUICK, FuncAnimation, plt, save, title
from torch import Tensor

import dlkernels.functional as F
import dlkernels.nn as nn
import dlkernels.optim as optim
from dlkernels.models.mlp import parameter_count

torch.manual_seed(0)
torch.set_num_threads(1)  # batches of 20 rows are small: a second thread would mostly wait
SEEDS, EPOCHS, PATIENCE = (range(2), 4, 2) if QUICK else (range(8), 80, 15)

# %% [markdown]
# ## Too few pictures
# Of the 1797 digits, 100 are for training. 100 more are for *validation*: looked at during training, to decide when to stop.
# The rest is the *test*, looked at when training is over: whatever you let a picture decide, it can no longer judge.
#
# Each seed draws other pictures and first weights, the same for every technique, which can so be compared seed by seed.

# %%
title("Data and network")
print("  training, validation, test:", *(len(labels) for _, labels in split(0)), "pictures")
print(f"  {parameter_count(network()):,} weights and biases; the training pictures have {split(0)[0][0].numel():,} grey values")

# %% [markdown]
# ## Early stopping
# After every epoch look at the validation loss. At a new low keep a copy of the weights; after `patience` epochs without one,
# stop and go back to the copy. The runs below go on all the same, so each has two results: of its last weights and the kept.


# %%
class EarlyStopping:
    def __init__(self, patience: int) -> None:
        self.patience, self.lowest, self.best_epoch, self.stopped = patience, math.inf, 0, None

    def look(self, epoch: int, loss: float, model: torch.nn.Module) -> None:
        if self.stopped is None and loss < self.lowest:
            self.lowest, self.best_epoch = loss, epoch
            self.weights = copy.deepcopy(model.state_dict())  # a copy: state_dict() itself shares memory with the model
        elif self.stopped is None and epoch - self.best_epoch >= self.patience:
            self.stopped = epoch


def shift_and_turn(x: Tensor, degrees: float = 20, pixels: float = 0.7) -> Tensor:
    """Every picture of x [M, 64] turned and shifted by its own random amount, up to the limits. See "Augmentation"."""
    M = len(x)
    angle = (2 * torch.rand(M) - 1) * math.radians(degrees)
    dx, dy = (2 * torch.rand(2, M) - 1) * pixels * 2 / 8  # 8 pixels are 2 units wide, from -1 to 1
    rows = [torch.stack([angle.cos(), -angle.sin(), dx], 1), torch.stack([angle.sin(), angle.cos(), dy], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), [M, 1, 8, 8], align_corners=False)  # where each new pixel comes from
    return F.grid_sample(x.reshape(M, 1, 8, 8), grid, align_corners=False).reshape(M, 64)  # mixes the 4 pixels around there


def train(seed: int, norm: str | None = None, dropout: float = 0, decay: float = 0, augment: bool = False, more: bool = False) -> Run:
    training, validation, test = split(seed)
    if more:  # learn from the validation pictures, too
        training = torch.cat([training[0], validation[0]]), torch.cat([training[1], validation[1]])
    torch.manual_seed(seed)
    run = Run(network(norm, dropout), EarlyStopping(PATIENCE))
    optimizer = optim.AdamW(run.model.parameters(), lr=2e-3, weight_decay=decay)
    for epoch in epochs(run.model, optimizer, training, EPOCHS, seed, shift_and_turn if augment else None):
        run.train_losses.append(judge(run.model, training)[0])
        run.val_losses.append(judge(run.model, validation)[0])
        run.norms.append(sum(p.detach().square().sum().item() for p in run.model.parameters() if p.dim() == 2) ** 0.5)
        run.stopper.look(epoch, run.val_losses[-1], run.model)
    run.last = judge(run.model, training) + judge(run.model, test)
    best = copy.deepcopy(run.model)
    best.load_state_dict(run.stopper.weights)
    run.kept = judge(best, training) + judge(best, test)
    return run


RUNS: dict[str, list[Run]] = {}
SCORES: dict[str, Tensor] = {}  # [seeds, 4], in the order of Run.last


def measure(name: str, stop: bool = False, **technique: object) -> None:
    """Train with every seed, keep the runs, print the gap."""
    RUNS[name] = [train(seed, **technique) for seed in SEEDS]
    SCORES[name] = torch.tensor([run.kept if stop else run.last for run in RUNS[name]])
    loss, accuracy, test_loss, test_accuracy = SCORES[name].mean(0).tolist()
    print(f"  {name}: loss {loss:.4f} in training, {test_loss:.3f} in the test; accuracy {accuracy:.1%} and {test_accuracy:.1%}")


title(f"Overfitting, and early stopping (means of {len(SEEDS)} seeds)")
measure("bare")
SCORES["early stopping"] = torch.tensor([run.kept for run in RUNS["bare"]])
print("  lowest validation loss in epoch", ", ".join(str(run.stopper.best_epoch) for run in RUNS["bare"]))
print("  out of patience in epoch       ", ", ".join(str(run.stopper.stopped or "never") for run in RUNS["bare"]))
for i, what in ((2, "loss"), (3, "accuracy")):
    print(f"  test {what:8} with the last weights {SCORES['bare'][:, i].mean():.3f}, kept {SCORES['early stopping'][:, i].mean():.3f}")
if not QUICK:
    assert SCORES["bare"][:, 1].mean() > 0.99 and SCORES["bare"][:, 3].mean() < 0.96
    assert SCORES["early stopping"][:, 2].mean() < SCORES["bare"][:, 2].mean()

figure, plot = plt.subplots(figsize=(6, 3.6))
for run in RUNS["bare"][1:]:
    plot.plot(run.val_losses, color=ORANGE, lw=0.6, alpha=0.4)
first = RUNS["bare"][0]
plot.plot(first.train_losses, color=BLUE, label="training")
plot.plot(first.val_losses, color=ORANGE, lw=2, label="validation (thin: other seeds)")
plot.plot(first.stopper.best_epoch, first.stopper.lowest, "o", color="black", label="lowest: these weights are kept")
if first.stopper.stopped:
    plot.axvline(first.stopper.stopped, color=GREY, ls="--", lw=1, label="patience ends")
plot.set(xlabel="epoch", ylabel="loss", ylim=(0, 1.5), title="The bare network: one loss goes to zero, the other turns")
plot.legend(fontsize=8, loc="upper right", framealpha=1)
save(figure, "09_overfitting.png")

# %% [markdown]
# Accuracy need not turn where the loss does: the loss also counts how *sure* a wrong answer was, and a network that trains on
# after it knows every picture mostly becomes surer. Compare the two "test" lines above before you choose what to watch.
#
# ## Dropout
# In training, each number is zeroed with probability p and the others are divided by 1 - p. The next layer cannot rely on any
# one neuron, and every step trains another of 2^n thinned networks. In eval mode nothing is dropped. Thanks to the division
# both modes agree *on average*: E[output] = p * 0 + (1 - p) * x / (1 - p) = x. So the mean over many masks approaches x, with
# an error that falls like 1 / sqrt(masks); behind one more Linear layer, too, but behind a curve only roughly.

# %%
title("Dropout")
measure("dropout", dropout=0.2)
dropped, test = RUNS["dropout"][0].model.eval(), split(0)[2]
with torch.no_grad():
    h = dropped[:-2](test[0][:1])  # [1, 128]: what the last dropout layer gets
    exact = dropped[-1](h)[0, test[1][0]].item()  # the logit of the right digit, nothing dropped
    masked = dropped[-2].train()(h.expand(10_000, -1))  # ten thousand times the same row, every time another mask
    logits = dropped[-1](masked)[:, test[1][0]]
    print(f"  dropped {(masked[:, h[0] > 0] == 0).double().mean():.1%}; the others times {masked.max() / h.max():.4f}")
    for masks in (1, 100, 10_000):
        error = (masked[:masks].mean(0) - h[0]).norm() / h.norm()
        print(f"  masks {masks:5}: their mean is off by {error:6.2%}; logit {logits[:masks].mean():6.3f}, in eval mode {exact:6.3f}")
    assert error < 0.02
    dropped.train()  # the mistake: somebody forgot model.eval()
    answers = torch.stack([dropped(test[0]).argmax(1) for _ in range(20)])
forgotten, right = (answers == test[1]).double().mean().item(), judge(dropped, test)[1]
print(f"  test accuracy in eval mode {right:.1%}; eval() forgotten: {forgotten:.1%} in the mean of 20 calls,")
print(f"  and two calls disagree about {(answers[0] != answers[1]).sum()} of {len(test[1])} pictures")

figure, (plot, curve) = plt.subplots(1, 2, figsize=(8, 3.2), width_ratios=[3, 4])
image = plot.imshow(h.reshape(8, 16), cmap=plt.get_cmap("Blues").with_extremes(bad=ORANGE))
plot.axis("off")
curve.axhline(exact, color=GREY, label="eval mode: nothing dropped")
dots = curve.plot([], [], ".", color=ORANGE, ms=4, label="with one mask")[0]
mean = curve.plot([], [], color=BLUE, label="mean so far")[0]
shown = 6 if QUICK else 60
low, high = logits[:shown].min().item(), logits[:shown].max().item()
curve.set(xlim=(0, shown), ylim=(low - 0.1 * (high - low), high + 0.5 * (high - low)), xlabel="mask", title="logit of the right digit")
curve.legend(fontsize=8, loc="upper right")


def draw_mask(number: int) -> None:
    gone = (masked[number] == 0) & (h[0] > 0)
    image.set_data(masked[number].masked_fill(gone, math.nan).reshape(8, 16))
    plot.set_title(f"128 neurons behind ReLU, mask {number + 1}\norange: had something to say, dropped", fontsize=9)
    dots.set_data(range(1, number + 2), logits[: number + 1])
    mean.set_data(range(1, number + 2), logits[: number + 1].cumsum(0) / torch.arange(1, number + 2))


save(FuncAnimation(figure, draw_mask, frames=shown), "09_dropout.gif", frames_per_second=6)

# %% [markdown]
# ## Weight decay
# Every step pulls every weight a little towards zero: w <- w - lr * decay * w. What counts is lr * decay * steps: where that
# product is small nothing happens, so look at the length of the weights.
#
# Adam's `weight_decay` adds decay * w to the *gradient* (the L2 penalty), and Adam then divides by the gradient's usual size:
# weights with large gradients hardly decay, those with small ones too much. AdamW decays apart from the gradient ("decoupled").
# Below, two weights start at 1; one has large gradients, one small; both cancel in the long run, and what remains is the decay.

# %%
title("Weight decay")
measure("weight decay", decay=0.3)
for name in ("Adam", "AdamW"):
    w = torch.ones(2, requires_grad=True)
    optimizer = getattr(optim, name)([w], lr=0.01, weight_decay=0.3)
    for step in range(200):
        w.grad = torch.tensor([10.0, 0.1]) * (-1) ** step
        optimizer.step()
    print(f"  {name:6} gradients of +-10: the weight is now {w[0].item():5.2f}     gradients of +-0.1: {w[1].item():5.2f}")
print(f"  (1 - lr * decay)^200 = {(1 - 0.01 * 0.3) ** 200:.2f}")
assert (w - (1 - 0.01 * 0.3) ** 200).abs().max() < 0.05

figure, plot = plt.subplots(figsize=(5, 3.2))
decays = {0: RUNS["bare"][0], 0.3: RUNS["weight decay"][0], 3: train(SEEDS[0], decay=3)}
for (decay, run), color in zip(decays.items(), (BLUE, ORANGE, "black")):
    plot.plot(run.norms, color=color, label=f"decay {decay}")
    print(f"  decay {decay:3}, one seed: weights {run.norms[-1]:4.1f} long, training loss {run.last[0]:.4f}, test loss {run.last[2]:.3f}")
plot.set(xlabel="epoch", ylabel="length of all weights", title="Weight decay", ylim=(0, None))
plot.legend(fontsize=8)
save(figure, "09_weight_decay.png")

# %% [markdown]
# ## Augmentation
# A 3 stays a 3 when it is turned a little or moved by half a pixel. So turn and move: no picture comes twice. Only what keeps
# the *label* is allowed: a 6 upside down is a 9, a mirrored 2 is nothing. (Text: synonyms. Sound: noise, stretched time.)

# %%
title("Augmentation")
measure("augmentation", augment=True)
figure, plots = plt.subplots(3, 8, figsize=(7, 2.8))
for row, x in zip(plots, split(0)[0][0]):
    for plot, picture in zip(row, torch.cat([x[None], shift_and_turn(x.expand(7, 64))])):
        plot.imshow(picture.reshape(8, 8), cmap="gray_r", vmin=0, vmax=1)
        plot.set(xticks=[], yticks=[])
        plot.spines[:].set(visible=True, color=GREY)
plots[0, 0].set_title("as written", fontsize=8)
plots[0, 4].set_title("turned and moved", fontsize=8)
save(figure, "09_augmentation.png")

# %% [markdown]
# ## BatchNorm and LayerNorm
# Between Linear and ReLU, subtract a mean, divide by a standard deviation, multiply by gamma and add beta: two more numbers to
# learn per neuron. BatchNorm takes mean and deviation of each *neuron* over the batch, LayerNorm of each *picture* over its
# neurons (which is why Transformers, whose batches mix lengths, use it). So BatchNorm cannot learn from a batch of one, and for
# eval mode it keeps running statistics: nine tenths of the old, one tenth of the newest batch.

# %%
title("BatchNorm and LayerNorm")
measure("BatchNorm", norm="batch")
measure("LayerNorm", norm="layer")
x, batch_norm, layer_norm = 3 + 2 * torch.randn(20, 5), nn.BatchNorm1d(5), nn.LayerNorm(5)
before, after = x[:, 0].mean(), batch_norm(x)[:, 0].mean().abs()
print(f"  first neuron: mean {before:.4f}, behind BatchNorm {after:.4f}; running mean {batch_norm.running_mean[0]:.4f}")
try:
    batch_norm(x[:1])
except ValueError as error:
    print("  BatchNorm, training on a batch of one:", error)
alone = (layer_norm(x)[:1] - layer_norm(x[:1])).abs().max().item()
print(f"  LayerNorm: a row alone and the same row among 20 differ by {alone:.0e}")
assert torch.allclose(batch_norm.running_mean, x.mean(0) / 10, atol=1e-5) and alone < 1e-5

careless, right = copy.deepcopy(RUNS["BatchNorm"][0].model).train(), RUNS["BatchNorm"][0].last[3]
with torch.no_grad():  # somebody forgot eval(), and the pictures come sorted
    hits = [(careless(test[0][test[1] == digit]).argmax(1) == digit).sum().item() for digit in range(10)]
print(f"  eval() forgotten, one batch per digit: test accuracy {sum(hits) / len(test[1]):.1%} instead of {right:.1%};")
print(f"  and the running statistics have moved: back in eval mode, {judge(careless, test)[1]:.1%}")

# %% [markdown]
# What they are said to be good for: ReLU gets inputs of a steady mean and deviation, whatever the layers before it do, and
# training puts up with a larger learning rate. Plain SGD is the test (Adam rescales its steps itself): which of them passes it?

# %%
figure, (scatter, sweep) = plt.subplots(1, 2, figsize=(9, 3.4))
rates, losses = [0.03, 0.1, 0.3, 1.0, 3.0, 10.0], {}
print(f"\n  {'training loss after SGD, learning rate':40}" + "".join(f"{lr:9}" for lr in rates))
for name, norm, color in (("bare", None, GREY), ("LayerNorm", "layer", ORANGE), ("BatchNorm", "batch", BLUE)):
    with torch.no_grad():
        inputs = RUNS[name][0].model.eval()[:-2](split(0)[0][0])  # [100, 128]: what the last ReLU gets
    scatter.plot(inputs.mean(0), inputs.std(0), ".", color=color, ms=4, label=name)
    losses[name] = [sum(loss_after_sgd(norm, lr, EPOCHS // 4, seed) for seed in SEEDS[:3]) / len(SEEDS[:3]) for lr in rates]
    sweep.loglog(rates, losses[name], "o-", color=color, ms=4, label=name)
    print(f"  {name:40}" + "".join(f"{loss:9.4f}" for loss in losses[name]))
assert QUICK or losses["BatchNorm"][3] < losses["bare"][3]
sweep.axhline(math.log(10), color="black", lw=0.5, ls="--", label="guessing: log 10")
scatter.set(xlabel="mean", ylabel="standard deviation", title="what the last ReLU gets, one dot per neuron")
sweep.set(xlabel="learning rate", ylabel="training loss (10: diverged)", title=f"after {EPOCHS // 4} epochs of plain SGD")
scatter.legend(fontsize=8, loc="upper left")
sweep.legend(fontsize=8)
save(figure, "09_norms.png")

# %% [markdown]
# ## What helped?
# Two more rows. One uses everything but LayerNorm, early stopping included. The other is the bare network with the validation
# pictures added to its training: what they would have been worth there. "Minus bare" compares seed by seed; its verdict is "?"
# where a difference of that size may well be chance (paired t test, 5 %: one verdict in twenty is luck all the same). The
# strengths (0.2, 0.3, 20 degrees) were chosen on other seeds, but from the same 1797 pictures: that flatters them a little.

# %%
title("What helped? Mean and standard deviation over the seeds; accuracies in %, their differences in points")
measure("all but LayerNorm", stop=True, norm="batch", dropout=0.2, decay=0.3, augment=True)
measure("bare, 200 pictures", more=True)
print_table(SCORES)
assert QUICK or SCORES["all but LayerNorm"][:, 3].mean() > SCORES["bare"][:, 3].mean()
save(draw_table(SCORES), "09_what_helped.png")

# %% [markdown]
# ## Keep
# * Measure the gap, on pictures that decided nothing. Compare over several seeds, each with itself: one run proves little.
# * A smaller loss is not always a better accuracy; a technique that shines elsewhere may do nothing for your data. Measure.
# * `train()` before learning, `eval()` before judging: dropout gets noisy without it, BatchNorm may collapse.
# * AdamW, not Adam, for weight decay. BatchNorm needs a batch, LayerNorm does not. More data, if you can get it.
#
# Next: `10_cnn_pytorch.py`, networks that look for the same thing everywhere.
