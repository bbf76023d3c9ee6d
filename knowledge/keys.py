"""Attention keys from run to run, by the names of the policies that they belong to (KIAN's incremental learning)."""
import json
import sys
from pathlib import Path

import torch

from knowledge.registry import KnowledgeError

QUERY = ("query.", "encoder.", "trunk.")  # the networks that make a query: PPO's reads what two others make of an image
NAMES = "knowledge.json"  # in a run folder: the names of its policies, in the order of its keys


def names_of(folder: Path) -> list[str]:
    """The policies of a run, "inner" first. Raises KnowledgeError where the run names none."""
    try:
        names = json.loads((folder / NAMES).read_text())["policies"]
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            return names
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise KnowledgeError(f"{folder} has no readable {NAMES}: name the folder of a run that was given knowledge")


@torch.no_grad()
def take_over(actor: dict[str, torch.Tensor], normalizer, names: list[str], source: str) -> None:
    """Overwrite, in place, the query networks of `actor` and those of its keys whose names the run `source` knows;
    others keep their fresh ones, for a key means something only to the query that it was learned with.

    `actor` maps names to tensors: "keys" (n+1, m) in the order of `names`, "query.0.weight", ... With the query comes
    the state of `normalizer` (an envs.Normalizer or None), by which it knows its inputs. The key of the trained policy
    of `source` goes to `inner.<its folder>`, if that is among `names`.
    Raises KnowledgeError for a run that cannot be read or does not fit.
    """
    folder = Path(source)
    theirs = names_of(folder)
    try:
        saved = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True, mmap=True)
        old = saved["agent"].get("actor", saved["agent"])
        keys = dict(zip(theirs, old["keys"]))
        query = {name: p for name, p in old.items() if name.startswith(QUERY)}
    except Exception as error:  # a foreign file raises anything
        raise KnowledgeError(f"--init-from {source}: no keys can be read there ({type(error).__name__}); name a run of "
                             "this script with knowledge") from error
    inner = keys.pop("inner")
    if "inner_key.weight" not in old:  # there the inner policy has no key of its own, but a function of the state
        keys[f"inner.{folder.resolve().name}"] = inner
    ours = {name: p for name, p in actor.items() if name.startswith(QUERY)}
    if {name: p.shape for name, p in ours.items()} != {name: p.shape for name, p in query.items()}:
        raise KnowledgeError(f"--init-from {source}: its query network has other sizes; the inputs have to be the same")
    if normalizer is not None:
        normalizer.load_state_dict(saved["normalizer"])
    for name, p in ours.items():
        p.copy_(query[name])
    for i, name in enumerate(names):
        if name in keys:
            actor["keys"][i] = keys[name]
    taken = [name for name in names if name in keys]
    fresh = [name for name in names if name not in keys]
    print(f"keys taken over: {', '.join(taken) or 'none'}; fresh: {', '.join(fresh) or 'none'}", file=sys.stderr)
