"""PPO for continuous actions: a Gaussian policy, with running statistics of observations and of returns.

Schulman et al., "Proximal Policy Optimization Algorithms" (arXiv 1707.06347), with the settings of its MuJoCo tasks.
The policy is N(mean(s), std) with one std for all states. The environment gets actions clipped to its bounds, but
log-probabilities are those of the drawn, unclipped actions. Mean and value are two networks without a common layer.

Departures: observations are normalised by running mean and deviation. Rewards are divided by the running deviation of
the discounted return, so that values are near 1. Evaluations play the mean. Everything else is PPO's:
`diff algos/ppo.py algos/ppo_continuous.py`.

python algos/ppo_continuous.py --env HalfCheetah-v4
python algos/ppo_continuous.py --env Pendulum-v1 --num-envs 4 --num-steps 1024 --gamma 0.9 --learning-rate 1e-3 \
    --total-timesteps 100000 --eval-every 10000
"""
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import start  # noqa: F401  before numpy

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_map

import envs
import runtime

ALGO = Path(__file__).stem  # names run folders and result tables
LOG_EVERY = 10_000  # environment steps
WIDTH = 64  # of all hidden layers


@dataclass
class Args:
    """PPO for continuous actions."""
    # twin: run arguments
    env: str = "HalfCheetah-v4"  # environment id; an old Fetch id is replaced by the installed version
    seed: int = 1  # seed of all random numbers: networks, environments, exploration
    total_timesteps: int = 1_000_000  # environment steps, summed over environments; with --resume: a new total
    num_envs: int = 1  # environments stepped together
    eval_every: int = 50_000  # environment steps between evaluations; 0: only at start and end
    eval_episodes: int = 20  # episodes per evaluation
    checkpoint_every: int = 100_000  # environment steps between checkpoints; 0: only at the end
    video: int = 0  # episodes to film after training, or with --evaluate
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where the networks run; auto: on a GPU if there is one
    compile: bool = False  # compile the loss: about 30 s at the first start
    run_dir: str = ""  # run folder; empty: runs/<algo>/<env>/seed<k>-<time>
    resume: str = ""  # run folder to continue exactly, with its own arguments
    evaluate: str = ""  # run folder to evaluate; no training
    track: bool = False  # also log scalars to Weights & Biases (pip install wandb)
    # twin end

    # algorithm
    num_steps: int = 2048  # steps of every environment per iteration
    epochs: int = 10  # passes over an iteration's transitions
    batch_size: int = 64  # transitions per update
    learning_rate: float = 3e-4  # Adam, constant
    gamma: float = 0.99  # discount per step
    gae_lambda: float = 0.95  # lambda of the advantage estimate (GAE)
    clip: float = 0.2  # range of the probability ratio, and of the change of values
    clip_values: bool = False  # also clip the change of values: right for returns near 1, slow for larger ones
    normalize_advantage: bool = True  # shift and scale the advantages of a batch to mean 0 and deviation 1
    entropy_coef: float = 0.0  # weight of the entropy bonus
    value_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # the gradient of all parameters is clipped to this norm
    bootstrap: bool = True  # at a time limit, add the value of the last state to the return
    normalize: bool = True  # observations normalised by running mean and deviation, clipped to +-5
    scale_reward: bool = True  # rewards divided by the running deviation of the discounted return, clipped to +-10
    eval_select: Literal["sample", "mean"] = "mean"  # evaluations draw actions, or take the mean


# RANGES: limits of numbers; all others must be above 0. TUNE: for `make tune`, (low, high) on a log scale, or choices
RANGES = {"gamma": (0, 1), "gae_lambda": (0, 1), "entropy_coef": (0, math.inf), "value_coef": (0, math.inf)}
TUNE = {"learning_rate": (3e-5, 3e-3), "entropy_coef": (1e-5, 1e-2), "num_steps": [256, 512, 1024, 2048],
        "epochs": [5, 10, 20], "batch_size": [32, 64, 128, 256], "gae_lambda": [0.9, 0.95, 0.98]}


def linear(fan_in: int, fan_out: int, gain: float = math.sqrt(2)) -> nn.Linear:
    """A layer that starts with orthogonal weights and biases 0."""
    layer = nn.Linear(fan_in, fan_out)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


Seen = torch.Tensor  # what the agent sees: features (B, f)


# twin: Gaussian policy
class Gaussian(NamedTuple):
    """A policy's distributions over continuous actions (B, d). The environment gets actions clipped to [-1, 1]."""
    mean: torch.Tensor  # (B, d)
    log_std: torch.Tensor  # (B, d)

    def draw(self, generator: torch.Generator | None = None) -> torch.Tensor:
        return self.mean + self.log_std.exp() * torch.randn(self.mean.shape, generator=generator).to(self.mean.device)

    def log_prob(self, action: torch.Tensor) -> torch.Tensor:
        squares = ((action - self.mean) / self.log_std.exp()).square()
        return -(0.5 * squares + self.log_std + 0.5 * math.log(2 * math.pi)).sum(1)

    def entropy(self) -> torch.Tensor:
        return (self.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(1)
# twin end


class Output(NamedTuple):
    policy: Gaussian
    value: torch.Tensor  # (B,), of the state


class Agent(nn.Module):
    """Actor and critic without a common layer."""

    def __init__(self, f: int, d: int):
        super().__init__()

        def network(outputs: int, gain: float) -> nn.Sequential:
            return nn.Sequential(linear(f, WIDTH), nn.Tanh(), linear(WIDTH, WIDTH), nn.Tanh(),
                                 linear(WIDTH, outputs, gain))
        self.critic = network(1, 1.0)
        self.actor = network(d, 0.01)  # means near 0 at first
        self.log_std = nn.Parameter(torch.zeros(d))  # the same in all states

    def forward(self, obs: Seen) -> Output:
        mean = self.actor(obs)  # (B, d)
        return Output(Gaussian(mean, self.log_std.expand_as(mean)), self.critic(obs).squeeze(1))


class Batch(NamedTuple):
    """Transitions of a rollout."""
    obs: Seen
    action: torch.Tensor  # (B, d), before it is clipped
    log_prob: torch.Tensor  # (B,), of the action, by the policy that took it
    value: torch.Tensor  # (B,), of the observation, by the critic during the rollout
    advantage: torch.Tensor  # (B,)
    target_value: torch.Tensor  # (B,), target of the critic


def gae(reward: torch.Tensor, value: torch.Tensor, last_value: torch.Tensor, ended: torch.Tensor, gamma: float,
        gae_lambda: float) -> torch.Tensor:
    """Generalised advantage estimates (T, N) from reward, value and ended (T, N) and the value (N,) of the state after
    the last step. Nothing flows back over the end of an episode."""
    next_value, advantage, running = last_value, torch.zeros_like(reward), torch.zeros_like(last_value)
    for t in reversed(range(len(reward))):
        goes_on = 1.0 - ended[t]
        delta = reward[t] + gamma * next_value * goes_on - value[t]
        advantage[t] = running = delta + gamma * gae_lambda * goes_on * running
        next_value = value[t]
    return advantage


def scaled(reward: torch.Tensor, ended: torch.Tensor, running_return: torch.Tensor, returns: envs.Normalizer,
           gamma: float) -> torch.Tensor:
    """Rewards (N,) divided by the deviation of all discounted returns so far, and clipped to +-10. `running_return`
    (N,) and the statistics `returns` take the rewards in. No mean is taken away: that would be another task."""
    running_return.mul_(gamma).add_(reward)
    returns.add(running_return.unsqueeze(1))
    running_return[ended] = 0.0
    _, deviation = returns.stats()
    return (reward / deviation).clamp(-10, 10)


@torch.no_grad()
def collect(agent: Agent, vec: envs.VectorEnv, look: Callable, returns: envs.Normalizer, loop: dict,
            scalars: runtime.Means, args: Args) -> Batch:
    """Play `num_steps` steps in every environment -> their transitions (T N, ...). `look` makes the agent's inputs
    from observations, `returns` has the statistics that scale rewards, `loop` has the present observations, `scalars`
    gets the returns of finished episodes."""
    device = next(agent.parameters()).device
    seen, steps = look(loop["obs"]), []
    for _ in range(args.num_steps):
        output = agent(seen)
        action = output.policy.draw()
        log_prob = output.policy.log_prob(action)
        obs, reward, terminated, truncated, info = vec.step(envs.to_env(vec, action))
        reward, ended = torch.from_numpy(reward).float(), torch.from_numpy(terminated | truncated)
        loop["open_return"] += reward
        for finished in loop["open_return"][ended]:
            scalars.add({"return": finished})
        loop["open_return"][ended] = 0.0
        if args.scale_reward:
            reward = scaled(reward, ended, loop["discounted_return"], returns, args.gamma)
        cut = torch.from_numpy(truncated & ~terminated)
        if args.bootstrap and cut.any():  # obs already belongs to the next episode, final_obs to this one
            final_value = agent(look(envs.to_tensors(info["final_obs"]))).value.cpu()
            reward[cut] += args.gamma * final_value[cut]
        steps.append((seen, action, log_prob, output.value, reward.to(device), ended.float().to(device)))
        loop["obs"] = envs.to_tensors(obs)
        seen = look(loop["obs"], count=True)
    obs, action, log_prob, value, reward, ended = tree_map(lambda *columns: torch.stack(columns), *steps)  # (T, N, ...)
    advantage = gae(reward, value, agent(seen).value, ended, args.gamma, args.gae_lambda)
    return tree_map(lambda x: x.flatten(0, 1), Batch(obs, action, log_prob, value, advantage, advantage + value))


def ppo_loss(agent: Agent, batch: Batch, args: Args) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss of a batch (Eq. 9), and scalars for the log."""
    output = agent(batch.obs)
    policy, value = output.policy, output.value
    log_ratio = policy.log_prob(batch.action) - batch.log_prob
    ratio, advantage = log_ratio.exp(), batch.advantage
    if args.normalize_advantage:
        advantage = (advantage - advantage.mean()) / (advantage.std(correction=0) + 1e-8)
    policy_loss = -torch.min(ratio * advantage, ratio.clamp(1 - args.clip, 1 + args.clip) * advantage).mean()  # Eq. 7
    value_error = (value - batch.target_value).square()
    if args.clip_values:  # the larger of both errors: a value gains nothing by changing more than `clip`
        clipped_value = batch.value + (value - batch.value).clamp(-args.clip, args.clip)
        value_error = value_error.max((clipped_value - batch.target_value).square())
    value_loss = value_error.mean()
    entropy = policy.entropy().mean()
    loss = policy_loss - args.entropy_coef * entropy + args.value_coef * value_loss
    scalars = {"policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy, "value": value.mean(),
               "clip_fraction": ((ratio - 1).abs() > args.clip).float().mean(),
               "approx_kl": (ratio - 1 - log_ratio).mean()}
    return loss, scalars


def update(agent: Agent, optimizer: torch.optim.Optimizer, loss_of: Callable, batch: Batch, args: Args) -> dict:
    """One step of the optimiser on a batch; returns what is logged."""
    loss, scalars = loss_of(agent, batch, args)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm, foreach=True)
    optimizer.step()
    return {name: x.detach() for name, x in scalars.items()}


def main(args: Args) -> dict[str, float]:
    """Train, resume or evaluate, as `args` say; returns the last evaluation (keys: runtime.EVALUATION)."""
    args, saved = runtime.checked(args, ALGO, RANGES, anew=["eval_select"])
    device = runtime.pick_device(args.device)

    vec = envs.make_vec(args.env, args.num_envs)
    f, d, _ = envs.continuous_sizes(vec)  # sizes of features and action
    obs = vec.reset(10_000 * args.seed)  # environment i has stream 10,000 * seed + i; seeds share none
    example = envs.example_of(vec, obs)
    agent = Agent(f, d).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
    normalizer, returns = envs.Normalizer(f, args.normalize), envs.Normalizer(1)  # of observations, of returns
    loop = {"obs": envs.to_tensors(obs), "open_return": torch.zeros(args.num_envs, dtype=torch.float64),
            "discounted_return": torch.zeros(args.num_envs)}
    scalars = runtime.Means()  # of updates and finished episodes since the last log
    parts = {"agent": agent, "optimizer": optimizer, "normalizer": normalizer, "returns": returns, "vec": vec,
             "loop": loop, "scalars": scalars}
    runtime.restore(parts, saved, only=["agent", "normalizer"] if args.evaluate else None)
    evaluator = envs.Evaluator(args)

    def look(obs: torch.Tensor | dict[str, torch.Tensor], count: bool = False) -> Seen:
        """Observations -> inputs of the agent. With `count` they update the running statistics first."""
        features = envs.flatten(obs)
        if count:
            normalizer.add(features)
        return normalizer(features).to(device)

    def policy(obs: torch.Tensor | dict[str, torch.Tensor]) -> torch.Tensor:
        """The mean action (B, d) in [-1, 1]. The run exports this as policy.pt2."""
        return agent(look(obs)).policy.mean.clamp(-1, 1).cpu()

    @torch.no_grad()
    def act(obs: envs.Observation) -> np.ndarray:
        """The actions of evaluations."""
        found = agent(look(obs)).policy
        mean = evaluator.noted(found.mean, found.log_std.exp())
        return envs.to_env(vec, mean if args.eval_select == "mean" else found.draw(evaluator.generator))

    if args.evaluate:
        return evaluator.report(act, saved["step"])

    # train
    run = runtime.Run(ALGO, args, envs.resolve(args.env), saved, parts)
    loss_of = runtime.compiled(ppo_loss, args.compile, device)
    if not saved:
        run.log_evaluation(evaluator.play(act))  # the untrained agent
    while run.advance(args.num_steps * args.num_envs):
        rollout = collect(agent, vec, look, returns, loop, scalars, args)
        for _ in range(args.epochs):
            for index in torch.randperm(len(rollout.action)).to(device).split(args.batch_size):
                batch = tree_map(lambda x: x[index], rollout)
                scalars.add(update(agent, optimizer, loss_of, batch, args))

        # log, evaluate, save
        if run.due(LOG_EVERY):
            run.log(scalars.take())
        if run.due(args.eval_every) or run.over:
            run.log_evaluation(evaluator.play(act))
        run.save_if_due()
    run.finish(example, policy=policy)
    evaluator.film(act, run.folder)
    return run.result


if __name__ == "__main__":
    with runtime.exit_codes(ALGO):
        main(runtime.cli(Args, ALGO))
