"""Files that are written whole, in plain types."""
import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from errors import UserError

PLAIN = (bool, int, float, str, bytes, type(None))


def write_whole(path: Path, write) -> None:
    """Call `write` on a temporary path and rename that to `path`, so that a kill or a power cut never leaves half a
    file. Raises OSError where it cannot be written; nothing is left then."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        with temporary.open("r+b") as file:
            flush(file.fileno())  # a rename may come to the disk before the content does
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise (error.__context__ if isinstance(error.__context__, OSError) else error)  # torch hides the reason
    os.replace(temporary, path)


def flush(file: int) -> None:
    """os.fsync, where the file system has it. Other errors are of the disk: a network's may be full only now."""
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def save(tree: Any, path: Path) -> None:
    """torch.save, by a file of Python's: with one of its own, torch does not tell why it could not be written."""
    with path.open("wb") as file:
        torch.save(tree, file)


def to_plain(tree: Any) -> Any:
    """Turn the arrays in nested dicts and lists into tensors. `torch.load(weights_only=True)` reads the result without
    executing code. Raises UserError for other types."""
    if isinstance(tree, dict):
        return {key: to_plain(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [to_plain(value) for value in tree]
    if isinstance(tree, np.generic):
        return tree.item()
    if isinstance(tree, np.ndarray) and tree.dtype.kind in "biuf":
        return torch.from_numpy(tree.copy())
    if type(tree) in PLAIN or isinstance(tree, torch.Tensor):
        return tree
    raise UserError(f"the run cannot be saved, for it holds a {type(tree).__name__}; keep numbers, texts, bytes, "
                    "arrays, tensors, lists and dicts of these")
