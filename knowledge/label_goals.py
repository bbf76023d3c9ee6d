"""Ask a language model for goals that make sense in pieces of experience, and keep them with the situation.

    python -m knowledge.label_goals                                         # from the recordings: no key, no network
    python -m knowledge.label_goals --mode record --model NAME --base-url URL --situations 500 --max-calls 600

What was answered is kept as it comes: an interrupted command goes on where it stopped. Stage two of BK-Goal; use the
result as `python algos/bk_goal.py --knowledge goals:FILE`.
"""
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from errors import UserError
from knowledge import labelling
from knowledge.dataset import text_of
from llm import client

TRIES = 15  # of one situation, while the answer has no list
STEPS = 3  # of a situation


@dataclass
class Args(labelling.Args):
    """Background knowledge as goals."""
    situations: int = 500  # pieces of experience
    budget: int = 6000  # tokens of a conversation, above which its oldest part is left out


def goals_in(text: str) -> list[str]:
    """The lines of a Markdown list. Raises ValueError where there is none."""
    goals = [line[2:].strip() for line in text.splitlines() if line.startswith("- ") and line[2:].strip()]
    if not goals:
        raise ValueError('no goals; every goal is a line that begins with "- "')
    return list(dict.fromkeys(goals))


def main(args: Args) -> Path:
    """Ask for goals and write the library; returns the file."""
    client.at_least(1, args, "situations", "budget")
    family, dataset = labelling.family_of(args.env), labelling.dataset_of(args)
    chat, rng = labelling.Chat(args, f"bk_goals_{family}"), np.random.default_rng(args.seed)
    role = client.prompt("bk_goals", environment=client.prompt(f"bk_environment_{family}"))
    messages = [{"role": "system", "content": role}]
    library, index = [], {}
    for number in tqdm(range(args.situations), desc="situations", disable=None):
        situation = text_of(dataset.draw(rng, STEPS), dataset.words)
        messages.append({"role": "user", "content": client.prompt("bk_goals_situation", situation=situation)})
        messages = labelling.pruned(messages, args.budget)
        if args.mode == "replay" and not chat.answers and chat.key(messages) not in chat.recorded and library:
            break  # no more was recorded
        chat.estimate_rest(messages, 0, args.situations - number, TRIES)
        try:
            goals, messages = chat.ask_for(messages, goals_in, TRIES)
        except client.Unusable as error:
            print(f"situation {number} is left out: {error}")
            messages = messages[:-1]
            continue
        library.append({"text": situation, "goals": [index.setdefault(goal, len(index)) for goal in goals]})
    if not library:
        raise UserError(f"{args.model} gave no list of goals; try another --model")
    out = labelling.out_of(args, f"goals-{family}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    saved = {"env": args.env, "dataset": dataset.hash, "source": labelling.source_of(args), "model": args.model,
             "goals": list(index), "library": library}
    out.write_text(json.dumps(saved, indent=1) + "\n")
    print(f"wrote {out}: {len(library)} situations, {len(index)} goals; use it as python algos/bk_goal.py --knowledge "
          f"goals:{out}")
    return out


if __name__ == "__main__":
    client.command(main, Args, __doc__)
