"""Lesson 10: convolutional networks, which look for the same thing everywhere.

A picture is more than a list of grey values: neighbours belong together, and an edge is an edge wherever it lies. You will slide
a filter over a digit by hand, see what that saves and what it promises, train a small network of filters against one without,
look at what its filters became, measure how far they see, and stack so many that they stop learning, until a detour helps.

Read beside it: dlkernels/ops/conv2d.py. Canvas, shifts and training are in python/filters.py, drawings in python/feature_maps.py.
"""

# %%
from functools import partial
from itertools import product

import feature_maps
import filters
import torch
from filters import pictures, shift, train
from lesson import QUICK, save, title
from torch import Tensor

import dlkernels.functional as F
import dlkernels.nn as nn
from dlkernels.data import digits
from dlkernels.models.mlp import parameter_count

torch.manual_seed(0)
torch.set_num_threads(1)  # small pictures: a second thread would mostly wait
SEEDS, STEPS = (range(1), 80) if QUICK else (range(8), 300)

# %% [markdown]
# ## A filter slides
# Lay a 3 x 3 filter on the picture, multiply each weight with the pixel under it, add up: one number of the result. Move on by
# one pixel, and again. With more channels the sum goes over those, too, and every filter makes one channel of the result:
#
#     y[o, i, j] = b[o] + sum over c, r, s of  w[o, c, r, s] * x[c, i * stride + r * dilation - padding, the same with j and s]
#
# where pixels outside of the picture count 0. The weights below answer to edges: white on the left, dark on the right.

# %%
title("A filter slides")
small = digits().x_train[1].reshape(8, 8)
edge = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]])
by_hand = torch.zeros(6, 6)
for i, j in product(range(6), range(6)):
    by_hand[i, j] = (small[i : i + 3, j : j + 3] * edge).sum()
by_kernel = F.conv2d(small[None, None], edge[None, None])[0, 0]
print("  ", str(by_kernel).replace("\n", "\n   "))
print(f"  by hand and by kernel: largest difference {(by_hand - by_kernel).abs().max():.0e}")
assert torch.allclose(by_hand, by_kernel, atol=1e-5)
animation = feature_maps.animate_sliding(small, edge, by_kernel, [0, 1, 8, 35] if QUICK else list(range(36)))
save(animation, "10_sliding.gif", frames_per_second=3)

# %% [markdown]
# ## How large is the result?
# With dilation d, a filter of k pixels spans d * (k - 1) + 1. It fits (in + 2 * padding - d * (k - 1) - 1) / stride + 1 times,
# rounded down. Pooling slides a window in the same way. Odd k with padding (k - 1) / 2 keeps the size ("same").

# %%
title("Output sizes")


def output_size(n: int, k: int, stride: int = 1, padding: int = 0, dilation: int = 1) -> int:
    return (n + 2 * padding - dilation * (k - 1) - 1) // stride + 1


print("  ", *(f"{name:>9}" for name in ("in", "kernel", "stride", "padding", "dilation", "formula", "really")))
for n, k, *rest in ((224, 3, 1, 1, 1), (28, 5, 1, 0, 1), (8, 3, 2, 1, 1), (7, 3, 2, 0, 1), (16, 3, 1, 2, 2), (32, 7, 2, 3, 1)):
    found = F.conv2d(torch.zeros(1, n, n), torch.zeros(1, 1, k, k), None, *rest).shape[-1]
    print("  ", *(f"{number:9}" for number in (n, k, *rest, output_size(n, k, *rest), found)))
    assert found == output_size(n, k, *rest)
halved = F.max_pool2d(torch.zeros(1, 224, 224), 2).shape[-1]
cases = [case for case in product(range(1, 13), range(1, 6), range(1, 4), range(3), range(1, 3)) if output_size(*case) > 0]
print(f"  max pooling by 2 makes {halved} of 224; {len(cases)} more cases with 1 to 12 pixels agree with the formula, too")
assert all(F.conv1d(torch.zeros(1, n), torch.zeros(1, 1, k), None, *g).shape[1] == output_size(n, k, *g) for n, k, *g in cases)
assert halved == output_size(224, 2, stride=2) == 112

# %% [markdown]
# ## What sharing saves
# A convolution *is* a Linear layer between all pixels: one with most weights 0 and the others repeated from place to place. To
# see its matrix, feed in pictures that have a single 1. Few weights need few pictures, if the guess behind them (near things
# belong together, the same everywhere) is true.

# %%
title("8 channels of 8 x 8 to 16 channels of 8 x 8")
convolution, linear, x = nn.Conv2d(8, 16, 3, padding=1), nn.Linear(8 * 64, 16 * 64), torch.randn(5, 8, 8, 8)
with torch.no_grad():
    ones = torch.eye(8 * 64).reshape(-1, 8, 8, 8)  # a picture for every pixel of every channel
    matrix = F.conv2d(ones, convolution.weight, padding=1).reshape(8 * 64, 16 * 64).T
    linear.weight.copy_(matrix)
    linear.bias.copy_(convolution.bias.repeat_interleave(64))
    gap = (linear(x.flatten(1)) - convolution(x).flatten(1)).abs().max().item()
print(f"  parameters: convolution {parameter_count(convolution):,}, Linear {parameter_count(linear):,}")
print(f"  of its {matrix.numel():,} weights {(matrix == 0).double().mean():.1%} are 0, the others have {len(matrix.unique()) - 1:,} values")
print(f"  the same results, with a difference of at most {gap:.0e}")
assert gap < 1e-4 and parameter_count(convolution) == 16 * 8 * 9 + 16 and len(matrix.unique()) - 1 <= 16 * 8 * 9

# %% [markdown]
# ## Move the picture, and the result moves along
# That is *equivariance*, and it follows from the sharing: what a filter finds here it finds there. A Linear layer knows nothing
# of the kind. (Only the border disturbs it; the canvas has a white margin of 2 pixels, so that a shift by 1 stays clear of it.)

# %%
title("Translation equivariance: 360 digits on a canvas of 16 x 16, moved down and right by 1")
canvases = pictures(0)[1][0]
edges = torch.stack([edge, -edge, edge.T, -edge.T])[:, None]
dense, apart = nn.Linear(256, 256).requires_grad_(False), {}
for name, layer in {"convolution": lambda x: F.conv2d(x, edges, padding=1), "Linear": lambda x: dense(x.flatten(1)).view_as(x)}.items():
    result, moved = layer(canvases), layer(shift(canvases, 1, 1))
    apart[name] = ((shift(result, 1, 1) - moved).norm() / moved.norm()).item()
    print(f"  {name:12} moved result against result of the moved picture: they differ by {apart[name]:.1%} of their size")
assert apart["convolution"] < 1e-5 and apart["Linear"] > 0.1
rows = {"as written": canvases[:1], "moved by 2": shift(canvases[:1], 2, 2)}
rows = {name: torch.cat([x[0], F.conv2d(x, edges, padding=1)[0].clamp(min=0)]) for name, x in rows.items()}
save(feature_maps.draw_maps(rows, titles=["picture", "dark right", "dark left", "dark below", "dark above"]), "10_edges.png")

# %% [markdown]
# ## Pooling
# Where exactly the edge lies should not matter in the end. Max pooling keeps the largest number of each window ("it is somewhere
# here"), average pooling the mean; a stride just skips. How much does the result change when the picture moves by one pixel?

# %%
title("Change when the picture moves by 1 pixel, behind the four edge filters and ReLU (mean of 4 directions)")
POOLS = {"nothing": nn.Identity(), "convolution with stride 2": None, "max pooling by 2": nn.MaxPool2d(2), "max by 4": nn.MaxPool2d(4)}
POOLS |= {"average pooling by 2": nn.AvgPool2d(2), "average by 4": nn.AvgPool2d(4), "max over the whole map": nn.AdaptiveMaxPool2d(1)}


def behind(pool: torch.nn.Module | None, x: Tensor) -> Tensor:
    return F.relu(F.conv2d(x, edges, stride=2, padding=1)) if pool is None else pool(F.relu(F.conv2d(x, edges, padding=1)))


changes = {}
for name, pool in POOLS.items():
    changes[name], stays = filters.change_when_moved(partial(behind, pool), canvases)
    print(f"  {name:27} {changes[name]:6.1%} of its size; of the numbers that are not 0, {stays:6.1%} stay what they were")
assert changes["max pooling by 2"] < 0.9 * changes["convolution with stride 2"]
assert changes["max by 4"] < 0.8 * changes["max pooling by 2"] and changes["max over the whole map"] == 0
by_two, by_two_moved = (behind(nn.MaxPool2d(2), x) for x in (canvases, shift(canvases, 0, 2)))
assert torch.equal(by_two[..., :-1], by_two_moved[..., 1:])

# %% [markdown]
# Pooling forgives a part, a larger window more; a shift by 2 moves the result of pooling by 2 by exactly 1. Only a pool over the whole
# map is *invariant*: it knows that there is an edge, no longer where. `AdaptiveAvgPool2d(n)` makes n x n numbers of a map of any
# size, so that the Linear layer behind it fits pictures of any size.
#
# ## A network of filters
# Three blocks of convolution, BatchNorm, ReLU and pooling. Each halves the size and doubles the channels: less and less where,
# more and more what. The opponent is an MLP of as many parameters; a second one has almost five times as many.


# %%
def cnn(places: int = 2, classes: int = 10) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(places)),
        *(nn.Flatten(), nn.Linear(32 * places**2, classes)),
    )


def mlp(hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(256, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, 10))


title("The network, from layer to layer")
filters.print_shapes(cnn(), canvases[:1])

title(f"Accuracy on the held-out digits, {STEPS} steps, mean of {len(SEEDS)} seeds")
NETWORKS = {"CNN": cnn, "CNN, one place": lambda: cnn(1), "MLP": lambda: mlp(27), "large MLP": lambda: mlp(128)}
tables, trained = {}, {}
for name, make in NETWORKS.items():
    tables[name], trained[name] = filters.train_all(make, SEEDS, STEPS)
    held = "{:.1%} in the middle, {:.1%} moved by 1, {:.1%} by 2".format(*filters.summary(tables[name]))
    print(f"  {name:15} {parameter_count(trained[name]):6,} parameters: {held}")
many, one, small, large = (filters.summary(table) for table in tables.values())
assert QUICK or (many[0] > small[0] and min(many[1], one[1]) > large[1] + 0.05 and min(many[2], one[2]) > large[2] + 0.2)
save(feature_maps.draw_shift_tables(tables), "10_shifted.png")

# %% [markdown]
# Both CNNs bear a shift better than both MLPs, but are not invariant: borders, strides, and four places in the last layer. Does
# one place help? Compare by 1 and by 2. If pictures will be shifted, shift them in training, too (augmentation, lesson 9).
#
# ## What the filters became
# Nobody designs them any more. Each starts at random and becomes what lowers the loss. In the picture orange adds and purple
# subtracts; the number above says how accuracy on the training pictures changes when the filter's map is set to 0.

# %%
title("The first layer's filters")
network, (x, y) = trained["CNN"], pictures(SEEDS[0])[0]
weights, costs = network[0].weight.detach()[:, 0], filters.cost_of_each(network[:3], network[3:], (x, y))
maps, pooled, deeper = (network[:layers](x[:1])[0, :8].detach() for layers in (3, 4, 7))
print("  accuracy lost without one of them, in points:", *(f"{100 * cost:.1f}" for cost in costs))
rows = {"filter 3 x 3": weights, f"its map of a {y[0]}": maps, "max pooled": pooled, "8 of 16 maps\nof block 2": deeper}
save(feature_maps.draw_maps(rows, ("filter 3 x 3",), [f"{-100 * cost:+.1f} points" for cost in costs]), "10_filters.png")
assert QUICK or max(costs) > 0.01

# %% [markdown]
# ## How far a number sees
# One number behind a 3 x 3 filter sees 3 x 3 pixels; behind a second one 5 x 5. In general a layer adds (k - 1) * d * jump to the
# side, where jump is the product of all strides before it: pooling makes everything behind it see faster. To check, ask autograd
# which pixels have a gradient. Behind max pooling one picture shows only the winners, so 400 random pictures are added up.

# %%
title("Receptive fields: formula, and where the gradient is not 0")
side, jump, first, fields = 1, 1, 0, {}
for number, (k, stride, padding) in {0: (3, 1, 1), 3: (2, 2, 0), 4: (3, 1, 1), 7: (2, 2, 0), 8: (3, 1, 1)}.items():
    side, first, jump = side + (k - 1) * jump, first - padding * jump, jump * stride
    name = type(network[number]).__name__
    place, field = filters.sensitivity(network[: number + 1], torch.randn(400, 1, 40, 40))
    (top, measured), (part, share) = filters.extent(field), filters.inner_share(field)
    print(f"  {name:9} jump {jump}: formula {side:2} x {side:<2}  measured {measured:2} x {measured:<2}", end="")
    print(f"   the inner {part:.0%} have {share:.0%} of the gradient")
    assert measured == side and top == first + place * jump
    fields[f"{number}: {name}\n{side} x {side}"] = field
save(feature_maps.draw_fields(fields), "10_fields.png")
assert share > part + 0.05

# %% [markdown]
# Pixels in the middle have many ways to the number, those at the rim few. Three filters of 3 x 3 in a row see 7 x 7 pixels, with 27
# weights in place of 49 and two more ReLUs: VGG's idea, in 2014. LeNet (1998) had two layers of convolution, AlexNet (2012) five,
# VGG up to 16. Then more layers made things worse, and already in *training*, so it was not overfitting.
#
# ## Depth, and a way past it
# A residual block computes ReLU(x + f(x)): what is there already need not be learned again, f adds to it, and a gradient comes
# back through the + as it is. Same parameters, with and without. ResNet (2015) had up to 152 layers; nearly every network since
# does it. Below, blocks of two convolutions, at 8 x 8 pixels and 8 channels; the first convolution and the last Linear count, too.


# %%
class Block(nn.Module):
    def __init__(self, channels: int, residual: bool, norm: bool = True) -> None:
        super().__init__()
        layers = []
        for _ in range(2):
            layers += [nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels) if norm else nn.Identity(), nn.ReLU()]
        self.f, self.residual = nn.Sequential(*layers[:-1]), residual

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.f(x)) if self.residual else F.relu(self.f(x))


def deep(depth: int, residual: bool, norm: bool = True, channels: int = 8) -> nn.Sequential:
    blocks = [Block(channels, residual, norm) for _ in range((depth - 2) // 2)]
    return nn.Sequential(nn.Conv2d(1, channels, 3, padding=1), nn.ReLU(), *blocks, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10))


DEPTHS = (4, 18) if QUICK else (4, 10, 18, 34)
title("Training loss after 60 steps (mean of the last 10), by number of layers; every seed")
ends = filters.ends_by_depth(deep, DEPTHS, SEEDS[:3])
plain, residual, most = *ends.values(), DEPTHS[-1]
assert min(plain[most]) > 2 * max(residual[most]) and max(residual[most]) < min(residual[4])
assert QUICK or min(plain[34]) > 1.5 * max(plain[10])

title("Size of the first layer's gradient, before training, by number of layers")
gradients = filters.first_gradients(deep, DEPTHS)
growth = {name: sizes[most] / sizes[4] for name, sizes in gradients.items()}
assert growth["plain, no norm"] < 1e-4 and growth["plain, BatchNorm"] > 2 and 0.1 < growth["residual, no norm"] < 20
assert QUICK or growth["plain, BatchNorm"] > 2 * growth["residual, BatchNorm"]
save(feature_maps.draw_depth(ends, gradients), "10_depth.png")

# %% [markdown]
# Plain and without BatchNorm, the gradient *vanishes* on its way to the first layer; with BatchNorm it *grows* with the depth. With
# a way around each block it does not vanish, and grows less.
#
# ## Borrowed filters
# What one task taught may serve another. Take a network that learned from a million pictures, say torchvision's resnet50 with
# weights="IMAGENET1K_V1", put nn.Linear(2048, classes) in the place of its last layer `fc`, and train only that (few pictures; the
# rest is *frozen*: no gradient, and eval mode, or BatchNorm's running statistics move on). Or train everything, with a small
# learning rate (*fine-tuning*; more pictures). Small, and measured: learn 0 to 4 from many shifted pictures, then 5 to 9 from three
# pictures of each, none shifted. Judged by others of 5 to 9, in the middle and shifted.


# %%
def new_head(model: nn.Sequential, rows: tuple[Tensor, Tensor], seed: int) -> nn.Sequential:
    frozen, head = model[:-1].eval(), nn.Sequential(nn.Linear(128, 5))
    with torch.no_grad():
        seen = frozen(rows[0])  # the same in every step, so once is enough
    train(head, (seen, rows[1]), 200, seed)
    return nn.Sequential(*frozen, *head)


title(f"Three pictures each of 5 to 9: accuracy in the middle and shifted, mean of {len(SEEDS)} seeds")
found = [filters.transfer(cnn, new_head, seed, STEPS // 2) for seed in SEEDS]
scores = {name: torch.tensor([each[name] for each in found]).mean(0).tolist() for name in found[0]}
for name, (middle, moved) in scores.items():
    print(f"  {name:31} {middle:.1%} in the middle, {moved:.1%} shifted")
scratch, untrained, old, tuned = scores.values()
assert QUICK or (old[1] > untrained[1] + 0.03 and tuned[1] > scratch[1] + 0.03 and tuned[1] - scratch[1] > tuned[0] - scratch[0])

# %% [markdown]
# What the old task brought is above all how shifted digits look, which three pictures in the middle cannot teach: compare the gains
# in the two columns. But 700 digits are not ImageNet. In the first column, is a frozen network any better than one from scratch?
#
# ## Keep
# * (in + 2 * padding - dilation * (k - 1) - 1) / stride + 1, rounded down. Same weights everywhere: few of them, equivariance.
# * Pooling forgives part of a shift; only a pool over the whole map forgives all. Max: is it there? Average: how much of it?
# * A layer adds (k - 1) * dilation * (product of the strides before) to what a number sees. Small filters, several deep.
# * Deeper than some ten layers: x + f(x). Few pictures: try borrowed filters, frozen and fine-tuned, and compare with none.
#
# Next: `11_lstm_classifier.py`, networks that read.
