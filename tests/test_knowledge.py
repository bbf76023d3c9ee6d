"""knowledge/: the Fetch rules' values, what --knowledge may name, and each way it can be wrong."""

import math
from pathlib import Path

import pytest
import torch

import knowledge
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
    error("llm:rules.json", "llm:rules.json", "not available")
    error("auto", "HalfCheetah-v5", "none", env_id="HalfCheetah-v5")
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
    run.mkdir()
    for _ in range(2):  # the start, and a resume
        knowledge.keep(f"fetch.official,{path}:up,run:elsewhere", run)
    (kept,) = run.iterdir()
    assert kept.read_text() == Path(path).read_text()
    (before,) = knowledge.load(path, "Toy-v0", 1, torch.zeros(2, 2), kept_in=run).values()
    assert capsys.readouterr().err == ""
    write(tmp_path, "def up(obs): return obs[:, :1] * 0 + 1\n")
    (copied,) = knowledge.load(path, "Toy-v0", 1, torch.zeros(2, 2), kept_in=run).values()
    said = capsys.readouterr().err
    assert said == f"note: {path} is not what run {run} began with; its copy {kept} is used\n"
    Path(path).unlink()
    (left,) = knowledge.load(path, "Toy-v0", 1, torch.zeros(2, 2), kept_in=run).values()
    assert before(example()).sum() == copied(example()).sum() == left(example()).sum() == 0
    assert left.__globals__["__file__"] == path  # what lies beside it stays there
    kept.unlink()
    with pytest.raises(KnowledgeError, match=f"{path} does not exist"):
        knowledge.load(path, "Toy-v0", 1, torch.zeros(2, 2), kept_in=run)


def test_a_run_has_its_policies_in_their_places(tmp_path):
    run = Path(save_run(tmp_path, names=["inner", "mine.up", "mine.down"]).removeprefix("run:"))
    for body, fits in (("def up(obs): return obs[:, :1] * 0\ndef down(obs): return obs[:, :1] * 0\n", True),
                       ("def down(obs): return obs[:, :1] * 0\ndef up(obs): return obs[:, :1] * 0\n", False)):
        path = write(tmp_path, body)
        if fits:
            knowledge.load(path, "Toy-v0", 1, torch.zeros(2, 2), kept_in=run)
        else:
            with pytest.raises(KnowledgeError, match="was trained with mine.up, mine.down, and this gives mine.down, "):
                knowledge.load(path, "Toy-v0", 1, torch.zeros(2, 2), kept_in=run)


def test_run_remembers_other_runs_as_they_were(tmp_path):
    teacher, run = save_run(tmp_path, "teacher"), tmp_path / "run"
    run.mkdir()
    knowledge.keep(f"none,{teacher}", run)
    knowledge.load(teacher, "Toy-v0", 1, example(), kept_in=run)
    save_run(tmp_path, "teacher", clip=4.0)  # it was trained on
    with pytest.raises(knowledge.KnowledgeError, match="teacher/checkpoint.pt has changed since the run began"):
        knowledge.load(teacher, "Toy-v0", 1, example(), kept_in=run)


# ---- a trained agent -----------------------------------------------------------------------------


def example(width=2):
    return torch.linspace(-1, 1, 3 * width).view(3, width)


def save_run(tmp_path, name="seed1", **changes):
    """A run on 2 inputs with 1 action: the inner mean is relu(x) W + b, the query x itself."""
    policy = {
        "format": 1,
        "env": "Toy-v0",
        "inputs": ["observation"],
        "mean": torch.tensor([1.0, 0.0]),
        "std": torch.tensor([2.0, 1.0]),
        "clip": 5.0,
        "actor": "plain",
        "inner": [torch.eye(2), torch.zeros(2), torch.tensor([[1.0, 9.0], [-0.5, 9.0]]), torch.tensor([0.1, 9.0])],
        "query": [torch.eye(2), torch.zeros(2)],
        "keys": None,
        "score": "dot",
        "knowledge": "none",
    }
    (tmp_path / name).mkdir(exist_ok=True)
    policy |= changes
    torch.save({"policy": {k: v for k, v in policy.items() if v != "absent"}}, tmp_path / name / "checkpoint.pt")
    return f"run:{tmp_path / name}"


def load_run(spec, obs=None):
    """The policy of a run on the toy environment, and its actions on `obs`."""
    ((name, policy),) = knowledge.load(spec, "Toy-v0", 1, example() if obs is None else obs).items()
    return name, policy


def advice(tmp_path):
    text = "def up(obs): return torch.ones(len(obs), 1)\ndef down(obs): return -torch.ones(len(obs), 1) / 2\n"
    return write(tmp_path, text, "advice.py")


OBS = torch.tensor([[3.0, 1.0], [-1.0, 1.0], [101.0, 2.0]])  # normalised: (1, 1), (-1, 1), (5, 2)


def test_run_plain(tmp_path):
    name, policy = load_run(save_run(tmp_path))
    assert name == "run.seed1"
    # relu(x) (1, -0.5) + 0.1: 1 - 0.5 + 0.1, 0 - 0.5 + 0.1, 5 - 1 + 0.1 (clipped from 50)
    torch.testing.assert_close(policy(OBS)[:, 0], torch.tensor([math.tanh(v) for v in (0.6, -0.4, 4.1)]))
    assert torch.equal(policy({"observation": OBS}), policy(OBS))


def test_run_kian(tmp_path):
    # In another order than the file gives them: keys go by name.
    keys = {"inner": [1.0, 0.0], "advice.down": [-2.0, 0.0], "advice.up": [0.9, 0.3]}
    keys = {name: torch.tensor(key) for name, key in keys.items()}
    run = save_run(tmp_path, actor="kian", keys=keys, knowledge=advice(tmp_path))
    # dot (inner, up, down): (1, 1.2, -2), (-1, -.6, 2), (5, 5.1, -10): up, down, up
    assert load_run(run)[1](OBS).flatten().tolist() == [1, -0.5, 1]
    write(tmp_path, "def up(obs): return obs.fill_(1)[:, :1]\n"  # what it writes does not reach the other
          "def down(obs): return (obs[:, :1] == 1) * 1.5 - 0.5\n", "advice.py")
    assert load_run(run)[1](OBS.clone()).flatten().tolist() == [1, -0.5, 1]
    advice(tmp_path)
    # cosine: (.71, .89, -.71), (-.71, -.45, .71), (.93, .997, -.93), and with a long inner key the same
    keys["inner"] *= 100
    run = save_run(tmp_path, actor="kian", keys=keys, knowledge=advice(tmp_path), score="cosine")
    assert load_run(run)[1](OBS).flatten().tolist() == [1, -0.5, 1]
    run = save_run(tmp_path, actor="kian", keys=keys, knowledge=advice(tmp_path))  # dot: the inner wins where x_1 > 0
    torch.testing.assert_close(load_run(run)[1](OBS)[:, 0], torch.tensor([math.tanh(0.6), -0.5, math.tanh(4.1)]))


def test_run_kian_inner_key_head(tmp_path):
    keys = {"advice.up": torch.tensor([-1.5]), "advice.down": torch.tensor([-3.0])}
    query = [torch.eye(2), torch.zeros(2), torch.tensor([[-1.0], [0]]), torch.tensor([2.0])]  # 2 - relu(x_1) = 1, 2, -3
    head = [torch.tensor([[-2.0], [0]]), torch.tensor([1.0])]  # of the hidden layer: 1 - 2 relu(x_1) = -1, 1, -9
    run = save_run(tmp_path, actor="kian", query=query, keys=keys, inner_key_head=head, knowledge=advice(tmp_path))
    # scores (inner, up, down): (-1, -1.5, -3), (2, -3, -6), (27, 4.5, 9)
    torch.testing.assert_close(load_run(run)[1](OBS)[:, 0], torch.tensor([0.6, -0.4, 4.1]).tanh())
    head[1] += 12  # inner scores 11, 26, -9
    run = save_run(tmp_path, actor="kian", query=query, keys=keys, inner_key_head=head, knowledge=advice(tmp_path))
    torch.testing.assert_close(load_run(run)[1](OBS)[:, 0], torch.tensor([math.tanh(0.6), math.tanh(-0.4), -0.5]))


def test_run_without_advice_is_plain(tmp_path):
    plain = load_run(save_run(tmp_path))[1]
    kian = load_run(save_run(tmp_path, actor="kian", keys={"inner": torch.ones(2)}))[1]
    assert torch.equal(kian(OBS), plain(OBS))


def test_run_kogun_and_a2t(tmp_path):
    first = torch.tensor([[1.0, 0], [0, 0], [2.0, 0], [4.0, 0]])  # x_1 + 2 up + 4 down = x_1
    inner = [first, torch.zeros(2)]
    kogun = load_run(save_run(tmp_path, actor="kogun", inner=inner, knowledge=advice(tmp_path)))[1]
    torch.testing.assert_close(kogun(OBS)[:, 0], torch.tensor([1.0, -1.0, 5.0]).tanh())
    for names, fits in (["inner", "advice.up", "advice.down"], True), (["inner", "advice.down", "advice.up"], False):
        run = save_run(tmp_path, actor="kogun", inner=inner, knowledge=advice(tmp_path), names=names)
        if fits:
            load_run(run)
        else:
            with pytest.raises(KnowledgeError, match="was trained with other knowledge"):
                load_run(run)
    query = [torch.tensor([[1.0, 0, -1], [0, 0, 0]]), torch.tensor([0, 3.0, 2.5])]
    # logits (inner, up, down): (1, 3, 1.5), (-1, 3, 3.5), (5, 3, -2.5)
    a2t = load_run(save_run(tmp_path, actor="a2t", query=query, knowledge=advice(tmp_path)))[1]
    torch.testing.assert_close(a2t(OBS)[:, 0], torch.tensor([1.0, -0.5, math.tanh(4.1)]))


def test_run_plays_with_the_file_it_was_trained_with(tmp_path):
    path = advice(tmp_path)
    keys = {"inner": torch.zeros(2), "advice.up": torch.ones(2), "advice.down": torch.zeros(2)}
    run = save_run(tmp_path, actor="kian", keys=keys, knowledge=path)
    knowledge.keep(path, Path(run.removeprefix("run:")))
    before = load_run(run)[1](OBS)
    write(tmp_path, "def up(obs): return obs[:, :1] * 0\ndef down(obs): return obs[:, :1] * 0\n", "advice.py")
    policies = knowledge.load(f"{path},{run}", "Toy-v0", 1, example())  # the new rules beside the agent of the old
    assert list(policies) == ["advice.up", "advice.down", "run.seed1"] and policies["advice.up"](OBS).abs().sum() == 0
    assert torch.equal(policies["run.seed1"](OBS), before) and before.abs().sum() > 0


def test_a_run_of_another_task_is_refused_before_its_rules_are_asked(tmp_path):
    write(tmp_path, "def up(obs): return obs[:, 1:2].clamp(-1, 1)\ndef down(obs): return -obs[:, 1:2].clamp(-1, 1)\n",
          "advice.py")
    keys = {"inner": torch.zeros(2), "advice.up": torch.ones(2), "advice.down": torch.zeros(2)}
    run = save_run(tmp_path, actor="kian", keys=keys, knowledge=str(tmp_path / "advice.py"))
    for obs, words in ((torch.zeros(2, 1), "was trained in Toy-v0 on 2 inputs and 1 are observed here"),
                       ({"image": torch.zeros(2, 7, 7, 3)}, "needs observation, not observed here")):
        with pytest.raises(KnowledgeError, match=words):
            knowledge.load(run, "Other-v0", 1, obs)


def test_what_is_given_is_said(tmp_path, capsys):
    knowledge.load(f"{advice(tmp_path)}:down,{save_run(tmp_path)}", "Toy-v0", 1, example())
    assert capsys.readouterr().err == "knowledge: advice.down, run.seed1\n"


def test_run_on_a_goal_task(tmp_path):
    """A nested run: its rules are those of its own environment, not of the one it is used in."""
    inputs = ["achieved_goal", "desired_goal", "observation"]
    inner = [torch.zeros(32, 8), torch.zeros(8)]
    common = dict(env=PUSH, inputs=inputs, mean=torch.zeros(32), std=torch.ones(32), inner=inner)
    query = [torch.zeros(32, 1), torch.ones(1)]
    keys = {"inner": torch.zeros(1), "fetch.get_behind_object": torch.ones(1), "fetch.push_to_goal": -torch.ones(1)}
    run = save_run(tmp_path, "push", actor="kian", query=query, keys=keys, knowledge="auto", **common)
    policy = load(f"fetch.reach_object,{run}")["run.push"]
    assert torch.equal(policy(batch()), load("auto", PUSH)["fetch.get_behind_object"](batch()))
    keys = {"inner": -torch.ones(1), "run.push": torch.ones(1)}
    outer = save_run(tmp_path, "pick", actor="kian", query=query, keys=keys, knowledge=run, **common)
    assert torch.equal(load(outer)["run.pick"](batch()), policy(batch()))


def test_bad_run(tmp_path):
    def bad(spec, *parts, obs=None):
        with pytest.raises(KnowledgeError) as caught:
            load_run(spec, obs)
        message = str(caught.value)
        assert "\n" not in message and "KnowledgeError" not in message  # nor wrapped in another
        assert all(str(part) in message for part in parts), message

    (tmp_path / "empty").mkdir()
    bad(f"run:{tmp_path}/absent", "absent is not there")
    bad(f"run:{tmp_path}/empty", "empty", "no checkpoint.pt")
    run = save_run(tmp_path)
    bad(run, f"run {tmp_path}/seed1 was trained in Toy-v0 on 2 inputs and 3", obs=example(3))
    bad(run, "needs observation", obs={"image": example()})
    bad(save_run(tmp_path, actor="magic"), "'magic'", "kian")
    bad(save_run(tmp_path, std="absent", clip="absent"), "clip, std")
    bad(save_run(tmp_path, format=2), "format 1")
    bad(save_run(tmp_path, inner=[torch.zeros(2, 6), torch.zeros(6)]), "(3, 3)", "(3, 1)")
    for actor in ("kian", "kogun", "a2t"):  # none of which has room for two policies
        other = save_run(tmp_path, actor=actor, keys={"inner": torch.ones(2)}, knowledge=advice(tmp_path))
        bad(other, "other knowledge", "advice.up, advice.down")
    bad(save_run(tmp_path, actor="kian", keys={}, knowledge="absent.py"), "absent.py")

    file = tmp_path / "seed1" / "checkpoint.pt"
    torch.save({"step": 3}, file)
    bad(run, "no policy")
    torch.save([torch.zeros(1)], file)
    bad(run, "no policy")
    torch.save({"policy": tmp_path}, file)  # not a plain type: never unpickled
    bad(run, file, "damaged")
    file.write_bytes(file.read_bytes()[:100])
    bad(run, file, "damaged")
    file.write_text("hello")
    bad(run, file, "damaged")


def test_run_of_itself(tmp_path):
    keys = {"inner": torch.ones(2)}
    first, second = f"run:{tmp_path / 'a'}", f"run:{tmp_path / 'b'}"
    save_run(tmp_path, "a", actor="kian", keys=keys, knowledge=second)
    save_run(tmp_path, "b", actor="kian", keys=keys, knowledge=first)
    with pytest.raises(KnowledgeError, match="a -> b -> a"):
        load_run(first)


def test_trust_compares_returns_and_is_given_once():
    """Two environments: one always plays alone. The agent earns 0, the inner policy -10, then 0 as well."""
    trust = knowledge.Trust(2)
    alone, ended = torch.tensor([True, False]), torch.tensor([True, True])
    assert trust.doubt == trust.caution == 1.0
    for _ in range(500):  # uniform actions: of neither
        trust.add(torch.tensor([-5.0, -5.0]), alone, ended, uniform=True)
    trust.add(torch.tensor([-5.0, -5.0]), alone, ~ended, uniform=True)
    trust.add(torch.tensor([-5.0, -5.0]), alone, ended)  # one that changes, of nothing
    assert trust.count == 0 and trust.doubt == 1.0 and trust.played["start"] == [1000, -5000.0]
    for _ in range(300):
        trust.add(torch.tensor([-10.0, 0.0]), alone, ended)
    assert trust.alone == -10.0 and trust.best == 0.0
    assert trust.doubt == 1.0 and not trust.trusted  # 10 / 5 standard deviations, clipped
    while not trust.trusted:
        before = trust.doubt
        trust.add(torch.tensor([0.0, 0.0]), alone, ended)
    assert trust.doubt == trust.MARGIN <= before and trust.helped
    start = trust.doubt
    for _ in range(100):  # worse again: trust stays, and doubt fades per episode
        trust.add(torch.tensor([-10.0, 0.0]), alone, ended)
    assert trust.trusted and trust.doubt == pytest.approx(start * 0.998**200)
    assert trust.caution == pytest.approx(0.998**200)
    again = knowledge.Trust(2)
    again.load_state_dict(trust.state_dict())
    assert again.doubt == trust.doubt
    with pytest.raises(KnowledgeError, match="another version"):
        again.load_state_dict({k: v for k, v in trust.state_dict().items() if k != "learned"})


def test_knowledge_that_never_helped_is_not_missed(capsys):
    alone, ended = torch.tensor([True, False]), torch.tensor([True, True])
    for start, learned in ((-9.5, False), (-30.0, True)):  # of uniform actions
        trust = knowledge.Trust(2)
        trust.add(torch.tensor([start, start]), alone, ended, uniform=True)
        for i in range(trust.FIRST):
            trust.add(torch.tensor([-10.0, -10.0]) + i % 2, alone, ended)
        assert trust.trusted and not trust.helped and trust.doubt == trust.caution == 0.0
        assert trust.learned == learned
        verdict, = capsys.readouterr().err.splitlines()  # once
        assert "rules were of no help" in verdict and ("begins anew" in verdict) != learned
    trust = knowledge.Trust(2)
    for i in range(trust.FIRST):  # nobody has practised yet
        trust.add(torch.tensor([-10.0, -10.0]) + i % 2, ~ended, ended)
    assert trust.count > trust.FIRST and not trust.trusted


def test_luck_is_not_help():
    """One episode in twelve starts solved, whoever plays: among thousands the best mean of 50 is far above the rest."""
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        trust, episodes = knowledge.Trust(32), 0
        while not trust.trusted:
            reward = -50.0 * (torch.rand(32, generator=draw) > 1 / 12)
            trust.add(reward, torch.rand(32, generator=draw) < 0.25, torch.ones(32, dtype=torch.bool))
            episodes += 32
        assert episodes <= 1600 and trust.doubt == 0.0


def test_advice_that_forbids_is_refused(tmp_path):
    path = write(tmp_path, "def never(obs): return -torch.eye(3)[:len(obs)]\n", "rules.py")
    obs = torch.zeros(2, 5)
    assert list(knowledge.load(path, "Toy-v0", 3, obs)) == ["rules.never"]
    with pytest.raises(KnowledgeError, match=r"rules.never.* returns -1; return numbers in \[0, 1\]"):
        knowledge.load(path, "Toy-v0", 3, obs, lowest=0.0)
