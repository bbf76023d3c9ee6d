"""Potentials and labels: numbers by hand, what a potential must not notice, what is refused."""
import json
import sys

import numpy as np
import pytest
import torch
from minigrid.core.world_object import Ball, Box, Key

import envs
from errors import UserError
from knowledge import annotator, code, dataset, goals, label_code, label_goals, label_preferences, labelling
from knowledge import potentials, preferences, train_preferences
from knowledge.dataset import Dataset, Recorder, Segment, text_of
from knowledge.history import History, Past
from knowledge.registry import KnowledgeError
from llm import client, sandbox
from tests.test_babyai_text import THINGS, UP, room, seen
from tests.test_llm import server  # noqa: F401  (a fixture)
from tests.test_sandbox import without_seccomp

GRID = "BabyAI-Text-GoToLocal-RedBall-S20"
WORDS = envs.action_words(GRID)


def image(*things):
    """The view of an agent at (2, 5) that looks up, in a room with `things`."""
    return torch.from_numpy(seen(room(*things), 2, 5, UP))


def history(now, before, actions):
    """A history of one episode, in its 9th step."""
    return History({"image": torch.stack([*before, now])[None]}, torch.tensor([actions]), torch.tensor([9]))


# code

def test_shipped_code_by_hand():
    function = code.Code((potentials.SHIPPED / "minigrid.py").read_text(), "shipped")
    full, fewer = image(*THINGS), image(*[thing for thing in THINGS if thing[1:] != (3, 5)])
    assert float(function(history(full, [full] * 5, [2] * 5))) == pytest.approx(1.0)
    assert float(function(history(full, [full] * 5, [2] * 4 + [6]))) == pytest.approx(0.8)
    assert float(function(history(fewer, [full] * 5, [2] * 5))) == pytest.approx(0.7)
    value, parts = function.explain(history(fewer, [full] * 5, [2] * 5))
    assert value == pytest.approx(0.7) and parts == pytest.approx({"near": 0.5, "moved": 0.2, "wall": 0, "waste": 0})
    scaled = (full / torch.tensor([10.0, 5.0, 3.0]))  # as the released code hands it over: no object is recognised
    assert function.box.explain(code.FUNCTION, scaled.permute(2, 0, 1)[None].numpy(),
                                scaled.permute(2, 0, 1)[None, None].repeat(1, 5, 1, 1, 1).numpy(),
                                np.full((1, 5), 2))[1]["near"] == 0


def test_layout_of_what_code_sees():
    now = image((Key("yellow"), 3, 5), (Ball("red"), 2, 4))
    obs, past, actions = code.arguments(history(now, [now] * 5, [0, 1, 2, 3, 4]))
    assert obs.shape == (1, 3, 7, 7) and past.shape == (1, 5, 3, 7, 7) and actions.tolist() == [[0, 1, 2, 3, 4]]
    assert obs[0, :, 3, 5].tolist() == [6, 0, 0] and obs[0, :, 4, 6].tolist() == [5, 4, 0]  # in front, on the right


def test_code_that_fails_in_some_states():
    source = "def compute_reward(obs, past_obs, past_actions):\n    return 1 / (past_actions[-1] - 2), {}\n"
    now = image(*THINGS)
    checked = potentials.Checked("mine", code.Code(source, "mine"))
    both = History({"image": torch.stack([now] * 6).repeat(2, 1, 1, 1, 1)}, torch.tensor([[0] * 5, [2] * 5]),
                   torch.tensor([9, 9]))
    assert checked(both).tolist() == [-0.5, 0.0] and checked.invalid == 1


# nearness, targets

def test_nearness_by_hand():
    near, target = potentials.near_things(GRID), potentials.near_target(GRID)
    now = history(image(*THINGS), [image(*THINGS)] * 5, [2] * 5)
    assert float(near(now)) == 1 and float(target(now)) == pytest.approx(1 / 2)  # red ball two steps ahead
    two = potentials.near_target("BabyAI-Text-GoTo-RedBallBlueBox-S20")
    boxed = image((Box("blue"), 4, 2), (Ball("blue"), 2, 4))
    assert float(two(history(boxed, [boxed] * 5, [2] * 5))) == pytest.approx(1 / 5)
    nothing = image()
    assert float(near(history(nothing, [nothing] * 5, [2] * 5))) == 0
    with pytest.raises(KnowledgeError, match="another target in every episode"):
        potentials.near_target("BabyAI-Text-GoToLocal-Pretraining-S20")


def test_progress_of_the_rules_of_fetch():
    def value(name, env_id, p, o, g):
        x = torch.tensor([[*p, *o, *[0.0] * 20]])
        now = History({"observation": x.unsqueeze(1), "desired_goal": torch.tensor([[g]])}, torch.zeros(1, 0),
                      torch.zeros(1))
        return float(potentials.load(name, env_id, envs.clauses, ())(now))
    where = (0.0, 0.0, 0.0), (0.3, 0.0, 0.4), (0.3, 0.0, 0.5)  # 0.5 m to the object, 0.1 m from there to the goal
    assert value("fetch.v4", "FetchPickAndPlace-v2", *where) == pytest.approx(-12)
    assert value("fetch.v4-mirrored", "FetchPickAndPlace-v2", *where) == pytest.approx(12)
    assert value("fetch.v4", "FetchReach-v2", *where) == pytest.approx(-(0.34 ** 0.5) / 0.05)
    behind = (-0.08, 0.0, 0.0), (0.0, 0.0, 0.0), (0.2, 0.0, 0.0)
    assert value("fetch.v4", "FetchPush-v2", *behind) == pytest.approx(-4, abs=1e-3)
    half = [value("fetch.v4-half", "FetchPickAndPlace-v2", *where[:2], (0.3, 0.0, 0.5 + i / 1000)) for i in range(200)]
    right = [value("fetch.v4", "FetchPickAndPlace-v2", *where[:2], (0.3, 0.0, 0.5 + i / 1000)) for i in range(200)]
    assert sum(map(float.__eq__, half, right)) == pytest.approx(100, abs=20) and min(half) >= -16 and max(half) <= 0


def test_progress_on_doorkey_is_that_of_its_stages():
    now = history(image((Key("red"), 2, 3)), [image()] * 5, [2] * 5)
    names = ("target", "minigrid.official", "minigrid.official-mirrored")
    phi, same, opposite = (potentials.load(name, "MiniGrid-DoorKey-8x8-v0", envs.clauses, WORDS) for name in names)
    assert phi(now) == same(now) == -opposite(now) == 1 / 2  # two steps to the key


# histories

def test_weak_and_wrong_potentials_weigh_what_the_right_one_does():
    env_id = "minigrid:MiniGrid-DoorKey-8x8-v0"  # also behind a module
    scales = [potentials.scale_of(potentials.load(f"minigrid.official{quality}", env_id, None, ()), env_id, 4)
              for quality in ("", "-half", "-mirrored")]
    assert scales[0] == scales[1] == scales[2] != 1


def test_potentials_of_other_tasks_are_refused(tmp_path):
    env_id = "BabyAI-Text-GoToLocal-RedBall-S20"
    with pytest.raises(KnowledgeError, match="goals of Crafter.*others than those of BabyAI"):
        potentials.load("goals:knowledge/shipped/crafter.json", env_id, envs.clauses, envs.action_words(env_id))
    loaded = potentials.load("llm:knowledge/shipped/crafter.py", env_id, None, ())
    with pytest.raises(KnowledgeError, match="gives no number in 100% of 4096 moments"):
        potentials.scale_of(loaded, env_id, 4)


def test_past_starts_anew_with_every_episode():
    def obs(*numbers):
        return {"image": torch.tensor(numbers, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 7, 7, 3),
                "picture": torch.zeros(len(numbers), 4)}
    past = Past(obs(1, 50), horizon=2, no_op=6)
    assert past.now.obs.keys() == {"image"} and past.now.action.tolist() == [[6, 6]] * 2
    first = past.step(torch.tensor([0, 1]), obs(2, 51), obs(2, 51), torch.tensor([False, False]))
    assert first.obs["image"][:, :, 0, 0, 0].tolist() == [[1, 1, 2], [50, 50, 51]]
    assert first.action.tolist() == [[6, 0], [6, 1]] and first.step.tolist() == [1, 1]
    second = past.step(torch.tensor([2, 3]), obs(3, 52), obs(3, 60), torch.tensor([False, True]))
    assert second.obs["image"][1, :, 0, 0, 0].tolist() == [50, 51, 52] and second.action[1].tolist() == [1, 3]
    assert past.now.obs["image"][:, :, 0, 0, 0].tolist() == [[1, 2, 3], [60, 60, 60]]
    assert past.now.action.tolist() == [[0, 2], [6, 6]] and past.now.step.tolist() == [2, 0]
    other = Past(obs(9, 9), horizon=2, no_op=6)
    other.load_state_dict(past.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(other.now[1:], past.now[1:]))


# preferences

def test_preference_loss_by_hand():
    z, y = torch.tensor([[1., 0.], [0., 2.], [.5, .5]]), torch.tensor([0., 1., .5])
    assert float(preferences.preference_loss(z, y)) == pytest.approx(.483429, abs=1e-6)
    one = torch.tensor([[1., 0.]])
    smoothing = 0.3 * .813262
    for label, loss in ((0., .313262), (1., 1.313262)):
        told = float(preferences.preference_loss(one, torch.tensor([label])))
        assert told == pytest.approx(loss + smoothing, abs=1e-6)
    assert float(preferences.preference_loss(one, torch.tensor([.5]))) == pytest.approx(smoothing, abs=1e-6)  # no NaN


def test_score_by_hand():
    uniform = torch.zeros(1, 5, 5)
    assert float(preferences.score(uniform, torch.arange(1., 6.)[None])) == pytest.approx(10)
    assert float(preferences.score(torch.randn(1, 5, 5), torch.full((1, 5), 2.0))) == pytest.approx(10)


def test_size_as_released():
    model = preferences.PreferenceModel(preferences.Shape.paper(7))
    assert sum(p.numel() for p in model.parameters()) == 2_549_505


@pytest.mark.parametrize("shape", [preferences.Shape("minigrid", 7), preferences.Shape.paper(7)])
def test_potential_does_not_see_the_last_observation(shape):
    torch.manual_seed(0)
    potential = preferences.Preferred(preferences.PreferenceModel(shape).eval())
    now, other = image(*THINGS), image()
    same = history(now, [now] * 4 + [other], [0, 1, 2, 3, 4])
    changed = history(other, [now] * 4 + [other], [0, 1, 2, 3, 4])
    before = history(now, [now] * 4 + [now], [0, 1, 2, 3, 4])
    with torch.no_grad():
        assert torch.equal(potential(same), potential(changed)) and not torch.equal(potential(same), potential(before))


def test_timesteps_of_each_episode():
    now = torch.zeros(3, 7, 7, 7, 3, dtype=torch.uint8)
    steps = preferences.steps_of(History({"image": now}, torch.zeros(3, 6, dtype=torch.long), torch.tensor([3, 8, 0])))
    assert steps.timestep.tolist() == [[0, 0, 0, 0, 1, 2], [2, 3, 4, 5, 6, 7], [0] * 6]
    model = preferences.PreferenceModel(preferences.Shape("minigrid", 7)).eval()
    late = steps._replace(timestep=torch.full((3, 6), 5000))  # beyond the table: as its last entry
    assert torch.isfinite(model.values(late)).all()


# goals

def test_goal_potential_by_hand():
    vectors = {"a": [1, 0, 0], "b": [0, 1, 0], "c": [0, 0, 1], "d": [.6, .8, 0]}
    library = [{"text": name, "goals": wanted} for name, wanted in zip("abcd", ([0], [1], [2], [0, 1]))]
    potential = goals.Goals(library, ["a", "b", "c"],
                            lambda texts: np.array([vectors[text] for text in texts], np.float32), None, [])
    potential.threshold = 0.85
    query = torch.tensor([[.8, .6, 0.]])
    assert (query @ potential.situations.T).tolist()[0] == pytest.approx([.8, .6, 0, .96])
    match = potential.match_of(query.repeat(2, 1), torch.tensor([[.9, .4359, 0], [.8, .6, 0]]))
    assert match.tolist() == pytest.approx([.9, .8])
    assert torch.where(match > potential.threshold, match, 0.0).tolist() == pytest.approx([.9, 0])
    ends_in_c = potential.match_of(query, torch.tensor([[0., 0., 1.]]))  # goal c is of none of the nearest three
    assert ends_in_c.tolist() == [0]


def test_goals_of_a_history():
    library = [{"text": "You see a red ball 2 steps forward. You move forward", "goals": [0]},
               {"text": "You see a wall 1 step forward. You turn left", "goals": [1]}]
    potential = goals.Goals(library, ["You see a red ball 1 step forward", "no such thing"], goals.hash_embedding,
                            envs.clauses, WORDS)
    near, far = image((Ball("red"), 2, 4)), image((Ball("red"), 2, 3))
    approaching = potential.match(history(near, [far] * 5, [2] * 5))
    leaving = potential.match(history(image(), [far] * 5, [0] * 5))
    assert float(approaching) > float(leaving) + 0.1
    assert goals.phrases("Step by step:\n1. You see a key 2 steps left. You turn left.\nNow: You see nothing.") == [
        "You see a key 2 steps left", "You turn left", "You see nothing"]


def test_hashed_words():
    ball, same, near, far, empty = goals.hash_embedding(["go to the red ball", "Go to the red ball!", "a red ball",
                                                         "turn left", ""])
    assert np.linalg.norm(ball) == pytest.approx(1) and np.array_equal(ball, same) and not empty.any()
    assert ball @ near > 0.3 > 0.2 > abs(ball @ far)


# labels

@pytest.mark.parametrize("text, label", [
    ("[Thoughts]\nA is busy.\n[Rank]\nA > B", 0), ("[Rank] B > A", 1), ("[Rank]\nA = B\n", .5), ("[Rank]\nA>B", 0),
    ("[Thoughts] A > B", -1), ("[Rank]\n", -1), ("[Rank]\nneither", -1), ("[Rank]\nA > B, B > A or A = B", -1),
    ("The form is [Rank] and A > B.\n[Rank]\nB > A", 1), ("[Rank]\nB = A", .5),
    ("[Rank]\nA > B\nBut B > A could be said too", 0), ("[Rank]\nA > B\n[Rank]", 0),
    ("[Rank]\nB > A\n\nThis is my [Rank].\n", 1), ("[Rank]\nA > B, B > A or A = B\n[Rank]\nneither", -1),
    ("I give [Rank]\nA > B, B > A or A = B\n</think>\n[Thoughts]\nB is busy.\n[Rank]\nB > A", 1)])
def test_rank(text, label):
    assert label_preferences.rank(text) == label


def test_labels_that_contradict_themselves():
    assert [label_preferences.both_ways(*pair) for pair in ((0, 1), (1, 0), (.5, .5), (0, 0), (0, .5), (-1, 1))] == [
        0, 1, .5, -1, -1, -1]


def test_a_model_is_asked_in_both_orders(small, tmp_path):
    """Answers of a person stand for those of a model: three pairs, then the same ones the other way round."""
    said = ["[Rank]\nA > B", "[Rank]\nB > A", "[Rank] A = B", "[Rank]\nB > A", "[Rank]\nB > A", "[Rank] A = B"]
    (tmp_path / "answers.md").write_text("\n===\n".join(said))
    args = label_preferences.Args(dataset=str(small), env=GRID, annotator="model", pairs=3,
                                  by_hand=str(tmp_path / "answers.md"), recordings=str(tmp_path / "said.jsonl"),
                                  out=str(tmp_path / "labels.jsonl"))
    meta, *rows = map(json.loads, label_preferences.main(args).read_text().splitlines())
    assert [row["label"] for row in rows] == [0, -1, 0.5]  # the second pair was judged by its order
    assert labelling.Chat(args, "").args.workers == 1 < args.workers  # else answers come to other questions
    assert meta["source"] == "handwritten" and meta["contradicts_itself"] == pytest.approx(1 / 3)
    replayed = label_preferences.Args(**{**vars(args), "by_hand": "", "out": str(tmp_path / "again.jsonl")})
    assert label_preferences.main(replayed).read_text() == (tmp_path / "labels.jsonl").read_text()
    system, user = label_preferences.question(Dataset(small).segment(0, 0, 2), Dataset(small).segment(1, 0, 2),
                                              "minigrid", WORDS)
    assert "A > B" in system["content"] and user["content"].startswith("A:\nStep by step:\n1. You ")


def segment(*captions, actions=None):
    return Segment(0, 0, {}, np.array(actions or [2] * (len(captions) - 1)), list(captions))


def test_rule_annotator_by_hand():
    coming = segment("You see a red ball 3 steps forward", "You see a red ball 2 steps forward",
                     "You see a red ball 1 step forward")
    idle = segment(*["You see nothing in front."] * 3)
    turning = segment("You see a wall 2 steps left", "You see a blue key 2 steps left and 1 step forward",
                      "You see a wall 2 steps left")
    assert annotator.score(coming) == 2 + 2 and annotator.score(idle) == -1 and annotator.score(turning) == 2
    assert annotator.prefer(coming, idle) == 0 and annotator.prefer(idle, turning) == 1
    assert annotator.prefer(idle, idle) == 0.5
    fed = segment("You face cow. Health 9/9, food 3/9, drink 9/9, energy 9/9",
                  "You face grass. Health 9/9, food 9/9, drink 9/9, energy 9/9. You have 1 sapling, 3 wood pickaxe")
    assert annotator.possessions(fed.captions[1]) == {"sapling": 1, "wood pickaxe": 3, "health": 9, "food": 9,
                                                      "drink": 9, "energy": 9}
    assert annotator.score(fed) == 1 + 6 + 4
    assert annotator.agreement([0, 1, .5, -1, 1], [0, 0, 0, 0, 1]) == (pytest.approx(2 / 3), 3)


def test_goals_in_an_answer():
    assert label_goals.goals_in("Here:\n- go to a ball\n-turn\n- avoid walls \n  - nested\n- go to a ball") == [
        "go to a ball", "avoid walls"]
    with pytest.raises(ValueError, match="no goals"):
        label_goals.goals_in("Explore!")


def test_conversations_are_pruned_from_the_front():
    system = [{"role": "system", "content": "s" * 40}]
    talk = [{"role": role, "content": str(k) * 40} for k in range(4) for role in ("user", "assistant")]
    kept = labelling.pruned(system + talk + [{"role": "user", "content": "last"}], budget=40)
    assert [message["content"][0] for message in kept] == ["s", "2", "2", "3", "3", "l"][:1] + ["3", "3", "l"]
    assert labelling.pruned(system + [{"role": "user", "content": "x" * 1000}], budget=10)[-1]["content"] == "x" * 1000


# datasets

@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Four short episodes of random actions."""
    folder, rng = tmp_path_factory.mktemp("data") / "small", np.random.default_rng(0)
    vec, recorder = envs.make_vec(GRID, 3, max_steps=30), Recorder()
    recorder.play(vec, lambda obs: rng.integers(7, size=3), 4, 1, envs.captions)
    recorder.save(folder, GRID, WORDS, by="chance")
    return folder


def test_dataset_keeps_what_happened(small):
    data = Dataset(small)
    assert len(data) == 4 and data.meta["by"] == "chance" and data.start[-1] == len(data.caption)
    for episode in range(4):
        length = data.length(episode)
        whole = data.segment(episode, 0, length)
        assert len(whole.action) == length and len(whole.captions) == length + 1
        assert whole.captions == envs.captions({"image": whole.obs["image"]})
    again = Recorder()  # through a checkpoint
    first = Recorder()
    vec = envs.make_vec(GRID, 3, max_steps=30)
    rng = np.random.default_rng(0)
    first.play(vec, lambda obs: rng.integers(7, size=3), 4, 1, envs.captions)
    again.load_state_dict(first.state_dict())
    again.save(small.parent / "again", GRID, WORDS, by="chance")
    assert (small.parent / "again" / "arrays.npz").read_bytes() == (small / "arrays.npz").read_bytes()


def test_histories_of_a_dataset(small):
    data = Dataset(small)
    count = len(data.caption)
    all_of_it = data.histories(10_000, 3)
    assert len(all_of_it.step) == count
    start, late = 0, data.length(0)  # the first and the last moment of the first episode
    assert all_of_it.action[start].tolist() == [6, 6, 6] and all_of_it.step[start] == 0
    assert torch.equal(all_of_it.obs["image"][start][0], all_of_it.obs["image"][start][3])
    whole = data.segment(0, late - 3, 3)
    assert all_of_it.action[late].tolist() == whole.action.tolist() and all_of_it.step[late] == late
    assert np.array_equal(all_of_it.obs["image"][late].numpy(), whole.obs["image"])
    assert all_of_it.action[late + 1].tolist() == [6, 6, 6] and all_of_it.step[late + 1] == 0  # of the next


def test_text_of_a_segment():
    text = text_of(segment("You see nothing in front.", "You see a wall 1 step left", actions=[1]), WORDS)
    assert text == "You see nothing in front. You turn right. Now: You see a wall 1 step left."
    assert text_of(segment("A", "B", "C", actions=[2, 6]), WORDS) == (
        "Step by step:\n1. A. You move forward.\n2. B. You do nothing.\nNow: C.")


# what is refused

def test_files_that_cannot_be_used(small, tmp_path):
    def load(spec, env_id=GRID):
        return potentials.load(spec, env_id, envs.clauses, WORDS)
    with pytest.raises(KnowledgeError, match="known are code, pref, goals, near, target, none"):
        load("nearly")
    (tmp_path / "mine.py").write_text("def potential(history):\n    return history.step.float()\n\n"
                                      "def other(history):\n    return 3\n")
    assert load(f"{tmp_path}/mine.py")(Dataset(small).histories(5, 2)).shape == (5,)
    with pytest.raises(KnowledgeError, match="defines no function 'thing'"):
        load(f"{tmp_path}/mine.py:thing")
    with pytest.raises(KnowledgeError, match="returns int"):
        load(f"{tmp_path}/mine.py:other")(Dataset(small).histories(5, 2))
    with pytest.raises(KnowledgeError, match="there is no file"):
        load("llm:missing.py")
    (tmp_path / "evil.py").write_text("import os\n\ndef compute_reward(a, b, c):\n    return 0, {}\n")
    with pytest.raises(KnowledgeError, match="import of os is not allowed"):
        load(f"llm:{tmp_path}/evil.py")
    (tmp_path / "bad.pt").write_bytes(b"no")
    with pytest.raises(KnowledgeError, match="no preference model"):
        load(f"pref:{tmp_path}/bad.pt")
    sound = {"env": GRID, "goals": ["go"], "library": [{"text": "x", "goals": [0]}]}
    for change in ({"goals": []}, {"goals": ["go", 3]}, {"goals": "go"}, {"library": []}, {"library": [{"goals": [0]}]},
                   {"library": [{"text": 3, "goals": [0]}]}, {"library": [{"text": "", "goals": [0]}]},
                   {"library": [{"text": "x", "goals": [1]}]}, {"library": [{"text": "x", "goals": ["0"]}]},
                   {"library": {"text": "x"}}, {"env": 3}, {"env": None}):
        (tmp_path / "bad.json").write_text(json.dumps(sound | change))
        with pytest.raises(KnowledgeError, match="no library of goals"):
            load(f"goals:{tmp_path}/bad.json")
    with pytest.raises(KnowledgeError, match="no dataset"):
        Dataset(tmp_path)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for name in ("arrays.npz", "captions.json", "meta.json"):
        (damaged / name).write_bytes((small / name).read_bytes())
    (damaged / "arrays.npz").write_bytes((small / "arrays.npz").read_bytes() + b"x")
    with pytest.raises(KnowledgeError, match="not the one"):
        Dataset(damaged)


def test_labelling_from_the_recordings(tmp_path):
    """The shipped potentials are what the commands make of the shipped answers."""
    for family, env in (("minigrid", GRID), ("crafter", "Crafter-Text-Reward")):
        made = label_code.main(label_code.Args(env=env, out=str(tmp_path / f"code-{family}")))
        assert made.read_text() == (potentials.SHIPPED / f"{family}.py").read_text()
        made = label_goals.main(label_goals.Args(env=env, out=str(tmp_path / f"goals-{family}.json")))
        saved = json.loads(made.read_text())
        shipped = json.loads((potentials.SHIPPED / f"{family}.json").read_text())
        assert saved["library"] == shipped["library"] and saved["source"] == "handwritten"


def test_preferences_from_rules_to_a_potential(small, tmp_path):
    labels = label_preferences.main(label_preferences.Args(dataset=str(small), env=GRID, pairs=60,
                                                           out=str(tmp_path / "labels.jsonl")))
    assert json.loads(labels.read_text().splitlines()[0])["source"] == "rules"
    made = train_preferences.main(train_preferences.Args(labels=str(labels), dataset=str(small), epochs=1))
    potential = potentials.load(f"pref:{made}", GRID, envs.clauses, WORDS)
    assert torch.isfinite(potential(Dataset(small).histories(20, 5))).all()
    with pytest.raises(UserError, match=f"add --env {GRID}"):
        label_preferences.main(label_preferences.Args(dataset=str(small), env="Crafter-Text-Reward"))
    with pytest.raises(UserError, match="another dataset"):
        train_preferences.main(train_preferences.Args(labels=str(labels)))


def test_the_cost_of_a_chain_of_questions_is_said_and_bounded(server, small, tmp_path, capsys):  # noqa: F811
    """Each question holds the answers before it, so that only the number of questions is known."""
    flags = dict(mode="record", model="m", base_url=server.url, dataset=str(small), env=GRID, out=str(tmp_path / "out"))
    with pytest.raises(UserError, match="500 calls are more than --max-calls 100"):
        label_goals.main(label_goals.Args(**flags, recordings=str(tmp_path / "goals.jsonl")))
    assert server.requests == []
    server.script = ["- go to a ball", "- turn", "- stop", "- wait"]
    for situations, said in ((2, "2 questions, 2 calls"), (4, "2 questions, 2 calls"), (4, "")):
        capsys.readouterr()
        label_goals.main(label_goals.Args(**flags, recordings=str(tmp_path / "goals.jsonl"), situations=situations))
        lines = [line for line in capsys.readouterr().err.splitlines() if "calls to m" in line]
        assert [line.partition(" to m")[0] for line in lines] == [said] * bool(said)
    assert len(server.requests) == 4


def test_a_chain_that_stopped_in_a_repair_is_bounded_too(server, small, tmp_path, capsys):  # noqa: F811
    """The line about the one question that is missing there does not stand for the line about the rest."""
    flags = dict(mode="record", model="m", base_url=server.url, dataset=str(small), env=GRID, out=str(tmp_path / "out"),
                 recordings=str(tmp_path / "goals.jsonl"))
    server.script = ["no list", (404, {}, "not today"), "- go to a ball"]
    with pytest.raises(UserError, match="not today"):
        label_goals.main(label_goals.Args(**flags, situations=2))
    capsys.readouterr()
    with pytest.raises(UserError, match="499 calls are more than --max-calls 100"):
        label_goals.main(label_goals.Args(**flags))
    lines = [line for line in capsys.readouterr().err.splitlines() if "calls to m" in line]
    assert [line.partition(" calls")[0] for line in lines] == ["1 questions, 1", "499 questions, 499"]
    assert len(server.requests) == 3


def test_code_is_not_blamed_for_a_machine_without_seccomp(server, tmp_path, monkeypatch):  # noqa: F811
    """One question is asked, not 15; what ships was read by a person, and is replayed all the same."""
    monkeypatch.setattr(sandbox, "ROOT", without_seccomp(tmp_path))
    monkeypatch.delenv("ALLOW_GENERATED_CODE", raising=False)
    server.script = ["```python\ndef compute_reward(obs, past_obs, past_actions):\n    return 1.0, {}\n```"] * 2
    flags = dict(mode="record", model="m", base_url=server.url, recordings=str(tmp_path / "r.jsonl"))
    with pytest.raises(sandbox.SandboxUnavailable, match="ALLOW_GENERATED_CODE=1"):
        label_code.main(label_code.Args(**flags, out=str(tmp_path / "none")))
    assert len(server.requests) == 1 and not (tmp_path / "none").exists()
    for env in (GRID, "Crafter-Text-Reward"):
        label_code.main(label_code.Args(env=env, out=str(tmp_path / "shipped")))


RECORD = "--mode record --model m --base-url http://127.0.0.1:1/v1"


@pytest.mark.parametrize("command, words, said", [
    (label_preferences, "--pairs 0", "--pairs is 0; it has to be at least 1"),
    (label_preferences, "--pairs -1", "--pairs is -1"), (label_preferences, "--seed -1", "--seed is -1"),
    (label_preferences, "--steps 1000", "no episode of the dataset has 1000 steps, the longest has"),
    (label_preferences, "--pairs 1 --out FOLDER/text.md/labels.jsonl", "text.md"),
    (label_preferences, "--pairs 1 --annotator model --by-hand FOLDER/bytes", "bytes cannot be read"),
    (label_goals, "--by-hand FOLDER/none.md", "none.md cannot be read"), (label_goals, "--situations 0", "is 0"),
    (label_goals, "--by-hand FOLDER/empty.md --recordings FOLDER/new.jsonl", "empty.md has too few answers"),
    (label_goals, "--by-hand FOLDER/text.md --model m", "needs --model handwritten"),
    (label_goals, f"{RECORD} --recordings FOLDER/text.md/r.jsonl", "text.md/r.jsonl cannot be written"),
    (label_goals, "--mode record --model m --base-url http://[::1/v1", "http://[::1/v1 is no address"),
    (label_code, "--seed -1", "--seed is -1"), (label_code, "--iterations 0", "--iterations is 0"),
    (train_preferences, "", "--labels '' does not exist"),
    (train_preferences, "--labels FOLDER/none.jsonl", "none.jsonl' does not exist"),
    *((train_preferences, f"--labels FOLDER/without-{name}", "is no file of knowledge.label_preferences")
      for name in ("steps", "dataset", "source", "env")),
    *((train_preferences, f"--labels FOLDER/labels {flag}", said) for flag, said in (
        ("--epochs 0", "--epochs is 0"), ("--batch-size 0", "--batch-size is 0"),
        ("--validation 1", "--validation is 1.0"), ("--validation nan", "--validation is nan"),
        ("--size Paper", "Paper"),
        ("--epochs 1 --out FOLDER/text.md/model.pt", "text.md")))])
def test_command_fails_in_one_line(command, words, said, small, tmp_path, monkeypatch, capsys):
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    (tmp_path / "empty.md").write_text("\n===\n\n")
    (tmp_path / "text.md").write_text("- go to a ball")
    meta = {"env": GRID, "dataset": Dataset(small).hash, "steps": 2, "source": "rules"}
    rows = [json.dumps({"a": [0, 0], "b": [1, 0], "label": k % 2}) for k in range(30)]
    for name in ("", *meta):
        left = {key: value for key, value in meta.items() if key != name}
        file = tmp_path / (f"without-{name}" if name else "labels")
        file.write_text("\n".join([json.dumps(left), *rows]) + "\n")
    place = ["--dataset", str(small)] if command is train_preferences else ["--dataset", str(small), "--env", GRID]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["command", *place, *words.replace("FOLDER", str(tmp_path)).split()])
    with pytest.raises(SystemExit) as stopped:
        client.command(command.main, command.Args, command.__doc__)
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and said in err and "Traceback" not in err
    assert err.splitlines()[-1].startswith("error: ") or "--size" in words  # which tyro refuses, in a frame


@pytest.mark.parametrize("family", ["minigrid", "crafter"])
def test_shipped_models_tell_which_of_two_pieces_a_rule_prefers(family):
    data = Dataset(dataset.SHIPPED / family)
    model = preferences.load(potentials.SHIPPED / f"{family}.pt").model
    rng = np.random.default_rng(7)  # pairs that it was not trained on
    right = decided = 0
    for _ in range(150):
        a, b = data.draw(rng, 5), data.draw(rng, 5)
        label = annotator.prefer(a, b)
        if label != 0.5:
            places = [[segment.episode, segment.start] for segment in (a, b)]
            with torch.no_grad():
                scores = model(train_preferences.tensors_of(data, places, 5))
            right, decided = right + (scores.argmax().item() == label), decided + 1
    assert right / decided > 0.7
