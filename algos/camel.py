"""CAMEL-style action masks on TD3: early in training, actions stay in a box around those of external policies.

Zhao et al., "CAMEL: Continuous Action Masking Enabled by Large Language Models for Reinforcement Learning" (RLDM 2025,
arXiv 2502.11896). A language model writes crude policies. They limit the actions, less and less, until the agent acts
alone. Only the abstract was at hand, so box, schedule and losses are this project's design, and no number of the paper
is claimed. `diff algos/td3.py algos/camel.py` shows all of it (and that `--goal-range` is left out):

    box:     low = min_k p_k(s) - w, high = max_k p_k(s) + w, within [-1, 1], of policies p_k and half-width w
    map:     clip(x, low, high) of the actor's output x, or affine, middle of the box + x (high - low) / 2
    epsilon: 1 - step / mask_steps, at least 0. In most modes it is the share of episodes (or steps) that are masked. In
             `shrink` and `affine` all are masked, and the box grows: low -> -1 and high -> 1 as epsilon -> 0

Acting, targets and the actor's objective use the same map with the same epsilon. So this is TD3 on the masked task at
epsilon 1, and plain TD3 at 0. docs/camel.md has the measurements.

python algos/camel.py --env Hopper-v4
"""
import math
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import start  # noqa: F401  before numpy

import numpy as np
import torch
from torch.utils._pytree import tree_map

import envs
import knowledge
import runtime
from buffers import Batch, ReplayBuffer
from errors import UserError
from networks import adam, adam_state, init_mlp, mlp

ALGO = Path(__file__).stem  # names run folders and result tables
LOG_EVERY = 1000  # environment steps
NOISE_CLIP = 0.5  # bound of the noise on the actions of targets (TD3's paper: c)


@dataclass
class Args:
    """TD3 with action masks around external policies (CAMEL-style)."""
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
    her_goals: int = 4  # hindsight goals per real goal, on tasks with goals; 0: no HER
    normalize: bool = False  # inputs normalised by running mean and deviation, clipped to +-5

    # method: masks
    knowledge: str = "auto"  # auto, rules, groups, your_file.py, llm:<file>, run:<RUN_DIR> (an expert), none
    center: Literal["policy", "zero", "random", "expert"] = "policy"  # of the box; zero, random: control experiments
    half_width: float = 0.5  # w, half the width of the box around one policy; 2: all of [-1, 1], so plain TD3
    mask_mode: Literal["episode", "step", "shrink", "affine", "adaptive"] = "episode"  # adaptive: epsilon falls faster
    mask_steps: int = 60_000  # environment steps until epsilon is 0, and all of [-1, 1] is allowed
    box_coef: float = 1.0  # weight of the squared distance between the actor's output and the box, where it is masked
    center_coef: float = 0.0  # weight, times epsilon, of the squared distance to the middle of the box


# RANGES: limits of numbers; all others must be above 0. TUNE: for `make tune`, (low, high) on a log scale, or choices
RANGES = {"gamma": (0, 1), "tau": (0, 1), "learning_starts": (0, math.inf), "exploration_noise": (0, math.inf),
          "policy_noise": (0, math.inf), "her_goals": (0, math.inf), "half_width": (0, 2), "mask_steps": (0, math.inf),
          "box_coef": (0, math.inf), "center_coef": (0, math.inf)}
GROWS = ("shrink", "affine")  # modes in which all actions are masked, by a box that grows
TUNE = {"learning_rate": (1e-4, 3e-3), "tau": (0.001, 0.05), "exploration_noise": [0.05, 0.1, 0.2],
        "updates_per_step": [0.25, 0.5, 1.0], "batch_size": [128, 256, 512]}


class Seen(NamedTuple):
    features: torch.Tensor  # (B, f), normalised
    low: torch.Tensor  # (B, d), the box
    high: torch.Tensor  # (B, d)


def decide(actor: dict, obs: torch.Tensor) -> torch.Tensor:
    """Observations (B, f) -> actions (B, d) in [-1, 1]."""
    return torch.tanh(mlp(actor, "actor", obs))


def centers_of(external: dict, obs: torch.Tensor, g: int, d: int, args: Args) -> torch.Tensor:
    """The centres of the box in states (B, f): actions of n external policies (B, n, d), NaN where one fails, or those
    of a control experiment (B, 1, d)."""
    if external:
        return knowledge.advise(external, envs.unflatten(obs, g), d, failed=math.nan)
    centers = torch.full((len(obs), 1, d), math.nan)  # --knowledge none: no box
    if args.center == "zero":
        centers = torch.zeros_like(centers)
    if args.center == "random":  # noise computed from the state, so that evaluations use no random numbers of training
        phase = 1000 * obs.sum(1, keepdim=True) * (torch.arange(1, d + 1) + 1 / math.pi)  # no ratio is a fraction
        centers = (2 * phase.remainder(1) - 1).unsqueeze(1)  # (B, 1, d)
    return centers


def box_around(centers: torch.Tensor, half_width: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Actions of n policies (B, n, d) -> low, high (B, d). Where policies disagree the box is wider. Every policy's
    action is inside, and the box is at least `half_width` wide. Policies with NaN are left out; if none remains, the
    box is all of [-1, 1]."""
    known = centers.isfinite().all(2, keepdim=True)  # (B, n, 1)
    centers, some = centers.clamp(-1, 1), known.any(1)
    low = torch.where(known, centers, 1).amin(1) - half_width
    high = torch.where(known, centers, -1).amax(1) + half_width
    return torch.where(some, low.clamp(min=-1), -1), torch.where(some, high.clamp(max=1), 1)


def add_box(obs: torch.Tensor, needed: bool = True, *, external: dict, g: int, d: int, args: Args) -> torch.Tensor:
    """Features (B, f) -> features | low | high (B, f + 2 d). The buffer keeps the box, because external policies may be
    slow. If no box is `needed` any more, they are not asked."""
    return torch.cat([obs, *box_around(centers_of(external if needed else {}, obs, g, d, args), args.half_width)], 1)


def grown(low: torch.Tensor, high: torch.Tensor, epsilon: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The grown box: at epsilon 1 the box itself, at 0 all of [-1, 1]."""
    return -1 + epsilon * (low + 1), 1 - epsilon * (1 - high)


def masked(action: torch.Tensor, obs: Seen, mask: torch.Tensor, epsilon: torch.Tensor, args: Args,
           affine: bool = False) -> torch.Tensor:
    """Actions (B, d) in [-1, 1], brought into the box where `mask` (B, 1) says so. A clipped action keeps its meaning
    when the mask goes; its gradient is 0 outside of the box, and `box_coef` makes up for that. The `affine` map keeps
    uniform actions uniform, where clipped ones pile up on the faces of the box."""
    low, high = grown(obs.low, obs.high, epsilon) if args.mask_mode in GROWS else (obs.low, obs.high)
    if affine or args.mask_mode == "affine":
        inside = (low + high) / 2 + action * ((high - low) / 2)
    else:
        inside = action
    return torch.where(mask, inside.clamp(low, high), action)


def critic_inputs(obs: Seen, action: torch.Tensor) -> torch.Tensor:
    return torch.cat([obs.features, action], 1)


def critic_loss(critic: dict, inputs: torch.Tensor, target_q: torch.Tensor) -> torch.Tensor:
    return (mlp(critic, "q", inputs).squeeze(-1) - target_q).square().mean(1).sum()  # (2, B): two critics


def actor_loss(actor: dict, critic: dict, obs: Seen, mask: torch.Tensor, epsilon: torch.Tensor, args: Args):
    raw = decide(actor, obs.features)
    action = masked(raw, obs, mask, epsilon, args)
    first = {name: p[0] for name, p in critic.items()}  # the first of the two critics
    q = mlp(first, "q", critic_inputs(obs, action)).mean()
    wanted = action if args.mask_mode == "affine" else raw  # affine: raw is no action before it is mapped
    outside = (wanted - action).square().sum(1).mean()  # 0 where nothing is masked, and inside of the box
    held = mask & (obs.high - obs.low < 2)  # (B, d): where the box is all of [-1, 1], its middle means nothing
    off_center = torch.where(held, wanted - (obs.low + obs.high) / 2, 0).square().sum(1).mean()
    loss = -q + args.box_coef * outside + args.center_coef * epsilon * off_center
    return loss, {"q": q, "outside": outside, "clipped": (wanted != action).float().mean()}


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


def update(agent: dict, batch: Batch, noise: torch.Tensor, masks: torch.Tensor, epsilon: torch.Tensor,
           whole: bool, args: Args) -> dict:
    """One step of the critics on normalised transitions and, if `whole`, of actor and target networks. masks
    (2, B, 1): of the states and of the next states. Changes `agent` in place, returns what is logged."""
    actor, critic, target, moments, count = (agent[k] for k in ("actor", "critic", "target", "moments", "count"))

    noise = (args.policy_noise * noise).clamp(-NOISE_CLIP, NOISE_CLIP)
    next_action = (decide(target, batch.next_obs.features) + noise).clamp(-1, 1)
    next_action = masked(next_action, batch.next_obs, masks[1], epsilon, args)  # in the box of the next state
    next_q = mlp(target, "q", critic_inputs(batch.next_obs, next_action)).squeeze(-1).amin(0)  # (B,)
    target_q = batch.reward[:, 0] + args.gamma * (1 - batch.terminated[:, 0]) * next_q  # a time limit bootstraps
    grads, q_loss = torch.func.grad_and_value(critic_loss)(critic, critic_inputs(batch.obs, batch.action), target_q)
    count["critic"] += 1
    adam(critic, grads, moments["critic"], count["critic"], args.learning_rate)
    scalars = {"critic_loss": q_loss, "target_q": target_q.mean()}
    if not whole:
        return scalars

    grads, (pi_loss, logged) = torch.func.grad_and_value(actor_loss, has_aux=True)(
        actor, critic, batch.obs, masks[0], epsilon, args)
    count["actor"] += 1
    adam(actor, grads, moments["actor"], count["actor"], args.learning_rate)
    torch._foreach_lerp_([target[name] for name in (actor | critic)], [*actor.values(), *critic.values()], args.tau)
    return scalars | {"actor_loss": pi_loss} | logged


def make_buffer(args: Args, vec: envs.VectorEnv, f: int, d: int, g: int) -> tuple[ReplayBuffer, int]:
    """An empty buffer, and how many transitions of a batch get a hindsight goal."""
    relabelled = int(args.batch_size * args.her_goals / (args.her_goals + 1)) if g else 0
    horizon = envs.time_limit_of(vec) if relabelled else 1  # hindsight stores whole episodes
    capacity = min(args.buffer_size, args.total_timesteps + args.num_envs)  # the last step may go beyond the total
    return ReplayBuffer(capacity, horizon, args.num_envs, f + 2 * d, d, g, vec.compute_reward), relabelled


def epsilon_at(step: int, cap: float, args: Args) -> float:
    """epsilon: 1 at the start, linearly down to 0 after `mask_steps`, never above `cap`."""
    linear = 1 - step / args.mask_steps if args.mask_steps else 0.0
    return min(max(linear, 0.0), cap)


def compare(run: runtime.Run, loop: dict, epsilon: float, alone: float, with_masks: float, args: Args) -> None:
    """Called after an evaluation without masks and one with them. `adaptive` lowers epsilon by a tenth if masks were no
    better on average over the last ten of these pairs."""
    run.log({"masked_return": with_masks})
    loop["gaps"] = [*loop["gaps"], alone - with_masks][-10:]
    if args.mask_mode == "adaptive" and sum(loop["gaps"]) >= 0:
        loop["cap"] = 0.9 * epsilon


def draw_masks(epsilon: float, shape: tuple[int, ...], count: int, args: Args) -> torch.Tensor:
    """Which rows are masked, bool. With a generator of its own, seeded by seed and `count`: other random numbers are
    TD3's."""
    if args.mask_mode in GROWS:
        return torch.full(shape, epsilon > 0)
    return torch.from_numpy(np.random.default_rng((args.seed, count)).random(shape) < epsilon)


def center_checked(args: Args) -> Args:
    """`args`, for control experiments without knowledge. Raises UserError if an expert is not a trained agent."""
    if args.center == "expert" and not args.knowledge.startswith("run:"):
        raise UserError(f"--center expert is a box around a trained agent, not around --knowledge {args.knowledge}: "
                        "name its run, --knowledge run:RUN_DIR")
    return args if args.center in ("policy", "expert") else replace(args, knowledge="none")


@torch.no_grad()  # gradients are taken by torch.func, inside `update`
def main(args: Args) -> dict[str, float]:
    """Train, resume or evaluate, as `args` say; returns the last evaluation (keys: runtime.EVALUATION)."""
    args = center_checked(args)
    args, saved = runtime.checked(args, ALGO, RANGES)
    device = runtime.pick_device(args.device, fast_matmul=True)
    vec = envs.make_vec(args.env, args.num_envs, threads=torch.get_num_threads())
    f, d, g = envs.continuous_sizes(vec)  # sizes of features, action and goal (0: no goals)
    obs = vec.reset(10_000 * args.seed)  # environment i has stream 10,000 * seed + i; seeds share none
    example = envs.example_of(vec, obs)
    given = "none" if args.evaluate else args.knowledge  # evaluations have no masks
    external = knowledge.load(given, args.env, d, example, kept_in=args.resume)
    agent = make_agent(args, f, d, device)
    normalizer = envs.Normalizer(f, args.normalize)
    buffer, relabelled = make_buffer(args, vec, f, d, g)
    with_box = partial(add_box, external=external, g=g, d=d, args=args)
    loop = {"rows": with_box(envs.flatten(obs)), "updates_owed": 0.0, "updates": 0, "cap": 1.0, "gaps": [],
            "mask": draw_masks(epsilon_at(0, 1.0, args), (args.num_envs, 1), 0, args)}
    scalars = runtime.Means()  # since the last log
    parts = {"agent": agent, "normalizer": normalizer, "vec": vec, "buffer": buffer, "loop": loop, "scalars": scalars}
    runtime.restore(parts, saved, only=["agent", "normalizer"] if args.evaluate else None)
    evaluator = envs.Evaluator(args)

    def look(rows: torch.Tensor, anew: bool = False) -> Seen:
        """Features | low | high (B, f + 2 d) -> inputs of networks and masks."""
        rows = with_box(rows[:, :f]) if anew and relabelled else rows  # a hindsight goal may have another box
        return Seen(normalizer(rows[:, :f]), *rows[:, f:].chunk(2, 1))

    def policy(obs: torch.Tensor | dict[str, torch.Tensor]) -> torch.Tensor:
        """The action without noise and mask (B, d). The run exports this as policy.pt2."""
        return decide(agent["actor"], normalizer(envs.flatten(obs)).to(device)).cpu()

    def act(obs: envs.Observation, mask: bool = False) -> np.ndarray:
        """The actions of evaluations, without masks or with them."""
        action = policy(obs)
        if mask:
            action = masked(action, look(with_box(envs.flatten(obs))), torch.tensor(True), epsilon, args)
        return vec.to_box(action.numpy())

    if args.evaluate:
        return evaluator.report(act, saved["step"])

    # train
    run = runtime.Run(ALGO, args, envs.resolve(args.env), saved, parts)
    knowledge.keep(args.knowledge, ["inner", *external], run.folder)
    learn = runtime.compiled(update, args.compile, device)
    if not saved:
        run.log_evaluation(evaluator.play(act))  # the untrained agent
    while run.advance(args.num_envs):
        learning, rows = run.step > args.learning_starts and buffer.stored >= args.batch_size, loop["rows"]
        epsilon, seen = torch.tensor(epsilon_at(run.before, loop["cap"], args)), look(rows)
        action = 2 * torch.rand(args.num_envs, d) - 1
        if learning:
            noise = args.exploration_noise * torch.randn(args.num_envs, d)
            action = (decide(agent["actor"], seen.features.to(device)).cpu() + noise).clamp(-1, 1)
        action = masked(action, seen, loop["mask"], epsilon, args, affine=not learning)
        next_obs, reward, terminated, truncated, info = vec.step(vec.to_box(action.numpy()))

        # store: where an episode ended, final_obs is its last observation, and next_obs the first of the next episode
        needed = bool(epsilon > 0 or loop["mask"].any())  # else no box will be used any more
        final_rows, ended = with_box(envs.flatten(info["final_obs"]), needed), torch.from_numpy(terminated | truncated)
        buffer.add(rows, action, reward, terminated, truncated, final_rows)
        normalizer.add(rows[:, :f])
        loop["rows"] = with_box(envs.flatten(next_obs), needed) if ended.any() else final_rows
        redrawn = draw_masks(epsilon_at(run.step, loop["cap"], args), (args.num_envs, 1), 2 * run.step, args)
        loop["mask"] = torch.where(ended[:, None] | (args.mask_mode == "step"), redrawn, loop["mask"])

        # update
        if learning:
            loop["updates_owed"] += args.num_envs * args.updates_per_step
        while loop["updates_owed"] >= 1:
            loop["updates_owed"] -= 1
            batch = buffer.sample(args.batch_size, relabelled)
            batch = batch._replace(obs=look(batch.obs, needed), next_obs=look(batch.next_obs, needed))
            loop["updates"] += 1
            masks = draw_masks(epsilon.item(), (2, args.batch_size, 1), 2 * loop["updates"] + 1, args)
            inputs = tree_map(lambda x: x.to(device), (batch, torch.randn(args.batch_size, d), masks, epsilon))
            scalars.add(learn(agent, *inputs, loop["updates"] % args.policy_delay == 0, args))

        # log, evaluate, save
        if run.due(LOG_EVERY):
            run.log(scalars.take() | {"epsilon": epsilon})
        if run.due(args.eval_every) or run.over:
            run.log_evaluation(result := evaluator.play(act, twice=run.over))
            if epsilon > 0:
                with_masks = evaluator.play(partial(act, mask=True))
                compare(run, loop, epsilon.item(), result["return_mean"], with_masks["return_mean"], args)
        run.save_if_due()
    run.finish(example, policy=policy)
    evaluator.film(act, run.folder)
    return run.result


if __name__ == "__main__":
    with runtime.exit_codes(ALGO):
        main(runtime.cli(Args, ALGO))
