"""Lesson 14: what to do when it does not work, and what to do before others use it.

Between "it trains" and "it works" lie a few bugs that everybody writes once. You will make all of them on purpose, read what they
look like, and repair each: nine ways to NaN, networks that do not learn, layers without a gradient, the mode forgotten. Then come
the questions of production: is half precision worth it here, can a result be had again, what is saved, who keeps the numbers?

Read beside it: python/mistakes.py, the nine mistakes, and dlkernels/train/checks.py, which finds out where a NaN began.
"""

# %%
import copy
import importlib.util
import os
import pickle
import tempfile
import textwrap
from pathlib import Path

import torch
from lesson import BLUE, GREY, ORANGE, QUICK, plt, save, title
from mistakes import Detach, Skip, cases, deep, stacked
from torch import Tensor

import dlkernels.functional as F
import dlkernels.nn as nn
import dlkernels.optim as optim
from dlkernels.bench.timing import interleave
from dlkernels.data import digits
from dlkernels.models.mlp import MLP
from dlkernels.train import Batches, CheckpointError, NotFinite, Trainer, accuracy, overfit_one_batch

THREADS = torch.get_num_threads()
torch.set_num_threads(1)  # batches of 64 rows are small: a second thread would mostly wait
data = digits()
x, y = data.x_train, data.y_train
train, val = Batches(x, y, 64), [(data.x_val, data.y_val)]


def attempt(model, batches=train, loss=F.cross_entropy, lr=0.1, make=optim.SGD, epochs=3, **options) -> list[float]:
    """Mean training loss of every epoch; raises NotFinite."""
    return Trainer(model, loss, make(model.parameters(), lr=lr), **options).fit(batches, epochs=epochs)["train_loss"]


# %% [markdown]
# ## Nine ways to NaN
# NaN is contagious: one in a single weight, and every number behind it is NaN. What you need to know is where it *began*. The
# Trainer looks at two numbers per step, the loss and the norm of the gradient. When one of them is not finite the update has not been
# made yet, so the step is repeated with every module watched, and `NotFinite` names the first place. The place, not the mistake: its
# advice is a guess from the numbers it saw. Read these, too: predictions of 1e+21 tell of a learning rate, not of a log(0).

# %%
title("Nine ways to NaN, and back")
for number, case in enumerate(cases(), start=1):
    try:
        attempt(**case.wrong)
        raise AssertionError(f"{case.name}: nothing happened")
    except NotFinite as error:
        print(textwrap.fill(f"{number}. {case.name}: {error}", 128, initial_indent="  ", subsequent_indent="     "))
        assert (error.where, error.module) == (case.where, case.module) or not case.where
    losses = attempt(**case.right)
    print(f"     Repaired ({case.repair}): training loss {losses[0]:.4g} -> {losses[-1]:.4g}")
    assert losses[-1] < losses[0]

# %% [markdown]
# ## A closer look at log(0)
# "Add 1e-8 to the probability" makes the loss finite, and that is all: an answer that is quite sure *and wrong* then gets no gradient,
# and stays wrong. `cross_entropy` of the raw logits never forms the probability: log p = z - log sum exp z.

# %%
title("Two logits, 0 and 200; the first class is right")
z = torch.tensor([[0.0, 200.0]], requires_grad=True)
p = F.softmax(z, 1)[0, 0]
right = torch.tensor([0])
for name, loss in {"-log(p)": -p.log(), "-log(p + 1e-8)": -(p + 1e-8).log(), "cross_entropy": F.cross_entropy(z, right)}.items():
    (dz,) = torch.autograd.grad(loss, z, retain_graph=True)
    print(f"  {name:16} loss {loss.item():7.2f}   gradient {dz[0].tolist()}")
assert dz[0].tolist() == [-1, 1]

# %% [markdown]
# ## Overfit one batch
# Before any long run: can the network learn *one* batch by heart? A sound one can, in a hundred steps. If not, something is wrong
# with loss, layers, optimizer or data, and you know it after a second. `overfit_one_batch` works on a copy, without dropout.
# "Detached" is what `.detach()`, `.item()` or a detour through NumPy do in the middle of a model: no gradient goes back from there.

# %%
title("Overfit one batch")
batch_x, batch_y = next(iter(train))
elsewhere, shuffled = deep(2), batch_y[torch.randperm(64, generator=torch.Generator().manual_seed(0))]
patients = {
    "sound": (deep(2), batch_x, batch_y, {}),
    "softmax before cross_entropy": (nn.Sequential(deep(2), nn.Softmax(1)), batch_x, batch_y, {}),
    "ReLU after the last layer": (nn.Sequential(deep(2), nn.ReLU()), batch_x, batch_y, {}),
    "detached in the middle": (nn.Sequential(nn.LinearReLU(64, 16), Detach(), nn.Linear(16, 10)), batch_x, batch_y, {}),
    "optimizer of another model": (deep(2), batch_x, batch_y, {"optimizer": lambda params, lr: optim.AdamW(elsewhere.parameters(), lr=lr)}),
    "pictures lost on the way": (deep(2), 0 * batch_x, batch_y, {}),
    "lr a thousand times too low": (deep(2), batch_x, batch_y, {"lr": 1e-5}),
    "labels shuffled": (deep(2), batch_x, shuffled, {}),
}
for name, (model, inputs, labels, options) in patients.items():
    result = overfit_one_batch(model, F.cross_entropy, inputs, labels, **options)
    print(f"  {name:28} {result.text.partition(';')[0]}")
    assert result.learned == (name in ("sound", "labels shuffled"))
try:
    F.cross_entropy(deep(2)(batch_x), batch_y + 1)
except IndexError as error:
    print(f"  {'labels 1 to 10, not 0 to 9':28} {str(error).split(': ', 1)[1].split(', or')[0]}")

# %% [markdown]
# The last row but one is a warning: wrong labels can be learned by heart, too. This test says that the machine can learn, not that
# what it learns is true. Against wrong labels: look at some pictures with their labels, and at the held-out accuracy.
#
# A softmax too many makes no NaN: the best it can do is (1, 0, ..., 0), and cross_entropy of that, taken as logits, is log(1 + 9/e) = 1.46.
#
# ## Learning rate, and the gradient layer by layer
# First suspect in both directions: too low and nothing happens, too high and it explodes. Try powers of ten for a moment.
#
# Second suspect: the gradient does not arrive. Print its norm for every weight. Behind twenty sigmoids, whose slope is at most 1/4,
# the first layers get nothing (vanishing); with weights twice He's, everything is too large everywhere (exploding). Three cures:
# ReLU with He's weights; BatchNorm; x + f(x), a way past the layer.


# %%
def norms_by_layer(model: torch.nn.Module) -> list[float]:
    """Norms of the gradients of 21 weights, from the first layer to the last."""
    weights = [p for p in model.parameters() if p.dim() == 2]
    gradients = torch.autograd.grad(F.cross_entropy(model(batch_x), batch_y), weights)
    return [g.norm().item() for g in gradients[:: len(weights) // 20]]  # a skipped block has two weights: its first


title("Training loss of the second epoch by learning rate (SGD)")
figure, (sweep, profile) = plt.subplots(1, 2, figsize=(10, 3.6))
rates = [10.0**k for k in range(-4, 3)]
ends = [attempt(deep(3), lr=lr, epochs=2, guard=False)[-1] for lr in rates]
print("  " + "   ".join(f"{lr:g}: {loss:.2f}" for lr, loss in zip(rates, ends)))
assert ends[0] > 2 * min(ends) and not ends[-1] < 2
sweep.semilogx(rates, ends, "o-", color=BLUE)
sweep.set(xlabel="learning rate", ylabel="training loss", title="two epochs; beyond the last dot: NaN", xlim=(5e-5, 2e2), ylim=(0, 3))

title("Norm of the gradient, layer by layer; and the training loss after a few epochs (SGD, clipped)")
networks = {
    "sigmoid": (stacked(lambda: nn.Sequential(nn.Linear(64, 64), nn.Sigmoid())), ORANGE),
    "ReLU, twice He": (deep(20, 2.0), "black"),
    "ReLU, He": (deep(20), BLUE),
    "sigmoid, BatchNorm": (stacked(lambda: nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Sigmoid())), GREY),
    "sigmoid, skip": (stacked(lambda: Skip(nn.Linear(64, 64), nn.Sigmoid(), nn.Linear(64, 64))), "#3b8f5a"),
}
norms = {}
for name, (model, color) in networks.items():
    norms[name] = norms_by_layer(model)
    loss = attempt(model, max_norm=1.0, epochs=2 if QUICK else 5)[-1]
    print(f"  {name:20}" + "   ".join(f"layer {k + 1}: {norms[name][k]:7.1e}" for k in (0, 9, 19)) + f"   loss {loss:.2f}")
    profile.semilogy(range(1, 22), norms[name], color=color, label=name)
assert norms["sigmoid"][0] < 1e-6 * norms["sigmoid"][20] and min(norms["ReLU, twice He"]) > 1000 * max(norms["ReLU, He"])
profile.set(xlabel="layer", ylabel="norm of the gradient", title="before the first step", xticks=[1, 5, 10, 15, 20])
profile.legend(fontsize=7, loc="lower right")
save(figure, "14_learning_rate_and_gradients.png")

# %% [markdown]
# ## The mode forgotten
# `eval()` before judging, `train()` before the next epoch. Nothing complains if you forget one. Two questions find out: does the
# same input get the same answer twice? Does the answer to one picture depend on who else is in its batch? And for the other way
# round: do the running statistics of BatchNorm move while it trains?

# %%
title("The mode forgotten")
torch.manual_seed(0)
model = MLP(64, [128, 64, 32], 10, 0.3)
attempt(model, make=optim.AdamW, lr=0.01, epochs=3 if QUICK else 15)
for mode in ("train", "eval"):
    tested = copy.deepcopy(model).train(mode == "train")
    with torch.no_grad():
        first, again, alone = tested(data.x_val), tested(data.x_val), tested(data.x_val[:2])
    gap = (first[:2] - alone).abs().max().item()
    print(f"  {mode + '()':8} held-out accuracy {accuracy(first, data.y_val).item():.1%}; ", end="")
    print(f"same answer twice: {torch.equal(first, again)}; two pictures by themselves: logits differ by up to {gap:.0e}")
assert torch.equal(first, again) and gap < 1e-4
statistics = model.net[1].running_mean.clone()
F.cross_entropy(model.eval()(batch_x), batch_y).backward()
print(f"  trained in eval(): BatchNorm's statistics have moved: {not torch.equal(statistics, model.net[1].running_mean)}")

# %% [markdown]
# ## Half precision, measured
# Of GPUs with tensor cores one hears "half the memory, two to three times as fast, for free". Measure it where you run it: the same
# steps in turns, medians, and everything that is kept for backward. Parameters, gradients and moments stay in float32, and autocast
# keeps copies of the weights in 16 bits besides: only activations shrink, and a small batch in wide layers needs *more*.


# %%
def kept_for_backward(trainer: Trainer, batch: tuple[Tensor, Tensor]) -> float:
    """MiB, parameters not counted."""
    kept, own = {}, {p.data_ptr() for p in trainer.model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.data_ptr(): t}) or t, lambda t: t):
        trainer.training_step([batch])
    return sum(t.nbytes for where, t in kept.items() if where not in own) / 2**20


title(f"Half precision: one training step on this CPU, threads: {THREADS}")
torch.set_num_threads(THREADS)
for rows, width in ((64, 256), (2048, 256), (256, 1024)):
    batch, trainers = (torch.randn(rows, width), torch.randint(10, (rows,))), {}
    for precision in (None, "bfloat16", "float16"):
        wide = nn.Sequential(*(nn.LinearReLU(width, width) for _ in range(4)), nn.Linear(width, 10))
        trainers[precision] = Trainer(wide, F.cross_entropy, optim.AdamW(wide.parameters(), lr=1e-4), precision=precision)
    memory = {precision: kept_for_backward(trainer, batch) for precision, trainer in trainers.items()}
    steps = {name: lambda trainer=trainer, batch=batch: trainer.training_step([batch]) for name, trainer in trainers.items()}
    timings = interleave(steps, min_seconds=0.1 if QUICK else 2.0, min_samples=5, cold=False)
    print(f"  {f'{rows} rows, 4 layers of {width}':29}", end="")
    print("   ".join(f"{name or 'float32'} {1e3 * t.median:5.2f} ms, {memory[name]:4.1f} MiB" for name, t in timings.items()), end="")
    print(f"   (bfloat16: {timings[None].median / timings['bfloat16'].median:.2f} times as fast)")
    assert rows < 2048 or memory["bfloat16"] < 0.7 * memory[None]
torch.set_num_threads(1)

# %% [markdown]
# Faster where products decide *and* the processor multiplies bfloat16 in hardware. Elsewhere the casts eat what is saved, and float16
# has no hardware for it on many CPUs. If the numbers above show no gain, there is none for you, here.
#
# ## The same again
# A bug that comes back can be found. Same seed, same bits: our kernels add in a fixed order, whatever the number of threads. Another
# seed tells how much of your result is luck.

# %%
title("The same again")


def result_of(seed: int, threads: int) -> tuple[Tensor, float]:
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    model = MLP(64, [128, 64, 32], 10, 0.3)
    trainer = Trainer(model, F.cross_entropy, optim.AdamW(model.parameters(), lr=0.01), metrics={"accuracy": accuracy}, seed=seed)
    history = trainer.fit(Batches(x, y, 64, seed=seed), val, epochs=2 if QUICK else 5)
    torch.set_num_threads(1)
    return torch.cat([p.detach().flatten() for p in model.parameters()]), history["accuracy"][-1]


results = {(seed, threads): result_of(seed, threads) for seed, threads in ((0, 1), (0, 2), (1, 1), (2, 1))}
print(f"  seed 0, one thread and two: weights equal to the last bit: {torch.equal(results[0, 1][0], results[0, 2][0])}")
print("  held-out accuracy of seeds 0, 1, 2:", ", ".join(f"{results[seed, 1][1]:.1%}" for seed in range(3)))
assert torch.equal(results[0, 1][0], results[0, 2][0]) and not torch.equal(results[0, 1][0], results[1, 1][0])

# %% [markdown]
# ## What to save
# The `state_dict`, names and tensors, and load it with `weights_only=True`. A pickled model runs code when it is loaded, and needs
# your classes to be where they were. A checksum, or a flipped bit becomes a flipped weight: torch writes one but does not read it.
# For use without your model's Python there is `torch.export`: the graph and its weights in one file. It calls our kernels, so
# `import dlkernels` comes before loading; they are for inference, hence `no_grad`.

# %%
title("What to save")
folder = Path((temporary := tempfile.TemporaryDirectory()).name)
keeper = Trainer(model, F.cross_entropy, optim.AdamW(model.parameters(), lr=0.01), max_norm=1.0, folder=folder, log_every=20)
keeper.fit(train, val, epochs=2)
try:
    torch.save(model, folder / "pickled.pt")
    torch.load(folder / "pickled.pt", weights_only=True)
except pickle.UnpicklingError as error:
    print(f"  a pickled model, weights_only=True: {str(error).split('.')[0]}")
file = bytearray((folder / "last.pt").read_bytes())
file[file.index(model.net[0].weight.detach().numpy().tobytes()) + 3] ^= 64  # the upper bit of the exponent of the first weight
(folder / "last.pt").write_bytes(file)
flipped = torch.load(folder / "last.pt", weights_only=True)["model"]["net.0.weight"][0, 0]
print(f"  one bit flipped: torch.load says nothing, and a weight of {model.net[0].weight[0, 0]:.4f} is {flipped:.2e};")
try:
    keeper.fit(train, val, epochs=2, resume=True)
    raise AssertionError("damaged, and nobody noticed")
except CheckpointError as error:
    print(f"  resume=True says: {str(error).replace(str(folder) + '/', '')}")
exported = torch.export.export(model.eval(), (batch_x,), dynamic_shapes=({0: torch.export.Dim("rows")},))
torch.export.save(exported, folder / "model.pt2")
with torch.no_grad():
    served = torch.export.load(folder / "model.pt2").module()(data.x_val)
    print(f"  exported, loaded, asked about {len(data.x_val)} pictures: logits differ by {(served - model(data.x_val)).abs().max().item()}")
    assert torch.equal(served, model(data.x_val))

# %% [markdown]
# ## Who keeps the numbers
# `trackers=` takes names. "jsonl" needs nothing and is the default. Where they are installed: TensorBoard's event files; Weights & Biases
# offline, to be sent later with `wandb sync`; MLflow in an SQLite file. Nothing leaves your machine unless you send it.

# %%
title("Who keeps the numbers")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
run = folder / "run"
names = ["jsonl", *(name for name in ("tensorboard", "wandb", "mlflow")[: 1 if QUICK else 3] if importlib.util.find_spec(name))]
tracked = Trainer(model, F.cross_entropy, optim.AdamW(model.parameters()), max_norm=1.0, folder=run, trackers=names, log_every=20)
tracked.fit(train, val, epochs=1)
for name in names:
    sizes = [file.stat().st_size for file in run.rglob("*") if file.is_file() and name in str(file.relative_to(run))]
    print(f"  {name:12} files: {len(sizes)}, {sum(sizes) / 1024:.0f} KiB")
    assert sizes
print("  metrics.jsonl:", *(run / "metrics.jsonl").read_text().splitlines()[1:], sep="\n    ")
temporary.cleanup()

# %% [markdown]
# ## Keep
# * NaN: learning rate, zero_grad, log(0), exploding gradients, wrong loss, bad data, in this order; then roots, divisions, float16.
# * Not learning: overfit one batch first. Then learning rate, labels, shuffling, gradients per layer, size, time.
# * Why backpropagation: one backward pass gives every derivative; nudging would take a forward pass per weight.
# * Vanishing gradients: a product of slopes below 1. ReLU, normalisation, skip connections.
# * Measure before you believe: half precision, a seed's luck, a checkpoint that was never loaded.
