"""Frozen encoders of pictures: what stands between an environment and a script that learns from a few numbers.

An id names one behind a colon, so that every script takes it: `MobileRobot-v0:pca`.

    ground_truth   the numbers of the task itself
    pixels         no encoding: the script sees the pictures, and needs layers for them
    random         a network with drawn weights that are never trained
    pca            32 principal components of 2,000 pictures
    run:RUN_DIR    encoder.pt2 of a run of algos/srl.py
    LOSSES         the newest finished run below runs/ that was trained for this environment by these losses, as
                   `MobileRobot-v0:autoencoder`

Codes have mean 0 and deviation 1 on the pictures of random actions. `random` and `pca` see these pictures when they are
made, always the same ones. Within a process, all environments of an id share their encoder; its tensors are in the
checkpoints of a run, and come back with them.
"""
import json
import os
from pathlib import Path
from typing import Callable, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from torch import nn

import pt2
from envs.ids import EnvError, announce
from envs.vector import VectorEnv

CODE = 32  # numbers of `random` and `pca`
SMALLEST = 22  # height and width that the convolutions of `random` need
FRAMES, EPISODE_STEPS, COPIES = 2000, 50, 10  # what those two see
LIMIT = 10.0  # codes are clipped to +-this
LOSSES = {"autoencoder", "vae", "inverse", "forward", "reward", "priors"}  # of algos/srl.py
_made: dict[tuple, "Encoder"] = {}
_newest: dict[tuple, Path] = {}  # what `newest_run` found: a later run is not to change what this process sees


class Transitions(NamedTuple):
    """Steps of random actions, a row each."""
    picture: np.ndarray  # (n, h, w, c) uint8
    action: np.ndarray  # (n,) whole numbers, or (n, d)
    reward: np.ndarray  # (n,)
    next_picture: np.ndarray  # (n, h, w, c) uint8, the true one where an episode ended
    episode: np.ndarray  # (n,), a number for each start
    truth: np.ndarray  # (n, k), what a representation of `picture` should know, as far as the task tells
    names: list[str]  # of the k columns


def collect_frames(vec: VectorEnv, count: int, episode_steps: int, seed: int) -> Transitions:
    """At least `count` transitions of random actions, begun anew after every `episode_steps` steps: a random walk stays
    near its start, so starts are what covers the task. The same seed gives the same rows."""
    rng, space, rows = np.random.default_rng(seed), vec.action_space, []
    tell = getattr(vec, "ground_truth", dict)
    for start in range(-(-count // (vec.num_envs * episode_steps))):
        obs = vec.reset(None if start else seed)
        for _ in range(episode_steps):
            if isinstance(space, gym.spaces.Discrete):
                action = rng.integers(space.n, size=vec.num_envs)
            else:
                action = rng.uniform(space.low, space.high, (vec.num_envs, *space.shape)).astype(space.dtype)
            truth, names = np.array(list(tell().values())).reshape(-1, vec.num_envs).T, list(tell())  # (num_envs, k)
            next_obs, reward, _, _, info = vec.step(action)
            episode = start * vec.num_envs + np.arange(vec.num_envs)
            rows.append((obs, action, reward, info["final_obs"], episode, truth))
            obs = next_obs
    return Transitions(*map(np.concatenate, zip(*rows)), names)


class Encoder:
    """A frozen function of pictures, and the tensors it is made of. size: numbers of a code."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor], tensors: dict[str, torch.Tensor], size: int):
        self.function, self.tensors, self.size = function, tensors, size

    @torch.no_grad()
    def __call__(self, pictures: np.ndarray) -> np.ndarray:
        """Pictures (B, h, w, c) uint8 -> codes (B, size) float32."""
        return self.function(torch.from_numpy(np.ascontiguousarray(pictures))).numpy()

    def state_dict(self) -> dict[str, torch.Tensor]:
        return dict(self.tensors)

    def load_state_dict(self, state: dict) -> None:
        """Take these tensors, in place. Raises EnvError for those of another encoder."""
        if {name: x.shape for name, x in state.items()} != {name: x.shape for name, x in self.tensors.items()}:
            raise EnvError("the run was trained with an encoder of other sizes; name the one it had")
        with torch.no_grad():
            for name, x in self.tensors.items():
                x.copy_(torch.as_tensor(state[name]))


class Convolutions(nn.Sequential):
    """Pictures (B, h, w, c) of 0 to 255 -> (B, CODE): three convolutions and a linear layer."""

    def __init__(self, shape: tuple[int, ...]):
        convolutions = [nn.Conv2d(shape[2], 16, 4, 2), nn.ReLU(), nn.Conv2d(16, 32, 4, 2), nn.ReLU(),
                        nn.Conv2d(32, 32, 4, 2), nn.ReLU(), nn.Flatten()]
        width = nn.Sequential(*convolutions)(torch.zeros(1, shape[2], *shape[:2])).shape[1]
        super().__init__(*convolutions, nn.Linear(width, CODE))

    def forward(self, picture: torch.Tensor) -> torch.Tensor:
        return super().forward(picture.permute(0, 3, 1, 2).float() / 255)  # (B, c, h, w)


def make_random(frames: torch.Tensor) -> Encoder:
    """An encoder with drawn weights, scaled on frames (n, h, w, c). Raises EnvError for too small ones."""
    if min(frames.shape[1:3]) < SMALLEST:
        raise EnvError(f"pictures of {frames.shape[1]} x {frames.shape[2]} pixels are too small for the encoder "
                       f"random, which needs {SMALLEST} x {SMALLEST}; take pca")
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        network = Convolutions(tuple(frames.shape[1:]))
    with torch.no_grad():
        code = torch.cat([network(part) for part in frames.split(256)])
    tensors = {**network.state_dict(), "mean": code.mean(0), "std": code.std(0).clamp(min=1e-6)}  # these share memory

    def encode(picture: torch.Tensor) -> torch.Tensor:
        return ((network(picture) - tensors["mean"]) / tensors["std"]).clamp(-LIMIT, LIMIT)
    return Encoder(encode, tensors, CODE)


def make_pca(frames: torch.Tensor) -> Encoder:
    """The principal components of frames (n, h, w, c), n > CODE, each divided by its deviation."""
    x = frames.flatten(1).float() / 255  # (n, h w c)
    mean = x.mean(0)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        _, scale, components = torch.pca_lowrank(x - mean, CODE, center=False)
    std = (scale / len(x) ** 0.5).clamp(min=1e-6)
    tensors = {"mean": mean, "components": components / std}  # (h w c, CODE)

    def encode(picture: torch.Tensor) -> torch.Tensor:
        x = picture.flatten(1).float() / 255
        return ((x - tensors["mean"]) @ tensors["components"]).clamp(-LIMIT, LIMIT)
    return Encoder(encode, tensors, CODE)


def read_encoder(folder: Path, shape: tuple[int, ...]) -> Encoder:
    """The encoder of a run of algos/srl.py, for pictures of this shape. Nothing in its file is executed (pt2.py).

    Raises EnvError where there is none, or one for other pictures."""
    file = folder / "encoder.pt2"
    if not file.is_file():
        raise EnvError(f"{folder} has no encoder.pt2; behind the id, run:RUN_DIR is the last word and names the folder "
                       "of a finished run of algos/srl.py")
    try:
        program = pt2.read(file)
        fits = program.entries == [""] and program.dtypes == [torch.uint8] and program.sizes == [shape]
        if fits:
            code = program([torch.zeros(1, *shape, dtype=torch.uint8)])  # weights that do not fit raise anything
            if code.shape != (1, program.width) or code.dtype != torch.float32 or not code.isfinite().all():
                raise pt2.BadArchive(f"it does not give {program.width} finite numbers")
    except Exception as error:
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise EnvError(f"{file} is damaged or no encoder ({why:.80}); name another run") from error
    if not fits:
        raise EnvError(f"{file} encodes {' x '.join(map(str, program.sizes[0]))} numbers, and pictures here have "
                       f"{' x '.join(map(str, shape))}; name another run")
    return Encoder(lambda picture: program([picture]), program.tensors, program.width)


def newest_run(losses: str, env_id: str) -> Path:
    """The newest finished run below runs/ of algos/srl.py with these losses and environment, the same one for as long
    as the process lives. Says which on stderr.

    Raises EnvError, with the command that makes one, where there is none."""
    key, found = (os.getcwd(), losses, env_id), []
    if key in _newest and (_newest[key] / "encoder.pt2").is_file():
        return _newest[key]
    for file in Path("runs").rglob("encoder.pt2"):
        try:
            config = json.loads((file.parent / "config.json").read_text())
            if config["env_id"] == env_id and sorted(config["args"]["losses"].split(",")) == sorted(losses.split(",")):
                found.append((file.stat().st_mtime, file.parent))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # another's config.json
            continue
    if not found and not set(losses.split(",")) <= LOSSES:
        raise EnvError(f"{losses!r} behind {env_id} makes no sense; known are ground_truth, pixels, random, pca, "
                       "run:RUN_DIR, frame_stack=4, action_repeat=2, and what algos/srl.py has trained by its losses: "
                       f"{', '.join(sorted(LOSSES))}")
    if not found:
        raise EnvError(f"runs/ has no encoder of {env_id} that was trained by {losses}; for one: "
                       f"python algos/srl.py --env {env_id} --losses {losses}")
    _, folder = max(found)
    announce(f"{env_id}:{losses} takes the encoder of {folder}")
    _newest[key] = folder
    return folder


def exact(name: str, env_id: str) -> str:
    """An encoder's name that means the same one tomorrow: run:RUN_DIR in place of losses."""
    return name if name in ("random", "pca") or name.startswith("run:") else f"run:{newest_run(name, env_id)}"


def make_encoder(name: str, env_id: str, vec: VectorEnv, key: str) -> Encoder:
    """The encoder of this `exact` name for the pictures of `env_id`, of which `vec` are copies to look at. `key` tells
    them from environments of the same id with other options."""
    folder = Path(name.removeprefix("run:")) if name.startswith("run:") else None
    if folder:
        file = folder / "encoder.pt2"
        key += f"{file.stat().st_mtime_ns if file.is_file() else 0}"
    if (env_id, name, key) not in _made:
        if folder:
            encoder = read_encoder(folder, vec.observation_space.shape)
        else:
            frames = torch.from_numpy(collect_frames(vec, FRAMES, EPISODE_STEPS, seed=0).picture)
            encoder = make_pca(frames) if name == "pca" else make_random(frames)
        _made[env_id, name, key] = encoder
    return _made[env_id, name, key]


def adopt_encoder(vec: VectorEnv, folder: Path) -> None:
    """Where `vec` has an encoder, give it the tensors that the run in `folder` was trained with, if it has any."""
    if not hasattr(vec, "encoder"):
        return
    saved = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True).get("vec", {})
    while saved and "encoder" not in saved:
        saved = saved.get("inside", {})
    if saved:
        vec.encoder.load_state_dict(saved["encoder"])
