"""Networks and running statistics of the stream scripts: code that belongs to no single method; it handles one input
at a time.

The parameters of a network are one flat vector, and its gradient has a closed form. So a step size that is bounded over
the whole network is one sum, and a transition, from the raw observation to the next action, is one compiled graph: one
call instead of several hundred. benchmarks/stream_autograd.py does the same by autograd; tests compare the two.
"""
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from errors import UserError

COMPILED = {"cpp_wrapper": True, "memory_planning": True,  # buffers: a hundred are made in C++, in one piece of memory
            "layout_optimization": False,  # convolutions with channels last: a gain for batches, a loss for one input
            "realize_opcount_threshold": 5, "realize_reads_threshold": 0}  # results are kept, not computed anew
CONVOLUTIONS = {"vector": (), "minatar": ((16, 3, 1),), "atari": ((32, 8, 5), (64, 4, 3), (64, 3, 2))}


class Net(NamedTuple):
    """Shapes of a network: hidden layers, then heads side by side. Its flat vector (p,) has of each layer the weight,
    then the bias."""
    weights: tuple[tuple[int, ...], ...]  # (out, in), or of a convolution (out, in, height, width)
    strides: tuple[int, ...]  # of the hidden layers; 0: a linear layer


def make_net(kind: str, shape: tuple[int, ...], hidden: list[int], heads: list[int]) -> Net:
    """A network for inputs of `shape`: the convolutions (channels, kernel, stride) of this kind of environment, linear
    layers of `hidden` units, and heads of `heads` outputs."""
    weights, strides = [], []
    for channels, kernel, stride in CONVOLUTIONS[kind]:
        weights.append((channels, shape[0], kernel, kernel))
        strides.append(stride)
        shape = (channels, *((size - kernel) // stride + 1 for size in shape[1:]))
    sizes = [math.prod(shape), *hidden]
    weights += [*zip(hidden, sizes), *((head, sizes[-1]) for head in heads)]
    return Net(tuple(weights), tuple(strides) + (0,) * len(hidden))


def sparse_init(net: Net, sparsity: float) -> torch.Tensor:
    """Flat parameters: weights uniform within 1/sqrt(fan_in), of which every unit loses the same share; biases zero.

    Raises UserError if a unit behind the first layer would lose all its weights. A unit of the first layer may: its
    gradient comes through the second layer."""
    fan_in = min(math.prod(shape[1:]) for shape in net.weights[1:])
    if math.ceil(sparsity * fan_in) == fan_in:  # biases alone would learn
        raise UserError(f"--sparsity {sparsity} takes all {fan_in} weights of a unit; lower it, or widen --hidden")
    parts = []
    for shape in net.weights:
        fan_in = math.prod(shape[1:])
        weight = torch.empty(shape[0], fan_in).uniform_(-1, 1) / math.sqrt(fan_in)
        order = torch.rand(shape[0], fan_in).argsort(1)
        weight.scatter_(1, order[:, :math.ceil(sparsity * fan_in)], 0.0)
        parts += [weight.flatten(), torch.zeros(shape[0])]
    return torch.cat(parts)


def views(flat: torch.Tensor, net: Net) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(weight, bias) of every layer, as views of a flat vector (p,)."""
    sizes = [n for shape in net.weights for n in (math.prod(shape), shape[0])]
    parts = flat.split(sizes)
    return [(weight.view(shape), bias) for weight, bias, shape in zip(parts[::2], parts[1::2], net.weights)]


def forward(flat: torch.Tensor, net: Net, x: torch.Tensor, layer_norm: bool) -> tuple[list[torch.Tensor], list]:
    """Outputs of the heads for one input x, (n,) or (channels, height, width); and what `backward` needs: input, output
    before the leaky ReLU and scale of every hidden layer, and the input of the heads."""
    layers, cache = views(flat, net), []
    for (weight, bias), stride in zip(layers, net.strides):
        a = F.conv2d(x[None], weight, bias, stride)[0] if stride else torch.mv(weight, x.flatten()) + bias
        rho = torch.ones(())
        if layer_norm:  # over the whole layer, channels and places together; no parameters
            a = a - a.mean()
            rho = (a.square().mean() + 1e-5).rsqrt()
        y = a * rho
        cache.append((x, y, rho))
        x = torch.where(y > 0, y, 0.01 * y)
    h = x.flatten()
    return [torch.mv(weight, h) + bias for weight, bias in layers[len(net.strides):]], [*cache, h]


def backward(flat: torch.Tensor, net: Net, cache: list, head_grads: list[torch.Tensor], layer_norm: bool
             ) -> torch.Tensor:
    """Gradient (p,) with respect to the flat vector, given those with respect to the outputs of the heads."""
    layers, (*cache, h) = views(flat, net), cache
    hidden, heads = layers[:len(net.strides)], layers[len(net.strides):]
    grads = [part for g in head_grads for part in (torch.outer(g, h).flatten(), g)]  # weight, bias, weight, ...
    g = sum(torch.mv(weight.T, g) for (weight, _), g in zip(heads, head_grads))
    for k in reversed(range(len(hidden))):
        (weight, _), stride, (x, y, rho) = hidden[k], net.strides[k], cache[k]
        g = g.view_as(y) * torch.where(y > 0, 1.0, 0.01)
        if layer_norm:  # y = a rho, where a and rho depend on all units
            g = rho * (g - g.mean() - y * (g * y).mean())
        if stride:
            g, weight_grad, bias_grad = torch.ops.aten.convolution_backward(
                g[None], x[None], weight, [len(g)], [stride] * 2, [0, 0], [1, 1], False, [0, 0], 1, [k > 0, True, True])
        else:
            weight_grad, bias_grad, g = torch.outer(g, x.flatten()), g, torch.mv(weight.T, g)
        grads = [weight_grad.flatten(), bias_grad, *grads]
    return torch.cat(grads)


def running_stats(*shape: int) -> dict[str, torch.Tensor]:
    """Statistics of no samples yet: their number, mean, and summed squared deviations."""
    return {name: torch.zeros(size, dtype=torch.float64)  # no scalars: torch 2.13 compiles writes to them wrongly
            for name, size in (("count", (1,)), ("mean", shape), ("square", shape))}


def add_sample(stats: dict[str, torch.Tensor], x: torch.Tensor) -> None:
    """Welford: one more sample, in place."""
    count, off = stats["count"] + 1, x - stats["mean"]
    mean = stats["mean"] + off / count
    square = stats["square"] + off * (x - mean)
    for name, value in (("count", count), ("mean", mean), ("square", square)):
        stats[name].copy_(value)


def deviation(stats: dict[str, torch.Tensor]) -> torch.Tensor:
    """Standard deviation of the samples; 1 before the second one."""
    count = stats["count"]
    return torch.sqrt(torch.where(count > 1, stats["square"] / (count - 1).clamp(min=1), 1.0) + 1e-8)


def reward_stats() -> dict[str, torch.Tensor]:
    """What `scale_reward` keeps: the discounted return so far, and its statistics."""
    return running_stats(1) | {"return": torch.zeros(1, dtype=torch.float64)}


def scale_reward(stats: dict[str, torch.Tensor], reward: torch.Tensor, ended: torch.Tensor, gamma: float, scale: bool
                 ) -> torch.Tensor:
    """Reward (1,) over the deviation of the discounted return, float32; as it is without `scale`. As published, the
    return starts anew at the last reward of an episode, which so leaks into the next one."""
    stats["return"].copy_(gamma * stats["return"] * (1 - ended) + reward)
    add_sample(stats, stats["return"])
    return (reward / deviation(stats) if scale else reward).float()


def observe(stats: dict[str, torch.Tensor], obs: torch.Tensor, last: torch.Tensor | None, frames: int, normalize: bool,
            learn: bool = True) -> torch.Tensor:
    """What networks see of an observation (n,) of `envs.StreamEnv`, float64: counted in first (not without `learn`),
    then shifted and scaled. A time feature stays as it is. With `frames` above 1, the new image is added to the last
    `frames - 1` images in `last`, what was seen one step before (None: this is the first step of an episode)."""
    size = stats["mean"].numel()
    x, time = obs[:size].view(stats["mean"].shape), obs[size:]  # (n,) or (channels, height, width); (1,) or (0,)
    if learn:
        add_sample(stats, x)
    if normalize:
        x = (x - stats["mean"]) / deviation(stats)
    x = torch.cat([x, time]).float() if x.dim() == 1 else x.float()
    if frames == 1:
        return x
    return x.repeat(frames, 1, 1) if last is None else torch.cat([last[1:], x])  # (frames, height, width)


def forward_batch(flat: torch.Tensor, net: Net, stats: dict[str, torch.Tensor], obs: torch.Tensor, frames: int,
                  normalize: bool, layer_norm: bool) -> list[torch.Tensor]:
    """`observe` and `forward` for a batch of observations (B, n), statistics as they are: outputs (B, .) of the heads.
    What policy.pt2 holds. Raises ValueError where networks see more than one observation."""
    if frames > 1:
        raise ValueError(f"the agent sees the last {frames} frames, an observation has one")
    size, layers = stats["mean"].numel(), views(flat, net)
    x, time = obs[:, :size].unflatten(1, stats["mean"].shape), obs[:, size:]  # (B, n) or (B, channels, height, width)
    if normalize:
        x = (x - stats["mean"]) / deviation(stats)
    x = torch.cat([x, time], 1).float() if x.dim() == 2 else x.float()
    for (weight, bias), stride in zip(layers, net.strides):
        a = F.conv2d(x, weight, bias, stride) if stride else F.linear(x.flatten(1), weight, bias)
        x = F.leaky_relu(F.layer_norm(a, a.shape[1:]) if layer_norm else a)
    return [F.linear(x.flatten(1), weight, bias) for weight, bias in layers[len(net.strides):]]
