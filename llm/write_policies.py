"""Let a language model write policies for an environment from its description, check them, and keep them in a file.

    python -m llm.write_policies --env Hopper-v4                         # from the recordings that ship, no key
    python -m llm.write_policies --env Hopper-v4 --mode record --model NAME --base-url http://127.0.0.1:8080/v1

The description is llm/prompts/tasks/<task>.toml, which says what each number means; the environment itself is neither
made nor tried. Each of `--candidates` answers is checked: plain numeric code, runs in the sandbox on 1,000 random
observations, gives finite actions of the right shape, the same ones whatever it was asked before. What fails goes back
to the model with the reason, twice at most. The first `--keep` that pass are what `--knowledge llm:<name>` takes; all
are stored with prompt, reply, code and hash. This command chooses nothing by its return: `benchmarks/rules.py
--knowledge llm:<name>` measures that, with episodes that are its own.
"""
import json
import os
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from errors import UserError
from llm import client
from llm.sandbox import Sandbox, SandboxError, code_in, digest

ROOM = Path(__file__).resolve().parent
TASKS = ROOM / "prompts" / "tasks"
OBSERVATIONS = 1000  # random ones of the check


@dataclass
class Args(client.Args):
    """Let a language model write policies for an environment, and check them."""
    env: str = "Hopper-v4"  # environment id, with a description in llm/prompts/tasks
    candidates: int = 5  # answers to ask for; in replay at most those that are recorded
    keep: int = 1  # policies that are used, the first that pass
    repairs: int = 2  # times that an answer which fails goes back to the model
    grammar: str = ""  # file with a grammar for servers of the llama.cpp family, for example llm/prompts/policy.gbnf
    recordings: str = str(ROOM / "recordings" / "policies.jsonl")  # what was said, one answer a line
    out: str = ""  # file of the policies; empty: llm/policies/<task>.json, with the model's name if a model wrote them


def task_for(env: str) -> tuple[str, dict[str, Any]]:
    """Name and description of the task of an environment id. Raises UserError where there is none."""
    tasks = {path.stem: tomllib.loads(path.read_text()) for path in sorted(TASKS.glob("*.toml"))}
    for name, task in tasks.items():
        if env.startswith(tuple(task["envs"])):
            return name, task
    raise UserError(f"{env} has no description; copy llm/prompts/tasks/hopper.toml and say there what its observations "
                    f"and actions mean (there are {', '.join(tasks)})")


def question(task: dict[str, Any]) -> list[client.Message]:
    """The prompt: description, tables, form of the answer."""
    entries = task["observation"]
    tables, parts = [], []
    for name, entry in entries.items():
        lines = [f"| {i} | {text} | {unit} | {low:g} to {high:g} |"
                 for i, (text, unit, low, high) in enumerate(entry["rows"])]
        title = "" if name == "obs" else f'`obs["{name}"]`:\n\n'
        tables.append(title + "\n".join(["| index | meaning | unit | range |", "|---|---|---|---|", *lines]))
        parts.append(f'`obs["{name}"]` ({len(lines)} numbers)')
    obs = f"a dict of arrays: {', '.join(parts)}"
    if "obs" in entries:
        obs = f"an array of {len(entries['obs']['rows'])} numbers"
    actions = "\n".join(f"| {i} | {text} |" for i, text in enumerate(task["actions"]))
    text = client.prompt("policy", task=task["task"].strip(), observations="\n\n".join(tables), actions=actions,
                         obs=obs, action_dim=str(len(task["actions"])))
    return [{"role": "user", "content": text}]


def random_observations(task: dict[str, Any]) -> np.ndarray | dict[str, np.ndarray]:
    """Uniform in the ranges of the description: (1000, n), or a dict of such arrays."""
    rng = np.random.default_rng(0)
    drawn = {}
    for name, entry in task["observation"].items():
        low, high = np.array([row[2:] for row in entry["rows"]]).T
        drawn[name] = rng.uniform(low, high, (OBSERVATIONS, len(low)))
    return drawn.get("obs", drawn)


def gate(reply: str, task: dict[str, Any]) -> str:
    """The code in `reply`, if it can be used as a policy. Raises SandboxError, whose message the model is told."""
    code = code_in(reply, ["policy"])
    obs, shape = random_observations(task), (len(task["actions"]),)
    order = np.random.default_rng(1).permutation(OBSERVATIONS)
    mixed = {name: x[order] for name, x in obs.items()} if isinstance(obs, dict) else obs[order]
    with Sandbox(code, ["policy"]) as box:
        first = box.call("policy", obs, shape=shape)
        if box.error:
            raise SandboxError(f"policy fails in {box.failed} of {OBSERVATIONS} random states: {box.error}")
        second = box.call("policy", mixed, shape=shape)
    if not np.array_equal(first[order], second):
        raise SandboxError("policy gives another action for the same state when it is asked again: it must remember "
                           "nothing and draw no random numbers")
    return code


def write(args: Args) -> Path:
    """Ask, check, and write the file; what was asked is kept in the recordings whatever comes of it."""
    client.at_least(1, args, "candidates", "keep")
    client.at_least(0, args, "repairs")
    name, task = task_for(args.env)
    if args.out and Path(args.out).suffix != ".json":
        raise UserError(f"--out {args.out}: --knowledge llm:... tells its files by their ending; call it "
                        f"{Path(args.out).with_suffix('.json')}")
    extra = {"grammar": client.text_in("grammar", args.grammar)} if args.grammar else None
    chat = client.Client(args, args.recordings)
    messages = question(task)
    chat.estimate([messages] * args.candidates, extra, most=args.candidates * (args.repairs + 1))
    policies, kept = [], 0
    for sample in range(args.candidates):
        if args.mode == "replay" and sample and chat.key(messages, sample, extra) not in chat.recorded:
            break
        entry = candidate(chat, messages, sample, task, args.repairs + 1, extra)
        entry["used"] = entry["refused"] == "" and kept < args.keep
        kept += entry["used"]
        policies.append(entry)
        print(f"{sample}: {entry['refused'] or 'can be used'}{', and is' if entry['used'] else ''}")
    if not kept:
        kept_in = "" if args.mode == "off" else f"; {args.recordings} has them"
        raise UserError(f"none of {len(policies)} answers of {args.model} can be used{kept_in}; ask for more "
                        "--candidates, or another --model")
    out = Path(args.out or ROOM / "policies" / f"{name}{tag_of(args.model)}.json")
    text = json.dumps({"task": name, "envs": task["envs"], "prompt": messages, "policies": policies}, indent=1)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(out.name + ".part")
    part.write_text(text + "\n")
    os.replace(part, out)
    short = out.stem if out.parent == ROOM / "policies" and out.suffix == ".json" else str(out)
    print(f"wrote {out}: use it as --knowledge llm:{short}")
    return out


def tag_of(model: str) -> str:
    """What of a file's name says the model: -NAME. What cannot stand in one is replaced, and a digest tells it apart
    from names that would look the same."""
    if model == client.HANDWRITTEN:
        return ""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", model).strip("-.")
    return f"-{model}" if plain == model else f"-{plain}-{digest(model)[:6]}".replace("--", "-")


def candidate(chat: client.Client, messages: list[client.Message], sample: int, task: dict[str, Any], tries: int,
              extra: dict[str, Any] | None) -> dict[str, Any]:
    """One answer, repaired where it needs that; `refused` says why it cannot be used, empty where it can."""
    reply, code, refused, key = "", "", "", chat.key(messages, sample, extra)

    def parse(text: str) -> str:
        nonlocal reply
        reply = text
        return gate(text, task)

    try:
        code, said = chat.ask_for(messages, parse, tries, sample, extra)
        key = chat.key(said[:-1], sample, extra)  # of the question that this code answers, perhaps a second one
    except client.Unusable as error:
        refused = str(error)
    source = client.HANDWRITTEN if chat.args.model == client.HANDWRITTEN else "api"
    return {"sample": sample, "key": key, "source": source, "model": chat.args.model,
            "refused": refused, "reply": reply, "code": code, "sha256": digest(code) if code else ""}


if __name__ == "__main__":
    client.command(write, Args, __doc__)
