"""PPO-RND: PPO with a second reward for what is new to the agent, and the collector of experience without a task.

Burda et al., "Exploration by Random Network Distillation" (arXiv 1810.12894), as Zhang et al. (arXiv 2407.03964) use
it. A predictor learns the output of a fixed random network, `target`. Its error on the next observation z is curiosity:

    c = 1/2 |target(z) - predictor(z)|^2,   advantage = int_coef A_int + ext_coef A_ext

A_int is estimated from c and a value of its own, and flows on over the ends of episodes. c is divided by the running
deviation of its discounted sum; the advantage is normalised by its running mean and deviation. Departures: networks are
small, as those of ppo.py, and a time limit bootstraps. With --collect, episodes of the policy are kept at every
evaluation, from nearly random to skilful ones: stage one of background knowledge (docs/background_knowledge.md).

python algos/ppo_rnd.py --env BabyAI-Text-GoTo-RedBallBlueBox-S20
python algos/ppo_rnd.py --env BabyAI-Text-GoToLocal-Pretraining-S20 --eval-every 30000 --collect 10
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
from knowledge.dataset import Recorder

ALGO = Path(__file__).stem  # names run folders and result tables
LOG_EVERY = 10_000  # environment steps
WIDTH = 64  # of the encoder's output and of all hidden layers
PREDICTED = 0.25  # share of a batch from which the predictor learns, so that it does not learn too fast


@dataclass
class Args:
    """PPO with random network distillation (RND)."""
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
    epochs: int = 4  # passes over an iteration's transitions
    batch_size: int = 256  # transitions per update
    learning_rate: float = 1e-3  # Adam, constant
    gamma: float = 0.99  # discount per step
    gae_lambda: float = 0.95  # lambda of the advantage estimate (GAE)
    clip: float = 0.2  # range of the probability ratio, and of the change of values
    clip_values: bool = True  # also clip the change of values: right for returns near 1, slow for larger ones
    normalize_advantage: bool = False  # shift and scale the advantages of a batch to mean 0 and deviation 1
    entropy_coef: float = 0.01  # weight of the entropy bonus
    value_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # the gradient of all parameters is clipped to this norm
    bootstrap: bool = True  # at a time limit, add the value of the last state to the return
    eval_select: Literal["sample", "argmax"] = "sample"  # evaluations draw actions, or take the most likely ones

    # method: curiosity
    int_coef: float = 1.0  # weight of the advantage from curiosity
    ext_coef: float = 2.0  # weight of the advantage from the task's reward
    int_gamma: float = 0.99  # discount per step of curiosity
    collect: int = 0  # episodes to keep at every evaluation, as dataset/ in the run folder; 0: none


# RANGES: limits of numbers; all others must be above 0. TUNE: for `make tune`, (low, high) on a log scale, or choices
RANGES = {"gamma": (0, 1), "gae_lambda": (0, 1), "entropy_coef": (0, math.inf), "value_coef": (0, math.inf),
          "int_coef": (0, math.inf), "ext_coef": (0, math.inf), "int_gamma": (0, 1), "collect": (0, math.inf)}
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


Seen = torch.Tensor  # what the agent sees: 7x7 cells (B, 7, 7, 3) or features (B, f)


class Output(NamedTuple):
    log_probs: torch.Tensor  # (B, A), of the actions
    value: torch.Tensor  # (B,), of the state
    int_value: torch.Tensor  # (B,), of the state: the discounted curiosity to come


class Agent(nn.Module):
    """Actor and critic with a common encoder."""

    def __init__(self, shape: tuple[int, ...], num_actions: int):
        super().__init__()

        def encoder() -> nn.Module:
            return ENCODERS[shape[0]]() if len(shape) == 3 else nn.Sequential(linear(shape[0], WIDTH), nn.Tanh())

        self.encoder = encoder()
        self.critic = nn.Sequential(linear(WIDTH, WIDTH), nn.Tanh(), linear(WIDTH, 1))
        self.int_critic = nn.Sequential(linear(WIDTH, WIDTH), nn.Tanh(), linear(WIDTH, 1))
        self.trunk = nn.Sequential(linear(WIDTH, WIDTH), nn.Tanh())
        self.actor = linear(WIDTH, num_actions)
        self.target = nn.Sequential(encoder(), linear(WIDTH, WIDTH)).requires_grad_(False)
        self.predictor = nn.Sequential(encoder(), linear(WIDTH, WIDTH), nn.ReLU(), linear(WIDTH, WIDTH))

    def forward(self, obs: Seen) -> Output:
        x = self.encoder(obs)  # (B, 64)
        logits = self.actor(self.trunk(x))  # (B, A)
        return Output(torch.log_softmax(logits, -1), self.critic(x).squeeze(1), self.int_critic(x).squeeze(1))

    def curiosity(self, z: Seen) -> torch.Tensor:
        """Normalised observations (B, ...) -> c (B,)."""
        z = 255 * z if z.shape[1:] == (64, 64, 3) else z  # the encoder of pictures divides by 255
        return 0.5 * (self.target(z) - self.predictor(z)).square().sum(1)


class Batch(NamedTuple):
    """Transitions of a rollout."""
    obs: Seen
    action: torch.Tensor  # (B,)
    log_prob: torch.Tensor  # (B,), of the action, by the policy that took it
    value: torch.Tensor  # (B,), of the observation, by the critic during the rollout
    advantage: torch.Tensor  # (B,)
    target_value: torch.Tensor  # (B,), target of the critic
    target_int_value: torch.Tensor  # (B,)
    z: Seen  # the next observation, normalised


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


class Running:
    """Mean and deviation of all numbers so far (Chan et al. 1979)."""

    def __init__(self):
        self.mean, self.var, self.count = 0.0, 1.0, 1e-4

    def add(self, x: torch.Tensor) -> float:
        """Take in the numbers `x`; returns the deviation."""
        total, shift = self.count + x.numel(), float(x.mean()) - self.mean
        squares = self.var * self.count + float(x.var(correction=0)) * x.numel()
        squares += shift ** 2 * self.count * x.numel() / total
        self.mean, self.var, self.count = self.mean + shift * x.numel() / total, squares / total, total
        return math.sqrt(self.var) + 1e-8


class Curiosity:
    """Running statistics: of observations, of the discounted sums of curiosity, and of advantages."""

    def __init__(self, shape: tuple[int, ...], num_envs: int):
        self.seen, self.sums, self.advantages = envs.Normalizer(math.prod(shape)), Running(), Running()
        self.running_sum = torch.zeros(num_envs)

    def normalise(self, view: Seen, clip: float) -> Seen:
        """z (B, ...), within +-clip."""
        mean, deviation = (x.to(view.device) for x in self.seen.stats())
        return ((view.flatten(1) - mean) / deviation).clamp(-clip, clip).view(view.shape)

    def scaled(self, curiosity: torch.Tensor, gamma: float) -> torch.Tensor:
        """Curiosity (T, N) of a rollout, by the deviation of its discounted sums."""
        sums = []
        for row in curiosity:
            self.running_sum = self.running_sum.to(row.device) * gamma + row
            sums.append(self.running_sum)
        return curiosity / self.sums.add(torch.stack(sums))

    def state_dict(self) -> dict:
        return {"seen": self.seen.state_dict(), "sums": vars(self.sums), "advantages": vars(self.advantages),
                "running_sum": self.running_sum}

    def load_state_dict(self, state: dict) -> None:
        self.seen.load_state_dict(state["seen"])
        vars(self.sums).update(state["sums"])
        vars(self.advantages).update(state["advantages"])
        self.running_sum = state["running_sum"]


@torch.no_grad()
def collect(agent: Agent, vec: envs.VectorEnv, look: Callable, loop: dict, scalars: runtime.Means, curious: Curiosity,
            args: Args) -> Batch:
    """Play `num_steps` steps in every environment -> their transitions (T N, ...). `look` makes the agent's inputs
    from observations, `loop` has the present ones, `scalars` gets returns of finished episodes, `curious` scales."""
    device = next(agent.parameters()).device
    noise = gumbel((args.num_steps, vec.num_envs, int(vec.action_space.n))).to(device)
    seen, steps = look(loop["obs"]), []
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
        cut = torch.from_numpy(truncated & ~terminated)
        if args.bootstrap and cut.any():  # obs already belongs to the next episode, final_obs to this one
            final_value = agent(look(envs.to_tensors(info["final_obs"]))).value.cpu()
            reward[cut] += args.gamma * final_value[cut]
        before, loop["obs"] = seen, envs.to_tensors(obs)
        seen = look(loop["obs"])
        z = curious.normalise(seen, clip=5)  # where an episode ended, z is the start of the next one, as released
        values = (output.value, output.int_value)
        steps.append((before, action, log_prob, values, reward.to(device), ended.float().to(device), seen,
                      agent.curiosity(z)))
    obs, action, log_prob, values, reward, ended, following, curiosity = tree_map(
        lambda *columns: torch.stack(columns), *steps)  # (T, N, ...)
    last, (value, int_value) = agent(seen), values
    curiosity = curious.scaled(curiosity, args.int_gamma)
    ext = gae(reward, value, last.value, ended, args.gamma, args.gae_lambda)
    internal = gae(curiosity, int_value, last.int_value, torch.zeros_like(ended), args.int_gamma, args.gae_lambda)
    advantage = args.int_coef * internal + args.ext_coef * ext
    deviation = curious.advantages.add(advantage)
    advantage = (advantage - curious.advantages.mean) / deviation
    z = curious.normalise(following.flatten(0, 1), clip=math.inf).view(following.shape)
    curious.seen.add(following.flatten(0, 1).flatten(1).cpu())
    batch = Batch(obs, action, log_prob, value, advantage, ext + value, internal + int_value, z)
    return tree_map(lambda x: x.flatten(0, 1), batch)


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
    value_loss = value_error.mean() + (output.int_value - batch.target_int_value).square().mean()
    learns = torch.rand(len(value), device=value.device) < PREDICTED
    curiosity = agent.curiosity(batch.z)
    predictor_loss = 2 * (curiosity * learns).sum() / learns.sum().clamp(min=1) / WIDTH  # mean squared error
    entropy = -(log_probs.exp() * log_probs).sum(1).mean()
    loss = policy_loss - args.entropy_coef * entropy + args.value_coef * value_loss + predictor_loss
    scalars = {"policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy, "value": value.mean(),
               "clip_fraction": ((ratio - 1).abs() > args.clip).float().mean(),
               "approx_kl": (ratio - 1 - log_ratio).mean(), "predictor_loss": predictor_loss,
               "curiosity": curiosity.mean()}
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
    if args.collect:
        envs.captions(obs)  # raises EnvError for tasks without captions
    agent = Agent(shape, num_actions).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, fused=True)
    loop = {"obs": envs.to_tensors(obs), "open_return": torch.zeros(args.num_envs, dtype=torch.float64)}
    scalars = runtime.Means()  # of updates and finished episodes since the last log
    curious, recorder = Curiosity(shape, args.num_envs), Recorder()
    parts = {"agent": agent, "optimizer": optimizer, "vec": vec, "loop": loop, "scalars": scalars, "curious": curious,
             "recorder": recorder}
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
    loss_of = runtime.compiled(ppo_loss, args.compile, device)
    if not saved:
        run.log_evaluation(evaluator.play(act))  # the untrained agent
        recorder.play(evaluator.vec, act, args.collect, 10_000 * args.seed + 8_000, envs.captions)
    while run.advance(args.num_steps * args.num_envs):
        rollout = collect(agent, vec, look, loop, scalars, curious, args)
        for _ in range(args.epochs):
            for index in torch.randperm(len(rollout.action)).to(device).split(args.batch_size):
                batch = tree_map(lambda x: x[index], rollout)
                scalars.add(update(agent, optimizer, loss_of, batch, args))

        # log, evaluate, save
        if run.due(LOG_EVERY):
            run.log(scalars.take())
        if run.due(args.eval_every) or run.over:
            run.log_evaluation(evaluator.play(act))
            first = 10_000 * args.seed + 8_000 + len(recorder.episodes)
            recorder.play(evaluator.vec, act, args.collect, first, envs.captions)
        run.save_if_due()
    run.finish(example, policy=policy)
    if args.collect:
        recorder.save(run.folder / "dataset", args.env, envs.action_words(args.env), by=ALGO, seed=args.seed)
    evaluator.film(act, run.folder)
    return run.result


if __name__ == "__main__":
    with runtime.exit_codes(ALGO):
        main(runtime.cli(Args, ALGO))
