"""Stream Q(lambda) and Stream SARSA(lambda): action values from a stream. One transition, one update, nothing stored.

Elsayed, Vasan, Mahmood, "Streaming Deep Reinforcement Learning Finally Works" (arXiv 2410.14606). No replay buffer, no
batch, no target network: accumulating traces, a bounded step (ObGD), sparse initialisation, LayerNorm without
parameters, scaled observations and rewards. Written from formulas, not from code; the parent is stream_ac.py, whose
docstring says why a network is one flat vector: `diff algos/stream_ac.py algos/stream_q.py` shows the idea.

Q(lambda) takes the greedy value of the next state and cuts its traces after an action that was not greedy (and after
its own update, which so still credits the steps before). `--sarsa` takes the value of the action that is done next and
cuts at the ends of episodes alone. Time-outs count as ends, so on classic control training has the published limit of
10,000 steps; with CartPole's own 500 a good agent is told in every episode that it fell. Evaluations stop at 500.

python algos/stream_q.py --env CartPole-v1   # ten seeds: pole balanced for 10,000 steps, now and then lost again
"""
import math
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro

import envs
from runtime import (ArgError, Run, can_compile, compile_for, continued, exit_codes, hidden_layers, load_run,
                     require_positive, require_range)

ALGO = Path(__file__).stem  # names run folders and result tables
LOG_EVERY = 10_000  # environment steps
CHECK_EVERY = 100  # steps between looks whether an update overshot its target
SCALARS = ("abs_delta", "value", "step_value", "capped_value", "trace_value", "exploratory", "reward_scale")


@dataclass
class Args:
    """Action values that learn from every transition once, as it comes (Stream Q, Stream SARSA)."""
    env: str = "CartPole-v1"  # environment id: Gymnasium, MinAtar/..., ...NoFrameskip-v4; discrete actions
    total_timesteps: int = 500_000  # environment steps
    eval_every: int = 25_000  # environment steps between evaluations; 0: only at start and end
    eval_episodes: int = 10  # episodes per evaluation; the last evaluation plays twice as many
    checkpoint_every: int = 100_000  # environment steps between checkpoints; 0: only at the end
    compile: bool = True  # compile all that happens between two steps into one graph: about 10 s at the start
    video: int = 0  # episodes to film after training, or with --evaluate
    # twin: run arguments
    seed: int = 1  # of all that is random: networks, environments, exploration
    run_dir: str = ""  # run folder; empty: runs/<algo>/<env>/seed<k>-<time>
    resume: str = ""  # run folder to continue exactly, with the arguments it has
    evaluate: str = ""  # run folder to evaluate; no training
    track: bool = False  # mirror scalars to Weights & Biases (pip install wandb)
    # twin end

    # algorithm
    sarsa: bool = False  # the value of the next action instead of the greedy one
    hidden: str = ""  # hidden layers, width x depth; empty: the paper's, of docs/stream.md (sizes)
    exploration_fraction: float = 0.05  # share of the steps over which epsilon falls (paper: 0.2 for Q on MinAtar)
    epsilon_end: float = 0.01  # share of uniform actions from then on
    bootstrap_on_truncation: Literal["auto", "on", "off"] = "auto"  # auto: on Atari only, as in the paper
    max_episode_steps: int = 0  # in training (Atari: frames); 0: the task's; CartPole, Acrobot, MountainCar: 10,000
    time_feature: bool = True  # time since reset as an input, on vector observations
    kappa_value: float = 2.0  # margin of the step bound
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
TUNE = {"lamda": [0.0, 0.5, 0.8, 0.9, 0.95], "kappa_value": (1.0, 10.0), "exploration_fraction": (0.02, 0.5),
        "gamma": [0.97, 0.99, 0.995]}


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


# twin: observe
def observe(stats: dict[str, torch.Tensor], x: torch.Tensor, time: torch.Tensor, last: torch.Tensor | None,
            frames: int, args: "Args", learn: bool = True) -> torch.Tensor:
    """What networks see of a raw observation: counted in first, then shifted and scaled; then the time (1,) or (0,)
    goes beside it, or it on top of the `frames` - 1 latest of `last` (None: after a reset)."""
    if learn:
        count_in(stats, x)
    if args.normalize_obs:
        x = (x - stats["mean"]) / deviation(stats)
    x = torch.cat([x, time]).float() if x.dim() == 1 else x.float()
    if frames == 1:
        return x
    return x.repeat(frames, 1, 1) if last is None else torch.cat([last[1:], x])  # (frames, h, w)
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


def epsilon(decision: int, args: Args) -> float:
    """Share of uniform actions at a decision, 1, 2, ..., one per step."""
    share = decision / (args.exploration_fraction * args.total_timesteps)
    return max(1 + (args.epsilon_end - 1) * share, args.epsilon_end)


def greedy(q: torch.Tensor) -> torch.Tensor:
    """One-hot of the best action (A,)."""
    return F.one_hot(q.argmax(), len(q)).float()


def choose(q: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """`uniform`, one-hot (A,), or where that is all zeros, the greedy action."""
    return torch.where(uniform.sum() > 0, uniform, greedy(q))


def update(agent: dict, net: Net, state, action, next_state, next_action, reward, discount, ended, args: Args) -> tuple:
    """One transition, one step, in place. next_action: one-hot, or None for the best."""
    weights, norm = agent["value"]["weights"], args.layer_norm
    (q,), cache = forward(weights, net, state, norm)
    (next_q,), _ = forward(weights, net, next_state, norm)
    next_value = next_q.amax(0, keepdim=True) if next_action is None else (next_q * next_action).sum(0, keepdim=True)
    value = (q * action).sum(0, keepdim=True)
    delta = reward + discount * next_value - value  # (1,)
    exploratory = 1 - (action * greedy(q)).sum(0, keepdim=True)  # a uniform action may be the greedy one
    cut = ended if args.sarsa else torch.maximum(ended, exploratory)
    grad = backward(weights, net, cache, [-action], norm)
    return delta, value, exploratory, *obgd(agent["value"], grad, delta, cut, args.kappa_value, args)


def step(agent: dict, net: Net, state: torch.Tensor, action: torch.Tensor, row: torch.Tensor, uniform: torch.Tensor,
         shape: tuple[int, ...], frames: int, args: Args) -> tuple[torch.Tensor, ...]:
    """Everything between two environment steps. `row` is what the environment returned, float64: raw observation, time
    if it is an input, reward, whether the episode ended, whether the next state's value counts. Learns from it, chooses
    the next action; returns next state, next action, scaled reward, delta."""
    x, time = row[:math.prod(shape)].view(shape), row[math.prod(shape):-3]
    reward, ended, counts = row[-3:-2], row[-2:-1], row[-1:]
    next_state = observe(agent["obs"], x, time, state, frames, args)
    reward = scale_reward(agent["reward"], reward, ended, args)
    weights, next_action = agent["value"]["weights"], None
    if args.sarsa:  # chosen before the update, which needs it
        next_action = choose(forward(weights, net, next_state, args.layer_norm)[0][0], uniform)
    delta, value, exploratory, step_value, trace_value = update(
        agent, net, state, action, next_state, next_action, reward, args.gamma * counts.float(), ended.float(), args)
    if not args.sarsa:
        next_action = choose(forward(weights, net, next_state, args.layer_norm)[0][0], uniform)
    agent["totals"].add_(torch.cat([x.float().view(1) for x in (
        delta.abs(), value, step_value, step_value < args.learning_rate, trace_value, exploratory,
        deviation(agent["reward"]))]))
    return next_state, next_action, reward, delta


def td_error(agent: dict, net: Net, state, action, next_state, next_action, reward, discount, args: Args) -> float:
    """delta of a transition under the weights of now."""
    (q,), _ = forward(agent["value"]["weights"], net, state, args.layer_norm)
    (next_q,), _ = forward(agent["value"]["weights"], net, next_state, args.layer_norm)
    next_value = (next_q * next_action).sum() if args.sarsa else next_q.max()
    return (reward + discount * next_value - (q * action).sum()).item()


def make_agent(args: Args, env: envs.StreamEnv) -> tuple[dict, Net]:
    """Fresh network, trace and statistics, and the network's shape."""
    default = {"vector": "32x2", "minatar": "128x1", "atari": "256x1"}[env.kind]
    inputs = (env.shape[0] + env.timed,) if env.kind == "vector" else (env.shape[0] * env.frames, *env.shape[1:])
    net = make_net(env.kind, inputs, hidden_layers(args.hidden or default), [int(env.action_space.n)])
    return {"value": make_part(net, args), "obs": running_stats(*env.shape), "totals": torch.zeros(len(SCALARS)),
            "reward": running_stats(1) | {"return": torch.zeros(1, dtype=torch.float64)}}, net


@torch.no_grad()  # gradients have a closed form
def main(args: Args) -> dict[str, float]:
    """Train, resume or evaluate, as `args` say; returns the last evaluation (keys: runtime.EVALUATION)."""
    saved = None
    if folder := args.resume or args.evaluate:
        stored, saved = load_run(folder, ALGO, Args)
        args = continued(stored, args, "resume") if args.resume else continued(
            stored, args, "evaluate", "eval_episodes", "video")
    require_positive(args, "total_timesteps", "eval_episodes", "learning_rate", "kappa_value", "exploration_fraction")
    require_range(args, 0, 1, "sparsity", "gamma", "lamda", "epsilon_end")
    require_range(args, 0, math.inf, "eval_every", "checkpoint_every", "video", "max_episode_steps")
    args = replace(args, compile=args.compile and not args.evaluate and can_compile(torch.device("cpu")))
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # products of one vector: a second thread is only waited for

    settings = dict(max_episode_steps=args.max_episode_steps, time_feature=args.time_feature)
    env, eval_env = (envs.StreamEnv(args.env, **settings) for _ in range(2))
    if not isinstance(env.action_space, gym.spaces.Discrete):
        raise ArgError(f"{args.env} has {env.action_space} actions; {ALGO} needs Discrete ones; Box: stream_ac.py")
    agent, net = make_agent(args, env)
    bootstrap = args.bootstrap_on_truncation == "on" or (args.bootstrap_on_truncation == "auto" and env.kind == "atari")
    n, actions = math.prod(env.shape), torch.eye(int(env.action_space.n))
    row = torch.zeros(n + env.timed + 3, dtype=torch.float64)
    raw = row.numpy()  # the same memory: assigning to it costs less than making a tensor
    at, stop, episode_return, episode_length, overshoots = 0, 0, 0.0, 0, 0

    def uniform() -> torch.Tensor:
        """A uniform action at the epsilon of the next decision, else zeros."""
        explore, which = torch.rand(2).tolist()
        return actions[int(which * len(actions))] if explore < epsilon(at + 1, args) else torch.zeros(len(actions))

    def look(obs: np.ndarray, env: envs.StreamEnv, last: torch.Tensor | None, learn: bool) -> torch.Tensor:
        time = torch.tensor([env.time] if env.timed else [], dtype=torch.float64)
        x = torch.from_numpy(np.ascontiguousarray(obs, np.float64))  # `step` is compiled for this layout
        return observe(agent["obs"], x, time, last, env.frames, args, learn)

    def values(state: torch.Tensor) -> torch.Tensor:
        return forward(agent["value"]["weights"], net, state, args.layer_norm)[0][0]

    seen = None  # state of an episode that is played, not learned from

    def play(obs: np.ndarray, env: envs.StreamEnv) -> int:
        """The greedy action. Statistics stay as they are: an evaluation must leave no trace in training."""
        nonlocal seen
        seen = look(obs, env, seen if env.elapsed else None, learn=False)
        return int(values(seen).argmax())

    def evaluate(episodes: int) -> dict[str, float]:
        return envs.evaluate_stream(play, eval_env, episodes, 10_000 * args.seed + 5_000)

    def film(folder: Path) -> None:
        envs.record_stream(play, args.env, args.video, 10_000 * args.seed + 7_000, folder, **settings)

    if saved:
        agent, at = saved["agent"], saved["step"]
    if args.evaluate:
        result = evaluate(args.eval_episodes)
        print(f"{args.env} after {at} steps: " + ", ".join(f"{name} {value:.3f}" for name, value in result.items()))
        film(Path(args.evaluate, "video"))
        return result

    if saved:
        if at >= args.total_timesteps:
            raise ArgError(f"{folder} is finished at {at} steps; --evaluate {folder} plays it")
        state, action, episode_return, episode_length, overshoots = (saved[name] for name in (
            "state", "action", "return", "length", "overshoots"))
        env.restore(saved["env"])
        torch.set_rng_state(saved["rng"])
    else:
        state = look(env.reset(10_000 * args.seed), env, None, learn=True)
        action = choose(values(state), uniform())
    learn = step if not args.compile else compile_for(  # now: a signal to the compiler leaves no update half done
        step, COMPILED, agent, net, state, action, row, actions[0], env.shape, env.frames, args)
    run = Run(ALGO, args, envs.resolve(args.env), at, saved["wall_s"] if saved else 0.0)
    if not saved:
        run.log_evaluation(0, evaluate(args.eval_episodes))  # the untrained agent
    while at < args.total_timesteps and not stop:
        obs, reward, terminated, truncated, over = env.step(int(action.argmax()))
        raw[:n] = obs.reshape(-1)
        raw[n:] = [*([env.time] if env.timed else []), reward, terminated or truncated,
                   not (terminated or (truncated and not bootstrap))]
        before = state, action
        at, episode_return, episode_length = at + 1, episode_return + reward, episode_length + 1
        state, action, scaled, delta = learn(agent, net, state, action, row, uniform(), env.shape, env.frames, args)
        run.bar.update(1)

        def due(every: int) -> bool:
            return every > 0 and at % every == 0
        if due(CHECK_EVERY):
            after = td_error(agent, net, *before, state, action, scaled, args.gamma * raw[-1], args)
            overshoots += after * delta.item() < 0
        if over:
            run.log(at, {"return": episode_return, "length": episode_length})
            episode_return, episode_length, state = 0.0, 0, look(env.reset(), env, None, learn=True)
            if not args.sarsa:  # SARSA does first what it chose at the end, as published
                action = choose(values(state), uniform())

        # log, evaluate, save
        last = at >= args.total_timesteps
        if due(LOG_EVERY):
            run.log(at, dict(zip(SCALARS, (agent["totals"] / LOG_EVERY).tolist())) | {
                "overshoot": overshoots * CHECK_EVERY / LOG_EVERY, "epsilon": epsilon(at, args)})
            agent["totals"].zero_()
            overshoots = 0
        if last or due(args.eval_every):
            run.log_evaluation(at, result := evaluate(args.eval_episodes * (2 if last else 1)))
        if (stop := run.stop) or last or due(args.checkpoint_every):
            run.save({"agent": agent, "step": at, "state": state, "action": action, "return": episode_return,
                      "length": episode_length, "overshoots": overshoots, "env": envs.snapshot(env),
                      "rng": torch.get_rng_state(), "wall_s": run.wall_s()})
    run.close(at < args.total_timesteps)  # a stopped run ends here
    film(run.folder / "video")
    return result


if __name__ == "__main__":
    with exit_codes(ALGO, envs.EnvError):
        main(tyro.cli(Args))
