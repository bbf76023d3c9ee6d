"""The mobile robot against hand numbers; pictures, stacked frames, repeated actions and encoders around it."""
import json

import gymnasium as gym
import numpy as np
import pytest
import torch

import envs
from envs import encoders, mobile
from runtime import save_policy, to_plain

X_MINUS, X_PLUS, Y_MINUS, Y_PLUS = range(4)


def placed(env_id, *place, **kwargs):
    """Environments of one copy each with the robot at `place` m."""
    vec = envs.make_vec(env_id, 1, seed=1, **kwargs)
    vec.world.position[0] = place
    return vec


def step(vec, action):
    obs, reward, terminated, truncated, _ = vec.step(np.array([action]))
    assert not terminated[0]
    return vec.world.position[0].tolist(), reward[0], obs[0]


def test_steps_and_rewards():
    assert step(vec := placed("MobileRobot-v0", 3.5, 1.0), X_PLUS)[:2] == ([3.5, 1.0], -1)  # refused
    place, reward, obs = step(placed("MobileRobot-v0", 3.3, 3.0), X_PLUS)
    assert place == pytest.approx([3.4, 3.0]) and reward == 1 and obs == pytest.approx([-0.2, 0.0], abs=1e-6)
    vec = placed("MobileRobot-v0", 3.25, 2.75)
    place, reward, _ = step(vec, Y_MINUS)
    assert place == pytest.approx([3.25, 2.65]) and reward == 0
    assert vec.world.distance()[0] == pytest.approx(0.4949, abs=1e-4)
    assert step(placed("MobileRobot-v0", 3.575 - 1e-9, 3.0), X_PLUS)[1] == -1  # at the target, but it bumped
    assert step(placed("MobileRobotContinuous-v0", 2.0, 2.0), [2.0, -3.0])[0] == pytest.approx([2.1, 1.9])  # clipped
    assert step(placed("MobileRobotShaped-v0", 3.5, 1.0), X_PLUS)[1] == pytest.approx(-np.hypot(0.1, 2.0))  # no -1
    assert step(placed("MobileRobotContinuous-v0", 3.5, 3.0), [1.0, 1.0])[:2] == ([3.5, 3.0], -1)  # both stay


def test_the_other_tasks():
    vec = placed("MobileRobot1D-v0", 3.15, 0.0)
    assert vec.action_space.n == 2 and vec.observation_space.shape == (1,)
    assert step(vec, X_PLUS)[1:] == (1, pytest.approx([-0.35]))
    vec = placed("MobileRobot2Target-v0", 3.15, 3.0)
    _, reward, obs = step(vec, X_PLUS)
    assert reward == 1 and obs == pytest.approx([3.25 - 0.4, 0.0], abs=1e-6)  # the way from the second target
    assert step(vec, X_PLUS)[1] == 0
    vec = placed("MobileRobot2TargetShaped-v0", 3.15, 3.0)
    assert step(vec, X_PLUS)[1] == pytest.approx(-0.35)  # to the target before the switch
    place, reward, obs = step(placed("MobileRobotLineTarget-v0", 3.25, 0.5), X_PLUS)
    assert reward == 1 and obs == pytest.approx([-0.05, -1.5])
    assert step(placed("MobileRobotLineTarget-v0", 3.15, 0.5), X_PLUS)[1] == 0
    assert step(placed("MobileRobotLineTargetShaped-v0", 3.05, 0.5), X_PLUS)[1] == pytest.approx(-0.25)
    assert len(mobile.IDS) == 24 == len(set(mobile.IDS))


@pytest.mark.parametrize("fast", [True, False])
def test_an_episode_has_251_steps(fast):
    vec = envs.make_vec("MobileRobot-v0", 2, seed=1, fast=fast)
    for k in range(1, 252):
        _, _, terminated, truncated, info = vec.step(np.array([X_MINUS, X_PLUS]))
        assert not terminated.any() and truncated.tolist() == [k == 251] * 2


def test_starts_and_targets():
    vec = envs.make_vec("MobileRobot2TargetRandomTarget-v0", 100, seed=1)
    starts, targets = [], []
    for _ in range(100):
        vec.reset()
        starts.append(vec.world.position.copy())
        targets.append(vec.world.targets.copy())
    starts, targets = np.concatenate(starts), np.concatenate(targets)
    assert 0.6667 - 1e-4 <= starts.min() < 0.67 and 3.33 < starts.max() <= 3.3333 + 1e-4
    assert 0.4 <= targets.min() < 0.401 and 3.599 < targets.max() <= 3.6
    fixed = envs.make_vec("MobileRobot2Target-v0", 1, seed=1)
    assert fixed.world.targets[0].tolist() == [[3.6, 3.0], [0.4, 3.0]]


def play(vec, steps, seed=0):
    """What random actions give."""
    rng, space, rows = np.random.default_rng(seed), vec.action_space, []
    for _ in range(steps):
        action = (rng.integers(space.n, size=vec.num_envs) if isinstance(space, gym.spaces.Discrete)
                  else rng.uniform(-1.5, 1.5, (vec.num_envs, 2)).astype(np.float32))
        obs, reward, terminated, truncated, info = vec.step(action)
        rows.append((obs, reward, terminated, truncated, info["final_obs"], info["success"]))
    return rows


def same(one, other):
    return all(np.array_equal(x, y, equal_nan=x.dtype.kind == "f")
               for a, b in zip(one, other, strict=True) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("env_id", ["MobileRobotRandomTarget-v0", "MobileRobot1D-v0", "MobileRobot2Target-v0",
                                    "MobileRobotLineTargetRandomTargetContinuousShaped-v0", "MobileRobot-v0:pixels"])
def test_many_are_single_ones_bit_by_bit(env_id):
    fast, plain = (envs.make_vec(env_id, 3, seed=7, fast=fast) for fast in (True, False))
    assert type(fast) is not type(plain)
    assert same(play(fast, 260), play(plain, 260))


VIEWS = ["MobileRobotRandomTarget-v0", "MobileRobot2Target-v0:pixels", "MobileRobot-v0:pixels:frame_stack=3",
         "MobileRobot-v0:pca:frame_stack=2", "MobileRobot-v0:action_repeat=4", "CartPole-v1:frame_stack=2",
         "CartPole-v1:action_repeat=3"]


@pytest.mark.parametrize("env_id", VIEWS)
def test_snapshots_go_on_exactly(env_id, tmp_path):
    first, other, again = (envs.make_vec(env_id, 2, seed=seed) for seed in (3, 99, 3))
    assert same(play(first, 40), play(again, 40))  # the same seed, the same bits
    play(other, 5)
    torch.save(to_plain(envs.snapshot(first)), tmp_path / "snap.pt")
    envs.restore(other, torch.load(tmp_path / "snap.pt", weights_only=True))
    assert same(play(first, 240), play(other, 240))  # passes the time limit


def test_success_is_ten_steps_at_the_target():
    vec = placed("MobileRobot-v0", 3.4, 3.0)
    successes = [vec.step(np.array([Y_MINUS if k % 2 else Y_PLUS]))[4]["success"][0] for k in range(12)]
    assert successes == [0.0] * 9 + [1.0] * 3
    vec.world.position[0] = 3.55, 3.0
    assert vec.step(np.array([X_PLUS]))[4]["success"][0] == 0  # a bump


def test_pictures():
    world = mobile.World("", 1, pixels=True)
    rows, columns = np.mgrid[:64, :64] + 0.5
    for place in ((1.0, 3.3), (2.0, 2.0), (3.575, 0.9)):
        world.position[0] = place
        picture = world.observe()[0]
        robot = (picture == mobile.ROBOT).all(2)
        middle = rows[robot].mean(), columns[robot].mean()
        assert middle == pytest.approx([32 + (v - 2) * 64 / 5.081 for v in place], abs=1.0)
        assert robot.sum() == pytest.approx(0.65 * 0.2 * (64 / 5.081) ** 2, rel=0.35)
        assert (picture[mobile_pixel(3.6, 3.0)] == (255, 255, 0)).all()
    for (x, y), colour in (((2, 0), (204, 0, 0)), ((2, 4), (0, 204, 0)), ((0, 2), (0, 0, 204)), ((4, 2), (0, 0, 0))):
        assert (picture[mobile_pixel(x, y)] == colour).all()
    world.position[0] = 3.5, 3.0
    assert (world.observe()[0][mobile_pixel(3.6, 3.0)] == mobile.ROBOT).all()  # which hides its target
    large = envs.make("MobileRobotLineTarget-v0", render_mode="rgb_array")
    large.reset(seed=1)
    frame = large.render()
    assert frame.shape == (224, 224, 3) and (frame[int(112 + 1.6 * 224 / 5.081), 30:200] == (255, 255, 0)).all(1).any()


def mobile_pixel(x, y):
    return int(32 + (x - 2) * 64 / 5.081), int(32 + (y - 2) * 64 / 5.081)


def test_an_oracle_gets_what_was_measured():
    """Straight to a place within reach of the target, then to and fro along y: 232 +- 2 over 100 starts."""
    vec = envs.make_vec("MobileRobot-v0", 100)
    goal = np.array([3.6, 3.0]).clip([0.53, 0.31], [3.47, 3.69])

    def act(obs):
        gap = goal - vec.world.position
        along_x = np.abs(gap[:, 0]) >= np.abs(gap[:, 1])
        toward = np.where(along_x, np.where(gap[:, 0] < 0, X_MINUS, X_PLUS), np.where(gap[:, 1] < 0, Y_MINUS, Y_PLUS))
        there = np.abs(gap).max(1) < 0.1
        return np.where(there, np.where(gap[:, 1] < 0, Y_MINUS, Y_PLUS), toward)
    result = envs.evaluate(act, vec, 100, seed=1)
    assert result["return_mean"] == pytest.approx(232, abs=2) and result["success_rate"] == 1


# frames and actions

def test_stacked_frames():
    """Newest last, zeros before the first; the last observation of an episode keeps those before it."""
    plain, stacked = (envs.make_vec("MobileRobot-v0", 2, **kwargs) for kwargs in ({}, {"frame_stack": 3}))
    first, obs = plain.reset(5), stacked.reset(5)
    assert obs.shape == (2, 6) and np.array_equal(obs, np.concatenate([np.zeros((2, 4)), first], 1))
    seen = [np.zeros((2, 2)), first]
    for k in range(251):
        action = np.array([k % 4, (k + 1) % 4])
        theirs, ours = plain.step(action), stacked.step(action)
        last = theirs[4]["final_obs"]
        assert np.array_equal(ours[4]["final_obs"], np.concatenate([*seen, last], 1).astype(np.float32))
        seen = [seen[1], last]
    assert ours[3].all() and np.array_equal(ours[0], np.concatenate([np.zeros((2, 4)), theirs[0]], 1))
    pictures = envs.make_vec("MobileRobot-v0:pixels:frame_stack=2", 1, seed=1)
    obs = pictures.step(np.array([X_PLUS]))[0]
    assert obs.shape == (1, 64, 64, 6) and obs.dtype == np.uint8 and obs.any((0, 1, 2)).all()


def test_repeated_actions():
    """Rewards are summed, and what is left of an episode is enough: 251 = 62 * 4 + 3."""
    vec = envs.make_vec("MobileRobotShaped-v0:action_repeat=4", 1, seed=1)
    env = vec.envs[0].unwrapped
    assert vec.max_episode_steps == 63
    env.world.position[0] = 2.0, 3.0
    assert vec.step(np.array([X_PLUS]))[1][0] == pytest.approx(-1.5 - 1.4 - 1.3 - 1.2)
    ends = [vec.step(np.array([X_PLUS]))[3][0] for _ in range(62)]
    assert ends == [False] * 61 + [True]
    with pytest.raises(envs.EnvError, match="takes no action_repeat"):
        envs.make_vec("MiniGrid-Empty-5x5-v0:action_repeat=2", 1)
    with pytest.raises(envs.EnvError, match="rewards for hindsight goals are those of one step"):
        envs.features.time_limit_of(envs.make_vec("FetchReach-v2:action_repeat=2", 1))


# encoders

def test_words_behind_an_id():
    assert envs.ids.split_view("MobileRobot-v0") == ("MobileRobot-v0", {})
    assert envs.ids.split_view("tests.tasks:PointDense-v0") == ("tests.tasks:PointDense-v0", {})
    assert envs.ids.split_view("tests.tasks:PointDense-v0:frame_stack=4") == (
        "tests.tasks:PointDense-v0", {"frame_stack": 4})
    assert envs.ids.split_view("MobileRobot-v0:action_repeat=2:run:runs/srl/X-v0:a=b") == (
        "MobileRobot-v0", {"action_repeat": 2, "encoder": "run:runs/srl/X-v0:a=b"})
    assert envs.resolve("MobileRobot-v0:pca") == "MobileRobot-v0"
    for env_id, words in (("MobileRobot-v0:pca:random", "two of encoder"), ("MobileRobot-v0:x=2", "makes no sense"),
                          ("MobileRobot-v0:frame_stack=0", "makes no sense"), ("CartPole-v1:pca", "for pictures"),
                          ("MobileRobot-v0:PCA", "'PCA' behind .* makes no sense"), ("MobileRobot-v0:frame_stack", "frame_stack=4"),
                          ("MobileRobot-v0:vae", "python algos/srl.py --env MobileRobot-v0 --losses vae"),
                          ("MobileRobot-v0:run:nowhere", "has no encoder.pt2"), ("MobileRobot2Target-v1", "unknown"),
                          ("MobileRobot-v0:", "ends in a colon"), ("MobileRobot:pca", "mean MobileRobot-v0:pca"),
                          ("MobileRobot-v0:run:nowhere:frame_stack=2", "is the last word")):
        with pytest.raises(envs.EnvError, match=words):
            envs.make_vec(env_id, 1)
    with pytest.raises(envs.EnvError, match="21 x 40 pixels are too small"):
        encoders.make_random(torch.zeros(5, 21, 40, 3, dtype=torch.uint8))
    assert encoders.make_random(torch.zeros(5, 22, 40, 3, dtype=torch.uint8)).size == 32
    with pytest.raises(envs.EnvError, match="leave out what stands behind the id"):
        envs.StreamEnv("MobileRobot-v0:pca")
    with pytest.raises(envs.EnvError, match="MobileRobotContinuous-v0:pca"):
        envs.continuous_sizes(envs.make_vec("MobileRobotContinuous-v0:pixels", 1))
    same_as_plain = envs.make_vec("MobileRobot-v0:ground_truth", 2, seed=3), envs.make_vec("MobileRobot-v0", 2, seed=3)
    assert same(play(same_as_plain[0], 3), play(same_as_plain[1], 3))


@pytest.mark.parametrize("name", ["random", "pca"])
def test_frozen_encoders(name):
    """The same function for every batch, gradients and torch's chance left alone; final_obs is encoded."""
    state = torch.get_rng_state()
    encoders._made.clear()
    vec = envs.make_vec(f"MobileRobot-v0:{name}", 3, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    pictures = envs.make_vec("MobileRobot-v0:pixels", 3, seed=1)
    encoder = vec.encoder
    for _ in range(251):
        action = np.array([X_PLUS, Y_PLUS, Y_MINUS])
        ours, theirs = vec.step(action), pictures.step(action)
    assert ours[3].all() and ours[0].shape == (3, 32) and ours[0].dtype == np.float32
    for code, picture in ((ours[0], theirs[0]), (ours[4]["final_obs"], theirs[4]["final_obs"])):
        one_by_one = np.concatenate([encoder(picture[i:i + 1]) for i in range(3)])
        assert code == pytest.approx(one_by_one, abs=1e-4)
    assert not np.allclose(ours[0], ours[4]["final_obs"])
    assert not any(x.requires_grad for x in map(torch.from_numpy, ours[:1]))
    frames = encoders.collect_frames(pictures, 600, 50, seed=0)
    code = encoder(frames.picture)
    assert np.abs(code.mean(0)).max() < 0.7 and 0.5 < code.std() < 1.5
    encoders._made.clear()
    again = envs.make_vec(f"MobileRobot-v0:{name}", 3).encoder
    assert again is not encoder and np.array_equal(again(frames.picture[:50]), encoder(frames.picture[:50]))


def test_principal_components():
    """On pictures in a plane, codes are uncorrelated, of deviation 1, and span that plane."""
    torch.manual_seed(0)
    basis, weights = torch.rand(40, 16 * 16 * 3), torch.randn(500, 40)
    frames = (128 + 20 * (weights @ basis) / 40).clamp(0, 255).to(torch.uint8).view(500, 16, 16, 3)
    code = torch.from_numpy(encoders.make_pca(frames)(frames.numpy())).double()
    assert torch.allclose(code.mean(0), torch.zeros(32, dtype=torch.float64), atol=1e-3)
    assert torch.allclose(code.T @ code / 500, torch.eye(32, dtype=torch.float64), atol=2e-2)


def test_collected_frames():
    vec = envs.make_vec("MobileRobotRandomTarget-v0:pixels", 5)
    frames = encoders.collect_frames(vec, 90, 10, seed=3)
    assert frames.picture.shape == frames.next_picture.shape == (100, 64, 64, 3) and frames.reward.shape == (100,)
    assert frames.names == ["x", "y", "target1_x", "target1_y"] and frames.truth.shape == (100, 4)
    assert np.unique(frames.episode).tolist() == list(range(10)) and np.bincount(frames.episode).tolist() == [10] * 10
    rows = np.flatnonzero(frames.episode == 7)
    assert np.array_equal(frames.next_picture[rows[:-1]], frames.picture[rows[1:]])
    again = encoders.collect_frames(vec, 90, 10, seed=3)
    assert all(np.array_equal(a, b) for a, b in zip(frames, again))


def saved_encoder(folder, shape=(64, 64, 3), env_id="MobileRobot-v0", losses="autoencoder", colours=3, scale=1 / 255):
    """A run folder with an encoder: the mean of each colour."""
    folder.mkdir(parents=True)
    example = torch.zeros(2, *shape, dtype=torch.uint8)
    save_policy(folder / "encoder.pt2", lambda picture: picture.float().mean((1, 2))[:, :colours] * scale, example)
    (folder / "config.json").write_text(json.dumps({"algo": "srl", "env_id": env_id, "args": {"losses": losses}}))


def test_encoders_of_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    saved_encoder(tmp_path / "runs" / "srl" / "a")
    saved_encoder(tmp_path / "small", shape=(16, 16, 3))
    named, found = (envs.make_vec(f"MobileRobot-v0:{name}", 2, seed=1) for name in ("run:runs/srl/a", "autoencoder"))
    assert "MobileRobot-v0:autoencoder takes the encoder of runs/srl/a" in capsys.readouterr().err
    obs = play(named, 5)[-1][0]
    pictures = play(envs.make_vec("MobileRobot-v0:pixels", 2, seed=1), 5)[-1][0]
    assert obs.shape == (2, 3) and obs == pytest.approx(pictures.mean((1, 2)) / 255, abs=1e-6)
    assert same(play(found, 3), play(envs.make_vec("MobileRobot-v0:autoencoder", 2, seed=1), 3))
    (tmp_path / "small" / "text").mkdir()
    (tmp_path / "small" / "text" / "encoder.pt2").write_text("nothing")
    saved_encoder(tmp_path / "endless", scale=float("nan"))
    for name, words in (("run:endless", "does not give 3 finite numbers"), ("run:small", "encodes 16 x 16 x 3 numbers, and pictures here have 64 x 64 x 3"),
                        ("run:small/text", "damaged or no encoder"), ("vae", "--losses vae")):
        with pytest.raises(envs.EnvError, match=words):
            envs.make_vec(f"MobileRobot-v0:{name}", 1)
    with pytest.raises(envs.EnvError, match="of other sizes"):
        named.encoder.load_state_dict({"x": torch.zeros(1)})


def test_the_newest_run_is_the_one_of_the_start(tmp_path, monkeypatch):
    """A later run changes nothing in a process that has looked before; the order of losses says nothing."""
    monkeypatch.chdir(tmp_path)
    saved_encoder(tmp_path / "runs" / "srl" / "a", losses="inverse,autoencoder")
    (tmp_path / "runs" / "srl" / "b").mkdir()
    for content in ("[]", '{"env_id": "MobileRobot-v0", "args": {"losses": 3}}'):  # others' folders
        (tmp_path / "runs" / "srl" / "b" / "encoder.pt2").write_text("")
        (tmp_path / "runs" / "srl" / "b" / "config.json").write_text(content)
        vec = envs.make_vec("MobileRobot-v0:action_repeat=2:autoencoder,inverse:frame_stack=2", 1)
        assert vec.exact_id == "MobileRobot-v0:frame_stack=2:action_repeat=2:run:runs/srl/a"
    saved_encoder(tmp_path / "runs" / "srl" / "c", losses="autoencoder,inverse", colours=2)
    assert envs.make_vec("MobileRobot-v0:autoencoder,inverse", 1).encoder.size == 3
    assert not hasattr(envs.make_vec("MobileRobot-v0:frame_stack=2", 1), "exact_id")
