"""ACKTR: actor-critic with a natural gradient from Kronecker factors.

Wu et al., "Scalable trust-region method for deep reinforcement learning using Kronecker-factored approximation"
(arXiv 1708.05144). The loss is A2C's. For each layer the Fisher matrix is approximated by a Kronecker product of A, of
the layer's inputs x, and S, of the gradients g of the log-likelihood at its outputs. G is the gradient of the loss,
and the inverses are damped:

    A = E x x^T,   S = E g g^T,   U = S^-1 G A^-1,   step = -lr nu U,   nu = min(1, sqrt(kl_clip / (lr^2 sum <U, G>)))

The critic counts as a Gaussian around its values, so its layers have factors as well. Departures: advantages are GAE's
with lambda 0.95, and normalised. Actor and critic share no layer, but one nu; with --separate each has its own.
Observations are flat arrays. The rest is A2C's: `diff algos/a2c.py algos/acktr.py`.

python algos/acktr.py --env CartPole-v1
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
WIDTH = 64  # of the encoder's output and of all hidden layers


@dataclass
class Args:
    """ACKTR."""
    # twin: run arguments
    env: str = "CartPole-v1"  # environment id
    seed: int = 1  # seed of all random numbers: networks, environments, exploration
    total_timesteps: int = 100_000  # environment steps, summed over environments; plans the learning rate
    num_envs: int = 8  # environments stepped together
    eval_every: int = 10_000  # environment steps between evaluations; 0: only at start and end
    eval_episodes: int = 20  # episodes per evaluation
    checkpoint_every: int = 50_000  # environment steps between checkpoints; 0: only at the end
    video: int = 0  # episodes to film after training, or with --evaluate
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where the networks run; auto: on a GPU if there is one
    compile: bool = False  # compile the loss: about 30 s at the first start
    run_dir: str = ""  # run folder; empty: runs/<algo>/<env>/seed<k>-<time>
    resume: str = ""  # run folder to continue exactly, with its own arguments
    evaluate: str = ""  # run folder to evaluate; no training
    track: bool = False  # also log scalars to Weights & Biases (pip install wandb)
    # twin end

    # algorithm
    num_steps: int = 20  # steps of every environment per iteration, which is one update
    learning_rate: float = 0.25  # at the start, then linearly to 0 at the end; nu shortens most steps
    kl_clip: float = 1e-3  # bound of the squared length of a step, lr^2 nu^2 <U, F U>: twice the predicted divergence
    damping: float = 0.01  # added to the eigenvalues of the Fisher matrix
    factor_decay: float = 0.99  # rho, of the running means of the factors
    momentum: float = 0.9  # of the steps
    decompose_every: int = 10  # updates between eigendecompositions of the factors
    cold_updates: int = 10  # first updates, by the plain gradient, while factors are only averaged
    separate: bool = False  # a trust region for the actor and one for the critic, not one for both
    gamma: float = 0.99  # discount per step
    gae_lambda: float = 0.95  # lambda of the advantage estimate (GAE); 1: rewards of the rollout and the value after it
    normalize_advantage: bool = True  # shift and scale the advantages of a rollout to mean 0 and deviation 1
    entropy_coef: float = 0.0  # weight of the entropy bonus; with a bonus, CartPole stays below a return of 500
    value_coef: float = 0.25  # weight of the value loss, which has no factor 1/2 of its own
    max_grad_norm: float = 0.5  # in cold updates, the gradient of all parameters is clipped to this norm
    bootstrap: bool = True  # at a time limit, add the value of the last state to the return
    normalize: bool = False  # inputs normalised by running mean and deviation, clipped to +-5
    eval_select: Literal["sample", "argmax"] = "argmax"  # evaluations draw actions, or take the most likely ones


# RANGES: limits of numbers; all others must be above 0. TUNE: for `make tune`, (low, high) on a log scale, or choices
RANGES = {"gamma": (0, 1), "gae_lambda": (0, 1), "entropy_coef": (0, math.inf), "value_coef": (0, math.inf),
          "factor_decay": (0, 1), "momentum": (0, 1), "cold_updates": (0, math.inf)}
TUNE = {"learning_rate": (0.03, 0.5), "kl_clip": (1e-4, 1e-2), "damping": (1e-3, 0.1), "num_steps": [5, 10, 20]}


def linear(fan_in: int, fan_out: int) -> nn.Linear:
    """A layer that starts with biases 0 and, for each unit, a random weight vector of length 1."""
    layer = nn.Linear(fan_in, fan_out)
    with torch.no_grad():
        layer.weight.normal_().div_(layer.weight.norm(dim=1, keepdim=True))
        layer.bias.zero_()
    return layer


Seen = torch.Tensor  # what the agent sees: features (B, f)


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

    def __init__(self, f: int, outputs: int, discrete: bool = True):
        super().__init__()

        def network(width: int) -> nn.Sequential:
            return nn.Sequential(linear(f, WIDTH), nn.Tanh(), linear(WIDTH, WIDTH), nn.Tanh(), linear(WIDTH, width))
        self.critic = network(1)
        self.actor = network(outputs)  # logits of discrete actions, or the mean of a continuous one
        self.actor[-1].weight.data.mul_(0.01)  # actions are about equally likely at first
        # the deviation is a layer, because only layers have factors; its input is 0, so only its bias acts
        self.actor_log_std = None if discrete else linear(1, outputs)

    def forward(self, obs: Seen) -> Output:
        y = self.actor(obs)  # (B, A) or (B, d)
        if self.actor_log_std is None:
            policy = Categorical(torch.log_softmax(y, -1))
        else:
            policy = Gaussian(y, self.actor_log_std(torch.zeros_like(obs[:, :1])))
        return Output(policy, self.critic(obs).squeeze(1))


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
    """Loss of a rollout, and scalars for the log. Means over steps: with sums, the step would grow with num_envs."""
    output = agent(batch.obs)
    policy, value, advantage = output.policy, output.value, batch.advantage
    if args.normalize_advantage:
        advantage = (advantage - advantage.mean()) / (advantage.std(correction=0) + 1e-8)
    policy_loss = -(advantage * policy.log_prob(batch.action)).mean()
    value_loss = (value - batch.target_value).square().mean()
    entropy = policy.entropy().mean()
    loss = policy_loss - args.entropy_coef * entropy + args.value_coef * value_loss
    scalars = {"policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy, "value": value.mean()}
    return loss, scalars


def layers_of(agent: Agent) -> dict[str, nn.Linear]:
    """All layers, by name."""
    return {name: layer for name, layer in agent.named_modules() if isinstance(layer, nn.Linear)}


def factors(inputs: torch.Tensor, gradients: torch.Tensor) -> dict[str, torch.Tensor]:
    """A (k+1, k+1) and S (o, o) of a layer, from its inputs (B, k) and the gradients (B, o) of each sample's
    log-likelihood at its outputs. One more input is always 1; its weight is the bias."""
    inputs = torch.cat([inputs, torch.ones_like(inputs[:, :1])], 1)  # (B, k+1)
    return {"inputs": inputs.T @ inputs / len(inputs), "gradients": gradients.T @ gradients / len(inputs)}


def decomposed(factor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Eigenvalues (n,) and eigenvectors (n, n) of a factor. In float64: float32 makes small eigenvalues negative."""
    if not factor.isfinite().all():
        raise runtime.UserError("the run has diverged: a factor is not finite; lower --learning-rate, and begin anew")
    values, vectors = torch.linalg.eigh(factor.double())
    return {"values": torch.where(values > 1e-6, values, 0).to(factor.dtype), "vectors": vectors.to(factor.dtype)}


def natural_gradient(gradient: torch.Tensor, inputs: dict, gradients: dict, damping: float) -> torch.Tensor:
    """U (o, k+1): the gradient (o, k+1) of a layer times the inverse of its Fisher matrix and damping. In the basis of
    the eigenvectors of A and S that matrix is diagonal, with the products of their eigenvalues."""
    rotated = gradients["vectors"].T @ gradient @ inputs["vectors"]
    rotated = rotated / (gradients["values"].outer(inputs["values"]) + damping)
    return gradients["vectors"] @ rotated @ inputs["vectors"].T


def step_share(steps: list[torch.Tensor], gradients: list[torch.Tensor], learning_rate: float, kl_clip: float
               ) -> torch.Tensor:
    """nu, the share of the steps U that keeps the squared length lr^2 <U, F U> = lr^2 <U, gradient>, summed over
    layers, below kl_clip; at most 1. That length is twice the divergence, to second order."""
    length = learning_rate ** 2 * sum((u * gradient).sum() for u, gradient in zip(steps, gradients))
    return (kl_clip / length.clamp(min=1e-20)).sqrt().clamp(max=1)


def batch_factors(agent: Agent, batch: Batch, noise: torch.Tensor) -> dict[str, dict[str, torch.Tensor]]:
    """A and S of all layers for the states and actions of `batch`, and values drawn by Gaussian `noise` (B,). The
    likelihood is differentiated, not the loss, so S contains no advantage."""
    layers, passed = layers_of(agent), {}
    hooks = [layer.register_forward_hook(lambda layer, inputs, output: passed.update({layer: (inputs[0], output)}))
             for layer in layers.values()]
    output = agent(batch.obs)
    for hook in hooks:
        hook.remove()
    drawn_value = (output.value + noise).detach()
    log_likelihood = output.policy.log_prob(batch.action) - (output.value - drawn_value).square()  # (B,)
    # of the sum, because a mean would divide a sample's gradient by B
    gradients = torch.autograd.grad(log_likelihood.sum(), [passed[layer][1] for layer in layers.values()])
    return {name: factors(passed[layer][0], gradient) for (name, layer), gradient in zip(layers.items(), gradients)}


def make_kfac(agent: Agent) -> dict:
    """Of each layer: A ("inputs"), S ("gradients"), as running means with eigenvalues and eigenvectors; "momentum"."""
    kfac = {"updates": 0}
    for name, layer in layers_of(agent).items():
        zeros, k, o = layer.weight.new_zeros, layer.in_features + 1, layer.out_features
        a, s = ({"mean": zeros(n, n), "values": zeros(n), "vectors": zeros(n, n)} for n in (k, o))
        kfac[name] = {"inputs": a, "gradients": s, "momentum": zeros(o, k)}
    return kfac


def update_factors(agent: Agent, kfac: dict, batch: Batch, args: Args) -> None:
    """Update the running factors with a rollout: a plain mean during cold updates, then an exponential one."""
    count, warm = kfac["updates"], kfac["updates"] - args.cold_updates
    share = 1 / (count + 1) if warm < 0 or count == 0 else 1 - args.factor_decay
    noise = torch.randn(len(batch.value)).to(batch.value)
    for name, found in batch_factors(agent, batch, noise).items():
        for kind, mean in found.items():
            factor = kfac[name][kind]
            factor["mean"].lerp_(mean, share)
            if warm >= 0 and warm % args.decompose_every == 0:
                factor.update(decomposed(factor["mean"]))


def update(agent: Agent, kfac: dict, loss_of: Callable, batch: Batch, learning_rate: float, args: Args) -> dict:
    """One step on a rollout. Changes `agent` and `kfac` in place, returns what is logged."""
    update_factors(agent, kfac, batch, args)
    layers, cold = layers_of(agent), kfac["updates"] < args.cold_updates
    loss, scalars = loss_of(agent, batch, args)
    agent.zero_grad()
    loss.backward()
    if cold:
        nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm, foreach=True)
    for prefix in ("actor", "critic") if args.separate else ("",):
        region = {name: layer for name, layer in layers.items() if name.startswith(prefix)}
        gradients = [torch.cat([x.weight.grad, x.bias.grad.unsqueeze(1)], 1) for x in region.values()]  # (o, k+1)
        steps, nu = gradients, torch.ones(())
        if not cold:
            steps = [natural_gradient(gradient, kfac[name]["inputs"], kfac[name]["gradients"], args.damping)
                     for name, gradient in zip(region, gradients)]
            nu = step_share(steps, gradients, learning_rate, args.kl_clip)
        scalars["nu_" + prefix if prefix else "nu"] = nu
        for (name, layer), u in zip(region.items(), steps):
            momentum = kfac[name]["momentum"].mul_(args.momentum).add_(nu * u)
            step = learning_rate * (1 - args.momentum) * momentum  # 1 - momentum keeps the size of the steps
            layer.weight.data -= step[:, :-1]
            layer.bias.data -= step[:, -1]
    kfac["updates"] += 1
    return {name: x.detach() for name, x in scalars.items()}


def main(args: Args) -> dict[str, float]:
    """Train, resume or evaluate, as `args` say; returns the last evaluation (keys: runtime.EVALUATION)."""
    args, saved = runtime.checked(args, ALGO, RANGES, anew=["env", "eval_select"])
    device = runtime.pick_device(args.device)

    vec = envs.make_vec(args.env, args.num_envs)
    shape, outputs, discrete = envs.policy_sizes(vec)
    if len(shape) > 1:
        raise envs.EnvError(f"{args.env} observes views of shape {shape}; flat arrays are needed, for pictures an "
                            "encoder behind the id, as :pca, or algos/ppo.py")
    obs = vec.reset(10_000 * args.seed)  # environment i has stream 10,000 * seed + i; seeds share none
    example = envs.example_of(vec, obs)
    agent = Agent(shape[0], outputs, discrete).to(device)
    kfac = make_kfac(agent)
    loop = {"obs": envs.to_tensors(obs), "open_return": torch.zeros(args.num_envs, dtype=torch.float64)}
    normalizer = envs.Normalizer(shape[0], args.normalize)
    scalars = runtime.Means()  # of updates and finished episodes since the last log
    parts = {"agent": agent, "kfac": kfac, "normalizer": normalizer, "vec": vec, "loop": loop, "scalars": scalars}
    runtime.restore(parts, saved, only=["agent", "normalizer"] if args.evaluate else None)
    evaluator = envs.Evaluator(args, copies=100)

    def look(obs: torch.Tensor | dict[str, torch.Tensor], count: bool = False) -> Seen:
        """Observations -> inputs of the agent. With `count` they update the running statistics first."""
        features = envs.seen(obs) if discrete else envs.flatten(obs)
        if count:
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
        learning_rate = args.learning_rate * (1 - run.before / args.total_timesteps)
        scalars.add(update(agent, kfac, loss_of, rollout, learning_rate, args))

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
