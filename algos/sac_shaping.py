"""SAC with shaped rewards: SAC + HER whose reward also counts what a step gains of a potential.

A potential phi(s, g) says how far the task has come (`fetch.v4`: minus the steps still needed, by way of its
sub-goals). Shaping adds the gain of a step (Ng, Harada and Russell, 1999):

    r' = R(s', g) + shape_coef (gamma (1 - terminated) phi(s', g) - phi(s, g)),   g: any goal, hindsight ones as well

The buffer keeps plain rewards. The potential is evaluated when a batch is drawn, for the goals in that batch. For every
goal all values of a state move by the same amount, Q'(s, a, g) = Q(s, a, g) - shape_coef phi(s, g), so the ranking of
policies does not change. Two things make this exact: the potential after the end of a task is 0, and a transition cut
by a time limit, which bootstraps, counts with the potential of its last state. It also holds for wrong potentials,
though a noisy one may cost more time than a run has. Everything else is SAC: `diff algos/sac.py algos/sac_shaping.py`.
docs/forms_of_knowledge.md compares it with other forms.

python algos/sac_shaping.py --env FetchPickAndPlace-v2
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
from torch.utils._pytree import tree_map

import envs
import runtime
from buffers import Batch, ReplayBuffer
from knowledge import potentials
from knowledge.history import History
from networks import adam, adam_state, init_mlp, mlp

ALGO = Path(__file__).stem  # names run folders and result tables
LOG_EVERY = 1000  # environment steps


@dataclass
class Args:
    """SAC + HER with rewards that are shaped by a potential."""
    # twin: run arguments
    env: str = "FetchPickAndPlace-v2"  # environment id; an old Fetch id is replaced by the installed version
    seed: int = 1  # seed of all random numbers: networks, environments, exploration
    total_timesteps: int = 150_000  # environment steps, summed over environments; with --resume: a new total
    num_envs: int = 32  # environments stepped together
    eval_every: int = 10_000  # environment steps between evaluations; 0: only at start and end
    eval_episodes: int = 50  # episodes per evaluation; the last evaluation plays twice as many
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
    hidden: str = "256x3"  # hidden layers of actor and critics, width x depth
    batch_size: int = 512  # transitions per update
    buffer_size: int = 1_000_000  # transitions kept for replay
    learning_rate: float = 1e-3  # Adam, for actor, critics and temperature
    gamma: float = 0.95  # discount per step
    tau: float = 0.05  # Polyak step of the target critics, per update
    updates_per_step: float = 0.1  # updates per environment step
    her_goals: int = 4  # hindsight goals per real goal, on tasks with goals; 0: no HER
    initial_temperature: float = 1.0  # alpha at the start; then it is tuned to an entropy of -d (d: size of an action)
    random_actions: float = 0.2  # share of actions that are uniform, for exploration
    normalize: bool = True  # inputs normalised by running mean and deviation, clipped to +-5
    goal_range: float = 0.0  # Fetch, Franka: goals come from this many tenths of their range; 0: from all of it

    # method: reward shaping
    knowledge: str = "fetch.v4"  # potential: fetch.v4, your_file.py, your_file.py:function, none
    shape_coef: float = 1.0  # weight of the gain in potential; 0: no shaping


# RANGES: limits of numbers; all others must be above 0. TUNE: for `make tune`, (low, high) on a log scale, or choices
RANGES = {"gamma": (0, 1), "tau": (0, 1), "her_goals": (0, math.inf), "random_actions": (0, 1), "goal_range": (0, 10),
          "shape_coef": (0, math.inf)}
TUNE = {"learning_rate": (3e-4, 3e-3), "tau": (0.01, 0.1), "initial_temperature": (0.01, 1.0),
        "updates_per_step": (0.05, 0.5), "batch_size": [256, 512, 1024], "random_actions": [0.0, 0.1, 0.2, 0.3]}


def gaussian_policy(params: dict, obs: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Observations (B, f), Gaussian noise (B, d), 0 for the mean -> action tanh(u) (B, d), its log-probability (B,)."""
    mean, log_std = mlp(params, "actor", obs).chunk(2, -1)
    log_std = log_std.clamp(-20, 2)
    action = torch.tanh(mean + log_std.exp() * noise)
    log_prob = (-0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)  # log N(u; mean, std)
    return action, log_prob - torch.log(1 - action.square() + 1e-6).sum(-1)  # change of variables u -> tanh(u)


def draw_noise(batch: int, d: int, generator: torch.Generator | None = None) -> torch.Tensor:
    return torch.randn(batch, d, generator=generator)


class Decision(NamedTuple):
    action: torch.Tensor  # (B, d)
    log_prob: torch.Tensor  # (B,)


def decide(actor: dict, obs: torch.Tensor, noise: torch.Tensor, args: Args) -> Decision:
    """The action and its log-probability."""
    return Decision(*gaussian_policy(actor, obs, noise))


def as_history(obs: torch.Tensor, g: int) -> History:
    """Features (B, f) as potentials read them: the present moment of B episodes, without a past."""
    entries = envs.unflatten(obs, g) if g else {"observation": obs}
    return History({name: x.unsqueeze(1) for name, x in entries.items()}, torch.zeros(len(obs), 0),
                   torch.zeros(len(obs)))  # entries (B, 1, ...)


def shaped(reward: torch.Tensor, phi: torch.Tensor, next_phi: torch.Tensor, terminated: torch.Tensor, args: Args):
    """Rewards (B, 1), potentials (B,) before and after the step, ends (B, 1) -> shaped rewards (B, 1)."""
    gain = args.gamma * (1 - terminated) * next_phi.unsqueeze(1) - phi.unsqueeze(1)  # (B, 1)
    return reward + args.shape_coef * gain


def critic_inputs(obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
    return torch.cat([obs, action], 1)


def critic_loss(critic: dict, inputs: torch.Tensor, target_q: torch.Tensor) -> torch.Tensor:
    return 0.5 * (mlp(critic, "q", inputs).squeeze(-1) - target_q).square().mean(1).sum()  # (2, B): two critics


def actor_loss(actor: dict, critic: dict, alpha: torch.Tensor, obs: torch.Tensor, noise: torch.Tensor, args: Args):
    decision = decide(actor, obs, noise, args)
    q = mlp(critic, "q", critic_inputs(obs, decision.action)).squeeze(-1).amin(0)  # (B,)
    return (alpha * decision.log_prob - q).mean(), (decision, q)


def make_agent(args: Args, f: int, d: int, device: torch.device) -> dict:
    """Fresh parameters and optimiser state."""
    hidden = runtime.hidden_layers(args.hidden)
    critic = init_mlp("q", [f + d, *hidden, 1], stack=(2,))
    actor = init_mlp("actor", [f, *hidden, 2 * d])
    trained = {"actor": actor, "critic": critic,
               "temperature": {"log_alpha": torch.tensor(math.log(args.initial_temperature))}}
    moments = {group: adam_state(params) for group, params in trained.items()}
    target = {name: p.clone() for name, p in critic.items()}
    return tree_map(lambda x: x.to(device), trained | {"target": target, "moments": moments, "count": torch.zeros(())})


def update(agent: dict, batch: Batch, noise: torch.Tensor, next_noise: torch.Tensor, args: Args) -> dict:
    """One step of critics, actor, temperature and targets, in this order, on normalised transitions. Changes `agent` in
    place, returns what is logged."""
    actor, critic, target, moments, count = (agent[k] for k in ("actor", "critic", "target", "moments", "count"))
    alpha, d = agent["temperature"]["log_alpha"].exp(), batch.action.shape[1]  # alpha before its step below
    count += 1

    following = decide(actor, batch.next_obs, next_noise, args)
    next_q = mlp(target, "q", critic_inputs(batch.next_obs, following.action)).squeeze(-1).amin(0)  # (B,)
    next_value = next_q - alpha * following.log_prob
    target_q = batch.reward[:, 0] + args.gamma * (1 - batch.terminated[:, 0]) * next_value  # a time limit bootstraps
    grads, q_loss = torch.func.grad_and_value(critic_loss)(critic, critic_inputs(batch.obs, batch.action), target_q)
    adam(critic, grads, moments["critic"], count, args.learning_rate)

    grads, (pi_loss, (decision, q)) = torch.func.grad_and_value(actor_loss, has_aux=True)(
        actor, critic, alpha, batch.obs, noise, args)
    adam(actor, grads, moments["actor"], count, args.learning_rate)
    grads = {"log_alpha": d - decision.log_prob.mean()}  # of -log_alpha (log_prob - d): target entropy -d
    adam(agent["temperature"], grads, moments["temperature"], count, args.learning_rate)
    torch._foreach_lerp_(list(target.values()), list(critic.values()), args.tau)
    return {"critic_loss": q_loss, "actor_loss": pi_loss, "q": q.mean(), "alpha": alpha,
            "entropy": -decision.log_prob.mean()}


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
    f, d, g = envs.continuous_sizes(vec)  # sizes of features, action and goal (0: no goals)
    obs = vec.reset(10_000 * args.seed)  # environment i has stream 10,000 * seed + i; seeds share none
    example = envs.example_of(vec, obs)
    potential = potentials.load(args.knowledge, args.env, envs.clauses, (), kept_in=args.resume or args.evaluate)
    potential(as_history(envs.flatten(obs), g))  # an unfit one raises an error, before a run folder is made
    if potential.invalid == args.num_envs and not saved:  # what is no number counts as 0, so this would be SAC
        raise runtime.UserError(f"potential {args.knowledge} gives no number in any of the first {args.num_envs} "
                                "states; correct it")
    agent = make_agent(args, f, d, device)
    normalizer = envs.Normalizer(f, args.normalize)
    buffer, relabelled = make_buffer(args, vec, f, d, g)
    loop = {"obs": envs.flatten(obs), "updates_owed": 0.0}
    scalars = runtime.Means()  # since the last log
    parts = {"agent": agent, "normalizer": normalizer, "vec": vec, "buffer": buffer, "loop": loop, "scalars": scalars}
    runtime.restore(parts, saved, only=["agent", "normalizer"] if args.evaluate else None)
    evaluator = envs.Evaluator(args, goal_range=args.goal_range)

    def look(obs: torch.Tensor) -> torch.Tensor:
        """Features (B, f) -> inputs of the networks."""
        return normalizer(obs)

    def choose(obs: torch.Tensor, noise: torch.Tensor) -> Decision:
        inputs = tree_map(lambda x: x.to(device), (look(obs), noise))
        return tree_map(lambda x: x.cpu(), decide(agent["actor"], *inputs, args))

    def policy(obs: torch.Tensor | dict[str, torch.Tensor]) -> torch.Tensor:
        """The mean action (B, d). The run exports this as policy.pt2."""
        return choose(envs.flatten(obs), torch.zeros(d)).action

    def act(obs: envs.Observation) -> np.ndarray:
        """The actions of evaluations."""
        return vec.to_box(policy(obs).numpy())

    if args.evaluate:
        return evaluator.report(act, saved["step"])

    # train
    run = runtime.Run(ALGO, args, envs.resolve(args.env), saved, parts)
    potentials.keep(args.knowledge, args.env, run.folder)
    learn = runtime.compiled(update, args.compile, device)
    if not saved:
        run.log_evaluation(evaluator.play(act))  # the untrained agent
    while run.advance(args.num_envs):
        learning, obs = buffer.stored >= args.batch_size, loop["obs"]
        action = 2 * torch.rand(args.num_envs, d) - 1
        if learning:
            decision = choose(obs, draw_noise(args.num_envs, d))
            explore = torch.rand(args.num_envs, 1) < args.random_actions
            action = torch.where(explore, action, decision.action)
        next_obs, reward, terminated, truncated, info = vec.step(vec.to_box(action.numpy()))

        # store: where an episode ended, final_obs is its last observation, and next_obs the first of the next episode
        buffer.add(obs, action, reward, terminated, truncated, envs.flatten(info["final_obs"]))
        normalizer.add(obs)
        loop["obs"] = envs.flatten(next_obs)

        # update
        if learning:
            loop["updates_owed"] += args.num_envs * args.updates_per_step
        while loop["updates_owed"] >= 1:
            loop["updates_owed"] -= 1
            batch = buffer.sample(args.batch_size, relabelled)
            phi, next_phi = (potential(as_history(x, g)) for x in (batch.obs, batch.next_obs))  # for the batch's goals
            batch = batch._replace(reward=shaped(batch.reward, phi, next_phi, batch.terminated, args))
            scalars.add({"phi": phi.mean(), "phi_invalid": torch.tensor(float(potential.invalid))})
            batch = batch._replace(obs=look(batch.obs), next_obs=look(batch.next_obs))
            inputs = (batch, draw_noise(args.batch_size, d), draw_noise(args.batch_size, d))
            scalars.add(learn(agent, *tree_map(lambda x: x.to(device), inputs), args))

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
