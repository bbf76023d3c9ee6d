"""Ask a language model for a potential as code, show it what its code says of experience, and ask for a better one.

    python -m knowledge.label_code                                          # from the recordings: no key, no network
    python -m knowledge.label_code --mode record --model NAME --base-url URL

Every version is written (code-0.py, code-1.py, ...), the last one that works as code-final.py. What was answered is
kept as it comes: an interrupted command goes on where it stopped. Stage two of BK-Code; use the result as
`python algos/bk_code.py --knowledge llm:FILE`.
"""
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from errors import UserError
from knowledge import labelling
from knowledge.code import FUNCTION, MOST_INVALID, Code
from knowledge.dataset import Dataset, Segment, text_of
from knowledge.history import History
from llm import client
from llm.sandbox import SandboxError, code_in, digest

TRIES = 15  # of one version, while the answer holds no code that works


@dataclass
class Args(labelling.Args):
    """Background knowledge as code."""
    iterations: int = 20  # versions of the code
    segments: int = 5  # pieces of experience that a version is tried on
    horizon: int = 5  # steps of the past that the code is given
    budget: int = 6000  # tokens of a conversation, above which its oldest part is left out


def history_of(segments: list[Segment]) -> History:
    """The last moments of segments."""
    obs = {name: torch.as_tensor(np.stack([segment.obs[name] for segment in segments])) for name in segments[0].obs}
    action = torch.as_tensor(np.stack([segment.action for segment in segments])).long()
    return History(obs, action, torch.tensor([segment.start + len(segment.action) for segment in segments]))


def tried(code: str, segments: list[Segment], words: list[str]) -> str:
    """What `code` says of segments, as text. Raises SandboxError where it fails."""
    box, parts = Code(code, "generated"), []
    for number, segment in enumerate(segments, 1):
        value, info = box.explain(history_of([segment]))
        if box.box.error:
            raise SandboxError(f"{FUNCTION} fails: {box.box.error}")
        said = ", ".join(f"{name} {part:.4f}" for name, part in info.items())
        parts.append(f"Piece {number}. {text_of(segment, words)}\nValue: {value:.4f} ({said})")
    return "\n\n".join(parts)


def check_on(code: str, dataset: Dataset, horizon: int) -> float:
    """Deviation of the code's values over 1,000 moments. Raises SandboxError where it fails in too many."""
    box = Code(code, "generated")
    values = box(dataset.histories(1000, horizon))
    failed = float(values.isnan().float().mean())
    if failed > MOST_INVALID:
        raise SandboxError(f"{FUNCTION} fails in {failed:.0%} of 1,000 moments: {box.box.error}")
    return float(values[~values.isnan()].std(correction=0))


def main(args: Args) -> Path:
    """Ask for the versions and write them; returns the file of the final one."""
    client.at_least(1, args, "iterations", "segments", "horizon", "budget")
    family, dataset = labelling.family_of(args.env), labelling.dataset_of(args)
    chat, rng = labelling.Chat(args, f"bk_code_{family}"), np.random.default_rng(args.seed)
    folder = labelling.out_of(args, f"code-{family}")
    task = client.prompt(f"bk_code_{family}", environment=client.prompt(f"bk_environment_{family}"),
                         steps=str(args.horizon), actions=numbered(dataset.words))
    messages = [{"role": "system", "content": client.prompt("bk_code_role")},
                {"role": "system", "content": task},
                {"role": "user", "content": "Write the function."}]
    final, versions = "", []
    failed = 0  # versions without code that works; after one the same question is asked for another answer
    for number in tqdm(range(args.iterations), desc="versions", disable=None):
        messages = labelling.pruned(messages, args.budget)
        if args.mode == "replay" and not chat.answers and chat.key(messages, failed) not in chat.recorded and final:
            break  # no more was recorded
        chat.estimate_rest(messages, failed, args.iterations - number, TRIES)
        segments = [dataset.draw(rng, args.horizon) for _ in range(args.segments)]
        results = ""

        def parse(text: str) -> str:
            nonlocal results
            code = code_in(text, [FUNCTION])
            results = tried(code, segments, dataset.words)
            check_on(code, dataset, args.horizon)
            return code

        try:
            code, messages = chat.ask_for(messages, parse, TRIES, failed)
        except client.Unusable as error:
            print(f"version {number} is left out: {error}")
            failed += 1
            continue
        final = code
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"code-{number}.py").write_text(code)
        versions.append({"version": number, "sha256": digest(code), "deviation": check_on(code, dataset, args.horizon)})
        messages = [*messages, {"role": "user", "content": client.prompt("bk_code_results", results=results)}]
    if not final:
        raise UserError(f"{args.model} wrote no code that works in {args.iterations} versions; try another --model")
    (folder / "code-final.py").write_text(final)
    about = {"source": labelling.source_of(args), "model": args.model, "dataset": dataset.hash, "versions": versions}
    (folder / "meta.json").write_text(json.dumps(about, indent=1) + "\n")
    print(f"wrote {folder / 'code-final.py'}, version {versions[-1]['version']}: use it as "
          f"python algos/bk_code.py --knowledge llm:{folder / 'code-final.py'}")
    return folder / "code-final.py"


def numbered(words: list[str]) -> str:
    return ", ".join(f"{word} {number}" for number, word in enumerate(words))


if __name__ == "__main__":
    client.command(main, Args, __doc__)
