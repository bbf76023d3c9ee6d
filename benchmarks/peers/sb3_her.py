"""The peer: SAC + HER of stable-baselines3 on a Fetch task, evaluated as algos/sac_kian.py evaluates itself.

Two presets. `zoo` has the settings that rl-baselines3-zoo publishes for these tasks; `ours` has the sizes, the number
of environments and updates, and the input normalisation of sac_kian.py, so that what differs is the method and the
code. What SB3 does not offer is left out: a share of uniform actions while learning.

eval.csv has the same columns as that of sac_kian.py, and evaluations are as many episodes as often, from start states
of their own: the two curves can be laid over each other.

pip install stable-baselines3==2.9.2
python benchmarks/peers/sb3_her.py --env FetchPush-v2 --preset ours
"""
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Literal

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy, as in sac_kian.py

import gymnasium as gym
import gymnasium_robotics
import numpy as np
import torch
import tyro

try:
    from stable_baselines3 import SAC, HerReplayBuffer
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize
except ImportError:
    print("sb3_her: stable-baselines3 is not installed; pip install stable-baselines3==2.9.2", file=sys.stderr)
    sys.exit(2)

COLUMNS = ["episodes", "return_mean", "return_std", "success_rate", "length_mean"]
PACKAGES = ["torch", "stable-baselines3", "numpy", "gymnasium", "gymnasium-robotics", "mujoco"]

# rl_zoo3 2.9.2, hyperparams/tqc.yml, FetchPush-v1 with FetchSlide-v1 and FetchPickAndPlace-v1, which inherit from it.
# They are tuned for TQC, SAC with distributional critics; for SAC the zoo has FetchReach alone. What it does not set
# is SB3's default. Older zoos wrapped these tasks in a time feature, this one does not: --time-feature True brings it
# back.
ZOO = dict(num_envs=1, updates_per_step=1.0, batch_size=2048, hidden="512x3", learning_rate=1e-3, gamma=0.95, tau=0.05,
           learning_starts=100, initial_temperature=1.0, time_feature=False, normalize=None)
# hyperparams/sac.yml, FetchReach-v1; `normalize: True` there is VecNormalize's default, rewards included
ZOO_REACH = ZOO | dict(batch_size=256, hidden="64x2", tau=0.005, learning_starts=1000, normalize={"gamma": 0.95})
# Defaults of sac_kian.py. Learning starts there when the first episodes are complete: computed below.
OURS = dict(num_envs=32, updates_per_step=0.1, batch_size=512, hidden="256x3", learning_rate=1e-3, gamma=0.95, tau=0.05,
            learning_starts=None, initial_temperature=1.0, time_feature=True,
            normalize={"norm_reward": False, "clip_obs": 5.0})


@dataclass
class Args:
    """SAC + HER of stable-baselines3 on a Fetch task. Settings left at None are those of the preset."""
    env: str = "FetchPickAndPlace-v2"  # Fetch task; of whatever version, the installed -v4 is made
    seed: int = 1
    total_timesteps: int = 300_000  # environment steps, summed over environments
    preset: Literal["zoo", "ours"] = "ours"  # settings of rl-baselines3-zoo, or of sac_kian.py
    device: Literal["auto", "cpu", "cuda"] = "auto"
    run_dir: str = ""  # run folder; empty: runs/sb3_her-<preset>/<env>/seed<k>-<time>
    eval_every: int = 10_000  # environment steps between evaluations; 0: only at the end
    eval_episodes: int = 50  # episodes per evaluation; the last one plays twice as many

    num_envs: int | None = None  # environments, stepped one after another
    updates_per_step: float | None = None  # updates per environment step
    batch_size: int | None = None
    hidden: str | None = None  # hidden layers of actor and critics, width x depth
    learning_rate: float | None = None
    gamma: float | None = None
    tau: float | None = None
    learning_starts: int | None = None  # environment steps of uniform actions before the first update
    initial_temperature: float | None = None  # alpha at the start, then tuned
    time_feature: bool | None = None  # append 1 - t/T to the observation


class TimeFeature(gym.ObservationWrapper):
    """Appends 1 - t/T to "observation": 1 after a reset, 0 at the end of the episode."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        spaces, self.t, self.limit = env.observation_space.spaces, 0, env.spec.max_episode_steps
        wider = gym.spaces.Box(-np.inf, np.inf, (spaces["observation"].shape[0] + 1,), np.float64)
        self.observation_space = gym.spaces.Dict({**spaces, "observation": wider})

    def reset(self, **kwargs):
        self.t = 0
        return super().reset(**kwargs)

    def step(self, action):
        self.t += 1
        return super().step(action)

    def observation(self, observation: dict) -> dict:
        return observation | {"observation": np.append(observation["observation"], 1 - self.t / self.limit)}


def make_vec(env_id: str, num_envs: int, time_feature: bool) -> DummyVecEnv:
    """`num_envs` environments, one after another. SB3 bootstraps at the time limit: DummyVecEnv tells it apart."""

    def make() -> gym.Env:
        env = gym.make(env_id, disable_env_checker=True)
        return TimeFeature(env) if time_feature else env

    return DummyVecEnv([make] * num_envs)


def evaluate(model: SAC, vec: VecEnv, episodes: int, seed: int) -> dict[str, float]:
    """Deterministic episodes from the start states of `seed`, the same number in each environment of `vec`. Success is
    that of an episode's last step."""
    normalizer = model.get_vec_normalize_env()
    vec.seed(seed)
    obs, played = vec.reset(), []
    counts, returns, lengths = np.zeros((3, vec.num_envs))
    while (counts < episodes // vec.num_envs).any():
        action, _ = model.predict(normalizer.normalize_obs(obs) if normalizer else obs, deterministic=True)
        obs, reward, ended, infos = vec.step(action)
        returns, lengths = returns + reward, lengths + 1
        for i in np.flatnonzero(ended):
            if counts[i] < episodes // vec.num_envs:
                played.append((returns[i], lengths[i], infos[i]["is_success"]))
            counts[i] += 1
            returns[i] = lengths[i] = 0
    returns, lengths, success = np.array(played, np.float64).T
    return dict(zip(COLUMNS, [len(played), returns.mean(), returns.std(), success.mean(), lengths.mean()]))


class Curve(BaseCallback):
    """Evaluates at step 0, every `every` steps (0: never) and, with twice the episodes, at step `last`, where it ends
    the training. Rows go to eval.csv; wall_s counts everything from the first evaluation on."""

    def __init__(self, folder: Path, vec: VecEnv, every: int, last: int, episodes: int, seed: int):
        super().__init__()
        self.evaluate = partial(evaluate, vec=vec, seed=seed)
        self.every, self.last, self.episodes, self.start = every, last, episodes, time.monotonic()
        self.file = (folder / "eval.csv").open("w", buffering=1)  # line-buffered: a killed run keeps its curve
        self.file.write(",".join(["step", "wall_s", *COLUMNS]) + "\n")

    def _write(self, episodes: int) -> None:
        result = self.evaluate(self.model, episodes=episodes)
        values = ",".join(f"{result[name]:.6g}" for name in COLUMNS)
        self.file.write(f"{self.num_timesteps},{time.monotonic() - self.start:.1f},{values}\n")
        print(f"step {self.num_timesteps}: return {result['return_mean']:.1f}, success {result['success_rate']:.2f}",
              file=sys.stderr)

    def _on_training_start(self) -> None:
        self.start = time.monotonic()
        self._write(self.episodes)

    def _on_step(self) -> bool:
        before = self.num_timesteps - self.training_env.num_envs
        over = self.num_timesteps >= self.last
        if over or self.every and self.num_timesteps // self.every > before // self.every:
            self._write(self.episodes * (1 + over))
        return not over  # SB3 would collect to the end of its rollout, and an update would follow

    def _on_training_end(self) -> None:
        self.file.close()


def main(args: Args) -> int:
    """Train and evaluate as `args` say; returns the exit code."""
    gym.register_envs(gymnasium_robotics)
    task = re.fullmatch(r"(Fetch(Reach|Push|Slide|PickAndPlace)(Dense)?)-v\d+", args.env)
    if not task:
        print(f"sb3_her: --env {args.env} is no Fetch task; try FetchPush-v2", file=sys.stderr)
        return 2
    env_id = f"{task[1]}-v4"
    preset = OURS if args.preset == "ours" else ZOO_REACH if task[2] == "Reach" else ZOO
    chosen = {name: value for name, value in asdict(args).items() if name in preset and value is not None}
    settings = preset | chosen
    if settings["learning_starts"] is None:
        settings["learning_starts"] = 50 * settings["num_envs"]
    if args.eval_episodes < 1:
        print(f"sb3_her: --eval-episodes must be at least 1, not {args.eval_episodes}", file=sys.stderr)
        return 2
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", settings["hidden"]):
        print(f"sb3_her: --hidden is width x depth, as in 256x3, not {settings['hidden']!r}", file=sys.stderr)
        return 2
    folder = Path(args.run_dir or Path("runs", f"sb3_her-{args.preset}", args.env,
                                       f"seed{args.seed}-{time.strftime('%Y%m%d-%H%M%S')}"))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        print(f"sb3_her: {folder} is not empty; name another --run-dir", file=sys.stderr)
        return 2

    width, depth = map(int, settings["hidden"].split("x"))
    # Updates per step of all environments as a fraction: 0.1 on 32 environments are 16 updates every 5 such steps.
    rhythm = Fraction(str(settings["updates_per_step"])).limit_denominator(1000) * settings["num_envs"]
    vec = make_vec(env_id, settings["num_envs"], settings["time_feature"])
    if settings["normalize"] is not None:
        # Keeps raw observations in the buffer, as hindsight rewards need, and normalises what is sampled. Only the last
        # observation of an episode is clipped, and rounded to float32, on its way there.
        vec = VecNormalize(vec, **settings["normalize"])
    model = SAC("MultiInputPolicy", vec, seed=10_000 * args.seed, device=args.device, batch_size=settings["batch_size"],
                learning_rate=settings["learning_rate"], gamma=settings["gamma"], tau=settings["tau"],
                ent_coef=f"auto_{settings['initial_temperature']}", learning_starts=settings["learning_starts"],
                train_freq=rhythm.denominator, gradient_steps=rhythm.numerator,
                policy_kwargs=dict(net_arch=[width] * depth), replay_buffer_class=HerReplayBuffer,
                replay_buffer_kwargs=dict(n_sampled_goal=4, goal_selection_strategy="future"),
                buffer_size=min(args.total_timesteps, 1_000_000))  # what is never filled still slows its sampling

    folder.mkdir(parents=True, exist_ok=True)
    commit = shutil.which("git") and subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True,
                                                    text=True, cwd=Path(__file__).parent).stdout.strip()
    flags = [f"--{name.replace('_', '-')} {value}" for name, value in chosen.items() if value != preset[name]]
    config = {"algo": "sac", "variant": " ".join([f"stable-baselines3 {args.preset}", *flags]),
              "args": asdict(args), "env_id": env_id, "settings": settings, "commit": commit or None,
              "python": platform.python_version(),
              "versions": {name: version(name) for name in PACKAGES},
              "cpu": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}", "cores": os.cpu_count(),
              "threads": torch.get_num_threads(), "device": str(model.device)}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    slots = max(k for k in range(1, 33) if args.eval_episodes % k == 0)
    eval_vec = make_vec(env_id, slots, settings["time_feature"])
    eval_seed = 10_000 * args.seed + 5_000  # no two seeds share a stream
    curve = Curve(folder, eval_vec, args.eval_every, args.total_timesteps, args.eval_episodes, eval_seed)
    model.learn(args.total_timesteps, callback=curve, log_interval=None)
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
