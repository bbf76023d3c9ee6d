"""BR-RCRL: offline reward-conditioned RL by Bayes' rule. The return is not an input of the policy, but an output.

Ding, Che, Zhao, Pavone, "Bayesian Reparameterization of Reward-Conditioned Reinforcement Learning with Energy-based
Models" (ICML 2023, arXiv 2305.11340). R_t = sum of gamma^(k - t) r_k to the end of the episode, in bins 0 ... K - 1.

    pi(a|s, R) = beta(a|s) p(R|s, a) / p(R|s),  energy E = -log beta(a|s) - log p(R|s, a)                     (1)
    loss = -f(a) + logsumexp over candidates a_j of f(a_j),  f = log beta + log p(R|s, .)                     (2)
           - log p(R|s, a) - log p(R|s);  candidates: the data's action, half the rest from beta, half uniform
    act: the largest k* with P(R >= k*|s) >= c, then argmax of beta(a|s) P(R >= k*|s, a)                      (3)

What is asked for is the best fraction c of what the data shows from this state: never out of reach. c = 1 is behaviour
cloning. `--mode bc` and `--mode rcrl` (the return as an input) stand beside it. Departures: (3) keeps the best of all
actions that it tries, with fewer tries; docs/br_rcrl.md has the others and the measurements.

python benchmarks/offline.py --env Hopper-v4 --out runs/offline/Hopper-v4-replay.npz --policies replay:RUN
python algos/br_rcrl.py --env Hopper-v4 --dataset runs/offline/Hopper-v4-replay.npz
"""
import math
import os
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy: its own threads fight with torch's for the cores
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import gymnasium as gym
import numpy as np
import torch
from torch.utils._pytree import tree_map

import envs
import runtime
from envs import offline
from networks import adam, adam_state, init_mlp, mlp

ALGO = Path(__file__).stem  # names run folders and result tables
LOG_EVERY = 500  # updates
CURVE = [1.0, 0.5, 0.2, 0.1, 0.05, 0.02]  # c of --curve
DFO_STEPS, DFO_NOISE, DFO_SHRINK = 5, 0.5, 0.9  # of the search for an action
TARGET_STEP = 0.005  # Polyak step of the target network, with --discrete td


@dataclass
class Args:
    """Offline reward-conditioned RL by Bayes' rule. Steps are updates: no environment is stepped but in evaluations."""
    env: str = "Hopper-v4"  # environment id of the dataset: of evaluations
    seed: int = 1  # of all that is random: networks, batches, candidates
    total_timesteps: int = 20_000  # updates; with --resume: a new total
    eval_every: int = 5000  # updates between evaluations; 0: only at start and end
    eval_episodes: int = 10  # episodes per evaluation; the last evaluation plays twice as many
    checkpoint_every: int = 5000  # updates between checkpoints; 0: only at the end
    video: int = 0  # episodes to film after training, or with --evaluate
    device: Literal["auto", "cpu", "cuda"] = "auto"  # of the networks; auto: a GPU if there is one
    compile: bool = True  # compile the update into one graph: about 30 s at the first start
    run_dir: str = ""  # run folder; empty: runs/<algo>/<env>/seed<k>-<time>
    resume: str = ""  # run folder to continue exactly, with the arguments it has
    evaluate: str = ""  # run folder to evaluate; no training
    track: bool = False  # mirror scalars to Weights & Biases (pip install wandb)

    # algorithm
    dataset: str = ""  # .npz of benchmarks/offline.py; or of Minari: a folder, an .hdf5 file, an id that is downloaded
    mode: Literal["br", "bc", "rcrl"] = "br"  # Bayes' rule; behaviour cloning; a policy that is given the return
    discrete: Literal["mc", "td"] = "mc"  # discrete actions: p(R|s, a) from returns in the data, or from backups of it
    top: float = 1.0  # share of the episodes to learn from, those of the highest returns; 0.1 with bc: "%BC"
    gamma: float = 0.99  # discount of returns
    bins: int = 80  # K, of returns
    vmin: float | None = None  # return at which the bins begin; not given: the 0.1 % quantile in the data
    vmax: float | None = None  # return at which they end; not given: the 99.9 % quantile
    hidden: str = "256x3"  # hidden layers of every network, width x depth
    learning_rate: float = 5e-4  # Adam
    batch_size: int = 256  # samples per update
    drop_tail: int = 0  # last steps of cut episodes to leave out: their returns are too small
    # method
    negatives: int = 32  # candidates of (2) beside the data's action
    nce_correct: bool = False  # subtract the log-density that candidates are drawn with, which (2) lacks
    rtg_weight: float = 1.0  # of -log p(R|s, a) in the loss
    c: float = 0.05  # fraction of outcomes to ask for
    samples: int = 256  # actions that (3) tries in each of its steps
    query: float = 1.0  # rcrl: quantile of the data's returns that the policy is given; 1: the largest
    curve: bool = False  # at the end, or with --evaluate: an evaluation for each c of CURVE


RANGES = {"top": (1e-6, 1), "gamma": (0, 1), "vmin": (-1e30, 1e30), "vmax": (-1e30, 1e30), "drop_tail": (0, math.inf),
          "rtg_weight": (0, math.inf), "c": (1e-9, 1), "query": (0, 1)}
# ranges of `make tune`: (low, high) on a log scale, or choices
TUNE = {"learning_rate": (1e-4, 2e-3), "gamma": [0.95, 0.99], "bins": [40, 80], "c": (0.02, 0.5)}


class Batch(NamedTuple):
    """Samples of the data, observations normalised."""
    obs: torch.Tensor  # (B, f)
    action: torch.Tensor  # (B, d) within +-1, or (B,) of discrete ones
    rtg: torch.Tensor  # (B,), rewards to go: the return R from here on
    bin: torch.Tensor  # (B,), that of rtg
    reward: torch.Tensor  # (B,)
    terminated: torch.Tensor  # (B,)
    next_obs: torch.Tensor  # (B, f)


class Draws(NamedTuple):
    """What chance decides in an update: candidates, half of them Gaussian, half uniform."""
    normal: torch.Tensor  # (B, n, d)
    uniform: torch.Tensor  # (B, n, d)


class Search(NamedTuple):
    """What chance decides in the search for an action; drawn once, so that the policy is a function of what it sees."""
    start: torch.Tensor  # (n, d)
    moves: torch.Tensor  # (DFO_STEPS, n, d)
    ranks: torch.Tensor  # (DFO_STEPS, n), uniform


def rewards_to_go(reward: np.ndarray, starts: np.ndarray, gamma: float) -> np.ndarray:
    """R (N,) of rewards (N,), backwards through each of the episodes that begin at `starts` (E + 1,). A time limit ends
    the sum: returns of its last steps are too small (--drop-tail)."""
    rtg = np.array(reward, np.float64)
    for begin, end in zip(starts, starts[1:]):
        for t in reversed(range(begin, end - 1)):
            rtg[t] += gamma * rtg[t + 1]
    return rtg


def to_bins(rtg: torch.Tensor, low: torch.Tensor | float, high: torch.Tensor | float, bins: int) -> torch.Tensor:
    """k(R): equal bins from low to high, all beyond in the first and the last."""
    return ((rtg - low) / (high - low) * bins).floor().clamp(0, bins - 1).long()


def prepare(data: offline.Dataset, args: Args) -> tuple[dict, dict]:
    """The columns to draw samples from, and `scale`: what has to be known of the returns to act."""
    rtg = rewards_to_go(data.rew, data.starts, args.gamma)
    tail = max(args.drop_tail, 1 if args.discrete == "td" else 0)  # td: the state after a time limit is not known
    columns = {"obs": data.obs, "action": data.act, "rtg": rtg.astype(np.float32), "reward": data.rew,
               "terminated": data.term.astype(np.float32), "rows": offline.without_tails(data, tail)}
    low, high = np.quantile(rtg, [0.001, 0.999])
    scale = {"low": low if args.vmin is None else args.vmin, "high": high if args.vmax is None else args.vmax,
             "mean": rtg.mean(), "std": rtg.std() + 1e-6, "quantiles": np.quantile(rtg, np.linspace(0, 1, 101)),
             "ref_min": data.meta.get("ref_min", math.nan), "ref_max": data.meta.get("ref_max", math.nan)}
    if not scale["low"] < scale["high"]:
        raise runtime.UserError(f"returns from {scale['low']:g} to {scale['high']:g} make no bins; give --vmin, --vmax")
    return ({name: torch.from_numpy(x) for name, x in columns.items()},
            {name: torch.as_tensor(x, dtype=torch.float32) for name, x in scale.items()})


def sample(columns: dict, scale: dict, normalizer: envs.Normalizer, args: Args) -> Batch:
    """Random rows, with replacement."""
    i = columns["rows"][torch.randint(len(columns["rows"]), (args.batch_size,))]
    following = (i + 1).clamp(max=len(columns["rtg"]) - 1)  # after the end of an episode: not looked at
    obs, next_obs = (normalizer(columns["obs"][rows].float()) for rows in (i, following))
    rtg = columns["rtg"][i]
    return Batch(obs, columns["action"][i], rtg, to_bins(rtg, scale["low"], scale["high"], args.bins),
                 columns["reward"][i], columns["terminated"][i], next_obs)


def behaviour(params: dict, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """beta(a|s): mean and log standard deviation (B, d) of a Gaussian that is not squashed."""
    mean, log_std = mlp(params, "beta", inputs).chunk(2, -1)
    return mean, log_std.clamp(-4, 15)


def gaussian_log_prob(action: torch.Tensor, mean: torch.Tensor, log_std: torch.Tensor) -> torch.Tensor:
    """(..., d) -> (...)."""
    noise = (action - mean) * torch.exp(-log_std)
    return (-0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


def outcomes(params: dict, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
    """log p(R|s, a) of n actions for each state: (B, f), (B, n, d) -> (B, n, K)."""
    each = obs.unsqueeze(1).expand(-1, action.shape[1], -1)  # (B, n, f)
    return mlp(params, "outcome", torch.cat([each, action], 2)).log_softmax(2)


def threshold(log_prob: torch.Tensor, c: float) -> torch.Tensor:
    """k* (B,) of log p(R|s) (B, K): the largest bin from which on lies a probability of c or more; else 0."""
    tail = log_prob.exp().flip(-1).cumsum(-1).flip(-1)  # (B, K), P(R >= k|s), falls with k
    return ((tail >= c).sum(-1) - 1).clamp(min=0)


def tail_log_prob(log_prob: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """log P(R >= k) of log p (..., K), k (...)."""
    below = torch.arange(log_prob.shape[-1], device=k.device) < k.unsqueeze(-1)
    return log_prob.masked_fill(below, -math.inf).logsumexp(-1)


def nce_loss(scores: torch.Tensor) -> torch.Tensor:
    """(2): scores (B, 1 + n) of the candidates, the data's action first. With all actions as candidates this is
    -log pi(a|s, R), Bayes' rule."""
    return (scores.logsumexp(1) - scores[:, 0]).mean()


def bayes_loss(params: dict, batch: Batch, draws: Draws, args: Args) -> tuple[torch.Tensor, dict]:
    """The sum of the losses of (2), and what is logged."""
    mean, log_std = (x.unsqueeze(1) for x in behaviour(params, batch.obs))  # (B, 1, d)
    drawn = (mean + log_std.exp() * draws.normal).detach().clamp(-1, 1)
    candidates = torch.cat([batch.action.unsqueeze(1), drawn, draws.uniform], 1)  # (B, 1 + n, d)
    log_beta = gaussian_log_prob(candidates, mean, log_std)  # (B, 1 + n)
    log_outcome = outcomes(params, batch.obs, candidates)  # (B, 1 + n, K)
    bins = batch.bin.view(-1, 1, 1).expand(-1, candidates.shape[1], 1)  # all candidates get the return of the data
    log_outcome = log_outcome.gather(2, bins).squeeze(2)  # (B, 1 + n)
    scores = log_beta + log_outcome
    if args.nce_correct:  # q = half beta, half uniform: without it beta learns to be too wide
        log_uniform = torch.full_like(log_beta, -candidates.shape[2] * math.log(2))
        scores = scores - (torch.logaddexp(log_beta.detach(), log_uniform) - math.log(2))
    nce, rtg = nce_loss(scores), -log_outcome[:, 0].mean()
    log_value = mlp(params, "value", batch.obs).log_softmax(-1)
    value = -log_value.gather(1, batch.bin.unsqueeze(1)).mean()
    found = (scores[:, 0] >= scores.amax(1)).float().mean()
    entropy = -(log_value.exp() * log_value).sum(1).mean()
    logged = {"nce_loss": nce, "rtg_loss": rtg, "value_loss": value, "nce_accuracy": found, "return_entropy": entropy,
              "beta_std": log_std.exp().mean()}
    return nce + args.rtg_weight * rtg + value, logged


def joint(params: dict, obs: torch.Tensor, args: Args) -> torch.Tensor:
    """Discrete actions: log p(a, R|s) (B, A, K) of one network, log beta(a|s) + log p(R|s, a)."""
    return mlp(params, "joint", obs).log_softmax(1).unflatten(1, (-1, args.bins))


def project(prob: torch.Tensor, reward: torch.Tensor, discount: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """Distributions (B, K) over the bins' centres z, as seen one step earlier: those of reward + discount z, each
    shared by the two nearest centres (Bellemare et al. 2017)."""
    bins = prob.shape[1]
    centre = (torch.arange(bins, device=prob.device) + 0.5) / bins * (high - low) + low
    moved = (reward.unsqueeze(1) + discount.unsqueeze(1) * centre).clamp(centre[0], centre[-1])  # (B, K)
    place = (moved - centre[0]) / (high - low) * bins  # in bins from the first centre
    share = (1 - (place.unsqueeze(2) - torch.arange(bins, device=prob.device)).abs()).clamp(min=0)  # (B, K, K)
    return (prob.unsqueeze(2) * share).sum(1)


def joint_loss(params: dict, target: dict, batch: Batch, scale: dict, args: Args) -> tuple[torch.Tensor, dict]:
    """(2) for discrete actions, where the candidates are all of them."""
    log_joint = joint(params, batch.obs, args)
    log_beta = log_joint.logsumexp(2)  # (B, A)
    rows = torch.arange(len(batch.obs), device=log_beta.device)
    log_outcome = log_joint[rows, batch.action] - log_beta[rows, batch.action].unsqueeze(1)  # (B, K)
    if args.discrete == "td":  # the return of the behaviour policy, from the next state's
        following = joint(target, batch.next_obs, args).exp().sum(1)  # (B, K)
        wanted = project(following, batch.reward, args.gamma * (1 - batch.terminated), scale["low"], scale["high"])
        rtg = -(wanted * log_outcome).sum(1).mean()
    else:
        rtg = -log_outcome.gather(1, batch.bin.unsqueeze(1)).mean()
    action = -log_beta[rows, batch.action].mean()
    found = (log_beta.argmax(1) == batch.action).float().mean()
    return action + args.rtg_weight * rtg, {"action_loss": action, "rtg_loss": rtg, "accuracy": found}


def conditioned(obs: torch.Tensor, rtg: torch.Tensor, scale: dict, args: Args) -> torch.Tensor:
    """What a policy that imitates sees: the state, and with --mode rcrl the standardised return."""
    if args.mode == "bc":
        return obs
    return torch.cat([obs, ((rtg - scale["mean"]) / scale["std"]).unsqueeze(1)], 1)


def imitation_loss(params: dict, batch: Batch, scale: dict, args: Args) -> tuple[torch.Tensor, dict]:
    """-log pi(a|s) or -log pi(a|s, R)."""
    inputs = conditioned(batch.obs, batch.rtg, scale, args)
    if batch.action.dim() == 1:
        log_prob = mlp(params, "beta", inputs).log_softmax(1).gather(1, batch.action.unsqueeze(1))
    else:
        log_prob = gaussian_log_prob(batch.action, *behaviour(params, inputs))
    return -log_prob.mean(), {"action_loss": -log_prob.mean()}


class Decision(NamedTuple):
    output: torch.Tensor  # (B, d) actions within +-1, or (B, A) log-probabilities of discrete ones
    k: torch.Tensor  # (B,) the bin k* that is asked for; 0 where none is


def search(log_beta, log_tail, mean: torch.Tensor, log_std: torch.Tensor, noise: Search) -> torch.Tensor:
    """argmax over actions (B, d) of log_beta + log_tail, functions (B, n, d) -> (B, n), within +-1. Samples of beta are
    drawn again by their weight and moved, in ever smaller steps; the best of all that were tried is kept."""
    tried = (mean.unsqueeze(1) + log_std.exp().unsqueeze(1) * noise.start).clamp(-1, 1)  # (B, n, d)
    best, best_score = tried[:, 0], torch.full_like(tried[:, 0, 0], -math.inf)
    for step in range(DFO_STEPS + 1):
        score = log_beta(tried) + log_tail(tried)  # (B, n), minus the energy
        top, place = score.max(1)
        chosen = tried.gather(1, place[:, None, None].expand(-1, 1, tried.shape[2])).squeeze(1)
        best = torch.where((top > best_score).unsqueeze(1), chosen, best)
        best_score = torch.maximum(top, best_score)
        if step < DFO_STEPS:
            heights = score.softmax(1).cumsum(1)
            drawn = torch.searchsorted(heights, noise.ranks[step].expand_as(heights).contiguous())
            drawn = drawn.clamp(max=tried.shape[1] - 1).unsqueeze(2).expand_as(tried)
            tried = tried.gather(1, drawn) + DFO_NOISE * DFO_SHRINK ** step * noise.moves[step]
            tried = tried.clamp(-1, 1)
    return best


def draw_search(samples: int, d: int, generator: torch.Generator) -> Search:
    start = torch.randn(samples, d, generator=generator)
    start[0] = 0  # beta's mean itself: with c = 1 the best action
    return Search(start, torch.randn(DFO_STEPS, samples, d, generator=generator),
                  torch.rand(DFO_STEPS, samples, generator=generator))


def decide(params: dict, obs: torch.Tensor, noise: Search | tuple[()], scale: dict, args: Args, discrete: bool
           ) -> Decision:
    """(3) for observations (B, f)."""
    nothing = torch.zeros_like(obs[:, 0], dtype=torch.long)
    if args.mode != "br":
        inputs = conditioned(obs, scale["query"].expand(obs.shape[0]), scale, args)
        if discrete:
            return Decision(mlp(params, "beta", inputs).log_softmax(1), nothing)
        return Decision(behaviour(params, inputs)[0].clamp(-1, 1), nothing)
    if discrete:
        log_joint = joint(params, obs, args)
        k = threshold(log_joint.logsumexp(1), args.c)
        log_prob = tail_log_prob(log_joint, k.unsqueeze(1).expand(-1, log_joint.shape[1]))  # (B, A)
        return Decision(log_prob.log_softmax(1), k)
    mean, log_std = behaviour(params, obs)
    k = threshold(mlp(params, "value", obs).log_softmax(1), args.c)

    def log_beta(action: torch.Tensor) -> torch.Tensor:
        return gaussian_log_prob(action, mean.unsqueeze(1), log_std.unsqueeze(1))

    def log_tail(action: torch.Tensor) -> torch.Tensor:
        log_outcome = outcomes(params, obs, action)  # (B, n, K)
        return tail_log_prob(log_outcome, k.unsqueeze(1).expand(-1, log_outcome.shape[1]))
    return Decision(search(log_beta, log_tail, mean, log_std, noise), k)


def describe(output: torch.Tensor, k: torch.Tensor, scale: dict, args: Args) -> dict[str, torch.Tensor]:
    """What is logged of decisions: the bins and returns that are asked for, and how many numbers are at the bounds."""
    asked = scale["low"] + (k + 0.5) / args.bins * (scale["high"] - scale["low"])
    return {"asked_bin": k.float().mean(), "asked_return": asked.mean(), "clamped": (output.abs() >= 1).float().mean()}


def make_agent(args: Args, f: int, d: int, discrete: bool, device: torch.device) -> dict:
    """Fresh parameters and optimiser state; d numbers of an action, or discrete actions."""
    hidden = runtime.hidden_layers(args.hidden)
    if args.mode != "br":
        params = init_mlp("beta", [f + (args.mode == "rcrl"), *hidden, d if discrete else 2 * d])
    elif discrete:
        params = init_mlp("joint", [f, *hidden, d * args.bins])
    else:
        params = init_mlp("beta", [f, *hidden, 2 * d]) | init_mlp("outcome", [f + d, *hidden, args.bins])
        params |= init_mlp("value", [f, *hidden, args.bins])
    agent = {"params": params, "moments": adam_state(params), "count": torch.zeros(())}
    if discrete and args.mode == "br" and args.discrete == "td":
        agent["target"] = {name: p.clone() for name, p in params.items()}
    return tree_map(lambda x: x.to(device), agent)


def update(agent: dict, batch: Batch, draws: Draws | tuple[()], scale: dict, args: Args) -> dict:
    """One step on a batch. Changes `agent` in place, returns what is logged."""
    params, target = agent["params"], agent.get("target")
    agent["count"] += 1
    if args.mode != "br":
        grads, (_, logged) = torch.func.grad_and_value(imitation_loss, has_aux=True)(params, batch, scale, args)
    elif "joint.0.weight" in params:
        grads, (_, logged) = torch.func.grad_and_value(joint_loss, has_aux=True)(params, target, batch, scale, args)
    else:
        grads, (_, logged) = torch.func.grad_and_value(bayes_loss, has_aux=True)(params, batch, draws, args)
    adam(params, grads, agent["moments"], agent["count"], args.learning_rate)
    if target is not None:
        torch._foreach_lerp_(list(target.values()), list(params.values()), TARGET_STEP)
    return {name: x.detach() for name, x in logged.items()}


def draw(args: Args, d: int) -> Draws:
    """Candidates of one update: half of them from beta, half uniform."""
    shape = (args.batch_size, args.negatives // 2, d)
    return Draws(torch.randn(shape), 2 * torch.rand(shape) - 1)


@torch.no_grad()  # gradients are taken by torch.func, inside `update`
def main(args: Args) -> dict[str, float]:
    """Train, resume or evaluate, as `args` say; returns the last evaluation (keys: runtime.EVALUATION)."""
    args, saved = runtime.checked(args, ALGO, RANGES, anew=["c", "samples", "query", "curve"])
    device = runtime.pick_device(args.device, fast_matmul=True)
    evaluator = envs.Evaluator(args)
    vec = evaluator.vec
    example = envs.example_of(vec, vec.reset(10_000 * args.seed))
    f, discrete = offline.features(example).shape[1], not isinstance(vec.action_space, gym.spaces.Box)
    d = int(vec.action_space.n) if discrete else vec.action_space.shape[0]
    agent, normalizer = make_agent(args, f, d, discrete, device), envs.Normalizer(f)
    scale, scalars = {}, runtime.Means()  # scalars: since the last log
    if not args.evaluate:
        columns, scale = prepare(offline.load_for(args.dataset, vec, args.top), args)
        normalizer.add(columns["obs"].float())
    parts = {"agent": agent, "normalizer": normalizer, "scale": scale, "scalars": scalars}
    runtime.restore(parts, saved, only=["agent", "normalizer", "scale"] if args.evaluate else None)
    scale["query"] = scale["quantiles"][round(100 * args.query)]
    there = tree_map(lambda x: x.to(device), scale)
    noise, asked = (), runtime.Means()  # asked: what evaluations ask for
    if args.mode == "br" and not discrete:
        noise = tree_map(lambda x: x.to(device), draw_search(args.samples, d, torch.Generator().manual_seed(args.seed)))

    def choose(obs: torch.Tensor | dict[str, torch.Tensor], c: float = args.c) -> Decision:
        inputs = normalizer(offline.features(obs)).to(device)
        decision = decide(agent["params"], inputs, noise, there, replace(args, c=c), discrete)
        return tree_map(lambda x: x.cpu(), decision)

    def policy(obs: torch.Tensor | dict[str, torch.Tensor]) -> torch.Tensor:
        """The action (B, d), or log-probabilities (B, A): what the run leaves as policy.pt2."""
        return choose(obs).output

    def act(obs: envs.Observation, c: float = args.c) -> np.ndarray:
        """What evaluations play: of discrete actions the likeliest."""
        output, k = choose(envs.to_tensors(obs), c)
        asked.add(describe(output, k, scale, args))
        return output.argmax(1).numpy() if discrete else vec.to_box(output.numpy())

    def returns_by_c() -> torch.Tensor:
        """Mean returns (6,) for each c of CURVE."""
        return torch.tensor([evaluator.play(partial(act, c=c))["return_mean"] for c in CURVE])

    if args.evaluate:
        if args.curve:
            print("\n".join(f"c {c}: return {x:.1f}" for c, x in zip(CURVE, returns_by_c().tolist())))
        return evaluator.report(act, saved["step"])

    # train
    run = runtime.Run(ALGO, args, envs.resolve(args.env), saved, parts)
    learn = runtime.compiled(update, args.compile, device)
    if not saved:
        run.log_evaluation(evaluator.play(act))  # the untrained agent
    while run.advance(1):
        inputs = (sample(columns, scale, normalizer, args), draw(args, d) if noise else ())
        inputs = tree_map(lambda x: x.to(device), inputs)
        scalars.add(learn(agent, *inputs, there, args))
        if run.due(LOG_EVERY):
            run.log(scalars.take())
        if run.due(args.eval_every) or run.over:
            asked.take()  # of other evaluations
            run.log_evaluation(result := evaluator.play(act, twice=run.over))
            score = offline.normalized(result["return_mean"], scale["ref_min"], scale["ref_max"])
            run.log(asked.take() | {"eval/normalized": score})
        if run.over and args.curve:
            run.log({"return_by_c": returns_by_c()}, [f"{c:g}" for c in CURVE])
        run.save_if_due()
    run.finish()
    runtime.save_policy(run.folder / "policy.pt2", policy, example)
    evaluator.film(act, run.folder)
    return result


if __name__ == "__main__":
    with runtime.exit_codes(ALGO):
        main(runtime.cli(Args, ALGO))
