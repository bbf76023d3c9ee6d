"""DQN: deep Q-networks for discrete actions: double, dueling, prioritised, with n-step returns.

Mnih et al., "Human-level control through deep reinforcement learning" (Nature 2015). Q' is a copy of Q from some steps
ago, the target network:

    loss = Huber(Q(s, a) - y),   y = R + gamma^n Q'(s_n, argmax_b Q(s_n, b))

Four extensions can be switched off one by one:
- double (van Hasselt et al., arXiv 1509.06461): Q picks the next action, as above, and Q' values it;
- dueling (Wang et al., arXiv 1511.06581): Q(s, a) = V(s) + A(s, a) - mean A(s, .);
- prioritised (Schaul et al., arXiv 1511.05952): transitions with large errors are drawn more often, and their loss gets
  a smaller weight; --priority-alpha 0 draws all alike;
- n-step: R sums n rewards, fewer at the end of an episode. There is no off-policy correction, so n stays small.

A time limit bootstraps. The gradient of the Huber loss is limited for errors above 1, so rewards should be near 1. The
settings are common ones for CartPole, where many updates follow each 256 steps. Pictures go through the convolutions of
2015. docs/classic.md has the measurements.

python algos/dqn.py --env CartPole-v1
python algos/dqn.py --env CartPole-v1 --no-double --no-dueling --priority-alpha 0 --n-step 1   # the plain one
python algos/dqn.py --env MobileRobot-v0:pixels --buffer-size 20000
"""
import math
import sys
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
from networks import adam, adam_state, init_mlp, mlp

ALGO = Path(__file__).stem  # names run folders and result tables
LOG_EVERY = 1000  # environment steps
CONVOLUTIONS = ((32, 8, 4), (64, 4, 2), (64, 3, 1))  # of pictures: units, width, stride
SMALLEST = 36  # pixels: the convolutions make 1 x 1 of 36 x 36


@dataclass
class Args:
    """DQN."""
    # twin: run arguments
    env: str = "CartPole-v1"  # environment id
    seed: int = 1  # seed of all random numbers: networks, environments, exploration
    total_timesteps: int = 50_000  # environment steps, summed over environments; with --resume: a new total
    num_envs: int = 1  # environments stepped together
    eval_every: int = 5_000  # environment steps between evaluations; 0: only at start and end
    eval_episodes: int = 20  # episodes per evaluation; the last evaluation plays twice as many
    checkpoint_every: int = 25_000  # environment steps between checkpoints; 0: only at the end
    video: int = 0  # episodes to film after training, or with --evaluate
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where the networks run; auto: on a GPU if there is one
    compile: bool = True  # compile the update into one graph: about 30 s at the first start, then up to twice as fast
    run_dir: str = ""  # run folder; empty: runs/<algo>/<env>/seed<k>-<time>
    resume: str = ""  # run folder to continue exactly, with its own arguments
    evaluate: str = ""  # run folder to evaluate; no training
    track: bool = False  # also log scalars to Weights & Biases (pip install wandb)
    # twin end

    # algorithm
    hidden: str = "256x2"  # hidden layers, width x depth
    batch_size: int = 64  # transitions per update
    buffer_size: int = 100_000  # transitions kept for replay; one with pictures of 64 x 64 takes 25 kB
    learning_rate: float = 2.3e-3  # Adam
    gamma: float = 0.99  # discount per step
    learning_starts: int = 1_000  # environment steps before the first update
    train_every: int = 256  # environment steps between rounds of updates
    updates: int = 128  # updates per round
    target_every: int = 10  # environment steps between copies of the online network to the target network
    epsilon_end: float = 0.04  # share of uniform actions at the end; it is 1 at the start
    epsilon_fraction: float = 0.16  # share of the run over which the share of uniform actions falls

    # method: extensions
    double: bool = True  # the online network picks the action of the target
    dueling: bool = True  # value and advantages in place of action values
    n_step: int = 3  # rewards that are summed before the target network takes over
    priority_alpha: float = 0.6  # priority = error to the power of this; 0: all transitions are drawn alike
    priority_beta: float = 0.4  # how much the weights of the loss correct for that at the start; 1 (fully) at the end


# RANGES: limits of numbers; all others must be above 0. TUNE: for `make tune`, (low, high) on a log scale, or choices
RANGES = {"gamma": (0, 1), "learning_starts": (0, math.inf), "epsilon_end": (0, 1), "epsilon_fraction": (0, 1),
          "priority_alpha": (0, 1), "priority_beta": (0, 1)}
TUNE = {"learning_rate": (1e-4, 5e-3), "target_every": [10, 100, 500, 1000], "n_step": [1, 3],
        "epsilon_fraction": (0.05, 0.5), "batch_size": [32, 64, 128]}


class Batch(NamedTuple):
    """Transitions over up to n steps."""
    obs: torch.Tensor  # (B, f), or pictures (B, h, w, c) of 0 to 255
    action: torch.Tensor  # (B,)
    reward: torch.Tensor  # (B,), discounted sum
    discount: torch.Tensor  # (B,), of the value of next_obs: gamma^m after m steps, 0 where the episode terminated
    next_obs: torch.Tensor  # as obs


class NStep:
    """The open windows of all environments, which become transitions over up to n steps."""

    def __init__(self, num_envs: int, n: int, gamma: float):
        self.n, self.gamma = n, gamma
        self.windows = [[] for _ in range(num_envs)]  # of [obs, action, reward], the oldest first

    def push(self, obs: torch.Tensor, action: np.ndarray, reward: np.ndarray, terminated: np.ndarray,
             truncated: np.ndarray, final_obs: torch.Tensor) -> list[tuple]:
        """One step of every environment -> the transitions (fields of Batch) that are complete with it. At the end of
        an episode these are all that are open, over fewer steps."""
        complete = []
        for i, window in enumerate(self.windows):
            window.append([obs[i], int(action[i]), float(reward[i])])
            ended = terminated[i] or truncated[i]
            while len(window) == self.n or (ended and window):
                total = sum(self.gamma ** k * step[2] for k, step in enumerate(window))
                discount = 0.0 if terminated[i] else self.gamma ** len(window)  # a time limit bootstraps
                complete.append((window[0][0], window[0][1], total, discount, final_obs[i]))
                window.pop(0)
        return complete

    def state_dict(self) -> dict:
        return {"windows": self.windows}

    def load_state_dict(self, state: dict) -> None:
        self.windows = state["windows"]


class SumTree:
    """Priorities in the leaves of a binary tree, every other node the sum of its two children. The number of leaves is
    a power of two, so that prefix sums follow the order of the leaves."""

    def __init__(self, capacity: int):
        self.leaves = 2 ** math.ceil(math.log2(capacity))
        self.nodes = np.zeros(2 * self.leaves)  # node i has the children 2 i and 2 i + 1; leaves are the second half

    def __setitem__(self, index: np.ndarray, priority: np.ndarray | float) -> None:
        """Set leaves (B,). If an index comes twice, the last priority counts."""
        node = index + self.leaves
        self.nodes[node] = priority
        while len(node) and node[0] > 1:
            node = np.unique(node // 2)
            self.nodes[node] = self.nodes[2 * node] + self.nodes[2 * node + 1]

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        return self.nodes[index + self.leaves]

    def find(self, mass: np.ndarray) -> np.ndarray:
        """The first leaves (B,) whose prefix sums exceed `mass` (B,), which is below the sum of all."""
        mass, node = mass.copy(), np.ones(len(mass), np.int64)
        while node[0] < self.leaves:
            left = self.nodes[2 * node]
            right = mass >= left
            mass[right] -= left[right]
            node = 2 * node + right
        return node - self.leaves


class PrioritisedBuffer:
    """The last `capacity` transitions, drawn in proportion to their priorities."""

    def __init__(self, capacity: int, obs: torch.Tensor, alpha: float):
        """`obs` is an observation like those to come."""
        self.alpha, self.stored, self.largest = alpha, 0, 1.0  # largest: priority so far; new transitions get it
        shape = capacity, *obs.shape
        self.rows = Batch(obs.new_zeros(shape), torch.zeros(capacity, dtype=torch.long), torch.zeros(capacity),
                          torch.zeros(capacity), obs.new_zeros(shape))
        self.tree = SumTree(capacity)

    def add(self, obs: torch.Tensor, action: int, reward: float, discount: float, next_obs: torch.Tensor) -> None:
        slot = self.stored % len(self.rows.action)
        for column, value in zip(self.rows, (obs, action, reward, discount, next_obs)):
            column[slot] = value
        self.tree[np.array([slot])] = self.largest ** self.alpha
        self.stored += 1

    def draw(self, uniform: np.ndarray, beta: float) -> tuple[np.ndarray, np.ndarray]:
        """Indices and weights (B,): one draw from each of B equal parts of the sum, at `uniform` (B,) in [0, 1)."""
        total, stored = self.tree.nodes[1], min(self.stored, len(self.rows.action))
        index = self.tree.find((np.arange(len(uniform)) + uniform) * total / len(uniform))
        index = np.minimum(index, stored - 1)  # a mass may be rounded up to the sum
        weight = (stored * self.tree[index] / total) ** -beta
        return index, weight / weight.max()

    def set_errors(self, index: np.ndarray, error: np.ndarray) -> None:
        """New priorities from the errors |Q - y| (B,) of transitions `index` (B,)."""
        priority = error.astype(np.float64) + 1e-6
        self.largest = max(self.largest, float(priority.max()))
        self.tree[index] = priority ** self.alpha

    def state_dict(self) -> dict:
        n = min(self.stored, len(self.rows.action))  # the rest is empty
        return {"rows": [column[:n].clone() for column in self.rows], "stored": self.stored, "largest": self.largest,
                "priorities": self.tree[np.arange(n)]}

    def load_state_dict(self, state: dict) -> None:
        n, self.stored, self.largest = len(state["rows"][1]), state["stored"], state["largest"]
        for column, saved in zip(self.rows, state["rows"]):
            column[:n] = saved
        self.tree[np.arange(n)] = np.asarray(state["priorities"])


def init_convolutions(channels: int) -> dict[str, torch.Tensor]:
    """Parameters of CONVOLUTIONS in PyTorch's default initialisation."""
    params = {}
    for i, (units, width, _) in enumerate(CONVOLUTIONS):
        layer = nn.Conv2d(channels, units, width)
        params |= {f"picture.{i}.weight": layer.weight.detach(), f"picture.{i}.bias": layer.bias.detach()}
        channels = units
    return params


def features(params: dict, obs: torch.Tensor) -> torch.Tensor:
    """Observations (B, f) as they are, pictures (B, h, w, c) as (B, f): scaled to 1, and through CONVOLUTIONS."""
    if obs.dim() == 2:
        return obs
    x = obs.permute(0, 3, 1, 2).float() / 255  # (B, c, h, w)
    for i, (_, _, stride) in enumerate(CONVOLUTIONS):
        x = F.relu(F.conv2d(x, params[f"picture.{i}.weight"], params[f"picture.{i}.bias"], stride))
    return x.flatten(1)


def make_agent(args: Args, shape: tuple[int, ...], num_actions: int, device: torch.device) -> dict:
    """Fresh parameters, their target copies and optimiser state, for observations of this shape."""
    hidden = runtime.hidden_layers(args.hidden)
    online = init_convolutions(shape[2]) if len(shape) == 3 else {}
    f = features(online, torch.zeros(1, *shape)).shape[1]
    online |= init_mlp("trunk", [f, *hidden]) | init_mlp("advantage", [hidden[-1], num_actions])
    if args.dueling:
        online |= init_mlp("value", [hidden[-1], 1])
    target = {name: p.clone() for name, p in online.items()}
    agent = {"online": online, "target": target, "moments": adam_state(online), "count": torch.zeros(())}
    return tree_map(lambda x: x.to(device), agent)


def dueling(value: torch.Tensor, advantage: torch.Tensor) -> torch.Tensor:
    """Value (B, 1) and advantages (B, A) -> action values (B, A). Without the mean, V and A would not be unique."""
    return value + advantage - advantage.mean(1, keepdim=True)


def q_values(params: dict, obs: torch.Tensor) -> torch.Tensor:
    """Observations -> action values (B, A)."""
    x = F.relu(mlp(params, "trunk", features(params, obs)))
    advantage = mlp(params, "advantage", x)
    if "value.0.weight" not in params:
        return advantage
    return dueling(mlp(params, "value", x), advantage)


def target_values(online_q: torch.Tensor, target_q: torch.Tensor, reward: torch.Tensor, discount: torch.Tensor,
                  double: bool) -> torch.Tensor:
    """Targets (B,) from the values (B, A) of next_obs by both networks. The largest of noisy values is too high
    on average, unless another network picks the action."""
    best = (online_q if double else target_q).argmax(1, keepdim=True)
    return reward + discount * target_q.gather(1, best).squeeze(1)


def critic_loss(params: dict, batch: Batch, y: torch.Tensor, weight: torch.Tensor
                ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Weighted Huber loss; with it the errors (B,) and the values (B,) of the actions."""
    q = q_values(params, batch.obs).gather(1, batch.action.unsqueeze(1)).squeeze(1)
    return (weight * F.huber_loss(q, y, reduction="none")).mean(), (q - y, q)


def update(agent: dict, batch: Batch, weight: torch.Tensor, args: Args) -> tuple[dict, torch.Tensor]:
    """One step of the online network. Changes `agent` in place, returns what is logged, and the errors (B,)."""
    online, target = agent["online"], agent["target"]
    y = target_values(q_values(online, batch.next_obs), q_values(target, batch.next_obs), batch.reward, batch.discount,
                      args.double)
    grads, (loss, (error, q)) = torch.func.grad_and_value(critic_loss, has_aux=True)(online, batch, y, weight)
    agent["count"] += 1
    adam(online, grads, agent["moments"], agent["count"], args.learning_rate)
    return {"critic_loss": loss, "q": q.mean(), "target_q": y.mean()}, error.abs()


def look(obs: envs.Observation) -> torch.Tensor:
    """Observations -> inputs of the networks (B, ...)."""
    return envs.seen(envs.to_tensors(obs))


def epsilon_at(step: int, planned: int, args: Args) -> float:
    """Share of uniform actions: linear in the steps so far, then constant. planned: steps of the run as it began."""
    progress = min(1, step / max(1, args.epsilon_fraction * planned))
    return 1 + (args.epsilon_end - 1) * progress


@torch.no_grad()  # gradients are taken by torch.func, inside `update`
def main(args: Args) -> dict[str, float]:
    """Train, resume or evaluate, as `args` say; returns the last evaluation (keys: runtime.EVALUATION)."""
    args, saved = runtime.checked(args, ALGO, RANGES)
    device = runtime.pick_device(args.device, fast_matmul=True)
    vec = envs.make_vec(args.env, args.num_envs)
    shape, num_actions = envs.discrete_sizes(vec, any_pictures=True)
    if len(shape) > 1 and min(shape[:2]) < SMALLEST:
        raise envs.EnvError(f"{args.env} observes views of shape {shape}; flat arrays are needed, pictures from "
                            f"{SMALLEST} x {SMALLEST} on, or algos/ppo.py")
    obs = vec.reset(10_000 * args.seed)  # environment i has stream 10,000 * seed + i; seeds share none
    example = envs.example_of(vec, obs)
    agent = make_agent(args, shape, num_actions, device)
    # exploration is planned once: a run that is given more steps goes on with epsilon_end
    loop = {"obs": look(obs), "planned": args.total_timesteps}
    buffer = PrioritisedBuffer(min(args.buffer_size, args.total_timesteps + args.num_envs), loop["obs"][0],
                               args.priority_alpha)
    n_step = NStep(args.num_envs, args.n_step, args.gamma)
    scalars = runtime.Means()  # since the last log
    parts = {"agent": agent, "vec": vec, "buffer": buffer, "n_step": n_step, "loop": loop, "scalars": scalars}
    runtime.restore(parts, saved, only=["agent"] if args.evaluate else None)
    evaluator = envs.Evaluator(args)

    def policy(obs: torch.Tensor | dict[str, torch.Tensor]) -> torch.Tensor:
        """Log-probabilities (B, A) of the greedy action, but for a share epsilon_end of uniform ones. The run exports
        this as policy.pt2."""
        best = F.one_hot(q_values(agent["online"], envs.seen(obs).to(device)).argmax(1), num_actions).float()
        share = max(args.epsilon_end, 1e-6)  # logarithms have to be finite
        return ((1 - share) * best + share / num_actions).log().cpu()

    def act(obs: envs.Observation) -> np.ndarray:
        """The actions of evaluations, greedy."""
        q = q_values(agent["online"], look(obs).to(device))
        return evaluator.noted(q, scores="Q").argmax(1).cpu().numpy()

    if args.evaluate:
        return evaluator.report(act, saved["step"])

    # train
    run = runtime.Run(ALGO, args, envs.resolve(args.env), saved, parts)
    learn = runtime.compiled(update, args.compile, device)
    if not saved:
        run.log_evaluation(evaluator.play(act))  # the untrained agent
    while run.advance(args.num_envs):
        epsilon, obs = epsilon_at(run.step, loop["planned"], args), loop["obs"]
        random = (torch.rand(args.num_envs) < epsilon).numpy()
        greedy = q_values(agent["online"], obs.to(device)).argmax(1).cpu().numpy()
        action = np.where(random, torch.randint(num_actions, (args.num_envs,)).numpy(), greedy)
        next_obs, reward, terminated, truncated, info = vec.step(action)

        # store: where an episode ended, final_obs is its last observation, and next_obs the first of the next episode
        for row in n_step.push(obs, action, reward, terminated, truncated, look(info["final_obs"])):
            buffer.add(*row)
        loop["obs"] = look(next_obs)

        # update
        if run.due(args.target_every):
            for name, p in agent["online"].items():
                agent["target"][name].copy_(p)
        rounds = run.step // args.train_every - run.before // args.train_every
        learning = run.step > args.learning_starts and buffer.stored > 0
        for _ in range(args.updates * rounds if learning else 0):
            beta = args.priority_beta + (1 - args.priority_beta) * min(1, run.step / loop["planned"])
            index, weight = buffer.draw(torch.rand(args.batch_size, dtype=torch.float64).numpy(), beta)
            batch = tree_map(lambda x: x[torch.from_numpy(index)].to(device), buffer.rows)
            logged, error = learn(agent, batch, torch.from_numpy(weight).float().to(device), args)
            buffer.set_errors(index, error.cpu().numpy())
            scalars.add(logged | {"epsilon": torch.tensor(epsilon)})

        # log, evaluate, save
        if run.due(LOG_EVERY):
            run.log(scalars.take())
        if run.due(args.eval_every) or run.over:
            run.log_evaluation(evaluator.play(act, twice=run.over))
        run.save_if_due()
    run.finish(example, policy=policy)
    evaluator.film(act, run.folder)
    return run.result


if __name__ == "__main__":
    with runtime.exit_codes(ALGO):
        main(runtime.cli(Args, ALGO))
