"""The peers of the classic scripts: those of stable-baselines3 and sb3-contrib, with the settings of ours.

What they offer is set as in the runs of benchmarks/suites/classic.toml. What differs is the code, and the networks of
A2C and TRPO: 64x2 tanh for actor and critic each. DQN there is the algorithm of 2015, and ARS plays one episode after
the other, from start states of their own. eval.csv has the same columns, and evaluations are as many episodes as often,
with the likeliest action.

pip install stable-baselines3==2.9.2 sb3-contrib==2.9.2
python benchmarks/peers/sb3_classic.py --algo trpo --env CartPole-v1
"""
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy, as in the scripts

import numpy as np
import torch
import tyro

try:
    from sb3_contrib import ARS, TRPO
    from stable_baselines3 import A2C, DDPG, DQN, PPO, TD3
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy
    from stable_baselines3.common.noise import NormalActionNoise
    from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
    from stable_baselines3.common.vec_env import VecEnv, VecNormalize, sync_envs_normalization
except ImportError:
    print("sb3_classic: pip install stable-baselines3==2.9.2 sb3-contrib==2.9.2", file=sys.stderr)
    sys.exit(2)

OFF_POLICY = dict(learning_rate=3e-4, batch_size=256, buffer_size=1_000_000, gamma=0.98, tau=0.005,
                  learning_starts=5_000, train_freq=1, gradient_steps=1, policy_kwargs=dict(net_arch=[256, 256]),
                  action_noise=NormalActionNoise(np.zeros(1), 0.1 * np.ones(1)))  # Pendulum has one action
TRUST = dict(batch_size=128, learning_rate=1e-3, gae_lambda=0.95, target_kl=0.01, n_critic_updates=10, cg_max_steps=10,
             cg_damping=0.1, line_search_shrinking_factor=0.8, line_search_max_iter=10)
PEERS = {  # {algo, or algo and environment: (class, environments, steps between evaluations, settings)}
    "a2c": (A2C, 8, 20_000, dict(n_steps=5, learning_rate=7e-4, gae_lambda=1.0, vf_coef=0.5, max_grad_norm=0.5,
                                 use_rms_prop=False, policy_kwargs=dict(
                                     optimizer_class=RMSpropTFLike, optimizer_kwargs=dict(alpha=0.99, eps=1e-5)))),
    "trpo": (TRPO, 8, 10_000, TRUST | dict(n_steps=128)),
    "trpo Pendulum-v1": (TRPO, 8, 10_000, TRUST | dict(n_steps=256, gamma=0.9)),
    "dqn": (DQN, 1, 5_000, dict(learning_rate=2.3e-3, batch_size=64, buffer_size=100_000, learning_starts=1_000,
                                target_update_interval=10, train_freq=256, gradient_steps=128,
                                exploration_fraction=0.16, exploration_final_eps=0.04,
                                policy_kwargs=dict(net_arch=[256, 256]))),
    "ddpg": (DDPG, 1, 2_000, OFF_POLICY),
    "td3": (TD3, 1, 2_000, OFF_POLICY),
    "ppo_continuous": (PPO, 4, 10_000, dict(n_steps=1024, batch_size=64, n_epochs=10, learning_rate=1e-3, gamma=0.9)),
    "ars": (ARS, 1, 5_000, dict(policy="LinearPolicy", n_delta=8, n_top=4, delta_std=0.05, learning_rate=0.02))}
NORMALIZED = {"ppo_continuous": dict(gamma=0.9, clip_obs=5.0), "ars": dict(norm_reward=False, clip_obs=5.0),
              "trpo Pendulum-v1": dict(norm_reward=False, clip_obs=5.0)}
STEPS = {"a2c": 300_000, "trpo": 100_000, "dqn": 50_000, "ddpg": 20_000, "td3": 20_000, "ppo_continuous": 100_000,
         "ars": 50_000}


@dataclass
class Args:
    """A classic algorithm of stable-baselines3 or sb3-contrib, with the settings of ours."""
    algo: Literal["a2c", "trpo", "dqn", "ddpg", "td3", "ppo_continuous", "ars"] = "trpo"  # our script's name
    env: str = "CartPole-v1"
    seed: int = 1
    total_timesteps: int = 0  # environment steps, summed over environments; 0: as many as ours
    entropy_coef: float = 0.0  # of a2c
    eval_episodes: int = 20  # episodes per evaluation
    run_dir: str = ""  # run folder; empty: runs/sb3_classic/<env>/<algo>-seed<k>


class Curve(BaseCallback):
    """Writes an evaluation to eval.csv at the start and every `every` steps."""

    def __init__(self, folder: Path, vec, every: int, episodes: int):
        super().__init__()
        self.vec, self.every, self.episodes = vec, every, episodes
        self.file = (folder / "eval.csv").open("w", buffering=1)
        self.file.write("step,wall_s,episodes,return_mean,return_std,success_rate,length_mean\n")

    def write(self) -> None:
        if isinstance(self.vec, VecNormalize):
            sync_envs_normalization(self.training_env, self.vec)
        self.vec.seed(self.model.seed + 5_000)  # the same start states every time
        returns, lengths = evaluate_policy(self.model, self.vec, self.episodes, return_episode_rewards=True, warn=False)
        wall_s = time.monotonic() - self.start
        self.file.write(f"{self.num_timesteps},{wall_s:.1f},{len(returns)},{np.mean(returns):.6g},"
                        f"{np.std(returns):.6g},nan,{np.mean(lengths):.6g}\n")

    def _on_training_start(self) -> None:
        self.start = time.monotonic()
        self.write()

    def _on_step(self) -> bool:
        before = self.num_timesteps - self.training_env.num_envs
        if self.num_timesteps // self.every > before // self.every:
            self.write()
        return True

    def _on_training_end(self) -> None:
        self.file.close()


def make_vec(env: str, peer: str, num_envs: int, seed: int | None = None, training: bool = True) -> VecEnv:
    """Environments in one process, with running statistics where ours has them."""
    vec = make_vec_env(env, num_envs, seed=seed)
    if peer not in NORMALIZED:
        return vec
    vec = VecNormalize(vec, **NORMALIZED[peer])
    vec.training, vec.norm_reward = training, training and vec.norm_reward
    return vec


def main(args: Args) -> int:
    """Train and evaluate; returns the exit code."""
    peer = f"{args.algo} {args.env}" if f"{args.algo} {args.env}" in PEERS else args.algo
    kind, num_envs, every, settings = PEERS[peer]
    if args.algo == "a2c":
        settings = settings | {"ent_coef": args.entropy_coef}
    args.total_timesteps = args.total_timesteps or STEPS[args.algo]
    folder = Path(args.run_dir or Path("runs", "sb3_classic", args.env, f"{args.algo}-seed{args.seed}"))
    if folder.exists():
        print(f"sb3_classic: {folder} is there already; name another --run-dir", file=sys.stderr)
        return 2
    seed = 10_000 * args.seed
    settings = {"policy": "MlpPolicy"} | settings
    model = kind(env=make_vec(args.env, peer, num_envs, seed), seed=seed, device="cpu", **settings)
    folder.mkdir(parents=True)
    commit = shutil.which("git") and subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True,
                                                    text=True, cwd=Path(__file__).parent).stdout.strip()
    packages = ["torch", "stable-baselines3", "sb3-contrib", "numpy", "gymnasium"]
    config = {"algo": args.algo, "variant": f"{args.algo} (stable-baselines3)", "args": asdict(args),
              "env_id": args.env,
              "commit": commit or None, "versions": {name: version(name) for name in packages},
              "cpu": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    model.learn(args.total_timesteps, callback=Curve(
        folder, make_vec(args.env, peer, args.eval_episodes, training=False), every, args.eval_episodes))
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
