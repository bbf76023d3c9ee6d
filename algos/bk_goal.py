"""BK-Goal: PPO whose reward is shaped by how well the last step fits goals suggested for similar situations.

Zhang et al., "Improving Sample Efficiency of Reinforcement Learning with Background Knowledge from Large Language
Models" (arXiv 2407.03964). A language model is shown pieces of experience and suggests goals that make sense there,
whatever the task:

    phi = max_g cos(embedding of the last transition's caption, embedding of g), and 0 below a threshold

over the goals g of the three stored situations that are most similar to the present one. No language model is asked
here: knowledge/label_goals.py is the stage before, knowledge/goals.py the potential. The shaped reward is that of
BK-Code: `diff algos/bk_code.py algos/bk_goal.py`.

Texts are embedded by hashed words, which needs no model. --knowledge goals-minilm uses all-MiniLM-L6-v2
(requirements-minilm.txt). docs/background_knowledge.md says how much both measure nearness to objects.

python algos/bk_goal.py --env BabyAI-Text-GoToLocal-RedBall-S20
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
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_map

import envs
import runtime
from knowledge import potentials
from knowledge.history import Past
from knowledge.potentials import Checked

ALGO = Path(__file__).stem  # names run folders and result tables
LOG_EVERY = 10_000  # environment steps
WIDTH = 64  # of the encoder's output and of all hidden layers


@dataclass
class Args:
    """PPO with background knowledge as goals (BK-Goal)."""
    # twin: run arguments
    env: str = "BabyAI-Text-GoToLocal-RedBall-S20"  # environment id; with --evaluate another id may be given
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
    epochs: int = 4  # passes over an iteration's transitions
    batch_size: int = 256  # transitions per update
    learning_rate: float = 1e-3  # Adam, constant
    gamma: float = 0.99  # discount per step
    gae_lambda: float = 0.95  # lambda of the advantage estimate (GAE)
    clip: float = 0.2  # range of the probability ratio, and of the change of values
    clip_values: bool = True  # also clip the change of values: right for returns near 1, slow for larger ones
    normalize_advantage: bool = True  # shift and scale the advantages of a batch to mean 0 and deviation 1
    entropy_coef: float = 0.01  # weight of the entropy bonus
    value_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # the gradient of all parameters is clipped to this norm
    bootstrap: bool = True  # at a time limit, add the value of the last state to the return
    eval_select: Literal["sample", "argmax"] = "sample"  # evaluations draw actions, or take the most likely ones

    # method: background knowledge
    knowledge: str = "goals"  # goals, goals-minilm (shipped), goals:FILE.json, or any that bk_code.py takes
    shaping: Literal["pbrs", "official", "none"] = "pbrs"  # potential-based; as released; none: plain PPO
    ext_coef: float = 1.0  # weight of the task's reward (official: 10)
    shape_coef: float = 0.1  # weight of the shaping reward (official: 1)
    horizon: int = 4  # steps of the past that a potential reads
    critic_sees_phi: bool = False  # give the critic the potential as an input, beside the present observation


# RANGES: limits of numbers; all others must be above 0. TUNE: for `make tune`, (low, high) on a log scale, or choices
RANGES = {"gamma": (0, 1), "gae_lambda": (0, 1), "entropy_coef": (0, math.inf), "value_coef": (0, math.inf),
          "ext_coef": (0, math.inf), "shape_coef": (0, math.inf)}
TUNE = {"learning_rate": (2e-4, 3e-3), "entropy_coef": (1e-3, 5e-2), "num_steps": [64, 128, 256],
        "epochs": [2, 4, 8], "batch_size": [128, 256, 512], "gae_lambda": [0.9, 0.95, 0.98]}


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


class Seen(NamedTuple):
    """What the agent sees."""
    view: torch.Tensor  # 7x7 cells (B, 7, 7, 3) or features (B, f)
    phi: torch.Tensor  # (B,), potential, for the critic


class Output(NamedTuple):
    log_probs: torch.Tensor  # (B, A), of the actions
    value: torch.Tensor  # (B,), of the state


class Agent(nn.Module):
    """Actor and critic with a common encoder."""

    def __init__(self, shape: tuple[int, ...], num_actions: int, critic_sees_phi: bool):
        super().__init__()
        self.encoder = ENCODERS[shape[0]]() if len(shape) == 3 else nn.Sequential(linear(shape[0], WIDTH), nn.Tanh())
        self.critic_sees_phi = critic_sees_phi
        self.critic = nn.Sequential(linear(WIDTH + int(critic_sees_phi), WIDTH), nn.Tanh(), linear(WIDTH, 1))
        self.trunk = nn.Sequential(linear(WIDTH, WIDTH), nn.Tanh())
        self.actor = linear(WIDTH, num_actions)

    def forward(self, obs: Seen) -> Output:
        x = self.encoder(obs.view)  # (B, 64)
        logits = self.actor(self.trunk(x))  # (B, A)
        judged = torch.cat([x, obs.phi.unsqueeze(1)], 1) if self.critic_sees_phi else x  # (B, 65) or (B, 64)
        return Output(torch.log_softmax(logits, -1), self.critic(judged).squeeze(1))


class Batch(NamedTuple):
    """Transitions of a rollout."""
    obs: Seen
    action: torch.Tensor  # (B,)
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


def gain(phi: torch.Tensor, next_phi: torch.Tensor, terminated: torch.Tensor, gamma: float) -> torch.Tensor:
    """gamma phi' - phi of potentials before and after each step (T, N). The potential after the end of a task is
    0, else it would pay to end the task, or not to end it. An episode that its time limit cuts counts as going on."""
    return gamma * (1 - terminated) * next_phi - phi


class Shaping:
    """Shaped rewards, and the scale of potentials: their deviation over a dataset or, as released, the deviation of
    their discounted sums so far."""

    def __init__(self, scale: float, num_envs: int):
        self.scale = scale
        self.carry, self.running_sum = torch.zeros(2, num_envs)  # carry: the last row of potentials of the last rollout
        self.mean, self.var, self.count = 0.0, 1.0, 1e-4

    def __call__(self, reward: torch.Tensor, phi: torch.Tensor, next_phi: torch.Tensor, terminated: torch.Tensor,
                 args: Args) -> tuple[torch.Tensor, torch.Tensor]:
        """Rewards, potentials and ends (T, N) of a rollout -> the rewards to learn, and what is added to them."""
        if args.shaping == "none":
            return args.ext_coef * reward, torch.zeros_like(reward)
        if args.shaping == "pbrs":
            added = args.shape_coef * gain(phi, next_phi, terminated, args.gamma) / self.scale
            return args.ext_coef * reward + added, added
        rows = torch.cat([self.carry.unsqueeze(0), phi])  # (T + 1, N)
        self.count_in(rows, args.gamma)
        rows = rows / self.scale  # the carried row for the second time, as released
        self.carry = rows[-1]
        added = args.shape_coef * (args.gamma * rows[1:] - rows[:-1])  # a step late, and over the ends of episodes
        return args.ext_coef * reward + added, added

    def count_in(self, rows: torch.Tensor, gamma: float) -> None:
        """Make the scale the deviation of the discounted running sums of all potentials so far (Chan et al. 1979)."""
        sums = []
        for row in rows:
            self.running_sum = self.running_sum * gamma + row
            sums.append(self.running_sum)
        batch = torch.stack(sums)  # (T + 1, N)
        total, shift = self.count + batch.numel(), float(batch.mean()) - self.mean
        squares = self.var * self.count + float(batch.var(correction=0)) * batch.numel()
        squares += shift ** 2 * self.count * batch.numel() / total
        self.mean, self.var, self.count = self.mean + shift * batch.numel() / total, squares / total, total
        self.scale = math.sqrt(self.var) + 1e-8

    def state_dict(self) -> dict:
        return dict(vars(self))

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state)


@torch.no_grad()
def collect(agent: Agent, vec: envs.VectorEnv, look: Callable, loop: dict, scalars: runtime.Means, past: Past,
            potential: Checked, shaping: Shaping, args: Args) -> Batch:
    """Play `num_steps` steps in every environment -> their transitions (T N, ...). `look` makes the agent's inputs
    from observations and potentials, `loop` has the present ones, `scalars` gets the returns of finished episodes,
    `past` has the histories that potentials read."""
    device = next(agent.parameters()).device
    noise = gumbel((args.num_steps, vec.num_envs, int(vec.action_space.n))).to(device)
    seen, steps = look(loop["obs"], loop["phi"]), []
    for t in range(args.num_steps):
        output = agent(seen)
        action = (output.log_probs + noise[t]).argmax(1)  # a draw from the policy
        log_prob = output.log_probs.gather(1, action.unsqueeze(1)).squeeze(1)
        obs, reward, terminated, truncated, info = vec.step(action.cpu().numpy())
        reward, ended = torch.from_numpy(reward).float(), torch.from_numpy(terminated | truncated)
        loop["open_return"] += reward
        for finished in loop["open_return"][ended]:
            scalars.add({"return": finished})
        loop["open_return"][ended] = 0.0
        final_obs, obs = envs.to_tensors(info["final_obs"]), envs.to_tensors(obs)
        next_phi = potential(past.step(action.cpu(), final_obs, obs, ended))
        rest = torch.zeros_like(reward)  # value of the last state, where a time limit cut the episode
        cut = torch.from_numpy(truncated & ~terminated)
        if args.bootstrap and cut.any():  # obs already belongs to the next episode, final_obs to this one
            final_value = agent(look(final_obs, next_phi)).value.cpu()
            rest[cut] = args.gamma * final_value[cut]
        task = (reward, loop["phi"], next_phi, torch.from_numpy(terminated).float(), rest)
        steps.append((seen, action, log_prob, output.value, task, ended.float().to(device)))
        loop["obs"], loop["phi"] = obs, next_phi
        if ended.any():  # a new episode has a new past
            loop["phi"] = torch.where(ended, potential(past.now), next_phi)
        seen = look(loop["obs"], loop["phi"])
    obs, action, log_prob, value, task, ended = tree_map(lambda *columns: torch.stack(columns), *steps)  # (T, N, ...)
    reward, phi, next_phi, terminated, rest = task
    reward, added = shaping(reward, phi, next_phi, terminated, args)
    advantage = gae((reward + rest).to(device), value, agent(seen).value, ended, args.gamma, args.gae_lambda)
    scalars.add({"phi": phi.mean(), "phi_deviation": phi.std(), "phi_scale": torch.tensor(shaping.scale),
                 "phi_invalid": torch.tensor(float(potential.invalid)), "shaping": added.mean(),
                 "shaping_size": added.abs().mean()})
    return tree_map(lambda x: x.flatten(0, 1), Batch(obs, action, log_prob, value, advantage, advantage + value))


def ppo_loss(agent: Agent, batch: Batch, args: Args) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss of a batch (Eq. 9), and scalars for the log."""
    output = agent(batch.obs)
    log_probs, value = output.log_probs, output.value
    log_ratio = log_probs.gather(1, batch.action.unsqueeze(1)).squeeze(1) - batch.log_prob
    ratio, advantage = log_ratio.exp(), batch.advantage
    if args.normalize_advantage:
        advantage = (advantage - advantage.mean()) / (advantage.std(correction=0) + 1e-8)
    policy_loss = -torch.min(ratio * advantage, ratio.clamp(1 - args.clip, 1 + args.clip) * advantage).mean()  # Eq. 7
    value_error = (value - batch.target_value).square()
    if args.clip_values:  # the larger of both errors: a value gains nothing by changing more than `clip`
        clipped_value = batch.value + (value - batch.value).clamp(-args.clip, args.clip)
        value_error = value_error.max((clipped_value - batch.target_value).square())
    value_loss = value_error.mean()
    entropy = -(log_probs.exp() * log_probs).sum(1).mean()
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
    args, saved = runtime.checked(args, ALGO, RANGES, anew=["env", "eval_select"])
    device = runtime.pick_device(args.device)

    vec = envs.make_vec(args.env, args.num_envs)
    shape, num_actions = envs.discrete_sizes(vec)  # (7, 7, 3): cells in view, or (f,): features; number of actions
    obs = vec.reset(10_000 * args.seed)  # environment i has stream 10,000 * seed + i; seeds share none
    example = envs.example_of(vec, obs)
    words = envs.action_words(args.env)
    given = "none" if args.shaping == "none" or args.evaluate else args.knowledge  # a trained policy needs none
    potential = potentials.load(given, args.env, envs.clauses, words, kept_in=args.resume)
    agent = Agent(shape, num_actions, args.critic_sees_phi).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, fused=True)
    past = Past(envs.to_tensors(obs), args.horizon, words.index("do nothing"))
    loop = {"obs": envs.to_tensors(obs), "open_return": torch.zeros(args.num_envs, dtype=torch.float64),
            "phi": potential(past.now)}
    shaping = Shaping(potentials.scale_of(potential, args.env, args.horizon), args.num_envs)
    scalars = runtime.Means()  # of updates and finished episodes since the last log
    parts = {"agent": agent, "optimizer": optimizer, "vec": vec, "loop": loop, "scalars": scalars, "past": past,
             "shaping": shaping}
    runtime.restore(parts, saved, only=["agent"] if args.evaluate else None)
    evaluator = envs.Evaluator(args, copies=100)

    def look(obs: dict[str, torch.Tensor], phi: torch.Tensor) -> Seen:
        """Observations and their potentials -> inputs of the agent."""
        return Seen(envs.seen(obs).to(device), phi.to(device))

    def policy(obs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Log-probabilities (B, A). The run exports this as policy.pt2. Only the critic may need phi."""
        view = envs.seen(obs)
        return agent(Seen(view.to(device), torch.zeros(view.shape[0], device=device))).log_probs.cpu()

    @torch.no_grad()
    def act(obs: envs.Observation) -> np.ndarray:
        """The actions of evaluations."""
        log_probs = evaluator.noted(policy(envs.to_tensors(obs)))
        if args.eval_select == "sample":
            log_probs = log_probs + gumbel(log_probs.shape, evaluator.generator)
        action = log_probs.argmax(1)
        return action.numpy()

    if args.evaluate:
        return evaluator.report(act, saved["step"])

    # train
    run = runtime.Run(ALGO, args, envs.resolve(args.env), saved, parts)
    potentials.keep(args.knowledge, args.env, run.folder)
    loss_of = runtime.compiled(ppo_loss, args.compile, device)
    if not saved:
        run.log_evaluation(evaluator.play(act))  # the untrained agent
    while run.advance(args.num_steps * args.num_envs):
        rollout = collect(agent, vec, look, loop, scalars, past, potential, shaping, args)
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
