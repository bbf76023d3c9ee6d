"""MEow: one energy-based normalizing flow is actor, critic and value of maximum-entropy RL at once.

Chao et al., "Maximum Entropy Reinforcement Learning via Energy-Based Normalizing Flow" (NeurIPS 2024, arXiv
2405.13629). A flow z -> a gives log pi(a|s) exactly. The part of it that depends on the action is the energy Q; the
rest is the normaliser V:

    z = sigma(s) * epsilon,  x = g(z; s) by additive couplings,  a = tanh(x)                                 (1)
    Q_i(s, a) = alpha [-1/2 sum (z / sigma(s))^2 - sum log(1 - a^2) + b_i(s)]                                (2)
    V_i(s)    = alpha [sum log sigma(s) + d/2 log 2 pi + b_i(s)],  so that Q_i - V_i = alpha log pi(a|s)     (3)
    loss      = mean over i of (Q_i(s, a) - r - gamma (1 - terminated) min_i V_i(s'))^2                      (4)

So no actor has to be trained, and V needs no samples. b_i is a learned shift of both Q_i and V_i; two of them make a
clipped double Q. Departures: one pass of the flow serves both Q_i, so they share a dropout mask, and a loss of NaN ends
the run. docs/meow.md has the measurements.

python algos/meow.py --env Hopper-v4
"""
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import start  # noqa: F401  before numpy

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_map

import envs
import runtime
from buffers import Batch, ReplayBuffer
from envs import multigoal
from networks import adam, adam_state

ALGO = Path(__file__).stem  # names run folders and result tables
LOG_EVERY = 1000  # environment steps
EDGE = 1e-5  # actions are kept so far from +-1, where atanh is infinite
EPS = torch.finfo(torch.float32).eps


@dataclass
class Args:
    """MEow: maximum-entropy RL with one normalizing flow."""
    # twin: run arguments
    env: str = "Hopper-v4"  # environment id; an old Fetch id is replaced by the installed version
    seed: int = 1  # seed of all random numbers: networks, environments, exploration
    total_timesteps: int = 500_000  # environment steps, summed over environments; with --resume: a new total
    num_envs: int = 8  # environments stepped together
    eval_every: int = 10_000  # environment steps between evaluations; 0: only at start and end
    eval_episodes: int = 10  # episodes per evaluation; the last evaluation plays twice as many
    checkpoint_every: int = 50_000  # environment steps between checkpoints; 0: only at the end
    video: int = 0  # episodes to film after training, or with --evaluate
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where the networks run; auto: on a GPU if there is one
    compile: bool = True  # compile the update into one graph: about 30 s at the first start, then up to twice as fast
    run_dir: str = ""  # run folder; empty: runs/<algo>/<env>/seed<k>-<time>
    resume: str = ""  # run folder to continue exactly, with its own arguments
    evaluate: str = ""  # run folder to evaluate; no training
    track: bool = False  # also log scalars to Weights & Biases (pip install wandb)
    # twin end

    # algorithm
    hidden: str = "64x2"  # hidden layers of log sigma and of the couplings, width x depth
    shift_hidden: str = "256x2"  # hidden layers of the shifts b_i
    batch_size: int = 256  # transitions per update
    buffer_size: int = 1_000_000  # transitions kept for replay
    learning_rate: float = 1e-3  # Adam
    grad_clip: float = 30.0  # largest norm of the gradient
    updates_per_step: float = 1.0  # updates per environment step
    gamma: float | None = None  # discount per step; if not given, this and others that are None are those of PRESETS
    tau: float | None = None  # Polyak step of the target network, per update; MEow is most sensitive to it
    learning_starts: int | None = None  # environment steps with uniform actions, before the first update
    # method
    alpha: float | None = None  # temperature, fixed
    sigma_min: float | None = None  # lowest log sigma (the log of a deviation, though named sigma by the authors)
    sigma_max: float | None = None  # highest log sigma
    couplings: int = 4  # additive couplings of the flow
    dropout: float = 0.1  # share of the couplings' hidden units that an update leaves out
    lrs: bool = True  # learnable reward shifting: the shifts b_i, else 0
    scdq: bool = True  # shifting-based clipped double Q: two shifts, else one
    double_pass: bool = False  # a flow pass for each Q_i, each with its own dropout mask, as in the authors' program
    sample: bool = False  # evaluations draw actions, else they take the flow's image of 0


RANGES = {"gamma": (0, 1), "tau": (0, 1), "dropout": (0, 0.9), "learning_starts": (0, math.inf),
          "sigma_min": (-20, 2), "sigma_max": (-20, 2)}
# for `make tune`: (low, high) on a log scale, or choices
TUNE = {"alpha": (0.03, 0.5), "tau": (3e-4, 1e-2), "learning_rate": (3e-4, 3e-3), "sigma_max": [-0.3, 0.5, 2.0]}
# The authors' settings by environment. The first row is ours, for all other environments.
PRESETS = {
    "": {"alpha": 0.2, "tau": 0.005, "gamma": 0.99, "learning_starts": 5000, "sigma_min": -5.0, "sigma_max": -0.3},
    "Hopper": {"alpha": 0.25},
    "HalfCheetah": {"alpha": 0.25, "tau": 0.003, "learning_starts": 10_000, "sigma_max": 2.0},
    "Walker2d": {"alpha": 0.1, "learning_starts": 10_000},
    "Ant": {"alpha": 0.05, "tau": 0.0001},
    "Humanoid": {"alpha": 0.125, "tau": 0.0005},
    "MultiGoal": {"alpha": 2.5, "tau": 0.0005, "gamma": 0.9, "learning_starts": 1000, "sigma_min": -2.0,
                  "sigma_max": 1.0},
}


def with_preset(args: Args) -> Args:
    """`args` with what was not given as in PRESETS for their environment."""
    preset = PRESETS[""] | PRESETS.get(envs.resolve(args.env).split("-v")[0], {})
    return replace(args, **{name: value for name, value in preset.items() if getattr(args, name) is None})


# The flow is a dict of tensors, {"scale.0.weight": ..., "coupling.0.bias": ..., "shift.1.slope": ...}, and everything
# is a function of it. So torch.func can differentiate it, and torch.compile makes one graph of it, with Adam inside.
def init_net(name: str, sizes: list[int], stack: int, zero: bool) -> dict[str, torch.Tensor]:
    """Parameters of `stack` networks side by side: zero weights, or orthogonal ones with LayerNorm (gain, offset)
    after every hidden layer; biases in PyTorch's default; slopes of Swish begin at 1."""
    params = {}
    for i, (fan_in, fan_out) in enumerate(zip(sizes, sizes[1:])):
        weight, bound = torch.zeros(stack, fan_in, fan_out), fan_in ** -0.5
        for w in weight:
            if not zero:
                nn.init.orthogonal_(w)
        params |= {f"{name}.{i}.weight": weight,
                   f"{name}.{i}.bias": torch.empty(stack, 1, fan_out).uniform_(-bound, bound)}
        if i < len(sizes) - 2:
            params[f"{name}.{i}.slope"] = torch.ones(stack, 1, fan_out)
            if not zero:
                params |= {f"{name}.{i}.gain": torch.ones(stack, 1, fan_out),
                           f"{name}.{i}.offset": torch.zeros(stack, 1, fan_out)}
    return params


def net(params: dict, name: str, x: torch.Tensor, keep: torch.Tensor | None = None, k: int | None = None):
    """(B, in) -> (stack, B, out), or with `k` (B, out) of the k-th. `keep` (depth, B, width) are dropout's factors."""
    layers = {key.removeprefix(f"{name}."): p if k is None else p[k] for key, p in params.items()
              if key.startswith(f"{name}.")}
    depth = sum(key.endswith("slope") for key in layers)  # hidden layers
    for i in range(depth):
        x = torch.matmul(x, layers[f"{i}.weight"]) + layers[f"{i}.bias"]
        if f"{i}.gain" in layers:
            x = F.layer_norm(x, x.shape[-1:]) * layers[f"{i}.gain"] + layers[f"{i}.offset"]
        x = x * torch.sigmoid(layers[f"{i}.slope"] * x)  # Swish, a slope per unit
        if keep is not None:
            x = x * keep[i]
    return torch.matmul(x, layers[f"{depth}.weight"]) + layers[f"{depth}.bias"]


def log_sigma(flow: dict, obs: torch.Tensor, args: Args) -> torch.Tensor:
    """(B, f) -> (B, d), within sigma_min and sigma_max."""
    middle = torch.tanh(net(flow, "scale", obs, k=0))
    return args.sigma_min + 0.5 * (args.sigma_max - args.sigma_min) * (middle + 1)


def shifts(flow: dict, obs: torch.Tensor) -> torch.Tensor:
    """b_i(s) (B, 2); (B, 1) where there is one shift, or none, which is 0."""
    if "shift.0.weight" not in flow:
        return torch.zeros(len(obs), 1)
    return net(flow, "shift", obs).squeeze(-1).T  # (2, B, 1) -> (B, 2)


def mask(d: int, k: int) -> torch.Tensor:
    """What coupling k keeps: (1, 0, 1, ...), for odd k (0, 1, 0, ...)."""
    return (torch.arange(d) % 2 == k % 2).float()


def generate(flow: dict, z: torch.Tensor, obs: torch.Tensor, args: Args) -> torch.Tensor:
    """g of (1): z (B, d) -> x (B, d). Every coupling moves the numbers outside its mask by a function of those inside
    and of the state: volume is preserved, the log-determinant 0."""
    for k in range(args.couplings):
        kept = mask(z.shape[1], k).to(z)
        z = z + (1 - kept) * net(flow, "coupling", torch.cat([kept * z, obs], 1), k=k)
    return z


def invert(flow: dict, x: torch.Tensor, obs: torch.Tensor, keep: torch.Tensor | None, args: Args) -> torch.Tensor:
    """The inverse of `generate`. `keep` (couplings, depth, B, width) are dropout's factors, None outside training."""
    for k in reversed(range(args.couplings)):
        kept = mask(x.shape[1], k).to(x)
        inputs = torch.cat([kept * x, obs], 1)
        x = x - (1 - kept) * net(flow, "coupling", inputs, None if keep is None else keep[k], k)
    return x


def state_values(flow: dict, obs: torch.Tensor, args: Args) -> torch.Tensor:
    """V_i(s) of (3), (B, 2): the log of the integral of exp(Q_i / alpha) over all actions, times alpha."""
    log_std = log_sigma(flow, obs, args)
    normaliser = log_std.sum(1, keepdim=True) + 0.5 * log_std.shape[1] * math.log(2 * math.pi)
    return args.alpha * (normaliser + shifts(flow, obs))


def action_values(flow: dict, obs: torch.Tensor, action: torch.Tensor, keep: torch.Tensor | None, args: Args):
    """Q_i(s, a) of (2), (B, 2)."""
    action = action.clamp(-1 + EDGE, 1 - EDGE)
    z = invert(flow, torch.atanh(action), obs, keep, args)
    energy = -0.5 * (z * torch.exp(-log_sigma(flow, obs, args))).square() - torch.log(1 - action.square() + EPS)
    return args.alpha * (energy.sum(1, keepdim=True) + shifts(flow, obs))


class Decision(NamedTuple):
    action: torch.Tensor  # (B, d)
    log_prob: torch.Tensor  # (B,)


def decide(flow: dict, obs: torch.Tensor, noise: torch.Tensor, args: Args) -> Decision:
    """(1): observations (B, f) and Gaussian noise (B, d), 0 for the mode of the base -> action, log-probability."""
    log_std = log_sigma(flow, obs, args)
    action = torch.tanh(generate(flow, log_std.exp() * noise, obs, args)).clamp(-1, 1)
    log_prob = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi) - torch.log(1 - action.square() + EPS)
    return Decision(action, log_prob.sum(1))


def sampled_value(flow: dict, obs: torch.Tensor, count: int, args: Args) -> torch.Tensor:
    """V_1(s) (B,), estimated from `count` uniform actions per state, as methods without a known normaliser have to.
    The flow knows V_1 exactly; this is for the picture of how slowly the estimate converges."""
    d = flow["coupling.0.weight"].shape[1] - obs.shape[1]
    action = 2 * torch.rand(len(obs) * count, d) - 1
    q = action_values(flow, obs.repeat_interleave(count, 0), action.to(obs), None, args)[:, 0]
    mean = torch.logsumexp(q.view(len(obs), count) / args.alpha, 1) - math.log(count)  # log of the mean of exp(Q/alpha)
    return args.alpha * (mean + d * math.log(2))  # the box has a volume of 2^d


def draw_landscape(flow: dict, folder: Path, args: Args) -> torch.Tensor:
    """MultiGoal: the picture of V, paths to the goals, and errors of `sampled_value`, into the run folder. Returns how
    many of 40 paths ended at each goal, (4,)."""
    flow = {name: p.cpu() for name, p in flow.items()}
    return multigoal.draw(
        value=lambda obs: state_values(flow, obs, args)[:, 0],
        sample=lambda obs: decide(flow, obs, torch.randn(len(obs), 2), args).action,
        estimate=lambda obs, count: sampled_value(flow, obs, count, args),
        path=folder / "video" / "landscape.png", seed=10_000 * args.seed + 9_000)


def draw_kept(args: Args) -> torch.Tensor:
    """Dropout of one update: which hidden units of the couplings are kept, (couplings, depth, B, width) bool. A number
    of 64 bits serves four units: drawing one per unit would take a fifth of the time of an update."""
    width, *others = runtime.hidden_layers(args.hidden)
    rows = args.batch_size * (2 if args.double_pass else 1)
    shape = (args.couplings, 1 + len(others), rows, width)
    drawn = torch.empty(math.ceil(math.prod(shape) / 4), dtype=torch.int64).random_(-2 ** 63, None).view(torch.int16)
    return (drawn >= round(args.dropout * 2 ** 16) - 2 ** 15)[:math.prod(shape)].view(shape)


def critic_loss(flow: dict, batch: Batch, target_q: torch.Tensor, kept: torch.Tensor, args: Args):
    """(4), target_q (B, 1); and Q_i, (B, 2)."""
    obs, action, keep = batch.obs, batch.action, kept / (1 - args.dropout)
    if args.double_pass:
        q = action_values(flow, obs.repeat(2, 1), action.repeat(2, 1), keep, args)  # (2B, 2)
        q = torch.stack([q[:len(obs), 0], q[len(obs):, -1]], 1)  # (B, 2): the first pass for Q_1, the second for Q_2
    else:
        q = action_values(flow, obs, action, keep, args)
    return (q - target_q).square().mean(), q


def make_agent(args: Args, f: int, d: int, device: torch.device) -> dict:
    """Fresh parameters and optimiser state."""
    hidden = runtime.hidden_layers(args.hidden)
    flow = init_net("scale", [f, *hidden, d], 1, zero=True)
    flow |= init_net("coupling", [d + f, *hidden, d], args.couplings, zero=False)
    if args.lrs:
        flow |= init_net("shift", [f, *runtime.hidden_layers(args.shift_hidden), 1], 2 if args.scdq else 1, zero=True)
    agent = {"flow": flow, "target": {name: p.clone() for name, p in flow.items()}, "moments": adam_state(flow),
             "count": torch.zeros(())}
    return tree_map(lambda x: x.to(device), agent)


def update(agent: dict, batch: Batch, kept: torch.Tensor, args: Args) -> dict:
    """One step of the flow and of its target. Changes `agent` in place, returns what is logged."""
    flow, target, moments, count = (agent[name] for name in ("flow", "target", "moments", "count"))
    count += 1
    next_value = state_values(target, batch.next_obs, args).amin(1, keepdim=True)  # (B, 1), no dropout
    target_q = batch.reward + args.gamma * (1 - batch.terminated) * next_value  # a time limit bootstraps
    grads, (loss, q) = torch.func.grad_and_value(critic_loss, has_aux=True)(flow, batch, target_q, kept, args)
    # Clip: actions near +-1 are far out in z, and the loss of one can be larger than that of all others together.
    norm = torch.stack([g.square().sum() for g in grads.values()]).sum().sqrt()
    scale = (args.grad_clip / (norm + 1e-6)).clamp(max=1)
    adam(flow, {name: g * scale for name, g in grads.items()}, moments, count, args.learning_rate)
    torch._foreach_lerp_(list(target.values()), list(flow.values()), args.tau)
    return {"critic_loss": loss, "q": q.mean(), "target_q": target_q.mean(), "grad_norm": norm}


@torch.no_grad()  # gradients are taken by torch.func, inside `update`
def main(args: Args) -> dict[str, float]:
    """Train, resume or evaluate, as `args` say; returns the last evaluation (keys: runtime.EVALUATION)."""
    args, saved = runtime.checked(args, ALGO, RANGES, anew=["sample"])
    args = with_preset(args)
    device = runtime.pick_device(args.device)  # fast_matmul is slower here: it costs too much for networks of 64
    vec = envs.make_vec(args.env, args.num_envs, threads=torch.get_num_threads())
    f, d, _ = envs.continuous_sizes(vec)  # sizes of features and action
    obs = vec.reset(10_000 * args.seed)  # environment i has stream 10,000 * seed + i; seeds share none
    example = envs.example_of(vec, obs)
    agent = make_agent(args, f, d, device)
    capacity = min(args.buffer_size, args.total_timesteps + args.num_envs)  # the last step may go beyond the total
    buffer = ReplayBuffer(capacity, 1, args.num_envs, f, d)
    loop = {"obs": envs.flatten(obs), "updates_owed": 0.0}
    scalars = runtime.Means()  # since the last log
    parts = {"agent": agent, "vec": vec, "buffer": buffer, "loop": loop, "scalars": scalars}
    runtime.restore(parts, saved, only=["agent"] if args.evaluate else None)
    evaluator = envs.Evaluator(args)

    def choose(obs: torch.Tensor, noise: torch.Tensor) -> Decision:
        inputs = tree_map(lambda x: x.to(device), (obs, noise))
        return tree_map(lambda x: x.cpu(), decide(agent["flow"], *inputs, args))

    def policy(obs: torch.Tensor | dict[str, torch.Tensor]) -> torch.Tensor:
        """The flow's image of 0 (B, d). The run exports this as policy.pt2."""
        return choose(envs.flatten(obs), torch.zeros(d)).action

    def act(obs: envs.Observation) -> np.ndarray:
        """The actions of evaluations."""
        if not args.sample:
            return vec.to_box(policy(obs).numpy())
        features = envs.flatten(obs)
        noise = torch.randn(len(features), d, generator=evaluator.generator)
        return vec.to_box(choose(features, noise).action.numpy())

    if args.evaluate:
        return evaluator.report(act, saved["step"])

    # train
    run = runtime.Run(ALGO, args, envs.resolve(args.env), saved, parts)
    learn = runtime.compiled(update, args.compile, device)
    if not saved:
        run.log_evaluation(evaluator.play(act))  # the untrained agent
    while run.advance(args.num_envs):
        learning, obs = run.step > args.learning_starts, loop["obs"]
        action = 2 * torch.rand(args.num_envs, d) - 1
        if learning:
            action = choose(obs, torch.randn(args.num_envs, d)).action
        next_obs, reward, terminated, truncated, info = vec.step(vec.to_box(action.numpy()))

        # store: where an episode ended, final_obs is its last observation, and next_obs the first of the next episode
        buffer.add(obs, action, reward, terminated, truncated, envs.flatten(info["final_obs"]))
        loop["obs"] = envs.flatten(next_obs)

        # update
        if learning:
            loop["updates_owed"] += args.num_envs * args.updates_per_step
        while loop["updates_owed"] >= 1:
            loop["updates_owed"] -= 1
            inputs = (buffer.sample(args.batch_size), draw_kept(args))
            scalars.add(learn(agent, *tree_map(lambda x: x.to(device), inputs), args))

        # log, evaluate, save
        if run.due(LOG_EVERY):
            run.log(scalars.take())
        if run.due(args.eval_every) or run.over:
            run.log_evaluation(evaluator.play(act, twice=run.over))
        run.save_if_due()
    if run.over and vec.env.spec.id == multigoal.ID:
        run.log({"reached": draw_landscape(agent["flow"], run.folder, args)}, multigoal.NAMES)
    run.finish(example, policy=policy)
    evaluator.film(act, run.folder)
    return run.result


if __name__ == "__main__":
    with runtime.exit_codes(ALGO):
        main(runtime.cli(Args, ALGO))
