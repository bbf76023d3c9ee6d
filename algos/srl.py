"""SRL: state representation learning. Trains an encoder of pictures, on whose codes other scripts then learn.

Raffin et al., "S-RL Toolbox: Environments, Datasets and Evaluation Metrics for State Representation Learning" (arXiv
1809.09369). Random actions give transitions (s, a, r, s'). A network turns pictures s into codes z. It is trained by a
sum of losses, named in --losses:

    autoencoder   mean (s_hat - s)^2, of s and s'
    vae           the same plus beta KL(q(z|s) || N(0, 1)) per pixel (Kingma & Welling, arXiv 1312.6114)
    inverse       which action led from z to z': cross entropy
    forward       mean (z + W(z, a) - z')^2
    reward        whether the reward was positive, from z and z': cross entropy
    priors        temporal coherence, proportionality, causality, repeatability (Jonschkowski & Brock 2015)

Two numbers from held-out episodes measure codes: probe_r2 is the share of the true state's variance that a linear
function of the code explains; knn_mse is the squared distance between the true states of codes that are neighbours.
eval.csv has the mean probe_r2 as its return, or minus the loss where the environment does not tell its true state. The
run exports encoder.pt2.

python algos/srl.py --env MobileRobot-v0 --losses autoencoder,inverse
python algos/ppo.py --env MobileRobot-v0:run:RUN --normalize-advantage --no-clip-values   # RUN: the folder of that run
"""
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import start  # noqa: F401  before numpy

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import envs
import runtime

ALGO = Path(__file__).stem  # names run folders and result tables
LOG_EVERY = 2_000  # transitions
COPIES = 10  # of the environment, in which transitions are collected
NEIGHBOURS = 5  # of knn_mse
LIMIT = 10.0  # the codes of encoder.pt2 are clipped to +-this
LOSSES = ("autoencoder", "vae", "inverse", "forward", "reward", "priors")


@dataclass
class Args:
    """Learn an encoder of pictures."""
    # twin: run arguments
    env: str = "MobileRobot-v0"  # environment id, with discrete actions and pictures of 64 x 64
    seed: int = 1  # seed of all random numbers: network, environments, actions, batches
    total_timesteps: int = 40_000  # transitions learned from, repeated ones included; with --resume: a new total
    eval_every: int = 10_000  # transitions between measurements on held-out episodes; 0: only at start and end
    checkpoint_every: int = 20_000  # transitions between checkpoints; 0: only at the end
    video: int = 8  # held-out pictures to draw, decoded, after training, or with --evaluate
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where the network runs; auto: on a GPU if there is one
    compile: bool = False  # compile the loss: about 30 s at the first start
    run_dir: str = ""  # run folder; empty: runs/<algo>/<env>/seed<k>-<time>
    resume: str = ""  # run folder to continue exactly, with its own arguments
    evaluate: str = ""  # run folder to evaluate; no training
    track: bool = False  # also log scalars to Weights & Biases (pip install wandb)
    # twin end

    # algorithm
    frames: int = 10_000  # transitions collected; a fifth of their episodes is held out
    episode_steps: int = 50  # after these an episode begins anew, because random walks stay near their starts
    batch_size: int = 64  # transitions per update
    learning_rate: float = 1e-3  # Adam, constant

    # method
    losses: str = "autoencoder"  # one or more of autoencoder, vae, inverse, forward, reward, priors
    code: int = 32  # numbers of a code
    split: bool = False  # each loss has a part of the code to itself, of equal size, and sees zeros in the others
    beta: float = 1.0  # weight of the VAE's divergence
    reconstruction_weight: float = 1.0  # of autoencoder or vae in the sum of losses
    inverse_weight: float = 2.0
    forward_weight: float = 1.0
    reward_weight: float = 1.0
    priors_weight: float = 1.0


RANGES = {name: (0, math.inf) for name in ("beta", "reconstruction_weight", "inverse_weight", "forward_weight",
                                           "reward_weight", "priors_weight")}
TUNE = {"learning_rate": (1e-4, 5e-3), "code": [2, 8, 32, 128], "episode_steps": [10, 20, 50, 100]}


class Batch(NamedTuple):
    """Transitions."""
    picture: torch.Tensor  # (B, 64, 64, 3) uint8
    next_picture: torch.Tensor  # (B, 64, 64, 3) uint8
    action: torch.Tensor  # (B,)
    reward: torch.Tensor  # (B,)


class Encoder(nn.Sequential):
    """Pictures (B, 64, 64, 3) of 0 to 255 -> (B, width)."""

    def __init__(self, width: int):
        super().__init__(nn.Conv2d(3, 16, 4, 2), nn.ReLU(), nn.Conv2d(16, 32, 4, 2), nn.ReLU(), nn.Conv2d(32, 32, 4, 2),
                         nn.ReLU(), nn.Flatten(), nn.Linear(32 * 6 * 6, width))

    def forward(self, picture: torch.Tensor) -> torch.Tensor:
        return super().forward(scaled(picture))


class Decoder(nn.Sequential):
    """Codes (B, width) -> pictures (B, 3, 64, 64) of about 0 to 1: the mean of all pictures plus a learned difference.
    Without the mean, 600 updates go by until the room is drawn, and the robot is still missing."""

    def __init__(self, width: int):
        super().__init__(nn.Linear(width, 32 * 6 * 6), nn.ReLU(), nn.Unflatten(1, (32, 6, 6)),
                         nn.ConvTranspose2d(32, 32, 4, 2), nn.ReLU(),  # 14 x 14
                         nn.ConvTranspose2d(32, 16, 4, 2, output_padding=1), nn.ReLU(),  # 31 x 31
                         nn.ConvTranspose2d(16, 3, 4, 2))
        self.register_buffer("mean", torch.zeros(3, 64, 64))

    def forward(self, code: torch.Tensor) -> torch.Tensor:
        return self.mean + super().forward(code)


class Model(nn.Module):
    """The encoder, and what the losses need beside it."""

    def __init__(self, losses: list[str], width: int, num_actions: int, split: bool = False):
        super().__init__()
        self.losses, self.width, self.num_actions = losses, width, num_actions
        whose = torch.arange(width) * len(losses) // width  # (width,), the loss that uses this number of a code
        masks = (whose == torch.arange(len(losses)).unsqueeze(1)) | torch.tensor(not split)
        self.register_buffer("masks", masks.float(), persistent=False)  # (losses, width)
        self.encoder = Encoder(2 * width if "vae" in losses else width)
        if "autoencoder" in losses or "vae" in losses:
            self.decoder = Decoder(width)
        if "inverse" in losses:
            self.inverse = nn.Linear(2 * width, num_actions)
        if "forward" in losses:
            self.change = nn.Linear(width + num_actions, width)
        if "reward" in losses:
            self.reward = nn.Sequential(nn.Linear(2 * width, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(),
                                        nn.Linear(16, 2))

    def code(self, picture: torch.Tensor) -> torch.Tensor:
        """Pictures (B, 64, 64, 3) -> codes (B, n); of a VAE the means."""
        return self.encoder(picture)[:, :self.width]

    def part(self, name: str, code: torch.Tensor) -> torch.Tensor:
        """The part of codes (B, n) that a loss uses; zeros elsewhere."""
        return code * self.masks[self.losses.index(name)]

    def decode(self, code: torch.Tensor) -> torch.Tensor:
        """Codes (B, n) -> pictures (B, 3, 64, 64)."""
        return self.decoder(self.part("vae" if "vae" in self.losses else "autoencoder", code))


def scaled(picture: torch.Tensor) -> torch.Tensor:
    """Pictures (B, 64, 64, 3) of 0 to 255 -> (B, 3, 64, 64) of 0 to 1."""
    return picture.permute(0, 3, 1, 2).float() / 255


def reconstruction(decoded: torch.Tensor, picture: torch.Tensor) -> torch.Tensor:
    """Mean squared error of decoded pictures (B, 3, 64, 64) of 0 to 1, of pictures (B, 64, 64, 3) of 0 to 255."""
    return (decoded - scaled(picture)).square().mean()


def kl(mean: torch.Tensor, log_var: torch.Tensor) -> torch.Tensor:
    """Divergence of Gaussians (B, n) from N(0, 1), summed over numbers, mean over rows."""
    return 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum(1).mean()


def inverse(logits: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
    """Cross entropy of logits (B, A) and the actions (B,)."""
    return F.cross_entropy(logits, action)


def forward(code: torch.Tensor, change: torch.Tensor, next_code: torch.Tensor) -> torch.Tensor:
    """Mean squared error of code + change (B, n) as a prediction of the next code."""
    return (code + change - next_code).square().mean()


def reward(logits: torch.Tensor, rewards: torch.Tensor) -> torch.Tensor:
    """Cross entropy of two classes (B, 2): rewards (B,) of 0 or less, and above."""
    return F.cross_entropy(logits, (rewards > 0).long())


def priors(code: torch.Tensor, next_code: torch.Tensor, action: torch.Tensor, rewards: torch.Tensor) -> torch.Tensor:
    """Temporal coherence, proportionality, causality and repeatability (4,) of transitions, codes (B, n).

    Means over rows, and over pairs of rows with equal actions, for causality also of different rewards; 0 without any.
    """
    change = next_code - code
    i, j = torch.triu_indices(len(code), len(code), 1, device=code.device)
    equal = (action[i] == action[j]).float()
    other = equal * (rewards[i] != rewards[j]).float()
    near = (-(code[i] - code[j]).square().sum(1)).exp()  # (pairs,)
    length = change.norm(dim=1)

    def mean(x: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
        return (x * counted).sum() / counted.sum().clamp(min=1)
    return torch.stack([change.square().sum(1).mean(), mean((length[i] - length[j]).square(), equal),
                        mean(near, other), mean(near * (change[i] - change[j]).square().sum(1), equal)])


def srl_loss(model: Model, batch: Batch, args: Args) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The weighted sum of losses of a batch, and each of them."""
    n, both = model.width, torch.cat([batch.picture, batch.next_picture])  # (2B, 64, 64, 3)
    output, terms = model.encoder(both), {}
    codes = output[:, :n]

    def pair(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return model.part(name, codes).chunk(2)  # codes and next codes (B, n)
    if "autoencoder" in model.losses:
        terms["autoencoder"] = reconstruction(model.decode(codes), both), args.reconstruction_weight
    if "vae" in model.losses:
        log_var = output[:, n:].clamp(-20, 10)
        drawn = codes + (0.5 * log_var).exp() * torch.randn_like(codes)
        pixels = both[0].numel()  # squares are summed over pixels, as a likelihood is, and all is divided by them
        divergence = kl(model.part("vae", codes), model.part("vae", log_var))  # masked numbers add 0
        error = reconstruction(model.decode(drawn), both) + args.beta * divergence / pixels
        terms["vae"] = error, args.reconstruction_weight
    if "inverse" in model.losses:
        logits = model.inverse(torch.cat(pair("inverse"), 1))  # of (B, 2n)
        terms["inverse"] = inverse(logits, batch.action), args.inverse_weight
    if "forward" in model.losses:
        code, next_code = pair("forward")
        inputs = torch.cat([code, F.one_hot(batch.action, model.num_actions).float()], 1)  # (B, n + A)
        terms["forward"] = forward(code, model.change(inputs), next_code), args.forward_weight
    if "reward" in model.losses:
        terms["reward"] = reward(model.reward(torch.cat(pair("reward"), 1)), batch.reward), args.reward_weight
    if "priors" in model.losses:
        terms["priors"] = priors(*pair("priors"), batch.action, batch.reward).sum(), args.priors_weight
    loss = sum(weight * term for term, weight in terms.values())
    return loss, {"loss": loss, **{f"{name}_loss": term for name, (term, _) in terms.items()}}


def update(model: Model, optimizer: torch.optim.Optimizer, loss_of: Callable, batch: Batch, args: Args) -> dict:
    """One step of the optimiser on a batch; returns what is logged."""
    loss, scalars = loss_of(model, batch, args)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return {name: x.detach() for name, x in scalars.items()}


def probe_r2(code: torch.Tensor, truth: torch.Tensor, held_code: torch.Tensor, held_truth: torch.Tensor
             ) -> torch.Tensor:
    """Share (k,) of the variance of held-out truth (m, k) that is linear in codes (m, n), 1 at most, by least squares
    on other codes and truths."""
    x, y = (torch.cat([z, torch.ones_like(z[:, :1])], 1).double() for z in (code, held_code))
    solution = torch.linalg.lstsq(x, truth, driver="gelsd").solution
    return 1 - (y @ solution - held_truth).square().mean(0) / held_truth.var(0, correction=0)


def knn_mse(code: torch.Tensor, truth: torch.Tensor, held_code: torch.Tensor, held_truth: torch.Tensor) -> torch.Tensor:
    """Mean squared distance of held-out truths (m, k) from those of the five other codes nearest to theirs."""
    nearest = torch.cdist(held_code, code).topk(min(NEIGHBOURS, len(code)), largest=False).indices  # (m, 5)
    return (truth[nearest] - held_truth.unsqueeze(1)).square().sum(2).mean()


class Frames:
    """Transitions of random actions, as many episodes as --frames fill, the last fifth held out."""

    def __init__(self, vec: envs.VectorEnv, args: Args):
        found = envs.collect_frames(vec, args.frames, args.episode_steps, 10_000 * args.seed + 8_000)
        self.args, self.names, self.episodes = args, found.names, int(found.episode.max()) + 1
        self.columns = Batch(*map(torch.from_numpy, (found.picture, found.next_picture, found.action, found.reward)))
        self.truth = torch.from_numpy(found.truth)
        self.held_episodes = max(1, self.episodes // 5)
        held = torch.from_numpy(found.episode >= self.episodes - self.held_episodes)
        self.train, self.held = (~held).nonzero().squeeze(1), held.nonzero().squeeze(1)  # rows

    def mean_picture(self) -> torch.Tensor:
        """(3, 64, 64) of 0 to 1, of what is learned from."""
        return sum(scaled(self.columns.picture[part]).sum(0) for part in self.train.split(256)) / len(self.train)

    def draw(self, size: int, device: torch.device) -> Batch:
        """Random transitions to learn from."""
        rows = self.train[torch.randint(len(self.train), (size,))]
        return Batch(*(column[rows].to(device) for column in self.columns))

    @torch.no_grad()
    def codes(self, model: Model, rows: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Codes (len(rows), n) of pictures, on the CPU."""
        return torch.cat([model.code(self.columns.picture[part].to(device)).cpu() for part in rows.split(256)])

    @torch.no_grad()
    def measure(self, model: Model, device: torch.device) -> tuple[dict[str, float], dict[str, float]]:
        """Columns of eval.csv, and scalars, both of held-out episodes."""
        code, held_code = (self.codes(model, rows, device) for rows in (self.train, self.held))
        truth, held_truth = self.truth[self.train], self.truth[self.held]
        if self.names:
            shares = probe_r2(code, truth, held_code, held_truth)
            scalars = {f"probe_r2/{name}": float(x) for name, x in zip(self.names, shares)}
            scalars["knn_mse"] = float(knn_mse(code, truth, held_code, held_truth))
        else:
            with torch.random.fork_rng():
                torch.manual_seed(0)  # a VAE draws random numbers
                losses = [srl_loss(model, Batch(*(column[rows].to(device) for column in self.columns)), self.args)[0]
                          * len(rows) for rows in self.held.split(256)]
            shares = -sum(losses).reshape(1) / len(self.held)
            scalars = {"held_out_loss": -float(shares)}
        if hasattr(model, "decoder"):
            errors = [reconstruction(model.decode(z.to(device)), self.columns.picture[rows].to(device)) * len(rows)
                      for z, rows in zip(held_code.split(256), self.held.split(256))]
            scalars["reconstruction"] = float(sum(errors) / len(self.held))
        result = {"episodes": self.held_episodes, "return_mean": float(shares.mean()),
                  "return_std": float(shares.std(correction=0)), "success_rate": math.nan,
                  "length_mean": len(self.held) / self.held_episodes}
        return result, scalars

    @torch.no_grad()
    def film(self, model: Model, count: int, folder: Path, device: torch.device) -> None:
        """Draw held-out pictures, and below them what their codes are decoded to, into the run `folder`."""
        if not count or not hasattr(model, "decoder"):
            return
        import imageio.v2 as imageio  # slow to import

        rows = self.held[torch.linspace(0, len(self.held) - 1, count).long()]
        picture = self.columns.picture[rows]  # (count, 64, 64, 3)
        decoded = model.decode(model.code(picture.to(device))).clamp(0, 1).permute(0, 2, 3, 1).cpu()
        both = torch.stack([picture, (255 * decoded).to(torch.uint8)])  # (2, count, 64, 64, 3)
        sheet = both.permute(0, 2, 1, 3, 4).reshape(2 * 64, count * 64, 3)
        path = folder / "video" / "decoded.png"
        path.parent.mkdir(exist_ok=True)
        imageio.imwrite(path, np.asarray(sheet).repeat(2, 0).repeat(2, 1))
        print(f"drawn: {path}", file=sys.stderr)


def check(args: Args) -> list[str]:
    """The names in --losses. Raises UserError for others, and for two decoders."""
    losses = args.losses.split(",")
    if unknown := [name for name in losses if name not in LOSSES]:
        raise runtime.UserError(f"--losses {args.losses}: {unknown[0]!r} is unknown; known are {', '.join(LOSSES)}")
    if len(set(losses)) < len(losses) or {"autoencoder", "vae"} <= set(losses):
        raise runtime.UserError(f"--losses {args.losses} asks for one thing twice; autoencoder and vae are two of one")
    if args.split and not 1 < len(losses) <= args.code:
        raise runtime.UserError(f"--split: {args.code} numbers cannot be divided among {len(losses)} losses; name two "
                                "losses or more, and give each of them a number")
    return losses


def main(args: Args) -> dict[str, float]:
    """Train, resume or evaluate, as `args` say; returns the last evaluation (keys: runtime.EVALUATION)."""
    args, saved = runtime.checked(args, ALGO, RANGES)
    losses, device = check(args), runtime.pick_device(args.device)

    vec = envs.make_vec(args.env, COPIES, encoder="pixels")
    shape, num_actions = envs.discrete_sizes(vec, any_pictures=True)
    if shape != (64, 64, 3):
        raise envs.EnvError(f"{args.env} observes {shape} numbers; pictures of 64 x 64 x 3 are needed")
    frames = Frames(vec, args)  # the same ones after a resume
    model = Model(losses, args.code, num_actions, args.split)
    if hasattr(model, "decoder"):
        model.decoder.mean.copy_(frames.mean_picture())
    model.to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.learning_rate, fused=True)
    scalars = runtime.Means()  # since the last log
    parts = {"model": model, "optimizer": optimizer, "scalars": scalars}
    runtime.restore(parts, saved, only=["model"] if args.evaluate else None)
    if args.evaluate:
        result, measured = frames.measure(model, device)
        print(f"{args.env} after {saved['step']} rows:", ", ".join(f"{k} {x:.4g}" for k, x in measured.items()))
        frames.film(model, args.video, Path(args.evaluate), device)
        return result

    # train
    run = runtime.Run(ALGO, args, envs.resolve(args.env), saved, parts)
    loss_of = runtime.compiled(srl_loss, args.compile, device)

    def evaluate() -> None:
        result, measured = frames.measure(model, device)
        run.log(measured)
        run.log_evaluation(result)
    if not saved:
        evaluate()  # the untrained encoder
    while run.advance(args.batch_size):
        scalars.add(update(model, optimizer, loss_of, frames.draw(args.batch_size, device), args))

        # log, evaluate, save
        if run.due(LOG_EVERY):
            run.log(scalars.take())
        if run.due(args.eval_every) or run.over:
            evaluate()
        run.save_if_due()
    code = frames.codes(model, frames.train, device)
    mean, std = code.mean(0), code.std(0).clamp(min=1e-3 * float(code.std()))  # what hardly varies is not scaled up

    def encode(picture: torch.Tensor) -> torch.Tensor:
        """Codes of mean 0 and deviation 1. The run exports this as encoder.pt2."""
        return ((model.code(picture.to(device)).cpu() - mean) / std).clamp(-LIMIT, LIMIT)
    run.finish(frames.columns.picture[:2], encoder=encode)
    frames.film(model, args.video, run.folder, device)
    return run.result


if __name__ == "__main__":
    with runtime.exit_codes(ALGO):
        main(runtime.cli(Args, ALGO))
