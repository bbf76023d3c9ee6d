"""Stream TD(lambda): predicting from a stream. One transition, one update, nothing stored.

Elsayed, Vasan, Mahmood, "Streaming Deep Reinforcement Learning Finally Works" (arXiv 2410.14606). This is the value
part of stream_ac.py, on a non-stationary time series. Each row of the series is an input, and one column is the
cumulant c. The network predicts the discounted sum of all cumulants to come:

    V(s_t) = c_(t+lead) + gamma c_(t+lead+1) + ...,   delta = c_(t+lead) + gamma V(s_(t+1)) - V(s_t)

The true sum is known afterwards, so the error is measured exactly. `diff algos/stream_ac.py algos/stream_td.py` shows
the idea.

The paper predicts the oil temperature of the ETTm2 series (`--env ETTm2.csv`, not shipped). The default is a generated
series of the same kind (envs/series.py says how). Inputs are slow averages of the rows, as published.

python algos/stream_td.py --env series/transformer   # error 5.1 of returns up to 100 (mean of ten seeds)
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
from streamnet import (COMPILED, Net, backward, deviation, forward, make_net, observe, reward_stats, running_stats,
                       scale_reward, sparse_init)

ALGO = Path(__file__).stem  # names run folders and result tables
LOG_EVERY = 1000  # rows
CHECK_EVERY = 100  # steps between checks whether an update overshot its target


@dataclass
class Args:
    """Learn from every transition once, as it comes."""
    # twin: run arguments
    env: str = "series/transformer"  # the generated series, or a CSV file whose last column is to be predicted
    seed: int = 1  # seed of all random numbers: network, generated series
    total_timesteps: int = 68_000  # rows; with --resume: a new total
    eval_every: int = 5_000  # rows per line of eval.csv, the error of predictions made on the way; 0: only one
    checkpoint_every: int = 20_000  # rows between checkpoints; 0: only at the end
    video: int = 0  # above 0: draw predictions over the truth after training, or with --evaluate
    device: Literal["auto", "cpu"] = "auto"  # always the CPU, which is faster for one transition at a time
    compile: bool = True  # compile all that happens between two steps into one graph: about 10 s at the start
    run_dir: str = ""  # run folder; empty: runs/<algo>/<env>/seed<k>-<time>
    resume: str = ""  # run folder to continue exactly, with its own arguments
    evaluate: str = ""  # run folder to evaluate; no training
    track: bool = False  # also log scalars to Weights & Biases (pip install wandb)
    # twin end

    # algorithm
    hidden: str = "128x2"  # hidden layers, width x depth
    obs_trace: float = 0.999  # inputs are averages of the rows so far, weighted by this to the power of age; 0: rows
    lead: int = 2  # rows from an input to the cumulant of its step (as published; 1: the next row)
    kappa_value: float = 2.0  # kappa of the value, the margin of its step bound
    # twin: stream arguments
    gamma: float = 0.99  # discount per step
    lamda: float = 0.8  # trace decay; 0: no traces
    learning_rate: float = 1.0  # alpha, the largest step size
    optimizer: Literal["obgd", "adaptive", "plain"] = "obgd"  # bounded step; also second moments; alpha (ablation)
    sparsity: float = 0.9  # share of incoming weights that start at zero; 0: dense (ablation)
    layer_norm: bool = True  # before every hidden activation
    normalize_obs: bool = True  # observations normalised by running mean and deviation
    scale_reward: bool = True  # rewards divided by the running deviation of the discounted return
    # twin end


# RANGES: limits of numbers; all others must be above 0. TUNE: for `make tune`, (low, high) on a log scale, or choices
RANGES = {"gamma": (0, 1), "lamda": (0, 1), "sparsity": (0, 1), "obs_trace": (0, 0.99999)}
TUNE = {"lamda": [0.0, 0.5, 0.8, 0.9, 0.95], "kappa_value": (1.0, 10.0), "obs_trace": [0.0, 0.9, 0.99, 0.999]}
SCALARS = ("abs_delta", "value", "step_value", "capped_value", "trace_value", "reward_scale")  # logged, means


def make_learner(net: Net, args: Args) -> dict[str, torch.Tensor]:
    """What ObGD keeps of a network, flat (p,): weights, trace, and with --optimizer adaptive the second moments."""
    weights = sparse_init(net, args.sparsity)
    learner = {"weights": weights, "trace": torch.zeros_like(weights)}
    if args.optimizer == "adaptive":
        learner |= {"square": torch.zeros_like(weights), "count": torch.zeros(1)}
    return learner


def obgd(learner: dict[str, torch.Tensor], grad: torch.Tensor, delta: torch.Tensor, cut: torch.Tensor, kappa: float,
         args: Args) -> tuple[torch.Tensor, torch.Tensor]:
    """Overshooting-bounded descent on a flat network, in place; returns the step size and the L1 norm of the direction:
    of the trace; with --optimizer adaptive, of the trace divided by the root of its second moments.

    The trace takes in the gradient of the negated objective. The step is at most 1 / (kappa max(|delta|, 1) |z|_1): a
    prediction with gradient z, of entries of at most 1, then moves less than delta, to first order.
    """
    trace = args.gamma * args.lamda * learner["trace"] + grad
    direction = trace
    if args.optimizer == "adaptive":
        learner["count"].add_(1)
        learner["square"].copy_(0.999 * learner["square"] + 0.001 * (delta * trace).square())
        direction = trace / (learner["square"] / (1 - 0.999 ** learner["count"]) + 1e-8).sqrt()
    size = direction.abs().sum()
    step = torch.full_like(size, args.learning_rate)
    if args.optimizer != "plain":
        step = step / (step * kappa * delta.abs().clamp(min=1) * size).clamp(min=1)
    learner["weights"].sub_(step * delta * direction)
    learner["trace"].copy_(trace * (1 - cut))  # cut only after the update
    return step, size


def average(agent: dict, row: torch.Tensor, args: Args) -> torch.Tensor:
    """Take in a row (k,); returns the average of all rows so far, without the bias of a short past."""
    agent["rows"].add_(1)
    agent["average"].copy_(args.obs_trace * agent["average"] + (1 - args.obs_trace) * row)
    return agent["average"] / (1 - args.obs_trace ** agent["rows"])


def update(agent: dict, nets: dict[str, Net], state: torch.Tensor, next_state: torch.Tensor, reward: torch.Tensor,
           discount: torch.Tensor, args: Args) -> tuple[torch.Tensor, ...]:
    """One transition, one step, in place; returns what is logged. Reward and discount of the next value: (1,). A series
    never ends: no trace is cut."""
    value, norm = agent["value"]["weights"], args.layer_norm
    (v,), value_cache = forward(value, nets["value"], state, norm)
    (next_v,), _ = forward(value, nets["value"], next_state, norm)
    delta = reward + discount * next_v - v  # (1,)
    value_grad = backward(value, nets["value"], value_cache, [torch.full_like(v, -1.0)], norm)  # of -v
    return delta, v, *obgd(agent["value"], value_grad, delta, torch.zeros(1), args.kappa_value, args)


def step(agent: dict, nets: dict[str, Net], state: torch.Tensor, row: torch.Tensor, args: Args
         ) -> tuple[torch.Tensor, ...]:
    """Everything between two rows. `row`, float64: the next row, the cumulant, discount of the next value. Learns from
    it; returns next state, the prediction made at `state` in units of the cumulant, scaled cumulant, delta."""
    obs, reward, discount = row[:-2], row[-2:-1], row[-1:]
    next_state = observe(agent["obs"], average(agent, obs, args), None, 1, args.normalize_obs)
    reward = scale_reward(agent["reward"], reward, torch.zeros(1), args.gamma, args.scale_reward)
    delta, v, step_value, trace_value = update(agent, nets, state, next_state, reward, discount.float(), args)
    scale = deviation(agent["reward"]) if args.scale_reward else torch.ones(1)
    agent["totals"].add_(torch.cat([x.float().view(1) for x in (
        delta.abs(), v, step_value, step_value < args.learning_rate, trace_value, scale)]))
    return next_state, v * scale, reward, delta


def td_error(agent: dict, nets: dict[str, Net], state: torch.Tensor, next_state: torch.Tensor, reward: torch.Tensor,
             discount: float, args: Args) -> float:
    """delta of a transition under the present weights."""
    v, next_v = (forward(agent["value"]["weights"], nets["value"], s, args.layer_norm)[0][0]
                 for s in (state, next_state))
    return (reward + discount * next_v - v).item()


def make_agent(args: Args, k: int) -> tuple[dict, dict[str, Net]]:
    """Fresh network, trace and statistics for rows of k numbers, and the shape of the network."""
    nets = {"value": make_net("vector", (k,), runtime.hidden_layers(args.hidden), [1])}
    return {"value": make_learner(nets["value"], args), "obs": running_stats(k), "reward": reward_stats(),
            "totals": torch.zeros(len(SCALARS)), "rows": torch.zeros(1, dtype=torch.float64),
            "average": torch.zeros(k, dtype=torch.float64)}, nets


def predict_untrained(agent: dict, nets: dict[str, Net], state: torch.Tensor, rows: np.ndarray, args: Args
                      ) -> np.ndarray:
    """Predictions of the untrained network at `state` and at the rows after it. They are not scaled: no cumulant was
    seen. The agent does not change."""
    fresh = tree_map(torch.clone, agent)
    states = [state, *(observe(fresh["obs"], average(fresh, torch.from_numpy(row), args), None, 1, args.normalize_obs)
                       for row in rows)]
    return np.array([forward(fresh["value"]["weights"], nets["value"], s, args.layer_norm)[0][0].item()
                     for s in states])


@torch.no_grad()  # gradients have a closed form
def main(args: Args) -> dict[str, float]:
    """Train, resume or evaluate, as `args` say; returns the last evaluation (keys: runtime.EVALUATION)."""
    args, saved = runtime.checked(args, ALGO, RANGES)
    torch.set_num_threads(1)  # products of one vector: a second thread is only waited for

    # series, agent
    series = envs.Series(args.env, args.seed)
    evaluator = envs.SeriesEvaluator(args, series)
    agent, nets = make_agent(args, series.rows.shape[1])
    first = average(agent, torch.from_numpy(series.rows[0]), args)
    loop = {"state": observe(agent["obs"], first, None, 1, args.normalize_obs), "overshoots": 0}
    parts = {"agent": agent, "evaluator": evaluator, "loop": loop}
    runtime.restore(parts, saved, only=["agent", "evaluator"] if args.evaluate else None)
    if args.evaluate:
        return evaluator.report(saved["step"])

    # train
    row = torch.zeros(series.rows.shape[1] + 2, dtype=torch.float64)
    raw = row.numpy()  # the same memory: assigning to it costs less than making a tensor
    learn = step
    if args.compile and runtime.can_compile(torch.device("cpu")):
        learn = runtime.compile_for(step, COMPILED, agent, nets, loop["state"], row, args)
    run = runtime.Run(ALGO, args, args.env, saved, parts)
    if not saved:
        n = min(args.eval_every or LOG_EVERY, args.total_timesteps)
        run.log_evaluation(evaluator.score(0, n, predict_untrained(agent, nets, loop["state"], series.rows[1:n], args)))
    while run.advance(1):
        state, at = loop["state"], run.step - 1
        raw[:-2], raw[-2], raw[-1] = series.rows[at + 1], series.target[at + args.lead], args.gamma
        loop["state"], evaluator.predicted[at], scaled, delta = learn(agent, nets, state, row, args)
        if run.due(CHECK_EVERY):
            after = td_error(agent, nets, state, loop["state"], scaled, raw[-1], args)
            loop["overshoots"] += after * delta.item() < 0

        # log, evaluate, save
        if run.due(LOG_EVERY):
            means = dict(zip(SCALARS, (agent["totals"] / LOG_EVERY).tolist()))
            window = evaluator.score(run.step - LOG_EVERY, run.step)
            run.log(means | {"rmse": -window["return_mean"], "true_std": window["return_std"],
                             "overshoot": loop["overshoots"] * CHECK_EVERY / LOG_EVERY})
            agent["totals"].zero_()
            loop["overshoots"] = 0
        if run.due(args.eval_every) or run.over:
            run.log_evaluation(evaluator.play(run.step))
        run.save_if_due()
    run.finish()
    evaluator.film(run.step, run.folder)
    return run.result


if __name__ == "__main__":
    with runtime.exit_codes(ALGO):
        main(runtime.cli(Args, ALGO))
