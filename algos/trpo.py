"""TRPO: trust region policy optimisation, for discrete and continuous actions.

Schulman et al., "Trust Region Policy Optimization" (arXiv 1502.05477). Advantages are GAE's. Each step (appendix C):

    maximise J = mean(ratio * advantage) subject to mean KL(old policy || policy) <= target_kl                (Eq. 14)
    F x = g by conjugate gradients:  g the gradient of J, F the Hessian of the divergence, which is the Fisher matrix
    step = share sqrt(2 target_kl / x^T F x) x:  share 1, 0.8, 0.64, ... until J improves within the constraint

Then Adam fits the critic in `epochs` passes. A common layer or an entropy bonus would change the policy without regard
to the constraint, so there is neither. Everything else is PPO's: `diff algos/ppo.py algos/trpo.py`.

python algos/trpo.py --env CartPole-v1 --num-envs 8 --eval-select argmax --total-timesteps 100000
python algos/trpo.py --env Pendulum-v1 --num-envs 8 --num-steps 256 --gamma 0.9 --normalize --eval-select argmax
"""
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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

ALGO = Path(__file__).stem  # names run folders and result tables
LOG_EVERY = 10_000  # environment steps
WIDTH = 64  # of the encoder's output and of all hidden layers


@dataclass
class Args:
    """TRPO."""
    # twin: run arguments of PPO
    env: str = "MiniGrid-DoorKey-5x5-v0"  # environment id; with --evaluate another id may be given
    seed: int = 1  # seed of all random numbers: networks, environments, exploration
    total_timesteps: int = 300_000  # environment steps, summed over environments; with --resume: a new total
    num_envs: int = 16  # environments stepped together
    eval_every: int = 20_000  # environment steps between evaluations; 0: only at start and end
    eval_episodes: int = 100  # episodes per evaluation
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
    num_steps: int = 128  # steps of every environment per iteration
    epochs: int = 10  # passes of the critic over an iteration's transitions
    batch_size: int = 128  # transitions per update of the critic
    learning_rate: float = 1e-3  # Adam, of the critic
    gamma: float = 0.99  # discount per step
    gae_lambda: float = 0.95  # lambda of the advantage estimate (GAE)
    target_kl: float = 0.01  # delta: the step keeps the mean divergence from the old policy below this
    cg_iterations: int = 10  # steps of conjugate gradients
    cg_damping: float = 0.1  # times the identity, added to F, which is singular: logits + constant give the same policy
    shrink: float = 0.8  # factor from one step of the line search to the next
    tries: int = 10  # of the line search; if none succeeds, the policy stays as it is
    normalize_advantage: bool = True  # shift and scale the advantages of a rollout to mean 0 and deviation 1
    bootstrap: bool = True  # at a time limit, add the value of the last state to the return
    normalize: bool = False  # flat observations normalised by running mean and deviation, clipped to +-5
    eval_select: Literal["sample", "argmax"] = "sample"  # evaluations draw actions, or take the most likely ones


# RANGES: limits of numbers; all others must be above 0. TUNE: for `make tune`, (low, high) on a log scale, or choices
RANGES = {"gamma": (0, 1), "gae_lambda": (0, 1), "cg_damping": (0, math.inf), "shrink": (0, 1)}
TUNE = {"learning_rate": (1e-4, 3e-3), "target_kl": (3e-3, 5e-2), "cg_damping": (1e-3, 0.3),
        "num_steps": [64, 128, 256], "gae_lambda": [0.9, 0.95, 0.98]}


def linear(fan_in: int, fan_out: int) -> nn.Linear:
    """A layer that starts with biases 0 and, for each unit, a random weight vector of length 1."""
    layer = nn.Linear(fan_in, fan_out)
    with torch.no_grad():
        layer.weight.normal_().div_(layer.weight.norm(dim=1, keepdim=True))
        layer.bias.zero_()
    return layer


class GridEncoder(nn.Module):
    """Three 2x2 convolutions of 16, 32, 64 units with ReLU, and 2x2 max pooling after the first. They are matrix
    products of gathered cells: for 7x7 cells on a CPU this is more than twice as fast as nn.Conv2d."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4 * 3, 16), nn.Linear(4 * 16, 32), nn.Linear(4 * 32, WIDTH)])
        first, second = (torch.arange(s * s).view(s, s).unfold(0, 2, 1).unfold(1, 2, 1) for s in (7, 3))  # 2x2 windows
        pooled = first.reshape(3, 2, 3, 2, 4).transpose(1, 2)  # (3, 3, 2, 2, 4): neighbours that are pooled together
        self.register_buffer("first", pooled.flatten(), persistent=False)
        self.register_buffer("second", second.flatten(), persistent=False)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """The 7x7 cells in view (B, 7, 7, 3) as object, colour and state, unscaled -> (B, 64)."""
        x = image.flatten(1, 2).index_select(1, self.first).view(-1, 9, 4, 4 * 3).float()
        x = F.relu(self.layers[0](x).amax(2))  # (B, 9, 16)
        x = x.index_select(1, self.second).view(-1, 4, 4 * 16)
        x = F.relu(self.layers[1](x)).view(-1, 4 * 32)
        return F.relu(self.layers[2](x))


class PixelEncoder(nn.Sequential):
    """Pictures (B, 64, 64, 3) of 0 to 255 -> (B, 64), for Crafter: the convolutions of DQN (Mnih et al. 2015)."""

    def __init__(self):
        super().__init__(nn.Conv2d(3, 32, 8, 4), nn.ReLU(), nn.Conv2d(32, 64, 4, 2), nn.ReLU(), nn.Conv2d(64, 64, 3),
                         nn.ReLU(), nn.Flatten(), nn.Linear(64 * 4 * 4, WIDTH), nn.ReLU())

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return super().forward(image.permute(0, 3, 1, 2).float() / 255)


ENCODERS = {7: GridEncoder, 64: PixelEncoder}  # by the width of the view


Seen = torch.Tensor  # what the agent sees: 7x7 cells (B, 7, 7, 3) or features (B, f)


# twin: categorical policy
class Categorical(NamedTuple):
    """A policy's distributions over discrete actions (B,)."""
    log_probs: torch.Tensor  # (B, A)

    def draw(self, generator: torch.Generator | None = None) -> torch.Tensor:
        return (self.log_probs + gumbel(self.log_probs.shape, generator).to(self.log_probs.device)).argmax(1)

    def log_prob(self, action: torch.Tensor) -> torch.Tensor:
        return self.log_probs.gather(1, action.unsqueeze(1)).squeeze(1)

    def entropy(self) -> torch.Tensor:
        return -(self.log_probs.exp() * self.log_probs).sum(1)
# twin end


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
    policy: Categorical | Gaussian
    value: torch.Tensor  # (B,), of the state


class Agent(nn.Module):
    """Actor and critic without a common layer."""

    def __init__(self, shape: tuple[int, ...], outputs: int, discrete: bool = True):
        super().__init__()

        def network(width: int) -> nn.Sequential:
            encoder = ENCODERS[shape[0]]() if len(shape) == 3 else nn.Sequential(linear(shape[0], WIDTH), nn.Tanh())
            return nn.Sequential(encoder, linear(WIDTH, WIDTH), nn.Tanh(), linear(WIDTH, width))
        self.critic = network(1)
        self.actor = network(outputs)  # logits of discrete actions, or the mean of a continuous one
        self.log_std = None if discrete else nn.Parameter(torch.zeros(outputs))  # the same in all states
        if not discrete:
            self.actor[-1].weight.data.mul_(0.01)  # means near 0 at first

    def policy(self, obs: Seen) -> Categorical | Gaussian:
        y = self.actor(obs)  # (B, A) or (B, d)
        if self.log_std is None:
            return Categorical(torch.log_softmax(y, -1))
        return Gaussian(y, self.log_std.expand_as(y))

    def forward(self, obs: Seen) -> Output:
        return Output(self.policy(obs), self.critic(obs).squeeze(1))


class Batch(NamedTuple):
    """Transitions of a rollout."""
    obs: Seen
    action: torch.Tensor  # (B,) or (B, d)
    log_prob: torch.Tensor  # (B,), of the action, by the policy that took it
    value: torch.Tensor  # (B,), of the observation, by the critic during the rollout
    advantage: torch.Tensor  # (B,)
    target_value: torch.Tensor  # (B,), target of the critic


def gumbel(shape: tuple[int, ...], generator: torch.Generator | None = None) -> torch.Tensor:
    """Gumbel noise: the argmax of log-probabilities plus this noise is a draw from them."""
    return -(-torch.rand(shape, generator=generator).clamp(1e-10, 1 - 1e-7).log()).log()


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


@torch.no_grad()
def collect(agent: Agent, vec: envs.VectorEnv, look: Callable, loop: dict, scalars: runtime.Means, args: Args) -> Batch:
    """Play `num_steps` steps in every environment -> their transitions (T N, ...). `look` makes the agent's inputs
    from observations, `loop` has the present ones, `scalars` gets the returns of finished episodes."""
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


def objective(policy: Categorical | Gaussian, batch: Batch, advantage: torch.Tensor) -> torch.Tensor:
    """J (Eq. 14): the advantage of a policy, estimated with the actions of the old one."""
    return ((policy.log_prob(batch.action) - batch.log_prob).exp() * advantage).mean()


def mean_kl(old: Categorical | Gaussian, new: Categorical | Gaussian) -> torch.Tensor:
    """Mean over states of KL(old || new)."""
    if isinstance(old, Categorical):
        return (old.log_probs.exp() * (old.log_probs - new.log_probs)).sum(1).mean()
    squares = (2 * old.log_std).exp() + (old.mean - new.mean).square()
    return (new.log_std - old.log_std + 0.5 * squares / (2 * new.log_std).exp() - 0.5).sum(1).mean()


def flat(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([x.flatten() for x in tensors])


def fisher_product(kl_gradient: torch.Tensor, params: list, v: torch.Tensor, damping: float) -> torch.Tensor:
    """(F + damping) v (P,): F is the Hessian of the divergence, so F v is the gradient of kl_gradient . v."""
    return flat(torch.autograd.grad(kl_gradient @ v, params, retain_graph=True)) + damping * v


def conjugate_gradient(product: Callable, g: torch.Tensor, iterations: int) -> torch.Tensor:
    """x (P,) with product(x) close to g, from x = 0 on; it stays 0 where g is 0."""
    x, residual, direction = torch.zeros_like(g), g, g
    square = g @ g
    for _ in range(iterations):
        if square < 1e-10:
            break
        curved = product(direction)
        step = square / (direction @ curved)
        x, residual = x + step * direction, residual - step * curved
        before, square = square, residual @ residual
        direction = residual + square / before * direction
    return x


def improve_actor(agent: Agent, batch: Batch, args: Args) -> dict[str, torch.Tensor]:
    """A step of the actor within the trust region, all of it on the states of this rollout; returns what is logged."""
    advantage, params = batch.advantage, [p for name, p in agent.named_parameters() if not name.startswith("critic.")]
    if args.normalize_advantage:
        advantage = (advantage - advantage.mean()) / (advantage.std(correction=0) + 1e-8)
    policy = agent.policy(batch.obs)
    old, old_theta = tree_map(torch.Tensor.detach, policy), flat(params).detach()
    old_objective = objective(policy, batch, advantage)
    gradient = flat(torch.autograd.grad(old_objective, params, retain_graph=True))
    # at the old policy the divergence and its gradient are 0, but not the second derivative, which is F
    kl_gradient = flat(torch.autograd.grad(mean_kl(old, policy), params, create_graph=True))

    def product(v: torch.Tensor) -> torch.Tensor:
        return fisher_product(kl_gradient, params, v, args.cg_damping)
    x = conjugate_gradient(product, gradient, args.cg_iterations)
    length = (2 * args.target_kl / (x @ product(x)).clamp(min=1e-12)).sqrt()  # 1/2 step^T F step = target_kl
    gain, kl, share = torch.zeros_like(old_objective), torch.zeros_like(old_objective), 1.0
    with torch.no_grad():
        for _ in range(args.tries):
            nn.utils.vector_to_parameters(old_theta + share * length * x, params)
            new = agent.policy(batch.obs)
            gain, kl = objective(new, batch, advantage) - old_objective, mean_kl(old, new)
            if kl < args.target_kl and gain > 0:
                break
            share *= args.shrink
        else:
            nn.utils.vector_to_parameters(old_theta, params)
            gain, kl, share = torch.zeros_like(gain), torch.zeros_like(kl), 0.0
    return {"policy_loss": -gain, "kl": kl, "entropy": old.entropy().mean(), "step_share": torch.tensor(share)}


def value_loss(agent: Agent, batch: Batch) -> torch.Tensor:
    return (agent.critic(batch.obs).squeeze(1) - batch.target_value).square().mean()


def update(agent: Agent, optimizer: torch.optim.Optimizer, loss_of: Callable, batch: Batch) -> dict:
    """One step of the critic on a batch; returns what is logged."""
    loss = loss_of(agent, batch)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return {"value_loss": loss.detach(), "value": batch.value.mean()}


def main(args: Args) -> dict[str, float]:
    """Train, resume or evaluate, as `args` say; returns the last evaluation (keys: runtime.EVALUATION)."""
    args, saved = runtime.checked(args, ALGO, RANGES, anew=["env", "eval_select"])
    device = runtime.pick_device(args.device)

    vec = envs.make_vec(args.env, args.num_envs)
    shape, outputs, discrete = envs.policy_sizes(vec)
    obs = vec.reset(10_000 * args.seed)  # environment i has stream 10,000 * seed + i; seeds share none
    example = envs.example_of(vec, obs)
    agent = Agent(shape, outputs, discrete).to(device)
    optimizer = torch.optim.Adam(agent.critic.parameters(), lr=args.learning_rate, fused=True)
    loop = {"obs": envs.to_tensors(obs), "open_return": torch.zeros(args.num_envs, dtype=torch.float64)}
    normalizer = envs.Normalizer(shape[0], args.normalize and len(shape) == 1)
    scalars = runtime.Means()  # of updates and finished episodes since the last log
    parts = {"agent": agent, "optimizer": optimizer, "normalizer": normalizer, "vec": vec, "loop": loop,
             "scalars": scalars}
    runtime.restore(parts, saved, only=["agent", "normalizer"] if args.evaluate else None)
    evaluator = envs.Evaluator(args, copies=100)

    def look(obs: torch.Tensor | dict[str, torch.Tensor], count: bool = False) -> Seen:
        """Observations -> inputs of the agent. With `count` they update the running statistics first."""
        features = envs.seen(obs) if discrete else envs.flatten(obs)
        if count and normalizer.on:
            normalizer.add(features)
        return normalizer(features).to(device)

    def policy(obs: torch.Tensor | dict[str, torch.Tensor]) -> torch.Tensor:
        """Log-probabilities (B, A), or mean actions (B, d) in [-1, 1]. The run exports this as policy.pt2."""
        found = agent(look(obs)).policy
        return (found.log_probs if discrete else found.mean.clamp(-1, 1)).cpu()

    @torch.no_grad()
    def act(obs: envs.Observation) -> np.ndarray:
        """The actions of evaluations."""
        found = agent(look(envs.to_tensors(obs))).policy
        best = evaluator.noted(found.log_probs) if discrete else evaluator.noted(found.mean, found.log_std.exp())
        if args.eval_select == "sample":
            return envs.to_env(vec, found.draw(evaluator.generator))
        return envs.to_env(vec, best.argmax(1) if discrete else best)

    if args.evaluate:
        return evaluator.report(act, saved["step"])

    # train
    run = runtime.Run(ALGO, args, envs.resolve(args.env), saved, parts)
    loss_of = runtime.compiled(value_loss, args.compile, device)
    if not saved:
        run.log_evaluation(evaluator.play(act))  # the untrained agent
    while run.advance(args.num_steps * args.num_envs):
        rollout = collect(agent, vec, look, loop, scalars, args)
        scalars.add(improve_actor(agent, rollout, args))
        for _ in range(args.epochs):
            for index in torch.randperm(len(rollout.action)).to(device).split(args.batch_size):
                batch = tree_map(lambda x: x[index], rollout)
                scalars.add(update(agent, optimizer, loss_of, batch))

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
