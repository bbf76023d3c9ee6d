"""PPO-KIAN: PPO whose actor fuses its own policy with external knowledge policies by attention, for discrete actions.

Chiu et al., "Flexible Attention-Based Multi-Policy Fusion for Efficient Deep RL", NeurIPS 2023 (arXiv 2210.03729).
The query of a state meets one key per policy, the inner (trained) one included; the softmax of their cosines is the
weight of each policy (Eqs. 1-2), and the actor is the mixture of all with these weights. A rule's advice e, ones at
the actions it is for, becomes softmax(beta e): how sharp, beta = |query| |key|, is learned per rule and state, which
balances the entropies of rules and inner policy. With three actions or fewer, weighted logits are added instead, as
in the released code. `--knowledge none` and `--actor plain` are PPO itself.

Departures from the paper and its released code. --official undoes all, docs/ppo_kian.md has the reasons:
- the entropy bonus is the inner policy's alone; of the fused policy it makes rules uniform before a first reward comes;
- a rule that has no advice steps back, instead of acting at random with its weight;
- rules start sharp, beta = 8 |query| |key|: on DoorKey as good as their mean (--actor mix) from the first step;
- the key of the inner policy is a vector as in the paper, in the code a function of the state;
- a time-out is bootstrapped, in the code it ends the task.

python algos/ppo_kian.py --env MiniGrid-DoorKey-5x5-v0   # return 0.9 after 40,000 steps, plain PPO after 60,000
"""
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy: its own threads fight with torch's for the cores
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import nn

import envs
import knowledge
from runtime import (ArgError, Run, can_compile, continued, exit_codes, finishing, load_run, pick_device,
                     require_positive, require_range)

ALGO = Path(__file__).stem  # names run folders and result tables
LOG_EVERY = 10_000  # environment steps
WIDTH = 64  # of the encoder's output and of all hidden layers
KEY_DIM = 8  # width m of keys and query
MIX_SHARPNESS = 20.0  # beta of --actor mix


@dataclass
class Args:
    """PPO with external knowledge policies fused by attention (KIAN)."""
    env: str = ""  # environment id; empty: MiniGrid-DoorKey-5x5-v0, or with --evaluate the one of the run
    total_timesteps: int = 300_000  # environment steps of all environments; with --resume: a new total (paper: 1e7)
    num_envs: int = 16  # environments stepped together
    eval_every: int = 20_000  # environment steps between evaluations; 0: only at start and end
    eval_episodes: int = 100  # episodes per evaluation
    checkpoint_every: int = 100_000  # environment steps between checkpoints; 0: only at the end
    compile: bool = False  # compile the loss: about 30 s at the first start
    device: Literal["auto", "cpu", "cuda"] = "auto"  # of the networks; auto: a GPU if there is one
    video: int = 0  # episodes to film after training, or with --evaluate
    # twin: run arguments
    seed: int = 1  # of all that is random: networks, environments, exploration
    run_dir: str = ""  # run folder; empty: runs/<algo>/<env>/seed<k>-<time>
    resume: str = ""  # run folder to continue exactly, with the arguments it has
    evaluate: str = ""  # run folder to evaluate; no training
    track: bool = False  # mirror scalars to Weights & Biases (pip install wandb)
    # twin end

    # algorithm: PPO; values of the released code
    num_steps: int = 128  # steps of every environment per iteration
    epochs: int = 4  # passes over an iteration's transitions
    batch_size: int = 256  # transitions per update
    learning_rate: float = 1e-3  # Adam, constant
    gamma: float = 0.99  # discount per step
    gae_lambda: float = 0.95  # of the advantage estimate
    clip: float = 0.2  # of the probability ratio, and of the change of values
    clip_values: bool = True  # whether values are clipped as well: right for returns near 1, slow for larger ones
    normalize_advantage: bool = False  # advantages of a batch to mean 0 and deviation 1 (paper: off)
    entropy_coef: float = 0.01  # weight of the entropy bonus
    value_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # gradients of all parameters together are cut to this length
    bc_coef: float = 0.0  # weight of KL(softmax of all advice || policy); PPO+BC of the paper: 0.001, --actor plain
    eval_select: Literal["sample", "argmax"] = "sample"  # evaluation draws actions (paper), or the likeliest

    # method: KIAN and what it is compared with
    official: bool = False  # as released: overrides inner-key, fusion, sharpness, silent, entropy-of, bootstrapping
    actor: Literal["kian", "plain", "kogun", "a2t", "rule", "mix"] = "kian"  # see docs/ppo_kian.md
    knowledge: str = "auto"  # auto, none, rules, groups, your_file.py, run:<RUN_DIR>, inner:<RUN_DIR>; comma-separated
    inner_key: Literal["vector", "head"] = "vector"  # key of the inner policy: one vector, or a function of the state
    fusion: Literal["auto", "mixture", "logit"] = "auto"  # of probabilities, or of logits; auto: logits up to 3 actions
    sharpness: float = 8.0  # advice becomes softmax(this times |query| |key| times advice) (paper: 1)
    silent: Literal["abstain", "uniform"] = "abstain"  # a rule without advice steps back, or acts at random (paper)
    entropy_of: Literal["inner", "fused"] = "inner"  # whose entropy is rewarded: the inner policy's, or all's (paper)
    entropy_fix: Literal["on", "off"] = "on"  # off: dot products, advice as it stands; paper's ablation: + --official
    init_from: str = ""  # run folder whose keys are taken over by name, and whose inner policy becomes knowledge
    save_keys: str = ""  # JSON file to write the learned keys to, by policy name
    load_keys: str = ""  # keys to start from: such a file, or a run folder
    warm: Literal["keys", "keys+query", "all"] = "keys+query"  # what a run folder gives; all: the inner policy as well


# ranges of `make tune`: (low, high) on a log scale, or choices
TUNE = {"learning_rate": (2e-4, 3e-3), "entropy_coef": (1e-3, 5e-2), "num_steps": [64, 128, 256],
        "epochs": [2, 4, 8], "batch_size": [128, 256, 512], "gae_lambda": [0.9, 0.95, 0.98]}


def linear(fan_in: int, fan_out: int) -> nn.Linear:
    """A layer in the paper's initialisation: the weights of every unit have length 1, biases are 0."""
    layer = nn.Linear(fan_in, fan_out)
    with torch.no_grad():
        layer.weight.normal_().div_(layer.weight.norm(dim=1, keepdim=True))
        layer.bias.zero_()
    return layer


class GridEncoder(nn.Module):
    """Three 2x2 convolutions of 16, 32, 64 units with ReLU, the largest of 2x2 neighbours after the first. As matrix
    products of gathered cells: on a CPU more than twice as fast as nn.Conv2d is for 7x7 cells."""

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


class Agent(nn.Module):
    """Actor and critic on one encoder. What all actors have comes first: one seed, one start, kogun's input apart."""

    def __init__(self, args: Args, shape: tuple[int, ...], num_actions: int, n: int):
        super().__init__()
        grid = len(shape) == 3
        self.encoder = GridEncoder() if grid else nn.Sequential(linear(shape[0], WIDTH), nn.Tanh())
        self.critic = nn.Sequential(linear(WIDTH, WIDTH), nn.Tanh(), linear(WIDTH, 1))
        advised = n * num_actions if args.actor == "kogun" else 0
        self.trunk = nn.Sequential(linear(WIDTH + advised, WIDTH), nn.Tanh())
        self.inner = linear(WIDTH, num_actions)
        if n and args.actor == "a2t":
            self.query = nn.Sequential(linear(WIDTH, WIDTH), nn.ReLU(), linear(WIDTH, n + 1))
        if n and args.actor == "kian":
            self.query = linear(WIDTH, KEY_DIM)
            self.keys = nn.Parameter(torch.randn(n + 1, KEY_DIM))
            if args.inner_key == "head":
                self.inner_key = linear(WIDTH, KEY_DIM)

    def forward(self, obs: torch.Tensor, advice: torch.Tensor, args: Args) -> "Output":
        """Observations (B, ...) and the advice of n external policies (B, n, A) -> what all of them do together."""
        x = self.encoder(obs)  # (B, 64)
        value = self.critic(x).squeeze(1)
        if args.actor == "rule":
            return Output(torch.log_softmax(advice.sum(1, keepdim=True), -1), value)
        if args.actor == "mix":
            return Output(torch.log_softmax(MIX_SHARPNESS * advice, -1) - math.log(advice.shape[1]), value)
        hidden = self.trunk(torch.cat([x, advice.flatten(1)], 1) if args.actor == "kogun" else x)  # (B, 64)
        logits = self.inner(hidden).unsqueeze(1)  # (B, 1, A)
        if advice.shape[1] == 0 or args.actor in ("plain", "kogun"):
            return Output(torch.log_softmax(logits, -1), value)
        policies = torch.cat([logits, advice], 1)  # (B, n+1, A)
        if args.actor == "a2t":
            log_weights = torch.log_softmax(self.query(x), -1)  # (B, n+1)
            fused = (log_weights.exp().unsqueeze(-1) * policies).sum(1, keepdim=True)
            return Output(torch.log_softmax(fused, -1), value, log_weights)

        query, keys = self.query(hidden), self.keys
        if args.inner_key == "head":
            keys = torch.cat([self.inner_key(hidden).unsqueeze(1), keys[1:].expand(len(x), -1, -1)], 1)  # (B, n+1, m)
        scores, norms = attention_scores(query, keys)
        if args.fusion == "logit":
            fused = (scores.unsqueeze(-1) * policies).sum(1, keepdim=True)
            return Output(torch.log_softmax(fused, -1), value, scores=scores)
        scores = scores / norms if args.entropy_fix == "on" else scores  # cosines
        if args.silent == "abstain":
            scores = scores.masked_fill(F.pad(advice.amax(-1) <= 0, (1, 0)), -1e4)  # never the inner one
        log_weights = torch.log_softmax(scores, -1)
        sharpness = args.sharpness * norms[:, 1:] if args.entropy_fix == "on" else None
        inner = torch.log_softmax(logits, -1)
        log_probs = torch.cat([inner, rule_log_probs(advice, sharpness)], 1)
        return Output(log_weights.unsqueeze(-1) + log_probs, value, log_weights, sharpness, inner.squeeze(1))


class Output(NamedTuple):
    joint: torch.Tensor  # (B, n+1, A), log of weight times probability, inner policy first; (B, 1, A) of a single one
    value: torch.Tensor  # (B,)
    log_weights: torch.Tensor | None = None  # (B, n+1)
    sharpness: torch.Tensor | None = None  # (B, n), of the rules' policies
    inner: torch.Tensor | None = None  # (B, A), log-probabilities of the inner policy
    scores: torch.Tensor | None = None  # (B, n+1), factors of the logits where these are added: below 0, advice warns

    @property
    def log_probs(self) -> torch.Tensor:
        """log sum_i w_i p_i (B, A): in the log throughout, for a probability may be zero in float32."""
        return torch.logsumexp(self.joint, 1)


def attention_scores(query: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Query (B, m), keys (n+1, m) or (B, n+1, m), inner first -> products and |query| |key|, (B, n+1) each: their ratio
    is the cosine."""
    norms = query.norm(dim=-1, keepdim=True) * keys.norm(dim=-1)
    return (query.unsqueeze(1) * keys).sum(-1), norms.clamp(min=1e-8)


def rule_log_probs(advice: torch.Tensor, sharpness: torch.Tensor | None) -> torch.Tensor:
    """Advice (B, n, A) as log-probabilities: softmax(sharpness (B, n) advice), or without sharpness the advice itself,
    normalised. A silent rule is uniform."""
    if sharpness is not None:
        return torch.log_softmax(sharpness.unsqueeze(-1) * advice, -1)
    advice = torch.where(advice.sum(-1, keepdim=True) > 0, advice, 1.0)
    return (advice / advice.sum(-1, keepdim=True)).log()


def advantages(reward: torch.Tensor, value: torch.Tensor, last_value: torch.Tensor, ended: torch.Tensor, gamma: float,
               gae_lambda: float) -> torch.Tensor:
    """Generalised advantage estimates (T, N) (Schulman et al. 2016, Eq. 16) from reward, value and ended (T, N) and the
    value (N,) of the state after the last step. `ended` cuts; what a cut episode was still worth is in its reward."""
    next_value, advantage, running = last_value, torch.zeros_like(reward), torch.zeros_like(last_value)
    for t in reversed(range(len(reward))):
        going_on = 1.0 - ended[t]
        delta = reward[t] + gamma * next_value * going_on - value[t]
        advantage[t] = running = delta + gamma * gae_lambda * going_on * running
        next_value = value[t]
    return advantage


def ppo_loss(agent: Agent, batch: dict[str, torch.Tensor], args: Args) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss of a batch, and what is logged of it."""
    output = agent(batch["obs"], batch["advice"], args)
    log_probs, value = output.log_probs, output.value
    log_ratio = log_probs.gather(1, batch["action"].unsqueeze(1)).squeeze(1) - batch["log_prob"]
    ratio = log_ratio.exp()
    advantage, target, old_value = batch["advantage"], batch["return"], batch["value"]
    if args.normalize_advantage:
        advantage = (advantage - advantage.mean()) / (advantage.std(correction=0) + 1e-8)
    policy_loss = -torch.min(ratio * advantage, ratio.clamp(1 - args.clip, 1 + args.clip) * advantage).mean()
    value_error = (value - target).square()
    if args.clip_values:
        value_error = value_error.max((old_value + (value - old_value).clamp(-args.clip, args.clip) - target).square())
    value_loss = value_error.mean()
    rewarded = output.inner if args.entropy_of == "inner" and output.inner is not None else log_probs
    entropy, bonus = (-(x.exp() * x).sum(1).mean() for x in (log_probs, rewarded))
    loss = policy_loss - args.entropy_coef * bonus + args.value_coef * value_loss
    if args.bc_coef > 0:  # the mean runs over actions as well, as in the released code
        loss = loss + args.bc_coef * F.kl_div(
            log_probs, torch.softmax(batch["advice"].sum(1), -1), reduction="none").mean()
    scalars = {"policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy, "value": value.mean(),
               "clipped": ((ratio - 1).abs() > args.clip).float().mean(), "kl": (ratio - 1 - log_ratio).mean()}
    attention = None if output.log_weights is None else output.log_weights.exp()
    parts = {"attention": attention, "score": output.scores, "sharpness": output.sharpness}
    scalars |= {name: x.mean(0) for name, x in parts.items() if x is not None}
    norms = {"key_norm": agent.keys[args.inner_key == "head":].norm(dim=1)} if hasattr(agent, "keys") else {}
    return loss, scalars | norms


@torch.no_grad()
def collect(agent: Agent, vec: envs.VectorEnv, obs, look: Callable, tally: dict, args: Args) -> tuple[dict, Any]:
    """`num_steps` steps of every environment from `obs` on -> rollout {name: (T N, ...)}, and the observation after it.
    `look` gives what the agent sees. `tally` has the returns of open episodes, and collects those of finished ones."""
    (seen, advice), steps = look(obs), []
    device = seen.device
    noise = gumbel((args.num_steps, vec.num_envs, vec.action_space.n)).to(device)
    for t in range(args.num_steps):
        output = agent(seen, advice, args)
        log_probs = output.log_probs
        action = (log_probs + noise[t]).argmax(1)  # a draw from p
        log_prob = log_probs.gather(1, action.unsqueeze(1)).squeeze(1)
        obs, reward, terminated, truncated, info = vec.step(action.cpu().numpy())
        reward, ended = torch.from_numpy(reward).float(), torch.from_numpy(terminated | truncated)
        tally["open"] += reward
        tally["returns"] += tally["open"][ended].tolist()
        tally["open"][ended] = 0.0
        cut = torch.from_numpy(truncated & ~terminated)
        if cut.any() and not args.official:  # the task went on: its last state counts with what it is worth
            final_value = agent.critic(agent.encoder(look(envs.to_tensors(info["final_obs"]))[0])).squeeze(1)
            reward[cut] += args.gamma * final_value.cpu()[cut]
        steps.append((seen, advice, action, log_prob, output.value, *(x.float().to(device) for x in (reward, ended))))
        obs = envs.to_tensors(obs)
        seen, advice = look(obs)
    names = ("obs", "advice", "action", "log_prob", "value", "reward", "ended")
    rollout = {name: torch.stack(column) for name, column in zip(names, zip(*steps))}  # (T, N, ...)
    last_value = agent.critic(agent.encoder(seen)).squeeze(1)
    rollout["advantage"] = advantages(rollout.pop("reward"), rollout["value"], last_value, rollout.pop("ended"),
                                      args.gamma, args.gae_lambda)
    rollout["return"] = rollout["advantage"] + rollout["value"]
    return {name: x.flatten(0, 1) for name, x in rollout.items()}, obs


def update(agent: Agent, optimizer: torch.optim.Optimizer, rollout: dict[str, torch.Tensor], loss_of,
           args: Args) -> dict[str, torch.Tensor]:
    """`epochs` passes over a rollout {name: (T N, ...)} in random batches; returns the means of what is logged."""
    totals, count = {}, 0
    for _ in range(args.epochs):
        for index in torch.randperm(len(rollout["action"])).split(args.batch_size):
            index = index.to(rollout["action"].device)
            loss, scalars = loss_of(agent, {name: x[index] for name, x in rollout.items()}, args)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm, foreach=True)
            optimizer.step()
            totals, count = {name: totals.get(name, 0.0) + x.detach() for name, x in scalars.items()}, count + 1
    return {name: total / count for name, total in totals.items()}


def gumbel(shape: tuple[int, ...], generator: torch.Generator | None = None) -> torch.Tensor:
    """Noise that makes the argmax of log-probabilities a draw from them."""
    return -(-torch.rand(shape, generator=generator).clamp(1e-10, 1 - 1e-7).log()).log()


def main(args: Args) -> dict[str, float]:
    """Train, resume or evaluate, as `args` say; returns the last evaluation (keys: runtime.EVALUATION)."""
    args = replace(args, init_from=args.init_from and str(Path(args.init_from).resolve()))  # later runs come back to it
    saved, env_id = None, args.env or "MiniGrid-DoorKey-5x5-v0"
    if folder := args.resume or args.evaluate:
        stored, saved = load_run(folder, ALGO, Args)
        env_id, args = (args.env, replace(args, env=stored.env)) if args.evaluate and args.env else (stored.env, args)
        args = continued(stored, args, "resume", if_named=["total_timesteps", "device"]) if args.resume else continued(
            stored, args, "evaluate", "eval_episodes", "video", "device", if_named=["eval_select"])
    else:
        args = replace(args, env=env_id)
    require_positive(args, "total_timesteps", "num_envs", "eval_episodes", "num_steps", "epochs", "batch_size",
                     "learning_rate", "clip", "max_grad_norm")
    require_range(args, 0, 1, "gamma", "gae_lambda")
    require_range(args, 0, math.inf, "entropy_coef", "value_coef", "bc_coef", "sharpness", "video")
    device = pick_device(args.device)
    torch.manual_seed(args.seed)

    vec = envs.make_vec(env_id, args.num_envs)
    if not isinstance(vec.action_space, gym.spaces.Discrete):
        raise ArgError(f"{env_id} has {vec.action_space} actions; {ALGO} needs discrete ones; use algos/sac_kian.py")
    num_actions = int(vec.action_space.n)
    asked = args
    if args.official:
        args = replace(args, inner_key="head", fusion="auto", sharpness=1.0, silent="uniform", entropy_of="fused")
    if args.fusion == "auto":
        args = replace(args, fusion="logit" if num_actions <= 3 else "mixture")
    if saved and len(saved["agent"]["inner.bias"]) != num_actions:
        raise ArgError(f"{env_id} has {num_actions} actions; {folder}, trained in {args.env}, has others")
    if vec.is_goal_env:
        raise ArgError(f"{env_id} has goals; {ALGO} needs a flat array or a MiniGrid view")
    obs = envs.to_tensors(vec.reset(10_000 * args.seed))  # environment i has stream 10,000 seed + i
    if args.init_from and args.load_keys:
        raise ArgError("--init-from gives keys already; leave --load-keys out")
    given = "none" if args.actor == "plain" and not args.bc_coef else args.knowledge
    given += args.init_from and f",inner:{args.init_from}"
    external = knowledge.load(given, args.env, num_actions, obs, lowest=0.0, kept_in=folder)
    n, names = len(external), ["inner", *external]
    if not n and (args.actor in ("rule", "mix") or args.bc_coef):
        raise ArgError(f"{'--bc-coef' if args.bc_coef else '--actor ' + args.actor} needs a knowledge policy")
    attends = n > 0 and args.actor == "kian"
    knowledge.check_keys_file("" if folder else args.save_keys, attends)

    def look(obs: torch.Tensor | dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """What the agent sees of a batch, (B, 7, 7, 3) or (B, f), and the advice (B, n, A)."""
        seen = obs["image"] if isinstance(obs, dict) else obs
        return seen.to(device), knowledge.advise(external, obs, num_actions, lowest=0.0).float().to(device)

    agent = Agent(args, look(obs)[0].shape[1:], num_actions, n)
    if (source := args.init_from or args.load_keys) and not saved:
        knowledge.take_over(dict(agent.named_parameters()), None, names, source, args.warm)
    agent.to(device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, fused=True)
    step, tally = 0, {"open": torch.zeros(args.num_envs, dtype=torch.float64), "returns": []}  # since the last log
    if saved:
        try:
            agent.load_state_dict(saved["agent"])
        except RuntimeError as error:
            raise ArgError(f"{folder} was trained in {args.env}; {env_id} looks different to its networks") from error
        optimizer.load_state_dict(saved["optimizer"])
        step = saved["step"]

    def player(log: list | None = None) -> envs.Act:
        """The agent in evaluation. Appends weights and who acts to `log`."""
        generator = torch.Generator().manual_seed(args.seed)  # training's own stream must not notice evaluations

        @torch.no_grad()
        def play(obs: envs.Observation) -> np.ndarray:
            output = agent(*look(envs.to_tensors(obs)), args)
            log_probs = output.log_probs.cpu()
            action = (log_probs + sampled * gumbel(log_probs.shape, generator)).argmax(1)
            if log is not None and output.log_weights is not None:  # acts: who gave the action most of its chance
                who = output.joint[0, :, action[0]].argmax()
                log.append((output.log_weights[0].exp().tolist(), int(who)))
            return action.numpy()
        return play

    eval_vec, sampled = envs.make_vec(env_id, min(100, args.eval_episodes)), args.eval_select == "sample"

    def evaluate() -> dict[str, float]:
        return envs.evaluate(player(), eval_vec, args.eval_episodes, 10_000 * args.seed + 5_000)

    def film(folder: Path) -> None:
        envs.record(player(log := []), env_id, args.video, 10_000 * args.seed + 7_000, folder,
                    names if attends and args.fusion == "mixture" else [], log)

    if args.evaluate:
        result = evaluate()
        print(f"{env_id} after {step} steps in {args.env}:", ", ".join(f"{k} {v:.3f}" for k, v in result.items()))
        film(Path(args.evaluate, "video", "" if env_id == args.env else env_id))
        return result

    if saved:
        if step >= args.total_timesteps:
            raise ArgError(f"{folder} is at {step} steps; give it more --total-timesteps, or --evaluate it")
        envs.restore(vec, saved["envs"])
        torch.set_rng_state(saved["rng"])
        obs, tally = saved["obs"], saved["tally"]
    run = Run(ALGO, asked, envs.resolve(env_id), step, saved["wall_s"] if saved else 0.0)
    knowledge.keep(given, run.folder)
    loss_of = torch.compile(ppo_loss, dynamic=False) if args.compile and can_compile(device) else ppo_loss
    if not saved:
        run.log_evaluation(0, evaluate())  # the untrained agent
    stop = 0
    while step < args.total_timesteps and not stop:
        rollout, obs = collect(agent, vec, obs, look, tally, args)
        before, step = step, step + args.num_steps * args.num_envs
        with finishing():  # the first update may start a compiler
            scalars = {} if args.actor in ("rule", "mix") else update(agent, optimizer, rollout, loss_of, args)

        def due(every: int) -> bool:
            return every > 0 and step // every > before // every
        over = step >= args.total_timesteps
        run.bar.update(step - before)
        if due(LOG_EVERY):
            finished, tally["returns"] = tally["returns"], []
            run.log(step, scalars | ({"return": sum(finished) / len(finished)} if finished else {}), names)
        if over or due(args.eval_every):
            run.log_evaluation(step, result := evaluate())
        if (stop := run.stop) or over or due(args.checkpoint_every):
            policy = knowledge.freeze_categorical(agent, names, args, given)
            run.save({"agent": agent.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "obs": obs,
                      "tally": tally, "envs": envs.snapshot(vec), "rng": torch.get_rng_state(),
                      "wall_s": run.wall_s(), "policy": policy})
    run.close(step < args.total_timesteps)  # a stopped run ends here
    film(run.folder / "video")
    if args.save_keys:
        knowledge.save_keys(args.save_keys, policy)
    return result


if __name__ == "__main__":
    with exit_codes(ALGO, envs.EnvError, knowledge.KnowledgeError):
        main(tyro.cli(Args))
