"""The rule annotator: preferences from a rule, where there is no model to ask for thousands of them.

It is no language model, and what is trained on its labels is not knowledge of one: tables call it "rules". It reads
captions alone, not the state of the environment.
"""
import re
from collections.abc import Sequence

from knowledge.dataset import Segment

TIE = 0.25  # segments whose scores differ less are alike
FAR = 12  # distance of what is not in view
OBJECT = re.compile(r"You see an? \w+ (key|ball|box)((?: \d+ steps? (?:left|right))?(?: and)?(?: \d+ steps? forward)?)")
RESOURCE = re.compile(r"You see (tree|water|cow|table) at (\d+) steps?")
VITAL = re.compile(r"(health|food|drink|energy) (\d)/9", re.I)
HELD = re.compile(r"(\d) ([a-z ]+?)(?=,|$|\.)")


def distance(caption: str) -> int:
    """Steps to the nearest thing that is of use, FAR where none is in view."""
    found = [sum(map(int, re.findall(r"\d+", where))) for _, where in OBJECT.findall(caption)]
    found += [int(steps) for _, steps in RESOURCE.findall(caption)]
    return min(found, default=FAR)


def possessions(caption: str) -> dict[str, int]:
    """What is carried, and how the player is: {name: number}."""
    held = caption.partition("You have ")[2]
    carried = {"carried": 1} if "You carry" in caption else {}
    return carried | {name: int(count) for count, name in HELD.findall(held)} | {
        name.lower(): int(count) for name, count in VITAL.findall(caption)}


def score(segment: Segment) -> float:
    """How much happens in a segment: a point for each step that changes what is seen, half a point off for each that
    does not, the steps by which the nearest thing came nearer, and what was gained less what was lost."""
    captions = segment.captions
    changes = [before != after for before, after in zip(captions, captions[1:])]
    first, last = possessions(captions[0]), possessions(captions[-1])
    gained = sum(last.get(name, 0) - first.get(name, 0) for name in first | last)
    return sum(changes) - 0.5 * (len(changes) - sum(changes)) + distance(captions[0]) - distance(captions[-1]) + gained


def prefer(a: Segment, b: Segment) -> float:
    """0 where the first is better, 1 where the second is, 0.5 where they are alike."""
    difference = score(a) - score(b)
    if abs(difference) < TIE:
        return 0.5
    return 0.0 if difference > 0 else 1.0


def agreement(labels: Sequence[float], rules: Sequence[float]) -> tuple[float, int]:
    """Share of pairs that both decide, and decide alike, and how many these are."""
    both = [(x, y) for x, y in zip(labels, rules) if x in (0, 1) and y in (0, 1)]
    return (sum(x == y for x, y in both) / len(both) if both else float("nan")), len(both)
