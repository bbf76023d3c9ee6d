"""Stream Q(lambda) and Stream SARSA(lambda): action values from a stream. One transition, one update, nothing stored.

Elsayed, Vasan, Mahmood, "Streaming Deep Reinforcement Learning Finally Works" (arXiv 2410.14606). Traces, bounded steps
and the other ingredients are those of the parent: `diff algos/stream_ac.py algos/stream_q.py` shows the idea.

    Q(lambda):      delta = r + gamma max_b Q(s', b) - Q(s, a)
    SARSA(lambda):  delta = r + gamma Q(s', a') - Q(s, a),   a' the action that is done next (--sarsa)

Q(lambda) cuts its traces at the end of an episode, and after an action that was not greedy. The cut comes after the
update of that action, so this update still credits the steps before. SARSA cuts them at the ends of episodes alone.

Time-outs count as ends. So on classic control training has the published limit of 10,000 steps: with CartPole's own
limit of 500, a good agent would learn in every episode that the pole fell. Evaluations stop at 500.

python algos/stream_q.py --env CartPole-v1   # ten seeds: pole balanced for 10,000 steps, now and then lost again
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
    env: str = "CartPole-v1"  # environment id: Gymnasium, MinAtar/..., ...NoFrameskip-v4; discrete actions
    seed: int = 1  # seed of all random numbers: networks, environments, exploration
    total_timesteps: int = 500_000  # environment steps; with --resume: a new total
    num_envs: int = 1  # a stream comes from one environment: no other number works
    eval_every: int = 25_000  # environment steps between evaluations; 0: only at start and end
    eval_episodes: int = 10  # episodes per evaluation; the last evaluation plays twice as many
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
    sarsa: bool = False  # learn from the value of the next action, not of the greedy one
    exploration_fraction: float = 0.05  # share of the steps over which epsilon falls (paper: 0.2 for Q on MinAtar)
    epsilon_end: float = 0.01  # share of uniform actions from then on
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
          "epsilon_end": (0, 1)}
TUNE = {"lamda": [0.0, 0.5, 0.8, 0.9, 0.95], "kappa_value": (1.0, 10.0), "exploration_fraction": (0.02, 0.5),
        "gamma": [0.97, 0.99, 0.995]}
SCALARS = ("abs_delta", "value", "step_value", "capped_value", "trace_value", "exploratory",
           "reward_scale")  # logged, means


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


def epsilon(decision: int, exploration_steps: float, args: Args) -> float:
    """Share of uniform actions at a decision, 1, 2, ..., one per step."""
    return max(1 + (args.epsilon_end - 1) * (decision / exploration_steps), args.epsilon_end)


def greedy(q: torch.Tensor) -> torch.Tensor:
    """One-hot of the best action (A,)."""
    return F.one_hot(q.argmax(), len(q)).float()


def update(agent: dict, nets: dict[str, Net], state: torch.Tensor, action: torch.Tensor, next_state: torch.Tensor,
           next_action: torch.Tensor | None, reward: torch.Tensor, discount: torch.Tensor, ended: torch.Tensor,
           args: Args) -> tuple[torch.Tensor, ...]:
    """One transition, one step, in place; returns what is logged. Reward, discount of the next value and ended: (1,).
    next_action: one-hot (A,), or None for the best."""
    weights, norm = agent["value"]["weights"], args.layer_norm
    (q,), cache = forward(weights, nets["value"], state, norm)
    (next_q,), _ = forward(weights, nets["value"], next_state, norm)
    next_value = next_q.amax(0, keepdim=True) if next_action is None else (next_q * next_action).sum(0, keepdim=True)
    value = (q * action).sum(0, keepdim=True)
    delta = reward + discount * next_value - value  # (1,)
    exploratory = 1 - (action * greedy(q)).sum(0, keepdim=True)  # a uniform action may be the greedy one
    cut = ended if args.sarsa else torch.maximum(ended, exploratory)
    grad = backward(weights, nets["value"], cache, [-action], norm)  # of -q(s, a)
    return delta, value, exploratory, *obgd(agent["value"], grad, delta, cut, args.kappa_value, args)


def choose(agent: dict, nets: dict[str, Net], state: torch.Tensor, noise: torch.Tensor, args: Args) -> torch.Tensor:
    """An action, one-hot (A,): `noise`, or where that is all zeros, the greedy one."""
    (q,), _ = forward(agent["value"]["weights"], nets["value"], state, args.layer_norm)
    return torch.where(noise.sum() > 0, noise, greedy(q))


def step(agent: dict, nets: dict[str, Net], state: torch.Tensor, action: torch.Tensor, row: torch.Tensor,
         noise: torch.Tensor, frames: int, args: Args) -> tuple[torch.Tensor, ...]:
    """Everything between two environment steps. `row` is what the environment returned, float64: observation, reward,
    whether the episode ended, discount of the next value. Learns from it, chooses the next action; returns next state,
    next action, scaled reward, delta."""
    obs, reward, ended, discount = row[:-3], row[-3:-2], row[-2:-1], row[-1:]
    next_state = observe(agent["obs"], obs, state, frames, args.normalize_obs)
    reward = scale_reward(agent["reward"], reward, ended, args.gamma, args.scale_reward)
    next_action = choose(agent, nets, next_state, noise, args) if args.sarsa else None  # SARSA's update needs it
    delta, value, exploratory, step_value, trace_value = update(
        agent, nets, state, action, next_state, next_action, reward, discount.float(), ended.float(), args)
    if not args.sarsa:
        next_action = choose(agent, nets, next_state, noise, args)
    agent["totals"].add_(torch.cat([x.float().view(1) for x in (
        delta.abs(), value, step_value, step_value < args.learning_rate, trace_value, exploratory,
        deviation(agent["reward"]))]))
    return next_state, next_action, reward, delta


def td_error(agent: dict, nets: dict[str, Net], state: torch.Tensor, action: torch.Tensor, next_state: torch.Tensor,
             next_action: torch.Tensor, reward: torch.Tensor, discount: float, args: Args) -> float:
    """delta of a transition under the present weights; next_action is used by SARSA alone."""
    (q,), (next_q,) = (forward(agent["value"]["weights"], nets["value"], s, args.layer_norm)[0]
                       for s in (state, next_state))
    next_value = (next_q * next_action).sum() if args.sarsa else next_q.max()
    return (reward + discount * next_value - (q * action).sum()).item()


def make_agent(args: Args, env: envs.StreamEnv) -> tuple[dict, dict[str, Net]]:
    """Fresh networks, traces and statistics, and the shapes of the networks. Raises UserError for other actions."""
    inputs = (env.size,) if env.kind == "vector" else (env.shape[0] * env.frames, *env.shape[1:])
    if not isinstance(env.action_space, gym.spaces.Discrete):
        raise UserError(f"{args.env} has {env.action_space} actions; {ALGO} needs Discrete ones; Box: stream_ac.py")
    default = {"vector": "32x2", "minatar": "128x1", "atari": "256x1"}[env.kind]
    nets = {"value": make_net(env.kind, inputs, runtime.hidden_layers(args.hidden or default),
                              [int(env.action_space.n)])}
    learners = {name: make_learner(net, args) for name, net in nets.items()}
    return learners | {"obs": running_stats(*env.shape), "reward": reward_stats(),
                       "totals": torch.zeros(len(SCALARS))}, nets


def policy(agent: dict, nets: dict[str, Net], obs: torch.Tensor, env: envs.StreamEnv, args: Args) -> torch.Tensor:
    """The run exports this as policy.pt2: observations (B, n), the time last -> log-probabilities (B, A): greedy, but
    for a share `epsilon_end` of uniform actions. Raises ValueError where there is no such function."""
    (q,) = forward_batch(agent["value"]["weights"], nets["value"], agent["obs"], obs, env.frames, args.normalize_obs,
                         args.layer_norm)
    best = F.one_hot(q.argmax(1), q.shape[1]).float()  # (B, A)
    return ((1 - args.epsilon_end) * best + args.epsilon_end / q.shape[1]).log()


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
    d = int(env.action_space.n)
    # exploration is planned once: a run that is given more steps goes on with epsilon_end
    loop = {"overshoots": 0, "decision": 1, "exploration_steps": args.exploration_fraction * args.total_timesteps}

    def draw_noise() -> torch.Tensor:
        """With probability epsilon a uniform action, one-hot; else zeros."""
        (explore, which), noise = torch.rand(2).tolist(), torch.zeros(d)
        if explore < epsilon(loop["decision"], loop["exploration_steps"], args):
            noise[int(which * d)] = 1.0
        return noise

    def look(obs: np.ndarray, last: torch.Tensor | None, learn: bool) -> torch.Tensor:
        return observe(agent["obs"], torch.from_numpy(obs), last, env.frames, args.normalize_obs, learn)

    def begin(seed: int | None = None) -> None:
        """Start an episode: its first state and action."""
        loop.update({"state": look(env.reset(seed), None, learn=True), "return": 0.0, "length": 0})
        if not args.sarsa or "action" not in loop:  # as published, SARSA begins with the action that it chose last
            loop["action"] = choose(agent, nets, loop["state"], draw_noise(), args)

    def to_env(action: torch.Tensor) -> np.ndarray | int:
        return int(action.argmax())

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
        loop["decision"] += 1
        loop["state"], loop["action"], scaled, delta = learn(
            agent, nets, state, action, row, draw_noise(), env.frames, args)
        if run.due(CHECK_EVERY):
            after = td_error(agent, nets, state, action, loop["state"], loop["action"], scaled, raw[-1], args)
            loop["overshoots"] += after * delta.item() < 0
        if over:
            run.log({"return": loop["return"], "length": loop["length"]})
            begin()

        # log, evaluate, save
        if run.due(LOG_EVERY):
            means = dict(zip(SCALARS, (agent["totals"] / LOG_EVERY).tolist()))
            run.log(means | {"overshoot": loop["overshoots"] * CHECK_EVERY / LOG_EVERY,
                             "epsilon": epsilon(run.step, loop["exploration_steps"], args)})
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
