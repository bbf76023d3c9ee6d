"""Stream TD(lambda): predicting from a stream. One transition, one update, nothing stored.

Elsayed, Vasan, Mahmood, "Streaming Deep Reinforcement Learning Finally Works" (arXiv 2410.14606): the value part of
stream_ac.py, on a time series that does not hold still. Every row is an input, a column of it the cumulant; the
network predicts the discounted sum of all cumulants to come, which is known afterwards, so that the error can be
measured exactly. Written from formulas, not from code.

The paper predicts the oil temperature of the ETTm2 series (`--env ETTm2.csv`, not shipped). The default is a generated
series of the same kind (envs/series.py says how). Inputs are slow averages of the rows, as published.

python algos/stream_td.py --env series/transformer   # error 5.1 of returns up to 100 (mean of ten seeds)
"""
import math
import os
import sys
import time
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch.utils._pytree import tree_map

import envs
from runtime import (ArgError, Run, can_compile, compile_for, continued, exit_codes, hidden_layers, load_run,
                     require_positive, require_range)

ALGO = Path(__file__).stem  # names run folders and result tables
LOG_EVERY = 1000  # rows
CHECK_EVERY = 100  # steps between looks whether an update overshot its target
SCALARS = ("abs_delta", "value", "step_value", "capped_value", "trace_value", "reward_scale")


@dataclass
class Args:
    """A prediction that learns from every row once, as it comes (Stream TD)."""
    env: str = "series/transformer"  # the generated series, or a CSV file whose last column is to be predicted
    total_timesteps: int = 68_000  # rows; with --resume: a new total
    eval_every: int = 5_000  # rows per line of eval.csv, the error of predictions made on the way; 0: only one
    checkpoint_every: int = 20_000  # rows between checkpoints; 0: only at the end
    compile: bool = True  # compile all that happens between two steps into one graph: about 10 s at the start
    video: int = 0  # above 0: draw predictions over the truth after training, or with --evaluate
    # twin: run arguments
    seed: int = 1  # of all that is random: networks, environments, exploration
    run_dir: str = ""  # run folder; empty: runs/<algo>/<env>/seed<k>-<time>
    resume: str = ""  # run folder to continue exactly, with the arguments it has
    evaluate: str = ""  # run folder to evaluate; no training
    track: bool = False  # mirror scalars to Weights & Biases (pip install wandb)
    # twin end

    # algorithm
    hidden: str = "128x2"  # hidden layers, width x depth
    kappa_value: float = 2.0  # margin of the step bound
    obs_trace: float = 0.999  # inputs are averages of the rows so far, weighted by this to the power of age; 0: rows
    lead: int = 2  # rows from an input to the cumulant of its step (as published; 1: the next row)
    # twin: stream arguments
    gamma: float = 0.99  # discount per step
    lamda: float = 0.8  # trace decay; 0: no traces
    learning_rate: float = 1.0  # alpha, where the bound does not bite
    optimizer: Literal["obgd", "adaptive", "plain"] = "obgd"  # bounded; with second moments; alpha as it is (ablation)
    sparsity: float = 0.9  # share of incoming weights that start at zero; 0: dense (ablation)
    layer_norm: bool = True  # before every hidden activation
    normalize_obs: bool = True  # observations shifted and scaled by running statistics
    scale_reward: bool = True  # rewards divided by the running deviation of the discounted return
    # twin end


# ranges of `make tune`: (low, high) on a log scale, or choices
TUNE = {"lamda": [0.0, 0.5, 0.8, 0.9, 0.95], "kappa_value": (1.0, 10.0), "obs_trace": [0.0, 0.9, 0.99, 0.999]}


# twin: flat networks
COMPILED = {"cpp_wrapper": True, "memory_planning": True,  # buffers: a hundred are made in C++, in one piece of memory
            "layout_optimization": False,  # convolutions with channels last: a gain for batches, a loss for one input
            "realize_opcount_threshold": 5, "realize_reads_threshold": 0}  # results are kept, not computed anew


class Net(NamedTuple):
    """Shapes of a network whose parameters are one flat vector: hidden layers, then heads; weight, then bias."""
    weights: tuple[tuple[int, ...], ...]  # (out, in), or (out, in, height, width)
    strides: tuple[int, ...]  # of the hidden layers; 0: a linear layer


CONVOLUTIONS = {"vector": (), "minatar": ((16, 3, 1),), "atari": ((32, 8, 5), (64, 4, 3), (64, 3, 2))}


def make_net(kind: str, shape: tuple[int, ...], hidden: list[int], heads: list[int]) -> Net:
    """Convolutions (channels, kernel, stride) of the kind of environment, hidden layers, and heads side by side."""
    weights, strides = [], []
    for channels, kernel, stride in CONVOLUTIONS[kind]:
        weights.append((channels, shape[0], kernel, kernel))
        strides.append(stride)
        shape = (channels, *((size - kernel) // stride + 1 for size in shape[1:]))
    sizes = [math.prod(shape), *hidden]
    weights += [*zip(hidden, sizes), *((head, sizes[-1]) for head in heads)]
    return Net(tuple(weights), tuple(strides) + (0,) * len(hidden))


def sparse_init(net: Net, sparsity: float) -> torch.Tensor:
    """Uniform weights within 1/sqrt(fan_in), of which every unit loses the same share; biases zero."""
    parts = []
    for shape in net.weights:
        fan_in = math.prod(shape[1:])
        weight = torch.empty(shape[0], fan_in).uniform_(-1, 1) / math.sqrt(fan_in)
        order = torch.rand(shape[0], fan_in).argsort(1)
        weight.scatter_(1, order[:, :math.ceil(sparsity * fan_in)], 0.0)
        parts += [weight.flatten(), torch.zeros(shape[0])]
    return torch.cat(parts)


def views(flat: torch.Tensor, net: Net) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(weight, bias) of every layer, as views of the flat vector."""
    sizes = [n for shape in net.weights for n in (math.prod(shape), shape[0])]
    parts = flat.split(sizes)
    return [(w.view(shape), b) for w, b, shape in zip(parts[::2], parts[1::2], net.weights)]


def forward(flat: torch.Tensor, net: Net, x: torch.Tensor, layer_norm: bool) -> tuple[list[torch.Tensor], list]:
    """Outputs of the heads, and per hidden layer what `backward` needs. One input, no batch."""
    layers, cache = views(flat, net), []
    for (weight, bias), stride in zip(layers, net.strides):
        a = F.conv2d(x[None], weight, bias, stride)[0] if stride else torch.mv(weight, x.flatten()) + bias
        rho = torch.ones(())
        if layer_norm:  # over the whole layer, channels and places together
            a = a - a.mean()
            rho = (a.square().mean() + 1e-5).rsqrt()
        y = a * rho
        cache.append((x, y, rho))
        x = torch.where(y > 0, y, 0.01 * y)
    h = x.flatten()
    return [torch.mv(weight, h) + bias for weight, bias in layers[len(net.strides):]], [*cache, h]


def backward(flat: torch.Tensor, net: Net, cache: list, head_grads: list[torch.Tensor], layer_norm: bool
             ) -> torch.Tensor:
    """Flat gradient, given those of the heads' outputs: the closed form of what autograd does."""
    layers, (*cache, h) = views(flat, net), cache
    hidden, heads = layers[:len(net.strides)], layers[len(net.strides):]
    after = [part for g in head_grads for part in (torch.outer(g, h).flatten(), g)]
    g = sum(torch.mv(weight.T, g) for (weight, _), g in zip(heads, head_grads))
    for k, ((weight, _), stride, (x, y, rho)) in reversed(list(enumerate(zip(hidden, net.strides, cache)))):
        g = g.view_as(y) * torch.where(y > 0, 1.0, 0.01)
        if layer_norm:
            g = rho * (g - g.mean() - y * (g * y).mean())
        if stride:
            g, weight_grad, bias_grad = torch.ops.aten.convolution_backward(
                g[None], x[None], weight, [len(g)], [stride] * 2, [0, 0], [1, 1], False, [0, 0], 1, [k > 0, True, True])
        else:
            weight_grad, bias_grad, g = torch.outer(g, x.flatten()), g, torch.mv(weight.T, g)
        after = [weight_grad.flatten(), bias_grad, *after]
    return torch.cat(after)
# twin end


# twin: normalisers
def running_stats(*shape: int) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(size, dtype=torch.float64)  # no scalars: torch 2.13 compiles writes to them wrongly
            for name, size in (("count", (1,)), ("mean", shape), ("square", shape))}


def count_in(stats: dict[str, torch.Tensor], x: torch.Tensor) -> None:
    """Welford: one more sample, in place; square: summed squared deviations."""
    count, off = stats["count"] + 1, x - stats["mean"]
    mean = stats["mean"] + off / count
    square = stats["square"] + off * (x - mean)
    for name, value in (("count", count), ("mean", mean), ("square", square)):
        stats[name].copy_(value)


def deviation(stats: dict[str, torch.Tensor]) -> torch.Tensor:
    """Standard deviation of the samples; 1 before the second one."""
    count = stats["count"]
    return torch.sqrt(torch.where(count > 1, stats["square"] / (count - 1).clamp(min=1), 1.0) + 1e-8)


def scale_reward(stats: dict[str, torch.Tensor], reward: torch.Tensor, ended: torch.Tensor, args: "Args"
                 ) -> torch.Tensor:
    """Reward over the deviation of the discounted return u, (1,) float32. As published, u starts anew at the last
    reward of an episode, which so leaks into the next one."""
    stats["return"].copy_(args.gamma * stats["return"] * (1 - ended) + reward)
    count_in(stats, stats["return"])
    return (reward / deviation(stats) if args.scale_reward else reward).float()
# twin end


# twin: obgd
def make_part(net: Net, args: "Args") -> dict[str, torch.Tensor]:
    """A network and its optimiser: flat weights and trace, and the second moments of --optimizer adaptive."""
    fan_in = min(math.prod(shape[1:]) for shape in net.weights[1:])  # the first layer may start dead, and learns
    if math.ceil(args.sparsity * fan_in) == fan_in:  # biases alone would learn
        raise ArgError(f"--sparsity {args.sparsity} takes all {fan_in} weights of a unit; lower it, or widen --hidden")
    weights = sparse_init(net, args.sparsity)
    part = {"weights": weights, "trace": torch.zeros_like(weights)}
    return part | ({"square": torch.zeros_like(weights), "count": torch.zeros(1)}
                   if args.optimizer == "adaptive" else {})


def obgd(part: dict[str, torch.Tensor], grad: torch.Tensor, delta: torch.Tensor, cut: torch.Tensor, kappa: float,
         args: "Args") -> tuple[torch.Tensor, torch.Tensor]:
    """Overshooting-bounded descent on a flat network, in place; returns the step size and the L1 norm of the direction:
    of the trace, or with --optimizer adaptive of what its second moments make of it.

    The trace takes in the gradient of the negated objective. The step is at most 1 / (kappa max(|delta|, 1) |z|_1): a
    prediction with gradient z, of entries of at most 1, then moves less than delta, to first order.
    """
    trace = args.gamma * args.lamda * part["trace"] + grad
    direction = trace
    if args.optimizer == "adaptive":
        part["count"].add_(1)
        part["square"].copy_(0.999 * part["square"] + 0.001 * (delta * trace).square())
        direction = trace / (part["square"] / (1 - 0.999 ** part["count"]) + 1e-8).sqrt()
    size = direction.abs().sum()
    step = torch.full_like(size, args.learning_rate)
    if args.optimizer != "plain":
        step = step / (step * kappa * delta.abs().clamp(min=1) * size).clamp(min=1)
    part["weights"].sub_(step * delta * direction)
    part["trace"].copy_(trace * (1 - cut))  # cut strictly after the update
    return step, size
# twin end


def observe(agent: dict, x: torch.Tensor, args: Args) -> torch.Tensor:
    """What the network sees of a row: its average with earlier rows, without the bias of a short past; scaled."""
    agent["rows"].add_(1)
    agent["average"].copy_(args.obs_trace * agent["average"] + (1 - args.obs_trace) * x)
    x = agent["average"] / (1 - args.obs_trace ** agent["rows"])
    count_in(agent["obs"], x)
    if args.normalize_obs:
        x = (x - agent["obs"]["mean"]) / deviation(agent["obs"])
    return x.float()


def update(agent: dict, net: Net, state, next_state, reward, args: Args) -> tuple:
    """One transition, one step, in place. A series never ends: every next value counts, no trace is cut."""
    weights, norm = agent["value"]["weights"], args.layer_norm
    (v,), cache = forward(weights, net, state, norm)
    (next_v,), _ = forward(weights, net, next_state, norm)
    delta = reward + args.gamma * next_v - v  # (1,)
    grad = backward(weights, net, cache, [torch.full_like(v, -1.0)], norm)
    return delta, v, *obgd(agent["value"], grad, delta, torch.zeros(1), args.kappa_value, args)


def step(agent: dict, net: Net, state: torch.Tensor, row: torch.Tensor, args: Args) -> tuple[torch.Tensor, ...]:
    """Everything between two rows; `row`: the next row and the cumulant, float64. Learns; returns next state, the
    prediction made at `state` in units of the cumulant, scaled cumulant, delta."""
    next_state = observe(agent, row[:-1], args)
    reward = scale_reward(agent["reward"], row[-1:], torch.zeros(1), args)
    delta, v, step_value, trace_value = update(agent, net, state, next_state, reward, args)
    scale = deviation(agent["reward"]) if args.scale_reward else torch.ones(1)
    agent["totals"].add_(torch.cat([x.float().view(1) for x in (
        delta.abs(), v, step_value, step_value < args.learning_rate, trace_value, scale)]))
    return next_state, v * scale, reward, delta


def td_error(agent: dict, net: Net, state, next_state, reward, args: Args) -> float:
    """delta of a transition under the weights of now."""
    v, next_v = (forward(agent["value"]["weights"], net, s, args.layer_norm)[0][0] for s in (state, next_state))
    return (reward + args.gamma * next_v - v).item()


def make_agent(args: Args, k: int) -> tuple[dict, Net]:
    """Fresh network, trace and statistics for rows of k numbers, and the network's shape."""
    net = make_net("vector", (k,), hidden_layers(args.hidden), [1])
    averages = {name: torch.zeros(size, dtype=torch.float64) for name, size in (("rows", 1), ("average", k))}
    return averages | {"value": make_part(net, args), "obs": running_stats(k), "totals": torch.zeros(len(SCALARS)),
                       "reward": running_stats(1) | {"return": torch.zeros(1, dtype=torch.float64)}}, net


def score(predicted: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """Columns of eval.csv: return_mean is minus the root mean squared error, return_std the deviation of the truth."""
    return {"episodes": 1, "return_mean": -float(np.sqrt(np.square(predicted - true).mean())),
            "return_std": float(true.std()), "success_rate": float("nan"), "length_mean": float(len(true))}


def draw(predicted: np.ndarray, true: np.ndarray, path: Path) -> None:
    """Predictions over the truth: the first rows, and the last ones."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 1, figsize=(10, 5), constrained_layout=True)
    for axis, rows in zip(axes, (slice(0, 5000), slice(max(len(true) - 5000, 0), len(true)))):
        axis.plot(np.arange(len(true))[rows], true[rows], label="true return")
        axis.plot(np.arange(len(true))[rows], predicted[rows], label="prediction", linewidth=0.8)
    axes[0].legend(loc="upper right", fontsize=8)
    axes[1].set_xlabel("row")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


@torch.no_grad()  # gradients have a closed form
def main(args: Args) -> dict[str, float]:
    """Predict, resume or show again, as `args` say; returns the last evaluation (keys: runtime.EVALUATION)."""
    saved = None
    if folder := args.resume or args.evaluate:
        stored, saved = load_run(folder, ALGO, Args)
        args = continued(stored, args, "resume", if_named=["total_timesteps"]) if args.resume else continued(
            stored, args, "evaluate", "video")
    require_positive(args, "total_timesteps", "learning_rate", "kappa_value", "lead")
    require_range(args, 0, 1, "sparsity", "gamma", "lamda")
    require_range(args, 0, math.inf, "eval_every", "checkpoint_every", "video")
    require_range(args, 0, 0.99999, "obs_trace")
    args = replace(args, compile=args.compile and not args.evaluate and can_compile(torch.device("cpu")))
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # products of one vector: a second thread is only waited for

    series = envs.Series(args.env, args.seed)
    true, content = series.returns(args.gamma, args.lead), [*series.rows.shape, zlib.crc32(series.rows.tobytes())]
    if args.total_timesteps >= len(true):
        raise ArgError(f"--total-timesteps {args.total_timesteps}: {args.env} has {len(true) - 1} at most")
    agent, net = make_agent(args, series.rows.shape[1])
    row = torch.zeros(series.rows.shape[1] + 1, dtype=torch.float64)
    raw = row.numpy()  # the same memory: assigning to it costs less than making a tensor
    predicted, at, overshoots = np.zeros(len(true)), 0, 0
    if saved:
        agent, at, predicted = saved["agent"], saved["step"], saved["predicted"].numpy()
        if saved.get("series", content) != content or len(predicted) != len(true):
            raise ArgError(f"{args.env} has changed since the run began; restore it, or start a new run")
    if args.evaluate:  # predictions are made once; what is shown is how good they were
        result = score(predicted[:at], true[:at])
        print(f"{args.env} after {at} rows: rmse {-result['return_mean']:.3f}, deviation of the true return "
              f"{result['return_std']:.3f}")
        if args.video:
            draw(predicted[:at], true[:at], Path(args.evaluate, "video", "prediction.png"))
        return result
    if saved:
        if at >= args.total_timesteps:
            raise ArgError(f"{folder} is at {at} steps; give it more --total-timesteps, or --evaluate it")
        state, overshoots = saved["state"], saved["overshoots"]
    else:
        state = observe(agent, torch.from_numpy(series.rows[0]), args)
    learn = step if not args.compile else compile_for(  # now: a signal to the compiler leaves no update half done
        step, COMPILED, agent, net, state, row, args)
    if not (args.run_dir or args.resume) and Path(args.env).is_file():  # a path is no name for a folder
        name = f"seed{args.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
        args = replace(args, run_dir=str(Path("runs", ALGO, Path(args.env).stem, name)))
    run = Run(ALGO, args, args.env, at, saved["wall_s"] if saved else 0.0)
    if not saved:  # the untrained network, over the first rows; no reward was seen that could scale it
        fresh, first = tree_map(torch.clone, agent), min(args.eval_every or LOG_EVERY, args.total_timesteps)
        seen = [state, *(observe(fresh, torch.from_numpy(x), args) for x in series.rows[1:first])]
        untrained = [forward(fresh["value"]["weights"], net, x, args.layer_norm)[0][0].item() for x in seen]
        run.log_evaluation(0, score(np.array(untrained), true[:first]))
    stop, since = 0, at // args.eval_every * args.eval_every if args.eval_every else 0
    while at < args.total_timesteps and not stop:
        raw[:-1], raw[-1] = series.rows[at + 1], series.target[at + args.lead]
        before = state
        state, prediction, scaled, delta = learn(agent, net, state, row, args)
        predicted[at] = prediction
        at += 1
        run.bar.update(1)

        def due(every: int) -> bool:
            return every > 0 and at % every == 0
        if due(CHECK_EVERY):
            after = td_error(agent, net, before, state, scaled, args)
            overshoots += after * delta.item() < 0

        # log, evaluate, save
        last = at >= args.total_timesteps
        if due(LOG_EVERY):
            window = score(predicted[at - LOG_EVERY:at], true[at - LOG_EVERY:at])
            run.log(at, dict(zip(SCALARS, (agent["totals"] / LOG_EVERY).tolist())) | {
                "rmse": -window["return_mean"], "true_std": window["return_std"],
                "overshoot": overshoots * CHECK_EVERY / LOG_EVERY})
            agent["totals"].zero_()
            overshoots = 0
        if last or due(args.eval_every):
            result = score(predicted[since:at], true[since:at])
            run.log_evaluation(at, result)
            since = at
        if (stop := run.stop) or last or due(args.checkpoint_every):
            run.save({"agent": agent, "step": at, "state": state, "predicted": predicted, "overshoots": overshoots,
                      "series": content, "wall_s": run.wall_s()})
    run.close(at < args.total_timesteps)  # a stopped run ends here
    if args.video:
        draw(predicted[:at], true[:at], run.folder / "video" / "prediction.png")
    return result


if __name__ == "__main__":
    with exit_codes(ALGO, envs.EnvError):
        main(tyro.cli(Args))
