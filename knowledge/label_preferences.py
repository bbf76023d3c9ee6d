"""Which of two pieces of experience is better? Ask a language model, or the rule annotator, about thousands of pairs.

    python -m knowledge.label_preferences                                   # --annotator rules: no model at all
    python -m knowledge.label_preferences --annotator model --mode record --model NAME --base-url URL --max-calls 10000

A model is asked in both orders with --swap, and what contradicts itself is dropped. What was answered is kept as it
comes: an interrupted command goes on where it stopped. Stage two of BK-Pref; python -m knowledge.train_preferences
comes next.
"""
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from errors import UserError
from knowledge import annotator, labelling
from knowledge.dataset import Dataset, Segment, text_of
from llm import client

INVALID = -1  # label of an answer without a rank
MOST_INVALID = 0.2  # share of answers


@dataclass
class Args(labelling.Args):
    """Background knowledge as preferences."""
    annotator: Literal["rules", "model"] = "rules"  # who prefers: a rule, which is no language model, or a model
    pairs: int = 5000  # pairs of segments
    steps: int = 5  # steps of a segment
    swap: bool = True  # ask a model about each pair in both orders, and drop what contradicts itself
    grammar: bool = False  # hold a small model to the form of an answer (servers of the llama.cpp family)
    max_tokens: int = 200  # longest reply, in tokens


def rank(text: str) -> float:
    """0 for "A > B", 1 for "B > A", 0.5 for "A = B" on the first line after a [Rank]: after the last one whose line has
    exactly one of these. -1 where there is none."""
    meaning = {"A>B": 0.0, "B>A": 1.0, "A=B": 0.5, "B=A": 0.5}
    for after in reversed(text.split("[Rank]")[1:]):
        line = after.strip().partition("\n")[0]
        said = {re.sub(r"\s", "", relation) for relation in re.findall(r"A\s*[>=]\s*B|B\s*[>=]\s*A", line)}
        if len(said) == 1:
            return meaning[said.pop()]
    return INVALID


def pairs_of(dataset: Dataset, args: Args) -> list[tuple[Segment, Segment]]:
    """The pairs of a seed, both segments drawn independently."""
    rng = np.random.default_rng(args.seed)
    return [(dataset.draw(rng, args.steps), dataset.draw(rng, args.steps)) for _ in range(args.pairs)]


def question(a: Segment, b: Segment, family: str, words: list[str]) -> list[client.Message]:
    """One conversation for each pair: nothing is remembered."""
    role = client.prompt("bk_preference", environment=client.prompt(f"bk_environment_{family}"))
    shown = "\n\n".join(f"{name}:\n{text_of(segment, words)}" for name, segment in (("A", a), ("B", b)))
    return [{"role": "system", "content": role}, {"role": "user", "content": shown}]


def both_ways(there: float, back: float) -> float:
    """The label of a pair that was asked as (A, B) and as (B, A): -1 where the two contradict each other."""
    if there == INVALID or back == INVALID or there != 1 - back:
        return INVALID
    return there


def main(args: Args) -> Path:
    """Label the pairs and write labels.jsonl; returns the file."""
    client.at_least(1, args, "pairs", "steps")
    family, dataset = labelling.family_of(args.env), labelling.dataset_of(args)
    pairs, about = pairs_of(dataset, args), {}
    rules = [annotator.prefer(a, b) for a, b in pairs]
    labels, source = rules, "rules"
    if args.annotator == "model":
        labels, about = ask(args, family, dataset, pairs)
        agrees, decided = annotator.agreement(labels, rules)
        about |= {"agrees_with_rules": agrees, "decided_by_both": decided}
        source = labelling.source_of(args)
        print(f"of {len(pairs)} pairs {sum(x != INVALID for x in labels)} have a label; where both decide, the model "
              f"agrees with the rules in {agrees:.2f} of {decided}")
    out = labelling.out_of(args, f"preferences-{family}.jsonl")
    meta = {"dataset": dataset.hash, "env": args.env, "steps": args.steps, "source": source, **about}
    lines = [json.dumps({"a": [a.episode, a.start], "b": [b.episode, b.start], "label": label})
             for (a, b), label in zip(pairs, labels)]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join([json.dumps(meta), *lines]) + "\n")
    counts = {name: labels.count(value) for name, value in
              (("first", 0), ("second", 1), ("alike", 0.5), ("dropped", INVALID))}
    print(f"wrote {out}: {', '.join(f'{name} {count}' for name, count in counts.items())}; next: python -m "
          f"knowledge.train_preferences --labels {out}")
    return out


def ask(args: Args, family: str, dataset: Dataset, pairs: list[tuple[Segment, Segment]]) -> tuple[list[float], dict]:
    """Labels of a model, and what to know about them."""
    chat = labelling.Chat(args, f"bk_preferences_{family}")
    extra = {"grammar": (client.PROMPTS / "bk_preference.gbnf").read_text()} if args.grammar else None
    asked = [question(*pair, family, dataset.words) for pair in pairs]
    if args.swap:
        asked += [question(b, a, family, dataset.words) for a, b in pairs]
    chat.estimate(asked, extra, samples=[0] * len(asked))
    answers, ranks = chat.ask_all(asked, extra), []
    for reply in tqdm(answers, total=len(asked), desc="answers", disable=None):
        ranks.append(rank(reply.text))
        invalid = ranks.count(INVALID)
        if len(ranks) >= 50 and invalid > MOST_INVALID * len(ranks):
            raise UserError(f"{invalid} of {len(ranks)} answers of {args.model} have no rank; try --grammar, or "
                            "another --model")
    first = sum(x == 0 for x in ranks) / len(ranks)
    about = {"model": args.model, "says_first": first, "invalid": ranks.count(INVALID) / len(ranks)}
    if not args.swap:
        return ranks, about
    labels = [both_ways(there, back) for there, back in zip(ranks, ranks[len(pairs):])]
    contradicted = sum(x == INVALID for x in labels) / len(labels)
    print(f"{args.model} prefers the first in {first:.2f} of its answers, and contradicts itself or gives no rank in "
          f"{contradicted:.2f} of pairs")
    return labels, about | {"contradicts_itself": contradicted}


if __name__ == "__main__":
    client.command(main, Args, __doc__)
