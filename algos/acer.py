"""ACER: actor-critic with experience replay, for discrete actions.

Wang et al., "Sample Efficient Actor-Critic with Experience Replay" (arXiv 1611.01224). Each iteration plays a segment
of `num_steps` steps in every environment, learns from it, stores it, and learns from stored segments, on average
`replay_ratio` times. mu is the policy that acted, rho(a) = pi(a|s) / mu(a|s) and V(s) = sum_a pi(a|s) Q(s, a):

    target of Q:  R_t = r_t + gamma [min(1, rho_(t+1)) (R_(t+1) - Q_(t+1)) + V_(t+1)]                 (Retrace)
    actor:        g_t = gradient of min(c, rho_t) (R_t - V_t) log pi(a_t)
                        + sum_a max(0, 1 - c / rho(a)) pi(a) (Q(a) - V_t) log pi(a),   c = ratio_limit
    trust region: z   = the vector nearest to g with k.z <= delta,   k = gradient of KL(average policy || pi)

The average policy is a slow copy of pi. Gradients g, k and z are in the probabilities of actions, as in the released
code, not in logits. Episodes may end inside a segment, and a time limit bootstraps. The learning rate falls to 0 over
the run. Networks and RMSprop are A2C's: `diff algos/a2c.py algos/acer.py`. docs/classic.md has more.

python algos/acer.py --env CartPole-v1
python algos/acer.py --env MiniGrid-DoorKey-5x5-v0 --eval-select sample --total-timesteps 300000
"""
import copy
import math
import sys
from collections import deque
from collections.abc import Callable, Iterable
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

ALGO = Path(__file__).stem  # names run folders and result tables
LOG_EVERY = 10_000  # environment steps
WIDTH = 64  # of the encoder's output and of all hidden layers
EPS = 1e-6  # keeps ratios and logarithms finite where a policy is sure of its action


@dataclass
class Args:
    """ACER for discrete actions."""
    # twin: run arguments
    env: str = "CartPole-v1"  # environment id; with --evaluate another id may be given
    seed: int = 1  # seed of all random numbers: networks, environments, exploration
    total_timesteps: int = 100_000  # environment steps, summed over environments; with --resume: a new total
    num_envs: int = 8  # environments stepped together
    eval_every: int = 10_000  # environment steps between evaluations; 0: only at start and end
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
    num_steps: int = 20  # steps of every environment per iteration, which are one segment
    learning_rate: float = 2e-3  # RMSprop; it falls linearly to 0
    rmsprop: Literal["tf", "torch"] = "tf"  # tf: epsilon under the root, squares start at 1; torch: outside, at 0
    rmsprop_decay: float = 0.99  # alpha, of the mean of squared gradients
    rmsprop_eps: float = 1e-5  # epsilon
    gamma: float = 0.99  # discount per step
    entropy_coef: float = 0.01  # weight of the entropy bonus
    value_coef: float = 0.5  # weight of the value loss, which has a factor 1/2 of its own
    max_grad_norm: float = 10.0  # the gradient of all parameters is clipped to this norm
    eval_select: Literal["sample", "argmax"] = "argmax"  # evaluations draw actions, or take the most likely ones

    # method
    replay_ratio: float = 4.0  # updates from the buffer per rollout: the mean of a Poisson distribution
    buffer_size: int = 5_000  # steps of every environment that are kept
    replay_starts: int = 1_000  # steps of every environment before the first update from the buffer
    ratio_limit: float = 10.0  # c, the largest ratio in the actor's gradient
    delta: float = 1.0  # largest k.z of the trust region: how fast KL(average || policy) may grow; 1e9: no limit
    average_decay: float = 0.99  # of the average policy, per update


# RANGES: limits of numbers; all others must be above 0. TUNE: for `make tune`, (low, high) on a log scale, or choices
RANGES = {"gamma": (0, 1), "entropy_coef": (0, math.inf), "value_coef": (0, math.inf), "rmsprop_decay": (0, 1),
          "replay_ratio": (0, math.inf), "replay_starts": (0, math.inf), "average_decay": (0, 1)}
TUNE = {"learning_rate": (1e-4, 3e-3), "delta": (0.1, 3.0), "replay_ratio": [1.0, 2.0, 4.0, 8.0],
        "entropy_coef": (1e-4, 3e-2)}


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


class Output(NamedTuple):
    log_probs: torch.Tensor  # (B, A), of the actions
    q: torch.Tensor  # (B, A), of the actions
    value: torch.Tensor  # (B,), of the state: the mean of q under the policy


class Agent(nn.Module):
    """Actor and critic with a common encoder."""

    def __init__(self, shape: tuple[int, ...], num_actions: int):
        super().__init__()
        self.encoder = ENCODERS[shape[0]]() if len(shape) == 3 else nn.Sequential(linear(shape[0], WIDTH), nn.Tanh())
        self.critic = nn.Sequential(linear(WIDTH, WIDTH), nn.Tanh(), linear(WIDTH, num_actions))
        self.trunk = nn.Sequential(linear(WIDTH, WIDTH), nn.Tanh())
        self.actor = linear(WIDTH, num_actions)
        nn.init.orthogonal_(self.actor.weight, 0.01)  # nearly uniform at the start

    def forward(self, obs: Seen) -> Output:
        x = self.encoder(obs)  # (B, 64)
        logits, q = self.actor(self.trunk(x)), self.critic(x)  # (B, A)
        log_probs = torch.log_softmax(logits, -1)
        return Output(log_probs, q, (log_probs.exp() * q).sum(1))


class Batch(NamedTuple):
    """A segment of T steps of each of N environments, in which episodes may end."""
    obs: Seen  # (N, T, ...)
    action: torch.Tensor  # (N, T)
    probs: torch.Tensor  # (N, T, A), of all actions, by the policy that acted: mu
    reward: torch.Tensor  # (N, T)
    terminated: torch.Tensor  # (N, T), bool
    truncated: torch.Tensor  # (N, T), bool
    next_obs: Seen  # (N, T, ...), of the same episode, also at its end


class SegmentBuffer:
    """The last `capacity` segments of every environment."""

    def __init__(self, capacity: int):
        self.rollouts = deque(maxlen=capacity)  # of Batch

    def add(self, rollout: Batch) -> None:
        self.rollouts.append(tree_map(lambda column: column.cpu(), rollout))

    def draw(self) -> Batch:
        """One segment of every environment, each from a random rollout: segments of the same time are alike."""
        index = torch.randint(len(self.rollouts), (len(self.rollouts[0].action),)).tolist()
        return Batch(*(torch.stack([self.rollouts[j][column][i] for i, j in enumerate(index)])
                       for column in range(len(Batch._fields))))

    def state_dict(self) -> dict:
        return {"rollouts": [list(rollout) for rollout in self.rollouts]}

    def load_state_dict(self, state: dict) -> None:
        self.rollouts.extend(Batch(*columns) for columns in state["rollouts"])


def gumbel(shape: tuple[int, ...], generator: torch.Generator | None = None) -> torch.Tensor:
    """Gumbel noise: the argmax of log-probabilities plus this noise is a draw from them."""
    return -(-torch.rand(shape, generator=generator).clamp(1e-10, 1 - 1e-7).log()).log()


@torch.no_grad()
def collect(agent: Agent, vec: envs.VectorEnv, look: Callable, loop: dict, scalars: runtime.Means, args: Args) -> Batch:
    """Play `num_steps` steps in every environment -> their segments (N, T, ...). `look` makes the agent's inputs
    from observations, `loop` has the present ones, `scalars` gets the returns of finished episodes."""
    device = next(agent.parameters()).device
    noise = gumbel((args.num_steps, vec.num_envs, int(vec.action_space.n))).to(device)
    seen, steps = look(loop["obs"]), []
    for t in range(args.num_steps):
        output = agent(seen)
        action = (output.log_probs + noise[t]).argmax(1)  # a draw from the policy
        obs, reward, terminated, truncated, info = vec.step(action.cpu().numpy())
        reward, ended = torch.from_numpy(reward).float(), torch.from_numpy(terminated | truncated)
        loop["open_return"] += reward
        for finished in loop["open_return"][ended]:
            scalars.add({"return": finished})
        loop["open_return"][ended] = 0.0
        next_seen = look(envs.to_tensors(info["final_obs"]))  # obs may already belong to the next episode
        steps.append((seen, action, output.log_probs.exp(), reward.to(device),
                      torch.from_numpy(terminated).to(device), torch.from_numpy(truncated).to(device), next_seen))
        loop["obs"] = envs.to_tensors(obs)
        seen = look(loop["obs"])
    return Batch(*tree_map(lambda *columns: torch.stack(columns, 1), *steps))  # (N, T, ...)


@torch.no_grad()
def next_values(agent: Agent, batch: Batch) -> torch.Tensor:
    """Values (N, T) of next_obs where a time limit or the end of the segment cuts an episode; 0 elsewhere."""
    cut, value = batch.truncated.clone(), torch.zeros_like(batch.reward)
    cut[:, -1] = True
    value[cut] = agent(batch.next_obs[cut]).value
    return value


def retrace(batch: Batch, q: torch.Tensor, value: torch.Tensor, next_value: torch.Tensor, ratio: torch.Tensor,
            gamma: float) -> torch.Tensor:
    """Retrace returns (N, T), what Q is to learn (Munos et al., arXiv 1606.02647), from q and ratio of the actions that
    were taken, values of the states, and `next_values`, all (N, T). A return goes on past a step as far as the present
    policy would take that step, too; for the rest V counts."""
    running, target = next_value[:, -1], torch.zeros_like(q)
    for t in reversed(range(q.shape[1])):
        following = torch.where(batch.truncated[:, t], next_value[:, t], running)
        target[:, t] = batch.reward[:, t] + gamma * torch.where(batch.terminated[:, t], 0.0, following)
        running = ratio[:, t].clamp(max=1) * (target[:, t] - q[:, t]) + value[:, t]
    return target


def actor_weights(action: torch.Tensor, probs: torch.Tensor, ratios: torch.Tensor, q: torch.Tensor,
                  value: torch.Tensor, target: torch.Tensor, limit: float) -> torch.Tensor:
    """Weights w (N, T, A) of the actor's objective sum_a w(a) log pi(a), from action (N, T, 1), probs, ratios and q
    (N, T, A), values and Retrace returns (N, T, 1). The action that was taken counts with its ratio, cut at `limit`,
    and its advantage by the return. What is cut off, of all actions, counts with the advantage by Q."""
    taken = ratios.gather(2, action).clamp(max=limit) * (target - value)
    correction = (1 - limit / ratios).clamp(min=0) * probs * (q - value)
    return correction.scatter_add(2, action, taken)


def trust_region(gradient: torch.Tensor, probs: torch.Tensor, average_probs: torch.Tensor, delta: float
                 ) -> tuple[torch.Tensor, torch.Tensor]:
    """The vector z nearest to `gradient` with k.z <= delta, where k is the gradient of KL(average || policy) in
    `probs`, all (N, T, A); and whether z differs from `gradient` (N, T, 1)."""
    k = -average_probs / (probs + EPS)
    excess = ((k * gradient).sum(2, keepdim=True) - delta) / k.square().sum(2, keepdim=True)
    return gradient - excess.clamp(min=0) * k, excess > 0


def forward(agent: Agent, obs: Seen) -> Output:
    """The agent's outputs for observations (N, T, ...), with the same first two dimensions."""
    return Output(*(x.unflatten(0, obs.shape[:2]) for x in agent(obs.flatten(0, 1))))


def acer_loss(agent: Agent, average: Agent, batch: Batch, next_value: torch.Tensor, args: Args
              ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss of a batch of segments, and scalars for the log."""
    output, action = forward(agent, batch.obs), batch.action.unsqueeze(2)
    probs, q = output.log_probs.exp(), output.q.gather(2, action).squeeze(2)
    with torch.no_grad():
        ratios = (probs + EPS) / (batch.probs + EPS)  # (N, T, A)
        ratio, log_probs = ratios.gather(2, action).squeeze(2), (probs + EPS).log()
        target = retrace(batch, q, output.value, next_value, ratio, args.gamma)
        weights = actor_weights(action, probs, ratios, output.q, output.value.unsqueeze(2), target.unsqueeze(2),
                                args.ratio_limit)
        # d/dp of sum_a w(a) log p(a) and of the entropy -sum_a p(a) log p(a)
        gradient = weights / (probs + EPS) - args.entropy_coef * (log_probs + 1)
        z, bound = trust_region(gradient, probs, forward(average, batch.obs).log_probs.exp(), args.delta)
    value_loss = 0.5 * (q - target).square().mean()
    loss = -(z * probs).sum(2).mean() + args.value_coef * value_loss  # its gradient in probs is -z / (N T)
    scalars = {"policy_loss": -(weights * log_probs).sum(2).mean(), "value_loss": value_loss,
               "entropy": -(probs * log_probs).sum(2).mean(), "value": output.value.mean(),
               "bound_fraction": bound.float().mean(), "actor_ratio": ratio.clamp(max=args.ratio_limit).mean(),
               "retrace_ratio": ratio.clamp(max=1).mean()}
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


def update(agent: Agent, average: Agent, optimizer: torch.optim.Optimizer, loss_of: Callable, batch: Batch, args: Args
           ) -> dict:
    """One step of the optimiser on a batch, which the average policy follows; returns what is logged."""
    loss, scalars = loss_of(agent, average, batch, next_values(agent, batch), args)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm, foreach=True)
    optimizer.step()
    torch._foreach_lerp_(list(average.parameters()), [p.detach() for p in agent.parameters()], 1 - args.average_decay)
    return {name: x.detach() for name, x in scalars.items()}


def main(args: Args) -> dict[str, float]:
    """Train, resume or evaluate, as `args` say; returns the last evaluation (keys: runtime.EVALUATION)."""
    args, saved = runtime.checked(args, ALGO, RANGES, anew=["env", "eval_select"])
    device = runtime.pick_device(args.device)

    vec = envs.make_vec(args.env, args.num_envs)
    shape, num_actions = envs.discrete_sizes(vec)  # (7, 7, 3): cells in view, or (f,): features; number of actions
    obs = vec.reset(10_000 * args.seed)  # environment i has stream 10,000 * seed + i; seeds share none
    example = envs.example_of(vec, obs)
    agent = Agent(shape, num_actions).to(device)
    average = copy.deepcopy(agent).requires_grad_(False)
    optimizer = RMSprop(agent.parameters(), args)
    buffer = SegmentBuffer(math.ceil(args.buffer_size / args.num_steps))
    loop = {"obs": envs.to_tensors(obs), "open_return": torch.zeros(args.num_envs, dtype=torch.float64)}
    scalars = runtime.Means()  # of updates and finished episodes since the last log
    parts = {"agent": agent, "average": average, "optimizer": optimizer, "buffer": buffer, "vec": vec, "loop": loop,
             "scalars": scalars}
    runtime.restore(parts, saved, only=["agent"] if args.evaluate else None)
    evaluator = envs.Evaluator(args, copies=100)

    def look(obs: torch.Tensor | dict[str, torch.Tensor]) -> Seen:
        """Observations -> inputs of the agent."""
        return envs.seen(obs).to(device)

    def policy(obs: torch.Tensor | dict[str, torch.Tensor]) -> torch.Tensor:
        """Log-probabilities (B, A). The run exports this as policy.pt2."""
        return agent(look(obs)).log_probs.cpu()

    @torch.no_grad()
    def act(obs: envs.Observation) -> np.ndarray:
        """The actions of evaluations."""
        output = agent(look(envs.to_tensors(obs)))
        log_probs = evaluator.noted(output.log_probs.cpu())
        if args.eval_select == "sample":
            log_probs = log_probs + gumbel(log_probs.shape, evaluator.generator)
        action = log_probs.argmax(1)
        return action.numpy()

    if args.evaluate:
        return evaluator.report(act, saved["step"])

    # train
    run = runtime.Run(ALGO, args, envs.resolve(args.env), saved, parts)
    loss_of = runtime.compiled(acer_loss, args.compile, device)
    if not saved:
        run.log_evaluation(evaluator.play(act))  # the untrained agent
    while run.advance(args.num_steps * args.num_envs):
        rollout = collect(agent, vec, look, loop, scalars, args)
        optimizer.args = replace(args, learning_rate=args.learning_rate * (1 - run.before / args.total_timesteps))
        scalars.add(update(agent, average, optimizer, loss_of, rollout, args))
        buffer.add(rollout)
        replays = torch.poisson(torch.tensor(args.replay_ratio)) if run.step >= args.replay_starts * vec.num_envs else 0
        for _ in range(int(replays)):
            segments = tree_map(lambda column: column.to(device), buffer.draw())
            scalars.add(update(agent, average, optimizer, loss_of, segments, args))

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
