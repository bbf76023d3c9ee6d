"""LESR: TD3 that sees state features and earns an intrinsic reward, both written by a language model.

Wang et al., "LLM-Empowered State Representation for Reinforcement Learning" (ICML 2024, arXiv 2407.13237). A language
model reads a description of the task and writes two functions: F(s) = [s, features], and G(F(s)), a number.

    the agent sees F(s), is trained on r + w G(F(s)), and is evaluated by r alone

`diff algos/td3.py algos/lesr.py` is all of it. After a run the model is told two things: the agent's return, and for
every number in F(s) how steeply the reward changes with it. That is an estimate of a Lipschitz constant, and stands in
lipschitz.csv of the run folder. A low constant means a smooth reward, which is easier to learn.

The pairs of functions that ship are the authors' best ones; `python -m llm.lesr` asks a model for others. Departures:
those of td3.py, and the list in docs/lesr.md.

python algos/lesr.py --env Hopper-v4
"""
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import start  # noqa: F401  before numpy

import numpy as np
import torch
from torch.utils._pytree import tree_map

import envs
import runtime
from buffers import Batch, ReplayBuffer
from errors import UserError
from knowledge.features import keep_features, load_features
from networks import adam, adam_state, init_mlp, mlp

ALGO = Path(__file__).stem  # names run folders and result tables
LOG_EVERY = 1000  # environment steps
LONGEST = 1000  # steps after which an episode without a time limit is cut, to measure its slopes
NOISE_CLIP = 0.5  # bound of the noise on the actions of targets (TD3's paper: c)


@dataclass
class Args:
    """TD3 on state features and an intrinsic reward (LESR)."""
    # twin: run arguments
    env: str = "Hopper-v4"  # environment id; an old Fetch id is replaced by the installed version
    seed: int = 1  # seed of all random numbers: networks, environments, exploration
    total_timesteps: int = 300_000  # environment steps, summed over environments; with --resume: a new total
    num_envs: int = 1  # environments stepped together
    eval_every: int = 10_000  # environment steps between evaluations; 0: only at start and end
    eval_episodes: int = 10  # episodes per evaluation; the last evaluation plays twice as many
    checkpoint_every: int = 50_000  # environment steps between checkpoints; 0: only at the end
    video: int = 0  # episodes to film after training, or with --evaluate
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where the networks run; auto: on a GPU if there is one
    compile: bool = True  # compile the update into one graph: about 30 s at the first start, then up to twice as fast
    run_dir: str = ""  # run folder; empty: runs/<algo>/<env>/seed<k>-<time>
    resume: str = ""  # run folder to continue exactly, with its own arguments
    evaluate: str = ""  # run folder to evaluate; no training
    track: bool = False  # also log scalars to Weights & Biases (pip install wandb)
    # twin end

    # algorithm
    hidden: str = "256x2"  # hidden layers of actor and critics, width x depth (TD3's paper: 400 and 300)
    batch_size: int = 256  # transitions per update (TD3's paper: 100)
    buffer_size: int = 1_000_000  # transitions kept for replay
    learning_rate: float = 3e-4  # Adam, for actor and critics (TD3's paper: 1e-3)
    gamma: float = 0.99  # discount per step
    tau: float = 0.005  # Polyak step of the target networks, per update
    updates_per_step: float = 1.0  # updates per environment step
    learning_starts: int = 5_000  # environment steps with uniform actions, before the first update
    exploration_noise: float = 0.1  # deviation of the noise on actions in [-1, 1]
    policy_noise: float = 0.2  # deviation of the noise on the actions of targets
    policy_delay: int = 2  # updates of the critics per update of actor and targets
    her_goals: int = 0  # hindsight goals per real goal, on tasks with goals and --features none; 0: no HER
    normalize: bool = False  # inputs normalised by running mean and deviation, clipped to +-5
    goal_range: float = 0.0  # Fetch, Franka: goals come from this many tenths of their range; 0: from all of it

    # method: LESR
    features: str = "auto"  # auto, none, your_file.py, llm:<file>: functions revise_state and intrinsic_reward
    intrinsic_weight: float = 0.02  # w; with it w G is a few hundredths of the reward; 0: features alone
    see_features: bool = True  # whether the agent sees the features; else it only gets their reward


# RANGES: limits of numbers; all others must be above 0. TUNE: for `make tune`, (low, high) on a log scale, or choices
RANGES = {"gamma": (0, 1), "tau": (0, 1), "learning_starts": (0, math.inf), "exploration_noise": (0, math.inf),
          "policy_noise": (0, math.inf), "her_goals": (0, math.inf), "goal_range": (0, 10),
          "intrinsic_weight": (0, math.inf)}
TUNE = {"learning_rate": (1e-4, 3e-3), "tau": (0.001, 0.05), "exploration_noise": [0.05, 0.1, 0.2],
        "updates_per_step": [0.25, 0.5, 1.0], "batch_size": [128, 256, 512]}


def lipschitz(x: torch.Tensor, reward: torch.Tensor) -> torch.Tensor:
    """How steeply the rewards (n,) of an episode change with each number of its states (n, d): the largest slope
    between neighbours in the order of that number, (d,). 0.01 in the denominator bounds it."""
    x, order = x.double().sort(dim=0, stable=True)
    rise = reward.double()[order].diff(dim=0).abs()  # (n - 1, d)
    slopes = rise / (x.diff(dim=0).abs() + 0.01)
    return slopes.amax(0) if len(slopes) else torch.zeros(x.shape[1], dtype=torch.float64)


class Smoothness:
    """A running mean of `lipschitz` over the episodes of training."""
    RATE = 0.005  # of the running mean

    def __init__(self, num_envs: int, limit: int, d: int):
        """`limit`: steps; a longer episode counts as several."""
        self.open = torch.zeros(num_envs, limit, d + 1)  # states and rewards of open episodes
        self.lengths = torch.zeros(num_envs, dtype=torch.long)
        self.constants = torch.zeros(d, dtype=torch.float64)
        self.episodes = 0

    def add(self, x: torch.Tensor, reward: np.ndarray, ended: np.ndarray) -> None:
        """One step of every environment: revised states (num_envs, d), rewards and ends (num_envs,)."""
        row = torch.cat([x, torch.from_numpy(reward).float()[:, None]], 1)
        self.open[torch.arange(len(x)), self.lengths] = row
        self.lengths += 1
        full = (self.lengths == self.open.shape[1]).numpy()
        for i in (ended | full).nonzero()[0].tolist():
            episode = self.open[i, :self.lengths[i]]
            self.constants += self.RATE * (lipschitz(episode[:, :-1], episode[:, -1]) - self.constants)
            self.episodes += 1
            self.lengths[i] = 0

    def write(self, path: Path) -> None:
        """A row per number of the revised state. `unbiased`: as if the mean had not begun at 0."""
        scale = 1 - (1 - self.RATE) ** self.episodes if self.episodes else 1.0
        rows = [f"{i},{c:.6g},{c / scale:.6g}" for i, c in enumerate(self.constants.tolist())]
        path.write_text("\n".join(["number,lipschitz,unbiased", *rows]) + "\n")


def log_rewards(scalars: runtime.Means, sums: torch.Tensor, reward: np.ndarray, intrinsic: np.ndarray,
                ended: np.ndarray, args: Args) -> None:
    """Add one step's r and G, both (num_envs,), and their sizes to `scalars`; where an episode ended, also the size of
    its sum of w G, as a share of that of its sum of r. `sums` (num_envs, 2) has both sums of the open episodes."""
    means = torch.from_numpy(np.stack([reward, intrinsic, np.abs(reward), np.abs(intrinsic)]).mean(1))  # (4,)
    scalars.add(dict(zip(("reward", "intrinsic_reward", "abs_reward", "abs_intrinsic_reward"), means.unbind())))
    sums += torch.from_numpy(np.stack([reward, args.intrinsic_weight * intrinsic], 1))  # (num_envs, 2)
    if ended.any():
        for r, added in sums[ended].abs().tolist():
            scalars.add({"intrinsic_share": torch.tensor(added / (r + 1e-5))})
        sums[ended] = 0.0


def decide(actor: dict, obs: torch.Tensor) -> torch.Tensor:
    """Observations (B, f) -> actions (B, d) in [-1, 1]."""
    return torch.tanh(mlp(actor, "actor", obs))


def critic_inputs(obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
    return torch.cat([obs, action], 1)


def critic_loss(critic: dict, inputs: torch.Tensor, target_q: torch.Tensor) -> torch.Tensor:
    return (mlp(critic, "q", inputs).squeeze(-1) - target_q).square().mean(1).sum()  # (2, B): two critics


def actor_loss(actor: dict, critic: dict, obs: torch.Tensor, args: Args) -> torch.Tensor:
    first = {name: p[0] for name, p in critic.items()}  # the first of the two critics
    return -mlp(first, "q", critic_inputs(obs, decide(actor, obs))).mean()


def make_agent(args: Args, f: int, d: int, device: torch.device) -> dict:
    """Fresh parameters, their target copies and optimiser state."""
    hidden = runtime.hidden_layers(args.hidden)
    critic = init_mlp("q", [f + d, *hidden, 1], stack=(2,))
    actor = init_mlp("actor", [f, *hidden, d])
    trained = {"actor": actor, "critic": critic}
    moments = {group: adam_state(params) for group, params in trained.items()}
    target = {name: p.clone() for name, p in (actor | critic).items()}
    count = {group: torch.zeros(()) for group in trained}  # steps of each optimiser
    return tree_map(lambda x: x.to(device), trained | {"target": target, "moments": moments, "count": count})


def update(agent: dict, batch: Batch, noise: torch.Tensor, whole: bool, args: Args) -> dict:
    """One step of the critics on normalised transitions and, if `whole`, of actor and target networks. Changes `agent`
    in place, returns what is logged."""
    actor, critic, target, moments, count = (agent[k] for k in ("actor", "critic", "target", "moments", "count"))

    noise = (args.policy_noise * noise).clamp(-NOISE_CLIP, NOISE_CLIP)
    next_action = (decide(target, batch.next_obs) + noise).clamp(-1, 1)
    next_q = mlp(target, "q", critic_inputs(batch.next_obs, next_action)).squeeze(-1).amin(0)  # (B,)
    target_q = batch.reward[:, 0] + args.gamma * (1 - batch.terminated[:, 0]) * next_q  # a time limit bootstraps
    grads, q_loss = torch.func.grad_and_value(critic_loss)(critic, critic_inputs(batch.obs, batch.action), target_q)
    count["critic"] += 1
    adam(critic, grads, moments["critic"], count["critic"], args.learning_rate)
    scalars = {"critic_loss": q_loss, "target_q": target_q.mean()}
    if not whole:
        return scalars

    grads, pi_loss = torch.func.grad_and_value(actor_loss)(actor, critic, batch.obs, args)
    count["actor"] += 1
    adam(actor, grads, moments["actor"], count["actor"], args.learning_rate)
    torch._foreach_lerp_([target[name] for name in (actor | critic)], [*actor.values(), *critic.values()], args.tau)
    return scalars | {"actor_loss": pi_loss, "q": -pi_loss}


def make_buffer(args: Args, vec: envs.VectorEnv, f: int, d: int, g: int) -> tuple[ReplayBuffer, int]:
    """An empty buffer, and how many transitions of a batch get a hindsight goal."""
    relabelled = int(args.batch_size * args.her_goals / (args.her_goals + 1)) if g else 0
    horizon = envs.time_limit_of(vec) if relabelled else 1  # hindsight stores whole episodes
    capacity = min(args.buffer_size, args.total_timesteps + args.num_envs)  # the last step may go beyond the total
    return ReplayBuffer(capacity, horizon, args.num_envs, f, d, g, vec.compute_reward), relabelled


@torch.no_grad()  # gradients are taken by torch.func, inside `update`
def main(args: Args) -> dict[str, float]:
    """Train, resume or evaluate, as `args` say; returns the last evaluation (keys: runtime.EVALUATION)."""
    args, saved = runtime.checked(args, ALGO, RANGES, anew=["goal_range"])
    device = runtime.pick_device(args.device, fast_matmul=True)
    vec = envs.make_vec(args.env, args.num_envs, threads=torch.get_num_threads(), goal_range=args.goal_range)
    n, d, g = envs.continuous_sizes(vec)  # sizes of state, action and goal (0: no goals)
    if g and args.her_goals and args.features != "none":
        raise UserError(f"--her-goals {args.her_goals}: hindsight changes goals, and stored features of {args.env} keep "
                        "the old ones; use --her-goals 0")
    obs = vec.reset(10_000 * args.seed)  # environment i has stream 10,000 * seed + i; seeds share none
    example = envs.example_of(vec, obs)
    features = load_features(args.features, envs.resolve(args.env), envs.flatten(obs), args.resume or args.evaluate)
    revised = features.revise(envs.flatten(obs))
    f = revised.shape[1] if args.see_features else n
    agent = make_agent(args, f, d, device)
    normalizer = envs.Normalizer(f, args.normalize)
    buffer, relabelled = make_buffer(args, vec, f, d, g)
    smoothness = Smoothness(args.num_envs, vec.max_episode_steps or LONGEST, revised.shape[1])
    loop = {"revised": revised, "updates_owed": 0.0, "updates": 0, "sums": torch.zeros(args.num_envs, 2)}
    scalars = runtime.Means()  # since the last log
    parts = {"agent": agent, "normalizer": normalizer, "vec": vec, "buffer": buffer, "loop": loop, "scalars": scalars,
             "smoothness": vars(smoothness)}
    runtime.restore(parts, saved, only=["agent", "normalizer"] if args.evaluate else None)
    evaluator = envs.Evaluator(args, goal_range=args.goal_range)

    def look(obs: torch.Tensor) -> torch.Tensor:
        """Features (B, f) -> inputs of the networks."""
        return normalizer(obs)

    def choose(obs: torch.Tensor) -> torch.Tensor:
        return decide(agent["actor"], look(obs).to(device)).cpu()

    def policy(obs: torch.Tensor | dict[str, torch.Tensor]) -> torch.Tensor:
        """The action without noise (B, d). The run exports this as policy.pt2."""
        return choose(features.revise(envs.flatten(obs))[:, :f])

    def act(obs: envs.Observation) -> np.ndarray:
        """The actions of evaluations."""
        return vec.to_box(policy(obs).numpy())

    if args.evaluate:
        return evaluator.report(act, saved["step"])

    # train
    run = runtime.Run(ALGO, args, envs.resolve(args.env), saved, parts)
    keep_features(args.features, run.folder)
    learn = runtime.compiled(update, args.compile, device)
    if not saved:
        run.log_evaluation(evaluator.play(act))  # the untrained agent
    while run.advance(args.num_envs):
        learning, obs = run.step > args.learning_starts and buffer.stored >= args.batch_size, loop["revised"][:, :f]
        action = 2 * torch.rand(args.num_envs, d) - 1
        if learning:
            noise = args.exploration_noise * torch.randn(args.num_envs, d)
            action = (choose(obs) + noise).clamp(-1, 1)
        next_obs, reward, terminated, truncated, info = vec.step(vec.to_box(action.numpy()))

        # store: where an episode ended, final_obs is its last observation, and next_obs the first of the next episode
        intrinsic = features.reward(loop["revised"]).numpy()  # of the state in which the action was chosen
        final = features.revise(envs.flatten(info["final_obs"]))
        buffer.add(obs, action, reward + args.intrinsic_weight * intrinsic, terminated, truncated, final[:, :f])
        smoothness.add(loop["revised"], reward, terminated | truncated)
        normalizer.add(obs)
        loop["revised"] = features.revise(envs.flatten(next_obs)) if (terminated | truncated).any() else final

        # update
        if learning:
            loop["updates_owed"] += args.num_envs * args.updates_per_step
        while loop["updates_owed"] >= 1:
            loop["updates_owed"] -= 1
            batch = buffer.sample(args.batch_size, relabelled)
            batch = batch._replace(obs=look(batch.obs), next_obs=look(batch.next_obs))
            loop["updates"] += 1
            inputs = tree_map(lambda x: x.to(device), (batch, torch.randn(args.batch_size, d)))
            scalars.add(learn(agent, *inputs, loop["updates"] % args.policy_delay == 0, args))

        # log, evaluate, save
        log_rewards(scalars, loop["sums"], reward, intrinsic, terminated | truncated, args)
        if run.due(LOG_EVERY):
            run.log(scalars.take())
        if run.due(args.eval_every) or run.over:
            run.log_evaluation(evaluator.play(act, twice=run.over))
        run.save_if_due()
    run.finish(example, policy=policy)
    smoothness.write(run.folder / "lipschitz.csv")
    evaluator.film(act, run.folder)
    return run.result


if __name__ == "__main__":
    with runtime.exit_codes(ALGO):
        main(runtime.cli(Args, ALGO))
