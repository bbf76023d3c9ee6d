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
from pathlib import Path
from typing import Literal, NamedTuple

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy: its own threads fight with torch's for the cores
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map

import envs
import runtime
from envs import offline

ALGO = Path(__file__).stem  # names run folders and result tables
LOG_EVERY = 500  # updates
CURVE = [1.0, 0.5, 0.2, 0.1, 0.05, 0.02]  # c of --curve
DFO_STEPS, DFO_NOISE, DFO_SHRINK = 5, 0.5, 0.9  # of the search for an action
EDGE = 1e-3  # stored actions are kept so far from +-1, where clipped noise piles up that no Gaussian has


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
    negative_rtg: bool = False  # negatives get random returns, else that of the data's action
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
    bin: torch.Tensor  # (B, 2 n)


class Search(NamedTuple):
    """What chance decides in the search for an action; drawn once, so that the policy is a function of what it sees."""
    start: torch.Tensor  # (n, d)
    moves: torch.Tensor  # (DFO_STEPS, n, d)
    ranks: torch.Tensor  # (DFO_STEPS, n), uniform


# Networks are dicts of tensors, {"beta.0.weight": ..., "beta.0.bias": ...}, and losses are functions of them: what
# torch.func differentiates, and what torch.compile turns into one graph with the optimiser inside.
# twin: networks
def init_mlp(name: str, sizes: list[int], stack: tuple[int, ...] = ()) -> dict[str, torch.Tensor]:
    """Parameters of a ReLU network in PyTorch's default initialisation; `stack=(2,)` makes two side by side."""
    params = {}
    for i, (fan_in, fan_out) in enumerate(zip(sizes, sizes[1:])):
        bound = fan_in ** -0.5
        params[f"{name}.{i}.weight"] = torch.empty(*stack, fan_in, fan_out).uniform_(-bound, bound)
        params[f"{name}.{i}.bias"] = torch.empty(*stack, *(1,) * len(stack), fan_out).uniform_(-bound, bound)
    return params


def mlp(params: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    """(B, in) -> (B, out), or (2, B, out) of two networks side by side."""
    depth = sum(f"{name}.{i}.weight" in params for i in range(len(params)))
    for i in range(depth):
        x = torch.matmul(x, params[f"{name}.{i}.weight"]) + params[f"{name}.{i}.bias"]
        if i < depth - 1:
            x = F.relu(x)
    return x


def adam_state(params: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    return {moment: {name: torch.zeros_like(p) for name, p in params.items()} for moment in ("mean", "square")}


def adam(params: dict, grads: dict, moments: dict, count: torch.Tensor, learning_rate: float) -> None:
    """Adam in place, all tensors at once. `count` is a tensor: as a number it would be compiled in as a constant."""
    m, v = list(moments["mean"].values()), list(moments["square"].values())
    p, g = [params[name] for name in moments["mean"]], [grads[name] for name in moments["mean"]]
    torch._foreach_lerp_(m, g, 1 - 0.9)
    torch._foreach_mul_(v, 0.999)
    torch._foreach_addcmul_(v, g, g, 1 - 0.999)
    scale = torch._foreach_sqrt(v)
    torch._foreach_div_(scale, (1 - 0.999 ** count).sqrt())
    torch._foreach_add_(scale, 1e-8)
    step = torch._foreach_div(m, scale)
    torch._foreach_mul_(step, learning_rate / (1 - 0.9 ** count))
    torch._foreach_sub_(p, step)
# twin end
