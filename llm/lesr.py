"""LESR's outer loop: a language model writes state features and a reward, is told how agents did with them, goes on.

    python -m llm.lesr --env Hopper-v4 --iterations 2 --candidates 2 --total-timesteps 20000     # recordings, no key
    python -m llm.lesr --env Hopper-v4 --iterations 3 --candidates 6 --total-timesteps 800000 --workers 2 \\
        --mode record --model NAME --base-url http://127.0.0.1:8080/v1                           # the authors' example

Wang et al. (ICML 2024, arXiv 2407.13237). Each iteration asks for `--candidates` pairs of functions, `revise_state` and
`intrinsic_reward`, checks them in the sandbox, trains algos/lesr.py with each through benchmarks/run.py, and reports
the returns and the Lipschitz constants of all numbers to the model, whose analysis goes into the next question. The
best pair of all iterations is best.py. Everything is in one folder: summary.md is the page to read. If it is
interrupted, run the same command again. It keeps all answers and finished trainings, and continues half-finished ones.

The questions of a later iteration hold numbers that were measured, which differ from machine to machine. So that the
handwritten recordings are found everywhere, a question to the model `handwritten` has no numbers in it.
"""
import csv
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from env_id import split_id
from errors import UserError
from llm import client
from llm.sandbox import Sandbox, SandboxError, code_in, digest
from llm.write_policies import task_for

ROOT = Path(__file__).resolve().parent.parent
FUNCTIONS = ["revise_state", "intrinsic_reward"]
RANDOM = 256  # states that a pair is tried on: normal ones, and zeros
LARGEST_REWARD = 100.0  # in these; on real states there is no bound: Walker2d's pair exceeds it when nearly still
TRIES = 49  # answers that are read in one iteration, as in the authors' code
EVALUATIONS = 10  # the last ones, whose mean is what a pair is worth
MANY_PARTS = ("AntMaze", "Fetch", "Adroit", "PointMaze", "HandManipulate")  # tasks whose model is told to coordinate
FIXED = ["env", "model", "temperature", "max_tokens", "candidates", "total_timesteps", "seeds", "eval_every", "flags",
         "repairs", "candidates_dir"]  # what a loop keeps to its end


@dataclass
class Args(client.Args):
    """Let a language model write state features and an intrinsic reward, train with them, and let it improve them."""
    env: str = "Hopper-v4"  # environment id, with a description in llm/prompts/tasks
    iterations: int = 2  # times that it writes pairs (authors' example: 3)
    candidates: int = 2  # pairs per iteration (authors' example: 6)
    total_timesteps: int = 100_000  # environment steps of training with each pair (authors' example: 800,000)
    seeds: int = 1  # trainings with each pair
    eval_every: int = 5000  # environment steps between evaluations, the last ten of which count
    flags: str = ""  # more flags of algos/lesr.py: --flags="--intrinsic-weight 0.01 --no-compile"
    workers: int = 1  # trainings at a time, one thread each
    repairs: int = 2  # times that an answer which cannot be used goes back to the model; then it is asked afresh
    candidates_dir: str = ""  # folder of .py files to train with instead, once; no model is asked
    recordings: str = str(ROOT / "llm" / "recordings" / "lesr.jsonl")  # what was said, one answer a line
    out: str = ""  # folder of the loop; empty: runs/llm_lesr/<env>


@dataclass
class Candidate:
    """A pair, and what became of the agents that were trained with it."""
    number: int  # in its iteration, from 1
    file: Path  # its code
    reply: str  # the answer that it was in
    returns: list[float] = field(default_factory=list)  # of each seed: the mean of its last evaluations
    word: str = "return"  # what these are; success rate on tasks that have one
    constants: list[float] = field(default_factory=list)  # of every number of the revised state, the mean over seeds
    trouble: str = ""  # why training failed, if it did

    @property
    def code(self) -> str:
        return self.file.read_text()

    @property
    def score(self) -> float:
        return -math.inf if self.trouble else fmean(self.returns)


# ---- what can be used ----------------------------------------------------------------------------------------------


def trial_states(n: int) -> np.ndarray:
    """States (RANDOM, n) that a pair is tried on; the two last are zeros."""
    return np.concatenate([np.random.default_rng(0).standard_normal((RANDOM - 2, n)), np.zeros((2, n))])


def objection(states: np.ndarray, x: np.ndarray, x_again: np.ndarray, reward: np.ndarray, reward_again: np.ndarray
              ) -> str:
    """What is wrong with a pair that made x of states (B, n), gave reward for x, and was asked both again; empty where
    nothing is. The last RANDOM states are those of `trial_states`. A pair with a memory would depend on the order in
    which it is asked."""
    n = states.shape[1]
    if x.ndim != 2 or len(x) != len(states) or x.shape[1] < n:
        return f"revise_state has to return the {n} numbers of a state and then features, (B, n + m) of a batch"
    if reward.shape != (len(states),):
        return "intrinsic_reward has to return one number for each state, (B,) of a batch"
    if not np.array_equal(x[:, :n], states):
        return "revise_state has to begin with the state, unchanged"
    if not (np.isfinite(x).all() and np.isfinite(reward).all()):
        return "they are not finite for random states or zeros"
    if not np.array_equal(x, x_again):
        return "revise_state has a memory, or draws random numbers: twice the same states gave different features"
    if not np.array_equal(reward, reward_again):
        return "intrinsic_reward has a memory, or draws random numbers: twice the same states gave different rewards"
    if np.abs(reward[-RANDOM:]).max() > LARGEST_REWARD:
        return f"the reward is beyond +-{LARGEST_REWARD:g} for random states"
    return ""


def gate(reply: str, n: int) -> str:
    """The code in `reply`, if it is a pair for states of n numbers. Raises SandboxError, which the model is told."""
    code, states = code_in(reply, FUNCTIONS), trial_states(n)

    def call(name: str, rows: np.ndarray, shape: tuple | None) -> np.ndarray:
        found = box.call(name, rows, shape=shape)
        if box.error:
            raise SandboxError(f"{name} fails in some of {len(rows)} random states: {box.error}")
        return found

    with Sandbox(code, FUNCTIONS) as box:
        x, x_again = call("revise_state", states, None), call("revise_state", states[::-1], None)[::-1]
        if x.ndim != 2 or x.shape[1] <= n:
            raise SandboxError(f"revise_state has to return the {n} numbers of s and at least one feature, an array")
        reward, reward_again = call("intrinsic_reward", x, ()), call("intrinsic_reward", x[::-1], ())[::-1]
        if wrong := objection(states, x, x_again, reward, reward_again):
            raise SandboxError(wrong)
    return code


# ---- what is asked -------------------------------------------------------------------------------------------------


def numbers_of(task: dict[str, Any]) -> list[tuple[str, str]]:
    """Meaning and unit of each number of a state, in the order in which algos/lesr.py has them."""
    parts = task["observation"]
    if "obs" in parts:
        return [(row[0], row[1]) for row in parts["obs"]["rows"]]
    goals = [(f"{name.replace('_', ' ')}: {row[0]}", row[1]) for name in ("achieved_goal", "desired_goal")
             for row in parts[name]["rows"]]
    return [*goals, *((row[0], row[1]) for row in parts["observation"]["rows"]),
            ("what is left of the episode, from 1 to 0", "1")]


def first_question(env: str, task: dict[str, Any]) -> str:
    numbers = numbers_of(task)
    n, table = len(numbers), "\n".join(f"| {i} | {text} | {unit} |" for i, (text, unit) in enumerate(numbers))
    note = client.prompt("lesr_coordination") if env.startswith(MANY_PARTS) else ""
    return client.prompt("lesr_first", task=task["task"].strip(), note=note, numbers=table, n=str(n), next=str(n + 1),
                         last=str(n - 1))


def feedback_of(candidates: list[Candidate], n: int, measured: bool = True) -> str:
    """What the model is told of an iteration, for states of n numbers; without what was `measured`, the form of it."""
    pairs = []
    for one in candidates:
        score, state, features = "Return or success rate: (measured)", "(measured)", "(measured)"
        if measured:
            constants = [f"s[{i}] {constant:.2f}" for i, constant in enumerate(one.constants)]
            state, features = (", ".join(part) or "not known" for part in (constants[:n], constants[n:]))
            score = f"Training failed: {one.trouble}" if one.trouble else f"{one.word.capitalize()}: {one.score:.2f}"
        pairs.append(client.prompt("lesr_candidate", number=str(one.number), code=one.code.strip(), score=score,
                                   state=state, features=features))
    return client.prompt("lesr_feedback", count=str(len(candidates)), pairs="\n".join(pairs))


def next_question(first: str, history: list[tuple[str, str]]) -> str:
    """The question of a later iteration; history: results and analysis of each that came before."""
    parts = [f"## Iteration {i}\n\n{results}\nThe analysis:\n\n{analysis.strip()}\n"
             for i, (results, analysis) in enumerate(history, 1)]
    return client.prompt("lesr_next", first=first, history="\n".join(parts))


# ---- asking --------------------------------------------------------------------------------------------------------


def keep(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)


class Writer:
    """Gives the pairs and analyses of a loop: those that its folder has, else what the model answers."""

    def __init__(self, args: Args, n: int):
        self.args, self.n, self.chat = args, n, client.Client(args, args.recordings)

    def pairs(self, question: str, folder: Path) -> list[Candidate]:
        """`--candidates` pairs that can be used. Raises Unusable where too many answers cannot."""
        messages, self.tries = [{"role": "user", "content": question}], 0
        files = [folder / f"candidate-{number}.py" for number in range(1, self.args.candidates + 1)]
        missing = {i: file for i, file in enumerate(files) if not file.is_file()}
        self.chat.estimate([messages] * len(missing), most=TRIES, samples=list(missing))
        if self.args.mode == "replay":
            for i in missing:
                self.chat.ask(messages, i)  # what is not recorded is an error before anything is written
        for i, file in missing.items():
            self.write_pair(messages, i, file)
        replies = [json.loads(file.with_suffix(".json").read_text())["reply"] for file in files]
        return [Candidate(number, file, reply) for number, (file, reply) in enumerate(zip(files, replies), 1)]

    def write_pair(self, messages: list[client.Message], i: int, file: Path) -> None:
        """Ask until an answer can be used: the sample i, repaired if need be, then others that no pair is asked for."""
        def parse(text: str) -> str:
            self.tries += 1
            return gate(text, self.n)

        for sample in count(i, self.args.candidates):
            if self.tries == TRIES:
                raise client.Unusable(f"{self.args.model} wrote too few pairs that can be used in {TRIES} answers; the "
                                      "lines above say why; try another --model")
            try:
                code, said = self.chat.ask_for(messages, parse, min(self.args.repairs + 1, TRIES - self.tries), sample)
            except client.Unusable as error:
                print(f"candidate {i + 1} is asked for anew: {error}")
                continue
            begin(self.args, file.parent.parent)
            about = {"source": source_of(self.args), "model": self.args.model, "sha256": digest(code)}
            keep(file.with_suffix(".json"), json.dumps(about | {"reply": said[-1]["content"]}, indent=1) + "\n")
            keep(file, code)
            return

    def analysis(self, question: str, candidates: list[Candidate], feedback: str, folder: Path) -> str:
        """What the model makes of an iteration, whose `question` its best pair has answered."""
        file = folder / "analysis.md"
        if not file.is_file():
            best = candidates[0] if blind(self.args) else max(candidates, key=lambda one: one.score)
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": best.reply},
                        {"role": "user", "content": client.prompt("lesr_analysis", feedback=feedback)}]
            keep(file, self.chat.ask(messages).text)
        return file.read_text()


def pairs_in(args: Args, n: int, folder: Path) -> list[Candidate]:
    """The files of --candidates-dir as candidates. Raises UserError for one that cannot be used."""
    files = sorted(Path(args.candidates_dir).glob("*.py"))
    if not files:
        raise UserError(f"--candidates-dir {args.candidates_dir} has no .py file; name a folder that has")
    codes = []
    for file in files:
        try:
            codes.append(gate(file.read_text(errors="replace"), n))
        except SandboxError as error:
            raise UserError(f"{file}: {error}") from None
    begin(args, folder.parent)
    kept = [folder / f"candidate-{number}.py" for number in range(1, len(files) + 1)]
    for file, mine, code in zip(kept, files, codes):
        if file.is_file() and file.read_text() != code:
            raise UserError(f"{mine} has changed since this loop began; name another --out")
        keep(file, code)
    return [Candidate(number, file, "") for number, file in enumerate(kept, 1)]


def source_of(args: Args) -> str:
    """Who writes the pairs, as results have to say."""
    return "yours" if args.candidates_dir else client.HANDWRITTEN if blind(args) else "api"


def blind(args: Args) -> bool:
    """Whether a person answers, who saw no measured number."""
    return args.model == client.HANDWRITTEN


# ---- training ------------------------------------------------------------------------------------------------------


def features_of(file: Path) -> str:
    """What `--features` takes; trainings run in the root of the repository."""
    inside = file.is_relative_to(ROOT)
    return f"llm:{file.relative_to(ROOT) if inside else file}"


def suite_of(args: Args, files: list[Path], seeds: int, steps: int, flags: str) -> str:
    """The trainings with these pairs, as benchmarks/run.py reads them."""
    cells = []
    for file in files:
        words = ["--features", features_of(file), "--total-timesteps", str(steps), *shlex.split(flags)]
        cells.append(f'[[cell]]\nalgo = "lesr"\nenvs = [{json.dumps(args.env)}]\nseeds = '
                     f"{list(range(1, seeds + 1))}\nflags = {json.dumps(shlex.join(words))}\n")
    return "\n".join(cells)


def engine(args: Args, suite: Path, bench: Path) -> None:
    """Run what is not finished of a suite. A signal stops the trainings, which save, and ends the program with 128 +
    signal. Raises UserError where the suite cannot be run."""
    stopped = []
    command = [sys.executable, "benchmarks/run.py", "--suite", str(suite), "--root", str(bench), "--workers",
               str(args.workers)]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)  # which gets no Ctrl-C but from here

    def stop(signum: int, _frame) -> None:
        stopped.append(signum)
        process.terminate()

    handlers = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    returncode = process.wait()
    for signum, handler in handlers.items():
        signal.signal(signum, handler)
    if stopped:
        print("stopped; the same command goes on", file=sys.stderr)
        sys.exit(128 + stopped[0])
    if returncode not in (0, 1):  # 1: a training failed, or another process is at it
        raise UserError(f"benchmarks/run.py ended with {returncode}; what it said last is the reason")


def train(args: Args, candidates: list[Candidate], folder: Path, bench: Path) -> None:
    """Train what is not trained yet, and read what came of it. Raises UserError where no training could begin."""
    suite = folder / "suite.toml"
    keep(suite, suite_of(args, [one.file for one in candidates], args.seeds, args.total_timesteps,
                         f"--eval-every {args.eval_every} {args.flags}"))
    engine(args, suite, bench)
    logs = {log: shlex.split(log.open().readline()) for log in sorted(bench.rglob("seed*.log"))}  # with its command
    for one in candidates:
        read_runs(args, one, [log for log, command in logs.items() if features_of(one.file) in command])
    if all(one.trouble for one in candidates) and not any(log.with_suffix("").is_dir() for log in logs):
        raise UserError(f"no training began: {candidates[0].trouble}; {next(iter(logs))} has it all; if --flags is the "
                        "reason, correct it and name another --out")


def read_runs(args: Args, one: Candidate, logs: list[Path]) -> None:
    """Put into a candidate what its trainings left beside their logs, one for each seed."""
    constants = []
    for log in logs:
        curve, ended = log.with_suffix("") / "eval.csv", log.with_suffix(".json")
        rows = list(csv.DictReader(curve.open())) if curve.is_file() else []
        if rows and int(rows[-1]["step"]) >= args.total_timesteps:
            one.word = "return" if math.isnan(float(rows[-1]["success_rate"])) else "success rate"
            column = "return_mean" if one.word == "return" else "success_rate"
            one.returns.append(score_of([float(row[column]) for row in rows[1:]]))
            smooth = curve.with_name("lipschitz.csv")
            if smooth.is_file():  # a machine that stops in the last moment leaves none
                constants.append([abs(float(row["unbiased"])) for row in csv.DictReader(smooth.open())])
        elif ended.is_file():
            lines = [line.strip(" │") for line in log.read_text(errors="replace").split("\n")
                     if "For full helptext" not in line]  # which ends what tyro says of a wrong flag
            one.trouble = next((line for line in reversed(lines) if re.search(r"\w", line)), "no word")[:300]
    if not one.trouble and len(one.returns) < args.seeds:
        raise UserError(f"{one.file} is not trained: another process may be at it; run the same again when it is over")
    one.constants = np.mean(constants, 0).tolist() if constants else []


def score_of(curve: list[float]) -> float:
    """What a run is worth: the mean of its last ten evaluations, all of them where it has fewer."""
    return fmean(curve[-EVALUATIONS:])


# ---- the loop ------------------------------------------------------------------------------------------------------


def run(args: Args) -> Path:
    """Go through the iterations; returns the folder."""
    client.at_least(1, args, "iterations", "candidates", "total_timesteps", "seeds", "eval_every", "workers")
    client.at_least(0, args, "repairs")
    if args.flags.count('"') % 2 or args.flags.count("'") % 2:
        raise UserError(f"--flags={args.flags} has a quote that is not closed")
    if split_id(args.env)[2]:
        raise UserError(f"--env {args.env}: pairs are for states as they are; leave out what stands behind the id")
    _, task = task_for(args.env)
    n, first = len(numbers_of(task)), first_question(args.env, task)
    out = Path(args.out or f"runs/llm_lesr/{args.env}").resolve()
    same_loop(args, out)
    writer = None if args.candidates_dir else Writer(args, n)
    question, history, iterations = first, [], []
    for iteration in range(1, 2 if args.candidates_dir else args.iterations + 1):
        folder = out / f"iteration-{iteration}"
        candidates = writer.pairs(question, folder) if writer else pairs_in(args, n, folder)
        keep(folder / "question.md", question)
        train(args, candidates, folder, out / "bench")
        keep(folder / "feedback.md", feedback_of(candidates, n))
        iterations.append(candidates)
        best = max((one for tried in iterations for one in tried), key=lambda one: one.score)  # of equal ones the first
        summarise(args, out, n, iterations, best)
        if iteration < args.iterations and writer:
            told = feedback_of(candidates, n, measured=not blind(args))
            history.append((told, writer.analysis(question, candidates, told, folder)))
            question = next_question(first, history)
    summary = os.path.relpath(out / "summary.md")
    if best.trouble:
        raise UserError(f"no pair could be trained to the end: {best.trouble}; {summary} has the rest")
    print(f"best {best.word} {best.score:.2f}, by {os.path.relpath(best.file)}; {summary} has everything. Use it as\n"
          f"  python algos/lesr.py --env {args.env} --features llm:{os.path.relpath(out / 'best.py')}\n"
          f"or train with it for five seeds:\n  make bench SUITE={os.path.relpath(out / 'final.toml')}")
    return out


def same_loop(args: Args, out: Path) -> None:
    """Raises UserError where the folder is another loop's, or none."""
    if not (out / "loop.json").is_file():
        recordings = Path(args.recordings).resolve()  # they may be in it, with answers that could not be used
        if out.exists() and any(path != recordings for path in out.iterdir()):
            raise UserError(f"{out} is not empty, and no loop; name another --out")
        return
    for name, value in json.loads((out / "loop.json").read_text()).items():
        if value != getattr(args, name):
            raise UserError(f"{out} has a loop with --{name.replace('_', '-')} {value}, not {getattr(args, name)}; "
                            "name another --out, or delete it")


def begin(args: Args, out: Path) -> None:
    """Say in the folder whose loop it is."""
    keep(out / "loop.json", json.dumps({name: getattr(args, name) for name in FIXED}, indent=1) + "\n")


def summarise(args: Args, out: Path, n: int, iterations: list[list[Candidate]], best: Candidate) -> None:
    """Write summary.md, best.py and final.toml for what there is so far."""
    who = {"yours": f"you ({args.candidates_dir})", "api": args.model,
           client.HANDWRITTEN: "a person (handwritten recordings); no model was asked"}[source_of(args)]
    rows, reports = [], []
    for i, candidates in enumerate(iterations, 1):
        for one in candidates:
            score = f"failed: {one.trouble}" if one.trouble else f"{one.score:.2f}"
            rows.append(f"| {i} | {one.number} | {score} | {max(len(one.constants) - n, 0)} | {one.file.parent.name}/"
                        f"{one.file.name}{', the best' if one is best else ''} |")
        analysis = out / f"iteration-{i}" / "analysis.md"
        reports.append(f"## Iteration {i}\n\n{feedback_of(candidates, n)}\n"
                       + (f"The analysis:\n\n{analysis.read_text().strip()}\n" if analysis.is_file() else ""))
    table = "\n".join([f"| iteration | candidate | {best.word} | features | file |", "|---|---|---|---|---|", *rows])
    keep(out / "summary.md", f"# LESR on {args.env}\n\nWritten by: {who}. Trained for {args.total_timesteps:,} steps, "
         f"seeds: {args.seeds}, flags: {args.flags or 'none'}.\n\n{table}\n\n" + "\n".join(reports))
    if not best.trouble:
        keep(out / "best.py", best.code)
        final = out / f"best-{digest(best.code)[:8]}.py"  # best.py may change, and runs are known by what they name
        keep(final, best.code)
        keep(out / "final.toml", suite_of(args, [final], 5, 1_000_000, args.flags))


if __name__ == "__main__":
    client.command(run, Args, __doc__)
