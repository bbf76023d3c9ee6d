"""State representation learning against hand numbers, and what other scripts make of an encoder."""
import json
import math

import numpy as np
import pytest
import torch

import envs
import runtime
from algos import ppo, ppo_pixels, srl
from tests.test_ppo import Bandit

SMALL = dict(frames=400, episode_steps=20, video=0, eval_every=0, checkpoint_every=0, device="cpu")


def column(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float32).unsqueeze(1)


def test_losses():
    picture = torch.full((2, 64, 64, 3), 255, dtype=torch.uint8)
    assert srl.reconstruction(torch.full((2, 3, 64, 64), 0.5), picture).item() == 0.25
    picture[..., 0] = 51  # red 0.2
    decoded = torch.tensor([0.2, 1.0, 0.7]).view(1, 3, 1, 1).expand(2, 3, 64, 64)  # channels first
    assert srl.reconstruction(decoded, picture).item() == pytest.approx(0.03)
    assert srl.kl(torch.ones(3, 4), torch.zeros(3, 4)).item() == 2.0
    assert srl.kl(torch.zeros(3, 1), torch.full((3, 1), math.log(4))).item() == pytest.approx(1.5 - math.log(2))
    assert srl.inverse(torch.zeros(3, 4), torch.tensor([0, 3, 1])).item() == pytest.approx(math.log(4))
    assert srl.forward(column(1, 0), column(1, 0), column(3, 1)).item() == 1.0  # mean of 1 and 1
    logits = torch.tensor([[2.0, 0.0]]).expand(3, 2)
    expected = (2 * math.log1p(math.exp(-2)) + math.log1p(math.exp(2))) / 3  # rewards -1 and 0 are one class
    assert srl.reward(logits, torch.tensor([-1.0, 0.0, 1.0])).item() == pytest.approx(expected)


def test_priors():
    """Three transitions of lengths 1, 0, 2; only the first two have equal actions, and their rewards differ."""
    code, next_code = column(0, 1, 0), column(1, 1, 2)
    action, rewards = torch.tensor([0, 0, 1]), torch.tensor([0.0, 1.0, 0.0])
    near = math.exp(-1)
    assert srl.priors(code, next_code, action, rewards).tolist() == pytest.approx([5 / 3, 1, near, near])
    assert srl.priors(code, next_code, action, 0 * rewards).tolist() == pytest.approx([5 / 3, 1, 0, near])
    assert srl.priors(code, next_code, torch.arange(3), rewards).tolist() == pytest.approx([5 / 3, 0, 0, 0])
    code.requires_grad_()
    srl.priors(code, code, action, rewards).sum().backward()  # lengths of 0 have a gradient
    assert code.grad.isfinite().all()


def test_measures():
    torch.manual_seed(0)
    code, held = torch.randn(100, 3), torch.randn(50, 3)
    weights = torch.randn(3, 2, dtype=torch.float64)
    truth, held_truth = code.double() @ weights + 1, held.double() @ weights + 1
    assert srl.probe_r2(code, truth, held, held_truth).tolist() == pytest.approx([1, 1])
    # a constant code tells the mean, here 1, of truths that are 0 and 2 with a mean of 1, or are all above it
    nothing, truth = torch.zeros(2, 1), torch.tensor([[0.0], [2.0]], dtype=torch.float64)
    assert srl.probe_r2(nothing, truth, nothing, truth).tolist() == pytest.approx([0])
    assert srl.probe_r2(nothing, truth, nothing, truth + 1).tolist() == pytest.approx([-1])
    places = torch.arange(10.0).unsqueeze(1)
    assert srl.knn_mse(places, places, torch.tensor([[5.0]]), torch.tensor([[5.0]])) == 2  # of 3 to 7: 4, 1, 0, 1, 4
    assert srl.knn_mse(-places, places, torch.tensor([[-2.0]]), torch.tensor([[3.0]])) == 3  # 0 to 4: 9, 4, 1, 0, 1


def test_each_loss_alone_moves_the_encoder():
    torch.manual_seed(0)
    batch = srl.Batch(*torch.randint(0, 256, (2, 8, 64, 64, 3), dtype=torch.uint8), torch.arange(8) % 4,
                      torch.arange(8.0) % 2)
    for name in srl.LOSSES:
        model = srl.Model([name], 4, 4)
        loss, scalars = srl.srl_loss(model, batch, srl.Args(losses=name, inverse_weight=2.0))
        loss.backward()
        assert scalars.keys() == {"loss", f"{name}_loss"} and model.encoder[0].weight.grad.abs().sum() > 0
        assert loss.item() == pytest.approx(scalars[f"{name}_loss"].item() * (2 if name == "inverse" else 1))


def test_split_codes_have_a_part_for_each_loss():
    """A loss moves its own numbers of the code, and what it computes does not change with the others."""
    torch.manual_seed(0)
    batch = srl.Batch(*torch.randint(0, 256, (2, 8, 64, 64, 3), dtype=torch.uint8), torch.arange(8) % 4,
                      torch.arange(8.0) % 2)
    losses = ["vae", "inverse", "forward", "reward", "priors"]
    model = srl.Model(losses, 12, 4, split=True)
    assert model.masks.sum(0).tolist() == [1.0] * 12 and model.masks.sum(1).tolist() == [3.0, 2.0, 3.0, 2.0, 2.0]
    assert srl.Model(losses, 12, 4).masks.eq(1).all()
    whole = {}
    for name in losses:
        own = model.masks[losses.index(name)].bool()
        model.zero_grad()
        torch.manual_seed(1)
        whole[name] = srl.srl_loss(model, batch, srl.Args())[1][f"{name}_loss"]
        whole[name].backward()
        moved = model.encoder[-1].weight.grad[:12].abs().sum(1) > 0  # (12,), of the means
        assert moved.equal(own)
    with torch.no_grad():
        model.encoder[-1].weight[:3] += 1  # the part of the VAE
        torch.manual_seed(1)
        scalars = srl.srl_loss(model, batch, srl.Args())[1]
    assert [name for name in losses if scalars[f"{name}_loss"] != whole[name]] == ["vae"]
    code = torch.randn(2, 12)
    assert model.decode(code).equal(model.decode(torch.cat([code[:, :3], torch.zeros(2, 9)], 1)))


def test_the_vae_divides_its_bound_by_pixels():
    torch.manual_seed(0)
    batch = srl.Batch(*torch.randint(0, 256, (2, 4, 64, 64, 3), dtype=torch.uint8), torch.arange(4), torch.zeros(4))
    model = srl.Model(["vae"], 4, 4)
    with torch.no_grad():
        output = model.encoder(torch.cat(batch[:2]))
        both = []
        for beta in (0.0, 3.0):
            torch.manual_seed(1)
            both.append(srl.srl_loss(model, batch, srl.Args(losses="vae", beta=beta))[0])
    expected = 3 * srl.kl(output[:, :4], output[:, 4:]) / (64 * 64 * 3)
    assert (both[1] - both[0]).item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "runs" / "srl" / "a"
    srl.main(srl.Args(run_dir=str(folder), total_timesteps=1280, learning_rate=3e-3, **SMALL | {"video": 3}))
    return folder


@pytest.mark.slow
def test_an_autoencoder_learns(trained):
    rows = [line.split(",") for line in (trained / "scalars.csv").read_text().splitlines()]
    errors = [float(value) for _, _, name, value in rows if name == "reconstruction"]
    assert errors[-1] < 0.7 * errors[0]  # at the start it decodes to the mean of all pictures
    assert {"probe_r2/x", "probe_r2/y", "knn_mse"} <= {row[2] for row in rows}
    assert (trained / "video" / "decoded.png").is_file()


@pytest.mark.exports
def test_ppo_on_a_run(trained, monkeypatch, tmp_path, capsys):
    """Codes have mean 0 and deviation 1; training leaves the encoder as it is, a checkpoint has it, and another run of
    the same losses that came later, with codes of another size, does not take its place."""
    monkeypatch.chdir(trained.parents[2])
    vec = envs.make_vec("MobileRobot-v0:autoencoder", 4, seed=1)
    frames = envs.collect_frames(envs.make_vec("MobileRobot-v0:pixels", 10), 400, 20, 18_000)  # those of the run
    code = vec.encoder(frames.picture[frames.episode < 16])
    assert code.mean(0) == pytest.approx(np.zeros(32), abs=1e-2) and code.std(0) == pytest.approx(np.ones(32), abs=0.1)
    before = {name: x.clone() for name, x in vec.encoder.state_dict().items()}
    run = tmp_path / "ppo"
    short = dict(num_steps=32, batch_size=32, num_envs=4, eval_episodes=4, eval_every=0)
    result = ppo.main(ppo.Args(env="MobileRobot-v0:autoencoder", total_timesteps=256, run_dir=str(run), **short))
    assert all(torch.equal(x, before[name]) for name, x in vec.encoder.state_dict().items())
    saved = torch.load(run / "checkpoint.pt", weights_only=True)["vec"]["encoder"]
    assert saved.keys() == before.keys() and all(torch.equal(x, before[name]) for name, x in saved.items())
    assert json.loads((run / "config.json").read_text())["env_id"] == "MobileRobot-v0"
    later = trained.with_name("b")
    srl.main(srl.Args(run_dir=str(later), seed=2, total_timesteps=64, code=8, **SMALL))
    envs.encoders._newest.clear()  # as another process
    assert envs.make_vec("MobileRobot-v0:autoencoder", 1).encoder.size == 8
    assert "MobileRobot-v0:autoencoder takes the encoder of runs/srl/b" in capsys.readouterr().err
    args = runtime.cli(ppo.Args, "ppo", ["--evaluate", str(run)])
    assert ppo.main(args) == pytest.approx(result, nan_ok=True)
    assert "MobileRobot-v0:run:runs/srl/a after 256 steps" in capsys.readouterr().out
    ppo.main(runtime.cli(ppo.Args, "ppo", ["--resume", str(run), "--total-timesteps", "384"]))


def test_a_task_that_does_not_tell_its_state(tmp_path):
    """Its eval.csv has minus the loss on held-out episodes."""
    result = srl.main(srl.Args(env="MobileRobot-v0:action_repeat=2", losses="vae", total_timesteps=640,
                               run_dir=str(tmp_path / "run"), **SMALL))
    rows = [line.split(",") for line in (tmp_path / "run" / "eval.csv").read_text().splitlines()[1:]]
    assert float(rows[0][3]) < float(rows[-1][3]) < 0 and float(rows[-1][3]) == pytest.approx(result["return_mean"])


def test_losses_are_known_to_environments():
    assert envs.encoders.LOSSES == set(srl.LOSSES)


@pytest.mark.parametrize("flags, words", [
    (dict(losses="dae"), "'dae' is unknown; known are autoencoder"), (dict(losses="autoencoder,vae"), "twice"),
    (dict(split=True), "among 1 losses"), (dict(losses="vae,inverse,forward", split=True, code=2), "2 numbers"),
    (dict(losses="inverse,inverse"), "twice"), (dict(env="CartPole-v1"), "others are for pictures"),
    (dict(env="MobileRobotContinuous-v0"), "discrete ones are needed"),
    (dict(env="MobileRobot-v0:frame_stack=2"), "pictures of 64 x 64 x 3"),
    (dict(env="MobileRobot-v0:pca"), "pictures of 64 x 64 x 3")])
def test_what_cannot_be_learned_from(flags, words, tmp_path):
    with pytest.raises(runtime.UserError, match=words):
        srl.main(srl.Args(run_dir=str(tmp_path / "run"), **SMALL | flags))
    assert not (tmp_path / "run").exists()


# ppo_pixels

def test_pictures_are_divided_once():
    """White pictures are ones: each unit of the first layer is the sum of its weights. Any number of channels."""
    torch.manual_seed(0)
    encoder = ppo_pixels.PixelEncoder((64, 64, 6))
    assert encoder[5].weight.shape == (128, 32 * 6 * 6) and not encoder[0].bias.any()
    assert torch.allclose(encoder[0].weight.flatten(1) @ encoder[0].weight.flatten(1).T, 2 * torch.eye(16), atol=1e-4)
    seen = []
    encoder[0].register_forward_hook(lambda module, inputs, output: seen.append(output))
    assert encoder(torch.full((2, 64, 64, 6), 255, dtype=torch.uint8)).shape == (2, 128)
    assert torch.allclose(seen[0], encoder[0].weight.sum((1, 2, 3)).view(1, 16, 1, 1).expand(2, 16, 15, 15), atol=1e-4)


def test_ppo_learns_from_pictures():
    torch.manual_seed(0)
    args, task, agent = ppo_pixels.Args(num_steps=32, batch_size=64), Bandit(), ppo_pixels.Agent((20, 20, 1), 4)
    optimizer = torch.optim.Adam(agent.parameters(), lr=3e-3)
    loop = {"obs": torch.from_numpy(task.state), "open_return": torch.zeros(4, dtype=torch.float64)}

    def look(obs):
        return (255 * obs).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 20, 20, 1)  # black or white
    for _ in range(15):
        rollout = ppo_pixels.collect(agent, task, look, loop, runtime.Means(), args)
        for index in torch.randperm(len(rollout.action)).repeat(args.epochs).split(args.batch_size):
            batch = ppo_pixels.tree_map(lambda x: x[index], rollout)
            ppo_pixels.update(agent, optimizer, ppo_pixels.ppo_loss, batch, args)
    with torch.no_grad():
        p = agent(look(torch.tensor([[0.0], [1.0]]))).log_probs.exp()
    assert p[0, 0] > 0.9 and p[1, 1] > 0.9
