"""Offline datasets: whole episodes in order, from our own runs or in Minari's files.

A file of ours (.npz) holds obs (N, f), act (N, d) or (N,) for discrete ones, in the scale of the environment, rew (N,),
term (N,), trunc (N,), ep_start (E + 1,), policy_id (N,), ep_return (E,), and meta, a JSON text: env, policies, ref_min
and ref_max (mean returns that count as 0 and 100), versions. `benchmarks/offline.py` makes them.

A dataset of Minari is a folder, its data/main_data.hdf5, or the id of one that lies where Minari keeps them.
"""
import json
import os
import re
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, NamedTuple, Sequence

import gymnasium as gym
import numpy as np
import torch

from envs.evaluation import in_learners_units
from envs.features import flatten, to_tensors
from envs.ids import EnvError, announce
from envs.vector import Observation, VectorEnv

GRID = (11, 6, 3)  # kinds of objects, colours, states in a cell of MiniGrid
READ = {"image", "direction"}, {"achieved_goal", "desired_goal", "observation"}  # dicts of observations that are read


class Dataset(NamedTuple):
    """Episodes one after another. starts[i] is the row at which episode i begins, the last entry the number of rows."""
    obs: np.ndarray  # (N, f) features; of grids 0 and 1 as uint8
    act: np.ndarray  # (N, d) in the scale of the environment, or (N,) int64
    rew: np.ndarray  # (N,)
    term: np.ndarray  # (N,) bool
    trunc: np.ndarray  # (N,) bool
    starts: np.ndarray  # (E + 1,)
    policy_id: np.ndarray  # (N,) int64, index in meta["policies"]
    meta: dict

    @property
    def returns(self) -> np.ndarray:
        """Sum of rewards of each episode, (E,)."""
        return np.add.reduceat(self.rew, self.starts[:-1])


def features(obs: torch.Tensor | dict[str, torch.Tensor], whose: str = "the environment") -> torch.Tensor:
    """Observations as one float matrix (B, f): a grid's view and direction as zeros and ones, others as `flatten`.
    Raises EnvError, which tells `whose` they are, for a dict of others."""
    if isinstance(obs, dict) and not any(obs.keys() >= names for names in READ):
        raise EnvError(f"{whose} observes {', '.join(obs)}; needed are flat arrays, "
                       "or achieved_goal, desired_goal and observation, or image and direction")
    if not (isinstance(obs, dict) and "image" in obs):
        return flatten(obs)
    image, direction = torch.as_tensor(obs["image"]), torch.as_tensor(obs["direction"])
    cells = [(image[..., i:i + 1] == torch.arange(n)).flatten(1) for i, n in enumerate(GRID)]  # (B, 49 n) each
    return torch.cat([*cells, direction[:, None] == torch.arange(4)], 1).float()


def join(parts: Sequence[Dataset], meta: dict) -> Dataset:
    """The episodes of all parts; policy_id counts on from part to part."""
    sizes = np.cumsum([0, *(len(part.rew) for part in parts)])
    starts = [part.starts[:-1] + size for part, size in zip(parts, sizes)]
    names = "obs", "act", "rew", "term", "trunc"
    columns = [np.concatenate([getattr(part, name) for part in parts]) for name in names]
    ids = np.concatenate([np.full(len(part.rew), i) for i, part in enumerate(parts)])
    return Dataset(*columns, np.concatenate([*starts, sizes[-1:]]), ids, meta)


def from_episodes(episodes: Sequence[dict[str, np.ndarray]], meta: dict) -> Dataset:
    """A dataset of {obs, act, rew, term, trunc} per episode. Those with a NaN are left out, and that is said."""
    good = [episode for episode in episodes if all(np.isfinite(x).all() for x in episode.values())]
    if len(good) < len(episodes):
        announce(f"{len(episodes) - len(good)} of {len(episodes)} episodes hold NaN or infinity, and are left out")
    if not good:
        raise EnvError("the dataset has no episode without NaN; choose another")
    columns = {name: np.concatenate([episode[name] for episode in good]) for name in good[0]}
    starts = np.cumsum([0, *(len(episode["rew"]) for episode in good)])
    return Dataset(columns["obs"], columns["act"], columns["rew"], columns["term"].astype(bool),
                   columns["trunc"].astype(bool), starts, np.zeros(len(columns["rew"]), np.int64), meta)


def collect(act: Callable[[Observation], np.ndarray], vec: VectorEnv, episodes: int, seed: int) -> Dataset:
    """Play whole episodes of `act` on `vec`, each copy its share: stopping at the first finished ones would favour
    short episodes. What `act` returns is stored, so it has to be within the bounds."""
    share = episodes // vec.num_envs + (np.arange(vec.num_envs) < episodes % vec.num_envs)
    open_rows, finished = [[] for _ in range(vec.num_envs)], [[] for _ in range(vec.num_envs)]
    obs = vec.reset(seed)
    while any(len(done) < want for done, want in zip(finished, share)):
        seen, action = features(to_tensors(obs)).numpy(), act(obs)
        obs, reward, terminated, truncated, _ = vec.step(action)
        for i in range(vec.num_envs):
            if len(finished[i]) == share[i]:
                continue
            open_rows[i].append((seen[i], action[i], reward[i], terminated[i], truncated[i]))
            if terminated[i] or truncated[i]:
                columns = (np.array(column) for column in zip(*open_rows[i]))
                finished[i].append(dict(zip(("obs", "act", "rew", "term", "trunc"), columns)))
                open_rows[i] = []
    return from_episodes([episode for done in finished for episode in done], {})


def from_replay(buffer: dict[str, torch.Tensor], num_envs: int, f: int, d: int, vec: VectorEnv) -> Dataset:
    """The episodes in the replay buffer of a checkpoint, in the order in which they began: what an agent saw while it
    learned. An episode that had not ended is left out, and so is one of which the buffer has lost the first rows.

    `buffer` is what buffers.ReplayBuffer saves: rows obs | action in [-1, 1] | reward | terminated | next obs.
    """
    rows, n = buffer["rows"].numpy(), len(buffer["rows"])
    left, stored = buffer["left"].numpy(), int(buffer["stored"])
    order = np.roll(np.arange(n), -(stored % n))  # oldest first; stored < n means that the ring is not full
    order = order if stored > n else np.arange(n)
    rows, left = rows[order], left[order]
    obs, action = rows[:, :f], rows[:, f:f + d]
    reward, terminated, next_obs = rows[:, f + d], rows[:, f + d + 1] > 0.5, rows[:, f + d + 2:]
    if left.any():  # with hindsight: whole episodes, one after another
        streams = [np.arange(n)]
    else:  # without: environments take turns, one row each
        first = stored - n  # number of the oldest row
        streams = [np.flatnonzero((first + np.arange(n)) % num_envs == i) for i in range(num_envs)]
    episodes = []
    for stream in streams:
        # A time limit is not stored; it shows in a next observation that is not the next row's observation.
        jumps = (next_obs[stream[:-1]] != obs[stream[1:]]).any(1)
        over = terminated[stream] | np.append(jumps, False) | ((left[stream] == 0) & bool(left.any()))
        begin, ends = 0, np.flatnonzero(over).tolist()
        last = ends[-1] + 1 if ends else 0  # row after the last end that shows; what follows may be whole
        if len(stream) - last == vec.max_episode_steps:
            ends.append(len(stream) - 1)
        for end in ends:
            part = stream[begin:end + 1]
            cut = np.zeros(len(part), bool)
            cut[-1] = not terminated[part[-1]]
            if begin > 0 or stored <= n:
                episodes.append((part[0], {"obs": obs[part], "act": vec.to_box(action[part]), "rew": reward[part],
                                           "term": terminated[part], "trunc": cut}))
            begin = end + 1
    if not episodes:
        raise EnvError("the replay buffer holds no whole episode; choose a longer run")
    return from_episodes([episode for _, episode in sorted(episodes, key=lambda pair: pair[0])], {})


def save(path: Path, data: Dataset) -> None:
    """Write `data` as .npz: whole, or not at all."""
    obs = data.obs.astype(np.uint8) if np.isin(data.obs, (0, 1)).all() else data.obs.astype(np.float32)
    temporary = path.with_name(path.name + ".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary.open("wb") as file:
        np.savez_compressed(file, obs=obs, act=data.act, rew=data.rew.astype(np.float32), term=data.term,
                            trunc=data.trunc, ep_start=data.starts, policy_id=data.policy_id, ep_return=data.returns,
                            meta=json.dumps(data.meta))
    os.replace(temporary, path)


def load(source: str) -> Dataset:
    """The dataset in a file of ours, a folder or file of Minari's, or that Minari keeps under this id.

    Raises EnvError for one that is not there, damaged, or stored in another way."""
    path = Path(source)
    if path.suffix == ".npz" and path.is_file():
        return _checked(_load_npz(path), path)
    kept = Path(os.environ.get("MINARI_DATASETS_PATH", Path.home() / ".minari" / "datasets"), source)
    if not path.exists() and kept.is_dir():
        path = kept
    if not path.exists():
        raise EnvError(f"dataset {source} is not there; make one with benchmarks/offline.py, or get one of Minari's: "
                       "minari download ID")
    return _checked(load_minari(path), path)


@contextmanager
def _reading(file: Path):
    """What a foreign file fails with while it is read, as EnvError that names the file."""
    try:
        yield
    except (EnvError, MemoryError):
        raise
    except Exception as error:  # a cut or foreign file raises anything from KeyError to BadZipFile
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise EnvError(f"{file} is damaged or no dataset ({why:.150}); make it or get it anew") from error


def _checked(data: Dataset, path: Path) -> Dataset:
    """`data` as it is. Raises EnvError where its columns do not fit together, or hold NaN."""
    with _reading(path):
        n, starts, columns = len(data.rew), data.starts, data[:5] + (data.policy_id,)
        fit = {len(column) for column in columns} == {n} and data.obs.ndim == 2 and {x.ndim for x in columns[2:]} == {1}
        whole = len(starts) > 1 and starts[0] == 0 and starts[-1] == n and (np.diff(starts) > 0).all()
        if not (fit and whole and isinstance(data.meta, dict)):
            raise EnvError(f"{path} is damaged: its columns or episodes do not fit together; make it anew")
        if not all(np.isfinite(column).all() for column in columns[:3]):
            raise EnvError(f"{path} is damaged: it holds NaN or infinity; make it anew")
    return data


def _load_npz(path: Path) -> Dataset:
    with _reading(path), np.load(path, allow_pickle=False) as file:
        return Dataset(file["obs"], file["act"], file["rew"], file["term"], file["trunc"], file["ep_start"],
                       file["policy_id"], json.loads(str(file["meta"])))


def load_minari(path: Path) -> Dataset:
    """The dataset in a folder of Minari's, or in its HDF5 file. Raises EnvError for what is none."""
    try:
        import h5py
    except ImportError as error:
        raise EnvError("Minari's files need h5py: pip install h5py==3.16.0") from error
    file = path
    if path.is_dir():
        found = sorted(path.rglob("main_data.hdf5")) or sorted(path.rglob("*.hdf5"))
        if not found:
            inside = ", ".join(sorted(x.name for x in path.rglob("*"))[:5]) or "nothing"
            raise EnvError(f"{path} has no HDF5 file (it holds {inside}); one that is stored as Arrow has to be made "
                           "anew with data_format='hdf5'")
        if len(found) > 1:
            raise EnvError(f"{path} has several datasets, {', '.join(map(str, found[:3]))}; name one")
        file = found[0]
    with _reading(file), h5py.File(file, "r") as archive:
        meta = _minari_meta(file, dict(archive.attrs))
        limit = meta.get("max_episode_steps")
        groups = [name for name in archive if re.fullmatch(r"episode_\d+", name)]
        groups.sort(key=lambda name: int(name.removeprefix("episode_")))  # as numbers: episode_10 after episode_9
        if not groups:
            raise EnvError(f"{file} has no group episode_0, episode_1, ..., but {', '.join(list(archive)[:5])}")
        return from_episodes([_minari_episode(archive[name], file, limit) for name in groups], meta)


def _minari_episode(group, file: Path, limit: int | None) -> dict[str, np.ndarray]:
    """One episode: T + 1 observations, of which the last is left out, T of everything else."""
    names = "actions", "rewards", "terminations", "truncations"
    if missing := {"observations", *names} - set(group):
        raise EnvError(f"{file}: {group.name} lacks {', '.join(sorted(missing))}; it has {', '.join(group)}")
    raw = group["observations"]
    parts = np.asarray(raw) if not hasattr(raw, "keys") else {
        name: np.asarray(raw[name]) for name in raw if name != "mission"}
    actions, reward, term, trunc = (np.asarray(group[name]) for name in names)
    t = len(actions)
    if t == 0 or {len(reward), len(term), len(trunc)} != {t}:
        raise EnvError(f"{file}: {group.name} has {t} actions, {len(reward)} rewards, {len(term)} terminations and "
                       f"{len(trunc)} truncations; one of each for every step is needed, and a step at least")
    if isinstance(parts, dict) and "observation" in parts and limit:  # the time feature that our environments append
        left = 1 - np.arange(t + 1)[:, None] / limit
        parts["observation"] = np.concatenate([parts["observation"], left], 1)
    if isinstance(parts, dict) and any(x.dtype.kind not in "biuf" for x in parts.values()):
        raise EnvError(f"{file} stores observations as JPEG, which changes what is in a grid; make it anew with "
                       "jpeg_encoding=False")
    obs = features(to_tensors(parts), str(file)).numpy()
    if len(obs) != t + 1:
        raise EnvError(f"{file}: {group.name} has {len(obs)} observations for {t} actions; Minari stores one more")
    actions = actions.astype(np.int64 if actions.dtype.kind in "iu" and actions.ndim == 1 else np.float32)
    return {"obs": obs[:-1], "act": actions, "rew": reward.astype(np.float32), "term": term.astype(bool),
            "trunc": trunc.astype(bool)}


def _minari_meta(file: Path, attributes: dict) -> dict:
    """Environment and reference returns, from metadata.json beside the file, or in older files from its attributes."""
    beside = file.with_name("metadata.json")
    beside = beside if beside.is_file() else None
    with _reading(beside or file):
        found = json.loads(beside.read_text()) if beside else attributes
        spec = found.get("env_spec")
        spec = json.loads(spec) if isinstance(spec, str) else spec or {}
        meta = {"env": spec.get("id"), "policies": [str(found.get("dataset_id", file))],
                "max_episode_steps": spec.get("max_episode_steps")}
        for ours, theirs in (("ref_min", "ref_min_score"), ("ref_max", "ref_max_score")):
            if found.get(theirs) is not None:
                meta[ours] = float(found[theirs])
        return meta


def load_for(source: str, vec: VectorEnv, share: float = 1.0) -> Dataset:
    """The best `share` of the episodes of `load(source)`, actions within +-1, for a policy that acts in `vec`.

    Continuous actions stay 0.001 away from +-1: clipped noise piles up there, which no Gaussian has. Raises EnvError as
    `load`, and for a dataset of another task."""
    if not source:
        raise EnvError("--dataset is missing: name an .npz of benchmarks/offline.py, or a dataset of Minari's")
    data, space = best_episodes(load(source), share), vec.action_space
    continuous = isinstance(space, gym.spaces.Box)
    f = features(to_tensors(vec.reset(0)), vec.env.spec.id).shape[1]
    whole = data.act.ndim == 1 and data.act.dtype.kind in "iu"
    if data.obs.shape[1] != f or (data.act.shape[1:] != space.shape if continuous else not whole):
        kind = "discrete" if whole else f"{data.act.dtype} {data.act.shape[1:]}"
        raise EnvError(f"{source} is of {data.meta.get('env')}, with {data.obs.shape[1]} numbers in an observation and "
                       f"{kind} actions; {vec.env.spec.id} has {f} and {space}: --env names the environment of the "
                       "dataset")
    if data.meta.get("env") not in (None, vec.env.spec.id):
        announce(f"{source} was played in {data.meta['env']}, and is evaluated in {vec.env.spec.id}")
    if not continuous:
        if data.act.min() < 0 or data.act.max() >= space.n:
            raise EnvError(f"{source} has actions {data.act.min()} to {data.act.max()}; {vec.env.spec.id} has {space}")
        return data
    return data._replace(act=np.clip(in_learners_units(data.act, space), -0.999, 0.999).astype(np.float32))


def without_tails(data: Dataset, tail: int) -> np.ndarray:
    """Rows of `data` without the last `tail` of episodes that a time limit cut. Raises EnvError if none is left."""
    kept = np.ones(len(data.rew), bool)
    for begin, end in zip(data.starts, data.starts[1:]):
        if not data.term[end - 1]:
            kept[max(begin, end - tail):end] = False
    if not kept.any():
        raise EnvError(f"without the last {tail} steps of its episodes the dataset is empty; lower --drop-tail")
    return np.flatnonzero(kept)


def best_episodes(data: Dataset, share: float) -> Dataset:
    """The share of the episodes that have the highest returns, at least one, in their order."""
    count = max(1, round(share * (len(data.starts) - 1)))
    chosen = np.sort(np.argsort(-data.returns, kind="stable")[:count])
    rows = np.concatenate([np.arange(data.starts[i], data.starts[i + 1]) for i in chosen])
    starts = np.cumsum([0, *(data.starts[i + 1] - data.starts[i] for i in chosen)])
    columns = [getattr(data, name)[rows] for name in ("obs", "act", "rew", "term", "trunc")]
    return Dataset(*columns, starts, data.policy_id[rows], data.meta)


def normalized(score: float, ref_min: float, ref_max: float) -> float:
    """0 for ref_min, 100 for ref_max."""
    return 100 * (score - ref_min) / (ref_max - ref_min)
