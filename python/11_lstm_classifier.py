"""Lesson 11: recurrent networks, which read one word after the other and keep in mind what matters.

A text has no fixed length, and what a word means depends on those before it. You will compute an LSTM's step by hand, follow the
gradient back through time until it vanishes (and see that it does so in an LSTM as well, until a gate is opened), train networks
to remember two numbers among fifty, tell libraries apart by their docstrings, watch the gates over a text, and measure what it
is worth to read from both ends.

Read beside it: dlkernels/ops/recurrent.py and dlkernels/models/lstm.py. Tasks and training are in python/sequences.py, drawings in
python/unrolled.py.
"""

# %%
import sequences
import torch
import unrolled
from lesson import QUICK, save, title
from sequences import gradient_by_distance, layer_of, lengths_of, train_classifier, unroll
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import dlkernels.nn as nn
from dlkernels.data_text import LIBRARIES, UNKNOWN, WORDS, docstrings, vocabulary
from dlkernels.models.mlp import parameter_count

torch.manual_seed(0)
torch.set_num_threads(1)  # small layers: a second thread would mostly wait
SEEDS, ADD_STEPS, EPOCHS, READ_STEPS = (range(1), 30, 1, 12) if QUICK else (range(2), 700, 6, 250)

# %% [markdown]
# ## One step
# An RNN has one vector, the state h, and renews all of it at every word: h = tanh(W x + U h + b). An LSTM has a second one, the
# cell c, which is only added to and scaled. Three gates between 0 and 1, a number for each unit, say by how much:
#
#     i, f, o := sigmoid(W x + U h + b)    write, keep, show; each with its own W, U, b
#     g := tanh(W x + U h + b)             what would be written
#     c := f * c + i * g
#     h := o * tanh(c)
#
# A GRU does with two gates and no c: h = (1 - z) * n + z * h, so what is not kept is overwritten.

# %%
title("An LSTM by hand")
lstm, x = nn.LSTM(3, 4), torch.randn(7, 3)
by_hand, (by_kernel, _) = unroll(lstm, x)["h"], lstm(x)
print(f"  7 steps, by the formulas and by the kernel: largest difference {(by_hand - by_kernel).abs().max():.0e}")
assert torch.allclose(by_hand, by_kernel, atol=1e-6)
counts = {kind: parameter_count(getattr(nn, kind)(32, 32)) for kind in ("RNN", "GRU", "LSTM")}
print("  parameters of 32 units over 32 inputs:", ", ".join(f"{kind} {count:,}" for kind, count in counts.items()), "(1 : 3 : 4)")
assert counts["GRU"] == 3 * counts["RNN"] and counts["LSTM"] == 4 * counts["RNN"]

# %% [markdown]
# ## The gradient on its way back
# How much does the last state depend on the word 30 steps ago? On its way there the gradient is multiplied by dh_t / dh_{t-1} 30
# times. In an RNN that is U^T times a slope of at most 1: with the usual first weights each step makes it smaller, and with
# larger ones larger, until numbers overflow. An LSTM has a second way, through c, and there the factor is f.

# %%
title("Gradient of the last state by steps back, relative to that of the last step; before training")
KINDS = ("RNN", "GRU", "LSTM", "LSTM, f open")


def table(lines: dict[str, Tensor], back: tuple[int, ...] = (1, 10, 30, 50)) -> None:
    print("  ", f"{'steps back':22}", *(f"{steps:9}" for steps in back))
    for name, sizes in lines.items():
        print("  ", f"{name:22}", *(f"{(sizes[-1 - steps] / sizes[-1]).item():9.1e}" for steps in back))


born, scaled = {}, {}
for kind in KINDS:
    torch.manual_seed(0)
    born[kind] = gradient_by_distance(layer_of(kind))
for factor in (1, 2, 4):
    torch.manual_seed(0)
    layer = layer_of("RNN")
    with torch.no_grad():
        layer.weight_hh_l0 *= factor
    scaled[f"RNN, U times {factor}"] = gradient_by_distance(layer)
table(born | scaled)
ratios = {name: (sizes[-51] / sizes[-1]).item() for name, sizes in (born | scaled).items()}
assert max(ratios[kind] for kind in ("RNN", "GRU", "LSTM")) < 1e-8 and ratios["LSTM, f open"] > 0.01 and ratios["RNN, U times 4"] > 100

# %% [markdown]
# Look at the table twice. An LSTM as it comes forgets as fast as an RNN: its forget gates start near sigmoid(0) = 0.5, and half of
# a half of a half is soon nothing. "f open" is the same layer with a 2 in the forget gates' bias: sigmoid(2) = 0.88. So gates do not
# *prevent* that a gradient vanishes. They make how much is kept something that can be *learned*, and chosen at the start.
#
# Against what explodes: `clip_grad_norm_` shortens a gradient that is too long before the step, here to 1, and all runs below do.
#
# ## Can it remember?
# Fifty numbers, two of them marked, one in each half; the answer is their sum. Who always says 1 is off by 1/6 in the mean
# square. To do better one must carry a number over up to fifty steps in which nothing of interest happens.

# %%
title(f"The adding problem: mean squared error after {ADD_STEPS} steps (mean of the last 50 steps, each seed)")
curves, learned = {}, {}
for kind in KINDS:
    runs = [sequences.learn_to_add(kind, 50, ADD_STEPS, seed) for seed in SEEDS]
    curves[kind] = [errors for errors, _, _ in runs]
    learned[kind] = gradient_by_distance(runs[0][1])
    ends = [sum(errors[-50:]) / len(errors[-50:]) for errors in curves[kind]]
    there = [next((n for n in range(20, len(e)) if sum(e[n - 20 : n]) < 20 * 0.03), "never") for e in curves[kind]]
    print(f"   {kind:13}", *(f"{end:8.4f}" for end in ends), "   below 0.03 after", ", ".join(map(str, there)), "steps")
    assert QUICK or (min(ends) > 0.14 if kind == "RNN" else min(ends) < 0.05)
save(unrolled.draw_adding(curves, 1 / 6), "11_adding.png")

title("The gradient again, after training")
table(learned)
assert QUICK or min(learned[kind][-51] / learned[kind][-1] for kind in KINDS[1:]) > 1e4 * learned["RNN"][-51] / learned["RNN"][-1]
sides = {"before training": born, "after learning to add": learned, "RNN, larger weights": scaled}
save(unrolled.draw_gradients(sides), "11_gradients.png")

# %% [markdown]
# The RNN never finds out that the marked numbers matter, as what they would teach it arrives as nothing. GRU and LSTM
# start with a gradient as small, but theirs grows once a few gates have opened; hence the long plateau and the sudden fall, and
# hence the head start of the layer whose gates were open from the beginning.
#
# ## Whose docstring?
# Now words. 2160 docstrings of Python's standard library, numpy and torch, the first 40 words of each as numbers of a vocabulary
# of 2000; a text that is shorter is filled up with 0, whose embedding is 0 and stays so (`padding_idx=0`). Held out: 540 docstrings
# of *other files*. Two layers read in both directions, and the last state of each direction says what was read.


# %%
class LSTMClassifier(nn.Module):
    def __init__(self, vocab_size: int, emb_dim: int, hidden: int, n_classes: int, n_layers: int = 2, both: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, emb_dim, padding_idx=0)
        self.lstm = nn.LSTM(emb_dim, hidden, n_layers, batch_first=True, dropout=0.3, bidirectional=both)
        self.fc = nn.Linear(hidden * (1 + both), n_classes)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:  # x: (batch, length)
        emb = self.embed(x)  # (batch, length, emb_dim)
        if lengths is not None:  # then nothing is computed for what is filled up
            emb = pack_padded_sequence(emb, lengths, batch_first=True, enforce_sorted=False)
        _, (h_n, _) = self.lstm(emb)  # h_n: (layers * directions, batch, hidden), the last states
        h = torch.cat([h_n[-2], h_n[-1]], dim=1) if self.lstm.bidirectional else h_n[-1]
        return self.fc(h)


class BagOfWords(nn.Module):
    """The rival, which cannot know in which order the words stood: the mean of their vectors, and one Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc = nn.Embedding(WORDS, 32, padding_idx=0), nn.Linear(32, len(LIBRARIES))

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.fc(self.embed(x).sum(1) / lengths[:, None])


split, words = docstrings(), vocabulary()
title(f"Accuracy on {len(split.y_val)} held-out docstrings, {EPOCHS} epochs (each seed; one seed more or less changes some points)")
NETWORKS = {
    "LSTM, filling is read": (lambda: LSTMClassifier(WORDS, 32, 32, 3), False),
    "LSTM, lengths known": (lambda: LSTMClassifier(WORDS, 32, 32, 3), True),
    "LSTM, forth only": (lambda: LSTMClassifier(WORDS, 32, 32, 3, both=False), True),
    "bag of words": (BagOfWords, True),
}
trained, scores = {}, {}
for name, (make, lengths) in NETWORKS.items():
    scores[name], mixed = [], []
    for seed in SEEDS:
        torch.manual_seed(seed)
        trained[name] = model = make()
        scores[name].append(train_classifier(model, EPOCHS, seed, lengths))
        mixed.append(sequences.hits(model, sequences.shuffled(split.x_val), split.y_val, lengths))
    print(f"   {name:22} {parameter_count(model):7,} parameters:", *(f"{score:7.1%}" for score in scores[name]), end="")
    print("    words shuffled:", *(f"{score:7.1%}" for score in mixed))
assert QUICK or min(min(found) for found in scores.values()) > 0.6

# %% [markdown]
# Compare with the last row before you are impressed. Which words a docstring has says nearly all that can be told here, and the
# order, which an LSTM is for, adds little: shuffle the words, and see how few answers change. Try the cheap rival first, always.
#
# With lengths known each direction ends where the text does. Without, the way forth goes through the filling afterwards, and what
# it knew must survive up to 30 steps of nothing: a small adding problem. Does it learn to let the filling pass, or does it rely on
# the way back, which meets the filling first and ends at the first word?

# %%
title("Gates of the first layer, way forth, in the network that has to read the filling; and what each way is worth")
model = trained["LSTM, filling is read"]
short = [row for row in split.x_val if 10 <= lengths_of(row[None])[0] <= 20][:40]
with torch.no_grad():
    seen = [(unroll(model.lstm, model.embed(row)), row != 0) for row in short]
means = {}
for letter, name in (("i", "write"), ("f", "keep")):
    means[letter] = [torch.cat([gates[letter][real if on else ~real] for gates, real in seen]).mean().item() for on in (True, False)]
    print(f"  {letter} ({name:5}) on words {means[letter][0]:.2f}, on filling {means[letter][1]:.2f}")
halves = {}
for name in ("LSTM, filling is read", "LSTM, lengths known"):
    halves[name] = [sequences.hits_of_half(trained[name], way, NETWORKS[name][1]) for way in ("forth", "back")]
    print("  {:22} from the way forth alone {:.1%} right, from the way back alone {:.1%}".format(name, *halves[name]))
assert QUICK or halves["LSTM, filling is read"][0] < halves["LSTM, lengths known"][0] - 0.02

# %% [markdown]
# It does not: the gates are on average the same on filling as on words, and the way forth pays for it. The way back answers in its
# place. A network that reads forth only needs the lengths (or the filling at the beginning).
#
# ## The gates over a text
# Take the network that knows the lengths and a docstring it was never shown. The first layer's way forth, word by word: how much
# is written, kept and shown by the units whose cells move most. To the right the answer of the *whole* network if the text ended
# there: it knows the length, so a beginning is a text.

# %%
title("A held-out docstring of torch, word by word")
model = trained["LSTM, lengths known"]
with torch.no_grad():
    answers = model(split.x_val, lengths_of(split.x_val)).argmax(1)
    known, long = (split.x_val == UNKNOWN).sum(1) == 0, (lengths_of(split.x_val) >= 16) & (lengths_of(split.x_val) <= 30)
    candidates = ((split.y_val == 2) & known & long & ((answers == 2) | QUICK)).nonzero().flatten()
    row = split.x_val[candidates[0]]
    row = row[row != 0]
    text = [words[number] for number in row]
    gates = unroll(model.lstm, model.embed(row))
    first = model.lstm(pack_padded_sequence(model.embed(row[None]), torch.tensor([len(row)]), batch_first=True))[1][0][0, 0]
    beginnings = [model(row[None, :end], torch.tensor([end])) for end in range(1, len(row) + 1)]
assert torch.allclose(gates["h"][-1], first, atol=1e-5)  # the definition ends where the kernel does
chances = torch.cat(beginnings).softmax(1)
print("  ", " ".join(text))
for end in (1, len(row) // 2, len(row)):
    print(f"   after {end:2} words:", ", ".join(f"{name} {chance:.0%}" for name, chance in zip(LIBRARIES, chances[end - 1].tolist())))
units = sorted(gates["c"].std(0).topk(12).indices.tolist())
save(unrolled.draw_gates(gates, text, units), "11_gates.png")
shown = 4 if QUICK else len(text)
some = {letter: values[:shown] for letter, values in gates.items()}
save(unrolled.animate_unrolling(some, text[:shown], units, chances[:shown], LIBRARIES), "11_unrolled.gif", frames_per_second=2)

# %% [markdown]
# ## What reading from both ends is worth
# For whose docstring it is, little: see above. So a task where it matters: one character of Python's language reference is hidden,
# which is it? Three readers of about the same size: one knows what precedes, one what follows, one both (a bidirectional layer,
# where the state before the gap comes from the way forth and the state behind it from the way back).

# %%
title(f"Which character stands here? {READ_STEPS} steps, accuracy on held-out topics")
losses, accuracies = {}, {}
for sees, hidden in (("what precedes", 96), ("what follows", 96), ("both sides", 64)):
    reader, losses[sees], accuracies[sees] = sequences.train_reader(sees, hidden, READ_STEPS)
    print(f"   {sees:14} {parameter_count(reader):7,} parameters, {accuracies[sees]:.1%} right")
assert QUICK or accuracies["both sides"] > max(accuracies["what precedes"], accuracies["what follows"]) + 0.1
save(unrolled.draw_readers(losses, accuracies), "11_both_ways.png")

# %% [markdown]
# Use both where all of the text is there: classes, tags, gaps. What precedes is all there is when a text is being *written* or a
# series goes on: the first reader is a language model, `dlkernels train char_lm`, and `Forecaster` in the same file reads voltages.
#
# ## Keep
# * RNN: one state, overwritten at every step. LSTM: a cell that is scaled by f and added to. GRU: one state, kept in part; 3/4 of
#   the LSTM's weights, and here no worse.
# * Gradients through time vanish or explode like powers. Gates let the network learn how much; start with forget gates open.
# * Clip the gradient. Give lengths, or know that the filling is read. Two directions where the whole text is known.
# * Compare with a bag of words before you believe that order mattered.
#
# Next: `14_debugging_production.py`, what to do when it does not work.
