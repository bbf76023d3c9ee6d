"""PPO-KIAN: PPO whose actor fuses its own policy with external policies by attention, for discrete actions.

Chiu et al., "Flexible Attention-Based Multi-Policy Fusion for Efficient Deep RL", NeurIPS 2023 (arXiv 2210.03729).
pi_0 is the inner (trained) policy; the advice e_j of an external policy j has ones at the actions that it advises. A
query q(s) meets one key k_i per policy:

    w = softmax_i cos(q, k_i)  (Eqs. 1-2),   pi = w_0 pi_0 + sum_j w_j softmax(beta_j e_j),   beta_j = |q| |k_j|

So it is learned how sharp advice is. With three actions or fewer, weighted logits are added instead, as in the released
code. Everything else is PPO: `diff algos/ppo.py algos/ppo_kian.py` is the paper.

Departures. benchmarks/suites/paper.toml has the flags that undo all of them, docs/ppo_kian.md the reasons:
- only the inner policy gets the entropy bonus; a bonus for the mixture makes advice uniform before any reward is found;
- an external policy without advice abstains; in the released code it acts at random with its weight;
- advice starts sharp, beta = 8 |q| |k_j|: on DoorKey the agent is as good as the mean of its advice from the start;
- the key of the inner policy is a vector as in the paper; in the released code it is a function of the state;
- a time limit bootstraps; in the released code it ends the task.

python algos/ppo_kian.py --env MiniGrid-DoorKey-5x5-v0   # return 0.8 after 20,000 steps, plain PPO after 61,000
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
from torch.utils._pytree import tree_map

import envs
import knowledge
import runtime

ALGO = Path(__file__).stem  # names run folders and result tables
LOG_EVERY = 10_000  # environment steps
WIDTH = 64  # of the encoder's output and of all hidden layers
KEY_DIM = 8  # width m of keys and query


@dataclass
class Args:
    """PPO with external policies fused by attention (KIAN)."""
    # twin: run arguments of PPO
    env: str = "MiniGrid-DoorKey-5x5-v0"  # environment id; with --evaluate another id may be given
    seed: int = 1  # seed of all random numbers: networks, environments, exploration
    total_timesteps: int = 300_000  # environment steps, summed over environments; with --resume: a new total
    num_envs: int = 16  # environments stepped together
    eval_every: int = 20_000  # environment steps between evaluations; 0: only at start and end
    eval_episodes: int = 100  # episodes per evaluation
    checkpoint_every: int = 100_000  # environment steps between checkpoints; 0: only at the end
    video: int = 0  # episodes to film after training, or with --evaluate
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where the networks run; auto: on a GPU if there is one
    compile: bool = False  # compile the loss: about 30 s at the first start
    run_dir: str = ""  # run folder; empty: runs/<algo>/<env>/seed<k>-<time>
    resume: str = ""  # run folder to continue exactly, with its own arguments
    evaluate: str = ""  # run folder to evaluate; no training
    track: bool = False  # also log scalars to Weights & Biases (pip install wandb)
    # twin end

    # algorithm
    num_steps: int = 128  # steps of every environment per iteration
    epochs: int = 4  # passes over an iteration's transitions
    batch_size: int = 256  # transitions per update
    learning_rate: float = 1e-3  # Adam, constant
    gamma: float = 0.99  # discount per step
    gae_lambda: float = 0.95  # lambda of the advantage estimate (GAE)
    clip: float = 0.2  # range of the probability ratio, and of the change of values
    clip_values: bool = True  # also clip the change of values: right for returns near 1, slow for larger ones
    normalize_advantage: bool = False  # shift and scale the advantages of a batch to mean 0 and deviation 1
    entropy_coef: float = 0.01  # weight of the entropy bonus
    value_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # the gradient of all parameters is clipped to this norm
    bootstrap: bool = True  # at a time limit, add the value of the last state to the return
    eval_select: Literal["sample", "argmax"] = "sample"  # evaluations draw actions, or take the most likely ones

    # method: KIAN
    knowledge: str = "auto"  # auto, none, rules, groups, your_file.py, run:<RUN_DIR>, inner:<RUN_DIR>; comma-separated
    inner_key: Literal["vector", "head"] = "vector"  # key of the inner policy: a vector, or a function of the state
    sharpness: float = 8.0  # advice becomes softmax(this times |query| |key| times advice) (paper: 1)
    silent: Literal["abstain", "uniform"] = "abstain"  # an external policy without advice abstains, or acts at random
    entropy_of: Literal["inner", "fused"] = "inner"  # entropy bonus for the inner policy, or for the mixture (paper)
    init_from: str = ""  # run folder: take over its query and, by name, its keys; its inner policy becomes external


# RANGES: limits of numbers; all others must be above 0. TUNE: for `make tune`, (low, high) on a log scale, or choices
RANGES = {"gamma": (0, 1), "gae_lambda": (0, 1), "entropy_coef": (0, math.inf), "value_coef": (0, math.inf)}
TUNE = {"learning_rate": (2e-4, 3e-3), "entropy_coef": (1e-3, 5e-2), "num_steps": [64, 128, 256],
        "epochs": [2, 4, 8], "batch_size": [128, 256, 512], "gae_lambda": [0.9, 0.95, 0.98]}


def linear(fan_in: int, fan_out: int) -> nn.Linear:
    """A layer that starts with biases 0 and, for each unit, a random weight vector of length 1."""
    layer = nn.Linear(fan_in, fan_out)
    with torch.no_grad():
        layer.weight.normal_().div_(layer.weight.norm(dim=1, keepdim=True))
        layer.bias.zero_()
    return layer


class GridEncoder(nn.Module):
    """Three 2x2 convolutions of 16, 32, 64 units with ReLU, and 2x2 max pooling after the first. They are matrix
    products of gathered cells: for 7x7 cells on a CPU this is more than twice as fast as nn.Conv2d."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4 * 3, 16), nn.Linear(4 * 16, 32), nn.Linear(4 * 32, WIDTH)])
        first, second = (torch.arange(s * s).view(s, s).unfold(0, 2, 1).unfold(1, 2, 1) for s in (7, 3))  # 2x2 windows
        pooled = first.reshape(3, 2, 3, 2, 4).transpose(1, 2)  # (3, 3, 2, 2, 4): neighbours that are pooled together
        self.register_buffer("first", pooled.flatten(), persistent=False)
        self.register_buffer("second", second.flatten(), persistent=False)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """The 7x7 cells in view (B, 7, 7, 3) as object, colour and state, unscaled -> (B, 64)."""
        x = image.flatten(1, 2).index_select(1, self.first).view(-1, 9, 4, 4 * 3).float()
        x = F.relu(self.layers[0](x).amax(2))  # (B, 9, 16)
        x = x.index_select(1, self.second).view(-1, 4, 4 * 16)
        x = F.relu(self.layers[1](x)).view(-1, 4 * 32)
        return F.relu(self.layers[2](x))


class PixelEncoder(nn.Sequential):
    """Pictures (B, 64, 64, 3) of 0 to 255 -> (B, 64), for Crafter: the convolutions of DQN (Mnih et al. 2015)."""

    def __init__(self):
        super().__init__(nn.Conv2d(3, 32, 8, 4), nn.ReLU(), nn.Conv2d(32, 64, 4, 2), nn.ReLU(), nn.Conv2d(64, 64, 3),
                         nn.ReLU(), nn.Flatten(), nn.Linear(64 * 4 * 4, WIDTH), nn.ReLU())

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return super().forward(image.permute(0, 3, 1, 2).float() / 255)


ENCODERS = {7: GridEncoder, 64: PixelEncoder}  # by the width of the view


class Seen(NamedTuple):
    """What the agent sees."""
    view: torch.Tensor  # 7x7 cells (B, 7, 7, 3) or features (B, f)
    advice: torch.Tensor  # (B, n, A), of the external policies


class Output(NamedTuple):
    log_probs: torch.Tensor  # (B, A), of the actions
    value: torch.Tensor  # (B,), of the state
    inner: torch.Tensor  # (B, A), log-probabilities of the inner policy; where logits are added, of the whole one
    joint: torch.Tensor | None  # (B, n+1, A), log(weight * probability), inner policy first; of a mixture only
    attention: dict[str, torch.Tensor]  # logged for each policy: (B, n+1), or (B, n) for external ones


def attention_scores(query: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Query (B, m), keys (n+1, m) or (B, n+1, m), inner policy first -> products and |query| |key|, (B, n+1) each.
    Their ratio is the cosine."""
    norms = query.norm(dim=-1, keepdim=True) * keys.norm(dim=-1)
    return (query.unsqueeze(1) * keys).sum(-1), norms.clamp(min=1e-8)


def fuse(cosines: torch.Tensor, inner: torch.Tensor, advice: torch.Tensor, beta: torch.Tensor,
         abstain: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines (B, n+1), log-probabilities of the inner policy (B, A), advice (B, n, A), its sharpness (B, n) -> log of
    weight times probability (B, n+1, A), weights (B, n+1)."""
    if abstain:  # the inner policy never does
        cosines = cosines.masked_fill(F.pad(advice.amax(-1) <= 0, (1, 0)), -1e4)
    log_weights = torch.log_softmax(cosines, -1)
    external = torch.log_softmax(beta.unsqueeze(-1) * advice, -1)  # (B, n, A), uniform without advice
    log_probs = torch.cat([inner.unsqueeze(1), external], 1)  # (B, n+1, A)
    return log_weights.unsqueeze(-1) + log_probs, log_weights.exp()


def add_logits(scores: torch.Tensor, logits: torch.Tensor, advice: torch.Tensor) -> torch.Tensor:
    """Products (B, n+1), logits of the inner policy (B, A), advice (B, n, A) -> log-probabilities (B, A). Where a
    product is below 0, advice is a warning."""
    policies = torch.cat([logits.unsqueeze(1), advice], 1)  # (B, n+1, A)
    return torch.log_softmax((scores.unsqueeze(-1) * policies).sum(1), -1)


class Agent(nn.Module):
    """Actor and critic with a common encoder."""

    def __init__(self, shape: tuple[int, ...], num_actions: int, n: int, args: Args):
        super().__init__()
        self.encoder = ENCODERS[shape[0]]() if len(shape) == 3 else nn.Sequential(linear(shape[0], WIDTH), nn.Tanh())
        self.critic = nn.Sequential(linear(WIDTH, WIDTH), nn.Tanh(), linear(WIDTH, 1))
        self.trunk = nn.Sequential(linear(WIDTH, WIDTH), nn.Tanh())
        self.actor = linear(WIDTH, num_actions)
        self.query = linear(WIDTH, KEY_DIM)
        self.keys = nn.Parameter(torch.randn(n + 1, KEY_DIM))  # the inner policy's first
        self.inner_key = linear(WIDTH, KEY_DIM) if args.inner_key == "head" else None
        self.adds_logits = n > 0 and num_actions <= 3
        self.sharpness, self.abstain = args.sharpness, args.silent == "abstain"

    def forward(self, obs: Seen) -> Output:
        x = self.encoder(obs.view)  # (B, 64)
        value, hidden = self.critic(x).squeeze(1), self.trunk(x)  # (B,), (B, 64)
        logits, (scores, norms) = self.actor(hidden), self.attend(hidden)  # (B, A), (B, n+1) each
        if self.adds_logits:
            log_probs = add_logits(scores, logits, obs.advice)
            return Output(log_probs, value, log_probs, None, {"score": scores})
        inner, beta = torch.log_softmax(logits, -1), self.sharpness * norms[:, 1:]
        joint, weights = fuse(scores / norms, inner, obs.advice, beta, self.abstain)
        log_probs = torch.logsumexp(joint, 1)  # logarithms throughout: a probability may be 0 in float32
        return Output(log_probs, value, inner, joint, {"attention": weights, "sharpness": beta})

    def attend(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden layer (B, 64) -> products of query and keys, and of their norms, (B, n+1) each."""
        keys = self.keys
        if self.inner_key is not None:  # (B, n+1, m)
            keys = torch.cat([self.inner_key(hidden).unsqueeze(1), keys[1:].expand(hidden.shape[0], -1, -1)], 1)
        return attention_scores(self.query(hidden), keys)

    def inner(self, view: torch.Tensor) -> torch.Tensor:
        """The inner policy alone, log-probabilities (B, A). Where logits are added, its logits keep their factor
        q . k_0, which may be below 0."""
        hidden = self.trunk(self.encoder(view))
        logits = self.actor(hidden)
        if self.adds_logits:
            logits = self.attend(hidden)[0][:, :1] * logits
        return torch.log_softmax(logits, -1)


class Batch(NamedTuple):
    """Transitions of a rollout."""
    obs: Seen
    action: torch.Tensor  # (B,)
    log_prob: torch.Tensor  # (B,), of the action, by the policy that took it
    value: torch.Tensor  # (B,), of the observation, by the critic during the rollout
    advantage: torch.Tensor  # (B,)
    target_value: torch.Tensor  # (B,), target of the critic


def gumbel(shape: tuple[int, ...], generator: torch.Generator | None = None) -> torch.Tensor:
    """Gumbel noise: the argmax of log-probabilities plus this noise is a draw from them."""
    return -(-torch.rand(shape, generator=generator).clamp(1e-10, 1 - 1e-7).log()).log()


def gae(reward: torch.Tensor, value: torch.Tensor, last_value: torch.Tensor, ended: torch.Tensor, gamma: float,
        gae_lambda: float) -> torch.Tensor:
    """Generalised advantage estimates (T, N) from reward, value and ended (T, N) and the value (N,) of the state after
    the last step. Nothing flows back over the end of an episode."""
    next_value, advantage, running = last_value, torch.zeros_like(reward), torch.zeros_like(last_value)
    for t in reversed(range(len(reward))):
        goes_on = 1.0 - ended[t]
        delta = reward[t] + gamma * next_value * goes_on - value[t]
        advantage[t] = running = delta + gamma * gae_lambda * goes_on * running
        next_value = value[t]
    return advantage


@torch.no_grad()
def collect(agent: Agent, vec: envs.VectorEnv, look: Callable, loop: dict, scalars: runtime.Means, args: Args) -> Batch:
    """Play `num_steps` steps in every environment -> their transitions (T N, ...). `look` makes the agent's inputs
    from observations, `loop` has the present ones, `scalars` gets the returns of finished episodes."""
    device = next(agent.parameters()).device
    noise = gumbel((args.num_steps, vec.num_envs, int(vec.action_space.n))).to(device)
    seen, steps = look(loop["obs"]), []
    for t in range(args.num_steps):
        output = agent(seen)
        action = (output.log_probs + noise[t]).argmax(1)  # a draw from the policy
        log_prob = output.log_probs.gather(1, action.unsqueeze(1)).squeeze(1)
        obs, reward, terminated, truncated, info = vec.step(action.cpu().numpy())
        reward, ended = torch.from_numpy(reward).float(), torch.from_numpy(terminated | truncated)
        loop["open_return"] += reward
        for finished in loop["open_return"][ended]:
            scalars.add({"return": finished})
        loop["open_return"][ended] = 0.0
        cut = torch.from_numpy(truncated & ~terminated)
        if args.bootstrap and cut.any():  # obs already belongs to the next episode, final_obs to this one
            final_value = agent(look(envs.to_tensors(info["final_obs"]))).value.cpu()
            reward[cut] += args.gamma * final_value[cut]
        steps.append((seen, action, log_prob, output.value, reward.to(device), ended.float().to(device)))
        loop["obs"] = envs.to_tensors(obs)
        seen = look(loop["obs"])
    obs, action, log_prob, value, reward, ended = tree_map(lambda *columns: torch.stack(columns), *steps)  # (T, N, ...)
    advantage = gae(reward, value, agent(seen).value, ended, args.gamma, args.gae_lambda)
    return tree_map(lambda x: x.flatten(0, 1), Batch(obs, action, log_prob, value, advantage, advantage + value))


def ppo_loss(agent: Agent, batch: Batch, args: Args) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss of a batch (Eq. 9), and scalars for the log."""
    output = agent(batch.obs)
    log_probs, value = output.log_probs, output.value
    log_ratio = log_probs.gather(1, batch.action.unsqueeze(1)).squeeze(1) - batch.log_prob
    ratio, advantage = log_ratio.exp(), batch.advantage
    if args.normalize_advantage:
        advantage = (advantage - advantage.mean()) / (advantage.std(correction=0) + 1e-8)
    policy_loss = -torch.min(ratio * advantage, ratio.clamp(1 - args.clip, 1 + args.clip) * advantage).mean()  # Eq. 7
    value_error = (value - batch.target_value).square()
    if args.clip_values:  # the larger of both errors: a value gains nothing by changing more than `clip`
        clipped_value = batch.value + (value - batch.value).clamp(-args.clip, args.clip)
        value_error = value_error.max((clipped_value - batch.target_value).square())
    value_loss = value_error.mean()
    entropy = -(log_probs.exp() * log_probs).sum(1).mean()
    rewarded = output.inner if args.entropy_of == "inner" else log_probs
    bonus = -(rewarded.exp() * rewarded).sum(1).mean()
    loss = policy_loss - args.entropy_coef * bonus + args.value_coef * value_loss
    scalars = {"policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy, "value": value.mean(),
               "clip_fraction": ((ratio - 1).abs() > args.clip).float().mean(),
               "approx_kl": (ratio - 1 - log_ratio).mean()}
    scalars |= {name: x.mean(0) for name, x in output.attention.items()}
    learned_keys = agent.keys if agent.inner_key is None else agent.keys[1:]
    return loss, scalars | {"key_norm": learned_keys.norm(dim=1)}


def update(agent: Agent, optimizer: torch.optim.Optimizer, loss_of: Callable, batch: Batch, args: Args) -> dict:
    """One step of the optimiser on a batch; returns what is logged."""
    loss, scalars = loss_of(agent, batch, args)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm, foreach=True)
    optimizer.step()
    return {name: x.detach() for name, x in scalars.items()}


def main(args: Args) -> dict[str, float]:
    """Train, resume or evaluate, as `args` say; returns the last evaluation (keys: runtime.EVALUATION)."""
    args, saved = runtime.checked(args, ALGO, RANGES, anew=["env", "eval_select"])
    device = runtime.pick_device(args.device)

    vec = envs.make_vec(args.env, args.num_envs)
    shape, num_actions = envs.discrete_sizes(vec)  # (7, 7, 3): cells in view, or (f,): features; number of actions
    obs = vec.reset(10_000 * args.seed)  # environment i has stream 10,000 * seed + i; seeds share none
    example = envs.example_of(vec, obs)
    given = args.knowledge + (f",inner:{args.init_from}" if args.init_from else "")
    external = knowledge.load(given, args.env, num_actions, example, lowest=0.0,
                              kept_in=args.resume or args.evaluate)
    n, names = len(external), ["inner", *external]
    agent = Agent(shape, num_actions, n, args).to(device)
    if args.init_from and not saved:  # the last one is that run's inner policy; added logits contain its key's factor
        known = names[:-1] if agent.adds_logits else names
        knowledge.take_over(dict(agent.named_parameters()), None, known, args.init_from)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, fused=True)
    loop = {"obs": envs.to_tensors(obs), "open_return": torch.zeros(args.num_envs, dtype=torch.float64)}
    scalars = runtime.Means()  # of updates and finished episodes since the last log
    parts = {"agent": agent, "optimizer": optimizer, "vec": vec, "loop": loop, "scalars": scalars}
    runtime.restore(parts, saved, only=["agent"] if args.evaluate else None)
    evaluator = envs.Evaluator(args, copies=100)

    def look(obs: torch.Tensor | dict[str, torch.Tensor]) -> Seen:
        """Observations -> inputs of the agent: what it sees, and the advice for it."""
        advice = knowledge.advise(external, obs, num_actions, lowest=0.0).float()
        return Seen(envs.seen(obs).to(device), advice.to(device))

    def policy(obs: torch.Tensor | dict[str, torch.Tensor]) -> torch.Tensor:
        """Log-probabilities (B, A). The run exports this as policy.pt2."""
        return agent(look(obs)).log_probs.cpu()

    def inner(obs: torch.Tensor | dict[str, torch.Tensor]) -> torch.Tensor:
        """Log-probabilities (B, A) of the inner policy alone. The run exports this as inner.pt2."""
        return agent.inner(envs.seen(obs).to(device)).cpu()

    @torch.no_grad()
    def act(obs: envs.Observation) -> np.ndarray:
        """The actions of evaluations."""
        output = agent(look(envs.to_tensors(obs)))
        log_probs = evaluator.noted(output.log_probs.cpu())
        if args.eval_select == "sample":
            log_probs = log_probs + gumbel(log_probs.shape, evaluator.generator)
        action = log_probs.argmax(1)
        if output.joint is not None:  # who acts: the policy with the largest share in the action's probability
            evaluator.note(output.attention["attention"][0], output.joint[0, :, action[0]].argmax())
        return action.numpy()

    if args.evaluate:
        return evaluator.report(act, saved["step"], names)

    # train
    run = runtime.Run(ALGO, args, envs.resolve(args.env), saved, parts)
    knowledge.keep(given, names, run.folder)
    loss_of = runtime.compiled(ppo_loss, args.compile, device)
    if not saved:
        run.log_evaluation(evaluator.play(act))  # the untrained agent
    while run.advance(args.num_steps * args.num_envs):
        rollout = collect(agent, vec, look, loop, scalars, args)
        for _ in range(args.epochs):
            for index in torch.randperm(len(rollout.action)).to(device).split(args.batch_size):
                batch = tree_map(lambda x: x[index], rollout)
                scalars.add(update(agent, optimizer, loss_of, batch, args))

        # log, evaluate, save
        if run.due(LOG_EVERY):
            run.log(scalars.take(), names)
        if run.due(args.eval_every) or run.over:
            run.log_evaluation(evaluator.play(act))
        run.save_if_due()
    run.finish(example, policy=policy, inner=inner)
    evaluator.film(act, run.folder, names)
    return run.result


if __name__ == "__main__":
    with runtime.exit_codes(ALGO):
        main(runtime.cli(Args, ALGO))
