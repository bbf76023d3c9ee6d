"""SAC with a hand-over: external policies act until the trained one has caught up. This project's own method.

Query, keys and the draw of one policy per step are those of algos/sac_kian.py. Three things are different:
- Attention learns in every state, by cross-entropy to softmax(Q(s, a_i) / T) over the policies i. The inner policy
  minimises SAC's actor loss in every state. KIAN trains both through the one action that was drawn.
- Critics overestimate the policy that maximises them. So the inner policy plays some episodes alone (solo), and acts
  nowhere else until its returns there are nearly the agent's best. Until then it also imitates the external policies,
  weighted by attention.
- External policies that did not help are dropped. If the inner policy has not learned either, the agent begins anew.

docs/sac_handover.md has the reasons and the measurements.

python algos/sac_handover.py --env FetchPickAndPlace-v2   # success 0.9 after 20,000 steps, 0.99 after 150,000
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
from tqdm import tqdm

import envs
import knowledge
import runtime
from buffers import Batch, ReplayBuffer
from networks import adam, adam_state, init_mlp, mlp

ALGO = Path(__file__).stem  # names run folders and result tables
LOG_EVERY = 1000  # environment steps
KEY_DIM = 4  # width m of keys and query
MASKED = 1e9  # subtracted from the score of the inner policy before it may act, or of external ones that did not help


@dataclass
class Args:
    """SAC + HER that begins with external policies and hands over to its own (ours)."""
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

    # method: attention and hand-over
    knowledge: str = "auto"  # auto, none, rules, groups, your_file.py, run:<RUN_DIR>; comma-separated
    cosine_scale: float = 3.0  # attention scores are this times cos(query, key)
    attention_temperature: float = 0.1  # T of softmax(Q / T), the target of attention; falls after the hand-over
    solo_fraction: float = 0.25  # share of episodes that the inner policy plays alone at first; 0: no hand-over
    bc_coef: float = 1.0  # weight, times the return gap, of imitating the external policies that attention chooses


# RANGES: limits of numbers; all others must be above 0. TUNE: for `make tune`, (low, high) on a log scale, or choices
RANGES = {"gamma": (0, 1), "tau": (0, 1), "her_goals": (0, math.inf), "random_actions": (0, 1), "goal_range": (0, 10),
          "solo_fraction": (0, 0.99), "bc_coef": (0, math.inf)}
TUNE = {"learning_rate": (3e-4, 3e-3), "tau": (0.01, 0.1), "initial_temperature": (0.01, 1.0),
        "updates_per_step": (0.05, 0.5), "batch_size": [256, 512, 1024], "random_actions": [0.0, 0.1, 0.2, 0.3]}


def gaussian_policy(params: dict, obs: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Observations (B, f), Gaussian noise (B, d), 0 for the mean -> action tanh(u) (B, d), its log-probability (B,)."""
    mean, log_std = mlp(params, "actor", obs).chunk(2, -1)
    log_std = log_std.clamp(-20, 2)
    action = torch.tanh(mean + log_std.exp() * noise)
    log_prob = (-0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)  # log N(u; mean, std)
    return action, log_prob - torch.log(1 - action.square() + 1e-6).sum(-1)  # change of variables u -> tanh(u)


class HandOver:
    """Decides when the inner policy may act. It compares returns of solo episodes with those of all others (the agent).

    return_gap = (best running mean of the agent - running mean of solo episodes) / deviation of returns, within 0 to 1;
    it is 1 until enough episodes are known. When it falls below MARGIN the hand-over is `done`, for good. From then on
    the gap fades, and with it the imitation. The best of a noisy mean is high by luck alone. So the hand-over is also
    done where, over all episodes, the agent is less than MARGIN ahead of solo episodes: external policies have not
    `helped`. If solo episodes were then hardly better than episodes of uniform actions, nothing was `learned`.
    """

    MARGIN = 0.2
    FADE = 0.002  # share of the gap that goes with each episode after the hand-over: it halves in 350 episodes
    RATE = 0.02  # of the running means: about the last 50 episodes of a kind
    FIRST, FEWEST = 400, 20  # episodes before the means are compared: of both kinds together, of each kind
    LEARNED = 0.5  # standard deviations by which solo episodes have to be better than uniform ones

    def __init__(self, num_envs: int, solo_fraction: float):
        self.solo = torch.rand(num_envs, 1) < solo_fraction  # which environments the inner policy plays alone
        self.current = torch.zeros(num_envs, dtype=torch.float64)  # return so far of each open episode
        self.uniform = torch.zeros(num_envs, dtype=torch.bool)  # whether it began with uniform actions
        self.mean = {"return_solo": math.nan, "return_agent": math.nan, "return_best": math.nan}  # running means
        self.played = {"uniform": [0, 0.0], "solo": [0, 0.0], "agent": [0, 0.0]}  # episodes, sum of returns
        self.count, self.average, self.square = 0, 0.0, 0.0  # of solo and agent episodes; square: squared deviations
        self.solo_fraction, self.done = solo_fraction, solo_fraction == 0
        self.return_gap, self.helped, self.learned = float(not self.done), True, True

    def add(self, reward: np.ndarray, ended: np.ndarray, uniform: bool) -> None:
        """One step of every environment: rewards, whose episode is over (num_envs,), whether all actions were uniform.
        An episode that began with uniform actions and went on with others is not counted."""
        self.current += torch.from_numpy(reward).float()
        self.uniform |= uniform
        for i in ended.nonzero()[0].tolist():
            if uniform or not self.uniform[i]:
                self.count_in(self.current[i].item(), "uniform" if uniform else "solo" if self.solo[i] else "agent")
            self.current[i], self.uniform[i] = 0.0, False
        if not self.done and self.count >= self.FIRST:
            self.compare()
        solo = torch.rand(len(ended), 1) < (0.0 if self.done else self.solo_fraction)
        self.solo = torch.where(torch.from_numpy(ended)[:, None], solo, self.solo)

    def count_in(self, value: float, kind: str) -> None:
        self.played[kind] = [self.played[kind][0] + 1, self.played[kind][1] + value]
        if kind == "uniform":
            return
        deviation, self.count, old = value - self.average, self.count + 1, self.mean[f"return_{kind}"]
        self.average += deviation / self.count
        self.square += deviation * (value - self.average)
        self.mean[f"return_{kind}"] = value if math.isnan(old) else old + self.RATE * (value - old)
        if self.count >= self.FIRST:
            self.mean["return_best"] = max(self.mean["return_agent"], self.mean["return_best"])  # drops a first NaN
        if self.done:
            self.return_gap *= 1 - self.FADE

    def compare(self) -> None:
        if min(self.played["solo"][0], self.played["agent"][0]) < self.FEWEST:
            return
        std = max((self.square / self.count) ** 0.5, 1e-8)
        start, solo, agent = (total / n if n else -math.inf for n, total in self.played.values())
        gap, ahead = (self.mean["return_best"] - self.mean["return_solo"]) / std, (agent - solo) / std
        self.return_gap, self.done = min(1.0, max(0.0, gap)), min(gap, ahead) < self.MARGIN
        if self.done:
            self.helped, self.learned = ahead >= self.MARGIN, (solo - start) / std >= self.LEARNED
            self.return_gap = self.MARGIN if self.helped else 0.0
            verdict = "the inner policy begins to act" if self.helped else "external policies did not help: dropped"
            tqdm.write(f"after {self.count} episodes: {verdict}", file=sys.stderr)


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


class Decision(NamedTuple):
    action: torch.Tensor  # (B, d)
    log_prob: torch.Tensor  # (B,), for targets: only the inner policy's entropy counts, with its weight
    log_weights: torch.Tensor  # (B, n+1), inner policy first
    selected: torch.Tensor  # (B, n+1), one-hot
    actions: torch.Tensor  # (B, n+1, d), what each policy would do
    inner_log_prob: torch.Tensor  # (B,)


def decide(actor: dict, obs: Seen, noise: Noise, args: Args) -> Decision:
    """Which policy acts, its action, and the log-probability."""
    inner, inner_log_prob = gaussian_policy(actor, obs.features, noise.gaussian)
    scores = attention_scores(mlp(actor, "query", obs.features), actor["keys"], args.cosine_scale) - actor["score_mask"]
    log_weights, selected = torch.log_softmax(scores, -1), select(scores, noise.gumbel)
    actions = torch.cat([inner.unsqueeze(1), obs.advice], 1)  # (B, n+1, d)
    action = (selected.unsqueeze(-1) * actions).sum(1)  # (B, d)
    return Decision(action, log_weights[:, 0].exp() * inner_log_prob, log_weights, selected, actions, inner_log_prob)


def critic_inputs(obs: Seen, action: torch.Tensor) -> torch.Tensor:
    return torch.cat([obs.features, action], 1)


def critic_loss(critic: dict, inputs: torch.Tensor, target_q: torch.Tensor) -> torch.Tensor:
    return 0.5 * (mlp(critic, "q", inputs).squeeze(-1) - target_q).square().mean(1).sum()  # (2, B): two critics


def actor_loss(actor: dict, critic: dict, alpha: torch.Tensor, obs: Seen, noise: Noise, args: Args):
    decision = decide(actor, obs, noise, args)

    def q_of(actions: torch.Tensor) -> torch.Tensor:
        """(B, k, d) -> the lower of both critics (B, k)."""
        inputs = torch.cat([obs.features.unsqueeze(1).expand(-1, actions.shape[1], -1), actions], -1)  # (B, k, f + d)
        return mlp(critic, "q", inputs.flatten(0, 1)).view(2, len(actions), -1).amin(0)
    inner_q, external_q = q_of(decision.actions[:, :1]), q_of(decision.actions[:, 1:].detach())
    q = torch.cat([inner_q, external_q], 1).detach()  # (B, n+1)

    # Cross-entropy compares all policies in every state, and its gradient does not vanish once attention is decided.
    worth = torch.softmax(q / actor["attention_temperature"] - actor["score_mask"], 1)
    loss = alpha * decision.inner_log_prob - inner_q.squeeze(1) - (worth * decision.log_weights).sum(1)
    attention = torch.softmax(decision.log_weights[:, 1:].detach(), 1)  # (B, n)
    distance = (decision.actions[:, :1] - decision.actions[:, 1:]).square().sum(-1)  # (B, n)
    loss = loss + actor["bc_coef"] * (attention * distance).sum(1)
    return loss.mean(), (decision, (decision.log_weights.exp() * q).sum(1))


def make_agent(args: Args, f: int, d: int, n: int, device: torch.device) -> dict:
    """Fresh parameters and optimiser state."""
    hidden = runtime.hidden_layers(args.hidden)
    critic = init_mlp("q", [f + d, *hidden, 1], stack=(2,))
    actor = init_mlp("actor", [f, *hidden, 2 * d]) | init_mlp("query", [f, 64, 64, KEY_DIM])
    actor["keys"] = torch.randn(n + 1, KEY_DIM)
    trained = {"actor": actor, "critic": critic,
               "temperature": {"log_alpha": torch.tensor(math.log(args.initial_temperature))}}
    moments = {group: adam_state(params) for group, params in trained.items()}
    actor |= {"score_mask": torch.zeros(n + 1), "bc_coef": torch.zeros(()), "attention_temperature": torch.zeros(())}
    target = {name: p.clone() for name, p in critic.items()}  # the line above: set by `steer`, not trained
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
    grads = {"log_alpha": d - decision.inner_log_prob.mean()}  # of -log_alpha (log_prob - d): target entropy -d
    adam(agent["temperature"], grads, moments["temperature"], count, args.learning_rate)
    torch._foreach_lerp_(list(target.values()), list(critic.values()), args.tau)
    return {"critic_loss": q_loss, "actor_loss": pi_loss, "q": q.mean(), "alpha": alpha,
            "entropy": -decision.inner_log_prob.mean(), "attention": decision.log_weights.exp().mean(0),
            "selected": decision.selected.mean(0), "key_norm": actor["keys"].norm(dim=-1)}


def steer(agent: dict, handover: HandOver, args: Args, *sizes) -> None:
    """Write the state of the hand-over into the actor: who may act, the weight of imitation, and the T of attention. T
    falls with the gap after the hand-over: one useless step hardly lowers Q, so a constant T keeps useless policies."""
    if not (handover.helped or handover.learned) and agent["actor"]["score_mask"][0] > 0:  # only once
        agent.update(make_agent(args, *sizes))  # begin anew: what it has learned is in the way
    actor, mask = agent["actor"], 0.0 if handover.done else MASKED
    actor["score_mask"][0] = mask if handover.helped else -MASKED
    actor["bc_coef"].fill_(args.bc_coef * handover.return_gap)
    left = handover.return_gap / handover.MARGIN if handover.done else 1.0
    actor["attention_temperature"].fill_(max(args.attention_temperature * left, 1e-4))


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
    external = knowledge.load(args.knowledge, args.env, d, example, kept_in=args.resume or args.evaluate)
    n, names = len(external), ["inner", *external]
    agent = make_agent(args, f, d, n, device)
    handover = HandOver(args.num_envs, args.solo_fraction if n else 0.0)
    normalizer = envs.Normalizer(f, args.normalize)
    buffer, relabelled = make_buffer(args, vec, f, d, g)
    loop = {"obs": envs.flatten(obs), "updates_owed": 0.0}
    scalars = runtime.Means()  # since the last log
    parts = {"agent": agent, "normalizer": normalizer, "vec": vec, "buffer": buffer, "loop": loop, "scalars": scalars,
             "handover": vars(handover)}
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
    run = runtime.Run(ALGO, args, envs.resolve(args.env), saved, parts)
    knowledge.keep(args.knowledge, names, run.folder)
    learn = runtime.compiled(update, args.compile, device)
    if not saved:
        steer(agent, handover, args)
        run.log_evaluation(evaluator.play(act))  # the untrained agent
    while run.advance(args.num_envs):
        steer(agent, handover, args, f, d, n, device)
        learning, obs = buffer.stored >= args.batch_size, loop["obs"]
        action = 2 * torch.rand(args.num_envs, d) - 1
        if learning:
            decision = choose(obs, draw_noise(args.num_envs, d, n))
            explore = ~handover.solo & (torch.rand(args.num_envs, 1) < args.random_actions * decision.selected[:, :1])
            action = torch.where(explore, action, torch.where(handover.solo, decision.actions[:, 0], decision.action))
        next_obs, reward, terminated, truncated, info = vec.step(vec.to_box(action.numpy()))

        # store: where an episode ended, final_obs is its last observation, and next_obs the first of the next episode
        buffer.add(obs, action, reward, terminated, truncated, envs.flatten(info["final_obs"]))
        handover.add(reward, terminated | truncated, uniform=not learning)
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
            run.log(scalars.take() | handover.mean | {"return_gap": handover.return_gap}, names)
        if run.due(args.eval_every) or run.over:
            run.log_evaluation(evaluator.play(act, twice=run.over))
        run.save_if_due()
    run.finish(example, policy=policy, inner=inner)
    evaluator.film(act, run.folder, names)
    return run.result


if __name__ == "__main__":
    with runtime.exit_codes(ALGO):
        main(runtime.cli(Args, ALGO))
