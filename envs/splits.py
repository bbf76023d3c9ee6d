"""Evaluation of policies with a context on every task of every split: returns, films, and what the context knows.

A player is what a script gives: `player(num, tasks)` returns a function of observations and of which copies begin an
episode with them (num,) bool -> (actions (num, d) in the bounds of the action space, contexts (num, c)). `tasks`
(num, p) are the true ones, as numbers; with `wrong=True` each copy acts on the context of another one, half of the list
of tasks away: neighbours may differ in their mass alone.
"""
import json
import sys
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch

from envs.dynamics import SPLITS, all_tasks, num_buckets
from envs.evaluation import record, write_down
from envs.features import flatten
from envs.franka import SKILLS
from envs.ids import announce
from envs.making import make_vec
from envs.vector import VectorEnv
from errors import UserError

Player = Callable[..., Callable[[object, np.ndarray], tuple[np.ndarray, torch.Tensor]]]
EVERY = 10  # steps between two contexts that are kept, and between the observations that they belong to


class Episodes(NamedTuple):
    """What was played, a row per episode (n, ...)."""
    task: np.ndarray  # (n,) index into all_tasks
    total: np.ndarray  # (n,) undiscounted return
    length: np.ndarray  # (n,)
    success: np.ndarray  # (n,) NaN without a notion of success
    skill: np.ndarray  # (n,) words, of FrankaSkill, else empty ones
    context: torch.Tensor  # (n, c) at the last step
    contexts: torch.Tensor  # (T, num, c) of all copies at every tenth step
    observations: torch.Tensor  # (T, num, f) then


class SplitEvaluator:
    """Evaluations and films of a run, one copy of the environment per task: training does not notice them.

    vecs: {split: environments}. numbers: {split: tasks as numbers (num, p) float32}. played: {split: Episodes} of the
    last evaluation.
    """

    def __init__(self, args, **kwargs):
        """`args` are those of a script; `kwargs` go to the environments. Every task is played as often as fits into
        `args.eval_episodes`, at least once. Raises UserError for a training that would leave out tasks."""
        buckets = num_buckets(args.env)
        # environment i plays bucket i modulo their number; an older run may go on as it was
        if not (args.evaluate or args.resume) and args.num_envs < buckets:
            raise UserError(f"--num-envs {args.num_envs}: {args.env} has {buckets} buckets of training tasks; use at "
                            f"least {buckets}")
        if not args.evaluate and args.num_envs % buckets:
            announce(f"--num-envs {args.num_envs} is no multiple of the {buckets} buckets of training tasks: some are "
                     "played in more environments than others")
        self.args, self.kwargs = args, kwargs
        self.tasks = {split: all_tasks(args.env, split) for split in SPLITS}
        self.vecs = {split: make_vec(args.env, len(tasks), seed=0, threads=torch.get_num_threads(), split=split,
                                     every_task=True, **kwargs) for split, tasks in self.tasks.items()}
        self.numbers = {split: vec.task_features() for split, vec in self.vecs.items()}
        self.share = max(1, args.eval_episodes // sum(map(len, self.tasks.values())))
        self.seed, self.played = 10_000 * args.seed + 5_000, {}

    def play(self, player: Player, twice: bool = False) -> dict[str, dict[str, float]]:
        """{split: result}, with the keys of `envs.evaluate`, from the same start states every time."""
        share = self.share * (2 if twice else 1)
        self.played = {split: play(player(vec.num_envs, self.numbers[split]), vec, share, self.seed)
                       for split, vec in self.vecs.items()}
        return {split: summary(episodes) for split, episodes in self.played.items()}

    def log(self, run, results: dict[str, dict[str, float]]) -> None:
        """Append results to the files of a run: those of training tasks to eval.csv, those of another split to
        eval-<split>.csv; and to its scalars, of FrankaSkill, the shares of episodes that pushed, rolled and picked."""
        for split, result in results.items():
            part = "" if split == "train" else split
            run.log_evaluation(result, part)
            skill = self.played[split].skill
            if skill[0]:
                run.log({f"eval{part and '-'}{part}/{name}": float((skill == name).mean()) for name in SKILLS[1:]})

    def diagnose(self, player: Player) -> dict[str, float]:
        """How much a policy needs its context, and what a line through the context tells of the task, both in training:
        `wrong_context`, the return where each copy acts on another's; `probe_r2`, the share of the variance of the
        tasks' numbers that least squares explain on episodes they were not fitted to, over those numbers that vary;
        `probe_r2_observation`, the same of the last observation, which a policy without a context sees, too."""
        vec, numbers = self.vecs["train"], self.numbers["train"]
        wrong = play(player(vec.num_envs, numbers, wrong=True), vec, self.share, self.seed)
        first, second = (play(player(vec.num_envs, numbers), vec, 1, self.seed + k) for k in (1, 2))
        tasks = torch.from_numpy(numbers)
        result = {"wrong_context": float(wrong.total.mean()),
                  "probe_r2_observation": probe(first.observations, second.observations, tasks)}
        if first.contexts.shape[2]:
            result["probe_r2"] = probe(first.contexts, second.contexts, tasks)
        return result

    def report(self, player: Player, step: int) -> dict[str, dict[str, float]]:
        """What --evaluate does: play, print a table; where films are asked for, also film and `keep`."""
        results = self.play(player)
        print(f"{self.args.env} after {step} steps, {self.share} per task, start states of seed {self.args.seed}")
        print(f"{'split':10}{'return':>10}{'std':>10}{'success':>10}  best task")
        for split, result in results.items():
            best, _ = self.best(split)
            print(f"{split:10}{result['return_mean']:10.2f}{result['return_std']:10.2f}{result['success_rate']:10.2f}  "
                  f"{json.dumps(best)}")
            write_down(self.args, f"{self.args.env} {split}", step, result)
        if self.args.video:
            self.keep(Path(self.args.evaluate))
            self.film(player, Path(self.args.evaluate))
        return results

    def best(self, split: str) -> tuple[dict, int]:
        """The task with the highest mean return in the last evaluation, and its index."""
        episodes = self.played[split]
        means = [episodes.total[episodes.task == k].mean() for k in range(len(self.tasks[split]))]
        return self.tasks[split][int(np.argmax(means))], int(np.argmax(means))

    def film(self, player: Player, folder: Path) -> None:
        """Film `args.video` episodes of the best task of every split into the run `folder`, if any was played."""
        if self.args.video < 1 or not self.played:
            return
        for split in SPLITS:
            task, k = self.best(split)
            for episode in range(self.args.video):
                play_one, begins = player(1, self.numbers[split][k:k + 1]), np.ones(1, bool)

                def act(obs):
                    action, _ = play_one(obs, begins.copy())
                    begins[:] = False
                    return action

                record(act, self.args.env, 1, self.seed + 2_000 + episode, folder / "video" / f"{split}-{episode}",
                       **task, **self.kwargs)

    def keep(self, folder: Path) -> None:
        """Write what the last evaluation played: tasks.csv, a row per episode; where there are contexts, contexts.pt,
        those at the ends of episodes, and contexts.png, a picture of them. Without an evaluation write nothing."""
        if not self.played:
            return
        lines = ["split,task,return,length,success,skill,parameters"]
        for split, episodes in self.played.items():
            for task, total, length, success, skill in zip(*episodes[:5]):
                parameters = json.dumps(self.tasks[split][task]).replace('"', '""')
                lines.append(f'{split},{task},{total:.6g},{length},{success:g},{skill},"{parameters}"')
        (folder / "tasks.csv").write_text("\n".join(lines) + "\n")
        context = torch.cat([episodes.context for episodes in self.played.values()])
        if not context.shape[1]:
            return
        split = np.concatenate([np.full(len(episodes.task), k) for k, episodes in enumerate(self.played.values())])
        task = np.concatenate([episodes.task for episodes in self.played.values()])
        total = np.concatenate([episodes.total for episodes in self.played.values()])
        torch.save({"context": context, "split": torch.from_numpy(split), "task": torch.from_numpy(task),
                    "return": torch.from_numpy(total)}, folder / "contexts.pt")
        draw_contexts(context, split, task, total, folder / "contexts.png")


def play(act: Callable, vec: VectorEnv, share: int, seed: int) -> Episodes:
    """Play `share` episodes on every copy of `vec`, from the start states of `seed`."""
    obs, began = vec.reset(seed), np.ones(vec.num_envs, bool)
    total, length, finished = (np.zeros(vec.num_envs, kind) for kind in (np.float64, np.int64, np.int64))
    rows, contexts, observations, step = [], [], [], 0
    while (finished < share).any():
        before = obs
        action, context = act(obs, began)
        obs, reward, terminated, truncated, info = vec.step(action)
        total, length, step = total + reward, length + 1, step + 1
        if step % EVERY == 0:
            contexts.append(context)
            observations.append(flatten(before))
        began = terminated | truncated
        for i in np.flatnonzero(began):
            if finished[i] < share:
                skill = info["episode_skill"][i] if "episode_skill" in info else ""
                rows.append((i, total[i], length[i], info["success"][i], skill, context[i]))
            finished[i] += 1
            total[i] = length[i] = 0
    rows.sort(key=lambda row: row[0])
    columns = list(zip(*rows))
    return Episodes(*map(np.array, columns[:5]), torch.stack(columns[5]), torch.stack(contexts or [context]),
                    torch.stack(observations or [flatten(before)]))


def summary(episodes: Episodes) -> dict[str, float]:
    return {"episodes": len(episodes.task), "return_mean": float(episodes.total.mean()),
            "return_std": float(episodes.total.std()), "success_rate": float(episodes.success.mean()),
            "length_mean": float(episodes.length.mean())}


def probe(fitted: torch.Tensor, tested: torch.Tensor, numbers: torch.Tensor) -> float:
    """Share of the variance of tasks' numbers (num, p) that is linear in `fitted` (T, num, c), 1 at most: coefficients
    from `fitted`, share from `tested`; mean over the numbers that vary."""
    varying = numbers.std(0) > 0
    x, y = (torch.cat([c, torch.ones(*c.shape[:2], 1)], 2).flatten(0, 1).double() for c in (fitted, tested))

    def repeated(contexts: torch.Tensor) -> torch.Tensor:
        return numbers[:, varying].double().repeat(len(contexts), 1)  # (T * num, p)

    coefficients = torch.linalg.lstsq(x, repeated(fitted), driver="gelsd").solution
    error = (y @ coefficients - repeated(tested)).square().mean(0)
    return float((1 - error / repeated(tested).var(0, correction=0)).mean())


def principal_components(x: torch.Tensor) -> torch.Tensor:
    """(n, c) -> (n, 2): PCA. One component where c is 1."""
    x = (x - x.mean(0)).double()
    components = x @ torch.linalg.svd(x, full_matrices=False).Vh[:2].T
    return torch.nn.functional.pad(components, (0, 2 - components.shape[1]))


def tsne(x: torch.Tensor) -> torch.Tensor:
    """(n, c) -> (n, 2): t-SNE (van der Maaten & Hinton 2008) of four or more points. It begins at the principal
    components, so that it needs no seed. Raises ImportError without scikit-learn."""
    from sklearn.manifold import TSNE

    start = principal_components(x)
    start = 1e-4 * start / start[:, 0].std().clamp(min=1e-12)
    model = TSNE(perplexity=min(15.0, (len(x) - 1) / 3), init=start.float().numpy())
    return torch.from_numpy(model.fit_transform(x.float().numpy()))


def draw_contexts(context: torch.Tensor, split: np.ndarray, task: np.ndarray, total: np.ndarray, path: Path) -> None:
    """Contexts (n, c) in the plane, by PCA and by t-SNE, coloured by task and by return; markers tell the split.
    Without scikit-learn, by PCA alone."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    planes = {"PCA": principal_components(context)}
    try:
        planes["t-SNE"] = tsne(context)
    except ImportError:
        announce("contexts are drawn without t-SNE; it needs pip install -r requirements-sami.txt")
    figure, rows = plt.subplots(len(planes), 2, figsize=(10, 4 * len(planes)), squeeze=False, constrained_layout=True)
    for row, (name, plane) in zip(rows, planes.items()):
        columns = (("task of its split", task, "tab20"), ("return", total, "viridis"))
        for axes, (what, color, colors) in zip(row, columns):
            for k, marker in enumerate("o^s"):
                shown = split == k
                points = axes.scatter(*plane[torch.from_numpy(shown)].T, c=color[shown], cmap=colors, marker=marker,
                                      vmin=color.min(), vmax=color.max(), s=28, label=SPLITS[k])
            axes.set(title=f"{name}, by {what}", xticks=[], yticks=[])
            figure.colorbar(points, ax=axes)
        row[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(f"contexts drawn: {path}", file=sys.stderr)
