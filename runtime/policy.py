"""Export of a trained policy: `policy.pt2`, an archive of torch.export."""
import io
import logging
import math
import operator
import sys
import warnings
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Callable

import torch
from torch.export.passes import move_to_device_pass
from torch.utils._pytree import tree_map

from runtime.files import write_whole

Obs = torch.Tensor | dict[str, torch.Tensor]


def save_policy(path: Path, function: Callable[[Obs], torch.Tensor], example: Obs) -> bool:
    """Write `function` to `path`, whole or not at all. Returns whether it was written.

    `function` maps observations, a tensor (B, n) or a dict of tensors with B rows each, to actions (B, d) in [-1, 1] or
    to log-probabilities (B, A). It may use tensors, dicts of tensors and modules from outside, also on a GPU. They are
    written with their present values, for a CPU. `example` are observations of at least one row; it is not written.

    torch.export.load reads the file without the code of the run, for any batch size. `--knowledge run:RUN_DIR` reads it
    too, and executes nothing from it. The random state does not change.

    A function that branches in Python on what it observes, or asks another process, cannot be exported. Then a line on
    stderr says why, and an older file at `path` is removed, because it is not the policy of this run any more.
    """
    gpus = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(gpus), torch.no_grad(), _silence():
            archive = _archive(function, example)
    except Exception as error:  # of the function, or of the tracer: any kind
        print(f"note: {path} is not written, the policy cannot be exported: {_why(error)}", file=sys.stderr)
        path.unlink(missing_ok=True)
        return False
    write_whole(path, lambda temporary: temporary.write_bytes(archive))
    return True


class _Module(torch.nn.Module):
    """What torch.export takes; it is called with one argument, `obs`."""

    def __init__(self, function: Callable[[Obs], torch.Tensor]):
        super().__init__()
        self.function = function

    def forward(self, obs: Obs) -> torch.Tensor:
        return self.function(obs)


def _archive(function: Callable[[Obs], torch.Tensor], example: Obs) -> bytes:
    """The bytes of the archive. Raises any kind of error for a function that cannot be exported."""
    one = tree_map(lambda x: x[:1].clone(), example)
    many = tree_map(lambda x: torch.cat([x, x, x]), example)  # a batch of one would be traced as a constant
    sizes = tree_map(lambda x: {0: torch.export.Dim("batch")}, many)
    # called before the trace: a function that caches tensors must not cache those of a trace, which hold no numbers
    actions = [function(tree_map(torch.clone, obs)) for obs in (one, many)]
    program = torch.export.export(_Module(function), (many,), dynamic_shapes=(sizes,), strict=False)
    for node in program.graph.nodes:
        if node.op == "call_function" and not _is_tensor_operation(node.target):
            raise ValueError(f"{node.target} is no tensor operation")
        for key in set(node.meta) - {"val", "tensor_meta"}:  # source lines and paths of this machine
            del node.meta[key]
        if node.target is torch.ops.aten._assert_tensor_metadata.default:  # of types that are as they are
            program.graph.erase_node(node)
    program.graph.eliminate_dead_code()  # log-probabilities of actions that nobody asked for
    for values in (program.constants, program.state_dict):  # a view would be written with the whole tensor behind it
        for name, value in values.items():
            copy = value.detach().clone()
            values[name] = torch.nn.Parameter(copy, False) if isinstance(value, torch.nn.Parameter) else copy
    for obs, action in zip((one, many), actions):
        _compare(program.module(), obs, action)
    program = move_to_device_pass(program, "cpu")
    program._example_inputs = None  # they would be a pickle in the archive, which no loader of ours would take
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


def _compare(program: Callable[[Obs], torch.Tensor], obs: Obs, action: torch.Tensor) -> None:
    """Raise ValueError unless `program` gives `action` (B, d) each time. A memory would be lost in the export, and a
    random draw would be frozen."""
    rows = len(next(iter(obs.values())) if isinstance(obs, dict) else obs)
    if action.dim() != 2 or len(action) != rows:
        raise ValueError(f"it returns shape {tuple(action.shape)} for {rows} observations, not (B, d)")
    for _ in range(2):
        played = program(tree_map(torch.clone, obs))
        if not torch.allclose(played, action, rtol=1e-4, atol=1e-5, equal_nan=True):
            raise ValueError("played again it acts differently: it has a memory, or draws random numbers")


def _is_tensor_operation(target) -> bool:
    """Whether `target` is an operation of torch's own library, or arithmetic on sizes."""
    if isinstance(target, torch._ops.OpOverload):
        return target.namespace == "aten"
    name = getattr(target, "__name__", "")
    return getattr(operator, name, None) is target or getattr(math, name, None) is target or name.startswith("sym_")


@contextmanager
def _silence():
    """Hide what the tracer prints and logs: pages of it, for a function that cannot be traced."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _why(error: Exception) -> str:
    """The first line of `error`, shortened. The two most common errors get a line with the remedy."""
    if type(error).__name__ == "GuardOnDataDependentSymNode":
        return "it branches in Python on the value of a tensor; torch.where can be exported"
    line = next(iter(str(error).strip().splitlines()), "")
    if line.startswith("Constraints violated"):
        return "it is made for one batch size; x.shape[0] can be exported, len(x) and a loop over rows cannot"
    return f"{type(error).__name__}: {line}"[:160]
