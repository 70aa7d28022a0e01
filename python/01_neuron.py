"""Lesson 1: one neuron, what it can do, and the small problem that it cannot.

A neuron weighs its inputs, adds a bias, and passes the sum through a curve:

    z = w . x + b        a = sigmoid(z) = 1 / (1 + e^-z)

You will compute one by hand, see that its decision is a straight line, train it to tell a handwritten 0 from a 1, watch it
fail at XOR for a reason that fits in four lines, and repair it with a second layer.

Read beside it: dlkernels/ops/linear.py, the kernel's contract. One call, F.linear_act, does the sum and the curve.
"""

# %%
import math

import torch
from lesson import BLUE, GREY, ORANGE, QUICK, FuncAnimation, plt, save, title
from torch import Tensor

import dlkernels.functional as F
import dlkernels.nn as nn
import dlkernels.optim as optim
from dlkernels.data import digits

torch.manual_seed(0)
torch.set_num_threads(1)  # everything here is tiny: waking a second thread would cost more than it computes

# %% [markdown]
# ## By hand
# Three inputs, three weights, one bias. A positive weight says "this input speaks for yes", a negative one "for no", and the
# bias says how easily the neuron is convinced when nobody speaks.

# %%
title("One neuron by hand")
x = [0.5, -1.0, 2.0]
w = [0.8, 0.3, -0.4]
b = 1.2

terms = [w_i * x_i for w_i, x_i in zip(w, x)]
z = sum(terms) + b
a = 1 / (1 + math.exp(-z))
print(f"w . x = {' + '.join(f'{w_i} * {x_i}' for w_i, x_i in zip(w, x))} = {sum(terms):.2f}")
print(f"z = w . x + b = {sum(terms):.2f} + {b} = {z:.2f}")
print(f"a = sigmoid(z) = {a:.4f}")

# %% [markdown]
# The kernel computes the same number. It takes a batch of inputs `[M, K]` and a *layer* of neurons: weight `[N, K]`, one row
# per neuron, and bias `[N]`. Here M = N = 1.

# %%
neuron = F.linear_act(torch.tensor([x]), torch.tensor([w]), torch.tensor([b]), activation="sigmoid")
print(f"the kernel says  {neuron.item():.4f}")
assert abs(neuron.item() - a) < 1e-6

# %% [markdown]
# ## The decision is a straight line
# The neuron says yes when a > 1/2, that is when z > 0. The border w . x + b = 0 is a line (a plane with three inputs, a
# hyperplane with more). w stands at right angles to it, and the origin is |b| / |w| away from it. With b = 0 every border
# passes through the origin: that is what the bias is for.

# %%
title("The border of a neuron with two inputs")
w, b = torch.tensor([3.0, 4.0]), torch.tensor(-5.0)
print(f"w = {w.tolist()}, b = {b.item()}: the border is {(-b / w.norm()).item():.2f} away from the origin, in the direction of w")
for point in ([0.0, 0.0], [0.6, 0.8], [2.0, 1.0]):
    score = (w @ torch.tensor(point) + b).item()
    side = "on the border" if abs(score) < 1e-6 else "yes" if score > 0 else "no"
    print(f"  point {point}: z = {score:5.2f}, distance to the border {score / w.norm().item():5.2f}: {side}")

# %% [markdown]
# ## Training: is this a 0 or a 1?
# Real handwriting, 8 x 8 grey values. A 0 is hollow and a 1 is not, so two numbers per picture will do: the ink in the
# middle 2 x 2 pixels, and the ink in the columns beside it.
#
# Loss: binary cross-entropy, the price of being surprised,
#
#     L = -mean( y log a + (1 - y) log(1 - a) )
#
# Its derivative, once sigmoid is chained behind it, is a pleasant surprise: the logarithm and the exponential cancel, and
# what remains is how wrong the neuron was.
#
#     dz = a - y        dw = mean(dz x)        db = mean(dz)


# %%
def zeros_and_ones() -> tuple[Tensor, Tensor]:
    """Features [M, 2], standardised, and labels [M]: 1.0 where the digit is a 1."""
    data = digits()
    chosen = data.y_train < 2
    pictures = data.x_train[chosen].reshape(-1, 8, 8)
    middle = pictures[:, 3:5, 3:5].mean((1, 2))
    beside = torch.cat([pictures[:, 2:6, 1:3], pictures[:, 2:6, 5:7]], 2).mean((1, 2))
    features = torch.stack([middle, beside], 1)
    return (features - features.mean(0)) / features.std(0), data.y_train[chosen].float()


title("One neuron learns to tell 0 from 1")
features, labels = zeros_and_ones()
weight, bias, learning_rate = torch.tensor([[-1.0, 0.5]]), torch.zeros(1), 0.5  # a bad start, on purpose
frames = []
for step in range(6 if QUICK else 60):
    a = F.linear_act(features, weight, bias, activation="sigmoid")[:, 0]
    loss = -(labels * a.log() + (1 - labels) * (1 - a).log()).mean()
    accuracy = ((a > 0.5) == (labels == 1)).double().mean()
    frames.append((weight[0].clone(), bias.item(), loss.item(), accuracy.item()))
    if step in (0, 1, 2, 5, 10, 20, 59):
        w1, w2 = weight[0].tolist()
        print(f"  step {step:2d}  loss {loss:.4f}  accuracy {accuracy:6.1%}  w = ({w1:5.2f}, {w2:5.2f})  b = {bias.item():5.2f}")
    dz = a - labels
    weight = weight - learning_rate * (dz[:, None] * features).mean(0, keepdim=True)
    bias = bias - learning_rate * dz.mean()

# %% [markdown]
# The animation replays exactly these steps: the line is w . x + b = 0, the arrow is w.

# %%
figure, (plane, curve) = plt.subplots(1, 2, figsize=(8, 3.6), width_ratios=[3, 2])
plane.scatter(*features[labels == 0].T, s=10, color=ORANGE, label="a handwritten 0")
plane.scatter(*features[labels == 1].T, s=10, color=BLUE, label="a handwritten 1")
plane.set(xlim=(-2.5, 2.5), ylim=(-2.5, 2.5), xlabel="ink in the middle", ylabel="ink beside it", aspect="equal")
plane.legend(loc="lower left", fontsize=8)
(border,) = plane.plot([], [], color="black", lw=2)
arrow = plane.quiver([0], [0], [1], [0], angles="xy", scale_units="xy", scale=1, color=GREY)
curve.set(xlim=(0, len(frames)), ylim=(0, 1.1 * frames[0][2]), xlabel="step", ylabel="loss")
(falling,) = curve.plot([], [], color="black")


def draw_step(number: int) -> None:
    w, b, loss, accuracy = frames[number]
    foot = -b * w / (w @ w)  # the point of the border closest to the origin
    along = torch.tensor([-w[1], w[0]]) / w.norm()
    ends = torch.stack([foot - 9 * along, foot + 9 * along])
    border.set_data(ends[:, 0], ends[:, 1])
    arrow.set_offsets(foot)
    arrow.set_UVC(*(w / w.norm()))
    falling.set_data(range(number + 1), [frame[2] for frame in frames[: number + 1]])
    plane.set_title(f"step {number}: loss {loss:.3f}, accuracy {accuracy:.1%}")


save(FuncAnimation(figure, draw_step, frames=[*range(len(frames))[:20], *range(20, len(frames), 4)]), "01_neuron.gif")

# %% [markdown]
# ## XOR: what one layer cannot do
# Exclusive or: yes if exactly one of two inputs is on. Suppose a neuron could. Then
#
#     (0,0) no :             b <= 0
#     (1,0) yes:        w1 + b >  0
#     (0,1) yes:        w2 + b >  0      add these two:  w1 + w2 + 2b > 0,  so  w1 + w2 + b > -b >= 0
#     (1,1) no :   w1 + w2 + b <= 0      ... and this one says the opposite.
#
# No weights exist. Training finds that out the slow way: the best it can do is to say "1/2" to everything, at a loss of log 2.

# %%
title("XOR with one layer")
XOR_x = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
XOR_y = torch.tensor([[0.0], [1.0], [1.0], [0.0]])


def fit(model: torch.nn.Module, steps: int, lr: float) -> tuple[float, list[Tensor]]:
    """Train on the four points; return the last loss and the answers on the way."""
    optimizer, answers = optim.Adam(model.parameters(), lr=lr), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(model(XOR_x), XOR_y)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            answers.append(torch.sigmoid(model(GRID))[:, 0])
    return loss.item(), answers


side = torch.linspace(-0.5, 1.5, 61)
GRID = torch.cartesian_prod(side, side)  # [61 * 61, 2]: where to ask the network, for the picture

one_layer = nn.Linear(2, 1)
loss, _ = fit(one_layer, steps=400, lr=0.1)
print(f"loss {loss:.4f}, and log 2 = {math.log(2):.4f};  answers {torch.sigmoid(one_layer(XOR_x)).flatten().tolist()}")

# %% [markdown]
# Two layers *without* a curve between them do not help. A line of a line is a line:
#
#     W2 (W1 x + b1) + b2  =  (W2 W1) x + (W2 b1 + b2)

# %%
two_linear = nn.Sequential(nn.Linear(2, 8), nn.Linear(8, 1))
loss, _ = fit(two_linear, steps=400, lr=0.05)
first, second = two_linear
merged = F.linear(XOR_x, second.weight @ first.weight, second.weight @ first.bias + second.bias)
difference = (merged - two_linear(XOR_x)).abs().max().item()
print(f"two linear layers: loss {loss:.4f};  largest difference to the one merged layer {difference:.1e}")

# %% [markdown]
# ## Two layers and one bend
# Put relu(z) = max(z, 0) between the layers and XOR can be written down. h1 counts the inputs that are on. h2 is on only if
# both are. One minus twice the other:
#
#     h1 = relu(x1 + x2)        h2 = relu(x1 + x2 - 1)        y = h1 - 2 h2

# %%
title("XOR with two layers")
h = F.linear_relu(XOR_x, torch.tensor([[1.0, 1.0], [1.0, 1.0]]), torch.tensor([0.0, -1.0]))
y = F.linear(h, torch.tensor([[1.0, -2.0]]))
for point, hidden, out in zip(XOR_x.int().tolist(), h.tolist(), y.flatten().tolist()):
    print(f"  x = {point}   h = {hidden}   y = {out:.0f}")
assert torch.equal(y, XOR_y)

# %% [markdown]
# Nobody writes weights down. Eight hidden neurons find their own way; in the animation the colour is the network's answer,
# and you can see the border bend.

# %%
torch.manual_seed(3)
two_layers = nn.Sequential(nn.LinearReLU(2, 8), nn.Linear(8, 1))
steps = 20 if QUICK else 240
loss, answers = fit(two_layers, steps, lr=0.05)
rounded = [round(answer, 3) for answer in torch.sigmoid(two_layers(XOR_x)).flatten().tolist()]
print(f"learned: loss {loss:.4f} after {steps} steps;  answers {rounded}")

figure, plane = plt.subplots(figsize=(4.2, 4))
picture = plane.imshow(torch.zeros(61, 61), extent=(-0.5, 1.5, -0.5, 1.5), origin="lower", cmap="coolwarm", vmin=0, vmax=1)
plane.scatter(*XOR_x.T, c=["white" if y else "black" for y in XOR_y.flatten()], s=120, edgecolors="black", zorder=3)
plane.set(xlabel="x1", ylabel="x2", xticks=[0, 1], yticks=[0, 1])
shown = range(0, steps, 8)


def draw_answer(number: int) -> None:
    picture.set_data(answers[shown[number]].reshape(61, 61).T)
    plane.set_title(f"XOR, two layers, step {shown[number]}\nwhite points should be red, black ones blue", fontsize=9)


save(FuncAnimation(figure, draw_answer, frames=len(shown)), "01_xor.gif", frames_per_second=12)

# %% [markdown]
# ## Keep
# * A neuron is a weighted sum, a bias and a curve; its decision border is flat.
# * Layers without a curve between them collapse into one layer. The curve is what makes depth worth having.
# * dz = a - y for sigmoid with cross-entropy: the error itself is the gradient.
#
# Next: `02_activations.py`, the curves, and how they fail.
