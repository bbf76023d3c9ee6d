"""policy.pt2: it acts as the function it was made of, and a file from a stranger executes nothing."""
import contextlib
import io
import json
import os
import pickle
import shutil
import zipfile

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import knowledge
import pt2
import runtime
from algos import sac, sac_handover, sac_kian
from knowledge import KnowledgeError, minigrid
from runtime import save_policy
from tests import tasks
from tests.test_form import SCRIPTS


def network(inputs: int, outputs: int) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(inputs, 32), nn.ReLU(), nn.LayerNorm(32), nn.Linear(32, outputs))


def goal_obs(size: int, width: int = 25) -> dict:
    widths = {"observation": width, "achieved_goal": 3, "desired_goal": 3}
    return {name: torch.randn(size, n) for name, n in widths.items()}


def near_obs(size: int) -> dict:
    """In metres: near each other, so that rules decide."""
    return {name: x / 20 for name, x in goal_obs(size).items()}


def grid_obs(size: int) -> dict:
    image = torch.randint(0, 11, (size, 7, 7, 3), dtype=torch.uint8)
    return {"image": image, "direction": torch.randint(0, 4, (size,))}


def sac_like():
    """Parameters in a dict that views one flat buffer, statistics in another, goals in front; most attended acts."""
    flat = torch.randn(31 * 8 + 5000)
    actor, mean, std = {"0.weight": flat[:31 * 8].view(31, 8)}, torch.randn(31), torch.rand(31) + 0.5
    rules = knowledge.load("auto", "FetchPickAndPlace-v4", 4, goal_obs(2))
    assert len(rules) > 1

    def act(obs):
        x = torch.cat([obs["achieved_goal"], obs["desired_goal"], obs["observation"]], -1)
        x = ((x - mean) / std).clamp(-5, 5)
        own = torch.tanh(torch.matmul(x, actor["0.weight"]).chunk(2, -1)[0])
        actions = torch.cat([own[:, None], knowledge.advise(rules, obs, 4)], 1)  # (B, n+1, 4)
        chosen = (actions * own[:, None]).sum(-1).argmax(-1)
        return actions[torch.arange(own.shape[0]), chosen]
    return act


def grid_policy():
    conv, head = nn.Conv2d(3, 8, 2), nn.Linear(8 * 36, 7)
    rules = knowledge.load("auto", "MiniGrid-DoorKey-5x5-v0", 7, grid_obs(2), lowest=0.0)
    assert rules

    def log_prob(obs):
        x = conv(obs["image"].permute(0, 3, 1, 2).float()).relu().flatten(1)
        return torch.log_softmax(head(x) + knowledge.advise(rules, obs, 7, 0.0).sum(1), -1)
    return log_prob


CASES = {
    "module": (network(6, 2), lambda size: torch.randn(size, 6)),
    "closure": ((lambda net: lambda obs: net(obs).tanh())(network(6, 2)), lambda size: torch.randn(size, 6)),
    "dict": (sac_like(), goal_obs),
    "grid": (grid_policy(), grid_obs),
}


def play(program: pt2.Program, obs) -> torch.Tensor:
    return program([obs[name] for name in program.entries] if isinstance(obs, dict) else [obs])


@pytest.mark.parametrize("case", CASES)
def test_it_acts_as_the_function_to_the_bit(case, tmp_path):
    function, draw = CASES[case]
    path = tmp_path / "policy.pt2"
    before = torch.get_rng_state()
    example = draw(1)
    after = torch.get_rng_state()
    assert save_policy(path, function, example)
    assert torch.equal(torch.get_rng_state(), after) and not torch.equal(before, after)
    assert [file.name for file in tmp_path.iterdir()] == ["policy.pt2"]
    program, theirs = pt2.read(path), torch.export.load(path).module()
    for size in (1, 2, 7, 64):
        obs = draw(size)
        with torch.no_grad():
            expected = function(knowledge.registry.copy_of(obs))
        assert expected.shape == (size, program.width) and expected.std() > 0
        assert torch.equal(play(program, obs), expected)
        assert torch.equal(theirs(obs), expected)


@pytest.mark.parametrize("task", ["FetchReach-v4", "FetchPush-v4", "FetchSlide-v4", "FetchPickAndPlace-v4",
                                  "FrankaPush-v0", "FrankaSlide-v0", "FrankaPickAndPlace-v0",
                                  "MiniGrid-DoorKey-5x5-v0", "MiniGrid-Dynamic-Obstacles-5x5-v0"])
def test_the_shipped_rules_can_be_exported(task, tmp_path):
    """So that the runs that use them can."""
    rules = knowledge.rules_for(task)
    if task.startswith("MiniGrid"):
        d, lowest, draw = 3 if "Dynamic" in task else 7, 0.0, grid_obs
        minigrid.toward_matrix.cache_clear()  # as where an export is the first to ask
    else:
        d, lowest, draw = 3 if task in ("FrankaPush-v0", "FrankaSlide-v0") else 4, -1.0, near_obs

    def everybody(obs):
        return knowledge.advise(rules, obs, d, lowest).flatten(1)  # (B, n d)
    assert save_policy(tmp_path / "policy.pt2", everybody, draw(2))
    program = pt2.read(tmp_path / "policy.pt2")
    for size in (1, 7, 300):
        obs = draw(size)
        assert torch.equal(play(program, obs), everybody(obs)) and (size < 300 or everybody(obs).any())


def test_the_file_is_small_and_says_nothing_of_this_machine(tmp_path):
    path = tmp_path / "policy.pt2"
    save_policy(path, sac_like(), goal_obs(2))  # its 248 weights are a view of 5248 numbers
    members = {name.partition("/")[2]: data for name, data in unpack(path).items()}
    assert members["data/sample_inputs/model.pt"] == b""
    assert sum(len(data) for name, data in members.items() if "tensor_" in name) < 4 * 700
    assert os.getcwd().encode() not in path.read_bytes() and b"test_policy" not in path.read_bytes()


def test_weights_are_those_of_the_moment(tmp_path):
    weight, obs = torch.ones(2, 1), torch.ones(3, 2)
    assert save_policy(tmp_path / "policy.pt2", lambda obs: obs @ weight, obs)
    weight += 1
    assert torch.equal(play(pt2.read(tmp_path / "policy.pt2"), obs), torch.full((3, 1), 2.0))


def count_calls():
    calls = torch.zeros(1)

    def act(obs):
        calls.add_(1)
        return obs[:, :2] * calls
    return act


@pytest.mark.parametrize("function, why", [
    (lambda obs: obs[:, :2] if obs.mean() > 0 else -obs[:, :2], "branches in Python"),
    (lambda obs: obs[:, :2] * torch.ones(len(obs), 1), "one batch size"),
    (lambda obs: torch.stack([row[:2] for row in obs]), "one batch size"),
    (lambda obs: torch.from_numpy(obs.numpy()[:, :2]), "numpy"),
    (lambda obs: torch.func.vmap(lambda row: row[:2])(obs), "no tensor operation"),
    (lambda obs: obs[:, :2] * torch.rand(obs.shape[0], 1), "acts differently"),
    (count_calls(), "acts differently"),
    (lambda obs: obs[:, 0], "returns shape (1,) for 1 observations"),
    (lambda obs: 1 / 0, "ZeroDivisionError: division by zero"),
])
def test_what_does_not_trace_is_said_in_one_line(function, why, tmp_path, capfd):
    path = tmp_path / "policy.pt2"
    path.write_text("of an earlier checkpoint")
    state = torch.get_rng_state()
    assert not save_policy(path, function, torch.ones(4, 3))
    said = capfd.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and why in said.err and str(path) in said.err
    assert len(said.err) < 300 + len(str(path))
    assert not any(tmp_path.iterdir()) and torch.equal(torch.get_rng_state(), state)


# ---- as knowledge --------------------------------------------------------------------------------


def save_run(folder, function=None, example=None, name="policy.pt2", env_id="Toy-v0"):
    """A finished run on 2 inputs with 1 action, tanh(x_1), unless told otherwise."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"env_id": env_id}))
    function = function or (lambda obs: obs[:, :1].tanh())
    assert save_policy(folder / name, function, torch.zeros(2, 2) if example is None else example)
    return f"run:{folder}"


def load(spec, obs=None, actions=1, **more):
    return knowledge.load(spec, "Toy-v0", actions, torch.rand(3, 2) if obs is None else obs, **more)


def test_a_run_is_knowledge(tmp_path):
    (name, policy), = load(save_run(tmp_path / "seed1")).items()
    obs = torch.randn(5, 2)
    assert name == "run.seed1" and torch.equal(policy(obs), obs[:, :1].tanh())
    assert torch.equal(policy({"observation": obs}), policy(obs))
    assert policy(obs.double()).dtype == torch.float64
    (name, inner), = load(f"inner:{tmp_path / 'seed1'}").items()  # it has no other
    assert name == "inner.seed1" and torch.equal(inner(obs), policy(obs))
    save_run(tmp_path / "seed1", lambda obs: -obs[:, :1].tanh(), name="inner.pt2")
    both = load(f"run:{tmp_path / 'seed1'},inner:{tmp_path / 'seed1'}")
    assert torch.equal(both["run.seed1"](obs), policy(obs)) and torch.equal(both["inner.seed1"](obs), -policy(obs))


def test_log_probabilities_become_advice(tmp_path):
    run = save_run(tmp_path / "seed1", lambda obs: torch.log_softmax(torch.cat([obs, obs * 90], 1), -1))
    policy, = load(run, actions=4, lowest=0.0).values()
    obs = torch.randn(5, 2)
    torch.testing.assert_close(policy(obs), torch.softmax(torch.cat([obs, obs * 90], 1), -1))
    images = save_run(tmp_path / "grid", grid_policy(), grid_obs(2))
    policy, = knowledge.load(images, "MiniGrid-DoorKey-5x5-v0", 7, grid_obs(3), 0.0).values()
    assert torch.allclose(policy(grid_obs(4)).sum(-1), torch.ones(4))


def test_a_run_that_had_a_run_as_knowledge_is_whole(tmp_path):
    first = save_run(tmp_path / "first", sac_like(), goal_obs(2))
    rules = knowledge.load(first, "FetchPush-v4", 4, goal_obs(3))
    second = save_run(tmp_path / "second", lambda obs: -knowledge.advise(rules, obs, 4)[:, 0], goal_obs(2))
    (tmp_path / "first" / "policy.pt2").unlink()
    policy, = knowledge.load(second, "FetchPush-v4", 4, goal_obs(3)).values()
    obs = goal_obs(7)
    assert torch.equal(policy(obs), -rules["run.first"](obs)) and policy(obs).std() > 0


def test_rules_that_make_constants_are_exported_twice(tmp_path):
    """torch.tensor([...]) leaves a detach_ in the graph, which cannot be traced again."""
    rules = knowledge.load("fetch.v4-half", "FetchPush-v4", 4, near_obs(3))
    first = save_run(tmp_path / "first", lambda obs: knowledge.advise(rules, obs, 4)[:, 0], near_obs(2))
    assert b"detach_" in (tmp_path / "first" / "policy.pt2").read_bytes()
    theirs, obs = knowledge.load(first, "FetchPush-v4", 4, near_obs(3)), near_obs(64)
    second = save_run(tmp_path / "second", lambda obs: -knowledge.advise(theirs, obs, 4)[:, 0], near_obs(2))
    policy, = knowledge.load(second, "FetchPush-v4", 4, obs).values()
    assert torch.equal(policy(obs), -knowledge.advise(rules, obs, 4)[:, 0]) and policy(obs).std() > 0


def test_a_run_remembers_other_runs_as_they_were(tmp_path):
    teacher, run = save_run(tmp_path / "teacher"), tmp_path / "run"
    run.mkdir()
    knowledge.keep(f"none,{teacher}", ["inner", "run.teacher"], run)
    load(teacher, kept_in=run)
    save_run(tmp_path / "teacher", lambda obs: obs[:, :1] * 0)  # it was trained on
    with pytest.raises(KnowledgeError, match="teacher/policy.pt2 has changed since the run began"):
        load(teacher, kept_in=run)


SMALL = dict(env="FetchPush-v2", num_envs=4, total_timesteps=400, batch_size=64, hidden="16x1", eval_every=0,
             eval_episodes=4, device="cpu", compile=False)


@pytest.mark.exports
def test_runs_of_the_scripts_are_knowledge_of_each_other(tmp_path):
    sac.main(sac.Args(**SMALL, run_dir=str(tmp_path / "sac")))
    assert not (tmp_path / "sac" / "inner.pt2").exists()
    sac_kian.main(sac_kian.Args(**SMALL, run_dir=str(tmp_path / "kian"),
                                knowledge=f"auto,run:{tmp_path / 'sac'},inner:{tmp_path / 'sac'}"))
    shutil.rmtree(tmp_path / "sac")
    obs = near_obs(16) | {"observation": torch.randn(16, 26)}
    run, inner = knowledge.load(f"run:{tmp_path / 'kian'},inner:{tmp_path / 'kian'}", "FetchPush-v4", 4, obs).values()
    assert run(obs).shape == inner(obs).shape == (16, 4) and not torch.equal(run(obs), inner(obs))


@pytest.mark.parametrize("script", [sac_handover, sac_kian])
def test_what_is_exported_of_an_agent_on_a_gpu(script, tmp_path, monkeypatch):
    """Weights are on another device, for which "meta" stands. All else is on the CPU, and so is the action."""
    written, finish = [], runtime.Run.finish
    monkeypatch.setattr(runtime.Run, "finish", lambda run, *given, **named: (written.extend([*given, named]),
                                                                             finish(run)))
    run = dict(env="tests.tasks:Point-v0", knowledge=tasks.__file__, eval_episodes=1, run_dir=str(tmp_path / "run"))
    script.main(script.Args(**SMALL | run))
    example, functions = written
    inner = functions["inner"]
    cells = dict(zip(inner.__code__.co_freevars, inner.__closure__))  # of main's variables, which `policy` shares
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)  # such tensors have no values to look at
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        agent = cells["agent"].cell_contents
        agent["actor"] = {name: torch.empty_like(x, device="meta") for name, x in agent["actor"].items()}
        cells["device"].cell_contents = torch.device("meta")
        for function in functions.values():
            action = function(knowledge.registry.copy_of(example))
            assert action.device.type == "cpu" and action.shape == (len(example["observation"]), 2)


def test_an_inner_policy_that_was_not_exported_is_not_replaced(tmp_path):
    """The whole agent, knowledge included, is something else."""
    assert knowledge.run.FUSING == {name for name, path in SCRIPTS.items() if "inner=inner" in path.read_text()}
    save_run(tmp_path / "seed1")
    for algo in knowledge.run.FUSING:
        (tmp_path / "seed1" / "config.json").write_text(json.dumps({"env_id": "Toy-v0", "algo": algo}))
        with pytest.raises(KnowledgeError, match="seed1 has no inner.pt2; its own policy was not exported") as caught:
            load(f"inner:{tmp_path / 'seed1'}")
        assert "\n" not in str(caught.value) and load(f"run:{tmp_path / 'seed1'}")
    (tmp_path / "seed1" / "config.json").write_text(json.dumps({"env_id": "Toy-v0", "algo": "sac"}))
    assert load(f"inner:{tmp_path / 'seed1'}")


def test_bad_runs(tmp_path):
    def bad(spec, *parts, **more):
        with pytest.raises(KnowledgeError) as caught:
            load(spec, **more)
        assert "\n" not in str(caught.value) and all(str(part) in str(caught.value) for part in parts), caught.value

    bad(f"run:{tmp_path}/absent", "absent is not there")
    (tmp_path / "empty").mkdir()
    bad(f"run:{tmp_path}/empty", "empty has no policy.pt2", "a finished run")
    (tmp_path / "empty" / "checkpoint.pt").touch()
    bad(f"run:{tmp_path}/empty", "--resume")
    save_run(tmp_path / "empty", name="inner.pt2")
    bad(f"run:{tmp_path}/empty", f"inner:{tmp_path}/empty")
    run = save_run(tmp_path / "seed1")
    bad(run, f"run {tmp_path}/seed1 was trained in Toy-v0 on an observation of 2 float32", "has 3 float32",
        obs=torch.rand(3, 3))
    bad(run, "needs observation, not observed here", obs={"image": torch.rand(3, 2)})
    bad(run, "1 continuous actions, and here are 2 continuous", actions=2)
    bad(run, "1 continuous actions, and here are 1 discrete", lowest=0.0)
    discrete = save_run(tmp_path / "discrete", lambda obs: torch.log_softmax(obs, -1))
    bad(discrete, "2 discrete actions, and here are 2 continuous", actions=2)
    file = tmp_path / "seed1" / "policy.pt2"
    for content in (file.read_bytes()[:300], b"", b"hello", pickle.dumps(Bomb(tmp_path / "spark"))):
        file.write_bytes(content)
        bad(run, file, "damaged or no policy")
    assert not (tmp_path / "spark").exists()


# ---- files from strangers ------------------------------------------------------------------------


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, spark):
        self.spark = str(spark)

    def __reduce__(self):
        return os.mkdir, (self.spark,)


def unpack(path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def pack(path, members, compression=zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def edited(members: dict[str, bytes], name: str, change) -> dict[str, bytes]:
    """`members` with the JSON of one of them changed in place."""
    tree = json.loads(members[f"archive/{name}"])
    change(tree)
    return members | {f"archive/{name}": json.dumps(tree).encode()}


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    """The members of a policy that has constants and weights."""
    folder, net = tmp_path_factory.mktemp("honest"), network(2, 1)
    shift = torch.ones(1)

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, obs):
            return torch.tanh(self.net(obs) + shift)
    save_run(folder / "seed1", Both())
    members = unpack(folder / "seed1" / "policy.pt2")
    assert {"archive/data/weights/weight_0", "archive/data/constants/tensor_0"} <= members.keys()
    return members


def refuse(tmp_path, members, match="damaged or no policy", **more) -> None:
    (tmp_path / "run").mkdir(exist_ok=True)
    pack(tmp_path / "run" / "policy.pt2", members, **more)
    with pytest.raises(KnowledgeError, match=match) as caught:
        load(f"run:{tmp_path / 'run'}")
    assert "\n" not in str(caught.value)


def test_an_honest_archive_loads(honest, tmp_path):
    (tmp_path / "run").mkdir()
    pack(tmp_path / "run" / "policy.pt2", honest)
    assert load(f"run:{tmp_path / 'run'}")


def test_a_pickle_in_any_member_is_refused(honest, tmp_path):
    spark = tmp_path / "spark"
    buffer = io.BytesIO()
    torch.save(Bomb(spark), buffer)
    for bomb in (pickle.dumps(Bomb(spark)), buffer.getvalue()):
        for name in honest:
            refuse(tmp_path, honest | {name: bomb})
            if "/weight_" in name or "/tensor_" in name:  # said to be a pickle
                kind = "weights" if "/weight_" in name else "constants"
                config = f"data/{kind}/model_{kind}_config.json"
                refuse(tmp_path, edited(honest | {name: bomb}, config, lambda tree: [
                    entry.update(use_pickle=True) for entry in tree["config"].values()]), "is a pickle")
        for name in ("data/constants/custom_obj_0", "data/constants/opaque_obj_0", "data/constants/model.pt",
                     "data/constants/tensor_9.pt", "data/aotinductor/model/model.so", "data/aotinductor/model/w.json",
                     "data/executorch/model.pte", "extra/notes.txt", "models/other.json", "data/sample_inputs/other.pt",
                     "serialized_exported_program.json", "serialized_example_inputs.pt", "version", "code/model.py",
                     "constants.pkl", "data.pkl", "data/weights/../../x", "mtia/x"):
            refuse(tmp_path, honest | {f"archive/{name}": bomb}, "which a policy does not")
        refuse(tmp_path, honest | {"other/data/constants/tensor_0": bomb}, "more than one folder")
        for path in ("custom_obj_0", "opaque_obj_0", "../weights/weight_0"):
            refuse(tmp_path, edited(honest, "data/constants/model_constants_config.json", lambda tree: [
                entry.update(path_name=path) for entry in tree["config"].values()]), "is a pickle")
    assert not spark.exists()


def torch_loads(path) -> None:
    with contextlib.suppress(Exception):  # what it executed it has executed
        torch.export.load(path)


def test_the_bomb_is_one(honest, tmp_path):
    """What the tests above refuse, torch's own loader executes: were it not so, they would show nothing."""
    spark = tmp_path / "spark"
    buffer = io.BytesIO()
    torch.save(Bomb(spark), buffer)
    pack(tmp_path / "bad.pt2", honest | {"archive/data/sample_inputs/model.pt": buffer.getvalue()})
    torch_loads(tmp_path / "bad.pt2")
    assert spark.exists()


def graph_of(tree):
    return tree["graph_module"]["graph"]


def first_argument(tree):
    return graph_of(tree)["nodes"][0]["inputs"][0]


@pytest.mark.parametrize("target", [
    "torch.os.system", "torch.hub.load", "torch.load", "torch.ops.load_library", "math.__loader__.load_module",
    "_operator.attrgetter", "_operator.methodcaller", "torch.ops.aten.from_file.default",
    "torch.ops.aten.set_.default", "torch.ops.aten.resize_.default", "torch.ops.aten.as_strided.default",
    "torch.ops.aten.rand.default", "torch.ops.aten.add.out", "torch.ops.aten.add.__class__",
    "torch.ops.aten.add.nothing", "torch.ops.aten.__name__.x",
    "torch.ops.higher_order.cond", "torch.ops.prim.Print.default", "#python:x", "builtins.eval", "",
    "torch.ops.aten.add"])
def test_other_operators_are_refused(target, honest, tmp_path):
    changed = edited(honest, "models/model.json", lambda tree: graph_of(tree)["nodes"][0].update(target=target))
    refuse(tmp_path, changed, "which is n")


def test_expressions_are_not_evaluated(honest, tmp_path):
    """Sizes and guards are Python source, which torch's loader evaluates; here the one is read past, and so is the
    other."""
    spark = tmp_path / "spark"
    source = f"__import__('os').mkdir({str(spark)!r})"

    def change(tree):
        tree["guards_code"] = [source]
        tree["range_constraints"] = {source: {"min_val": 0, "max_val": None}}
        tree["graph_module"]["metadata"] = {"custom": source}
        for value in graph_of(tree)["tensor_values"].values():
            value["sizes"] = [{"as_expr": {"expr_str": source, "hint": None}} if "as_expr" in x else x
                              for x in value["sizes"]]
    (tmp_path / "run").mkdir()
    pack(tmp_path / "run" / "policy.pt2", edited(honest, "models/model.json", change))
    policy, = load(f"run:{tmp_path / 'run'}").values()
    policy(torch.zeros(2, 2))
    assert not spark.exists()
    torch_loads(tmp_path / "run" / "policy.pt2")
    assert spark.exists()  # so it was a bomb


@pytest.mark.parametrize("change", [
    lambda tree: tree["schema_version"].update(major=99),
    lambda tree: tree["graph_module"]["module_call_graph"][0]["signature"].update(
        in_spec='[1, {"type": "collections.defaultdict", "context": "{}", "children_spec": []}]'),
    lambda tree: first_argument(tree).update(arg={"as_graph": {"name": "x", "graph": {}}}),
    lambda tree: first_argument(tree).update(arg={"as_custom_obj": {"name": "x", "class_fqn": "y"}}),
    lambda tree: first_argument(tree).update(arg={"as_operator": "torch.os.system"}),
    lambda tree: first_argument(tree).update(arg={"as_int": [1]}),
    lambda tree: graph_of(tree)["nodes"].pop(0),  # what it gave is missing
    lambda tree: tree["graph_module"]["signature"]["input_specs"].append({"custom_obj": {"arg": {"name": "x"}}}),
    lambda tree: tree["graph_module"]["signature"]["output_specs"].clear(),
    lambda tree: tree.clear(),
])
def test_other_graphs_are_refused(change, honest, tmp_path):
    refuse(tmp_path, edited(honest, "models/model.json", change), "damaged")


@pytest.mark.parametrize("meta", [
    dict(sizes=[{"as_int": 10 ** 12}], strides=[{"as_int": 0}]),
    dict(sizes=[{"as_int": 2 ** 70}], strides=[{"as_int": 1}]),
    dict(sizes=[{"as_int": -1}]), dict(strides=[{"as_int": 10 ** 6}, {"as_int": 10 ** 6}]),
    dict(storage_offset={"as_int": 10 ** 6}), dict(dtype=11), dict(layout=1),
    dict(sizes=[{"as_expr": {"expr_str": "1"}}]),
])
def test_tensors_do_not_reach_beyond_their_numbers(meta, honest, tmp_path):
    refuse(tmp_path, edited(honest, "data/weights/model_weights_config.json", lambda tree: [
        entry["tensor_meta"].update(meta) for entry in tree["config"].values()]))


def test_zip_bombs_are_refused(honest, tmp_path):
    refuse(tmp_path, honest | {"archive/data/weights/weight_99": bytes(10 ** 8)}, "compressed",
           compression=zipfile.ZIP_DEFLATED)
    for deep in ("[" * 10 ** 6, '{"a":' * 10 ** 6, "9" * 10 ** 6):
        refuse(tmp_path, honest | {"archive/models/model.json": deep.encode()})
    (tmp_path / "run" / "policy.pt2").unlink()
    with (tmp_path / "run" / "policy.pt2").open("wb") as file:
        file.truncate(pt2.MOST_BYTES + 1)
    with pytest.raises(KnowledgeError, match=f"a policy at most {pt2.MOST_BYTES}"):
        load(f"run:{tmp_path / 'run'}")


def test_members_are_there_once(honest, tmp_path):
    with pytest.warns(UserWarning, match="Duplicate name"):
        (tmp_path / "run").mkdir()
        with zipfile.ZipFile(tmp_path / "run" / "policy.pt2", "w") as archive:
            for name, data in [*honest.items(), ("archive/data/sample_inputs/model.pt", b"")]:
                archive.writestr(name, data)
    with pytest.raises(KnowledgeError, match="twice"):
        load(f"run:{tmp_path / 'run'}")
    for name in honest:
        if "serialization_id" not in name and ".data/version" not in name:
            refuse(tmp_path, {other: data for other, data in honest.items() if other != name})


def test_device_follows_the_observations():
    """The meta device stands for a GPU: weights and new tensors are where the observations are."""
    program = pt2.Program(["x"], [(2,)], [torch.float32], 2, ["x"], "out", [
        (torch.ops.aten.ones.default, [[2]], {"device": pt2.Device}, ["one"]),
        (torch.ops.aten.add.Tensor, [pt2.Name("x"), pt2.Name("one")], {}, ["sum"]),
        (torch.ops.aten.mul.Tensor, [pt2.Name("sum"), pt2.Name("w")], {}, ["out"])], {"w": torch.ones(2)})
    assert program([torch.zeros(3, 2, device="meta")]).device.type == "meta"
