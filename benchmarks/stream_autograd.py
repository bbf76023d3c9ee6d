"""The updates of the stream scripts as one would write them first: autograd, distributions, loops over tensors.

Each takes the place of `update` in algos/stream_<name>.py (`stream_ac.update = stream_autograd.update_ac`). Tests
compare the closed forms with these, and speed.py measures how much faster they are.
"""
import torch
import torch.nn.functional as F

from streamnet import Net, views


def parameters(flat: torch.Tensor, net: Net) -> list[torch.Tensor]:
    """Weight, bias, weight, ..., views of the flat vector that take gradients."""
    return [p.detach().requires_grad_() for layer in views(flat, net) for p in layer]


def forward(params: list[torch.Tensor], net: Net, x: torch.Tensor, layer_norm: bool) -> list[torch.Tensor]:
    """Outputs of the heads."""
    layers = list(zip(params[::2], params[1::2]))
    for (weight, bias), stride in zip(layers, net.strides):
        x = F.conv2d(x[None], weight, bias, stride)[0] if stride else F.linear(x.flatten(), weight, bias)
        x = F.leaky_relu(F.layer_norm(x, x.shape) if layer_norm else x)
    return [F.linear(x.flatten(), weight, bias) for weight, bias in layers[len(net.strides):]]


@torch.no_grad()
def obgd(learner: dict[str, torch.Tensor], net: Net, grads: list[torch.Tensor], delta: float, cut: bool, kappa: float,
         args) -> tuple[torch.Tensor, torch.Tensor]:
    """Step size, and the L1 norm of the trace (or of what stands for it with second moments)."""
    parts = {name: [p for layer in views(learner[name], net) for p in layer] for name in learner if name != "count"}
    directions = []
    for i, (trace, grad) in enumerate(zip(parts["trace"], grads)):
        trace.mul_(args.gamma * args.lamda).add_(grad)
        directions.append(trace)
        if args.optimizer == "adaptive":
            if i == 0:
                learner["count"] += 1
            square = parts["square"][i].mul_(0.999).add_(0.001 * (delta * trace) ** 2)
            directions[i] = trace / (square / (1 - 0.999 ** learner["count"]) + 1e-8).sqrt()
    size = sum(direction.abs().sum().item() for direction in directions)
    step = args.learning_rate
    if args.optimizer != "plain":
        step = step / max(step * kappa * max(abs(delta), 1) * size, 1)
    for weight, trace, direction in zip(parts["weights"], parts["trace"], directions):
        weight.sub_(step * delta * direction)
        if cut:
            trace.zero_()
    return torch.tensor(step), torch.tensor(size)


@torch.enable_grad()
def update_ac(agent: dict, nets: dict[str, Net], state, action, next_state, reward, discount, ended, args) -> tuple:
    params = {name: parameters(agent[name]["weights"], net) for name, net in nets.items()}
    (v,) = forward(params["value"], nets["value"], state, args.layer_norm)
    with torch.no_grad():
        (next_v,) = forward(params["value"], nets["value"], next_state, args.layer_norm)
    delta = (reward + discount * next_v - v).detach()
    outputs = forward(params["policy"], nets["policy"], state, args.layer_norm)
    if len(outputs) == 2:
        pi = torch.distributions.Normal(outputs[0], F.softplus(outputs[1]))
        log_prob, std = pi.log_prob(action).sum(), pi.stddev.mean()
    else:
        pi = torch.distributions.Categorical(logits=outputs[0])
        log_prob, std = pi.log_prob(action.argmax()), torch.zeros(())
    entropy = pi.entropy().sum()
    (-v - log_prob - args.entropy_coef * delta.sign() * entropy).backward()  # the networks share nothing
    steps = []
    for name, kappa in (("policy", args.kappa_policy), ("value", args.kappa_value)):
        grads = [p.grad for p in params[name]]
        steps += obgd(agent[name], nets[name], grads, delta.item(), bool(ended), kappa, args)
    return (delta, v.detach(), entropy.detach(), std.detach(), *steps)


@torch.enable_grad()
def update_q(agent: dict, nets: dict[str, Net], state, action, next_state, next_action, reward, discount, ended, args
             ) -> tuple:
    net = nets["value"]
    params = parameters(agent["value"]["weights"], net)
    (q,) = forward(params, net, state, args.layer_norm)
    with torch.no_grad():
        (next_q,) = forward(params, net, next_state, args.layer_norm)
    value = q[action.argmax()]
    next_value = next_q.max() if next_action is None else next_q[next_action.argmax()]
    delta = (reward + discount * next_value - value).detach()
    (-value).backward()
    exploratory = bool(action.argmax() != q.argmax())
    cut = bool(ended) or (exploratory and not args.sarsa)
    steps = obgd(agent["value"], net, [p.grad for p in params], delta.item(), cut, args.kappa_value, args)
    return delta, value.detach(), torch.tensor(float(exploratory)), *steps


@torch.enable_grad()
def update_td(agent: dict, nets: dict[str, Net], state, next_state, reward, discount, args) -> tuple:
    net = nets["value"]
    params = parameters(agent["value"]["weights"], net)
    (v,) = forward(params, net, state, args.layer_norm)
    with torch.no_grad():
        (next_v,) = forward(params, net, next_state, args.layer_norm)
    delta = (reward + discount * next_v - v).detach()
    (-v).backward()
    return delta, v.detach(), *obgd(agent["value"], net, [p.grad for p in params], delta.item(), False,
                                    args.kappa_value, args)
