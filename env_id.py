"""The parts of an environment id."""
import re


def split_id(env_id: str) -> tuple[str, str, str]:
    """The module that registers the environment, its id, and how it is observed: `mine:FetchPush-v4:pca` -> ("mine",
    "FetchPush-v4", "pca"). The module may be a file, `dir/mine.py`. The first and the last may be empty; behind an id
    without a version nothing can stand."""
    match = re.fullmatch(r"(.+?-v\d+):(.*)", env_id)
    task, view = match.groups() if match else (env_id, "")
    module, _, task = task.rpartition(":")
    return module, task, view
