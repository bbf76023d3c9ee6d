"""Potentials: how promising a history of observations and actions is. Reward shaping adds what they gain.

A potential is a function `potential(history) -> (B,)` of a batch of histories (knowledge/history.py). It knows nothing
of the task, unless its name says so. `load` finds one by name or by file, as `--knowledge` has it:

    code, pref, goals, goals-minilm    shipped: knowledge/shipped/ and the page say who wrote or labelled them
    near, target, fetch.v4, ...        registered below
    mine.py, mine.py:name              a Python file of yours with `def potential(history)`, trusted as your program
    llm:FILE.py                        code with `compute_reward(obs, past_obs, past_actions)`, in the sandbox
    pref:FILE.pt                       a model of knowledge/train_preferences.py
    goals:FILE.json, goals-minilm:...  a library of knowledge/label_goals.py; texts compared by words, or by a model
"""
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch

from env_id import split_id
from knowledge import check_sources, code, fetch, goals, keep_sources, preferences, qualities, run_file, source_of
from knowledge.dataset import Dataset, shipped_for
from knowledge.history import History, Potential
from knowledge.registry import KnowledgeError

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "knowledge" / "shipped"
SUFFIXES = {"code": "py", "pref": "pt", "goals": "json", "goals-minilm": "json"}  # of the files that hold them
LARGEST = 1000.0  # potentials are clipped to +- this
KEY, BALL, BOX, DOOR, GOAL = 5, 6, 7, 4, 8
COLOURS = {"Red": 0, "Green": 1, "Blue": 2, "Purple": 3, "Yellow": 4, "Grey": 5}
KINDS = {"Key": KEY, "Ball": BALL, "Box": BOX}

_potentials: dict[str, dict[str, Callable[[str], Potential]]] = {}  # {name: {env prefix: env id -> potential}}
_whole: dict[str, str] = {}  # of potentials that are weak or wrong on purpose: the name of the right one


def potential(name: str, envs: tuple[str, ...]):
    """Decorator: register a function `make(env_id) -> potential` for ids that start with one of `envs`."""

    def register(make: Callable[[str], Potential]) -> Callable[[str], Potential]:
        _potentials.setdefault(name, {}).update(dict.fromkeys(envs, make))
        return make

    return register


GRIDS, CRAFTER = ("BabyAI-", "MiniGrid-"), ("Crafter-",)


def nearness(mask: torch.Tensor, agent: tuple[int, int]) -> torch.Tensor:
    """1 / (steps to the nearest cell of a mask (B, x, y), sideways and ahead), 1 also on the spot, 0 for none: (B,)."""
    x, y = (torch.arange(size) for size in mask.shape[1:])
    steps = ((x - agent[0]).abs()[:, None] + (y - agent[1]).abs()).clamp(min=1)
    return (mask / steps).flatten(1).amax(1)


@potential("near", GRIDS)
def near_things(env_id: str) -> Potential:
    """Near a key, a ball or a box, whichever: what is left of BK-Code's potential without its memory."""
    def near(history: History) -> torch.Tensor:
        kind = history.last("image")[..., 0]  # (B, 7, 7)
        ahead = kind.clone()
        ahead[:, 3, 6] = 0  # what is carried is drawn there
        return nearness((ahead == KEY) | (ahead == BALL) | (ahead == BOX), (3, 6))
    return near


@potential("near", CRAFTER)
def near_resources(env_id: str) -> Potential:
    """Near a tree, water, a cow or a table."""
    def near(history: History) -> torch.Tensor:
        view = history.last("view")  # (B, 9, 7)
        return nearness((view == 6) | (view == 1) | (view == 14) | (view == 11), (4, 3))
    return near


@potential("target", ("BabyAI-Text-",))
def near_target(env_id: str) -> Potential:
    """Knows the task: near its target, or either of two."""
    named = re.findall(f"({'|'.join(COLOURS)})({'|'.join(KINDS)})", env_id)  # RedBallBlueBox: two
    if not named:
        raise KnowledgeError(f"{env_id} has another target in every episode; the potential 'target' needs a fixed one")
    targets = [(KINDS[kind], COLOURS[colour]) for colour, kind in named]

    def near(history: History) -> torch.Tensor:
        image = history.last("image").clone()
        image[:, 3, 6] = 0
        mask = torch.zeros(image.shape[:3], dtype=torch.bool)
        for kind, colour in targets:
            mask |= (image[..., 0] == kind) & (image[..., 1] == colour)
        return nearness(mask, (3, 6))
    return near


@potential("minigrid.official", ("MiniGrid-DoorKey",))
@potential("target", ("MiniGrid-UnlockPickup", "MiniGrid-BlockedUnlockPickup", "MiniGrid-DoorKey",
                      "MiniGrid-KeyCorridor"))
def stages_of_a_locked_door(env_id: str) -> Potential:
    """Knows the task: take a key, 1 more with it in hand and near the locked door, 2 more with the door open and near
    what lies behind."""
    last = {"MiniGrid-DoorKey": GOAL, "MiniGrid-KeyCorridor": BALL}.get(env_id[:env_id.index("-", 9)], BOX)

    def stage(history: History) -> torch.Tensor:
        image = history.last("image").clone()
        carried = image[:, 3, 6, 0].clone()
        image[:, 3, 6] = 0
        kind, state = image[..., 0], image[..., 2]
        door_open = ((kind == DOOR) & (state == 0)).flatten(1).any(1)
        near_last = nearness(kind == last, (3, 6))
        with_key = 1 + nearness((kind == DOOR) & (state == 2), (3, 6))
        return torch.where(near_last > 0, 2 + near_last,
                           torch.where(door_open, 2.0, torch.where(carried == KEY, with_key,
                                                                   nearness(kind == KEY, (3, 6)))))
    return stage


@potential("target", ("Crafter-",))
def stages_of_a_crafter_task(env_id: str) -> Potential:
    """Knows the task: near what it needs next, and 1 more for each thing that it has collected or made for it."""
    task = env_id.split("-")[2]
    if task == "Reward":
        raise KnowledgeError(f"{env_id} has many tasks; the potential 'target' needs one")

    def stage(history: History) -> torch.Tensor:
        view, status = history.last("view"), history.last("status")
        if task == "CollectDrink":
            return nearness(view == 1, (4, 3))
        if task == "EatCow":
            return nearness(view == 14, (4, 3))
        wood, table = status[:, 7], view == 11
        trees, has_table = nearness(view == 6, (4, 3)), table.flatten(1).any(1)
        gathering = wood.clamp(max=2) + torch.where(wood < 2, trees, 1)
        if task == "PlaceCraftingTable":
            return gathering
        return torch.where(has_table, 4 + torch.where(wood > 0, 1 + nearness(table, (4, 3)), trees), gathering)
    return stage


STRIDE = 0.05  # metres; the gripper of Fetch goes no further in a step


@potential("fetch.v4", ("FetchReach", "FetchPush", "FetchSlide", "FetchPickAndPlace"))
def steps_to_go(env_id: str) -> Potential:
    """Progress of the rules of `fetch.v4`: minus the steps that are left of their ways, of the gripper to the object,
    or to the point behind it where it is pushed, and of the object to the goal."""
    def left(history: History) -> torch.Tensor:
        obs = {name: history.last(name) for name in ("observation", "desired_goal")}
        p, o, g = fetch.read(obs)
        if env_id.startswith("FetchReach"):
            way = (g - p).norm(dim=1)
        elif env_id.startswith("FetchPickAndPlace"):
            way = (o - p).norm(dim=1) + (g - o).norm(dim=1)
        else:
            way = fetch.behind(obs, 0.08).norm(dim=1) + (g - o).norm(dim=1)
        return -way / STRIDE
    return left


def half(phi: Potential, drawn: Callable, size: float) -> Potential:
    """Right where rules that are right half of the time are, elsewhere a number between 0 and `size` by chance."""
    def weak(history: History) -> torch.Tensor:
        coin, number = drawn({name: x[:, -1] for name, x in history.obs.items()}, 2).unbind(1)
        return torch.where(coin < 0.5, phi(history), size * number)
    return weak


def mirrored(phi: Potential) -> Potential:
    """The further away, the better."""
    return lambda history: -phi(history)


def register_qualities(name: str, drawn: Callable, size: float) -> None:
    """`<name>-half` and `<name>-mirrored` of a potential whose values are between 0 and `size`."""
    for prefix, make in _potentials[name].items():
        _whole[f"{name}-half"] = _whole[f"{name}-mirrored"] = name
        potential(f"{name}-half", (prefix,))(lambda env_id, make=make: half(make(env_id), drawn, size))
        potential(f"{name}-mirrored", (prefix,))(lambda env_id, make=make: mirrored(make(env_id)))


register_qualities("fetch.v4", qualities.of_arm, -12.0)
register_qualities("minigrid.official", qualities.of_grid, 3.0)


class Checked:
    """A potential whose results are numbers: what is not finite counts as 0 and is counted, and all are clipped."""

    def __init__(self, name: str, function: Potential):
        self.name, self.function, self.invalid = name, function, 0

    def __call__(self, history: History) -> torch.Tensor:
        """(B,) float32. Raises KnowledgeError for what is no such batch of numbers."""
        try:
            with torch.no_grad():
                phi = self.function(history)
        except KnowledgeError:
            raise
        except Exception as error:
            line = f"{type(error).__name__}: {error}".splitlines()[0]
            raise KnowledgeError(f"potential {self.name} fails on histories of {len(history.step)} episodes: {line}; "
                                 "correct it") from error
        if not isinstance(phi, torch.Tensor) or tuple(phi.shape) != tuple(history.step.shape):
            got = tuple(phi.shape) if isinstance(phi, torch.Tensor) else type(phi).__name__
            raise KnowledgeError(f"potential {self.name} returns {got}; return a tensor {tuple(history.step.shape)}, "
                                 "one number for each history")
        phi = phi.float()
        bad = ~phi.isfinite()
        self.invalid += int(bad.sum())
        return torch.where(bad, 0.0, phi).clamp(-LARGEST, LARGEST)


def scale_of(potential: Checked, env_id: str, horizon: int, count: int = 4096) -> float:
    """By what a potential is divided: its standard deviation over moments of the shipped dataset that has the
    observations of `env_id`; 1 where it hardly varies, or where there is none. Those that are weak or wrong on purpose
    are divided by that of the right one, so that all weigh the same. Raises KnowledgeError for code that fails."""
    env_id = split_id(env_id)[1]
    folder = shipped_for(env_id)
    if folder is None:
        return 1.0
    if potential.name in _whole:
        potential = _load(_whole[potential.name], env_id, None, (), "")
    deviation = float(potential(Dataset(folder).histories(count, horizon)).std(correction=0))
    failed, potential.invalid = potential.invalid / count, 0  # a run counts its own
    if failed > code.MOST_INVALID:
        raise KnowledgeError(f"potential {potential.name} gives no number in {failed:.0%} of {count} moments of the "
                             f"shipped dataset; correct it, or take one that is for {env_id}")
    return deviation if deviation > 1e-6 else 1.0


def path_of(spec: str, env_id: str) -> tuple[str, Path | None]:
    """The kind of a potential and the file that holds it: ("code", ...), ("python", ...), ("name", None), ..."""
    kind, _, rest = spec.partition(":")
    if kind.endswith(".py"):
        return "python", Path(kind)
    if spec in SUFFIXES:
        family = "crafter" if env_id.startswith(CRAFTER) else "minigrid"
        return spec, SHIPPED / f"{family}.{SUFFIXES[spec]}"
    kind = "code" if kind == "llm" else kind
    return (kind, Path(rest)) if kind in SUFFIXES and rest else ("name", None)


def load(spec: str, env_id: str, describe: Callable, words: tuple[str, ...], kept_in: str = "") -> Checked:
    """The potential that `spec` names, for `env_id`. `describe` gives the phrases of observations {name: (B, ...)},
    `words` what the actions do: for potentials that read text. `kept_in` is the folder of a run that goes on: of files
    its copies are taken. Of a new run stderr says what it is. Raises KnowledgeError for whatever cannot be used."""
    env_id = split_id(env_id)[1]
    found, path = _load(spec, env_id, describe, words, kept_in), path_of(spec, env_id)[1]
    if spec != "none" and not kept_in:
        print(f"knowledge: {spec}" + (f", {path.relative_to(ROOT)}" if path and path.is_relative_to(ROOT) else ""),
              file=sys.stderr)
    return found


def _load(spec: str, env_id: str, describe: Callable, words: tuple[str, ...], kept_in: str) -> Checked:
    kind, path = path_of(spec, env_id)
    named = path
    if path is not None:
        if kept_in:
            source = source_of(path, Path(kept_in))
            check_sources([source], Path(kept_in))
            path = source[2] if source[2].is_file() else path
        if not path.is_file():
            raise KnowledgeError(f"potential {spec}: there is no file {path}; check the path")
    if kind == "python":
        return Checked(spec, _function_of(run_file(path, named), named, spec.partition(":")[2] or "potential"))
    if kind == "code":
        return Checked(spec, code.Code(path.read_text(errors="replace"), spec))
    if kind == "pref":
        return Checked(spec, preferences.load(path))
    if kind in ("goals", "goals-minilm"):
        embedder = "minilm" if kind == "goals-minilm" else "hash"
        return Checked(spec, goals.load(path, embedder, describe, words, env_id))
    if spec == "none":
        return Checked(spec, lambda history: torch.zeros(history.step.shape))
    fits = {prefix: make for prefix, make in _potentials.get(spec, {}).items() if env_id.startswith(prefix)}
    if not fits:
        known = sorted(name for name, makers in _potentials.items() if any(env_id.startswith(p) for p in makers))
        raise KnowledgeError(f"potential '{spec}' is unknown for {env_id}; known are code, pref, goals, "
                             f"{', '.join([*known, 'none'])}; a file of yours is mine.py")
    return Checked(spec, fits[max(fits, key=len)](env_id))


def keep(spec: str, env_id: str, folder: Path) -> None:
    """Copy the file behind a potential into the run `folder`, for a run that goes on has to go on with it."""
    path = path_of(spec, split_id(env_id)[1])[1]
    if path is not None:
        keep_sources([source_of(path, folder)])


def _function_of(module: ModuleType, path: Path, name: str) -> Potential:
    function = getattr(module, name, None)
    if not inspect.isfunction(function):
        raise KnowledgeError(f"potential file {path} defines no function '{name}'; define potential(history)")
    return function
