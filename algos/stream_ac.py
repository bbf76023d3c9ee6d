"""Stream AC(lambda): actor-critic from a stream. One transition, one update, nothing stored.

Elsayed, Vasan, Mahmood, "Streaming Deep Reinforcement Learning Finally Works" (arXiv 2410.14606). No replay buffer, no
batch, no target network. Policy and value each have weights w and a trace z, and share delta:

    delta = r + gamma V(s') - V(s)
    z <- gamma lambda z + grad,   grad of -V(s), or of -log pi(a|s) - tau sign(delta) entropy
    w <- w - step delta z,        step = min(alpha, 1 / (kappa max(|delta|, 1) |z|_1))

Five ingredients make it stable with one set of constants: these eligibility traces, this bound on the step, by which an
update hardly overshoots its target (ObGD), sparse initialisation, LayerNorm without parameters, and observations and
rewards scaled by running statistics.

Policies are Gaussian (MuJoCo, dm_control) or discrete (classic control, MinAtar, Atari). streamnet.py has the running
statistics and the networks, each one flat vector with its gradient in closed form. So all that happens between two
environment steps is one compiled graph. docs/stream.md lists the departures.

python algos/stream_ac.py --env HalfCheetah-v4   # return 1472 after 300,000 steps, 2711 after a million (ten seeds)
"""
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import start  # noqa: F401  before numpy

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F

import envs
import runtime
from errors import UserError
from streamnet import (COMPILED, Net, backward, deviation, forward, forward_batch, make_net, observe, reward_stats,
                       running_stats, scale_reward, sparse_init)

ALGO = Path(__file__).stem  # names run folders and result tables
LOG_EVERY = 10_000  # environment steps
CHECK_EVERY = 100  # steps between checks whether an update overshot its target


@dataclass
class Args:
    """Learn from every transition once, as it comes."""
    # twin: run arguments
    env: str = "HalfCheetah-v4"  # environment id: Gymnasium, MinAtar/..., dm_control/..., ...NoFrameskip-v4
    seed: int = 1  # seed of all random numbers: networks, environments, exploration
    total_timesteps: int = 1_000_000  # environment steps; with --resume: a new total
    num_envs: int = 1  # a stream comes from one environment: no other number works
    eval_every: int = 50_000  # environment steps between evaluations; 0: only at start and end
    eval_episodes: int = 5  # episodes per evaluation; the last evaluation plays twice as many
    checkpoint_every: int = 100_000  # environment steps between checkpoints; 0: only at the end
    video: int = 0  # episodes to film after training, or with --evaluate
    device: Literal["auto", "cpu"] = "auto"  # always the CPU, which is faster for one transition at a time
    compile: bool = True  # compile all that happens between two steps into one graph: about 10 s at the start
    run_dir: str = ""  # run folder; empty: runs/<algo>/<env>/seed<k>-<time>
    resume: str = ""  # run folder to continue exactly, with its own arguments
    evaluate: str = ""  # run folder to evaluate; no training
    track: bool = False  # also log scalars to Weights & Biases (pip install wandb)
    # twin end

    # algorithm
    hidden: str = ""  # hidden layers, width x depth; empty: the paper's, listed in docs/stream.md
    bootstrap_on_truncation: Literal["auto", "on", "off"] = "auto"  # auto: on Atari only, as in the paper
    max_episode_steps: int = 0  # in training (Atari: frames); 0: the task's; CartPole, Acrobot, MountainCar: 10,000
    time_feature: bool = True  # time since reset as an input, on vector observations
    entropy_coef: float = 0.01  # tau, weight of the entropy
    kappa_policy: float = 3.0  # kappa of the policy, the margin of its step bound
    kappa_value: float = 2.0  # kappa of the value, the margin of its step bound
    # twin: stream arguments
    gamma: float = 0.99  # discount per step
    lamda: float = 0.8  # trace decay; 0: no traces
    learning_rate: float = 1.0  # alpha, the largest step size
    optimizer: Literal["obgd", "adaptive", "plain"] = "obgd"  # bounded step; also second moments; alpha (ablation)
    sparsity: float = 0.9  # share of incoming weights that start at zero; 0: dense (ablation)
    layer_norm: bool = True  # before every hidden activation
    normalize_obs: bool = True  # observations normalised by running mean and deviation
    scale_reward: bool = True  # rewards divided by the running deviation of the discounted return
    # twin end


# RANGES: limits of numbers; all others must be above 0. TUNE: for `make tune`, (low, high) on a log scale, or choices
RANGES = {"num_envs": (1, 1), "max_episode_steps": (0, math.inf), "gamma": (0, 1), "lamda": (0, 1), "sparsity": (0, 1),
          "entropy_coef": (0, math.inf)}
TUNE = {"lamda": [0.0, 0.5, 0.8, 0.9, 0.95], "kappa_policy": (1.0, 10.0), "kappa_value": (1.0, 10.0),
        "entropy_coef": (1e-3, 0.1), "gamma": [0.97, 0.99, 0.995]}
SCALARS = ("abs_delta", "value", "entropy", "std", "step_policy", "step_value", "capped_policy", "capped_value",
           "trace_policy", "trace_value", "reward_scale")  # logged, means


def make_learner(net: Net, args: Args) -> dict[str, torch.Tensor]:
    """What ObGD keeps of a network, flat (p,): weights, trace, and with --optimizer adaptive the second moments."""
    weights = sparse_init(net, args.sparsity)
    learner = {"weights": weights, "trace": torch.zeros_like(weights)}
    if args.optimizer == "adaptive":
        learner |= {"square": torch.zeros_like(weights), "count": torch.zeros(1)}
    return learner


def obgd(learner: dict[str, torch.Tensor], grad: torch.Tensor, delta: torch.Tensor, cut: torch.Tensor, kappa: float,
         args: Args) -> tuple[torch.Tensor, torch.Tensor]:
    """Overshooting-bounded descent on a flat network, in place; returns the step size and the L1 norm of the direction:
    of the trace; with --optimizer adaptive, of the trace divided by the root of its second moments.

    The trace takes in the gradient of the negated objective. The step is at most 1 / (kappa max(|delta|, 1) |z|_1): a
    prediction with gradient z, of entries of at most 1, then moves less than delta, to first order.
    """
    trace = args.gamma * args.lamda * learner["trace"] + grad
    direction = trace
    if args.optimizer == "adaptive":
        learner["count"].add_(1)
        learner["square"].copy_(0.999 * learner["square"] + 0.001 * (delta * trace).square())
        direction = trace / (learner["square"] / (1 - 0.999 ** learner["count"]) + 1e-8).sqrt()
    size = direction.abs().sum()
    step = torch.full_like(size, args.learning_rate)
    if args.optimizer != "plain":
        step = step / (step * kappa * delta.abs().clamp(min=1) * size).clamp(min=1)
    learner["weights"].sub_(step * delta * direction)
    learner["trace"].copy_(trace * (1 - cut))  # cut only after the update
    return step, size


def policy_gradient(outputs: list[torch.Tensor], action: torch.Tensor, sign: torch.Tensor, tau: float
                    ) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Gradients of -log pi(a) - tau sign(delta) H with respect to the policy's outputs; entropy; deviation. The step
    multiplies them by delta. With the sign, the entropy part always pushes towards more entropy. Gaussian: mean
    and q (d,), deviation softplus(q). Discrete: logits (A,), action one-hot."""
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


def update(agent: dict, nets: dict[str, Net], state: torch.Tensor, action: torch.Tensor, next_state: torch.Tensor,
           reward: torch.Tensor, discount: torch.Tensor, ended: torch.Tensor, args: Args) -> tuple[torch.Tensor, ...]:
    """One transition, one step of policy and value with the same delta, in place; returns what is logged. Reward,
    discount of the next value and ended: (1,)."""
    policy, value, norm = agent["policy"]["weights"], agent["value"]["weights"], args.layer_norm
    (v,), value_cache = forward(value, nets["value"], state, norm)
    (next_v,), _ = forward(value, nets["value"], next_state, norm)
    delta = reward + discount * next_v - v  # (1,)
    value_grad = backward(value, nets["value"], value_cache, [torch.full_like(v, -1.0)], norm)  # of -v
    outputs, cache = forward(policy, nets["policy"], state, norm)
    head_grads, entropy, std = policy_gradient(outputs, action, delta.sign(), args.entropy_coef)
    policy_grad = backward(policy, nets["policy"], cache, head_grads, norm)
    return (delta, v, entropy, std, *obgd(agent["policy"], policy_grad, delta, ended, args.kappa_policy, args),
            *obgd(agent["value"], value_grad, delta, ended, args.kappa_value, args))


def choose(agent: dict, nets: dict[str, Net], state: torch.Tensor, noise: torch.Tensor, args: Args) -> torch.Tensor:
    """An action: mean + std * noise (d,), not clipped; or one-hot by Gumbel noise (A,). Zero noise: the likeliest."""
    outputs, _ = forward(agent["policy"]["weights"], nets["policy"], state, args.layer_norm)
    if len(outputs) == 2:  # Gaussian
        return outputs[0] + F.softplus(outputs[1]) * noise
    return F.one_hot((outputs[0] + noise).argmax(), len(noise)).float()


def step(agent: dict, nets: dict[str, Net], state: torch.Tensor, action: torch.Tensor, row: torch.Tensor,
         noise: torch.Tensor, frames: int, args: Args) -> tuple[torch.Tensor, ...]:
    """Everything between two environment steps. `row` is what the environment returned, float64: observation, reward,
    whether the episode ended, discount of the next value. Learns from it, chooses the next action; returns next state,
    next action, scaled reward, delta."""
    obs, reward, ended, discount = row[:-3], row[-3:-2], row[-2:-1], row[-1:]
    next_state = observe(agent["obs"], obs, state, frames, args.normalize_obs)
    reward = scale_reward(agent["reward"], reward, ended, args.gamma, args.scale_reward)
    delta, v, entropy, std, step_policy, trace_policy, step_value, trace_value = update(
        agent, nets, state, action, next_state, reward, discount.float(), ended.float(), args)
    next_action = choose(agent, nets, next_state, noise, args)
    agent["totals"].add_(torch.cat([x.float().view(1) for x in (
        delta.abs(), v, entropy, std, step_policy, step_value, step_policy < args.learning_rate,
        step_value < args.learning_rate, trace_policy, trace_value, deviation(agent["reward"]))]))
    return next_state, next_action, reward, delta


def td_error(agent: dict, nets: dict[str, Net], state: torch.Tensor, next_state: torch.Tensor, reward: torch.Tensor,
             discount: float, args: Args) -> float:
    """delta of a transition under the present weights."""
    v, next_v = (forward(agent["value"]["weights"], nets["value"], s, args.layer_norm)[0][0]
                 for s in (state, next_state))
    return (reward + discount * next_v - v).item()


def make_agent(args: Args, env: envs.StreamEnv) -> tuple[dict, dict[str, Net]]:
    """Fresh networks, traces and statistics, and the shapes of the networks. Raises UserError for other actions."""
    inputs = (env.size,) if env.kind == "vector" else (env.shape[0] * env.frames, *env.shape[1:])
    space, discrete = env.action_space, isinstance(env.action_space, gym.spaces.Discrete)
    if not isinstance(space, (gym.spaces.Box, gym.spaces.Discrete)) or len(space.shape) > 1:
        raise UserError(f"{args.env} has {space} actions; {ALGO} needs Box or Discrete ones")
    if not discrete and (space.low.max() > 2 or space.high.min() < -2):  # 3 deviations, which are softplus(0) = 0.7
        print(f"{args.env} takes actions of {space}: the Gaussian starts at 0 with all it draws outside of them, and may "
              "never get there; gymnasium.wrappers.RescaleAction(env, -1, 1) helps", file=sys.stderr)
    heads = [int(space.n)] if discrete else [space.shape[0]] * 2
    default = {"vector": "32x2" if discrete else "128x2", "minatar": "128x1", "atari": "256x1"}[env.kind]
    hidden = runtime.hidden_layers(args.hidden or default)
    nets = {"policy": make_net(env.kind, inputs, hidden, heads), "value": make_net(env.kind, inputs, hidden, [1])}
    learners = {name: make_learner(net, args) for name, net in nets.items()}
    return learners | {"obs": running_stats(*env.shape), "reward": reward_stats(),
                       "totals": torch.zeros(len(SCALARS))}, nets


def policy(agent: dict, nets: dict[str, Net], obs: torch.Tensor, env: envs.StreamEnv, args: Args) -> torch.Tensor:
    """The run exports this as policy.pt2: observations (B, n), the time last -> means (B, d), clipped, in [-1, 1]; or
    log-probabilities (B, A). Raises ValueError where there is no such function."""
    outputs = forward_batch(agent["policy"]["weights"], nets["policy"], agent["obs"], obs, env.frames,
                            args.normalize_obs, args.layer_norm)
    if len(outputs) == 1:
        return torch.log_softmax(outputs[0], 1)
    if not env.action_space.is_bounded():
        raise ValueError(f"actions of {args.env} have no bounds")
    low, high = torch.from_numpy(env.action_space.low), torch.from_numpy(env.action_space.high)
    return (2 * outputs[0].clamp(low, high) - low - high) / (high - low)


@torch.no_grad()  # gradients have a closed form
def main(args: Args) -> dict[str, float]:
    """Train, resume or evaluate, as `args` say; returns the last evaluation (keys: runtime.EVALUATION)."""
    args, saved = runtime.checked(args, ALGO, RANGES)
    torch.set_num_threads(1)  # products of one vector: a second thread is only waited for

    # environment, agent
    settings = {"max_episode_steps": args.max_episode_steps, "time_feature": args.time_feature}
    env, evaluator = envs.StreamEnv(args.env, **settings), envs.StreamEvaluator(args, **settings)
    bootstrap = args.bootstrap_on_truncation == "on" or (args.bootstrap_on_truncation == "auto" and env.kind == "atari")
    agent, nets = make_agent(args, env)
    space, discrete = env.action_space, isinstance(env.action_space, gym.spaces.Discrete)
    d = int(space.n) if discrete else space.shape[0]
    loop = {"overshoots": 0}

    def draw_noise() -> torch.Tensor:
        if discrete:  # Gumbel
            return -(-torch.rand(d).clamp(1e-10, 1 - 1e-7).log()).log()
        return torch.randn(d)

    def look(obs: np.ndarray, last: torch.Tensor | None, learn: bool) -> torch.Tensor:
        return observe(agent["obs"], torch.from_numpy(obs), last, env.frames, args.normalize_obs, learn)

    def begin(seed: int | None = None) -> None:
        """Start an episode: its first state and action."""
        loop.update({"state": look(env.reset(seed), None, learn=True), "return": 0.0, "length": 0})
        loop["action"] = choose(agent, nets, loop["state"], draw_noise(), args)

    def to_env(action: torch.Tensor) -> np.ndarray | int:
        return int(action.argmax()) if discrete else np.clip(action.numpy(), space.low, space.high)

    def act(obs: np.ndarray, last: torch.Tensor | None) -> tuple[np.ndarray | int, torch.Tensor]:
        """The action without noise, and the state. Statistics stay as they are: evaluations do not change training."""
        state = look(obs, last, learn=False)
        return to_env(choose(agent, nets, state, torch.zeros(d), args)), state

    begin(10_000 * args.seed)
    parts = {"agent": agent, "env": env, "loop": loop}
    runtime.restore(parts, saved, only=["agent"] if args.evaluate else None)
    if args.evaluate:
        return evaluator.report(act, saved["step"])

    # train
    row = torch.zeros(env.size + 3, dtype=torch.float64)
    raw = row.numpy()  # the same memory: assigning to it costs less than making a tensor
    learn = step
    if args.compile and runtime.can_compile(torch.device("cpu")):
        learn = runtime.compile_for(step, COMPILED, agent, nets, loop["state"], loop["action"], row, torch.zeros(d),
                                    env.frames, args)
    run = runtime.Run(ALGO, args, envs.resolve(args.env), saved, parts)
    if not saved:
        run.log_evaluation(evaluator.play(act))  # the untrained agent
    while run.advance(1):
        state, action = loop["state"], loop["action"]
        obs, reward, terminated, truncated, over = env.step(to_env(action))
        discount = 0.0 if terminated or (truncated and not bootstrap) else args.gamma  # of the next value
        raw[:-3], raw[-3], raw[-2], raw[-1] = obs, reward, terminated or truncated, discount
        loop["return"] += reward
        loop["length"] += 1
        loop["state"], loop["action"], scaled, delta = learn(
            agent, nets, state, action, row, draw_noise(), env.frames, args)
        if run.due(CHECK_EVERY):
            after = td_error(agent, nets, state, loop["state"], scaled, raw[-1], args)
            loop["overshoots"] += after * delta.item() < 0
        if over:
            run.log({"return": loop["return"], "length": loop["length"]})
            begin()

        # log, evaluate, save
        if run.due(LOG_EVERY):
            means = dict(zip(SCALARS, (agent["totals"] / LOG_EVERY).tolist()))
            run.log(means | {"overshoot": loop["overshoots"] * CHECK_EVERY / LOG_EVERY})
            agent["totals"].zero_()
            loop["overshoots"] = 0
        if run.due(args.eval_every) or run.over:
            run.log_evaluation(evaluator.play(act, twice=run.over))
        run.save_if_due()
    run.finish(torch.zeros(2, env.size), policy=lambda obs: policy(agent, nets, obs, env, args))
    evaluator.film(act, run.folder)
    return run.result


if __name__ == "__main__":
    with runtime.exit_codes(ALGO):
        main(runtime.cli(Args, ALGO))
