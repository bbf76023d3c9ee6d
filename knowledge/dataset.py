"""Experience without a task: what a curious agent did in an environment, for labelling and for the scale of potentials.

A dataset is a folder:

    arrays.npz         observations {name: (n, ...)} as the environment gives them, pictures left out; caption (n,), an
                       index into captions.json; action, reward, terminated, truncated (n - episodes,); start (episodes
                       + 1,), the index of each episode's first observation. An episode of L steps has L + 1
                       observations.
    captions.json      the distinct captions
    meta.json          environment, words of the actions, no-op, what collected it, sha256 of arrays.npz

Nothing in it is executed when it is read.
"""
import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from knowledge.history import History, readable
from knowledge.registry import KnowledgeError

SHIPPED = Path(__file__).resolve().parent / "data"
STEPS = ("action", "reward", "terminated", "truncated")


def shipped_for(env_id: str) -> Path | None:
    """The dataset in this repository that has the observations of `env_id`, if there is one."""
    families = {"crafter": ("Crafter-",), "minigrid": ("BabyAI-", "MiniGrid-")}
    for name, prefixes in families.items():
        if env_id.startswith(prefixes):
            return SHIPPED / name
    return None


class Segment(NamedTuple):
    """K steps of an episode."""
    episode: int
    start: int  # the step of the episode at which it begins
    obs: dict[str, np.ndarray]  # {name: (K + 1, ...)}
    action: np.ndarray  # (K,)
    captions: list[str]  # K + 1


class Recorder:
    """Episodes of copies that are stepped together, added up until they are saved."""

    def __init__(self):
        self.episodes: list[dict[str, Any]] = []

    def play(self, vec, act: Callable, episodes: int, seed: int, describe: Callable) -> None:
        """Add `episodes` episodes of `act` (observations -> actions) in `vec`, each copy its share, from the start
        states of `seed`. `describe` gives the captions of a batch of observations."""
        if episodes == 0:
            return
        share = episodes // vec.num_envs + (np.arange(vec.num_envs) < episodes % vec.num_envs)
        obs = vec.reset(seed)
        first = {name: np.asarray(x) for name, x in obs.items()}
        open_rows = [self._begin(first, i, describe(_row(obs, i))[0]) for i in range(vec.num_envs)]
        finished = np.zeros(vec.num_envs, int)
        while (finished < share).any():
            action = act(obs)
            obs, reward, terminated, truncated, info = vec.step(action)
            final = info["final_obs"]
            for i in np.flatnonzero(finished < share):
                rows = open_rows[i]
                for name, value in zip(STEPS, (action[i], reward[i], terminated[i], truncated[i])):
                    rows[name].append(value)
                self._add(rows, final, i, describe(_row(final, i))[0])
                if terminated[i] or truncated[i]:
                    self.episodes.append(rows)
                    finished[i] += 1
                    open_rows[i] = self._begin(obs, i, describe(_row(obs, i))[0])

    @staticmethod
    def _begin(obs: dict, i: int, caption: str) -> dict[str, Any]:
        rows = {name: [] for name in STEPS} | {"obs": {name: [] for name in readable(obs)}, "caption": []}
        Recorder._add(rows, obs, i, caption)
        return rows

    @staticmethod
    def _add(rows: dict[str, Any], obs: dict, i: int, caption: str) -> None:
        for name, x in readable(obs).items():
            rows["obs"][name].append(np.array(x[i]))
        rows["caption"].append(caption)

    def state_dict(self) -> dict:
        """Episodes so far, for a checkpoint."""
        return {"episodes": [{**rows, "obs": {name: np.stack(x) for name, x in rows["obs"].items()},
                              **{name: np.array(rows[name]) for name in STEPS}} for rows in self.episodes]}

    def load_state_dict(self, state: dict) -> None:
        self.episodes = [{**rows, "obs": {name: list(np.asarray(x)) for name, x in rows["obs"].items()},
                          **{name: list(np.asarray(rows[name])) for name in STEPS}} for rows in state["episodes"]]

    def save(self, folder: Path, env_id: str, words: Sequence[str], **about) -> None:
        """Write the dataset. `words` say what the actions do, one of them "do nothing"; `about` are further entries of
        meta.json."""
        captions: dict[str, int] = {}
        names = readable({name: torch.as_tensor(np.array(x[:1])) for name, x in self.episodes[0]["obs"].items()})
        arrays = {name: np.concatenate([np.stack(rows["obs"][name]) for rows in self.episodes]) for name in names}
        arrays["caption"] = np.array([captions.setdefault(text, len(captions)) for rows in self.episodes
                                      for text in rows["caption"]], np.int32)
        for name, kind in zip(STEPS, (np.int16, np.float32, bool, bool)):
            arrays[name] = np.concatenate([np.array(rows[name], kind) for rows in self.episodes])
        arrays["start"] = np.cumsum([0, *(len(rows["caption"]) for rows in self.episodes)], dtype=np.int64)
        folder.mkdir(parents=True, exist_ok=True)
        content = _npz(arrays)
        meta = {"env": env_id, "episodes": len(self.episodes), "words": list(words), "no_op": words.index("do nothing"),
                "sha256": hashlib.sha256(content).hexdigest(), **about}
        (folder / "arrays.npz").write_bytes(content)
        (folder / "captions.json").write_text(json.dumps(list(captions), indent=0))
        (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")


def _row(obs: dict, i: int) -> dict:
    return {name: x[i:i + 1] for name, x in obs.items()}


def _npz(arrays: dict[str, np.ndarray]) -> bytes:
    """A compressed .npz; equal arrays give equal bytes, which np.savez, that writes down the time, does not."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, array in arrays.items():
            content = io.BytesIO()
            np.lib.format.write_array(content, np.ascontiguousarray(array), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), content.getvalue(), zipfile.ZIP_DEFLATED)
    return file.getvalue()


class Dataset:
    """A dataset as it was saved. Raises KnowledgeError for a folder that is none, or was changed."""

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        missing = [name for name in ("arrays.npz", "captions.json", "meta.json") if not (folder / name).is_file()]
        if missing:
            raise KnowledgeError(f"{folder} is no dataset, it has no {missing[0]}; collect one with algos/ppo_rnd.py")
        try:
            content = (folder / "arrays.npz").read_bytes()
            self.meta = json.loads((folder / "meta.json").read_text())
            self.captions = json.loads((folder / "captions.json").read_text())
            self.hash = hashlib.sha256(content).hexdigest()
            if self.hash != self.meta["sha256"]:
                raise ValueError("arrays.npz is not the one that meta.json speaks of")
            with np.load(io.BytesIO(content), allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            self.start, self.caption = arrays.pop("start"), arrays.pop("caption")
            self.action = arrays["action"]
            for name in STEPS:
                arrays.pop(name)
            self.obs = arrays
            self.words, self.no_op, self.env = self.meta["words"], self.meta["no_op"], self.meta["env"]
        except (ValueError, KeyError, TypeError, OSError, zipfile.BadZipFile) as error:
            raise KnowledgeError(f"{folder} is damaged ({type(error).__name__}: {error}); collect it again") from None

    def __len__(self) -> int:
        """Episodes."""
        return len(self.start) - 1

    def length(self, episode: int) -> int:
        """Steps of an episode."""
        return int(self.start[episode + 1] - self.start[episode]) - 1

    def segment(self, episode: int, start: int, steps: int) -> Segment:
        """`steps` steps of an episode from `start` on."""
        first = int(self.start[episode]) + start
        acted = first - episode  # episodes have an observation more than they have actions
        return Segment(episode, start, {name: x[first:first + steps + 1] for name, x in self.obs.items()},
                       self.action[acted:acted + steps],
                       [self.captions[k] for k in self.caption[first:first + steps + 1]])

    def draw(self, rng: np.random.Generator, steps: int) -> Segment:
        """A random segment: first the episode, any of those that are long enough, then its start. Raises
        KnowledgeError where there is none."""
        longest = int(np.diff(self.start).max(initial=1)) - 1
        if longest < steps:
            raise KnowledgeError(f"no episode of the dataset has {steps} steps, the longest has {longest}; take fewer, "
                                 "or another --dataset")
        while True:
            episode = int(rng.integers(len(self)))
            if (length := self.length(episode)) >= steps:
                return self.segment(episode, int(rng.integers(length - steps + 1)), steps)

    def histories(self, count: int, horizon: int, seed: int = 0) -> History:
        """`count` random moments, each with what lies behind it, as a potential would read them in training."""
        rng = np.random.default_rng(seed)
        step_of = np.concatenate([np.arange(self.length(e) + 1) for e in range(len(self))])  # of every observation
        episode_of = np.repeat(np.arange(len(self)), np.diff(self.start))
        present = np.sort(rng.choice(len(step_of), min(count, len(step_of)), replace=False))
        first = self.start[episode_of[present]]
        back = np.arange(-horizon, 1)
        index = np.maximum(present[:, None] + back, first[:, None])  # (n, H + 1)
        acted = present[:, None] + back[:-1]
        action = np.where(acted < first[:, None], self.no_op, self.action[np.maximum(acted, first[:, None])
                                                                          .clip(max=len(self.caption) - 1)
                                                                          - episode_of[present][:, None]])
        return History({name: torch.as_tensor(x[index]) for name, x in self.obs.items()},
                       torch.as_tensor(action).long(), torch.as_tensor(step_of[present]))


def text_of(segment: Segment, words: Sequence[str]) -> str:
    """A segment as a person, or a language model, reads it."""
    said = [text.rstrip(".") + "." for text in segment.captions]
    chosen = [words[a] for a in segment.action]
    if len(chosen) == 1:
        return f"{said[0]} You {chosen[0]}. Now: {said[1]}"
    lines = [f"{k + 1}. {before} You {action}." for k, (before, action) in enumerate(zip(said, chosen))]
    return "\n".join(["Step by step:", *lines, f"Now: {said[-1]}"])
