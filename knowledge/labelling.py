"""What the three labelling commands share: their flags, and a client whose answers a person may write."""
from dataclasses import dataclass, replace
from pathlib import Path

from errors import UserError
from knowledge.dataset import Dataset, shipped_for
from llm import client

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Args(client.Args):
    """Flags of the labelling commands."""
    env: str = "BabyAI-Text-GoToLocal-Pretraining-S20"  # an id of the environment; its shipped dataset is labelled
    dataset: str = ""  # folder of another dataset: RUN_DIR/dataset of algos/ppo_rnd.py --collect
    recordings: str = ""  # file that keeps what was said; empty: in llm/recordings
    out: str = ""  # file to write; empty: runs/labels/...
    seed: int = 42  # of the segments that are shown
    temperature: float = 0.5  # of sampling
    by_hand: str = ""  # file with answers written by a person, divided by lines of ===, for what is not recorded yet


class Chat(client.Client):
    """A client that takes what is not recorded from a list of answers that a person wrote."""

    def __init__(self, args: Args, name: str):
        if args.by_hand:
            args = replace(args, workers=1)  # answers are for the questions in their order
        super().__init__(args, args.recordings or ROOT / "llm" / "recordings" / f"{name}.jsonl")
        self.answers = []
        self._rest_told = False  # what all the conversations will cost, which a line about one question does not say
        if args.by_hand:
            if args.model != client.HANDWRITTEN:
                raise UserError(f"--by-hand {args.by_hand} needs --model {client.HANDWRITTEN}")
            self.answers = [part.strip() for part in client.text_in("by-hand", args.by_hand).split("\n===\n")]
            while self.answers and not self.answers[-1]:  # a line of === at the end
                self.answers.pop()

    def ask(self, messages: list[client.Message], sample: int = 0, extra: dict | None = None) -> client.Reply:
        if self.args.by_hand and self.key(messages, sample, extra) not in self.recorded:
            if not self.answers:
                raise UserError(f"--by-hand {self.args.by_hand} has too few answers; name a file with the next ones")
            self.write_by_hand(messages, self.answers.pop(0), sample, extra)
        return super().ask(messages, sample, extra)

    def estimate_rest(self, messages: list[client.Message], sample: int, left: int, tries: int) -> None:
        """Say before the first call what `left` conversations cost, each of which goes on from the one before it. They
        are pruned to --budget tokens, which all but the first have."""
        if not self._rest_told and (self.args.mode == "off" or self.key(messages, sample) not in self.recorded):
            self._rest_told = True
            self.estimate([[{"role": "user", "content": "x" * 4 * self.args.budget}]] * left, most=left * tries)


def family_of(env_id: str) -> str:
    """minigrid or crafter: by which prompts and files are named. Raises UserError for others."""
    folder = shipped_for(env_id)
    if folder is None:
        raise UserError(f"{env_id} has no description; BabyAI-Text, MiniGrid and Crafter tasks have one")
    return folder.name


def dataset_of(args: Args) -> Dataset:
    """The dataset that is to be labelled. Raises UserError for one of another environment than `--env`, and for a seed
    that is none."""
    client.at_least(0, args, "seed")
    dataset = Dataset(args.dataset or shipped_for(args.env))
    if family_of(dataset.env) != family_of(args.env):
        raise UserError(f"--dataset {args.dataset} is not of --env {args.env}; add --env {dataset.env}")
    return dataset


def source_of(args: Args) -> str:
    """Who answers, as results have to say."""
    return "handwritten" if args.model == client.HANDWRITTEN else "api"


def pruned(messages: list[client.Message], budget: int) -> list[client.Message]:
    """A conversation of at most `budget` tokens, four characters counted as one: the oldest question and answer after
    the system's messages go first; these and the last question always stay."""
    system = [message for message in messages if message["role"] == "system"]
    rest = messages[len(system):]
    while len(rest) > 2 and sum(len(message["content"]) for message in system + rest) > 4 * budget:
        rest = rest[2:]
    return system + rest


def out_of(args: Args, name: str) -> Path:
    """The file to write."""
    return Path(args.out or Path("runs", "labels", name))
