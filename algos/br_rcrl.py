"""BR-RCRL: offline reward-conditioned RL by Bayes' rule. The return is not an input of the policy, but an output.

Ding, Che, Zhao, Pavone, "Bayesian Reparameterization of Reward-Conditioned Reinforcement Learning with Energy-based
Models" (ICML 2023, arXiv 2305.11340). R is the discounted sum of rewards to the end of the episode, in K bins. beta is
the policy that made the data. By Bayes' rule

    pi(a|s, R) = beta(a|s) p(R|s, a) / p(R|s),  and f(a) = log beta(a|s) + log p(R|s, a)                      (1)
    loss = log sum_j exp f(a_j) - f(a) - log p(R|s, a) - log p(R|s), for candidates a_j: the data's action a, and
           others drawn from beta and uniformly                                                               (2)
    act: the largest k with P(R >= k|s) >= c, then the action with the largest beta(a|s) P(R >= k|s, a)       (3)

So the agent asks for a return in the best fraction c of those in the data from this state, which is never out of reach;
c = 1 is the mean of beta. Departures: (3) tries fewer actions, and keeps the best of them; docs/br_rcrl.md has others.

python algos/br_rcrl.py --env Hopper-v4 --dataset data/Hopper-v4-replay.npz   # made by benchmarks/offline.py
"""
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable, Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import start  # noqa: F401  before numpy

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
DFO_STEPS, DFO_NOISE, DFO_SHRINK = 5, 0.5, 0.5  # of the search for an action; as published it shrinks by 0.9
TARGET_STEP = 0.005  # Polyak step of the target network, with --discrete td


@dataclass
class Args:
    """Offline RL by Bayes' rule. Steps are updates; environments are stepped in evaluations alone."""
    # twin: run arguments
    env: str = "Hopper-v4"  # environment id of the dataset; evaluations play it
    seed: int = 1  # seed of all random numbers: networks, batches, candidates
    total_timesteps: int = 20_000  # updates; with --resume: a new total
    num_envs: int = 10  # environments that evaluations step together, at most
    eval_every: int = 10_000  # updates between evaluations; 0: only at start and end
    eval_episodes: int = 10  # episodes per evaluation; the last evaluation plays twice as many
    checkpoint_every: int = 10_000  # updates between checkpoints; 0: only at the end
    video: int = 0  # episodes to film after training, or with --evaluate
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where the networks run; auto: on a GPU if there is one
    compile: bool = True  # compile the update into one graph: about 30 s at the first start
    run_dir: str = ""  # run folder; empty: runs/<algo>/<env>/seed<k>-<time>
    resume: str = ""  # run folder to continue exactly, with its own arguments
    evaluate: str = ""  # run folder to evaluate; no training
    track: bool = False  # also log scalars to Weights & Biases (pip install wandb)
    # twin end

    # algorithm
    dataset: str = ""  # .npz of benchmarks/offline.py; or of Minari: a folder, an .hdf5 file, an id that is downloaded
    mode: Literal["br", "bc", "rcrl"] = "br"  # Bayes' rule; behaviour cloning; a policy that is given the return
    discrete: Literal["mc", "td"] = "mc"  # discrete actions: p(R|s, a) from returns in the data, or by TD backups
    top: float = 1.0  # share of the episodes to learn from, those of the highest returns; 0.1 with --mode bc: %BC
    gamma: float = 0.99  # discount of returns
    bins: int = 80  # K, of returns
    vmin: float | None = None  # return at which the bins begin; not given: the 0.1 % quantile in the data
    vmax: float | None = None  # return at which they end; not given: the 99.9 % quantile
    hidden: str = "256x3"  # hidden layers of every network, width x depth
    learning_rate: float = 5e-4  # Adam
    batch_size: int = 128  # samples per update
    drop_tail: int = 0  # last steps of cut episodes to leave out: their returns are too small
    negatives: int = 32  # candidates of (2) beside the data's action, half from beta, half uniform
    nce_correct: bool = False  # subtract the log-density of the candidates' distribution, which (2) leaves out
    rtg_weight: float = 1.0  # of -log p(R|s, a) in the loss
    c: float = 0.05  # fraction of outcomes to ask for
    samples: int = 128  # actions that (3) tries in each of its steps
    query: float = 1.0  # rcrl: quantile of the data's returns that the policy is given; 1: the largest
    curve: bool = False  # at the end, or with --evaluate: an evaluation for each c of CURVE


RANGES = {"top": (1e-6, 1), "gamma": (0, 1), "vmin": (-1e30, 1e30), "vmax": (-1e30, 1e30), "drop_tail": (0, math.inf),
          "negatives": (2, 1e6), "c": (1e-9, 1), "query": (0, 1)}


class Batch(NamedTuple):
    """Samples of the data, observations normalised."""
    obs: torch.Tensor  # (B, f)
    action: torch.Tensor  # (B, d) within +-1, or (B,) of discrete ones
    rtg: torch.Tensor  # (B,), rewards to go: the return R from here on
    bin: torch.Tensor  # (B,), that of rtg
    reward: torch.Tensor  # (B,)
    terminated: torch.Tensor  # (B,)
    next_obs: torch.Tensor  # (B, f)


def rewards_to_go(reward: np.ndarray, starts: np.ndarray, gamma: float) -> np.ndarray:
    """R (N,) of rewards (N,) of the episodes that begin at `starts` (E + 1,). A time limit ends the sum."""
    rtg = np.array(reward, np.float64)
    for begin, end in zip(starts, starts[1:]):
        for t in reversed(range(begin, end - 1)):
            rtg[t] += gamma * rtg[t + 1]
    return rtg


def to_bins(rtg: torch.Tensor, low: torch.Tensor | float, high: torch.Tensor | float, bins: int) -> torch.Tensor:
    """k(R): equal bins from low to high, all beyond in the first and the last."""
    return ((rtg - low) / (high - low) * bins).floor().clamp(0, bins - 1).long()


def prepare(data: offline.Dataset, args: Args) -> tuple[dict, dict]:
    """The columns to draw samples from, and `scale`: what acting needs to know of the returns."""
    rtg = rewards_to_go(data.rew, data.starts, args.gamma)  # (N,)
    rows = offline.without_tails(data, max(args.drop_tail, 1 if args.discrete == "td" else 0))  # td needs a next state
    low, *quantiles, high = np.quantile(rtg[rows], [0.001, *np.linspace(0, 1, 101), 0.999])
    scale = {"low": low if args.vmin is None else args.vmin, "high": high if args.vmax is None else args.vmax,
             "mean": rtg[rows].mean(), "std": rtg[rows].std() + 1e-6, "quantiles": np.array(quantiles),
             "ref_min": data.meta.get("ref_min", math.nan), "ref_max": data.meta.get("ref_max", math.nan)}
    if not scale["low"] < scale["high"]:
        raise runtime.UserError(f"returns from {scale['low']:g} to {scale['high']:g} make no bins; give --vmin, --vmax")
    scale = {name: torch.as_tensor(x, dtype=torch.float32) for name, x in scale.items()}
    columns = {"obs": data.obs, "action": data.act, "rtg": np.float32(rtg), "reward": np.float32(data.rew),
               "terminated": np.float32(data.term), "rows": rows}
    columns = {name: torch.from_numpy(x) for name, x in columns.items()}
    return columns | {"bin": to_bins(columns["rtg"], scale["low"], scale["high"], args.bins)}, scale


def sample(columns: dict, normalizer: envs.Normalizer, size: int) -> Batch:
    """Random rows, with replacement."""
    i = columns["rows"][torch.randint(len(columns["rows"]), (size,))]
    following = (i + 1).clamp(max=len(columns["rtg"]) - 1)  # after the end of an episode: not used
    obs, next_obs = (normalizer(columns["obs"][rows].float()) for rows in (i, following))
    return Batch(obs, *(columns[name][i] for name in ("action", "rtg", "bin", "reward", "terminated")), next_obs)


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
    """k* (B,) of log p(R|s) (B, K): the largest bin k with P(R >= k|s) >= c; else 0."""
    tail = log_prob.exp().flip(-1).cumsum(-1).flip(-1)  # (B, K), P(R >= k|s), falls with k
    k = ((tail >= c).sum(-1) - 1).clamp(min=0)
    return k if c < 1 else torch.zeros_like(k)  # a rounded sum may reach 1 too early


def tail_log_prob(log_prob: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """log P(R >= k) of log p (..., K); k (...), or a size of 1 where it is the same."""
    below = torch.arange(log_prob.shape[-1], device=k.device) < k.unsqueeze(-1)
    return log_prob.masked_fill(below, -math.inf).logsumexp(-1)


def nce_loss(scores: torch.Tensor) -> torch.Tensor:
    """(2), of f (B, 1 + 2 n), the data's action first. If all actions were candidates: -log pi(a|s, R), Bayes' rule."""
    return (scores.logsumexp(1) - scores[:, 0]).mean()


def bayes_loss(params: dict, target: dict, batch: Batch, draws: torch.Tensor, scale: dict, args: Args):
    """(2), and what is logged. draws (2, B, n, d): Gaussian and uniform numbers."""
    mean, log_std = (x.unsqueeze(1) for x in behaviour(params, batch.obs))  # (B, 1, d)
    drawn = (mean + log_std.exp() * draws[0]).detach().clamp(-1, 1)
    candidates = torch.cat([batch.action.unsqueeze(1), drawn, draws[1]], 1)  # (B, 1 + 2 n, d)
    log_beta = gaussian_log_prob(candidates, mean, log_std)  # (B, 1 + 2 n)
    log_outcome = outcomes(params, batch.obs, candidates)  # (B, 1 + 2 n, K)
    bins = batch.bin.view(-1, 1, 1).expand(-1, candidates.shape[1], 1)  # all candidates get the return of the data
    log_outcome = log_outcome.gather(2, bins).squeeze(2)  # (B, 1 + 2 n)
    scores = log_beta + log_outcome
    if args.nce_correct:  # q = half beta, half uniform: without it beta learns to be too wide
        log_uniform = torch.full_like(log_beta, -candidates.shape[2] * math.log(2))
        scores = scores - (torch.logaddexp(log_beta.detach(), log_uniform) - math.log(2))
    nce, rtg = nce_loss(scores), -log_outcome[:, 0].mean()
    log_value = mlp(params, "value", batch.obs).log_softmax(-1)
    value = -log_value.gather(1, batch.bin.unsqueeze(1)).mean()
    accuracy = (scores[:, 0] >= scores.amax(1)).float().mean()  # how often the data's action has the highest score
    logged = {"nce_loss": nce, "rtg_loss": rtg, "value_loss": value, "beta_std": log_std.exp().mean(),
              "accuracy": accuracy, "return_entropy": -(log_value.exp() * log_value).sum(1).mean()}
    return nce + args.rtg_weight * rtg + value, logged


def joint(params: dict, obs: torch.Tensor, args: Args) -> torch.Tensor:
    """Discrete actions: log p(a, R|s) (B, A, K) of one network, log beta(a|s) + log p(R|s, a)."""
    return mlp(params, "joint", obs).log_softmax(1).unflatten(1, (-1, args.bins))


def project(prob: torch.Tensor, reward: torch.Tensor, discount: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """Distributions (B, K) over the bins' centres z, as seen one step earlier: those of reward + discount z, each
    shared by the two nearest centres (Bellemare et al. 2017)."""
    bins = torch.arange(prob.shape[1], device=prob.device)
    width = (high - low) / prob.shape[1]
    moved = reward.unsqueeze(1) + discount.unsqueeze(1) * (low + (bins + 0.5) * width)  # (B, K)
    place = ((moved - low) / width - 0.5).clamp(0, len(bins) - 1)  # in bins from the first centre
    share = (1 - (place.unsqueeze(2) - bins).abs()).clamp(min=0)  # (B, K, K)
    return (prob.unsqueeze(2) * share).sum(1)


def joint_loss(params: dict, target: dict, batch: Batch, draws: torch.Tensor, scale: dict, args: Args):
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
    return action + args.rtg_weight * rtg, {"action_loss": action, "rtg_loss": rtg}


def conditioned(obs: torch.Tensor, rtg: torch.Tensor, scale: dict, args: Args) -> torch.Tensor:
    """Inputs of a policy that imitates: the state, and with --mode rcrl the standardised return."""
    given = ((rtg - scale["mean"]) / scale["std"]).unsqueeze(1)
    return obs if args.mode == "bc" else torch.cat([obs, given], 1)


def imitation_loss(params: dict, target: dict, batch: Batch, draws: torch.Tensor, scale: dict, args: Args):
    """-log pi(a|s) or -log pi(a|s, R)."""
    inputs = conditioned(batch.obs, batch.rtg, scale, args)
    if batch.action.dim() == 1:
        log_prob = mlp(params, "beta", inputs).log_softmax(1).gather(1, batch.action.unsqueeze(1))
    else:
        log_prob = gaussian_log_prob(batch.action, *behaviour(params, inputs))
    return -log_prob.mean(), {"action_loss": -log_prob.mean()}


def draw_search(samples: int, d: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """The random numbers of a search. They are drawn once per run, so the policy is a function of its inputs."""
    start = torch.randn(samples, d, generator=generator)
    start[0] = 0  # beta's mean itself: with c = 1 the best action
    return {"start": start, "moves": torch.randn(DFO_STEPS, samples, d, generator=generator),
            "ranks": torch.rand(DFO_STEPS, samples, generator=generator)}


def search(height: Callable, mean: torch.Tensor, log_std: torch.Tensor, noise: dict[str, torch.Tensor]) -> torch.Tensor:
    """The action (B, d) within +-1 where `height`, (B, n, d) -> (B, n), is largest. Samples of beta are drawn again
    with probability exp(height) and moved, in ever smaller steps; the best of all that were tried is kept."""
    tried = (mean.unsqueeze(1) + log_std.exp().unsqueeze(1) * noise["start"]).clamp(-1, 1)  # (B, n, d)
    best, best_score = tried[:, 0], torch.full_like(tried[:, 0, 0], -math.inf)
    for step in range(DFO_STEPS + 1):
        score = height(tried)  # (B, n)
        top, place = score.max(1)
        chosen = tried.gather(1, place[:, None, None].expand(-1, 1, tried.shape[2])).squeeze(1)
        best, best_score = torch.where((top > best_score)[:, None], chosen, best), torch.maximum(top, best_score)
        if step < DFO_STEPS:
            sums = score.softmax(1).cumsum(1)
            drawn = torch.searchsorted(sums, noise["ranks"][step].expand_as(sums).contiguous())
            again = tried.gather(1, drawn.clamp(max=tried.shape[1] - 1).unsqueeze(2).expand_as(tried))
            tried = (again + DFO_NOISE * DFO_SHRINK ** step * noise["moves"][step]).clamp(-1, 1)
    return best


def decide(params: dict, obs: torch.Tensor, noise: dict, scale: dict, args: Args, discrete: bool
           ) -> tuple[torch.Tensor, torch.Tensor]:
    """(3): observations (B, f) -> actions (B, d) within +-1, of discrete ones log-probabilities (B, A); and k (B,)."""
    k = torch.zeros_like(obs[:, 0], dtype=torch.long)
    if args.mode != "br":
        inputs = conditioned(obs, scale["query"].expand(obs.shape[0]), scale, args)
        if discrete:
            return mlp(params, "beta", inputs).log_softmax(1), k
        return behaviour(params, inputs)[0].clamp(-1, 1), k
    if discrete:
        log_joint = joint(params, obs, args)
        k = threshold(log_joint.logsumexp(1), args.c)
        return tail_log_prob(log_joint, k.unsqueeze(1)).log_softmax(1), k
    mean, log_std = behaviour(params, obs)
    k = threshold(mlp(params, "value", obs).log_softmax(1), args.c)

    def height(action: torch.Tensor) -> torch.Tensor:
        log_beta = gaussian_log_prob(action, mean.unsqueeze(1), log_std.unsqueeze(1))
        return log_beta + tail_log_prob(outcomes(params, obs, action), k.unsqueeze(1))
    return search(height, mean, log_std, noise), k


def make_agent(args: Args, f: int, d: int, discrete: bool, device: torch.device) -> dict:
    """Fresh parameters and optimiser state; d numbers of an action, or discrete actions."""
    hidden = runtime.hidden_layers(args.hidden)
    if args.mode != "br":
        params = init_mlp("beta", [f + 1 if args.mode == "rcrl" else f, *hidden, d if discrete else 2 * d])
    elif discrete:
        params = init_mlp("joint", [f, *hidden, d * args.bins])
    else:
        params = init_mlp("beta", [f, *hidden, 2 * d]) | init_mlp("outcome", [f + d, *hidden, args.bins])
        params |= init_mlp("value", [f, *hidden, args.bins])
    target = {name: p.clone() for name, p in params.items() if name.startswith("joint") and args.discrete == "td"}
    agent = {"params": params, "target": target, "moments": adam_state(params), "count": torch.zeros(())}
    return tree_map(lambda x: x.to(device), agent)


def draw(args: Args, d: int) -> torch.Tensor:
    """The random numbers of an update: (2, B, n, d), Gaussian and uniform ones."""
    shape = (args.batch_size, args.negatives // 2, d)
    return torch.stack([torch.randn(shape), 2 * torch.rand(shape) - 1])


def update(agent: dict, batch: Batch, draws: torch.Tensor, scale: dict, args: Args) -> dict:
    """One step on a batch. Changes `agent` in place, returns what is logged."""
    params, target = agent["params"], agent["target"]
    agent["count"] += 1
    loss = bayes_loss if args.mode == "br" else imitation_loss
    if "joint.0.weight" in params:  # discrete actions
        loss = joint_loss
    grads, (_, logged) = torch.func.grad_and_value(loss, has_aux=True)(params, target, batch, draws, scale, args)
    adam(params, grads, agent["moments"], agent["count"], args.learning_rate)
    if target:
        torch._foreach_lerp_(list(target.values()), [params[name] for name in target], TARGET_STEP)
    return logged


@torch.no_grad()  # gradients are taken by torch.func, inside `update`
def main(args: Args) -> dict[str, float]:
    """Train, resume or evaluate, as `args` say; returns the last evaluation (keys: runtime.EVALUATION)."""
    args, saved = runtime.checked(args, ALGO, RANGES, anew=["c", "samples", "query", "curve"])
    device = runtime.pick_device(args.device, fast_matmul=True)
    evaluator = envs.Evaluator(args, copies=args.num_envs)
    vec = evaluator.vec
    example = envs.example_of(vec, vec.reset(10_000 * args.seed))
    f, discrete = offline.features(example).shape[1], isinstance(vec.action_space, gym.spaces.Discrete)
    d = int(vec.action_space.n) if discrete else vec.action_space.shape[0]
    agent, normalizer = make_agent(args, f, d, discrete, device), envs.Normalizer(f)
    scale, scalars, asked = {}, runtime.Means(), runtime.Means()  # since the last log; of evaluations
    if not args.evaluate:
        columns, scale = prepare(offline.load_for(args.dataset, vec, args.top), args)
        for part in columns["obs"].split(10_000):
            normalizer.add(part.float())
    parts = {"agent": agent, "normalizer": normalizer, "scale": scale, "scalars": scalars}
    runtime.restore(parts, saved, only=["agent", "normalizer", "scale"] if args.evaluate else None)
    scale["query"] = scale["quantiles"][round(100 * args.query)]
    there = tree_map(lambda x: x.to(device), scale)
    noise = tree_map(lambda x: x.to(device), draw_search(args.samples, d, torch.Generator().manual_seed(args.seed)))

    def choose(obs: torch.Tensor | dict[str, torch.Tensor], c: float = args.c) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = normalizer(offline.features(obs)).to(device)
        return tree_map(lambda x: x.cpu(), decide(agent["params"], inputs, noise, there, replace(args, c=c), discrete))

    def policy(obs: torch.Tensor | dict[str, torch.Tensor]) -> torch.Tensor:
        """The action (B, d), or log-probabilities (B, A). The run exports this as policy.pt2."""
        return choose(obs)[0]

    def act(obs: envs.Observation, c: float = args.c) -> np.ndarray:
        """The actions of evaluations; discrete ones are the most likely."""
        output, k = choose(envs.to_tensors(obs), c)
        center = scale["low"] + (k + 0.5) / args.bins * (scale["high"] - scale["low"])
        told = {"br": {"asked_bin": k.float(), "asked_return": center}, "rcrl": {"asked_return": scale["query"]}}
        clamped = {} if discrete else {"clamped": (output.abs() >= 1).float()}
        asked.add({name: x.mean() for name, x in (told.get(args.mode, {}) | clamped).items()})
        return evaluator.noted(output).argmax(1).numpy() if discrete else vec.to_box(output.numpy())

    def returns_by_c() -> torch.Tensor:
        return torch.tensor([evaluator.play(lambda obs: act(obs, c))["return_mean"] for c in CURVE])

    if args.evaluate:
        if args.curve:
            print("\n".join(f"c {c}: return {x:.1f}" for c, x in zip(CURVE, returns_by_c())))
        return evaluator.report(act, saved["step"])

    # train
    run = runtime.Run(ALGO, args, envs.resolve(args.env), saved, parts)
    learn = runtime.compiled(update, args.compile, device)
    if not saved:
        run.log_evaluation(evaluator.play(act))  # the untrained agent
    while run.advance(1):
        inputs = (sample(columns, normalizer, args.batch_size), draw(args, d))
        scalars.add(learn(agent, *tree_map(lambda x: x.to(device), inputs), there, args))
        if run.due(LOG_EVERY):
            run.log(scalars.take())
        if run.due(args.eval_every) or run.over:
            asked.take()  # drop what other evaluations left
            run.log_evaluation(result := evaluator.play(act, twice=run.over))
            score = offline.normalized(result["return_mean"], scale["ref_min"], scale["ref_max"])
            run.log(asked.take() | {"eval/normalized": score})
        if run.over and args.curve:
            run.log({"return_by_c": returns_by_c()}, [f"{c:g}" for c in CURVE])
        run.save_if_due()
    run.finish(example, policy=policy)
    evaluator.film(act, run.folder)
    return run.result


if __name__ == "__main__":
    with runtime.exit_codes(ALGO):
        main(runtime.cli(Args, ALGO))
