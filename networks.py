"""Networks as dicts of tensors, {"actor.0.weight": ..., "actor.0.bias": ...}, and Adam on them.

A loss is a function of such a dict. torch.func differentiates it, and torch.compile turns the losses, backward passes
and optimisers of an update into one graph.
"""
import torch
import torch.nn.functional as F


def init_mlp(name: str, sizes: list[int], stack: tuple[int, ...] = ()) -> dict[str, torch.Tensor]:
    """Parameters of a ReLU network in PyTorch's default initialisation; `stack=(2,)` makes two side by side."""
    params = {}
    for i, (fan_in, fan_out) in enumerate(zip(sizes, sizes[1:])):
        bound = fan_in ** -0.5
        params[f"{name}.{i}.weight"] = torch.empty(*stack, fan_in, fan_out).uniform_(-bound, bound)
        params[f"{name}.{i}.bias"] = torch.empty(*stack, *(1,) * len(stack), fan_out).uniform_(-bound, bound)
    return params


def mlp(params: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    """(B, in) -> (B, out), or (2, B, out) of two networks side by side."""
    depth = sum(f"{name}.{i}.weight" in params for i in range(len(params)))
    for i in range(depth):
        x = torch.matmul(x, params[f"{name}.{i}.weight"]) + params[f"{name}.{i}.bias"]
        if i < depth - 1:
            x = F.relu(x)
    return x


def adam_state(params: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Running means of gradients and of their squares, at zero."""
    return {moment: {name: torch.zeros_like(p) for name, p in params.items()} for moment in ("mean", "square")}


def adam(params: dict, grads: dict, moments: dict, count: torch.Tensor, learning_rate: float) -> None:
    """Adam (Kingma and Ba 2015; 0.9, 0.999, 1e-8) in place, all tensors at once. `count`, of the step, is
    a tensor: as a number it would be compiled in as a constant."""
    m, v = list(moments["mean"].values()), list(moments["square"].values())
    p, g = [params[name] for name in moments["mean"]], [grads[name] for name in moments["mean"]]
    torch._foreach_lerp_(m, g, 1 - 0.9)
    torch._foreach_mul_(v, 0.999)
    torch._foreach_addcmul_(v, g, g, 1 - 0.999)
    scale = torch._foreach_sqrt(v)
    torch._foreach_div_(scale, (1 - 0.999 ** count).sqrt())
    torch._foreach_add_(scale, 1e-8)
    step = torch._foreach_div(m, scale)
    torch._foreach_mul_(step, learning_rate / (1 - 0.9 ** count))
    torch._foreach_sub_(p, step)
