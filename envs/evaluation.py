"""Evaluation without bias to short episodes, and video without a display."""
import csv
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Sequence

import gymnasium as gym
import numpy as np
import torch

from envs import foreign, franka_button, mobile
from envs.captions import action_words
from envs.crafter_text import is_crafter
from envs.encoders import adopt_encoder
from envs.ids import EnvError, resolve
from envs.making import make_vec
from envs.minigrid import is_grid
from envs.timeline import Said, draw_actions, draw_timeline
from envs.vector import Observation, VectorEnv
from envs.world import find_renderer

Act = Callable[[Observation], np.ndarray]  # a batch of observations -> (num_envs, d) actions
ENDLESS = 100_000  # steps after which an episode without a time limit is taken to have no end


class Evaluator:
    """Evaluations and films of a run, on environments of their own: training does not notice them.

    vec: the environments. generator: what chance there is in acting, the same in every evaluation.
    """

    def __init__(self, args, copies: int = 32, **kwargs):
        """`args` are those of a script; `kwargs` go to the environments, of which there are `copies` at most."""
        self.args, self.kwargs = args, kwargs
        self.vec = make_vec(args.env, min(copies, args.eval_episodes), threads=torch.get_num_threads(), **kwargs)
        if args.evaluate:
            adopt_encoder(self.vec, Path(args.evaluate))
        self._begin()

    def _begin(self) -> None:
        self.generator, self.log = torch.Generator().manual_seed(self.args.seed), []
        self.said, self.filming = [], False

    def note(self, weights: torch.Tensor, who: int | torch.Tensor) -> None:
        """Keep for the film the weights (n,) of the policies in the first environment, and which of them acts there."""
        self.log.append((weights.tolist(), int(who)))

    def noted(self, values: torch.Tensor, std: torch.Tensor | None = None, scores: str = "") -> torch.Tensor:
        """Keep for the film what a policy says in the first environment: log-probabilities (B, A), or mean actions
        (B, d) in [-1, 1], with the deviations `std` (B, d) of a Gaussian; or, where `scores` names them, other numbers
        (B, A) of actions, as Q. Returns `values`."""
        if self.filming:
            self.said.append(Said(values[0].tolist(), None if std is None else std[0].tolist(), scores))
        return values

    @foreign.global_draws_kept()
    def play(self, act: Act, twice: bool = False) -> dict[str, float]:
        """`args.eval_episodes` episodes, or twice as many, from the same start states every time; see `evaluate`."""
        self._begin()
        episodes = self.args.eval_episodes * (2 if twice else 1)
        return evaluate(act, self.vec, episodes, 10_000 * self.args.seed + 5_000)

    def report(self, act: Act, step: int, names: Sequence[str] = ()) -> dict[str, float]:
        """What --evaluate does: play, print, film."""
        result = self.play(act)
        tell(self.args, step, result)
        self.film(act, Path(self.args.evaluate), names)
        return result

    @foreign.global_draws_kept()
    def film(self, act: Act, folder: Path, names: Sequence[str] = ()) -> None:
        """Film `args.video` episodes into the run `folder`, and draw their actions, with what `act` gave to `noted`.
        With `names` of policies, also draw the attention, which `act` gave to `note`."""
        self._begin()
        self.filming = True
        record(act, self.args.env, self.args.video, 10_000 * self.args.seed + 7_000, folder / "video", names, self.log,
               self.said, **self.kwargs)
        self.filming = False


def tell(args, step: int, result: dict[str, float]) -> None:
    """Print the `result` of --evaluate, and write it down."""
    print(f"{args.env} after {step} steps, start states of seed {args.seed}:",
          ", ".join(f"{name} {x:.3f}" for name, x in result.items()))
    write_down(args, args.env, step, result)


def write_down(args, env: str, step: int, result: dict[str, float]) -> None:
    """Add the `result` of --evaluate in `env` to evaluation.csv in the run folder, where that can be written."""
    path = Path(args.evaluate, "evaluation.csv")
    rows = [] if path.exists() else [["env", "seed", "step", *result]]
    try:
        with path.open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([*rows, [env, args.seed, step, *(
                f"{x:.6g}" for x in result.values())]])
    except OSError as error:
        print(f"note: {path} is not written ({error.strerror})", file=sys.stderr)


def evaluate(act: Act, vec: VectorEnv, episodes: int, seed: int) -> dict[str, float]:
    """Run `episodes` episodes of `act` on `vec`, shared evenly by its copies, from the start states of `seed`.

    Stopping at the first `episodes` finished ones would favour short episodes; here each copy plays its share to the
    end. `vec` should be kept for evaluation alone. Success is that of an episode's last step.

    Returns episodes, return_mean, return_std, success_rate (NaN without a notion of success), length_mean.
    Raises ValueError for fewer episodes than copies, EnvError for an episode that does not end.
    """
    if episodes < vec.num_envs:
        raise ValueError(f"{episodes} episodes cannot be shared by {vec.num_envs} copies")
    share = episodes // vec.num_envs + (np.arange(vec.num_envs) < episodes % vec.num_envs)
    obs = vec.reset(seed)
    finished = np.zeros(vec.num_envs, np.int64)
    running_return, running_length = np.zeros(vec.num_envs), np.zeros(vec.num_envs, np.int64)
    returns, lengths, successes = [], [], []
    while (finished < share).any():
        if vec.max_episode_steps is None and running_length[finished < share].max() >= ENDLESS:
            raise EnvError(f"an episode of {vec.env.spec.id} has not ended after {ENDLESS} steps; give it a time "
                           "limit: gymnasium.register(..., max_episode_steps=...)")
        obs, reward, terminated, truncated, info = vec.step(act(obs))
        running_return += reward
        running_length += 1
        for i in np.flatnonzero(terminated | truncated):
            if finished[i] < share[i]:
                returns.append(running_return[i])
                lengths.append(running_length[i])
                successes.append(info["success"][i])
            finished[i] += 1
            running_return[i] = running_length[i] = 0
    if not np.isnan(successes).all():  # some tasks name success where there is one, and nothing elsewhere
        successes = np.nan_to_num(successes)
    return {"episodes": episodes, "return_mean": float(np.mean(returns)), "return_std": float(np.std(returns)),
            "success_rate": float(np.mean(successes)), "length_mean": float(np.mean(lengths))}


def record(act: Act, env_id: str, episodes: int, seed: int, folder: Path, names: Sequence[str] = (),
           log: Sequence[tuple[list[float], int]] = (), said: Sequence[Said] = (), **kwargs) -> None:
    """Play and film `episodes` episodes into `folder/episode-<k>.mp4`; episode k starts as a reset with `seed + k`.
    Draw `folder/actions-<k>.png` from the actions, and from `said`, to which `act` may append at every step.

    With `names`, also draw `folder/attention-<k>.png` from `log`, to which `act` appends at every step the weights of
    these policies and the index of the one that acts. `kwargs` go to the environment. Without any working renderer, say
    on stderr what to install.
    """
    if episodes < 1:
        return
    resolved = resolve(env_id)
    grid, entry = is_grid(resolved), str(gym.spec(resolved).entry_point)
    painted = grid or is_crafter(resolved) or any(  # by numpy or pygame
        name in entry for name in ("classic_control", "multigoal", "mobile"))
    if not can_be_filmed(resolved, painted):
        return
    import imageio.v2 as imageio  # slow to import, and only filming needs it

    folder.mkdir(parents=True, exist_ok=True)
    with or_no_film():
        vec = make_vec(env_id, 1, fast=False, render_mode="rgb_array", **kwargs)
        for k in range(episodes):
            obs, ended, frames, actions, first, first_said = vec.reset(seed + k), False, [], [], len(log), len(said)
            while not ended:
                frames.append(vec.render())
                actions.append(act(obs))
                obs, _, terminated, truncated, _ = vec.step(actions[-1])
                ended = bool(terminated[0] or truncated[0])
            imageio.mimwrite(folder / f"episode-{k}.mp4", frames, fps=vec.env.metadata.get("render_fps") or 25)
            draw_actions(frames, in_learners_units(np.concatenate(actions), vec.action_space), said[first_said:],
                         names_of_actions(resolved, vec.action_space), folder / f"actions-{k}.png", crop=not painted)
            if names and len(log) > first:  # a policy may act without attention
                weights, acting = zip(*log[first:])
                draw_timeline(frames, weights, acting, names, folder / f"attention-{k}.png", crop=not painted)
        vec.close()
        print(f"filmed into {folder}", file=sys.stderr)


@contextmanager
def or_no_film():
    """Says in one line what an environment fails with: a film is no reason to end a finished run badly."""
    try:
        yield
    except EnvError as error:
        print(f"no film: {error}", file=sys.stderr)


def in_learners_units(actions: np.ndarray, space: gym.Space) -> np.ndarray:
    """Actions (n, d) of a space as those in [-1, 1] that learners have, 0 where its bounds are equal; discrete ones
    (n,) as they are."""
    if isinstance(space, gym.spaces.Discrete):
        return actions
    middle, half = (space.high + space.low) / 2, (space.high - space.low) / 2
    return (actions - middle) / np.where(half == 0, 1, half)


def names_of_actions(env_id: str, space: gym.Space) -> list[str]:
    """What discrete actions are called: numbers where they have no words."""
    count = int(getattr(space, "n", 0))
    for robot in (mobile, franka_button):
        if env_id in robot.IDS:
            return list(robot.ACTION_WORDS[:count])
    try:
        return list(action_words(env_id)[:count])
    except EnvError:
        return [str(k) for k in range(count)]


def can_be_filmed(env_id: str, painted: bool) -> bool:
    """Whether a registered environment has pictures, and unless `painted` without OpenGL, this machine a renderer; says
    on stderr what is missing."""
    entry = gym.spec(env_id).entry_point
    creator = entry if callable(entry) else gym.envs.registration.load_env_creator(entry)
    modes = (getattr(creator, "metadata", None) or {}).get("render_modes", ["rgb_array"])  # a function may have any
    if "rgb_array" not in modes:
        print(f"no video: {env_id} draws no pictures, its render_modes lack 'rgb_array'", file=sys.stderr)
        return False
    if not painted and not find_renderer():
        print("no video: neither EGL nor OSMesa works here; on Debian or Ubuntu: apt-get install libegl1 libgl1 "
              "libosmesa6", file=sys.stderr)
        return False
    return True
