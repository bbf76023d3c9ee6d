"""CMA-ES: covariance matrix adaptation evolution strategy, for discrete and continuous actions.

Hansen, "The CMA Evolution Strategy: A Tutorial" (arXiv 1604.00772), on the weights of a policy. Each generation draws
the weights of `num_envs` candidates from a Gaussian and plays one episode with each:

    candidate = theta + sigma C^(1/2) z,   z standard normal

Mean theta, covariance C and step size sigma then move towards the better half. With active adaptation C also shrinks
along the worse half. C^(1/2) is the symmetric root, so C^(-1/2) of the mean step is the mean of z: no inverse is
needed. The trained policy is the mean theta, not the best candidate, whose return is luck in part. There are no
restarts. An input of 1 is added, for biases. All else is as in ARS: `diff algos/ars.py algos/cma_es.py`.

python algos/cma_es.py --env CartPole-v1
python algos/cma_es.py --env Pendulum-v1 --hidden 16 --num-envs 16
"""
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import start  # noqa: F401  before numpy

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F

import envs
import runtime

ALGO = Path(__file__).stem  # names run folders and result tables
LOG_EVERY = 1000  # environment steps
MOST_WEIGHTS = 2000  # the covariance matrix has the square of their number
SURE = 1 - 1e-6  # probability of the chosen action in policy.pt2, where logarithms have to be finite


@dataclass
class Args:
    """CMA-ES."""
    # twin: run arguments
    env: str = "CartPole-v1"  # environment id; an old Fetch id is replaced by the installed version
    seed: int = 1  # seed of all random numbers: candidates, environments
    total_timesteps: int = 50_000  # environment steps, summed over environments; with --resume: a new total
    num_envs: int = 10  # lambda, candidates that are played together; tutorial: 4 + 3 ln(number of weights)
    eval_every: int = 5_000  # environment steps between evaluations; 0: only at start and end
    eval_episodes: int = 20  # episodes per evaluation
    checkpoint_every: int = 25_000  # environment steps between checkpoints; 0: only at the end
    video: int = 0  # episodes to film after training, or with --evaluate
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where the policies run; auto: on a GPU if there is one
    compile: bool = False  # compile the policy: about 30 s at the first start, for large policies only
    run_dir: str = ""  # run folder; empty: runs/<algo>/<env>/seed<k>-<time>
    resume: str = ""  # run folder to continue exactly, with its own arguments
    evaluate: str = ""  # run folder to evaluate; no training
    track: bool = False  # also log scalars to Weights & Biases (pip install wandb)
    # twin end

    # algorithm
    sigma: float = 0.5  # deviation of the candidates at the start
    active: bool = True  # whether the worse half counts as well, with negative weights
    hidden: int = 0  # units of a hidden tanh layer; 0: the policy is linear
    normalize: bool = True  # inputs normalised by running mean and deviation, clipped to +-5
    survival_bonus: float = 0.0  # subtracted from every reward in training, for tasks that pay for being alive


# RANGES: limits of numbers; all others must be above 0. TUNE: for `make tune`, (low, high) on a log scale, or choices
RANGES = {"hidden": (0, math.inf), "survival_bonus": (0, math.inf)}
TUNE = {"sigma": (0.05, 1.0), "hidden": [0, 8, 16], "num_envs": [10, 20, 40]}


def sizes(vec: envs.VectorEnv) -> tuple[int, int]:
    """Size of the features, and number of discrete actions or size of an action. Raises EnvError for views."""
    if not isinstance(vec.action_space, gym.spaces.Discrete):
        return envs.continuous_sizes(vec)[:2]
    shape, num_actions = envs.discrete_sizes(vec)
    if len(shape) > 1:
        raise envs.EnvError(f"{vec.env.spec.id} observes views of shape {shape}; flat arrays are needed, for pictures "
                            "an encoder behind the id, as :pca, or a script for views, as algos/ppo.py")
    return shape[0], num_actions


def num_weights(f: int, d: int, hidden: int) -> int:
    """Number of weights of a policy."""
    return hidden * (f + d) if hidden else f * d


def forward(theta: torch.Tensor, x: torch.Tensor, d: int, hidden: int) -> torch.Tensor:
    """Inputs x (P, B, f) of P policies with weights theta (P, n) -> outputs (P, B, d), without biases."""
    if hidden:
        first, theta = theta.split([x.shape[2] * hidden, hidden * d], 1)
        x = torch.tanh(torch.einsum("pbf,pfh->pbh", x, first.view(len(first), -1, hidden)))  # (P, f h) -> (P, f, h)
    return torch.einsum("pbf,pfd->pbd", x, theta.view(len(theta), -1, d))  # (P, h d) -> (P, h, d)


def log_probs_of_best(outputs: torch.Tensor) -> torch.Tensor:
    """Log-probabilities (B, A) of a policy that takes the action with the largest output (B, A), almost always."""
    best = F.one_hot(outputs.argmax(1), outputs.shape[1]).to(outputs.dtype)
    return (SURE * best + (1 - SURE) / outputs.shape[1]).log()


@torch.no_grad()
def play(vec: envs.VectorEnv, act: Callable, seed: int, survival_bonus: float
         ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One episode of every copy, from the same start state -> returns (P,) without the bonus, lengths (P,), and all
    features that were seen (S, f). A copy whose episode is over is stepped on, but not counted."""
    obs, playing = vec.reset_alike(seed), np.ones(vec.num_envs, bool)
    returns, lengths, seen = torch.zeros(vec.num_envs).double(), torch.zeros(vec.num_envs, dtype=torch.long), []
    while playing.any():
        features = envs.flatten(obs)
        seen.append(features[playing])
        obs, reward, terminated, truncated, _ = vec.step(act(features))
        returns[playing] += torch.from_numpy(reward[playing]).double() - survival_bonus
        lengths[playing] += 1
        playing &= ~(terminated | truncated)
    return returns, lengths, torch.cat(seen)


class Rates(NamedTuple):
    """What follows from the numbers of weights and candidates (tutorial, Table 1)."""
    weights: torch.Tensor  # (P,), of the candidates, the best first; positive ones have the sum 1, others are <= 0
    mueff: float  # how many candidates the positive weights are worth
    c_sigma: float  # of the step size's path
    d_sigma: float  # damping of the step size
    c_c: float  # of the covariance's path
    c_1: float  # of the covariance, towards its path
    c_mu: float  # of the covariance, towards the candidates
    chi: float  # mean length of a standard normal vector


def rates(n: int, candidates: int, active: bool) -> Rates:
    """Tutorial, Eqs. 49 to 58."""
    raw = math.log((candidates + 1) / 2) - torch.arange(1, candidates + 1, dtype=torch.float64).log()
    better, worse = raw.clamp(min=0), raw.clamp(max=0)
    weights = better / better.sum()
    mueff, mueff_worse = (float(w.sum().square() / w.square().sum()) for w in (better, worse))
    c_sigma = (mueff + 2) / (n + mueff + 5)
    d_sigma = 1 + 2 * max(0, math.sqrt((mueff - 1) / (n + 1)) - 1) + c_sigma
    c_c = (4 + mueff / n) / (n + 4 + 2 * mueff / n)
    c_1 = min(1, candidates / 6) * 2 / ((n + 1.3) ** 2 + mueff)
    c_mu = min(1 - c_1, 2 * (1 / 4 + mueff + 1 / mueff - 2) / ((n + 2) ** 2 + mueff))
    if active:  # the last of these bounds keeps the covariance positive
        bounds = 1 + c_1 / c_mu, 1 + 2 * mueff_worse / (mueff + 2), (1 - c_1 - c_mu) / (n * c_mu)
        weights = weights + min(bounds) * worse / worse.abs().sum()
    chi = math.sqrt(2) * math.exp(math.lgamma((n + 1) / 2) - math.lgamma(n / 2))
    return Rates(weights, mueff, c_sigma, d_sigma, c_c, c_1, c_mu, chi)


def make_agent(n: int, args: Args) -> dict:
    """A Gaussian around weights 0. Raises UserError if there are too many weights for a covariance."""
    if n > MOST_WEIGHTS:
        raise runtime.UserError(f"{n} weights are more than {MOST_WEIGHTS}, and their covariance has the square of "
                                "that; lower --hidden, or use algos/ars.py")
    zeros, identity = torch.zeros(n, dtype=torch.float64), torch.eye(n, dtype=torch.float64)
    return {"theta": zeros, "sigma": torch.tensor(args.sigma, dtype=torch.float64), "covariance": identity,
            "root": identity.clone(), "path_sigma": zeros.clone(), "path_c": zeros.clone(), "generation": 0}


def ask(agent: dict, args: Args) -> tuple[torch.Tensor, torch.Tensor]:
    """Normal numbers z (P, n), and the weights to try (P, n)."""
    z = torch.randn(args.num_envs, len(agent["theta"]), dtype=torch.float64)
    return z, agent["theta"] + agent["sigma"] * z @ agent["root"]


def update(agent: dict, z: torch.Tensor, returns: torch.Tensor, args: Args) -> dict[str, torch.Tensor]:
    """Move the Gaussian towards the candidates with better `returns` (P,), made of `z` (P, n). Changes `agent` in
    place, returns what is logged."""
    n, r = z.shape[1], rates(z.shape[1], len(z), args.active)
    z = z[returns.argsort(descending=True, stable=True)]  # the best first
    y = z @ agent["root"]
    positive = r.weights.clamp(min=0)
    mean_z, mean_y = positive @ z, positive @ y  # (n,) each
    agent["theta"] += agent["sigma"] * mean_y
    agent["generation"] += 1

    # paths: discounted sums of the mean's steps in the last generations; long where the steps agree
    path = (1 - r.c_sigma) * agent["path_sigma"] + math.sqrt(r.c_sigma * (2 - r.c_sigma) * r.mueff) * mean_z
    usual = 1 - (1 - r.c_sigma) ** (2 * agent["generation"])  # less than 1 at first
    h = 1.0 if path.square().sum() / n / usual < 2 + 4 / (n + 1) else 0.0  # 0 keeps a too long path out of C
    path_c = (1 - r.c_c) * agent["path_c"] + h * math.sqrt(r.c_c * (2 - r.c_c) * r.mueff) * mean_y

    # covariance: every worse candidate takes away the same amount, however far from the mean it is
    weights = torch.where(r.weights < 0, r.weights * n / z.square().sum(1), r.weights)
    kept = 1 - r.c_1 * (1 - (1 - h) * r.c_c * (2 - r.c_c)) - r.c_mu * r.weights.sum()
    covariance = kept * agent["covariance"] + r.c_1 * path_c.outer(path_c) + r.c_mu * (y.T * weights) @ y
    agent["covariance"] = (covariance + covariance.T) / 2
    agent["path_sigma"], agent["path_c"] = path, path_c
    step_norm = (agent["sigma"] * mean_y).norm()
    agent["sigma"] *= math.exp(min(1, r.c_sigma / r.d_sigma * (path.norm().item() / r.chi - 1)))
    if agent["generation"] % math.ceil(1 / (10 * n * (r.c_1 + r.c_mu))) == 0:
        values, vectors = torch.linalg.eigh(agent["covariance"])
        agent["root"] = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return {"sigma": agent["sigma"].clone(), "step_norm": step_norm}


def check(args: Args) -> None:
    """Raise UserError for numbers that do not fit together."""
    if args.num_envs < 2:
        raise runtime.UserError(f"--num-envs {args.num_envs}: a ranking needs two candidates; take 4 or more")


@torch.no_grad()
def main(args: Args) -> dict[str, float]:
    """Train, resume or evaluate, as `args` say; returns the last evaluation (keys: runtime.EVALUATION)."""
    args, saved = runtime.checked(args, ALGO, RANGES)
    check(args)
    device = runtime.pick_device(args.device)
    vec = envs.make_vec(args.env, args.num_envs, threads=torch.get_num_threads())
    f, d = sizes(vec)
    discrete = isinstance(vec.action_space, gym.spaces.Discrete)
    obs = vec.reset(10_000 * args.seed)
    example = envs.example_of(vec, obs)
    agent = make_agent(num_weights(f + 1, d, args.hidden), args)
    normalizer = envs.Normalizer(f, args.normalize)
    scalars = runtime.Means()  # since the last log
    parts = {"agent": agent, "normalizer": normalizer, "vec": vec, "scalars": scalars}
    runtime.restore(parts, saved, only=["agent", "normalizer"] if args.evaluate else None)
    evaluator = envs.Evaluator(args)
    policies = runtime.compiled(forward, args.compile, device)

    def look(features: torch.Tensor) -> torch.Tensor:
        """Features (B, f) -> inputs of the policies (B, f + 1): a 1 is added, for the bias."""
        return F.pad(normalizer(features), (0, 1), value=1.0).double().to(device)

    def to_env(outputs: torch.Tensor) -> np.ndarray:
        """Outputs (B, d) -> actions of the environment."""
        if discrete:
            return outputs.argmax(1).cpu().numpy()
        return vec.to_box(outputs.clamp(-1, 1).float().cpu().numpy())

    def outputs_of(features: torch.Tensor) -> torch.Tensor:
        """Outputs (B, d) of the trained weights for features (B, f)."""
        return forward(agent["theta"].unsqueeze(0).to(device), look(features).unsqueeze(0), d, args.hidden)[0]

    def policy(obs: torch.Tensor | dict[str, torch.Tensor]) -> torch.Tensor:
        """Log-probabilities (B, A) or actions (B, d) in [-1, 1]. The run exports this as policy.pt2."""
        outputs = outputs_of(envs.flatten(obs)).cpu()
        return (log_probs_of_best(outputs) if discrete else outputs.clamp(-1, 1)).float()

    def act(obs: envs.Observation) -> np.ndarray:
        """The actions of evaluations."""
        return to_env(evaluator.noted(outputs_of(envs.flatten(obs)), scores="output"))

    if args.evaluate:
        return evaluator.report(act, saved["step"])

    # train
    run = runtime.Run(ALGO, args, envs.resolve(args.env), saved, parts)
    if not saved:
        run.log_evaluation(evaluator.play(act))  # the untrained agent
    while not (run.over or run.stopped):
        noise, candidates = ask(agent, args)
        candidates = candidates.to(device)

        def try_out(features: torch.Tensor) -> np.ndarray:
            """Features (P, f) -> each candidate's action in its own copy."""
            return to_env(policies(candidates, look(features).unsqueeze(1), d, args.hidden)[:, 0])
        start = int(torch.randint(2 ** 31, ()))  # another start state in every iteration
        returns, lengths, seen = play(vec, try_out, start, args.survival_bonus)
        scalars.add(update(agent, noise, returns, args) | {"return": returns.mean(), "return_best": returns.max()})
        normalizer.add(seen)  # after the step: all candidates saw inputs of the same scale
        run.advance(int(lengths.sum()))

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
