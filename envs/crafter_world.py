"""Crafter's simulator, made deterministic and several times faster. Needs the crafter package.

World generation evaluates noise for the whole map at once, a step asks only objects that are near, and a picture is
looked up tile by tile. All random draws are those of crafter 1.8.3, in its order: tests/test_crafter_text.py plays both
side by side. Two things differ from crafter on purpose:

- creatures of a chunk are kept in Python sets, whose order is that of memory addresses, so that crafter repeats no
  episode; here they are taken in order of place;
- `fork_rules`, the physics of the released code of Zhang et al. (2024): a hand deals a damage of 5 (a cow dies of one
  blow instead of three), and what one has nine of cannot be collected, so that drinking counts only when thirsty.
"""
from functools import cache

import crafter
import numpy as np
import opensimplex
from crafter import constants, engine, objects
from opensimplex.constants import GRADIENTS3, NORM_CONSTANT3, SQUISH_CONSTANT3, STRETCH_CONSTANT3

from envs.vector import from_saved, to_saved

MATERIALS = [None, *constants.materials]
KINDS = (objects.Player, objects.Cow, objects.Zombie, objects.Skeleton, objects.Arrow, objects.Plant)
REACH = 2 * 9 - 1  # an object acts when its distance to the player is less than twice the view


class ForkPlayer(objects.Player):
    """Stronger and more modest than crafter's."""

    def _do_object(self, obj) -> None:
        if isinstance(obj, (objects.Zombie, objects.Skeleton, objects.Cow)):
            held = self.inventory
            damage = max(1, 2 * (held["wood_sword"] > 0), 3 * (held["stone_sword"] > 0), 5 * (held["iron_sword"] > 0))
            obj.health -= 5 - damage  # the rest is dealt below
        super()._do_object(obj)

    def _do_material(self, target, material) -> None:
        received = constants.collect.get(material, {}).get("receive", {})
        if any(self.inventory[name] >= constants.items[name]["max"] for name in received):
            self._thirst = 0 if material == "water" else self._thirst
            return
        super()._do_material(target, material)


class World(crafter.Env):
    """crafter.Env without observations and rewards.

    `view`, `status` and `picture` say what the player sees; `act` takes one of crafter's 17 actions.
    """

    def __init__(self, seed: int, fork_rules: bool = True):
        super().__init__(seed=seed, length=None)
        self.player = ForkPlayer if fork_rules else objects.Player
        unit = np.array([7, 7])
        outside = np.full((1, 7, 7, 3), 127, np.uint8)
        self.tiles = np.concatenate([[self._textures.get(name, unit)[..., :3] for name in MATERIALS], outside])
        self.drawn: dict[tuple[str, int], np.ndarray] = {}  # (texture of an object, material below) -> its tile
        self.items: dict[tuple[int, ...], np.ndarray] = {}  # inventory -> its picture

    def restart(self, seed: int) -> None:
        """A new world; `seed` says which."""
        self._seed, self._episode = seed, 0
        self.next_world()

    def next_world(self) -> None:
        """The next world of this seed."""
        self._episode += 1
        self._step = 0
        self._world.reset(seed=hash((self._seed, self._episode)) % (2 ** 31 - 1))
        self._update_time()
        center = (self._world.area[0] // 2, self._world.area[1] // 2)
        self._player = self.player(self._world, center)
        self._world.add(self._player)
        generate(self._world, self._player)

    def act(self, action: int) -> None:
        """One step."""
        self._step += 1
        self._update_time()
        world, player = self._world, self._player
        player.action = constants.actions[action]
        count = len(world._objects)  # what is made in this step acts from the next one on
        player.update()
        (x, y), (left, top) = map(int, player.pos), np.maximum(player.pos - REACH, 0)
        near = world._obj_map[left:x + REACH + 1, top:y + REACH + 1]
        for index in sorted(near[near > 0].tolist()):
            obj = world._objects[index]
            if index < count and obj is not player and abs(int(obj.pos[0]) - x) + abs(int(obj.pos[1]) - y) <= REACH:
                obj.update()
        if self._step % 10 == 0:
            for chunk, objs in world.chunks.items():
                self._balance_chunk(chunk, objs)

    def _balance_object(self, chunk, objs, cls, *args) -> None:
        creatures = sorted((obj for obj in objs if isinstance(obj, cls)), key=lambda obj: (obj.pos[0], obj.pos[1]))
        super()._balance_object(chunk, creatures, cls, *args)

    @property
    def dead(self) -> bool:
        return self._player.health <= 0

    @property
    def achievements(self) -> dict[str, int]:
        """How often each has been reached."""
        return self._player.achievements

    def window(self, array: np.ndarray, outside: int) -> np.ndarray:
        """The 9 x 7 cells of a map (64, 64) around the player, [x, y]; `outside` beyond the map's edge."""
        out = np.full((9, 7), outside, array.dtype)
        (x, y), (width, height) = map(int, self._player.pos), array.shape
        left, right, top, bottom = max(x - 4, 0), min(x + 5, width), max(y - 3, 0), min(y + 4, height)
        out[left - x + 4:right - x + 4, top - y + 3:bottom - y + 3] = array[left:right, top:bottom]
        return out

    def view(self) -> np.ndarray:
        """What lies in the 9 x 7 cells around the player, uint8 [x, y]: 0 beyond the edge, then materials, then kinds
        of objects."""
        world = self._world
        cells, index = self.window(world._mat_map, 0), self.window(world._obj_map, 0)
        for x, y in zip(*np.nonzero(index)):
            cells[x, y] = len(MATERIALS) + self.kind(world._objects[index[x, y]])
        return cells

    @staticmethod
    def kind(obj) -> int:
        """Index of its class in KINDS."""
        return 0 if isinstance(obj, objects.Player) else KINDS.index(type(obj))

    def status(self) -> list[int]:
        """Facing x and y, health, food, drink, energy, the twelve other items, asleep."""
        player = self._player
        return [*map(int, player.facing), *player.inventory.values(), int(player.sleeping)]

    def picture(self) -> np.ndarray:
        """crafter's own observation, (64, 64, 3) uint8."""
        world, player = self._world, self._player
        materials, index = self.window(world._mat_map, len(MATERIALS)), self.window(world._obj_map, 0)
        tiles = self.tiles[materials]  # (9, 7, 7, 7, 3): cells, then their pixels
        for x, y in zip(*np.nonzero(index)):
            tiles[x, y] = self.draw(world._objects[index[x, y]].texture, int(materials[x, y]))
        canvas = tiles.swapaxes(1, 2).reshape(9 * 7, 7 * 7, 3)
        canvas = self._local_view._light(canvas, world.daylight)
        if player.sleeping:
            canvas = self._local_view._sleep(canvas)
        held = tuple(player.inventory.values())
        if held not in self.items:
            self.items[held] = self._item_view(player.inventory, np.array([7, 7]))
        out = np.zeros((64, 64, 3), np.uint8)
        out[:63, :49], out[:63, 49:63] = canvas, self.items[held]
        return out.transpose(1, 0, 2)

    def skip_picture(self) -> None:
        """Draw the random numbers of `picture` without painting it: at night it has noise."""
        if self._world.daylight < 0.5:
            self._world.random.uniform(32, 127, (9 * 7, 7 * 7))

    def draw(self, texture: str, material: int) -> np.ndarray:
        """The tile of an object on a material."""
        if (texture, material) not in self.drawn:
            tile = self.tiles[material].copy()
            engine._draw_alpha(tile, np.array([0, 0]), self._textures.get(texture, np.array([7, 7])))
            self.drawn[texture, material] = tile
        return self.drawn[texture, material]

    def snapshot(self) -> dict:
        """Everything that `restore` needs, plain data."""
        world = self._world
        _, keys, position, *_ = world.random.get_state()
        things = [None if obj is None else {"kind": self.kind(obj), "own": to_saved(
            {name: value for name, value in vars(obj).items() if name not in ("world", "random", "player")})}
            for obj in world._objects]
        return {"seed": self._seed, "episode": self._episode, "step": self._step, "materials": world._mat_map.copy(),
                "things": things, "chunks": [list(map(int, key)) for key in world._chunks],
                "keys": keys.astype(np.int64), "position": int(position)}

    def restore(self, snapshot: dict) -> None:
        """Bring this world to the state of a `snapshot`."""
        self._seed, self._episode, self._step = (snapshot[name] for name in ("seed", "episode", "step"))
        world = self._world
        world.reset()
        keys = np.asarray(snapshot["keys"]).astype(np.uint32)
        world.random.set_state(("MT19937", keys, snapshot["position"], 0, 0.0))
        world._mat_map[:] = np.asarray(snapshot["materials"])
        for chunk in snapshot["chunks"]:
            world._chunks[tuple(chunk)]  # a defaultdict; chunks are balanced in the order in which they came to be
        world._objects = [None] * len(snapshot["things"])
        for index, thing in enumerate(snapshot["things"]):
            if thing is not None:
                kind = KINDS[thing["kind"]] if thing["kind"] else self.player
                obj = kind.__new__(kind)
                vars(obj).update(from_saved(thing["own"]), world=world, random=world.random)
                if kind is self.player:
                    self._player = obj
                world._objects[index] = obj
                world._obj_map[tuple(obj.pos)] = index
                world._chunks[world.chunk_key(obj.pos)].add(obj)
        for obj in filter(None, world._objects):
            if isinstance(obj, (objects.Zombie, objects.Skeleton)):
                obj.player = self._player
        self._update_time()


def generate(world: engine.World, player: objects.Player) -> None:
    """crafter.worldgen.generate_world, with the same draws, noise of the whole map at once."""
    names, noises = map_noise(world.area)
    noise = dict(zip(names, noises.values(world.random.randint(0, 2 ** 31 - 1))))
    x, y = np.indices(world.area)
    distance = np.sqrt((x - player.pos[0]) ** 2 + (y - player.pos[1]) ** 2)
    start = 1 / (1 + np.exp(-(4 - distance + 2 * noise["start"])))
    water = noise["lake"] + 0.15 * noise["pond"] + 0.1 - 2 * start
    mountain = (noise["mountain"] + 0.3 * noise["hill"]) / 1.3 - (4 * start + 0.3 * water)
    meadow, rock = start > 0.5, mountain > 0.15
    cave = (noise["cave"] > 0.15) & (mountain > 0.3)
    across, down = noise["across"] > 0.4, noise["down"] > 0.4
    coal, iron, lava = noise["coal"] > 0, noise["iron"] > 0.4, noise["lava"] > 0.35
    beach, trees = noise["beach"] > -0.2, noise["trees"] > 0
    ids, uniform = world._mat_ids, world.random.uniform

    material = np.full(world.area, ids["grass"], np.uint8)
    sand = ~meadow & ~rock & (0.25 < water) & (water <= 0.35) & beach
    material[sand] = ids["sand"]
    material[~meadow & ~rock & ~sand & (0.3 < water)] = ids["water"]
    rock &= ~meadow
    tunnels = rock & ~cave & (across | down)
    material[rock] = ids["stone"]
    material[rock & cave | tunnels] = ids["path"]
    lava &= mountain > 0.3
    for i, j in np.argwhere(rock & ~cave & ~tunnels | ~rock & ~meadow & (material == ids["grass"]) & trees).tolist():
        if not rock[i, j]:
            if uniform() > 0.8:
                material[i, j] = ids["tree"]
        elif coal[i, j] and uniform() > 0.85:
            material[i, j] = ids["coal"]
        elif iron[i, j] and uniform() > 0.75:
            material[i, j] = ids["iron"]
        elif mountain[i, j] > 0.18 and uniform() > 0.994:
            material[i, j] = ids["diamond"]
        elif lava[i, j]:
            material[i, j] = ids["lava"]
    world._mat_map[:] = material

    grass, path = material == ids["grass"], material == ids["path"]
    for i, j in np.argwhere(grass | path | (material == ids["sand"])).tolist():
        if distance[i, j] > 3 and grass[i, j] and uniform() > 0.985:
            world.add(objects.Cow(world, (i, j)))
        elif distance[i, j] > 10 and uniform() > 0.993:
            world.add(objects.Zombie(world, (i, j), player))
        elif path[i, j] and tunnels[i, j] and uniform() > 0.95:
            world.add(objects.Skeleton(world, (i, j), player))


@cache
def map_noise(area: tuple[int, int]) -> tuple[list[str], "Noise"]:
    """Names of what noise decides in a world, and the noise itself: all worlds ask for it at the same points."""
    x, y = np.indices(area).astype(float)
    points = {"start": (x / 3, y / 3, 8), "lake": (x / 15, y / 15, 3), "pond": (x / 5, y / 5, 3),
              "mountain": (x / 15, y / 15, 0), "hill": (x / 5, y / 5, 0), "cave": (x / 7, y / 7, 6),
              "across": (2 * x / 3, y / 5 / 3, 7), "down": (x / 5 / 3, 2 * y / 3, 7), "coal": (x / 8, y / 8, 1),
              "iron": (x / 6, y / 6, 2), "lava": (x / 5, y / 5, 6), "beach": (x / 9, y / 9, 4),
              "trees": (x / 7, y / 7, 5)}
    return list(points), Noise(np.stack([np.stack(np.broadcast_arrays(*point)) for point in points.values()], 1))


class Noise:
    """OpenSimplex noise in three dimensions at fixed points (Spencer 2014, `opensimplex.noise3`): the sum of
    (2 - d^2)^4 times a gradient over points of a skewed lattice at a distance d < sqrt(2). Only the gradients depend on
    the seed. A cell of the lattice is a tetrahedron at either end and an octahedron between; in a tetrahedron, the sum
    leaves all points beside its corners out but two, which depend on the two corners that are nearest."""

    corners = np.array([(-1, 0, 1), (-1, 1, 0), (-1, 1, 1), (0, -1, 1), (0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, -1),
                        (0, 1, 0), (0, 1, 1), (0, 1, 2), (0, 2, 0), (0, 2, 1), (1, -1, 0), (1, -1, 1), (1, 0, -1),
                        (1, 0, 0), (1, 0, 1), (1, 0, 2), (1, 1, -1), (1, 1, 0), (1, 1, 1), (1, 2, 0), (2, 0, 0),
                        (2, 0, 1), (2, 1, 0)])  # (26, 3), as seen from that of a point's cell: all that are ever near

    def __init__(self, points: np.ndarray):
        """points (3, ...)"""
        self.shape, points = points.shape[1:], points.reshape(3, -1)
        skewed = points + points.sum(0) * STRETCH_CONSTANT3
        cell = np.floor(skewed)
        offset = points - (cell + cell.sum(0) * SQUISH_CONSTANT3)
        counted = self.counted()[:, self.case(skewed - cell)]  # (26, n)
        found = []
        for corner, counts in zip(self.corners, counted):
            n = np.flatnonzero(counts)
            d = offset[:, n] - corner[:, None] - corner.sum() * SQUISH_CONSTANT3
            weight = 2 - d[0] * d[0] - d[1] * d[1] - d[2] * d[2]  # in this order: points of a map lie on the very edge
            near = weight > 0
            corners = cell[:, n[near]].astype(np.int64) + corner[:, None]
            found.append((n[near], corners, d[:, near], np.square(np.square(weight[near]))))
        # pairs of a point and a lattice point near it: number of the point, lattice (3, m), difference (3, m), weight
        self.point, self.corner, self.d, self.weight = (np.concatenate(part, -1) for part in zip(*found))

    @classmethod
    @cache
    def counted(cls) -> np.ndarray:
        """(26, 13) bool, which corners count in each case of `case`."""
        table, unit = np.ones((13, len(cls.corners)), bool), np.eye(3, dtype=int)
        for far in range(2):
            for axis in range(3):
                others = [unit[k] for k in range(3) if k != axis]
                for pair, extras in enumerate(([unit[axis] - other for other in others],
                                               [sum(others), sum(others) - unit[axis]])):
                    allowed = [np.zeros(3, int), *unit, *extras]
                    allowed = [1 - corner for corner in allowed] if far else allowed
                    table[1 + 6 * far + 3 * pair + axis] = [any((corner == x).all() for x in allowed)
                                                            for corner in cls.corners]
        return table.T

    @staticmethod
    def case(inside: np.ndarray) -> np.ndarray:
        """Places (3, ...) in [0, 1) within cells -> 0 in an octahedron; in a tetrahedron 1 + 6 far + 3 pair + axis: at
        its tip and the corner of `axis` most (pair 0), or at the two corners of the other axes (pair 1)."""
        total = inside.sum(0)
        far = total >= 2
        u = np.where(far, -inside, inside)  # points of a map tie often: the comparisons are those of the original
        first = u[0] >= u[1]
        a, b = np.where(~first & (u[2] > u[0]), 2, 0), np.where(first & (u[2] > u[1]), 2, 1)  # the two largest
        score_a, score_b = (np.take_along_axis(u, axis[None], 0)[0] for axis in (a, b))
        tip = np.where(far, total - 3, 1 - total)
        near_tip = (tip > score_a) | (tip > score_b)
        axis = np.where(near_tip, np.where(score_b > score_a, b, a), 3 - a - b)
        return np.where((total <= 1) | far, np.where(far, 7, 1) + np.where(near_tip, 0, 3) + axis, 0)

    def values(self, seed: int) -> np.ndarray:
        """The noise of this seed in [-1, 1] at the points."""
        simplex = opensimplex.OpenSimplex(seed=seed)
        perm, gradients = simplex._perm, GRADIENTS3.reshape(-1, 3).astype(float)
        i, j, k = self.corner
        index = (perm[(perm[i & 255] + j) & 255] + k) & 255
        gradient = gradients[simplex._perm_grad_index3 // 3][index].T  # (3, m)
        parts = self.weight * (gradient * self.d).sum(0)
        return np.bincount(self.point, parts, np.prod(self.shape)).reshape(self.shape) / NORM_CONSTANT3
