"""A2C: synchronous advantage actor-critic, for discrete and continuous actions.

Mnih et al., "Asynchronous Methods for Deep Reinforcement Learning" (arXiv 1602.01783), with all environments stepped
together. Each iteration plays `num_steps` steps and makes one update with them, by RMSprop:

    A_t  = r_t + gamma r_(t+1) + ... + gamma^(T-t) V(s_T) - V(s_t),   s_T the state after the last step (gae_lambda 1)
    loss = -E A log pi(a|s) + value_coef E (V(s) - V_old(s) - A)^2 - entropy_coef E H(pi(.|s))

The released code uses TensorFlow's RMSprop: epsilon is under the root, and the mean of squared gradients starts at 1.
With PyTorch's RMSprop (--rmsprop torch) the first steps are ten learning rates long in every weight.

Everything else is PPO's: `diff algos/ppo.py algos/a2c.py`. So actor and critic share the first layer. A Gaussian policy
has the same deviation in all states.

python algos/a2c.py --env MiniGrid-DoorKey-5x5-v0
python algos/a2c.py --env CartPole-v1 --num-envs 8 --entropy-coef 0 --eval-select argmax --total-timesteps 150000
"""
import math
import sys
from collections.abc import Callable, Iterable
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
    """A2C."""
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
    num_steps: int = 5  # steps of every environment per iteration, which is one update
    learning_rate: float = 7e-4  # RMSprop, constant
    rmsprop: Literal["tf", "torch"] = "tf"  # tf: epsilon under the root, squares start at 1; torch: outside, at 0
    rmsprop_decay: float = 0.99  # alpha, of the mean of squared gradients
    rmsprop_eps: float = 1e-5  # epsilon
    gamma: float = 0.99  # discount per step
    gae_lambda: float = 1.0  # lambda of the advantage estimate (GAE); 1: rewards of the rollout and the value after it
    entropy_coef: float = 0.01  # weight of the entropy bonus; with a bonus, CartPole stays below a return of 500
    value_coef: float = 0.5  # weight of the value loss, which has no factor 1/2 of its own
    max_grad_norm: float = 0.5  # the gradient of all parameters is clipped to this norm
    bootstrap: bool = True  # at a time limit, add the value of the last state to the return
    normalize: bool = False  # flat observations normalised by running mean and deviation, clipped to +-5
    eval_select: Literal["sample", "argmax"] = "sample"  # evaluations draw actions, or take the most likely ones


# RANGES: limits of numbers; all others must be above 0. TUNE: for `make tune`, (low, high) on a log scale, or choices
RANGES = {"gamma": (0, 1), "gae_lambda": (0, 1), "entropy_coef": (0, math.inf), "value_coef": (0, math.inf),
          "rmsprop_decay": (0, 1)}
TUNE = {"learning_rate": (1e-4, 3e-3), "entropy_coef": (1e-5, 3e-2), "num_steps": [5, 8, 16, 32],
        "gae_lambda": [0.9, 0.95, 1.0]}


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
    """Actor and critic with a common encoder."""

    def __init__(self, shape: tuple[int, ...], outputs: int, discrete: bool = True):
        super().__init__()
        self.encoder = ENCODERS[shape[0]]() if len(shape) == 3 else nn.Sequential(linear(shape[0], WIDTH), nn.Tanh())
        self.critic = nn.Sequential(linear(WIDTH, WIDTH), nn.Tanh(), linear(WIDTH, 1))
        self.trunk = nn.Sequential(linear(WIDTH, WIDTH), nn.Tanh())
        self.actor = linear(WIDTH, outputs)  # logits of discrete actions, or the mean of a continuous one
        self.log_std = None if discrete else nn.Parameter(torch.zeros(outputs))  # the same in all states
        self.actor.weight.data.mul_(0.01)  # actions are about equally likely, or means near 0, at first

    def forward(self, obs: Seen) -> Output:
        x = self.encoder(obs)  # (B, 64)
        y = self.actor(self.trunk(x))  # (B, A) or (B, d)
        if self.log_std is None:
            policy = Categorical(torch.log_softmax(y, -1))
        else:
            policy = Gaussian(y, self.log_std.expand_as(y))
        return Output(policy, self.critic(x).squeeze(1))


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


def a2c_loss(agent: Agent, batch: Batch, args: Args) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss of a rollout, and scalars for the log. Means over steps: with sums, the step would grow with num_envs.
    Advantages are not normalised, because the deviation of a few steps is noise."""
    output = agent(batch.obs)
    policy, value = output.policy, output.value
    policy_loss = -(batch.advantage * policy.log_prob(batch.action)).mean()
    value_loss = (value - batch.target_value).square().mean()
    entropy = policy.entropy().mean()
    loss = policy_loss - args.entropy_coef * entropy + args.value_coef * value_loss
    scalars = {"policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy, "value": value.mean()}
    return loss, scalars


class RMSprop(torch.optim.Optimizer):
    """v <- alpha v + (1 - alpha) g^2, then theta <- theta - lr g / sqrt(v + eps) with v = 1 at the start ("tf"), or
    theta <- theta - lr g / (sqrt(v) + eps) with v = 0 at the start ("torch")."""

    def __init__(self, params: Iterable[nn.Parameter], args: Args):
        super().__init__(params, {})
        self.args, start = args, 1.0 if args.rmsprop == "tf" else 0.0
        for p in self.param_groups[0]["params"]:
            self.state[p]["square"] = torch.full_like(p, start)

    @torch.no_grad()
    def step(self) -> None:
        args, params = self.args, self.param_groups[0]["params"]
        squares, grads = [self.state[p]["square"] for p in params], [p.grad for p in params]
        torch._foreach_mul_(squares, args.rmsprop_decay)
        torch._foreach_addcmul_(squares, grads, grads, 1 - args.rmsprop_decay)
        if args.rmsprop == "tf":
            divisors = torch._foreach_sqrt(torch._foreach_add(squares, args.rmsprop_eps))
        else:
            divisors = torch._foreach_add(torch._foreach_sqrt(squares), args.rmsprop_eps)
        torch._foreach_addcdiv_(params, grads, divisors, -args.learning_rate)


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
    args, saved = runtime.checked(args, ALGO, RANGES, anew=["env", "eval_select"])
    device = runtime.pick_device(args.device)

    vec = envs.make_vec(args.env, args.num_envs)
    shape, outputs, discrete = envs.policy_sizes(vec)
    obs = vec.reset(10_000 * args.seed)  # environment i has stream 10,000 * seed + i; seeds share none
    example = envs.example_of(vec, obs)
    agent = Agent(shape, outputs, discrete).to(device)
    optimizer = RMSprop(agent.parameters(), args)
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
    loss_of = runtime.compiled(a2c_loss, args.compile, device)
    if not saved:
        run.log_evaluation(evaluator.play(act))  # the untrained agent
    while run.advance(args.num_steps * args.num_envs):
        rollout = collect(agent, vec, look, loop, scalars, args)
        scalars.add(update(agent, optimizer, loss_of, rollout, args))

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
