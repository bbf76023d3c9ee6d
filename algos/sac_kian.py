"""SAC-KIAN: soft actor-critic whose actor fuses its own policy with external knowledge policies by attention.

Chiu et al., "Flexible Attention-Based Multi-Policy Fusion for Efficient Deep RL", NeurIPS 2023 (arXiv 2210.03729).
The query of a state meets one key per policy, the inner (trained) one included; the softmax of the scores says how
likely each policy acts (Eqs. 1-2). One is drawn per step and its action is executed. Critics are SAC's, with hindsight
goals (HER) on goal environments. `--knowledge none` and `--actor plain` are SAC + HER itself.

Departures from the paper; flags undo each, docs/sac_kian.md has the reasons and the measurements:
- attention is taught, in every state, which policy's action the critics value most, and the inner policy is a SAC actor
  in every state; the paper trains both through the action drawn, and scores every policy at its own action in the
  entropy bonus (--credit drawn);
- an inner policy looks better to its critics than it is, for it maximises their errors. It practises alone in some
  episodes; until its returns there are nearly the agent's best, rules act and it imitates those attended to; then
  attention alone decides, ever more sharply, and the imitation fades. Rules that were of no help are dropped; if
  nothing was learned either, the agent begins anew, as plain SAC. --practice 0 switches all this off;
- scores are 3 cos(query, key); small networks, few updates, normalised inputs, some uniform actions: minutes, not days.

python algos/sac_kian.py --env FetchPickAndPlace-v2   # success 0.9 after 20,000 steps, 0.99 after 150,000
"""
import math
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy: its own threads fight with torch's for the cores
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch.utils._pytree import tree_map

import envs
import knowledge
from runtime import (ArgError, Run, can_compile, continued, exit_codes, finishing, hidden_layers, load_run,
                     pick_device, require_positive, require_range, use_fast_matmul)

ALGO = Path(__file__).stem  # names run folders and result tables
LOG_EVERY = 1000  # environment steps
KEY_DIM = 4  # width m of keys and query
HELD_BACK = 1e9  # log-odds against an inner policy that is not trusted yet, or against rules that were of no help


@dataclass
class Args:
    """SAC + HER with external knowledge policies fused by attention (KIAN)."""
    env: str = "FetchPickAndPlace-v2"  # environment id; older Fetch ids become the installed one
    total_timesteps: int = 150_000  # environment steps, summed over environments; with --resume: a new total
    num_envs: int = 32  # environments stepped together
    goal_range: float = 0.0  # Fetch, Franka: tenths of the range of goals; 0: all. With --evaluate, left out: as it was
    eval_every: int = 10_000  # environment steps between evaluations; 0: only at start and end
    eval_episodes: int = 50  # episodes per evaluation; the last evaluation plays twice as many
    checkpoint_every: int = 50_000  # environment steps between checkpoints; 0: only at the end
    compile: bool = True  # compile the update into one graph: about 30 s at the first start, then up to twice as fast
    device: Literal["auto", "cpu", "cuda"] = "auto"  # of the networks; auto: a GPU if there is one
    video: int = 0  # episodes to film after training, or with --evaluate
    # twin: run arguments
    seed: int = 1  # of all that is random: networks, environments, exploration
    run_dir: str = ""  # run folder; empty: runs/<algo>/<env>/seed<k>-<time>
    resume: str = ""  # run folder to continue exactly, with the arguments it has
    evaluate: str = ""  # run folder to evaluate; no training
    track: bool = False  # mirror scalars to Weights & Biases (pip install wandb)
    # twin end

    # algorithm: SAC + HER; the paper's values are those of its Fetch experiments
    bf16: bool = False  # hidden layers in bfloat16: for GPUs and CPUs with avx512_bf16 or AMX
    hidden: str = "256x3"  # hidden layers of actor and critics, width x depth (paper: 512x3)
    batch_size: int = 512  # transitions per update (paper: 2048)
    buffer_size: int = 1_000_000  # transitions that are kept, the oldest go first; an episode per environment at least
    learning_rate: float = 1e-3  # Adam, for actor, critics and temperature (paper: 5e-4, Slide 4e-4)
    gamma: float = 0.95  # discount per step
    tau: float = 0.05  # share of the critics that enters their targets per update
    updates_per_step: float = 0.1  # updates per environment step (paper: 1)
    her_goals: int = 4  # hindsight goals per real one, strategy "future", on goal environments; 0: no HER
    initial_temperature: float = 1.0  # alpha at the start, then tuned to an entropy of -d
    random_actions: float = 0.2  # share of the inner policy's actions, practice apart, made uniform ones (paper: 0)
    normalize: bool = True  # inputs shifted and scaled by running statistics, clipped to +-5 (paper: off)

    # method: KIAN
    actor: Literal["kian", "plain", "kogun", "a2t"] = "kian"  # attention; none; advice as input; naive mixture
    knowledge: str = "auto"  # auto, none, rules, groups, your_file.py, run:<RUN_DIR>; comma-separated
    inner_key: Literal["vector", "head"] = "vector"  # key of the inner policy: one vector, or a function of the state
    cosine_scale: float = 3.0  # attention scores are this times cos(query, key); 0: dot products (paper)
    ext_action: Literal["mean", "sample"] = "mean"  # a drawn rule executes its mean, or a sample around it; a2t: sample
    ext_log_std: float = -1.0  # log-std of sampled external actions, and of their entropy with --credit drawn
    entropy_fix: Literal["on", "off"] = "on"  # off: all scored at the executed action; implies --credit drawn
    credit: Literal["expected", "drawn"] = "expected"  # Q of all in the actor loss, or of the drawn (paper; no trust)
    practice: float = 0.25  # share of episodes that the inner policy plays alone until trusted; 0: no trust (paper)
    imitation: float = 1.0  # weight of imitating the attended rules beside Q, times the doubt; for --credit expected
    attention_temperature: float = 0.1  # T of softmax(Q / T), which attention is taught; falls after trust
    eval_select: Literal["sample", "argmax"] = "sample"  # evaluation draws who acts (paper), or takes the heaviest
    init_from: str = ""  # run folder whose keys are taken over by name, and whose inner policy becomes knowledge
    save_keys: str = ""  # JSON file to write the learned keys to, by policy name
    load_keys: str = ""  # keys to start from: such a file, or a run folder
    warm: Literal["keys", "keys+query", "all"] = "keys+query"  # what a run folder gives; all: the inner policy as well


# ranges of `make tune`: (low, high) on a log scale, or choices
TUNE = {"learning_rate": (3e-4, 3e-3), "tau": (0.01, 0.1), "initial_temperature": (0.01, 1.0),
        "updates_per_step": (0.05, 0.5), "batch_size": [256, 512, 1024], "random_actions": [0.0, 0.1, 0.2, 0.3]}


class ReplayBuffer:
    """The last `capacity` transitions of completed episodes, of at most `horizon` steps each; at least one episode per
    environment has room. Open episodes wait aside and are never sampled. With horizon 1 every transition is an episode.

    A transition is one row: features (f) | action (d) | reward | terminated | next features (f).
    """

    def __init__(self, capacity: int, horizon: int, num_envs: int, width: int):
        self.rows = torch.zeros(max(capacity, num_envs * horizon), width)  # a ring, the steps of an episode in a row
        self.left = torch.zeros(len(self.rows), dtype=torch.long)  # how many steps of its episode follow a row
        self.open_rows = torch.zeros(num_envs, horizon, width)
        self.open_lengths = torch.zeros(num_envs, dtype=torch.long)
        self.stored = 0  # rows so far

    def add(self, rows: torch.Tensor, ended: torch.Tensor) -> None:
        """One step of every environment: rows (num_envs, width); ended (num_envs,) bool, the episode is over."""
        horizon = self.open_rows.shape[1]
        self.open_rows[torch.arange(len(rows)), self.open_lengths] = rows
        self.open_lengths += 1
        done = ended | (self.open_lengths == horizon)
        left = self.open_lengths[done].unsqueeze(1) - 1 - torch.arange(horizon)  # (k, horizon); below 0: no row
        held = left >= 0
        slots = (self.stored + torch.arange(int(held.sum()))) % len(self.rows)
        self.rows[slots], self.left[slots] = self.open_rows[done][held], left[held]
        self.open_lengths[done] = 0
        self.stored += len(slots)

    def sample(self, batch_size: int, relabelled: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Random transitions (B, width), and for the first `relabelled` a later row of the same episode, whose
        achieved goal is to become theirs (HER, strategy "future"): fewer where most rows end their episode."""
        n = min(self.stored, len(self.rows))
        first = torch.randint(n, (2 * relabelled,))  # twice as many: the last step of an episode has no later one
        first = first[self.left[first] > 0][:relabelled]
        index = torch.cat([first, torch.randint(n, (batch_size - len(first),))])
        ahead = 1 + (torch.rand(len(first)) * self.left[first]).long()  # 1 to left
        return self.rows[index], self.rows[(first + ahead) % len(self.rows)]

    def state_dict(self) -> dict:
        n = min(self.stored, len(self.rows))  # the rest is empty
        return vars(self) | {"rows": self.rows[:n].clone(), "left": self.left[:n].clone()}

    def load_state_dict(self, state: dict) -> None:
        n, rows, left = len(state["rows"]), self.rows, self.left
        rows[:n], left[:n] = state["rows"], state["left"]
        vars(self).update(state, rows=rows, left=left)


def scaled(features: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, args: Args) -> torch.Tensor:
    """What networks see of features (B, f)."""
    return ((features - mean) / std).clamp(-5, 5) if args.normalize else features


# Networks are dicts of tensors, {"inner.0.weight": ..., "inner.0.bias": ...}, and losses are functions of them: what
# torch.func differentiates, and what torch.compile turns into one graph with both optimisers inside.
def init_mlp(name: str, sizes: list[int], stack: tuple[int, ...] = ()) -> dict[str, torch.Tensor]:
    """Parameters of a ReLU network in PyTorch's default initialisation; `stack=(2,)` makes two side by side."""
    params = {}
    for i, (fan_in, fan_out) in enumerate(zip(sizes, sizes[1:])):
        bound = fan_in ** -0.5
        params[f"{name}.{i}.weight"] = torch.empty(*stack, fan_in, fan_out).uniform_(-bound, bound)
        params[f"{name}.{i}.bias"] = torch.empty(*stack, *(1,) * len(stack), fan_out).uniform_(-bound, bound)
    return params


def mlp(params: dict[str, torch.Tensor], name: str, x: torch.Tensor, bf16: bool = False) -> torch.Tensor:
    """(B, in) -> (B, out), or (2, B, out) of two networks side by side. bf16 spares the output layer: a Q-value in
    bfloat16 has three digits."""
    depth = sum(f"{name}.{i}.weight" in params for i in range(len(params)))
    for i in range(depth):
        weight, bias = params[f"{name}.{i}.weight"], params[f"{name}.{i}.bias"]
        if i == depth - 1:
            return torch.matmul(x.to(weight.dtype), weight) + bias
        if bf16:
            x, weight, bias = x.bfloat16(), weight.bfloat16(), bias.bfloat16()
        x = F.relu(torch.matmul(x, weight) + bias)


def gaussian_log_prob(x: torch.Tensor, mean: torch.Tensor, log_std: torch.Tensor | float) -> torch.Tensor:
    """Log-density of a diagonal Gaussian, (..., d) -> (...)."""
    std = log_std.exp() if torch.is_tensor(log_std) else math.exp(log_std)
    return (-0.5 * ((x - mean) / std).square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


def squash_log_prob(log_prob: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
    """Log-density of action = tanh(u) (B, d) from that of u (B,)."""
    return log_prob - torch.log(1 - action.square() + 1e-6).sum(-1)


def attention_scores(query: torch.Tensor, keys: torch.Tensor, cosine_scale: float) -> torch.Tensor:
    """Query (B, m), keys (n+1, m) or (B, n+1, m), inner first -> scores (B, n+1) of the policies (Eqs. 1-2)."""
    if cosine_scale > 0:
        query, keys = cosine_scale * F.normalize(query, dim=-1), F.normalize(keys, dim=-1)
    return (query.unsqueeze(1) * keys).sum(-1)  # (B, 1, m) * (n+1, m) -> (B, n+1)


def select(scores: torch.Tensor, gumbel: torch.Tensor) -> torch.Tensor:
    """One-hot draw from softmax(scores) (B, n+1), straight-through gradient; without noise, the argmax. Noise goes to
    raw scores: added to their softmax, the draw would be flatter than the weights say."""
    soft = torch.softmax(scores + gumbel, -1)
    return F.one_hot((scores + gumbel).argmax(-1), scores.shape[-1]) + (soft - soft.detach())


def surrogate_log_prob(log_weights: torch.Tensor, log_probs: torch.Tensor) -> torch.Tensor:
    """log sum_i w_i p_i(a_i), every policy scored at its *own* action: (B, n+1), (B, n+1) -> (B,). Not the density of
    the executed action, which under all policies but the one drawn may be e^-1000; -18 bounds the log, as published."""
    return torch.logsumexp(log_weights + log_probs.clamp(min=-18.0), -1)


class Noise(NamedTuple):
    gaussian: torch.Tensor  # (B, n+1, d)
    gumbel: torch.Tensor  # (B, n+1)


class Decision(NamedTuple):
    action: torch.Tensor  # (B, d), executed
    actions: torch.Tensor  # (B, n+1, d), what each policy would do, inner first
    log_prob: torch.Tensor  # (B,)
    log_weights: torch.Tensor  # (B, n+1), inner policy first
    selected: torch.Tensor  # (B, n+1), one-hot
    inner_log_prob: torch.Tensor  # (B,)
    query: torch.Tensor  # (B, m)


def draw_noise(batch: int, n: int, d: int, generator: torch.Generator | None = None) -> Noise:
    """Fresh noise for `decide`: n external policies, d action dimensions."""
    uniform = torch.rand(batch, n + 1, generator=generator).clamp(1e-10, 1 - 1e-7)
    return Noise(torch.randn(batch, n + 1, d, generator=generator), -(-uniform.log()).log())


def decide(actor: dict, features: torch.Tensor, advice: torch.Tensor, noise: Noise, args: Args) -> Decision:
    """Features (B, f) and the actions of n external policies (B, n, d) -> who acts, what is done, its log-prob."""
    inputs = torch.cat([features, advice.flatten(1)], 1) if args.actor == "kogun" else features
    mean, log_std = mlp(actor, "inner", inputs, args.bf16).chunk(2, -1)
    log_std = log_std.clamp(-20, 2)
    u = mean + log_std.exp() * noise.gaussian[:, 0]
    inner_action = torch.tanh(u)
    inner_log_prob = squash_log_prob(gaussian_log_prob(u, mean, log_std), inner_action)
    if advice.shape[1] == 0 or args.actor in ("plain", "kogun"):  # nothing to attend to: SAC
        one = torch.ones_like(mean[:, :1])
        return Decision(inner_action, inner_action.unsqueeze(1), inner_log_prob, one * 0, one, inner_log_prob, one)

    query = mlp(actor, "query", features)
    if args.actor == "a2t":
        scores = query  # (B, n+1)
    else:
        keys = actor["keys"]  # (n+1, m)
        if args.inner_key == "head":  # the query network ends in query | key of the inner policy
            query, inner_key = query.chunk(2, -1)
            keys = torch.cat([inner_key.unsqueeze(1), keys[1:].expand(len(query), -1, -1)], 1)  # (B, n+1, m)
        scores = attention_scores(query, keys, args.cosine_scale)
    scores = scores - actor["handicap"]  # (n+1,), of the inner policy, held back; below 0: rules are dropped
    log_weights = torch.log_softmax(scores, -1)
    selected = select(scores, noise.gumbel)

    external = advice
    if args.ext_action == "sample" or args.entropy_fix == "off":
        external = (advice + math.exp(args.ext_log_std) * noise.gaussian[:, 1:]).clamp(-1, 1)
    actions = torch.cat([inner_action.unsqueeze(1), external], 1)  # (B, n+1, d)
    action = (selected.unsqueeze(-1) * actions).sum(1)  # (B, d)
    if args.entropy_fix == "off":  # every policy scored at the executed action; rules reach +-1: no atanh there
        inside = action.clamp(-1 + 1e-6, 1 - 1e-6)
        inner = squash_log_prob(gaussian_log_prob(torch.atanh(inside), mean, log_std), inside)
        others = gaussian_log_prob(inside.unsqueeze(1), advice, args.ext_log_std)  # (B, n)
        log_prob = torch.logsumexp(log_weights + torch.cat([inner.unsqueeze(1), others], 1), -1)
    elif args.credit == "expected":  # entropy is asked of the inner policy alone: rules have none to give
        log_prob = log_weights[:, 0].exp() * inner_log_prob
    else:
        others = gaussian_log_prob(external, advice, args.ext_log_std)  # (B, n); at the mean, a constant
        log_prob = surrogate_log_prob(log_weights, torch.cat([inner_log_prob.unsqueeze(1), others], 1))
    return Decision(action, actions, log_prob, log_weights, selected, inner_log_prob, query)


def critic_loss(critic: dict, inputs: torch.Tensor, target_q: torch.Tensor, args: Args) -> torch.Tensor:
    return 0.5 * (mlp(critic, "q", inputs, args.bf16).squeeze(-1) - target_q).square().mean(1).sum()  # of (2, B)


def actor_loss(actor: dict, critic: dict, alpha: torch.Tensor, features, advice, noise: Noise, args: Args):
    decision = decide(actor, features, advice, noise, args)
    def q_of(actions: torch.Tensor) -> torch.Tensor:  # (B, k, d) -> (2, B, k)
        inputs = torch.cat([features.unsqueeze(1).expand(-1, actions.shape[1], -1), actions], -1).flatten(0, 1)
        return mlp(critic, "q", inputs, args.bf16).view(2, len(features), -1)

    if args.credit == "drawn" or decision.actions.shape[1] == 1:
        q = q_of(decision.action.unsqueeze(1)).amin(0).squeeze(1)
        return (alpha * decision.log_prob - q).mean(), (decision, q, decision.log_prob)
    # Attention is taught who is worth most here, softmax(Q / temperature), by cross-entropy: unlike the gradient of the
    # drawn action's Q, it compares all policies in every state and does not fade where attention is nearly decided.
    inner_q, rule_q = q_of(decision.actions[:, :1]).amin(0), q_of(decision.actions[:, 1:].detach()).amin(0)
    q = torch.cat([inner_q, rule_q], 1).detach()  # (B, n+1)
    worth = torch.softmax(q / actor["attention_temperature"] - actor["handicap"], 1)
    loss = alpha * decision.inner_log_prob - inner_q.squeeze(1)  # the inner policy: SAC in every state
    teachers = torch.softmax(decision.log_weights[:, 1:].detach(), 1)  # (B, n)
    distance = (decision.actions[:, :1] - decision.actions[:, 1:]).square().sum(-1)  # (B, n)
    loss = loss - (worth * decision.log_weights).sum(1) + actor["imitation"] * (teachers * distance).sum(1)
    return loss.mean(), (decision, (decision.log_weights.exp() * q).sum(1), decision.inner_log_prob)


def adam(params: dict, grads: dict, moments: dict, count: torch.Tensor, learning_rate: float) -> None:
    """Adam in place, all tensors at once. `count` is a tensor: as a number it would be compiled in as a constant."""
    m, v = list(moments["mean"].values()), list(moments["square"].values())
    p, g = [params[name] for name in moments["mean"]], [grads[name] for name in moments["mean"]]
    torch._foreach_lerp_(m, g, 1 - 0.9)
    torch._foreach_mul_(v, 0.999)
    torch._foreach_addcmul_(v, g, g, 1 - 0.999)
    scale = torch._foreach_sqrt(v)
    torch._foreach_div_(scale, (1 - 0.999 ** count).sqrt())
    torch._foreach_add_(scale, 1e-8)
    step = torch._foreach_div(m, scale)
    torch._foreach_mul_(step, learning_rate / (1 - 0.9 ** count))
    torch._foreach_sub_(p, step)


def update(agent: dict, batch: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, advice: torch.Tensor,
           next_advice: torch.Tensor, noise: Noise, next_noise: Noise, args: Args) -> dict[str, torch.Tensor]:
    """One step of critics, actor, temperature and targets, in this order, on a batch (B, width) of raw rows. Changes
    `agent` in place, returns what is logged. The two noises are independent: a draw is never used in two places."""
    actor, critic, target, moments = (agent[k] for k in ("actor", "critic", "target", "moments"))
    f, d = len(mean), advice.shape[-1]
    features, next_features = (scaled(x, mean, std, args) for x in (batch[:, :f], batch[:, f + d + 2:]))
    action, reward, terminated = batch[:, f:f + d], batch[:, f + d], batch[:, f + d + 1]
    alpha = agent["temperature"]["log_alpha"].exp()  # all losses see it as it was before its own step
    agent["count"] += 1

    following = decide(actor, next_features, next_advice, next_noise, args)
    next_q = mlp(target, "q", torch.cat([next_features, following.action], 1), args.bf16).squeeze(-1).amin(0)  # (B,)
    target_q = reward + args.gamma * (1 - terminated) * (next_q - alpha * following.log_prob)  # truncation bootstraps
    grads, q_loss = torch.func.grad_and_value(critic_loss)(critic, torch.cat([features, action], 1), target_q, args)
    adam(critic, grads, moments["critic"], agent["count"], args.learning_rate)

    grads, (pi_loss, (decision, q, log_prob)) = torch.func.grad_and_value(actor_loss, has_aux=True)(
        actor, critic, alpha, features, advice, noise, args)
    adam(actor, grads, moments["actor"], agent["count"], args.learning_rate)
    grads = {"log_alpha": d - log_prob.mean()}  # of -log_alpha (log_prob + target entropy), which is -d
    adam(agent["temperature"], grads, moments["temperature"], agent["count"], args.learning_rate)
    torch._foreach_lerp_(list(target.values()), list(critic.values()), args.tau)
    scalars = {"critic_loss": q_loss, "actor_loss": pi_loss, "q": q.mean(), "alpha": alpha, "entropy": -log_prob.mean(),
               "inner_log_prob": decision.inner_log_prob.mean(), "query_norm": decision.query.norm(dim=-1).mean(),
               "attention": decision.log_weights.exp().mean(0), "selected": decision.selected.mean(0)}
    return scalars | ({"key_norm": actor["keys"][args.inner_key == "head":].norm(dim=-1)} if "keys" in actor else {})


def relabel(batch: torch.Tensor, later: torch.Tensor, f: int, g: int, d: int, vec: envs.VectorEnv) -> None:
    """Give the first rows of `batch` the goals that `later` achieved, and the rewards they then earn. In place."""
    r, goal, start = len(later), later[:, :g], f + d + 2  # start: of the next features
    batch[:r, g:2 * g] = batch[:r, start + g:start + 2 * g] = goal
    reward = vec.compute_reward(batch[:r, start:start + g].numpy(), goal.numpy())
    batch[:r, f + d] = torch.as_tensor(reward, dtype=torch.float32)


def make_agent(args: Args, f: int, d: int, n: int) -> dict:
    """Fresh parameters and optimiser state. Critics and inner policy come first: one seed, one start for any actor."""
    hidden = hidden_layers(args.hidden)
    critic = init_mlp("q", [f + d, *hidden, 1], stack=(2,))
    actor = init_mlp("inner", [f + (n * d if args.actor == "kogun" else 0), *hidden, 2 * d])
    if n and args.actor == "a2t":
        actor |= init_mlp("query", [f, 64, 64, n + 1])
    if n and args.actor == "kian":
        actor |= init_mlp("query", [f, 64, 64, 2 * KEY_DIM if args.inner_key == "head" else KEY_DIM])
        actor["keys"] = torch.randn(n + 1, KEY_DIM)
    trained = {"actor": actor, "critic": critic,
               "temperature": {"log_alpha": torch.tensor(math.log(args.initial_temperature))}}
    moments = {group: {kind: {k: torch.zeros_like(p) for k, p in params.items()} for kind in ("mean", "square")}
               for group, params in trained.items()}
    if n and args.actor in ("kian", "a2t"):
        actor |= {"handicap": torch.zeros(n + 1), "imitation": torch.zeros(()),
                  "attention_temperature": torch.tensor(args.attention_temperature)}  # set by `main`, not trained
    return trained | {"target": {k: p.clone() for k, p in critic.items()}, "moments": moments, "count": torch.zeros(())}


@torch.no_grad()  # gradients are taken by torch.func, inside `update`
def main(args: Args) -> dict[str, float]:
    """Train, resume or evaluate, as `args` say; returns the last evaluation (keys: runtime.EVALUATION)."""
    saved, args = None, replace(args, init_from=args.init_from and str(Path(args.init_from).resolve()))
    if folder := args.resume or args.evaluate:
        stored, saved = load_run(folder, ALGO, Args)
        args = continued(stored, args, "resume", if_named=["total_timesteps", "device"]) if args.resume else continued(
            stored, args, "evaluate", "eval_episodes", "video", "device", if_named=["goal_range", "eval_select"])
        if args.resume and saved["step"] >= args.total_timesteps:
            raise ArgError(f"{folder} is at {saved['step']} steps; give it more --total-timesteps, or --evaluate it")
    require_positive(args, "total_timesteps", "num_envs", "eval_episodes", "batch_size", "buffer_size",
                     "learning_rate", "updates_per_step", "initial_temperature", "attention_temperature")
    require_range(args, 0, 1, "gamma", "tau", "random_actions")
    require_range(args, 0, 0.99, "practice")  # trust compares it with episodes of the whole agent
    require_range(args, 0, math.inf, "eval_every", "checkpoint_every", "video", "her_goals")
    require_range(args, 0, math.inf, "cosine_scale", "imitation")
    require_range(args, -20, 2, "ext_log_std")
    if args.init_from and args.load_keys:
        raise ArgError("--init-from gives keys already; leave --load-keys out")
    asked = args
    if args.actor == "a2t" or args.entropy_fix == "off":  # the naive mixture has no policy-wise terms
        args = replace(args, entropy_fix="off", credit="drawn")
    args = replace(args, practice=args.practice * (args.credit != "drawn"))  # held back, it would never be drawn
    torch.manual_seed(args.seed)
    use_fast_matmul(device := pick_device(args.device))

    vec, eval_vec = (envs.make_vec(args.env, k, threads=torch.get_num_threads(), goal_range=args.goal_range)
                     for k in (args.num_envs, min(32, args.eval_episodes)))
    if not isinstance(vec.action_space, gym.spaces.Box):
        raise ArgError(f"{args.env} has {vec.action_space} actions; {ALGO} needs continuous ones (Box)")
    obs = vec.reset(10_000 * args.seed)  # environment i has stream 10,000 seed + i: no two seeds share one
    features = envs.flatten(obs)
    f, d, g = features.shape[1], vec.action_space.shape[0], obs["desired_goal"].shape[1] if vec.is_goal_env else 0
    given = "none" if args.actor == "plain" else args.knowledge + (args.init_from and f",inner:{args.init_from}")
    external = knowledge.load(given, args.env, d, envs.unflatten(features.repeat(2, 1), g), kept_in=folder)
    n, names, attends = len(external), ["inner", *external], len(external) > 0 and args.actor in ("kian", "a2t")
    agent = make_agent(args, f, d, n)
    knowledge.check_keys_file("" if folder else args.save_keys, "keys" in agent["actor"])
    limit, relabelled = vec.max_episode_steps, int(args.batch_size * args.her_goals / (args.her_goals + 1)) if g else 0
    if relabelled and limit is None:
        raise ArgError(f"{args.env} has no time limit: hindsight stores whole episodes; use --her-goals 0")
    horizon = limit if relabelled else 1
    first = math.ceil(args.batch_size / (args.num_envs * horizon)) * args.num_envs * horizon  # whole episodes
    if args.total_timesteps <= first:
        raise ArgError(f"the first update waits for {first} steps: raise --total-timesteps")
    capacity = min(args.buffer_size, args.total_timesteps + args.num_envs)  # the last step may pass the total
    buffer = ReplayBuffer(capacity, horizon, args.num_envs, 2 * f + d + 2)
    normalizer = envs.Normalizer(f, args.normalize)
    if (source := args.init_from or args.load_keys) and not saved:
        knowledge.take_over(agent["actor"], normalizer, names, source, args.warm, args.cosine_scale > 0)
    practice = args.practice if attends else 0.0
    alone = torch.rand(args.num_envs) < practice  # which environments the inner policy plays alone
    trust = knowledge.Trust(args.num_envs, trusted=practice == 0)
    if practice and limit and not saved and args.total_timesteps <= first + limit * (trust.FIRST + args.num_envs):
        print(f"rules alone act for {trust.FIRST} episodes or more, perhaps to the end (--practice)", file=sys.stderr)
    step, debt, updates, totals = 0, 0.0, 0, {}  # debt: updates owed; totals: since the last log
    parts = {"normalizer": normalizer, "trust": trust, "buffer": buffer}
    if saved:
        agent, step, debt, updates, totals, features, alone = (saved[name] for name in (
            "agent", "step", "debt", "updates", "totals", "features", "alone"))
        for name in parts if args.resume else ("normalizer",):
            parts[name].load_state_dict(saved[name])
    agent, totals = tree_map(lambda x: x.to(device), (agent, totals))
    sampled = args.eval_select == "sample"

    def choose(features: torch.Tensor, noise: Noise) -> Decision:
        advice = knowledge.advise(external, envs.unflatten(features, g), d)
        inputs = tree_map(lambda x: x.to(device), (scaled(features, *normalizer.stats(), args), advice, noise))
        return tree_map(lambda x: x.cpu(), decide(agent["actor"], *inputs, args))

    def player(draw: bool, log: list) -> envs.Act:
        """The agent without exploration; with `draw`, who acts is drawn. Appends weights and who acts to `log`."""
        generator = torch.Generator().manual_seed(args.seed)  # training's own stream must not notice evaluations
        def play(obs: envs.Observation) -> np.ndarray:
            noise = draw_noise(len(features := envs.flatten(obs)), n, d, generator)
            decision = choose(features, Noise(noise.gaussian * 0, noise.gumbel * draw))
            log.append((decision.log_weights[0].exp().tolist(), int(decision.selected[0].argmax())))
            return vec.to_box(decision.action.numpy())
        return play

    def evaluate(episodes: int, draw: bool = sampled) -> dict[str, float]:
        return envs.evaluate(player(draw, []), eval_vec, episodes, 10_000 * args.seed + 5_000)

    def film(folder: Path) -> None:
        envs.record(player(sampled, log := []), args.env, args.video, 10_000 * args.seed + 7_000, folder,
                    names if attends else [], log, goal_range=args.goal_range)
        if attends and agent["actor"]["handicap"][0] > 0:
            print("in evaluations rules alone act as yet: the trained policy lags behind them (doubt)", file=sys.stderr)

    if args.evaluate:
        for draw in (not sampled, sampled) if attends else (False,):
            result = evaluate(args.eval_episodes, draw)
            who = f", {'sampled' if draw else 'heaviest'} policy acts" if attends else ""
            print(f"{args.env} after {step} steps{who}:", ", ".join(f"{k} {value:.3f}" for k, value in result.items()))
        film(Path(args.evaluate, "video"))
        return result

    if saved:
        envs.restore(vec, saved["envs"])
        torch.set_rng_state(saved["rng"])
    run, stop = Run(ALGO, asked, envs.resolve(args.env), step, saved["wall_s"] if saved else 0.0), 0
    knowledge.keep(given, run.folder)
    learn = torch.compile(update, fullgraph=True, dynamic=False) if args.compile and can_compile(device) else update
    while step < args.total_timesteps and not stop:
        learning = buffer.stored >= args.batch_size

        # act
        if practice:  # without it, nothing is held back, imitated or sharpened
            if not (trust.helped or trust.learned) and agent["actor"]["handicap"][0] > 0:  # just found out
                agent = tree_map(lambda x: x.to(device), make_agent(args, f, d, n))  # what it learned is in the way
            agent["actor"]["handicap"][0] = HELD_BACK * (not trust.trusted) if trust.helped else -HELD_BACK
            agent["actor"]["imitation"].fill_(args.imitation * trust.doubt)
            agent["actor"]["attention_temperature"].fill_(max(args.attention_temperature * trust.caution, 1e-4))
        if step == 0:
            run.log_evaluation(0, evaluate(args.eval_episodes))  # the untrained agent
        action = 2 * torch.rand(args.num_envs, d) - 1
        if learning:
            decision = choose(features, draw_noise(args.num_envs, n, d))
            explore = ~alone & (decision.selected[:, 0] == 1) & (torch.rand(args.num_envs) < args.random_actions)
            chosen = torch.where(alone.unsqueeze(1), decision.actions[:, 0], decision.action)
            action = torch.where(explore.unsqueeze(1), action, chosen)
        obs, reward, terminated, truncated, info = vec.step(vec.to_box(action.numpy()))

        # store: where an episode ended, obs already belongs to the next one, and final_obs to this one
        flags = torch.from_numpy(np.stack([reward, terminated], 1).astype(np.float32))  # (num_envs, 2)
        ended = torch.from_numpy(terminated | truncated)
        buffer.add(torch.cat([features, action, flags, envs.flatten(info["final_obs"])], 1), ended)
        trust.add(flags[:, 0], alone, ended, uniform=not learning)
        alone = torch.where(ended, torch.rand(args.num_envs) < practice * (not trust.trusted), alone)
        normalizer.add(features)
        features = envs.flatten(obs)
        before, step = step, step + args.num_envs

        # update
        debt += learning * args.num_envs * args.updates_per_step
        while debt >= 1:
            batch, later = buffer.sample(args.batch_size, relabelled)
            if relabelled:
                relabel(batch, later, f, g, d, vec)
            advice, next_advice = (knowledge.advise(external, envs.unflatten(x, g), d)
                                   for x in (batch[:, :f], batch[:, f + d + 2:]))  # of the new goals
            noise, next_noise = draw_noise(args.batch_size, n, d), draw_noise(args.batch_size, n, d)
            inputs = (batch, *normalizer.stats(), advice, next_advice, noise, next_noise)
            with finishing():  # the first call starts a compiler
                scalars = learn(agent, *tree_map(lambda x: x.to(device), inputs), args)
            totals = {name: totals.get(name, 0.0) + x for name, x in scalars.items()}
            debt, updates = debt - 1, updates + 1

        # log, evaluate, save
        def due(every: int) -> bool:
            return every > 0 and step // every > before // every
        over = step >= args.total_timesteps
        run.bar.update(args.num_envs)
        if updates and due(LOG_EVERY):
            run.log(step, {name: total / updates for name, total in totals.items()} | {"return": trust.agent,
                "return_alone": trust.alone, "doubt": trust.doubt}, names if attends else names[:1])
            updates, totals = 0, {}
        if over or due(args.eval_every):
            run.log_evaluation(step, result := evaluate(args.eval_episodes * (2 if over else 1)))
        if (stop := run.stop) or over or due(args.checkpoint_every):
            policy = knowledge.freeze(agent["actor"], names, args, given, normalizer.stats(), g)
            run.save({"agent": agent, "step": step, "debt": debt, "updates": updates, "totals": totals,
                      "features": features, "alone": alone, "envs": envs.snapshot(vec), "rng": torch.get_rng_state(),
                      "wall_s": run.wall_s(), **{name: part.state_dict() for name, part in parts.items()},
                      "policy": policy})
    run.close(step < args.total_timesteps)  # a stopped run ends here
    film(run.folder / "video")
    if args.save_keys:
        knowledge.save_keys(args.save_keys, policy)
    return result


if __name__ == "__main__":
    with exit_codes(ALGO, envs.EnvError, knowledge.KnowledgeError):
        main(tyro.cli(Args))
