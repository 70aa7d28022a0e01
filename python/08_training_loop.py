"""Lesson 8: the training loop, from six lines to a run that survives a power cut.

Every network is trained by the same six steps. You will write them out, leave one out at a time and see what breaks, and then
put around them what a long run needs: honest evaluation, a schedule for the learning rate, early stopping, checkpoints, large
batches on little memory, half precision, a log, and more than one process.

Run it alone, or on two processes, the same text:  torchrun --nproc-per-node 2 python/08_training_loop.py
Read beside it: dlkernels/train/trainer.py. Its `training_step` is the loop below; the files beside it are the rest.
"""

# %%
import json
import math
import os
import sys
import tempfile
from pathlib import Path

import torch
from lesson import BLUE, GREY, ORANGE, QUICK, plt, save, title

import dlkernels.functional as F
import dlkernels.nn as nn
import dlkernels.optim as optim
from dlkernels.data import digits
from dlkernels.train import Batches, Trainer, accuracy, join, leave, make_schedule, spread

torch.set_num_threads(1)  # batches of 64 rows are small: a second thread would mostly wait
RANK, SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun; without it: alone
ROWS, EPOCHS = 1408, 4 if QUICK else 40  # 1408 = 22 full batches of 64, which any two processes can share


def build(dropout: float = 0.2, seed: int = 0) -> nn.Sequential:
    """64-128-64-10, with LayerNorm: it looks at one row at a time, so a row's result does not depend on who else is in its batch."""
    torch.manual_seed(seed)
    first = [nn.Linear(64, 128), nn.LayerNorm(128), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*first, nn.Linear(128, 64), nn.LayerNorm(64), nn.ReLU(), nn.Dropout(dropout), nn.Linear(64, 10))


# %% [markdown]
# ## Alone first
# For a comparison at the end, every process first trains by itself. Then `join()` lets those that torchrun started meet, over NCCL
# between GPUs and gloo between CPUs. From there on one of them speaks, and `spread` puts a model on all of them.

# %%
data = digits()
alone = Trainer(lonely := build(dropout=0), F.cross_entropy, optim.AdamW(lonely.parameters(), lr=0.01), max_norm=1.0)
alone.fit(Batches(data.x_train[:ROWS], data.y_train[:ROWS], 64), epochs=3)
device = join()
if RANK > 0:
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
data = data.to(device, torch.float32)
x, y = data.x_train[:ROWS], data.y_train[:ROWS]
train, val = Batches(x, y, 64), Batches(data.x_val, data.y_val, 64, shuffle=False)
own = [(temporary := tempfile.TemporaryDirectory()).name]
if SIZE > 1:
    torch.distributed.broadcast_object_list(own)  # now the first process's: checkpoints lie in one place
folder = Path(own[0])


def largest_difference(a: torch.nn.Module, b: torch.nn.Module) -> float:
    return max((p - q).abs().max().item() for p, q in zip(a.parameters(), b.parameters()))


def together(model: torch.nn.Module) -> torch.nn.Module:
    return spread(model.to(device), "ddp" if SIZE > 1 else "none")


def trainer_of(model: torch.nn.Module, schedule: str = "constant", epochs: int = EPOCHS, **options: object) -> Trainer:
    model = together(model)
    optimizer = optim.AdamW(model.parameters(), lr=0.01)
    scheduler, metrics = make_schedule(schedule, optimizer, epochs, len(train)), {"accuracy": accuracy}
    return Trainer(model, F.cross_entropy, optimizer, scheduler=scheduler, max_norm=1.0, metrics=metrics, **options)


title(f"{SIZE} of us, on {device.type}; {len(train)} batches of 64 rows an epoch, {64 // SIZE} for each of us")

# %% [markdown]
# ## Six steps
# Clear, predict, compare, differentiate, clip, move. `Trainer.training_step` has the same six. With our optimizers it lets `step`
# do the clipping (`max_grad_norm`), within the update, which saves a pass over the gradients.


# %%
def six_steps(model: torch.nn.Module, optimizer: optim.Optimizer, batches: object, zero: bool = True, max_norm: float = 1.0) -> list:
    """Train on ``batches``; returns (loss, norm of the gradient) of every step."""
    course = []
    model.train()
    for x, y in batches:
        if zero:
            optimizer.zero_grad()  # 1. forget the last batch's gradients
        logits = model(x)  # 2. predict
        loss = F.cross_entropy(logits, y)  # 3. how wrong, as one number
        loss.backward()  # 4. d loss / d parameter, added to every .grad
        norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)  # 5. a leash for wild batches
        optimizer.step()  # 6. every parameter a little downhill
        course.append((loss.item(), norm.item()))  # .item(): the number. The tensor would keep its whole graph alive
    return course


title("Six steps by hand, against the Trainer's")
trainer = trainer_of(build())
torch.manual_seed(1)  # the same dropout masks for all
losses = [trainer.training_step([batch]).item() for batch in train]
for name, itself, max_norm in (("step clips itself", 1.0, math.inf), ("clip, then step", None, 1.0)):
    by_hand = together(build())
    torch.manual_seed(1)
    course = six_steps(by_hand, optim.AdamW(by_hand.parameters(), lr=0.01, max_grad_norm=itself), train, max_norm=max_norm)
    gap = largest_difference(by_hand, trainer.model)
    print(f"  {name:17} loss {course[0][0]:.4f} -> {course[-1][0]:.4f}; after {len(train)} steps weights differ by at most {gap:.0e}")
    assert gap < 1e-5 if itself is None else gap == 0 and [loss for loss, _ in course] == losses

# %% [markdown]
# Zero: bit for bit the same. Clipping in a pass of its own rounds every gradient once more, hence the last digit.
#
# ## Leave one out
# Without `zero_grad` every step follows the sum of all gradients so far. Without clipping one wild batch can undo the work of many:
# here batch 30 forgot that grey values go from 0 to 16 and must be divided by 16. Plain SGD and two plain layers, because Adam divides
# by the size of the gradients and LayerNorm by the size of its input, and both would hide much of it.

# %%
title("Without zero_grad, without clipping")
four_epochs = list(train) * 4
wild = [(16 * x, y) if number == 30 else (x, y) for number, (x, y) in enumerate(four_epochs)]
courses, ends, shown = {}, {}, (0, 29, 30, 31)
print(f"  {'loss (norm of the gradient) in step':36}" + "".join(f"{n:15}" for n in shown) + "     mean of the last 22")
for name in ("all six", "without zero_grad, without clip", "without zero_grad", "all six, a wild batch", "without clip, a wild batch"):
    torch.manual_seed(0)
    plain = together(nn.Sequential(nn.LinearReLU(64, 128), nn.Linear(128, 10)))
    max_norm, batches = math.inf if "without clip" in name else 1.0, wild if "wild" in name else four_epochs
    courses[name] = six_steps(plain, optim.SGD(plain.parameters(), lr=1.0), batches, "without zero_grad" not in name, max_norm)
    ends[name] = torch.tensor(courses[name][-22:]).mean(0).tolist()
    print(f"  {name:36}" + "".join(f"{loss:8.2f} ({norm:4.1f})" for loss, norm in [courses[name][n] for n in shown] + [ends[name]]))
assert ends["without zero_grad, without clip"][0] > 2 > 0.5 > ends["without zero_grad"][0] and ends["without zero_grad"][1] > 1
assert courses["without clip, a wild batch"][31][0] > 3 * courses["all six, a wild batch"][31][0]

figure, plots = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True)
for number, (name, course) in enumerate(courses.items()):
    plots[number // 3].semilogy([loss for loss, _ in course], color=(BLUE, ORANGE, "black")[number % 3], label=name)
for plot in plots:
    plot.axhline(math.log(10), color=GREY, lw=0.8, ls="--", label="guessing: log 10")
    plot.set(xlabel="step", ylabel="loss of the batch")
    plot.legend(fontsize=7)
if RANK == 0:
    save(figure, "08_leave_one_out.png")

# %% [markdown]
# Look at the third row: with the leash on, a forgotten `zero_grad` acts like momentum and the network learns all the same. Only the
# norm, which stays near the leash's 1, tells. Leave out one of the other four and no weight changes, or Python complains.
#
# ## Evaluation
# `eval()`: no dropout. `no_grad()`: nothing is kept for a backward that never comes. And the mean must be over *rows*: the last
# batch is often smaller, and a mean of batch means gives each of its rows more weight than the others.

# %%
title("Evaluation")
network, kept = getattr(trainer.model, "module", trainer.model), {}  # DistributedDataParallel keeps the model in .module
with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.data_ptr(): t}) or t, lambda t: t):
    network.train()(data.x_val)
activations = sum(t.nbytes for t in kept.values() if len(t) == len(data.x_val)) / 2**10
with torch.no_grad():
    forgotten = [F.cross_entropy(network(data.x_val), data.y_val).item() for _ in range(2)]
    network.eval()
    losses = [F.cross_entropy(network(x), y).item() for x, y in zip(data.x_val.split(64), data.y_val.split(64))]
    print(f"  eval() forgotten: loss {forgotten[0]:.4f}, and once more {forgotten[1]:.4f}")
    print(f"  no_grad() forgotten: {activations:.0f} KiB kept for backward; with it the graph is {network(data.x_val).grad_fn}")
sizes, judged = [len(y) for y in data.y_val.split(64)], trainer.evaluate(val)
over_batches, over_rows = sum(losses) / len(losses), sum(loss * size for loss, size in zip(losses, sizes)) / sum(sizes)
print(f"  batches of {sizes}: mean of batch means {over_batches:.5f}, mean over rows {over_rows:.5f}")
print(f"  Trainer.evaluate: {judged['val_loss']:.5f}, accuracy {judged['accuracy']:.1%}")
assert forgotten[0] != forgotten[1] and activations > 0 and abs(over_batches - over_rows) > 1e-5
assert math.isclose(judged["val_loss"], over_rows, rel_tol=1e-5)

# %% [markdown]
# ## Schedules
# Large steps early, when everything is wrong; small ones late, when a large one only jumps around the minimum, as the grey curve
# does. *Cosine* falls smoothly to zero. *Plateau*: a tenth at the sixth epoch in vain. *One-cycle* rises from lr/25, then falls to
# nearly nothing; it moves after every step, the others once per epoch. One seed: this shows the shapes, not which of them wins.

# %%
title(f"Schedules, {EPOCHS} epochs each")
figure, (rates, curves) = plt.subplots(1, 2, figsize=(9, 3.2))
for schedule, color in (("constant", GREY), ("cosine", BLUE), ("plateau", ORANGE), ("one_cycle", "black")):
    history = trainer_of(build(), schedule).fit(train, val, epochs=EPOCHS)
    rates.semilogy(history["lr"], color=color, label=schedule)
    curves.semilogy(history["val_loss"], color=color)
    h, a = history["val_loss"], history["accuracy"][-1]
    print(f"  {schedule:10} last lr {history['lr'][-1]:.0e}; held-out loss: lowest {min(h):.4f}, last {h[-1]:.4f}; accuracy {a:.1%}")
rates.set(xlabel="epoch", ylabel="learning rate", title="learning rate at the end of each epoch")
curves.set(xlabel="epoch", ylabel="held-out loss", title="what came of it")
rates.legend(fontsize=8)
if RANK == 0:
    save(figure, "08_schedules.png")

# %% [markdown]
# ## Early stopping, last and best
# With 128 pictures and no dropout the network learns them by heart: the held-out loss falls, then no more. `patience=8` stops after
# eight epochs without a new low. `last.pt` is where to go on from, `best.pt` is what to use.

# %%
title("Early stopping")
stopper = trainer_of(build(dropout=0), patience=8, folder=folder / "few")
losses = stopper.fit(Batches(x[:128], y[:128], 32), val, epochs=200)["val_loss"]
best = build(seed=5)
best.load_state_dict(torch.load(folder / "few" / "best.pt", weights_only=True, map_location="cpu")["model"])
loss_of_best = trainer_of(best).evaluate(val)["val_loss"]
print(f"  stopped by {stopper.stopped!r} after {len(losses)} of 200 epochs; lowest held-out loss in number {losses.index(min(losses)) + 1}")
print(f"  held-out loss with the last weights {losses[-1]:.4f}, with best.pt {loss_of_best:.4f}")
assert stopper.stopped == "patience" and len(losses) == losses.index(min(losses)) + 1 + 8
assert math.isclose(loss_of_best, min(losses), rel_tol=1e-5)

# %% [markdown]
# ## Kill and resume, and the log
# To go on *as if nothing had happened* takes more than weights: moments, schedule, place within the epoch, the state of the random
# numbers (dropout!). A checkpoint is written beside the old one and then renamed, so a cut while writing leaves the old one whole.
# Below, the power fails in the second epoch; the second attempt begins with other first weights.
#
# `fit` returns the history, a number per epoch and name. With a folder it also writes `metrics.jsonl`: a line of JSON for the settings,
# every `log_every` steps, and every epoch. Resuming drops the lines of steps that are not in the checkpoint.


# %%
class Failing(Batches):
    """Batches that break off in the second epoch, after 12 of them."""

    def __iter__(self) -> object:
        yield from list(super().__iter__())[: 12 if self.epoch == 1 else None]
        if self.epoch == 1:
            raise InterruptedError("power cut")


title("Kill and resume")
often = {"schedule": "one_cycle", "epochs": 3, "save_every": 5, "log_every": 10}
whole = trainer_of(build(), folder=folder / "whole", **often)
expected = whole.fit(train, val, epochs=3)
try:
    trainer_of(build(), folder=folder / "cut", **often).fit(Failing(x, y, 64), val, epochs=3)
except InterruptedError as error:
    state = torch.load(folder / "cut" / "last.pt", weights_only=True)
    print(f"  {error} after {22 + 12} steps; the last checkpoint is of step {state['progress']['step']} and holds {', '.join(state)}")
again = trainer_of(build(seed=99), folder=folder / "cut", **often)
resumed = again.fit(train, val, epochs=3, resume=True)
gap, names = largest_difference(again.model, whole.model), ("lr", "val_loss", "accuracy", "train_loss")
same = [name for name in names if resumed[name] == expected[name]]
print(f"  resumed, against the run in one piece: equal to the last bit: {', '.join(same)}; largest difference of a weight: {gap}")
_, *lines = [json.loads(line) for line in (folder / "cut" / "metrics.jsonl").read_text().splitlines()]
print(*(f"  log: { {name: round(value, 4) for name, value in line.items()} }" for line in lines[:3]), sep="\n")
assert len(same) == len(names) and gap == 0 and [line["val_loss"] for line in lines if "val_loss" in line] == expected["val_loss"]

# %% [markdown]
# ## Mixed precision
# Autocast computes the layers in 16 bits. Where rounding would add up, float32 stays: parameters, their gradients, the optimizer's
# moments, the loss, and the sums inside every kernel.
#
# bfloat16 has the range of float32. float16 has not: what is below 3e-8 becomes 0, and small gradients vanish. So `GradScaler`
# multiplies the loss by 65536 and divides the gradients before the update; when they overflow it skips the update and halves the
# factor, which doubles after 2000 good steps. On a GPU with bfloat16 (Ampere or later) you can do without.

# %%
title(f"Mixed precision, {EPOCHS} epochs each")
tiny = torch.tensor(1e-8)
print(f"  1e-8 in float16: {tiny.half().item()}; times 65536, in float16, divided: {(tiny * 65536).half().item() / 65536:.2e}")
for precision in (None, "bfloat16", "float16"):
    run, seen = trainer_of(build(), "cosine", precision=precision), {}
    run.model.register_forward_hook(lambda module, inputs, output, seen=seen: seen.update(logits=output.dtype))
    history = run.fit(train, val, epochs=EPOCHS)
    kept = [t for p, state in run.optimizer.state.items() for t in (p, p.grad, state["exp_avg"], state["exp_avg_sq"])]
    print(f"  {precision or 'float32':8} held-out loss {history['val_loss'][-1]:.4f}, accuracy {history['accuracy'][-1]:.1%}; ", end="")
    print(f"logits {seen['logits']}; parameters, gradients, moments {', '.join({str(t.dtype) for t in kept})}")
    assert {t.dtype for t in kept} == {torch.float32} and seen["logits"] == getattr(torch, precision or "float32")

# %% [markdown]
# ## A large batch in parts: one after the other, or in several processes
# The gradient of a mean over 64 rows is the mean of four gradients over 16. One process can add up four (backward *adds*; each loss
# is weighted by its share of the rows) and then make one update, which needs a quarter of the activations at a time. Or every process
# holds the whole model and takes its share of the batch; gradients are averaged, all make the same update, the models stay equal.
# Exact up to rounding where rows do not see each other. BatchNorm's do: its means would be over 16 rows.

# %%
title("A large batch in parts")
runs = {"64 rows, one process alone": alone}
for name, accumulate in ((f"64 rows, {SIZE} of us", 1), ("4 times 16 rows", 4)):
    runs[name] = trainer_of(build(dropout=0), accumulate=accumulate)
    runs[name].fit(Batches(x, y, 64 // accumulate), epochs=1 if accumulate > 1 else 3)
for name, run in runs.items():
    print(f"  {name:26} {run.progress.step} updates, training losses {[round(loss, 6) for loss in run.history['train_loss']]}")
    assert all(math.isclose(a, b, rel_tol=1e-3) for a, b in zip(alone.history["train_loss"], run.history["train_loss"]))
if SIZE == 1:
    print("  on two: torchrun --nproc-per-node 2 python/08_training_loop.py")
leave()
temporary.cleanup()

# %% [markdown]
# ## Keep
# * zero_grad, forward, loss, backward, clip, step. Print the norm of the gradient: it tells when one was left out.
# * `eval()` and `no_grad()` to judge; means over rows. Keep best *and* last, and stop when it gets no better.
# * A checkpoint is weights, moments, schedule, place and random numbers. Test yours: cut a run, resume, compare bits.
# * Processes, accumulation, half precision change where and how the gradient is computed. The six steps stay.
#
# Next: `09_regularization.py`, what to do when the network knows its pictures by heart.
