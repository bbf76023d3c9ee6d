"""ARS: augmented random search, for discrete and continuous actions. The parent of `cma_es.py`.

Mania et al., "Simple random search provides a competitive approach to reinforcement learning" (arXiv 1803.07055). Each
iteration draws directions delta_k in the space of a policy's weights M. Two episodes are played per direction, one with
M + noise delta_k and one with M - noise delta_k; their returns are r_k+ and r_k-. M then moves along the b best
directions, with sigma the deviation of their 2 b returns (Algorithm 2):

    M <- M + learning_rate / (b sigma) sum_k (r_k+ - r_k-) delta_k

The policy is linear, M x, and M starts at 0. Inputs x are normalised by running statistics (V2), which change between
iterations only; --no-normalize is V1.

All episodes of an iteration start from the same state and are played side by side, so --num-envs is twice the number of
directions. A discrete action is the argmax, a continuous one is clipped to its bounds. Inputs are clipped to +-5. An
environment goes on until the longest episode is over; only the steps of its first episode count.

python algos/ars.py --env CartPole-v1
python algos/ars.py --env Pendulum-v1 --hidden 16 --num-envs 8 --top 1 --noise 0.1 --learning-rate 0.018
"""
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

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
SURE = 1 - 1e-6  # probability of the chosen action in policy.pt2, where logarithms have to be finite


@dataclass
class Args:
    """ARS."""
    # twin: run arguments
    env: str = "CartPole-v1"  # environment id; an old Fetch id is replaced by the installed version
    seed: int = 1  # seed of all random numbers: directions, environments
    total_timesteps: int = 50_000  # environment steps, summed over environments; with --resume: a new total
    num_envs: int = 16  # candidates that are played together, two for each direction
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
    top: int = 4  # b, number of directions that count: those with the largest of their two returns
    noise: float = 0.05  # nu, how far candidates are moved along a direction
    learning_rate: float = 0.02  # alpha
    hidden: int = 0  # units of a hidden tanh layer; 0: the policy is linear
    normalize: bool = True  # inputs normalised by running mean and deviation, clipped to +-5
    survival_bonus: float = 0.0  # subtracted from every reward in training, for tasks that pay for being alive


# RANGES: limits of numbers; all others must be above 0. TUNE: for `make tune`, (low, high) on a log scale, or choices
RANGES = {"hidden": (0, math.inf), "survival_bonus": (0, math.inf)}
TUNE = {"learning_rate": (5e-3, 0.1), "noise": (5e-3, 0.2), "num_envs": [8, 16, 32, 64], "top": [1, 2, 4]}


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


def make_agent(f: int, d: int, args: Args) -> dict:
    """Fresh weights: zeros, but for those of a hidden layer. Were these zeros too, a direction and its opposite would
    make the same policy, because two signs cancel, and there would never be a step."""
    theta = torch.zeros(num_weights(f, d, args.hidden), dtype=torch.float64)
    theta[:f * args.hidden] = torch.randn(f * args.hidden, dtype=torch.float64) / math.sqrt(f)
    return {"theta": theta}


def ask(agent: dict, args: Args) -> tuple[torch.Tensor, torch.Tensor]:
    """Directions (N, n), and the weights to try (2N, n): along all of them, then against all of them."""
    delta = torch.randn(args.num_envs // 2, len(agent["theta"]), dtype=torch.float64)
    return delta, torch.cat([agent["theta"] + args.noise * delta, agent["theta"] - args.noise * delta])


def update(agent: dict, delta: torch.Tensor, returns: torch.Tensor, args: Args) -> dict[str, torch.Tensor]:
    """A step along the best of the directions `delta` (N, n). `returns` (2N,) are those of the weights from `ask`.
    Changes `agent` in place, returns what is logged. Where all returns are equal there is no step."""
    along, against = returns.chunk(2)  # (N,) each
    best = torch.maximum(along, against).argsort(descending=True, stable=True)[:args.top]
    deviation = torch.cat([along[best], against[best]]).std(correction=0)
    step = torch.zeros_like(agent["theta"])
    if deviation > 1e-12:
        step = args.learning_rate / (args.top * deviation) * ((along - against)[best] @ delta[best])
    agent["theta"] += step
    return {"step_norm": step.norm(), "return_deviation": deviation}


def check(args: Args) -> None:
    """Raise UserError for numbers that do not fit together."""
    if args.num_envs % 2 or args.top > args.num_envs // 2:
        raise runtime.UserError(f"--num-envs {args.num_envs} --top {args.top}: two environments for each direction are "
                                f"needed, and not more than {args.num_envs // 2} directions count; choose others")


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
    agent = make_agent(f, d, args)
    normalizer = envs.Normalizer(f, args.normalize)
    scalars = runtime.Means()  # since the last log
    parts = {"agent": agent, "normalizer": normalizer, "vec": vec, "scalars": scalars}
    runtime.restore(parts, saved, only=["agent", "normalizer"] if args.evaluate else None)
    evaluator = envs.Evaluator(args)
    policies = runtime.compiled(forward, args.compile, device)

    def look(features: torch.Tensor) -> torch.Tensor:
        """Features (B, f) -> inputs of the policies."""
        return normalizer(features).double().to(device)

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
