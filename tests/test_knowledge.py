"""knowledge/: the Fetch rules' values, what --knowledge may name, and each way it can be wrong."""

from pathlib import Path

import pytest
import torch

import knowledge
from env_id import split_id
from knowledge import KnowledgeError

PICK, PUSH, SLIDE = "FetchPickAndPlace-v4", "FetchPush-v4", "FetchSlide-v4"


def fetch_obs(p, o, g=(0.0, 0.0, 0.0), h=0.024, dtype=torch.float64):
    """One observation with the time feature, as a batch of one."""
    p, o, g = (torch.tensor([v], dtype=dtype) for v in (p, o, g))
    fingers, rest = torch.full((1, 2), h, dtype=dtype), torch.zeros(1, 15, dtype=dtype)
    return {"observation": torch.cat([p, o, o - p, fingers, rest], -1), "achieved_goal": o, "desired_goal": g}


def batch(size=8, dtype=torch.float32):
    """Random observations, the first all zeros, where every distance is zero."""
    torch.manual_seed(0)
    widths = {"observation": 26, "achieved_goal": 3, "desired_goal": 3}
    some = (torch.arange(size) > 0)[:, None]
    return {name: torch.randn(size, width, dtype=dtype) * some for name, width in widths.items()}


def load(spec, env_id=PICK, example=None):
    return knowledge.load(spec, env_id, 4, example or batch())


def assert_action(policy, obs, expected):
    torch.testing.assert_close(policy(obs), torch.tensor([expected], dtype=torch.float64), atol=1e-4, rtol=0)


# ---- rules ---------------------------------------------------------------------------------------


def test_official_pick_and_place():
    go_to_object, go_to_target = load("fetch.official").values()
    far = fetch_obs(p=(0, 0, 0), o=(0.10, -0.20, -0.05))
    assert_action(go_to_object, far, (0.10, -0.20, -0.05, 1))
    assert_action(go_to_target, far, (0, 0, 0, 0.024))
    near = fetch_obs(p=(1.3, 0.75, 0.43), o=(1.31, 0.75, 0.45), g=(1.4, 0.8, 0.6))
    assert_action(go_to_object, near, (0, 0, 0, 0.024))
    assert_action(go_to_target, near, (0.1, 0.05, 0.17, -1))


def test_official_push():
    go_to_object, go_to_target = load("fetch.official", PUSH).values()
    far = fetch_obs(p=(0, 0, 0), o=(0.10, -0.20, -0.05), g=(1, 1, 1))
    assert_action(go_to_object, far, (0.10, -0.20, -0.05, 0))
    assert_action(go_to_target, far, (0, 0, 0, 0))
    near = fetch_obs(p=(0, 0, 0), o=(0.01, 0, 0), g=(0.5, 0, 2))  # out of the box: the whole row is halved
    assert_action(go_to_object, near, (0, 0, 0, 0))
    assert_action(go_to_target, near, (0.25, 0, 1, 0))


def test_official_slide():
    go_to_object, go_to_target = load("fetch.official", SLIDE).values()
    behind = fetch_obs(p=(1.00, 0.75, 0.41), o=(1.10, 0.75, 0.42), g=(1.40, 0.75, 0.42))
    assert_action(go_to_object, behind, (0, 0, 0, 0))
    assert_action(go_to_target, behind, (0.4, 0, 0.01, 0))
    aside = fetch_obs(p=(1.00, 0.65, 0.42), o=(1.10, 0.75, 0.42), g=(1.40, 0.75, 0.42))
    assert_action(go_to_object, aside, (0, 0.1, 0, 0))
    assert_action(go_to_target, aside, (0, 0, 0, 0))


def test_box_keeps_direction():
    row = torch.tensor([[2, -0.5, 0.25, 1], [0.5, 0, 0, 1]])
    expected = torch.tensor([[1, -0.25, 0.125, 0.5], [0.5, 0, 0, 1]])
    torch.testing.assert_close(knowledge.fetch.into_box(row), expected)


def test_v4_pick_and_place():
    reach, carry = load("fetch.v4").values()
    above = fetch_obs(p=(0, 0, 0.05), o=(0, 0, 0))
    assert_action(reach, above, (0, 0, -0.5, 1))
    assert_action(carry, above, (0, 0, 0, 1))
    aside = fetch_obs(p=(0.05, 0, 0), o=(0, 0, 0))  # on its way to 2 * 0.05 - 0.02 m above
    assert_action(reach, aside, (-0.5, 0, 0.8, 1))
    held = fetch_obs(p=(0, 0, 0), o=(0.01, 0, 0), g=(0.06, 0, 0))
    assert_action(reach, held, (0, 0, 0, -1))
    assert_action(carry, held, (0.5, 0, 0, -1))


def test_v4_push():
    get_behind, push = load("fetch.v4", PUSH).values()
    behind = fetch_obs(p=(-0.08, 0, 0), o=(0, 0, 0), g=(0.06, 0, 0))
    assert_action(get_behind, behind, (0, 0, 0, 0))
    assert_action(push, behind, (0.6, 0, 0, 0))
    touching = fetch_obs(p=(-0.045, 0.01, 0), o=(0, 0, 0), g=(0.06, 0, 0))  # slower, and back onto the line
    assert_action(push, touching, (0.25, -0.1, 0, 0))
    before = fetch_obs(p=(0.07, 0, 0), o=(0, 0, 0), g=(0.06, 0, 0))  # between object and goal: over it, no push
    assert get_behind(before)[0, 0] < 0 < get_behind(before)[0, 2]
    assert_action(push, before, (0, 0, 0, 0))


def test_v4_slide_strikes_until_fast_enough():
    strike = load("fetch.strike_to_goal", SLIDE)["fetch.strike_to_goal"]
    obs = fetch_obs(p=(-0.07, 0, 0), o=(0, 0, 0), g=(0.32, 0, 0))  # sqrt(2 * 0.32) = 0.8 m/s
    assert_action(strike, obs, (0.76, 0, 0, 0))
    obs["observation"][0, 14] = 0.03  # relative to the gripper ...
    assert strike(obs)[0, 0] == 0  # 0.75 m/s
    obs["observation"][0, 20] = -0.02  # ... which moves back: 0.25 m/s
    assert_action(strike, obs, (0.76, 0, 0, 0))


@pytest.mark.parametrize("task", ["Reach", "Push", "Slide", "PickAndPlace", "PushDense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_rule_is_in_the_box_and_row_by_row(task, dtype):
    obs = batch(16, dtype)
    for name, policy in knowledge.rules_for(f"Fetch{task}-v4").items():
        action = policy(obs)
        assert action.dtype == dtype and action.abs().max() <= 1, name
        rows = [policy({key: x[i : i + 1] for key, x in obs.items()}) for i in range(16)]
        torch.testing.assert_close(action, torch.cat(rows), msg=name)


def test_qualities():
    """Half of all goals are right, and for the others an action is random; the mirrored rule is the opposite."""
    obs = {name: 0.3 * x for name, x in batch(4000).items()}
    right, half, mirrored = (load(f"fetch.v4{suffix}", example=obs) for suffix in ("", "-half", "-mirrored"))
    for name, rule in right.items():
        assert torch.equal(mirrored[f"{name}-mirrored"](obs), -rule(obs))
        weak = half[f"{name}-half"](obs)
        is_right = (weak == rule(obs)).all(1)
        assert is_right.float().mean().item() == pytest.approx(0.5, abs=0.03)
        assert weak[~is_right].mean(0).abs().max() < 0.07 and weak[~is_right].std(0).sub(3 ** -0.5).abs().max() < 0.03
        moved = obs | {"observation": obs["observation"].roll(1, 0)}  # a goal is right or wrong wherever the gripper is
        assert torch.equal((half[f"{name}-half"](moved) == rule(moved)).all(1), is_right)


# ---- names ---------------------------------------------------------------------------------------


def test_names_and_order():
    reach, carry = "fetch.reach_object", "fetch.carry_to_goal"
    assert list(load("auto")) == list(load("fetch.v4")) == [reach, carry]
    assert list(load(f" {carry}, {reach}")) == [carry, reach]
    assert load(f"{carry},{reach}")[reach] is load("auto")[reach]
    assert list(load(f"{carry},fetch.official")) == [carry, "fetch.go_to_object", "fetch.go_to_target"]
    assert load("none") == load("none", "HalfCheetah-v5") == {}


def test_one_name_per_family():
    assert list(load("auto", "FetchPushDense-v4")) == ["fetch.get_behind_object", "fetch.push_to_goal"]
    assert list(load("auto", SLIDE)) == ["fetch.get_behind_object", "fetch.strike_to_goal"]
    assert list(load("auto", "FetchReach-v4")) == ["fetch.move_to_goal"]
    name = "fetch.go_to_object"
    assert load(name, PUSH)[name] is load(name, "FetchPushDense-v4")[name] is not load(name, SLIDE)[name]


def error(spec, *parts, env_id=PICK, example=None):
    """`spec` fails with one line that has all `parts`."""
    with pytest.raises(KnowledgeError) as caught:
        load(spec, env_id, example)
    message = str(caught.value)
    assert "\n" not in message and all(str(part) in message for part in parts), message


def test_bad_names():
    error("fetch.reach_objct", "fetch.reach_objct", PICK, "did you mean fetch.reach_object?")
    error("fetch.push_to_goal", PICK)  # a rule of another task
    error("zzz", "known are", "fetch.official", "fetch.carry_to_goal")
    error("auto,", "''")
    error("fetch.v4,fetch.reach_object", "fetch.reach_object comes twice")
    error("llm:rules.json", "llm:rules.json", "there is no file rules.json")
    error("auto", "Swimmer-v5", "none", env_id="Swimmer-v5")
    error("fetch.official", "FetchReach-v4", env_id="FetchReach-v4")
    assert issubclass(KnowledgeError, ValueError)


def test_rule(monkeypatch):
    for table in ("_rules", "_groups"):
        monkeypatch.setattr(knowledge.registry, table, {})
    for envs in ("Toy", ("ToyHard", "Game")):  # the longer prefix is the better fit
        knowledge.rule("toy.up", envs=envs, group="toy")(lambda obs, envs=envs: envs)
    assert knowledge.rules_for("Toy-v0")["toy.up"](None) == "Toy"
    assert knowledge.rules_for("ToyHard-v0")["toy.up"](None) == ("ToyHard", "Game")
    assert knowledge.groups_for("Game-v0") == {"toy": ["toy.up"]} and knowledge.rules_for("Other-v0") == {}
    with pytest.raises(ValueError, match="twice"):
        knowledge.rule("toy.up", envs="Game", group="toy")(lambda obs: obs)


# ---- a user's file -------------------------------------------------------------------------------


def write(tmp_path, text, name="mine.py"):
    (tmp_path / name).write_text("import torch\nfrom statistics import mean\n" + text)
    return str(tmp_path / name)


def test_file(tmp_path):
    text = (
        "def b(obs): return _like(obs) + 0.5\n"
        "def a(obs): return _like(obs) - mean([0, 1])\n"
        "def _like(obs): return torch.zeros(len(obs['observation']), 4)\n"
    )
    path = write(tmp_path, text)
    policies = load(path)
    assert list(policies) == ["mine.b", "mine.a"]  # as written; neither the helper nor the import
    assert policies["mine.a"](batch(3)).tolist() == [[-0.5] * 4] * 3
    assert list(load(f"fetch.reach_object,{path}:a")) == ["fetch.reach_object", "mine.a"]
    error(f"{path},{path}:a", "mine.a comes twice")
    error(f"{path}:mean", path, "'mean'", "b, a")


@pytest.mark.parametrize(
    "body, parts",
    [
        ("return torch.zeros(8, 3)", ("mine.push", "(8, 3)", "(8, 4)")),
        ("return torch.zeros(4)", ("(4,)", "(8, 4)")),
        ("return torch.zeros(8, 4).double()", ("torch.float64", "torch.float32")),
        ("return torch.zeros(8, 4, dtype=torch.long)", ("torch.int64",)),
        ("return torch.zeros(8, 4) / 0", ("nan", "finite")),
        ("return torch.full((8, 4), -2.5)", ("-2.5", "[-1, 1]")),
        ("return [0.0] * 4", ("list", "tensor")),
        ("return 1 if obs['observation'] > 0 else 0", ("fails in line 3 on a batch", "(8, 26)", "RuntimeError")),
        ("return obs['observation'].view()", ("fails in line 3", "TypeError", "start its name with _")),
        ("raise KeyError('a\\nb')", ("KeyError",)),
    ],
)
def test_file_with_bad_policy(tmp_path, body, parts):
    path = write(tmp_path, f"def push(obs): {body}")
    error(path, path, *parts)


def test_bad_file(tmp_path):
    error(str(tmp_path / "absent.py"), "absent.py", "does not exist")
    error(write(tmp_path, "x = 1"), "no public function")
    error(write(tmp_path, "def f(:"), "fails to import", "SyntaxError")
    error(write(tmp_path, "import absent_module"), "fails to import", "absent_module")
    error(write(tmp_path, "raise SystemExit(3)"), "fails to import", "SystemExit")


def test_rule_that_fails_later():
    """Usable at the start, but no number in a state that comes later: the rule is named."""
    obs = batch(2)
    policies = load("fetch.reach_object") | {"mine.unit": lambda obs: obs["desired_goal"][:, [0] * 4] * float("nan"),
                                             "mine.long": lambda obs: torch.full((2, 4), 1.5)}
    obs["observation"][1] = torch.arange(26.0)
    finite = torch.tensor([[0.0], [float("nan")]])
    with pytest.raises(KnowledgeError, match=r"knowledge mine.second returns nan; .* \[0.0, 1.0, 2.0, .*25.0\].*goal"):
        knowledge.advise({"mine.second": lambda obs: finite.expand(-1, 4)}, obs, 4)
    with pytest.raises(knowledge.KnowledgeError, match=r"knowledge mine.unit returns nan"):
        knowledge.advise(policies, obs, 4)
    del policies["mine.unit"]
    with pytest.raises(knowledge.KnowledgeError, match=r"knowledge mine.long returns 1.5"):
        knowledge.advise(policies, obs, 4)
    for written_in in (lambda obs: torch.zeros(8, 4), lambda obs: torch.zeros(8, 1, 4)):  # the batch size of the start
        with pytest.raises(knowledge.KnowledgeError, match=r"knowledge mine.eight returns shape \(8.*return \(2, 4\)"):
            knowledge.advise({"mine.eight": written_in}, obs, 4)
    with pytest.raises(KnowledgeError, match=r"mine.cut fails in line \d+ on .*'observation': \(2, 26\).*: IndexError"):
        knowledge.advise({"mine.cut": lambda obs: obs["observation"][5]}, obs, 4)


def test_a_rule_may_write_into_what_it_is_given():
    def shift(obs):
        obs["observation"][:, :3] -= obs["desired_goal"]
        return obs["observation"].clamp_(-1, 1)[:, :4]

    obs, untouched = batch(2), batch(2)
    first, second = knowledge.advise({"a": shift, "b": shift}, obs, 4).unbind(1)
    assert torch.equal(first, second) and all(torch.equal(obs[name], untouched[name]) for name in obs)


def test_run_keeps_its_files(tmp_path, capsys):
    path, run = write(tmp_path, "def up(obs): return obs[:, :1] * 0\n"), tmp_path / "run"
    obs = torch.ones(3, 2)
    run.mkdir()
    for _ in range(2):  # the start, and a resume
        knowledge.keep(f"fetch.official,{path}:up,run:elsewhere", ["inner", "mine.up"], run)
    (kept,) = run.glob("*.py")
    assert kept.read_text() == Path(path).read_text()
    (before,) = knowledge.load(path, "Toy-v0", 1, torch.zeros(2, 2), kept_in=run).values()
    assert capsys.readouterr().err == ""
    write(tmp_path, "def up(obs): return obs[:, :1] * 0 + 1\n")
    (copied,) = knowledge.load(path, "Toy-v0", 1, torch.zeros(2, 2), kept_in=run).values()
    said = capsys.readouterr().err
    assert said == f"note: {path} is not what run {run} began with; its copy {kept} is used\n"
    Path(path).unlink()
    (left,) = knowledge.load(path, "Toy-v0", 1, torch.zeros(2, 2), kept_in=run).values()
    assert before(obs).sum() == copied(obs).sum() == left(obs).sum() == 0
    assert left.__globals__["__file__"] == path  # what lies beside it stays there
    kept.unlink()
    with pytest.raises(KnowledgeError, match=f"{path} does not exist"):
        knowledge.load(path, "Toy-v0", 1, torch.zeros(2, 2), kept_in=run)


def test_a_run_has_its_policies_in_their_places(tmp_path):
    path = write(tmp_path, "def up(obs): return obs[:, :1] * 0\ndef down(obs): return obs[:, :1] * 0\n")
    knowledge.keep("none", ["inner", "mine.up", "mine.down"], tmp_path)
    knowledge.load(path, "Toy-v0", 1, torch.zeros(2, 2), kept_in=tmp_path)
    path = write(tmp_path, "def down(obs): return obs[:, :1] * 0\ndef up(obs): return obs[:, :1] * 0\n")
    with pytest.raises(KnowledgeError, match="was trained with mine.up, mine.down, and this gives mine.down, mine.up;"):
        knowledge.load(path, "Toy-v0", 1, torch.zeros(2, 2), kept_in=tmp_path)


def test_what_is_given_is_said(tmp_path, capsys):
    path = write(tmp_path, "def up(obs): return obs[:, :1] * 0\ndef down(obs): return obs[:, :1] * 0\n")
    knowledge.load(f"{path}:down,none", "Toy-v0", 1, torch.zeros(2, 2))
    assert capsys.readouterr().err == "knowledge: mine.down\n"


def test_advice_that_forbids_is_refused(tmp_path):
    path = write(tmp_path, "def never(obs): return -torch.eye(3)[:len(obs)]\n", "rules.py")
    obs = torch.zeros(2, 5)
    assert list(knowledge.load(path, "Toy-v0", 3, obs)) == ["rules.never"]
    with pytest.raises(KnowledgeError, match=r"rules.never.* returns -1; return numbers in \[0, 1\]"):
        knowledge.load(path, "Toy-v0", 3, obs, lowest=0.0)


def test_ids_and_copies_by_any_name():
    """The module that registers an id, and how it is seen, do not hide its rules; copies of two files never share a
    name, and fit into a folder."""
    ids = ("FetchPush-v4", "gymnasium_robotics:FetchPush-v4", "FetchPush-v4:frame_stack=2", "a:FetchPush-v4:run:x-v1/s")
    assert {split_id(env_id)[1] for env_id in ids} == {"FetchPush-v4"}
    assert split_id(ids[3]) == ("a", "FetchPush-v4", "run:x-v1/s")
    assert split_id("toys:Unversioned") == ("toys", "Unversioned", "")
    names = [knowledge.flat_name(path) for path in ("a/b-c.py", "a-b/c.py", "a-b-c.py", "x/" * 200 + "rules.py",
                                                        "a/b.py", "a-b.py", "../b.py", "up/b.py")]
    assert len(set(names)) == 8 and max(map(len, names)) < 120 and knowledge.flat_name("/tmp/mine.py") == "tmp-mine.py"
