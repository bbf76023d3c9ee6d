"""SaTESAC: TESAC whose contexts also tell good behaviour on a task from poor behaviour on it.

Yu, Dunion, Li, Albrecht, "Skill-aware Mutual Information Optimisation for Zero-shot Generalisation in Reinforcement
Learning" (NeurIPS 2024, arXiv 2406.04815). Skill-aware noise contrastive estimation (SaNCE) adds a contrastive loss for
the encoder psi. It draws trajectories of one bucket of tasks; the half with the higher rewards is good, the rest poor:

    query q = psi(good), positive key k+ = psi'(good), negative key k- = psi'(poor),   psi': the momentum encoder
    loss    = critics' loss + clip(kappa * gap of the mean rewards, 0, 1) * NCE,   NCE on cos(q, k) / T, T = 0.1

`--estimator sigmoid` compares all pairs, as the paper's code does; `softmax` is the paper's estimator with K samples.
Parent: algos/tesac.py

Departures: those of the parent; 4 random windows of each trajectory, so that one of 32 positive pairs is a window with
itself; one step on the sum of both losses, not a step on each in turn. docs/sami.md says what is exact.

python algos/satesac.py --env CrippledHalfCheetah-dyn-v0
"""
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import start  # noqa: F401  before numpy

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map

import envs
import runtime
from buffers import Batch, TrajectoryBuffer, Windows
from networks import adam, adam_state, init_mlp, mlp

ALGO = Path(__file__).stem  # names run folders and result tables
LOG_EVERY = 1000  # environment steps
TEMPERATURE = 0.1  # T, which divides the cosines
RECENT = 100  # only the last trajectories of a bucket are compared, as many as the paper's buffer holds


@dataclass
class Args:
    """SAC with a context that also tells good behaviour from poor."""
    # twin: run arguments
    env: str = "CrippledHalfCheetah-dyn-v0"  # environment id; an old Fetch id is replaced by the installed version
    seed: int = 1  # seed of all random numbers: networks, environments, exploration
    total_timesteps: int = 1_000_000  # environment steps, summed over environments; with --resume: a new total
    num_envs: int = 24  # environments stepped together
    eval_every: int = 50_000  # environment steps between evaluations; 0: only at start and end
    eval_episodes: int = 50  # episodes per evaluation; the last evaluation plays twice as many
    checkpoint_every: int = 200_000  # environment steps between checkpoints; 0: only at the end
    video: int = 0  # episodes to film after training, or with --evaluate
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where the networks run; auto: on a GPU if there is one
    compile: bool = True  # compile the update into one graph: about 30 s at the first start, then up to twice as fast
    run_dir: str = ""  # run folder; empty: runs/<algo>/<env>/seed<k>-<time>
    resume: str = ""  # run folder to continue exactly, with its own arguments
    evaluate: str = ""  # run folder to evaluate; no training
    track: bool = False  # also log scalars to Weights & Biases (pip install wandb)
    # twin end

    # algorithm
    hidden: str = "256x2"  # hidden layers of actor and critics, width x depth
    batch_size: int = 256  # transitions per update
    buffer_size: int = 1_000_000  # transitions kept for replay; fewer where episodes end before the horizon
    learning_rate: float = 1e-3  # Adam, for actor, critics and temperature
    gamma: float = 0.95  # discount per step
    tau: float = 0.02  # Polyak step of the target critics and the momentum encoder, per update
    updates_per_step: float = 0.05  # updates per environment step
    initial_temperature: float = 0.2  # alpha at the start; then it is tuned to an entropy of -d (d: size of an action)
    normalize: bool = True  # inputs normalised by running mean and deviation, clipped to +-5
    horizon: int = 200  # largest number of steps of an episode; 0: as many as the task has

    # method
    context_dim: int = 6  # numbers in a context
    encoder_hidden: int = 32  # units of the encoder's LSTM; the paper's code: 128
    window: int = 8  # inputs that a context sees; the paper's code: all of the episode
    estimator: Literal["sigmoid", "softmax"] = "sigmoid"  # of the contrastive loss: all pairs, or K keys per query
    kappa: float = 0.1  # weight of the contrastive loss: min(1, kappa * gap of the mean rewards)
    fixed_weight: bool = False  # the weight is kappa, whatever the gap: a control experiment
    contrast_trajectories: int = 16  # trajectories per update; half of them are positive
    contrast_steps: int = 4  # random windows of each trajectory
    bilinear: bool = True  # multiply keys by a trained matrix
    official: bool = False  # repeat the quirks of the paper's code, which docs/sami.md lists


# RANGES: limits of numbers; all others must be above 0. TUNE: for `make tune`, (low, high) on a log scale, or choices
RANGES = {"gamma": (0, 1), "tau": (0, 1), "horizon": (0, math.inf), "contrast_trajectories": (2, math.inf)}
TUNE = {"learning_rate": (3e-4, 3e-3), "tau": (0.01, 0.1), "initial_temperature": (0.01, 1.0),
        "updates_per_step": (0.02, 0.2), "batch_size": [128, 256, 512], "window": [4, 8, 16]}


def init_encoder(width: int, hidden: int, size: int) -> dict[str, torch.Tensor]:
    """An LSTM, ReLU and a linear map. The LSTM has no biases, so its state stays zero over rows of zeros."""
    bound = hidden ** -0.5
    shapes = {"input": (width, 4 * hidden), "state": (hidden, 4 * hidden), "weight": (hidden, size), "bias": (size,)}
    return {f"encoder.{name}": torch.empty(*shape).uniform_(-bound, bound) for name, shape in shapes.items()}


def encode(params: dict[str, torch.Tensor], windows: torch.Tensor) -> torch.Tensor:
    """Windows (W, B, f + d + 1) -> contexts (B, c)."""
    inputs = windows[..., :-1] * windows[..., -1:]  # rows before the episode: zero again after normalisation
    from_inputs = torch.matmul(inputs, params["encoder.input"])  # (W, B, 4h), of all steps at once
    cell = hidden = from_inputs.new_zeros(windows.shape[1], len(params["encoder.state"]))  # (B, h)
    for step in from_inputs.unbind():
        take, keep, new, give = (step + hidden @ params["encoder.state"]).chunk(4, -1)  # (B, h) each
        cell = keep.sigmoid() * cell + take.sigmoid() * new.tanh()
        hidden = give.sigmoid() * cell.tanh()
    context = F.relu(hidden) @ params["encoder.weight"] + params["encoder.bias"]
    return context * windows[-1, :, -1:]  # zero where the last row is empty


def with_context(params: dict[str, torch.Tensor], windows: torch.Tensor, d: int) -> torch.Tensor:
    """What actor and critics see (B, f + c): the last observation of windows (W, B, width), then its context."""
    return torch.cat([windows[-1, :, :-d - 1], encode(params, windows)], 1)


def make_row(obs: torch.Tensor, action: torch.Tensor, began: torch.Tensor) -> torch.Tensor:
    """What is kept of a step (B, width): the observation (B, f), the action (B, d) before it, zeros where an episode
    `began` (B,), and a 1, the mark of a row in use."""
    before = torch.where(began.unsqueeze(1), 0.0, action)
    return torch.cat([obs, before, torch.ones(len(obs), 1)], 1)


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


def critic_inputs(obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
    return torch.cat([obs, action], 1)


# twin: contrast
class Contrast(NamedTuple):
    windows: torch.Tensor  # (W, B', width): of the positive trajectories, then of the negative ones
    weight: torch.Tensor  # (), of the contrastive loss


def negatives(args: Args) -> int:
    """How many of the trajectories are negative: half of them, at least one, and never all."""
    return min(max(args.contrast_trajectories // 2, 1), args.contrast_trajectories - 1)


def sigmoid_nce(query: torch.Tensor, positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    """Every query (n, c) with every key, as in the paper's code, with s the sigmoid:
    -mean log s(q k+ / T) - mean log(1 - s(q k- / T))."""
    return F.softplus(-query @ positive.T / TEMPERATURE).mean() + F.softplus(query @ negative.T / TEMPERATURE).mean()


def softmax_nce(query: torch.Tensor, positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    """Query i (n, c) with positive key i and all K - 1 negative keys: log K minus the estimated mutual information."""
    own = (query * positive).sum(1, keepdim=True)  # (n, 1)
    logits = torch.cat([own, query @ negative.T], 1) / TEMPERATURE  # (n, K)
    return (logits.logsumexp(1) - logits[:, 0]).mean()


def contrastive_loss(critic: dict, query: torch.Tensor, keys: torch.Tensor, args: Args) -> torch.Tensor:
    """Queries (n, c) of positive trajectories; keys of the same windows, then of the negative ones. Queries train the
    encoder. Keys come from the momentum encoder, and train only the bilinear matrix."""
    if args.bilinear:
        keys = keys @ critic["bilinear"]
    query, keys = F.normalize(query, dim=1), F.normalize(keys, dim=1)
    positive, negative = keys[:len(query)], keys[len(query):]
    if args.estimator == "sigmoid":
        return sigmoid_nce(query, positive, negative)
    return softmax_nce(query, positive.roll(args.contrast_steps, 0), negative)  # of the next trajectory, a random one


def critic_loss(critic: dict, windows: torch.Tensor, action: torch.Tensor, target_q: torch.Tensor,
                positive: torch.Tensor, keys: torch.Tensor, weight: torch.Tensor, args: Args):
    """Loss of critics and encoder, with one call of the encoder. Nothing else trains the encoder."""
    states = with_context(critic, torch.cat([windows, positive], 1), action.shape[1])
    state, query = states[:len(action)], states[len(action):, -args.context_dim:]
    q = mlp(critic, "q", critic_inputs(state, action)).squeeze(-1)  # (2, B)
    q_loss = 0.5 * (q - target_q).square().mean(1).sum()
    nce_loss = contrastive_loss(critic, query, keys, args)
    return q_loss + weight * nce_loss, (state, q_loss, nce_loss)


def actor_loss(actor: dict, critic: dict, alpha: torch.Tensor, obs: torch.Tensor, noise: torch.Tensor, args: Args):
    decision = decide(actor, obs, noise, args)
    q = mlp(critic, "q", critic_inputs(obs, decision.action)).squeeze(-1).amin(0)  # (B,)
    return (alpha * decision.log_prob - q).mean(), (decision, q)


def make_agent(args: Args, f: int, d: int, c: int, device: torch.device) -> dict:
    """Fresh parameters and optimiser state."""
    if args.estimator == "softmax" and args.contrast_trajectories < 3 and not (args.resume or args.evaluate):
        raise runtime.UserError("--contrast-trajectories 2: --estimator softmax needs two positive ones; use 3 or more")
    hidden = runtime.hidden_layers(args.hidden)
    critic = init_mlp("q", [f + c + d, *hidden, 1], stack=(2,))
    critic |= init_encoder(f + d, args.encoder_hidden, c) | {"bilinear": torch.eye(c)}
    actor = init_mlp("actor", [f + c, *hidden, 2 * d])
    trained = {"actor": actor, "critic": critic,
               "temperature": {"log_alpha": torch.tensor(math.log(args.initial_temperature))}}
    moments = {group: adam_state(params) for group, params in trained.items()}
    target = {name: p.clone() for name, p in critic.items()}
    return tree_map(lambda x: x.to(device), trained | {"target": target, "moments": moments, "count": torch.zeros(())})


def update(agent: dict, batch: Batch, contrast: Contrast, noise: torch.Tensor, next_noise: torch.Tensor,
           args: Args) -> dict:
    """One step of critics and encoder, actor, temperature and targets, in this order, on normalised windows. Changes
    `agent` in place, returns what is logged."""
    actor, critic, target, moments, count = (agent[k] for k in ("actor", "critic", "target", "moments", "count"))
    alpha, d = agent["temperature"]["log_alpha"].exp(), batch.action.shape[1]  # alpha before its step below
    count += 1

    b, positive = len(batch.action), contrast.windows[:, :-negatives(args) * args.contrast_steps]
    states = with_context(target, torch.cat([batch.next_obs, contrast.windows], 1), d)  # of the momentum encoder
    next_state, keys = states[:b], states[b:, -args.context_dim:]
    following = decide(actor, next_state, next_noise, args)
    next_q = mlp(target, "q", critic_inputs(next_state, following.action)).squeeze(-1).amin(0)  # (B,)
    next_value = next_q - alpha * following.log_prob
    target_q = batch.reward[:, 0] + args.gamma * (1 - batch.terminated[:, 0]) * next_value  # a time limit bootstraps
    grads, (_, (state, q_loss, nce_loss)) = torch.func.grad_and_value(critic_loss, has_aux=True)(
        critic, batch.obs, batch.action, target_q, positive, keys, contrast.weight, args)
    adam(critic, grads, moments["critic"], count, args.learning_rate)

    grads, (pi_loss, (decision, q)) = torch.func.grad_and_value(actor_loss, has_aux=True)(
        actor, critic, alpha, state, noise, args)  # the context is an input: the actor does not train the encoder
    adam(actor, grads, moments["actor"], count, args.learning_rate)
    grads = {"log_alpha": d - decision.log_prob.mean()}  # of -log_alpha (log_prob - d): target entropy -d
    adam(agent["temperature"], grads, moments["temperature"], count, args.learning_rate)
    torch._foreach_lerp_(list(target.values()), list(critic.values()), args.tau)
    return {"critic_loss": q_loss, "actor_loss": pi_loss, "q": q.mean(), "alpha": alpha,
            "entropy": -decision.log_prob.mean(), "nce_loss": nce_loss, "weight": contrast.weight}


def make_windows(args: Args, num: int, width: int) -> Windows:
    """The windows of `num` episodes. With --official their first rows are seen in training, but not when acting."""
    return Windows(args.window, num, width, hide_first=args.official)


def make_player(choose: Callable, vec: envs.VectorEnv, width: int, args: Args) -> Callable:
    """The policy of evaluations (envs/splits.py): mean actions; with `wrong`, on the context of another task."""
    def player(num: int, tasks: np.ndarray, wrong: bool = False) -> Callable:
        windows, noise = make_windows(args, num, width), torch.zeros(num, *vec.action_space.shape)
        action = noise

        def act(obs: envs.Observation, began: np.ndarray) -> tuple[np.ndarray, torch.Tensor]:
            nonlocal action
            began = torch.from_numpy(began)
            row = make_row(envs.flatten(obs), action, began)
            (action, _), context = choose(windows.push(row, began), noise, wrong)
            return vec.to_box(action.numpy()), context
        return act
    return player


def contrast_batch(buffer: TrajectoryBuffer, look: Callable, d: int, args: Args) -> Contrast:
    """Random windows of episodes drawn by `draw_trajectories`."""
    drawn, weight = draw_trajectories(buffer, args)
    episode = drawn.repeat_interleave(args.contrast_steps)
    step = (torch.rand(len(episode)) * buffer.length[episode]).long()
    if not args.official:
        return Contrast(look(buffer.windows(episode, step)), weight)
    # In the paper's code embeddings are zero from the step on that ends an episode. It pairs observations with actions
    # of another one, a step late: the one before in the same environment, if all episodes are of one length.
    step = torch.randint(buffer.horizon + 1, (len(episode),))
    windows = look(buffer.windows(episode, step))
    windows[-1, step >= buffer.length[episode] - 1, -1] = 0
    other = buffer.windows((episode - args.num_envs) % len(buffer.task), (step + 1).clamp(max=buffer.horizon))
    return Contrast(torch.cat([windows[..., :-d - 1], other[..., -d - 1:-1], windows[..., -1:]], -1), weight)
# twin end


def return_gap_weight(positive: torch.Tensor, negative: torch.Tensor, kappa: float) -> torch.Tensor:
    """clip(kappa * (mean of positive - mean of negative), 0, 1), of the mean rewards (n,) of trajectories."""
    return (kappa * (positive.mean() - negative.mean())).clamp(0, 1)


def draw_trajectories(buffer: TrajectoryBuffer, args: Args) -> tuple[torch.Tensor, torch.Tensor]:
    """Episodes (n,) of a random bucket, the better half first (SaNCE), and the weight () of the contrastive loss."""
    buckets = buffer.task.bincount().nonzero()[:, 0]
    recent = buffer.latest(int(buckets[torch.randint(len(buckets), ())]), RECENT)
    drawn = recent[torch.randint(len(recent), (args.contrast_trajectories,))]
    drawn = drawn[buffer.mean_reward[drawn].argsort(descending=True, stable=True)]
    good, poor = drawn.split([len(drawn) - negatives(args), negatives(args)])
    if args.estimator == "softmax":  # else the next one, whose keys are positive, would be the next in rank
        good = good[torch.randperm(len(good))]
    gap = return_gap_weight(buffer.mean_reward[good], buffer.mean_reward[poor], args.kappa)
    return torch.cat([good, poor]), torch.tensor(args.kappa) if args.fixed_weight else gap


@torch.no_grad()  # gradients are taken by torch.func, inside `update`
def main(args: Args) -> dict[str, float]:
    """Train, resume or evaluate, as `args` say; returns the last evaluation on training tasks."""
    args, saved = runtime.checked(args, ALGO, RANGES)
    device = runtime.pick_device(args.device, fast_matmul=True)
    horizon = envs.horizon_of(args.env, args.horizon)
    vec = envs.make_vec(args.env, args.num_envs, threads=torch.get_num_threads(), split="train",
                        max_episode_steps=horizon)
    f, d, _ = envs.continuous_sizes(vec)  # sizes of features and action
    obs = vec.reset(10_000 * args.seed)  # environment i has stream 10,000 * seed + i; seeds share none
    began = torch.ones(args.num_envs, dtype=torch.bool)
    row = make_row(envs.flatten(obs), torch.zeros(args.num_envs, d), began)
    width = row.shape[1]
    agent = make_agent(args, f, d, args.context_dim, device)
    normalizer = envs.Normalizer(f, args.normalize)
    windows = make_windows(args, args.num_envs, width)
    capacity = min(args.buffer_size, args.total_timesteps + args.num_envs)  # the last step may go beyond the total
    buffer = TrajectoryBuffer(capacity, horizon, len(windows.rows), args.num_envs, width, d, not args.official)
    loop = {"row": row, "began": began, "updates_owed": 0.0}
    scalars = runtime.Means()  # since the last log
    parts = {"agent": agent, "normalizer": normalizer, "vec": vec, "buffer": buffer, "windows": windows, "loop": loop,
             "scalars": scalars}
    runtime.restore(parts, saved, only=["agent", "normalizer"] if args.evaluate else None)
    evaluator = envs.SplitEvaluator(args, max_episode_steps=horizon)

    def look(rows: torch.Tensor) -> torch.Tensor:
        """Rows (..., width) -> inputs of the networks."""
        return torch.cat([normalizer(rows[..., :f]), rows[..., f:]], -1)

    def choose(rows: torch.Tensor, noise: torch.Tensor, wrong: bool = False) -> tuple[Decision, torch.Tensor]:
        """Windows (W, B, width) -> decision, context (B, c). `wrong`: act on the context from half a batch away."""
        inputs, noise = tree_map(lambda x: x.to(device), (look(rows), noise))
        state = with_context(agent["critic"], inputs, d)
        if wrong:
            state = torch.cat([state[:, :f], state[:, f:].roll(len(state) // 2, 0)], 1)
        return tree_map(lambda x: x.cpu(), (decide(agent["actor"], state, noise, args), state[:, f:]))

    def policy(rows: torch.Tensor) -> torch.Tensor:
        """Windows (B, W, width) -> mean actions (B, d). The run exports this as policy.pt2."""
        return choose(rows.transpose(0, 1), torch.zeros(d))[0].action

    player = make_player(choose, vec, width, args)
    if args.evaluate:
        return evaluator.report(player, saved["step"])["train"]

    # train
    run = runtime.Run(ALGO, args, envs.resolve(args.env), saved, parts)
    learn = runtime.compiled(update, args.compile, device)
    if not saved:
        evaluator.log(run, evaluator.play(player))  # the untrained agent
    while run.advance(args.num_envs):
        learning, row, began = buffer.transitions >= args.batch_size, loop["row"], loop["began"]
        rows, bucket = windows.push(row, began), vec.bucket.copy()
        action = 2 * torch.rand(args.num_envs, d) - 1
        if learning:
            decision, _ = choose(rows, draw_noise(args.num_envs, d))
            action = decision.action
        next_obs, reward, terminated, truncated, info = vec.step(vec.to_box(action.numpy()))

        # store: where an episode ended, final_obs is its last observation, and next_obs the first of the next episode
        ended = torch.from_numpy(terminated | truncated)
        final_row = make_row(envs.flatten(info["final_obs"]), action, torch.zeros_like(ended))
        buffer.add(row, action, reward, terminated, truncated, final_row, bucket)
        normalizer.add(row[:, :f])
        loop["row"] = make_row(envs.flatten(next_obs), action, ended)
        loop["began"] = ended

        # update
        if learning:
            loop["updates_owed"] += args.num_envs * args.updates_per_step
        while loop["updates_owed"] >= 1:
            loop["updates_owed"] -= 1
            batch = buffer.sample(args.batch_size)
            batch = batch._replace(obs=look(batch.obs), next_obs=look(batch.next_obs))
            contrast = contrast_batch(buffer, look, d, args)
            inputs = (batch, contrast, draw_noise(args.batch_size, d), draw_noise(args.batch_size, d))
            scalars.add(learn(agent, *tree_map(lambda x: x.to(device), inputs), args))

        # log, evaluate, save
        if run.due(LOG_EVERY):
            run.log(scalars.take())
        if run.due(args.eval_every) or run.over:
            evaluator.log(run, evaluator.play(player, twice=run.over))
        if run.over:
            run.log(evaluator.diagnose(player))
        run.save_if_due()
    run.finish(row.unsqueeze(1).repeat(1, buffer.window, 1), policy=policy)
    evaluator.keep(run.folder)
    evaluator.film(player, run.folder)
    return run.result


if __name__ == "__main__":
    with runtime.exit_codes(ALGO):
        main(runtime.cli(Args, ALGO))
