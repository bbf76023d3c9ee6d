"""Environments: ids, fast vector stepping, exact snapshots, evaluation, films.

    vec = envs.make_vec("FetchPush-v2", num_envs=16, seed=1)
    obs, reward, terminated, truncated, info = vec.step(action)   # info["final_obs"]: the true next observations

Locomotion under changed dynamics, <Body>-dyn-v0, and FrankaSkill-v0 have tasks in splits: `make_vec(id, 24,
split="extreme")`, `all_tasks(id, "extreme")`.

Observations are arrays (num_envs, n) or dicts of arrays: `observation`, `achieved_goal`, `desired_goal` of goal tasks;
`image` (num_envs, 7, 7, 3) uint8 and `direction` (num_envs,) int64 of MiniGrid and BabyAI; `view`, `status` and, where
it has pixels, `image` of Crafter. Pictures of other tasks are (num_envs, h, w, c) uint8. Behind an id may stand what is
made of them: `make_vec("MobileRobot-v0:pca", 16)`; envs/encoders.py has the words.
"""
from envs.captions import action_words, captions, clauses
from envs.ids import EnvError, resolve  # first: it keeps a notice of gymnasium_robotics from the console
from envs.dynamics import SPLITS, all_tasks, horizon_of
from envs.encoders import collect_frames
from envs.evaluation import Act, Evaluator, evaluate, find_renderer, record
from envs.features import (Normalizer, continuous_sizes, discrete_sizes, example_of, flatten, policy_sizes, seen,
                           time_limit_of, to_env, to_tensors, unflatten)
from envs.making import make, make_vec
from envs.series import Series, SeriesEvaluator
from envs.splits import SplitEvaluator
from envs.stream import StreamEnv, StreamEvaluator
from envs.vector import Observation, VectorEnv

__all__ = ["SPLITS", "Act", "EnvError", "Evaluator", "Normalizer", "Observation", "Series", "SeriesEvaluator",
           "SplitEvaluator", "StreamEnv", "StreamEvaluator", "VectorEnv", "action_words", "all_tasks", "captions",
           "clauses", "collect_frames", "continuous_sizes", "discrete_sizes", "evaluate", "example_of", "find_renderer",
           "flatten", "horizon_of", "make", "make_vec", "policy_sizes", "record", "resolve", "restore", "seen",
           "snapshot", "time_limit_of", "to_env", "to_tensors", "unflatten"]


def snapshot(vec: VectorEnv) -> dict:
    """The state of every environment as plain numbers and arrays: simulator, random streams, goals, elapsed steps."""
    return vec.snapshot()


def restore(vec: VectorEnv, snap: dict) -> None:
    """Put the state `snap` back. Stepping then goes on bit by bit as it did after the snapshot."""
    vec.restore(snap)
