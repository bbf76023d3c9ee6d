"""Stream AC(lambda): actor-critic from a stream. One transition, one update, nothing stored.

Elsayed, Vasan, Mahmood, "Streaming Deep Reinforcement Learning Finally Works" (arXiv 2410.14606). No replay buffer, no
batch, no target network. Five ingredients make it stable with one set of constants: accumulating eligibility traces, a
step size bounded by the trace so that updates hardly overshoot their target (ObGD), sparse initialisation, LayerNorm
without parameters, observations and rewards scaled by running statistics.

For Gaussian policies (MuJoCo, dm_control) and discrete ones (classic control, MinAtar, Atari). A network is one flat
vector, its trace another, and its gradient has a closed form, so that a transition, from the raw observation to the
next action, is one compiled graph: one call instead of several hundred. benchmarks/stream_autograd.py is the same
update by autograd and loops; tests hold the two within 1e-6 after 1000 updates. docs/stream.md lists the departures.

python algos/stream_ac.py --env HalfCheetah-v4   # return 1472 after 300,000 steps, 2711 after a million (ten seeds)
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
SCALARS = ("abs_delta", "value", "entropy", "std", "step_policy", "step_value", "capped_policy", "capped_value",
           "trace_policy", "trace_value", "reward_scale")


@dataclass
class Args:
    """Actor-critic that learns from every transition once, as it comes (Stream AC)."""
    env: str = "HalfCheetah-v4"  # environment id: Gymnasium, MinAtar/..., dm_control/..., ...NoFrameskip-v4
    total_timesteps: int = 1_000_000  # environment steps; with --resume: a new total
    eval_every: int = 50_000  # environment steps between evaluations; 0: only at start and end
    eval_episodes: int = 5  # episodes per evaluation; the last evaluation plays twice as many
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
    hidden: str = ""  # hidden layers, width x depth; empty: the paper's, of docs/stream.md (sizes)
    bootstrap_on_truncation: Literal["auto", "on", "off"] = "auto"  # auto: on Atari only, as in the paper
    max_episode_steps: int = 0  # in training (Atari: frames); 0: the task's; CartPole, Acrobot, MountainCar: 10,000
    time_feature: bool = True  # time since reset as an input, on vector observations
    entropy_coef: float = 0.01  # tau
    kappa_policy: float = 3.0  # margin of the policy's step bound
    kappa_value: float = 2.0  # margin of the value's step bound
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
TUNE = {"lamda": [0.0, 0.5, 0.8, 0.9, 0.95], "kappa_policy": (1.0, 10.0), "kappa_value": (1.0, 10.0),
        "entropy_coef": (1e-3, 0.1), "gamma": [0.97, 0.99, 0.995]}


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


def policy_gradient(outputs: list[torch.Tensor], action: torch.Tensor, sign: torch.Tensor, tau: float
                    ) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Gradients of -log pi(a) - tau sign(delta) H with respect to the policy's outputs; entropy; deviation.

    The step multiplies them by delta, so the sign makes the entropy part push towards more entropy either way.
    Gaussian: mean and q (d,), deviation softplus(q). Discrete: logits (A,), action one-hot.
    """
    if len(outputs) == 2:  # Gaussian
        mean, q = outputs
        std = F.softplus(q)
        error = (action - mean) / std
        grads = [-error / std, (1 - error.square() - tau * sign) / std * torch.sigmoid(q)]
        return grads, (std.log() + 0.5 * math.log(2 * math.pi * math.e)).sum(), std.mean()
    log_p = torch.log_softmax(outputs[0], 0)
    p = log_p.exp()
    entropy = -(p * log_p).sum()
    return [p - action + tau * sign * p * (log_p + entropy)], entropy, torch.zeros_like(entropy)


def update(agent: dict, nets: tuple[Net, Net], state, action, next_state, reward, discount, ended, args: Args) -> tuple:
    """One transition, one step of policy and value with the same delta; in place."""
    (policy, value), norm = nets, args.layer_norm
    (v,), value_cache = forward(agent["value"]["weights"], value, state, norm)
    (next_v,), _ = forward(agent["value"]["weights"], value, next_state, norm)
    delta = reward + discount * next_v - v  # (1,)
    value_grad = backward(agent["value"]["weights"], value, value_cache, [torch.full_like(v, -1.0)], norm)
    outputs, cache = forward(agent["policy"]["weights"], policy, state, norm)
    head_grads, entropy, std = policy_gradient(outputs, action, delta.sign(), args.entropy_coef)
    policy_grad = backward(agent["policy"]["weights"], policy, cache, head_grads, norm)
    return (delta, v, entropy, std, *obgd(agent["policy"], policy_grad, delta, ended, args.kappa_policy, args),
            *obgd(agent["value"], value_grad, delta, ended, args.kappa_value, args))


def draw(weights: torch.Tensor, net: Net, state: torch.Tensor, noise: torch.Tensor, args: Args) -> torch.Tensor:
    """An action: mean + std * noise (d,), not clipped; or one-hot by Gumbel noise (A,). Zero noise: the likeliest."""
    outputs, _ = forward(weights, net, state, args.layer_norm)
    if len(outputs) == 2:  # Gaussian
        return outputs[0] + F.softplus(outputs[1]) * noise
    return F.one_hot((outputs[0] + noise).argmax(), len(noise)).float()


def step(agent: dict, nets: tuple[Net, Net], state: torch.Tensor, action: torch.Tensor, row: torch.Tensor,
         noise: torch.Tensor, shape: tuple[int, ...], frames: int, args: Args) -> tuple[torch.Tensor, ...]:
    """Everything between two environment steps. `row` is what the environment returned, float64: raw observation, time
    if it is an input, reward, whether the episode ended, whether the next state's value counts. Learns from it, draws
    the next action; returns next state, next action, scaled reward, delta."""
    x, time = row[:math.prod(shape)].view(shape), row[math.prod(shape):-3]
    reward, ended, counts = row[-3:-2], row[-2:-1], row[-1:]
    next_state = observe(agent["obs"], x, time, state, frames, args)
    reward = scale_reward(agent["reward"], reward, ended, args)
    delta, v, entropy, std, step_policy, trace_policy, step_value, trace_value = update(
        agent, nets, state, action, next_state, reward, args.gamma * counts.float(), ended.float(), args)
    agent["totals"].add_(torch.cat([x.float().view(1) for x in (
        delta.abs(), v, entropy, std, step_policy, step_value, step_policy < args.learning_rate,
        step_value < args.learning_rate, trace_policy, trace_value, deviation(agent["reward"]))]))
    return next_state, draw(agent["policy"]["weights"], nets[0], next_state, noise, args), reward, delta


def td_error(agent: dict, net: Net, state, next_state, reward, discount, args: Args) -> float:
    """delta of a transition under the weights of now."""
    v, next_v = (forward(agent["value"]["weights"], net, s, args.layer_norm)[0][0] for s in (state, next_state))
    return (reward + discount * next_v - v).item()


def make_agent(args: Args, env: envs.StreamEnv) -> tuple[dict, tuple[Net, Net]]:
    """Fresh networks, traces and statistics, and the networks' shapes: policy, value."""
    discrete = isinstance(env.action_space, gym.spaces.Discrete)
    heads = [int(env.action_space.n)] if discrete else [env.action_space.shape[0]] * 2
    default = {"vector": "32x2" if discrete else "128x2", "minatar": "128x1", "atari": "256x1"}[env.kind]
    inputs = (env.shape[0] + env.timed,) if env.kind == "vector" else (env.shape[0] * env.frames, *env.shape[1:])
    nets = tuple(make_net(env.kind, inputs, hidden_layers(args.hidden or default), h) for h in (heads, [1]))
    agent = {name: make_part(net, args) for name, net in zip(("policy", "value"), nets)}
    return agent | {"obs": running_stats(*env.shape), "totals": torch.zeros(len(SCALARS)),
                    "reward": running_stats(1) | {"return": torch.zeros(1, dtype=torch.float64)}}, nets


@torch.no_grad()  # gradients have a closed form
def main(args: Args) -> dict[str, float]:
    """Train, resume or evaluate, as `args` say; returns the last evaluation (keys: runtime.EVALUATION)."""
    saved = None
    if folder := args.resume or args.evaluate:
        stored, saved = load_run(folder, ALGO, Args)
        args = continued(stored, args, "resume", if_named=["total_timesteps"]) if args.resume else continued(
            stored, args, "evaluate", "eval_episodes", "video")
    require_positive(args, "total_timesteps", "eval_episodes", "learning_rate", "kappa_policy", "kappa_value")
    require_range(args, 0, 1, "sparsity", "gamma", "lamda")
    require_range(args, 0, math.inf, "eval_every", "checkpoint_every", "video", "max_episode_steps",
                  "entropy_coef")
    args = replace(args, compile=args.compile and not args.evaluate and can_compile(torch.device("cpu")))
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # products of one vector: a second thread is only waited for

    settings = dict(max_episode_steps=args.max_episode_steps, time_feature=args.time_feature)
    env, eval_env = (envs.StreamEnv(args.env, **settings) for _ in range(2))
    space = env.action_space
    if not isinstance(space, (gym.spaces.Box, gym.spaces.Discrete)) or len(space.shape) > 1:
        raise ArgError(f"{args.env} has {space} actions; {ALGO} needs Box or Discrete ones")
    discrete = isinstance(space, gym.spaces.Discrete)
    agent, nets = make_agent(args, env)
    bootstrap = args.bootstrap_on_truncation == "on" or (args.bootstrap_on_truncation == "auto" and env.kind == "atari")
    n, d = math.prod(env.shape), int(space.n) if discrete else space.shape[0]
    row = torch.zeros(n + env.timed + 3, dtype=torch.float64)
    raw = row.numpy()  # the same memory: assigning to it costs less than making a tensor
    at, stop, episode_return, episode_length, overshoots = 0, 0, 0.0, 0, 0
    seen = None  # state of an episode that is played, not learned from

    def noise() -> torch.Tensor:
        return -(-torch.rand(d).clamp(1e-10, 1 - 1e-7).log()).log() if discrete else torch.randn(d)

    def to_env(action: torch.Tensor) -> np.ndarray | int:
        return int(action.argmax()) if discrete else np.clip(action.numpy(), space.low, space.high)

    def look(obs: np.ndarray, env: envs.StreamEnv, last: torch.Tensor | None, learn: bool) -> torch.Tensor:
        time = torch.tensor([env.time] if env.timed else [], dtype=torch.float64)
        x = torch.from_numpy(np.ascontiguousarray(obs, np.float64))  # `step` is compiled for this layout
        return observe(agent["obs"], x, time, last, env.frames, args, learn)

    def begin(seed: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """First state of an episode, and what to do there."""
        state = look(env.reset(seed), env, None, learn=True)
        return state, draw(agent["policy"]["weights"], nets[0], state, noise(), args)

    def play(obs: np.ndarray, env: envs.StreamEnv) -> np.ndarray | int:
        """The likeliest action. Statistics stay as they are: an evaluation must leave no trace in training."""
        nonlocal seen
        seen = look(obs, env, seen if env.elapsed else None, learn=False)
        return to_env(draw(agent["policy"]["weights"], nets[0], seen, torch.zeros(d), args))

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
            raise ArgError(f"{folder} is at {at} steps; give it more --total-timesteps, or --evaluate it")
        state, action, episode_return, episode_length, overshoots = (saved[name] for name in (
            "state", "action", "return", "length", "overshoots"))
        env.restore(saved["env"])
        torch.set_rng_state(saved["rng"])
    else:
        state, action = begin(10_000 * args.seed)
    learn = step if not args.compile else compile_for(  # now: a signal to the compiler leaves no update half done
        step, COMPILED, agent, nets, state, action, row, torch.zeros(d), env.shape, env.frames, args)
    run = Run(ALGO, args, envs.resolve(args.env), at, saved["wall_s"] if saved else 0.0)
    if not saved:
        run.log_evaluation(0, evaluate(args.eval_episodes))  # the untrained agent
    while at < args.total_timesteps and not stop:
        obs, reward, terminated, truncated, over = env.step(to_env(action))
        raw[:n] = obs.reshape(-1)
        raw[n:] = [*([env.time] if env.timed else []), reward, terminated or truncated,
                   not (terminated or (truncated and not bootstrap))]
        before = state
        state, action, scaled, delta = learn(agent, nets, state, action, row, noise(), env.shape, env.frames, args)
        at, episode_return, episode_length = at + 1, episode_return + reward, episode_length + 1
        run.bar.update(1)

        def due(every: int) -> bool:
            return every > 0 and at % every == 0
        if due(CHECK_EVERY):
            after = td_error(agent, nets[1], before, state, scaled, args.gamma * raw[-1], args)
            overshoots += after * delta.item() < 0
        if over:
            run.log(at, {"return": episode_return, "length": episode_length})
            episode_return, episode_length, (state, action) = 0.0, 0, begin()

        # log, evaluate, save
        last = at >= args.total_timesteps
        if due(LOG_EVERY):
            run.log(at, dict(zip(SCALARS, (agent["totals"] / LOG_EVERY).tolist())) | {
                "overshoot": overshoots * CHECK_EVERY / LOG_EVERY})
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
