"""MEow written in the ordinary way, with modules, autograd and torch.optim: what algos/meow.py must equal.

tests/test_meow.py compares the two, `python benchmarks/speed.py meow` times them.
"""
import copy
import math

import torch
from torch import nn

from algos import meow


class Swish(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.slope = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * torch.sigmoid(self.slope * x)


class Dropout(nn.Dropout):
    """torch's own, or with `factors` these, for comparisons."""
    factors = None

    def forward(self, x):
        if self.training and self.factors is not None:
            return x * self.factors
        return super().forward(x)


def net(fan_in: int, hidden: list[int], fan_out: int, dropout: float | None = None) -> nn.Sequential:
    """Swish network; with a share of `dropout`, LayerNorm before and dropout after every Swish."""
    layers = []
    for width in hidden:
        layers.append(nn.Linear(fan_in, width))
        if dropout is not None:
            layers.append(nn.LayerNorm(width))
        layers.append(Swish(width))
        if dropout is not None:
            layers.append(Dropout(dropout))
        fan_in = width
    return nn.Sequential(*layers, nn.Linear(fan_in, fan_out))


class Flow(nn.Module):
    """Q and V of the energy-based flow with two shifts."""

    def __init__(self, args: meow.Args, f: int, d: int):
        super().__init__()
        hidden, shift_hidden = ([width] * depth for width, depth in (
            map(int, text.split("x")) for text in (args.hidden, args.shift_hidden)))
        self.args, self.d = args, d
        self.scale = net(f, hidden, d)
        self.couplings = nn.ModuleList([net(d + f, hidden, d, args.dropout) for _ in range(args.couplings)])
        self.shifts = nn.ModuleList([net(f, shift_hidden, 1) for _ in range(2)])
        self.register_buffer("masks", torch.stack([meow.mask(d, k) for k in range(args.couplings)]))

    def log_sigma(self, obs):
        low, high = self.args.sigma_min, self.args.sigma_max
        return low + 0.5 * (high - low) * (torch.tanh(self.scale(obs)) + 1)

    def shift(self, obs):
        return torch.cat([b(obs) for b in self.shifts], 1)

    def v(self, obs):
        normaliser = self.log_sigma(obs).sum(1, keepdim=True) + 0.5 * self.d * math.log(2 * math.pi)
        return self.args.alpha * (normaliser + self.shift(obs))

    def q(self, obs, action):
        action = action.clamp(-1 + meow.EDGE, 1 - meow.EDGE)
        x = torch.atanh(action)
        for mask, coupling in reversed(list(zip(self.masks, self.couplings))):
            x = x - (1 - mask) * coupling(torch.cat([mask * x, obs], 1))
        energy = -0.5 * (x / self.log_sigma(obs).exp()) ** 2 - torch.log(1 - action ** 2 + meow.EPS)
        return self.args.alpha * (energy.sum(1, keepdim=True) + self.shift(obs))


class Learner:
    """A flow, its target, an optimiser."""

    def __init__(self, args: meow.Args, f: int, d: int):
        self.args, self.flow = args, Flow(args, f, d)
        self.target = copy.deepcopy(self.flow).eval()
        self.optimizer = torch.optim.Adam(self.flow.parameters(), args.learning_rate)

    def load(self, flow: dict[str, torch.Tensor]) -> None:
        """Take over the weights of meow's flow, also as the target's."""
        stacks = {"scale": [self.flow.scale], "coupling": self.flow.couplings, "shift": self.flow.shifts}
        with torch.no_grad():
            for name, stack in stacks.items():
                for k, module in enumerate(stack):
                    fill(module, name, k, flow)
        self.target.load_state_dict(self.flow.state_dict())

    def update(self, batch: meow.Batch) -> torch.Tensor:
        """One step on a batch; returns the loss."""
        with torch.no_grad():
            next_value = self.target.v(batch.next_obs).amin(1, keepdim=True)
            target_q = batch.reward + self.args.gamma * (1 - batch.terminated) * next_value
        loss = (self.flow.q(batch.obs, batch.action) - target_q).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.flow.parameters(), self.args.grad_clip)
        self.optimizer.step()
        with torch.no_grad():
            for slow, fast in zip(self.target.parameters(), self.flow.parameters()):
                slow.lerp_(fast, self.args.tau)
        return loss.detach()


def fill(module: nn.Sequential, name: str, k: int, flow: dict[str, torch.Tensor]) -> None:
    """Copy the k-th network of a stack into a module."""
    i = -1
    for layer in module:
        if isinstance(layer, nn.Linear):
            i += 1
            layer.weight.copy_(flow[f"{name}.{i}.weight"][k].T)
            layer.bias.copy_(flow[f"{name}.{i}.bias"][k, 0])
        elif isinstance(layer, nn.LayerNorm):
            layer.weight.copy_(flow[f"{name}.{i}.gain"][k, 0])
            layer.bias.copy_(flow[f"{name}.{i}.offset"][k, 0])
        elif isinstance(layer, Swish):
            layer.slope.copy_(flow[f"{name}.{i}.slope"][k, 0])
