"""Lesson 12: the Transformer, in which every token looks at every other one and takes what it needs.

You will write attention as a query to a database, measure what the division by sqrt(d_k) is for, put order back into a thing that has
none, in three ways, watch two heads find out how to work together, see what a model may not see, and let one write Python's manual.

Read beside it: dlkernels/ops/scaled_dot_product_attention.py (the kernel that never writes the matrix of weights down), rope.py
beside it, and dlkernels/models/transformer.py and gpt.py (the block and the model used here). Pictures: python/attention_maps.py.
"""

# %%
import attention_maps
import torch
from attention_maps import fit
from lesson import QUICK, save, title
from torch import Tensor

import dlkernels.functional as F
import dlkernels.nn as nn
from dlkernels import data_text
from dlkernels.models.gpt import GPT
from dlkernels.models.mlp import parameter_count
from dlkernels.models.transformer import MultiHeadAttention, TransformerBlock

torch.manual_seed(0)
torch.set_num_threads(1)  # models of 32 to 96 numbers a token are small: a second thread would mostly wait
generator = torch.Generator().manual_seed(0)

# %% [markdown]
# ## A database that answers a little of everything
# A query q says what is looked for, a key k what is to be had, a value v what is handed out. A dictionary hands out the value of
# the key that *equals* the query. Attention hands out a mean of all values, each weighted by how well its key fits:
#
#     weights = softmax(q k^T / sqrt(d_k))        y = weights v
#
# It is a dictionary made differentiable: what fits better a little counts a little more, so there is a gradient.

# %%
title("One query, four keys")
keys = torch.eye(4)
values = torch.tensor([[10.0], [20.0], [30.0], [40.0]])
for sharpness in (0.5, 2.0, 8.0, 32.0):
    query = sharpness * keys[2:3]
    weights = F.softmax(query @ keys.T / 4**0.5, 1)
    y = F.scaled_dot_product_attention(query, keys, values)
    print(f"  {sharpness:4} times key 3: weights {[round(w, 3) for w in weights[0].tolist()]}, answer {y.item():.2f}")
    assert torch.allclose(y, weights @ values, atol=1e-4)
assert abs(y.item() - 30) < 1e-3

# %% [markdown]
# ## Why sqrt(d_k)
# A product of two vectors of d independent numbers of variance 1 has variance d. With d = 256 scores are some 16 apart, and softmax
# gives everything to the largest: it is *saturated*, its derivative p (1 - p) is nearly 0, and nothing is learned about who else
# might have been asked. Divided by sqrt(d), scores have variance 1 whatever d is. Measured with 64 keys per query:

# %%
title("Softmax over 64 keys, with and without the division: 500 queries")
widths = [4, 32, 256, 1024] if QUICK else [2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
quantities = "standard deviation of the scores", "largest weight, mean", "gradient of the scores, median"
measured: dict[str, dict[str, list[float]]] = {name: {"q k^T": [], "q k^T / sqrt(d_k)": []} for name in quantities}
for d in widths:
    q, k = torch.randn(500, d), torch.randn(500, 64, d)
    for name, scale in (("q k^T", 1.0), ("q k^T / sqrt(d_k)", d**-0.5)):
        scores = (scale * (k @ q[..., None])[..., 0]).requires_grad_()
        weights = F.softmax(scores, 1)
        (slope,) = torch.autograd.grad((weights * torch.randn(500, 64)).sum(), scores)  # for an error of size 1 in every weight
        for line, value in zip(measured.values(), (scores.std(), weights.max(1).values.mean(), slope.norm(dim=1).median())):
            line[name].append(value.item())
for name, lines in measured.items():
    for label, row in lines.items():
        print(f"  {name:33}{label:18}" + "".join(f"{value:8.3f}" for value in row))
large, gradient = measured["largest weight, mean"], measured["gradient of the scores, median"]
assert large["q k^T"][-1] > 0.9 and max(large["q k^T / sqrt(d_k)"]) < 0.3
assert gradient["q k^T"][-1] < 0.5 * gradient["q k^T / sqrt(d_k)"][-1]
save(attention_maps.draw_scaling(widths, measured), "12_scaling.png")

# %% [markdown]
# ## Several heads, and the block
# One set of weights can follow one kind of relation. So the vector is cut into H heads of d_k = C / H numbers, each with queries,
# keys and values of its own; the results are put side by side and mixed by W_o. That costs no more than one head of C numbers.
#
# A block is attention, then a perceptron for each token, each with LayerNorm in front and x + f(x) around it (lesson 10: depth).

# %%
title("A block")
C, H = 64, 4
block, x = TransformerBlock(C, H, 4 * C, dropout=0.0), torch.randn(2, 10, C)
h = block.ln1(x)


def by_hand(attention: MultiHeadAttention, x: Tensor) -> Tensor:
    q, k, v = (W(x).view(2, 10, H, C // H).transpose(1, 2) for W in (attention.W_q, attention.W_k, attention.W_v))  # [B, H, T, d_k]
    weights = F.softmax(q @ k.transpose(-2, -1) / (C // H) ** 0.5, -1)
    return attention.W_o((weights @ v).transpose(1, 2).reshape(2, 10, C))


y = x + by_hand(block.attn, h)
normed = F.layer_norm(y, (C,), block.ln2.weight, block.ln2.bias)
y = y + block.ff[2](F.gelu(F.linear(normed, block.ff[0].weight, block.ff[0].bias)))
others = parameter_count(block) - 12 * C**2
print(f"  {parameter_count(block):,} parameters: 4 C^2 for attention, 8 C^2 for the perceptron, and {others} others")
print(f"  by hand and by the kernels: {(y - block(x)).abs().max():.0e} apart")
shuffled = torch.randperm(10)
print(f"  tokens in another order: results in that order, {(block(x)[:, shuffled] - block(x[:, shuffled])).abs().max():.0e} apart")
assert torch.allclose(y, block(x), atol=1e-5) and torch.allclose(block(x)[:, shuffled], block(x[:, shuffled]), atol=1e-5)

# %% [markdown]
# ## Where does a token stand?
# That last line is the catch: for attention "cat sat" is "sat cat". Order has to be put into the numbers:
#
# * **sinusoidal** (2017): add sin and cos of the position at C / 2 speeds, as a clock has hands.
# * **learned** (GPT-2, BERT): add a vector for each place, trained like all else. There is none beyond the last place.
# * **rotary** (most since 2022): turn pairs of numbers of q and k by angles that grow with the position. Two vectors turned by a
#   and b meet at an angle changed by a - b: the product depends on the *distance* only, and the values are left alone.

# %%
title("A vector and itself, at a distance: the product")
T = 64
table = nn.SinusoidalPositions(C)(torch.zeros(T, C))
same = torch.ones(1, T, C) / C**0.5
turned = nn.RotaryPositions(C)(same)[0]
fit_by_distance = turned @ turned[0]
print("  " + "".join(f"  {t}: {fit_by_distance[t]:.2f}" for t in (0, 1, 2, 4, 8, 32)))
print(f"  the product of two rows of sinusoids is the same curve, {(table @ table[0] / (C / 2) - fit_by_distance).abs().max():.0e} apart")
moved = nn.RotaryPositions(C)(same, start=1000)[0]
print(f"  and both a thousand places later, {(moved @ moved[0] - fit_by_distance).abs().max():.0e} apart")
assert torch.allclose(moved @ moved[0], fit_by_distance, atol=1e-4)
save(attention_maps.draw_encodings(table, {"turned q k": fit_by_distance}), "12_encodings.png")

# %% [markdown]
# Now measured: the same small GPT reads 64 characters at a time of Python's language reference and says what comes next. Then it
# reads held-out text at other lengths, always judged by the same characters. (Causal attention without positions is not quite blind:
# the first token sees one token, the tenth sees ten, and that can be noticed.)

# %%
STEPS = 20 if QUICK else 200
V, text = len(data_text.ALPHABET), data_text.characters()
held_out = torch.cat([text.x_val.flatten(), text.y_val[-1, -1:]])


def next_character() -> tuple[Tensor, Tensor]:
    rows = torch.randint(len(text.x_train), (16,), generator=generator)
    return text.x_train[rows], text.y_train[rows]


@torch.no_grad()
def loss_at(model: GPT, T: int) -> float:
    """Held-out loss of the same characters, the last eight of rows of 256, read with T characters before each row's end."""
    rows = held_out.unfold(0, 257, 64)
    logits = model(rows[:, 256 - T : 256])[:, -8:]
    return F.cross_entropy(logits.flatten(0, 1), rows[:, -8:].flatten()).item()


title(f"Held-out loss after {STEPS} steps of 64 characters, by the number of characters in view")
losses, ends, models = {}, {}, {}
for positions in ("none", "sinusoidal", "learned", "rope"):
    torch.manual_seed(1)
    generator.manual_seed(1)
    model = models[positions] = GPT(V, 64 if positions == "learned" else 256, 64, 4, 2, dropout=0.0, positions=positions)
    losses[positions] = fit(model, next_character, STEPS, lr=5e-3)
    ends[positions] = {T: loss_at(model.eval(), T) for T in (16, 32, 64, 128, 256) if T <= model.context}
    print(f"  {positions:10}" + "".join(f"   {T:3}: {loss:.3f}" for T, loss in ends[positions].items()))
try:
    models["learned"](held_out[None, :65])
except ValueError as error:
    print("  learned, 65 characters:", error)
assert QUICK or ends["rope"][64] < min(ends["none"][64], ends["sinusoidal"][64])
save(attention_maps.draw_losses(losses, ends), "12_positions.png")

# %% [markdown]
# Distances beyond 64 were never seen, and neither sinusoids nor rotary positions are read well there: that they *can* be computed
# does not mean that the model knows what to make of them. Learned ones are not even there.
#
# ## Two heads that work together
# Each text is a dictionary of its own: a key, its value, another key, its value, drawn at random; when a key comes again, its value
# is known. So find where the key has been before, *and look one further*. One attention cannot: what fits the key "2" is the "2"
# before, not what came after it. Two can. In the first block a head tells each value which key stood before it. In the second a
# head asks "who comes after a 2?", and that value answers. The pair is called an induction head; nobody builds it in.

# %%
KEYS, VALUES, PAIRS, HEADS = 4, 8, 8, 2  # tokens 0 to 3 are keys, 4 to 11 values


def dictionaries(rows: int = 64) -> tuple[Tensor, Tensor]:
    answers = KEYS + torch.rand(rows, VALUES, generator=generator).argsort(1)[:, :KEYS]
    keys = torch.randint(KEYS, (rows, PAIRS), generator=generator)
    x = torch.stack([keys, answers.gather(1, keys)], 2).flatten(1)
    again = torch.stack([(keys[:, i : i + 1] == keys[:, :i]).any(1) for i in range(PAIRS)], 1)
    y = torch.full_like(x, -100)  # -100: cannot be known, is not asked
    y[:, ::2] = x[:, 1::2].masked_fill(~again, -100)
    return x, y


def hits(model: GPT, rows: tuple[Tensor, Tensor]) -> float:
    with torch.no_grad():
        return (model(rows[0]).argmax(-1) == rows[1])[rows[1] >= 0].double().mean().item()


title("Values of keys that come again: right answers in new texts")
readers = {}
for blocks in (1, 2):
    torch.manual_seed(0)
    generator.manual_seed(0)
    readers[blocks] = GPT(KEYS + VALUES, 2 * PAIRS, 64, HEADS, blocks, dropout=0.0)
    fit(readers[blocks], dictionaries, 30 if QUICK else 500, lr=5e-3)
    test = dictionaries(300)
    print(f"  {blocks} block{'s' * (blocks > 1)}: {hits(readers[blocks].eval(), test):.1%}")
both = readers[2]
assert QUICK or (hits(both, test) > 0.95 and hits(readers[1], test) < 0.8)

weights = attention_maps.maps(both, test[0])  # [blocks, rows, heads, asks, answers]
t, asked = torch.arange(2 * PAIRS), test[1] >= 0
seen_before = (test[0][:, :, None] == test[0][:, None, :]) & (t[:, None] > t)
successor = torch.nn.functional.pad(seen_before, (1, 0))[..., :-1]  # one further than where this token was before
print("\n  weight that a value gives to its key, that a key gives to its values before, and right answers without the head:")
names: list[list[str]] = []
for number, block in enumerate(both.blocks):
    names.append([])
    for head in range(HEADS):
        w, part = weights[number, :, head], block.attn.W_o.weight.data[:, 64 // HEADS * head : 64 // HEADS * (head + 1)]
        before, after = w.diagonal(-1, 1, 2)[:, ::2].mean().item(), (w * successor).sum(-1)[asked].mean().item()
        kept = part.clone()
        part.zero_()  # nothing of this head gets into the stream
        without = hits(both, test)
        part.copy_(kept)
        names[-1].append(f"value to its key {before:.2f}\nkey to its values {after:.2f}, without it {without:.0%}")
        print(f"    block {number + 1}, head {head + 1}: {before:.2f} {after:.2f} {without:6.1%}")
save(attention_maps.draw_heads(weights[:, 0], names, ["ABCD01234567"[n] for n in test[0][0].tolist()]), "12_heads.png")

# %% [markdown]
# ## What a model may see
# A *decoder* (GPT) sees what came before: it can write, and every place of a text is an exercise. An *encoder* (BERT) sees both
# sides: better for understanding, but "what comes next?" is no exercise for it, it looks. So one hides characters and asks for them.

# %%
title("The same model, causal or not")


def model_that_sees(causal: bool) -> GPT:
    torch.manual_seed(1)
    model = GPT(V, 256, 64, 4, 2, dropout=0.0)
    for block in model.blocks:
        block.attn.causal = causal  # the only difference between an encoder and a decoder
    return model


def hidden_characters(rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
    x = text.x_train[torch.randint(len(text.x_train), (24,), generator=generator)] if rows is None else rows
    gone = torch.rand(x.shape, generator=generator) < 0.25
    return x.masked_fill(gone, 0), x.masked_fill(~gone, -100)


test, seeing = hidden_characters(text.x_val), {}
for causal in (True, False):
    generator.manual_seed(3)
    name, seeing[causal] = "causal" if causal else "both sides", model_that_sees(causal)
    fit(seeing[causal], hidden_characters, 2 * STEPS, lr=5e-3)
    print(f"  {name:10} hidden characters found: {hits(seeing[causal].eval(), test):.1%}")
cheat = model_that_sees(causal=False)
loss = fit(cheat, next_character, STEPS, lr=5e-3)[-1]
print(f"  both sides, asked for the next character: loss {loss:.3f} ({losses['rope'][-1]:.3f} causal), because it is written there")
assert QUICK or (hits(seeing[False], test) > hits(seeing[True], test) + 0.02 and loss < 0.5 * losses["rope"][-1])
sentence = data_text.encode("the value of the name")[None]
pictures = [attention_maps.maps(seeing[causal], sentence)[:, 0].mean((0, 1)) for causal in (True, False)]
labels = [data_text.decode([c]) for c in sentence[0]]
save(attention_maps.draw_masks({"causal": pictures[0], "both sides": pictures[1]}, labels), "12_masks.png")

# %% [markdown]
# ## A model that writes
# The GPT with rotary positions goes on learning for a while, then continues a text: draw a character by its probability, append it,
# go on. Keys and values of what is there are kept (the *KV cache*), so each new character costs one query. The temperature divides
# the logits: below 1 the likely gets likelier. top_k and top_p leave out the tail, where each is unlikely and all together are not.

# %%
writer, more = models["rope"].train(), 20 if QUICK else 500
loss = fit(writer, next_character, more, lr=3e-3)[-1]
title(f"After {more} steps more, training loss {loss:.2f}")
prompt = data_text.encode("The expression ")
for options in ({"temperature": 0.0}, {"temperature": 0.6}, {"temperature": 1.0, "top_p": 0.9}, {"temperature": 1.5}):
    written = writer.generate(prompt, 100, generator=torch.Generator().manual_seed(0), **options)
    print(f"  {options}\n    {data_text.decode(written)!r}")
with torch.no_grad():
    by_cache = writer.generate(prompt, 20, temperature=0)
    assert all(by_cache[t] == writer.eval()(by_cache[None, :t])[0, -1].argmax() for t in range(len(prompt), len(by_cache)))

# %% [markdown]
# ## Keep
# * softmax(q k^T / sqrt(d_k)) v: a dictionary that answers with a weighted mean. sqrt(d_k) keeps softmax where it has a gradient.
# * Heads are cut out of the same vector and cost nothing extra; what each is for is found out in training, and blocks build on it.
# * Attention sees a set. Sinusoidal and learned positions are added to the token; rotary ones turn q and k, and distance counts.
# * Causal to write, both sides to understand. The mask is the only difference.
# * The weights need never be written down: the kernel works on a tile at a time, with memory linear in the length.
#
# Next: `13_finetune_bert.py`, what somebody else's training is good for.
