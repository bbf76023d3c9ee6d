"""Attention keys by policy name: written by one run, taken over by the next (KIAN's incremental learning)."""

import hashlib
import json
import math
import os
import sys
from pathlib import Path

import torch
from torch import Tensor

from knowledge.registry import KnowledgeError

QUERY = ["encoder", "trunk", "query"]  # PPO's query reads what encoder and trunk make of an image
PARTS = {"keys": [], "keys+query": QUERY, "all": [*QUERY, "inner", "inner_key"]}  # networks that --warm takes along


def query_hash(query: list[Tensor]) -> str:
    """Fingerprint of a query network [W, b, ...]: keys mean something only to the query they were learned with."""
    return hashlib.sha256(b"".join(p.contiguous().numpy().tobytes() for p in query)).hexdigest()[:16]


def check_keys_file(file: str, has_keys: bool) -> None:
    """Before anything is trained: raise KnowledgeError unless a run has keys and can write them to `file`, if any."""
    if not file:
        return
    if not has_keys:
        raise KnowledgeError("--save-keys needs --actor kian with at least one knowledge policy")
    try:
        path = Path(file).resolve()
        there = next(p for p in [path, *path.parents] if p.exists())  # what exists of it
        fits = os.access(there, os.W_OK) and there.is_dir() == (there != path)  # a file, or a folder for a new one
    except OSError:
        fits = False
    if not fits:
        raise KnowledgeError(f"--save-keys {file} cannot be written; name a file in a folder of yours")


def save_keys(file: str, policy: dict) -> None:
    """Write the keys of a frozen `policy` (format in knowledge/run.py) as JSON, with their query's fingerprint."""
    keys = {name: key.tolist() for name, key in policy["keys"].items()}
    facts = {"key_dim": len(next(iter(keys.values()))), "query": query_hash(policy["query"]), "keys": keys}
    facts |= {"score": policy["score"]} if "score" in policy else {}
    try:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_text(json.dumps(facts, indent=1))
    except OSError as error:
        raise KnowledgeError(f"keys cannot be written to {file} ({error.strerror}); --load-keys also takes the run's "
                             "folder") from error


def read_run(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    """Checkpoint of a run, and the keys it knows by name: its own, as far as they learned anything ("inner" is missing
    where it is made from the state), and of policies that it did without those of the runs that it came from
    (--init-from), as long as these are where they were. Raises what a bad file raises."""
    checkpoint = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True, mmap=True)
    if not checkpoint["policy"]["keys"]:
        raise KnowledgeError(f"run {folder} has no keys; name one of --actor kian with knowledge")
    keys = {name: key.clone() for name, key in checkpoint["policy"]["keys"].items()}
    if handicap := checkpoint["policy"].get("handicap"):
        whose = "the trained policy never acted, its key" if handicap > 0 else "rules were dropped, the keys"
        print(f"{folder}: {whose} learned nothing", file=sys.stderr)
        keys = {name: key for name, key in keys.items() if handicap > 0 and name != "inner"}
    before = json.loads((folder / "config.json").read_text())["args"].get("init_from")  # absolute
    if before and Path(before, "checkpoint.pt").is_file():
        keys = {name: key for name, key in read_run(Path(before))[1].items() if name != "inner"} | keys
    return checkpoint, keys


@torch.no_grad()
def take_over(actor: dict[str, Tensor], normalizer, names: list[str], source: str, warm: str,
              cosine: bool | None = None) -> None:
    """Overwrite, in place, the keys of `actor` whose names `source` knows; others keep their fresh ones.

    `actor` maps names to tensors: "keys" (n+1, m) in the order of `names`, "query.0.weight", ... `source` is a file of
    `save_keys`, which holds keys alone, or the folder of a run, from which `warm` also takes the query network
    ("keys+query") and the inner policy ("all"). The key of an inner policy belongs to it: it goes to the one of this
    run with "all", and to the frozen one of the source (`inner:<RUN_DIR>`) if that is among `names`, unless the source
    sums logits: the key's effect is in its frozen policy then. With a network comes the state of `normalizer` (an
    envs.Normalizer or None), by which it knows its inputs. Says so where the source's score was a `cosine` and this
    run's is none, or the other way round.
    Raises KnowledgeError for a source that cannot be read or does not fit.
    """
    path = Path(source)
    parts, learned_with = PARTS[warm] if path.is_dir() else [], ""
    if "keys" not in actor:
        raise KnowledgeError(f"keys {source} have nowhere to go: use --actor kian with at least one knowledge policy")
    try:
        if path.is_dir():
            checkpoint, keys = read_run(path)
            saved = policy = checkpoint["policy"]
        else:
            saved = json.loads(path.read_text())
            keys, learned_with = {name: torch.tensor(key) for name, key in saved["keys"].items()}, saved.get("query")
    except KnowledgeError:
        raise
    except Exception as error:  # a foreign file raises anything
        remedy = "name a KIAN run or its --save-keys file"
        raise KnowledgeError(f"keys {source} cannot be read ({type(error).__name__}); {remedy}") from error
    query = [p for name, p in actor.items() if name.startswith("query.")]
    if "query" not in parts and learned_with != query_hash(query):
        print(f"keys mean something only to the query that they were learned with, and that of {source} is not taken "
              "along; --warm keys+query does, from a run folder", file=sys.stderr)
    if cosine is not None and saved.get("score") == ("dot" if cosine else "cosine"):
        print(f"keys {source}: one of the two runs scores by cosine, the other by dot product", file=sys.stderr)
    inner_key = keys.pop("inner", None)
    if path.is_dir():
        frozen = f"inner.{path.resolve().name}"
        if keys.pop(frozen, None) is not None and frozen in names:
            print(f"{frozen} is taken to be {path}, not the run of that name which it was given", file=sys.stderr)
        if inner_key is not None:
            keys |= {"inner": inner_key} if "inner" in parts else {}
            if policy.get("fusion") != "logit":  # there the frozen policy has the key's effect in it
                keys[frozen] = inner_key
    elif not keys.keys() & set(names):
        raise KnowledgeError(f"{source} has keys of {', '.join(keys) or 'nothing'}, and none of these is here "
                             f"({', '.join(names)}); add them with --knowledge, or leave --load-keys out")
    for i, name in enumerate(names):
        if name not in keys:
            continue
        if keys[name].shape != actor["keys"][i].shape:
            width = actor["keys"].shape[1]
            raise KnowledgeError(f"keys {source}: {name} has {keys[name].numel()} numbers, not {width}")
        actor["keys"][i] = keys[name]
    for part in parts:
        ours, layers = [p for name, p in actor.items() if name.startswith(f"{part}.")], policy.get(part) or []
        if part == "query" and "inner_key_head" in policy:  # frozen apart, trained as one: query | inner key
            layers = layers[:-2] + [torch.cat(pair, -1) for pair in zip(layers[-2:], policy["inner_key_head"])]
        if [p.shape for p in ours] != [p.shape for p in layers]:
            raise KnowledgeError(f"keys {source}: its {part} network has other sizes; use its sizes and --inner-key, "
                                 "or --warm keys")
        for p, theirs in zip(ours, layers):
            p.copy_(theirs)
    if parts and normalizer:
        if normalizer.on == math.isinf(policy["clip"]):
            raise KnowledgeError(f"keys {source}: its networks were trained with --{'no-' * normalizer.on}normalize; "
                                 "start this run with it, too")
        normalizer.load_state_dict(checkpoint["normalizer"])
    taken = [name for name in names if name in keys]
    print(f"keys taken over: {', '.join(taken) or 'none'}; fresh: "
          f"{', '.join(name for name in names if name not in keys) or 'none'}", file=sys.stderr)
