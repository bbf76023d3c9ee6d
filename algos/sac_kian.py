"""SAC-KIAN: soft actor-critic whose actor fuses its own policy with external policies by attention.

Chiu et al., "Flexible Attention-Based Multi-Policy Fusion for Efficient Deep RL", NeurIPS 2023 (arXiv 2210.03729).
Policy 0 is the inner policy, the Gaussian that SAC trains; policies 1 ... n are external ones, with actions a_i(s).
A network gives the query q(s), and every policy has a key k_i:

    w      = softmax_i of the scores of q(s) and k_i                                          (Eqs. 1-2)
    a      = a_i with i drawn from w in every step; a_0 is drawn from the inner policy
    log pi = log sum_i w_i p_i(a_i|s), every policy scored at its *own* action

The draw is made by Gumbel noise, and gradients pass it straight through. p_i(a_i) of an external policy is a constant,
the density of a Gaussian at its mean. Critics, replay and HER are SAC's: `diff algos/sac.py algos/sac_kian.py` is the
paper.

Departures: those of sac.py, and two constants. Without them attention goes to the inner policy before that policy can
do anything. Success on FetchPickAndPlace after 150,000 steps is 1.00 with both (three seeds), and 0.30 with both as
released (two seeds). docs/sac_kian.md has more:
- --ext-log-std 0.3 is the log-std of that Gaussian. With -1, as released, the entropy term pays for attention on the
  inner policy: success 0.34 (one seed).
- --cosine-scale 3 makes scores 3 cos(q, k_i). Dot products, as released (0), can decide attention early: success 1.00
  and 0.51 (two seeds).

python algos/sac_kian.py --env FetchPickAndPlace-v2
"""
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import start  # noqa: F401  before numpy

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map

import envs
import knowledge
import runtime
from buffers import Batch, ReplayBuffer
from networks import adam, adam_state, init_mlp, mlp

ALGO = Path(__file__).stem  # names run folders and result tables
LOG_EVERY = 1000  # environment steps
KEY_DIM = 4  # width m of keys and query


@dataclass
class Args:
    """SAC + HER with external policies fused by attention (KIAN)."""
    # twin: run arguments
    env: str = "FetchPickAndPlace-v2"  # environment id; an old Fetch id is replaced by the installed version
    seed: int = 1  # seed of all random numbers: networks, environments, exploration
    total_timesteps: int = 150_000  # environment steps, summed over environments; with --resume: a new total
    num_envs: int = 32  # environments stepped together
    eval_every: int = 10_000  # environment steps between evaluations; 0: only at start and end
    eval_episodes: int = 50  # episodes per evaluation; the last evaluation plays twice as many
    checkpoint_every: int = 50_000  # environment steps between checkpoints; 0: only at the end
    video: int = 0  # episodes to film after training, or with --evaluate
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where the networks run; auto: on a GPU if there is one
    compile: bool = True  # compile the update into one graph: about 30 s at the first start, then up to twice as fast
    run_dir: str = ""  # run folder; empty: runs/<algo>/<env>/seed<k>-<time>
    resume: str = ""  # run folder to continue exactly, with its own arguments
    evaluate: str = ""  # run folder to evaluate; no training
    track: bool = False  # also log scalars to Weights & Biases (pip install wandb)
    # twin end

    # algorithm
    hidden: str = "256x3"  # hidden layers of actor and critics, width x depth
    batch_size: int = 512  # transitions per update
    buffer_size: int = 1_000_000  # transitions kept for replay
    learning_rate: float = 1e-3  # Adam, for actor, critics and temperature
    gamma: float = 0.95  # discount per step
    tau: float = 0.05  # Polyak step of the target critics, per update
    updates_per_step: float = 0.1  # updates per environment step
    her_goals: int = 4  # hindsight goals per real goal, on tasks with goals; 0: no HER
    initial_temperature: float = 1.0  # alpha at the start; then it is tuned to an entropy of -d (d: size of an action)
    random_actions: float = 0.2  # share of actions that are uniform, for exploration
    normalize: bool = True  # inputs normalised by running mean and deviation, clipped to +-5
    goal_range: float = 0.0  # Fetch, Franka: goals come from this many tenths of their range; 0: from all of it

    # method: KIAN
    knowledge: str = "auto"  # auto, none, rules, groups, your_file.py, run:<RUN_DIR>; comma-separated
    cosine_scale: float = 3.0  # attention scores are this times cos(query, key); 0: dot products (paper)
    ext_log_std: float = 0.3  # log-std of the external policies in the entropy term (paper: -1)
    init_from: str = ""  # run folder: take over its query and, by name, its keys; its inner policy becomes external


# RANGES: limits of numbers; all others must be above 0. TUNE: for `make tune`, (low, high) on a log scale, or choices
RANGES = {"gamma": (0, 1), "tau": (0, 1), "her_goals": (0, math.inf), "random_actions": (0, 1), "goal_range": (0, 10),
          "cosine_scale": (0, math.inf), "ext_log_std": (-20, 2)}
TUNE = {"learning_rate": (3e-4, 3e-3), "tau": (0.01, 0.1), "initial_temperature": (0.01, 1.0),
        "updates_per_step": (0.05, 0.5), "batch_size": [256, 512, 1024], "random_actions": [0.0, 0.1, 0.2, 0.3]}


def gaussian_policy(params: dict, obs: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Observations (B, f), Gaussian noise (B, d), 0 for the mean -> action tanh(u) (B, d), its log-probability (B,)."""
    mean, log_std = mlp(params, "actor", obs).chunk(2, -1)
    log_std = log_std.clamp(-20, 2)
    action = torch.tanh(mean + log_std.exp() * noise)
    log_prob = (-0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)  # log N(u; mean, std)
    return action, log_prob - torch.log(1 - action.square() + 1e-6).sum(-1)  # change of variables u -> tanh(u)


class Seen(NamedTuple):
    features: torch.Tensor  # (B, f), normalised
    advice: torch.Tensor  # (B, n, d), the actions of the external policies


class Noise(NamedTuple):
    gaussian: torch.Tensor  # (B, d), for the action of the inner policy
    gumbel: torch.Tensor  # (B, n+1), for the draw of the policy that acts


def draw_noise(batch: int, d: int, n: int, generator: torch.Generator | None = None) -> Noise:
    uniform = torch.rand(batch, n + 1, generator=generator).clamp(1e-10, 1 - 1e-7)
    return Noise(torch.randn(batch, d, generator=generator), -(-uniform.log()).log())


def attention_scores(query: torch.Tensor, keys: torch.Tensor, cosine_scale: float) -> torch.Tensor:
    """Query (B, m), keys (n+1, m), inner policy first -> scores (B, n+1) of the policies (Eqs. 1-2)."""
    if cosine_scale > 0:
        query, keys = cosine_scale * F.normalize(query, dim=-1), F.normalize(keys, dim=-1)
    return query @ keys.T


def select(scores: torch.Tensor, gumbel: torch.Tensor) -> torch.Tensor:
    """One-hot draw (B, n+1) from softmax(scores), with a straight-through gradient; with zero noise, the argmax. The
    noise is added to the scores. Added to their softmax, it would make the draw more uniform than the weights."""
    soft = torch.softmax(scores + gumbel, -1)
    return F.one_hot((scores + gumbel).argmax(-1), scores.shape[-1]) + (soft - soft.detach())


def surrogate_log_prob(log_weights: torch.Tensor, log_probs: torch.Tensor) -> torch.Tensor:
    """log sum_i w_i p_i(a_i), every policy scored at its *own* action: (B, n+1), (B, n+1) -> (B,). This is not
    the density of the executed action, which may be e^-1000 under all policies but the one drawn. log p_i is at least
    -18, as published."""
    return torch.logsumexp(log_weights + log_probs.clamp(min=-18.0), -1)


class Decision(NamedTuple):
    action: torch.Tensor  # (B, d)
    log_prob: torch.Tensor  # (B,)
    log_weights: torch.Tensor  # (B, n+1), inner policy first
    selected: torch.Tensor  # (B, n+1), one-hot


def decide(actor: dict, obs: Seen, noise: Noise, args: Args) -> Decision:
    """Which policy acts, its action, and the log-probability."""
    inner, inner_log_prob = gaussian_policy(actor, obs.features, noise.gaussian)
    scores = attention_scores(mlp(actor, "query", obs.features), actor["keys"], args.cosine_scale)
    log_weights, selected = torch.log_softmax(scores, -1), select(scores, noise.gumbel)
    actions = torch.cat([inner.unsqueeze(1), obs.advice], 1)  # (B, n+1, d)
    action = (selected.unsqueeze(-1) * actions).sum(1)  # (B, d)
    at_its_mean = -action.shape[1] * (args.ext_log_std + 0.5 * math.log(2 * math.pi))  # log p_i(a_i), external
    log_probs = torch.cat([inner_log_prob.unsqueeze(1), torch.full_like(scores[:, 1:], at_its_mean)], 1)
    return Decision(action, surrogate_log_prob(log_weights, log_probs), log_weights, selected)


def critic_inputs(obs: Seen, action: torch.Tensor) -> torch.Tensor:
    return torch.cat([obs.features, action], 1)


def critic_loss(critic: dict, inputs: torch.Tensor, target_q: torch.Tensor) -> torch.Tensor:
    return 0.5 * (mlp(critic, "q", inputs).squeeze(-1) - target_q).square().mean(1).sum()  # (2, B): two critics


def actor_loss(actor: dict, critic: dict, alpha: torch.Tensor, obs: Seen, noise: Noise, args: Args):
    decision = decide(actor, obs, noise, args)
    q = mlp(critic, "q", critic_inputs(obs, decision.action)).squeeze(-1).amin(0)  # (B,)
    return (alpha * decision.log_prob - q).mean(), (decision, q)


def make_agent(args: Args, f: int, d: int, n: int, device: torch.device) -> dict:
    """Fresh parameters and optimiser state."""
    hidden = runtime.hidden_layers(args.hidden)
    critic = init_mlp("q", [f + d, *hidden, 1], stack=(2,))
    actor = init_mlp("actor", [f, *hidden, 2 * d]) | init_mlp("query", [f, 64, 64, KEY_DIM])
    actor["keys"] = torch.randn(n + 1, KEY_DIM)
    trained = {"actor": actor, "critic": critic,
               "temperature": {"log_alpha": torch.tensor(math.log(args.initial_temperature))}}
    moments = {group: adam_state(params) for group, params in trained.items()}
    target = {name: p.clone() for name, p in critic.items()}
    return tree_map(lambda x: x.to(device), trained | {"target": target, "moments": moments, "count": torch.zeros(())})


def update(agent: dict, batch: Batch, noise: Noise, next_noise: Noise, args: Args) -> dict:
    """One step of critics, actor, temperature and targets, in this order, on normalised transitions. Changes `agent` in
    place, returns what is logged."""
    actor, critic, target, moments, count = (agent[k] for k in ("actor", "critic", "target", "moments", "count"))
    alpha, d = agent["temperature"]["log_alpha"].exp(), batch.action.shape[1]  # alpha before its step below
    count += 1

    following = decide(actor, batch.next_obs, next_noise, args)
    next_q = mlp(target, "q", critic_inputs(batch.next_obs, following.action)).squeeze(-1).amin(0)  # (B,)
    next_value = next_q - alpha * following.log_prob
    target_q = batch.reward[:, 0] + args.gamma * (1 - batch.terminated[:, 0]) * next_value  # a time limit bootstraps
    grads, q_loss = torch.func.grad_and_value(critic_loss)(critic, critic_inputs(batch.obs, batch.action), target_q)
    adam(critic, grads, moments["critic"], count, args.learning_rate)

    grads, (pi_loss, (decision, q)) = torch.func.grad_and_value(actor_loss, has_aux=True)(
        actor, critic, alpha, batch.obs, noise, args)
    adam(actor, grads, moments["actor"], count, args.learning_rate)
    grads = {"log_alpha": d - decision.log_prob.mean()}  # of -log_alpha (log_prob - d): target entropy -d
    adam(agent["temperature"], grads, moments["temperature"], count, args.learning_rate)
    torch._foreach_lerp_(list(target.values()), list(critic.values()), args.tau)
    return {"critic_loss": q_loss, "actor_loss": pi_loss, "q": q.mean(), "alpha": alpha,
            "entropy": -decision.log_prob.mean(), "attention": decision.log_weights.exp().mean(0),
            "selected": decision.selected.mean(0), "key_norm": actor["keys"].norm(dim=-1)}


def make_buffer(args: Args, vec: envs.VectorEnv, f: int, d: int, g: int) -> tuple[ReplayBuffer, int]:
    """An empty buffer, and how many transitions of a batch get a hindsight goal."""
    relabelled = int(args.batch_size * args.her_goals / (args.her_goals + 1)) if g else 0
    horizon = envs.time_limit_of(vec) if relabelled else 1  # hindsight stores whole episodes
    capacity = min(args.buffer_size, args.total_timesteps + args.num_envs)  # the last step may go beyond the total
    return ReplayBuffer(capacity, horizon, args.num_envs, f, d, g, vec.compute_reward), relabelled


@torch.no_grad()  # gradients are taken by torch.func, inside `update`
def main(args: Args) -> dict[str, float]:
    """Train, resume or evaluate, as `args` say; returns the last evaluation (keys: runtime.EVALUATION)."""
    args, saved = runtime.checked(args, ALGO, RANGES, anew=["goal_range"])
    device = runtime.pick_device(args.device, fast_matmul=True)
    vec = envs.make_vec(args.env, args.num_envs, threads=torch.get_num_threads(), goal_range=args.goal_range)
    f, d, g = envs.continuous_sizes(vec)  # sizes of features, action and goal (0: no goals)
    obs = vec.reset(10_000 * args.seed)  # environment i has stream 10,000 * seed + i; seeds share none
    example = envs.example_of(vec, obs)
    given = args.knowledge + (f",inner:{args.init_from}" if args.init_from else "")
    external = knowledge.load(given, args.env, d, example, kept_in=args.resume or args.evaluate)
    n, names = len(external), ["inner", *external]
    agent = make_agent(args, f, d, n, device)
    normalizer = envs.Normalizer(f, args.normalize)
    buffer, relabelled = make_buffer(args, vec, f, d, g)
    loop = {"obs": envs.flatten(obs), "updates_owed": 0.0}
    scalars = runtime.Means()  # since the last log
    parts = {"agent": agent, "normalizer": normalizer, "vec": vec, "buffer": buffer, "loop": loop, "scalars": scalars}
    runtime.restore(parts, saved, only=["agent", "normalizer"] if args.evaluate else None)
    evaluator = envs.Evaluator(args, goal_range=args.goal_range)

    def look(obs: torch.Tensor) -> Seen:
        """Features (B, f) -> inputs of the networks."""
        return Seen(normalizer(obs), knowledge.advise(external, envs.unflatten(obs, g), d))

    def choose(obs: torch.Tensor, noise: Noise) -> Decision:
        inputs = tree_map(lambda x: x.to(device), (look(obs), noise))
        return tree_map(lambda x: x.cpu(), decide(agent["actor"], *inputs, args))

    def policy(obs: torch.Tensor | dict[str, torch.Tensor]) -> torch.Tensor:
        """The policy with the largest weight acts, inner by its mean (B, d). The run exports this as policy.pt2."""
        return choose(envs.flatten(obs), Noise(torch.zeros(d), torch.zeros(n + 1))).action

    def inner(obs: torch.Tensor | dict[str, torch.Tensor]) -> torch.Tensor:
        """The mean action (B, d) of the inner policy alone. The run exports this as inner.pt2."""
        features = normalizer(envs.flatten(obs)).to(device)
        return gaussian_policy(agent["actor"], features, torch.zeros(d, device=device))[0].cpu()

    def act(obs: envs.Observation) -> np.ndarray:
        """The actions of evaluations: the acting policy is drawn, and the inner policy acts by its mean."""
        features = envs.flatten(obs)
        noise = draw_noise(len(features), d, n, evaluator.generator)
        decision = choose(features, noise._replace(gaussian=torch.zeros(d)))
        evaluator.note(decision.log_weights[0].exp(), decision.selected[0].argmax())
        return vec.to_box(decision.action.numpy())

    if args.evaluate:
        return evaluator.report(act, saved["step"], names)

    # train
    if args.init_from and not saved:
        knowledge.take_over(agent["actor"], normalizer, names, args.init_from)
    run = runtime.Run(ALGO, args, envs.resolve(args.env), saved, parts)
    knowledge.keep(given, names, run.folder)
    learn = runtime.compiled(update, args.compile, device)
    if not saved:
        run.log_evaluation(evaluator.play(act))  # the untrained agent
    while run.advance(args.num_envs):
        learning, obs = buffer.stored >= args.batch_size, loop["obs"]
        action = 2 * torch.rand(args.num_envs, d) - 1
        if learning:
            decision = choose(obs, draw_noise(args.num_envs, d, n))
            explore = torch.rand(args.num_envs, 1) < args.random_actions * decision.selected[:, :1]  # where inner acts
            action = torch.where(explore, action, decision.action)
        next_obs, reward, terminated, truncated, info = vec.step(vec.to_box(action.numpy()))

        # store: where an episode ended, final_obs is its last observation, and next_obs the first of the next episode
        buffer.add(obs, action, reward, terminated, truncated, envs.flatten(info["final_obs"]))
        normalizer.add(obs)
        loop["obs"] = envs.flatten(next_obs)

        # update
        if learning:
            loop["updates_owed"] += args.num_envs * args.updates_per_step
        while loop["updates_owed"] >= 1:
            loop["updates_owed"] -= 1
            batch = buffer.sample(args.batch_size, relabelled)
            batch = batch._replace(obs=look(batch.obs), next_obs=look(batch.next_obs))
            inputs = (batch, draw_noise(args.batch_size, d, n), draw_noise(args.batch_size, d, n))
            scalars.add(learn(agent, *tree_map(lambda x: x.to(device), inputs), args))

        # log, evaluate, save
        if run.due(LOG_EVERY):
            run.log(scalars.take(), names)
        if run.due(args.eval_every) or run.over:
            run.log_evaluation(evaluator.play(act, twice=run.over))
        run.save_if_due()
    run.finish(example, policy=policy, inner=inner)
    evaluator.film(act, run.folder, names)
    return run.result


if __name__ == "__main__":
    with runtime.exit_codes(ALGO):
        main(runtime.cli(Args, ALGO))
