"""A trained agent, frozen, as a knowledge policy: `run:<RUN_DIR>`, or its inner policy alone: `inner:<RUN_DIR>`.

Reads the entry `policy` of RUN_DIR/checkpoint.pt, tensors and plain types only:

    format          1
    env             environment id the agent was trained in
    inputs          observation entries, concatenated in this order to x (B, n)
    mean, std       (n,); the networks see clip((x - mean) / std, -clip, clip)
    clip            float
    actor           plain | kian | kogun | a2t
    inner           [W, b, W, b, ...], W (in, out), ReLU between; output (B, 2 d) is mean | log std
    query           [W, b, ...] or None; for a2t its output is the n + 1 logits, inner first
    keys            {name: (m,)}, inner first where it has one, or None; for kian
    inner_key_head  [W, b] or absent: makes the inner key from the query network's last hidden layer
    score           cosine | dot
    handicap        what is taken from the inner policy's score, in units of the score (absent: 0)
    knowledge       what the run was given as --knowledge
    names           "inner" and the names of its external policies, in order (absent in older runs)

An agent with discrete actions (`kind` is "categorical") has format, env, actor (plain or kian), keys, knowledge and
names as above, and

    encoder, trunk, inner, query, inner_key     [W, b, ...] each, W (out, in); the last two or None. An encoder of
                                                images has three layers, W (out, 2 x 2 x in) of 2x2 convolutions
    fusion, entropy_fix, sharpness, silent      as the flags of algos/ppo_kian.py
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import cosine_similarity

from knowledge.registry import KnowledgeError, Obs, Policy, copy_of

ENTRIES = {"env", "inputs", "mean", "std", "clip", "actor", "inner", "query", "keys", "score", "knowledge"}
FUSION = ("fusion", "entropy_fix", "sharpness", "silent")
CATEGORICAL = {"env", "actor", "encoder", "trunk", "inner", "query", "inner_key", "keys", "knowledge", *FUSION}
ACTORS = ("plain", "kian", "kogun", "a2t")


def load(folder: Path, load_knowledge: Callable[[str, str], dict[str, Policy]], example: Obs,
         inner_alone: bool = False) -> dict[str, Policy]:
    """The agent trained in `folder`, {run.<folder name>: policy}, or {inner.<folder name>: its inner policy}.

    `load_knowledge(spec, env_id)` loads the policies that the agent itself was given; `example` are observations as it
    will meet them.
    Raises KnowledgeError if there is no such run, or none that can be frozen.
    """
    file = folder / "checkpoint.pt"
    if not folder.is_dir():
        raise KnowledgeError(f"run {folder} is not there; check the path, or put it back where it was")
    if not file.is_file():
        raise KnowledgeError(f"run {folder} has no checkpoint.pt; name the folder of a run that has saved one")
    try:
        # Mapped, not read: most of the file is the replay buffer.
        checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a cut or foreign file raises anything from EOFError to UnpicklingError
        raise KnowledgeError(f"{file} is damaged or no checkpoint ({type(error).__name__}); name another") from error
    policy = checkpoint.get("policy") if isinstance(checkpoint, dict) else None
    if not isinstance(policy, dict) or policy.get("format") != 1:
        raise KnowledgeError(f"{file} holds no policy of format 1; name a run of an algorithm that writes one")
    categorical = policy.get("kind") == "categorical"
    if missing := (CATEGORICAL if categorical else ENTRIES) - policy.keys():
        raise KnowledgeError(f"{file} has no {', '.join(sorted(missing))} in its policy; name another run")
    known = ("plain", "kian") if categorical else ACTORS
    if inner_alone and policy["actor"] in known and policy["actor"] != "kogun":  # its inner policy reads advice
        policy = {**policy, "actor": "plain"}
    if policy["actor"] not in known:
        raise KnowledgeError(f"{file} has an actor '{policy['actor']}'; known are {', '.join(known)}")
    agent = (FrozenCategorical if categorical else FrozenAgent)(folder, owned(policy), {})
    agent.inputs(example)  # before its rules are asked, which would fail for the same reason
    agent.knowledge = {} if policy["actor"] == "plain" else load_knowledge(policy["knowledge"], policy["env"])
    if not agent.fits():
        now = f"'{policy['knowledge']}' gives {', '.join(agent.knowledge) or 'nothing'}"
        raise KnowledgeError(f"run {folder} was trained with other knowledge than {now}; restore what it had")
    return {f"{'inner' if inner_alone else 'run'}.{folder.resolve().name}": agent}


@dataclass
class FrozenAgent:
    """The deterministic policy of a trained agent; where it attends, the most attended policy acts."""

    folder: Path
    policy: dict
    knowledge: dict[str, Policy]

    @torch.no_grad()
    def __call__(self, obs: Obs) -> Tensor:
        """Actions (B, d). Raises KnowledgeError for observations unlike those of the run."""
        x, actor, inner = self.inputs(obs), self.policy["actor"], self.policy["inner"]
        external = [policy(copy_of(obs)) for policy in self.knowledge.values()]
        output, _ = mlp(inner, torch.cat([x, *external], -1) if actor == "kogun" else x)
        action = output.chunk(2, -1)[0].tanh()  # of mean | log std
        if actor in ("plain", "kogun"):
            return action
        actions = torch.stack([action, *external], 1)  # (B, n+1, d)
        chosen = self.scores(x).argmax(-1)  # (B,)
        return actions[torch.arange(len(x), device=x.device), chosen]

    def inputs(self, obs: Obs) -> Tensor:
        """Network input (B, n)."""
        entries, mean, clip = self.policy["inputs"], self.policy["mean"], self.policy["clip"]
        obs = obs if isinstance(obs, dict) else {"observation": obs}
        if absent := [entry for entry in entries if entry not in obs]:
            raise KnowledgeError(f"run {self.folder} needs {', '.join(absent)}, not observed here; name another")
        x = torch.cat([obs[entry] for entry in entries], -1)
        if x.shape[-1] != len(mean):
            trained = f"was trained in {self.policy['env']} on {len(mean)} inputs"
            raise KnowledgeError(f"run {self.folder} {trained} and {x.shape[-1]} are observed here; name another")
        return ((x - mean.to(x)) / self.policy["std"].to(x)).clamp(-clip, clip)

    def scores(self, x: Tensor) -> Tensor:
        """Attention before its scale and softmax, neither of which moves the largest, (B, n+1), inner first."""
        query, hidden = mlp(self.policy["query"], x)
        if self.policy["actor"] == "a2t":
            return query
        named = self.policy["keys"]
        head = self.policy.get("inner_key_head")
        keys = [mlp(head, hidden)[0] if head else named["inner"], *(named[name] for name in self.knowledge)]
        keys = torch.stack([key.to(x).expand_as(query) for key in keys], 1)  # (B, n+1, m)
        if self.policy["score"] == "cosine":
            scores = cosine_similarity(query[:, None], keys, dim=-1)
        else:
            scores = (query[:, None] * keys).sum(-1)
        return torch.cat([scores[:, :1] - self.policy.get("handicap", 0.0), scores[:, 1:]], 1)

    def fits(self) -> bool:
        """Whether the knowledge is what the networks were made for; a rule or a file may have changed since."""
        p, n = self.policy, len(self.knowledge)
        known = p.get("names") in (None, ["inner", *self.knowledge])  # these two know policies by their place
        match p["actor"]:
            case "kian":
                return p["keys"].keys() - {"inner"} == self.knowledge.keys()
            case "kogun":
                return known and len(p["inner"][0]) == len(p["mean"]) + n * len(p["inner"][-1]) // 2
            case "a2t":
                return known and len(p["query"][-1]) == n + 1
        return True


@dataclass
class FrozenCategorical:
    """The action probabilities of a trained agent with discrete actions (algos/ppo_kian.py), (B, A): as advice they are
    softer than a rule's ones."""

    folder: Path
    policy: dict
    knowledge: dict[str, Policy]

    @torch.no_grad()
    def __call__(self, obs: Obs) -> Tensor:
        """Probabilities (B, A). Raises KnowledgeError for observations unlike those of the run."""
        p, x = self.policy, self.inputs(obs)
        hidden = torch.tanh(layer(p["trunk"], self.encode(x)))  # (B, 64)
        logits = layer(p["inner"], hidden)
        if p["query"]:
            query = layer(p["query"], hidden)
            inner_key = layer(p["inner_key"], hidden) if p["inner_key"] else p["keys"]["inner"].to(query)
        if p["actor"] == "plain":  # or alone: in a sum of logits its own had a factor, perhaps a negative one
            factor = (query * inner_key).sum(-1, keepdim=True) if p["query"] and p["fusion"] == "logit" else 1.0
            return torch.softmax(factor * logits, -1)
        advice = torch.stack([policy(copy_of(obs)) for policy in self.knowledge.values()], 1)  # (B, n, A)
        keys = [inner_key, *(p["keys"][name].to(query) for name in self.knowledge)]
        keys = torch.stack([key.expand_as(query) for key in keys], 1)  # (B, n+1, m)
        scores = (query.unsqueeze(1) * keys).sum(-1)  # (B, n+1)
        if p["fusion"] == "logit":
            return torch.softmax((scores.unsqueeze(-1) * torch.cat([logits.unsqueeze(1), advice], 1)).sum(1), -1)
        norms = (query.norm(dim=-1, keepdim=True) * keys.norm(dim=-1)).clamp(min=1e-8)
        says_nothing = advice.amax(-1) <= 0  # (B, n)
        if p["entropy_fix"] == "on":
            scores = scores / norms
            rules = torch.softmax(p["sharpness"] * norms[:, 1:].unsqueeze(-1) * advice, -1)
        else:
            rules = torch.where(says_nothing.unsqueeze(-1), 1.0, advice)
            rules = rules / rules.sum(-1, keepdim=True)
        if p["silent"] == "abstain":
            scores = scores.masked_fill(F.pad(says_nothing, (1, 0)), -1e4)
        weights = torch.softmax(scores, -1)
        policies = torch.cat([torch.softmax(logits, -1).unsqueeze(1), rules], 1)  # (B, n+1, A)
        return (weights.unsqueeze(-1) * policies).sum(1).clamp(max=1)  # where all are certain, 1 and a rounding error

    def inputs(self, obs: Obs) -> Tensor:
        """Network input, images (B, 7, 7, 3) or features (B, f): as they are."""
        x, encoder = obs.get("image") if isinstance(obs, dict) else obs, self.policy["encoder"]
        if x is None or (x.dim() == 4) != (len(encoder) > 2) or (x.dim() == 2 and x.shape[1] != encoder[0].shape[1]):
            trained = f"was trained in {self.policy['env']} on other observations than these"
            raise KnowledgeError(f"run {self.folder} {trained}; name another")
        return x

    def encode(self, x: Tensor) -> Tensor:
        """Images (B, 7, 7, 3) or features (B, f) -> (B, 64)."""
        if x.dim() != 4:
            return torch.tanh(layer(self.policy["encoder"], x))
        x = x.permute(0, 3, 1, 2).float()
        for i in range(0, len(self.policy["encoder"]), 2):
            weight, bias = (p.to(x) for p in self.policy["encoder"][i:i + 2])
            x = F.conv2d(x, weight.view(len(weight), 2, 2, -1).permute(0, 3, 1, 2), bias).relu()
            x = F.max_pool2d(x, 2) if i == 0 else x
        return x.flatten(1)

    def fits(self) -> bool:
        """Whether the knowledge is what the keys were learned for."""
        return self.policy["actor"] == "plain" or self.policy["keys"].keys() - {"inner"} == self.knowledge.keys()


def layer(weights: list[Tensor], x: Tensor) -> Tensor:
    """One linear layer [W, b], W (out, in)."""
    return F.linear(x, *(p.to(x) for p in weights))


def owned(value):
    """A copy of nested tensors that no longer needs the mapped file."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {name: owned(item) for name, item in value.items()}
    return [owned(item) for item in value] if isinstance(value, list) else value


def mlp(weights: list[Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Output of the layers [W, b, W, b, ...] with ReLU between, and what the last of them was given."""
    for i in range(0, len(weights), 2):
        hidden = x.relu() if i else x
        x = hidden @ weights[i].to(x) + weights[i + 1].to(x)
    return x, hidden


def freeze(actor: dict[str, Tensor], names: list[str], args, knowledge: str, stats: tuple[Tensor, Tensor],
           goal_dim: int) -> dict:
    """The acting part of an agent in the format above, for its checkpoint.

    `actor` holds "inner.<i>.weight", ... and, with knowledge, "query.<i>..." and "keys" (n+1, m), in the order of
    `names`, that `knowledge` gave; with `args.inner_key == "head"` the query network ends in query | inner key,
    (B, 2 m).
    """
    inner, query = ([p.cpu().clone() for k, p in actor.items() if k.startswith(part)] for part in ("inner.", "query."))
    scale = args.cosine_scale if "keys" in actor and args.cosine_scale > 0 else 1.0  # of cosines in the run's scores
    policy = {
        "format": 1,
        "env": args.env,
        "inputs": ["achieved_goal", "desired_goal", "observation"] if goal_dim else ["observation"],
        "mean": stats[0],
        "std": stats[1],
        "clip": 5.0 if args.normalize else float("inf"),
        "actor": args.actor if len(names) > 1 else "plain",
        "names": names,
        "inner": inner,
        "query": query or None,
        "keys": dict(zip(names, actor["keys"].cpu().clone())) if "keys" in actor else None,
        "score": "cosine" if args.cosine_scale > 0 else "dot",
        "handicap": float(actor["handicap"][0]) / scale if "handicap" in actor else 0.0,
        "knowledge": knowledge,
    }
    if policy["keys"] and args.inner_key == "head":
        width = actor["keys"].shape[1]
        weight, bias = query[-2:]
        query[-2:] = weight[:, :width].clone(), bias[:width].clone()
        policy["inner_key_head"] = [weight[:, width:].clone(), bias[width:].clone()]
        del policy["keys"]["inner"]  # made from the state: the vector in its place is never used
    return policy


def freeze_categorical(agent, names: list[str], args, knowledge: str) -> dict:
    """The acting part of an `agent` (a module with encoder, trunk, inner and with attention query and keys) in the
    format above, for its checkpoint; `knowledge` is what the run was given, `names` are those of its policies."""
    attends = args.actor == "kian" and len(names) > 1

    def weights(part: str) -> list[Tensor] | None:
        found = [p.detach().cpu().clone() for name, p in agent.state_dict().items() if name.startswith(f"{part}.")]
        return found or None
    parts = {part: weights(part) for part in ("encoder", "trunk", "inner", "query", "inner_key")}
    keys = dict(zip(names, agent.keys.detach().cpu().clone())) if attends else None
    if keys and parts["inner_key"]:  # made from the state: the vector in its place is never used
        del keys["inner"]
    return parts | {
        "format": 1,
        "kind": "categorical",
        "env": args.env,
        "actor": "kian" if attends else "plain" if len(names) == 1 else args.actor,
        "names": names,
        "keys": keys,
        "knowledge": knowledge,
        **{name: getattr(args, name) for name in FUSION},
    }
