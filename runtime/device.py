"""The machine of a run: CPU or GPU, compiler, precision of matrix products."""
import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from typing import Any, Callable

import torch
from tqdm import tqdm

from errors import UserError


def pick_device(name: str, fast_matmul: bool = False) -> torch.device:
    """The device for "cpu", "cuda" or "auto" (a GPU if torch sees one). With `fast_matmul`, which pays for batches of a
    hundred rows or more, also calls `use_fast_matmul`. Raises UserError for "cuda" without a GPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; use --device cpu")
    device = torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
    if fast_matmul:
        use_fast_matmul(device)
    return device


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile has a C++ compiler that works, which it needs on a CPU. If not, stderr is told."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")  # what torch takes
    if device.type != "cpu":
        return True
    why = "no C++ compiler"
    if shutil.which(compiler):
        probe = subprocess.run([compiler, "-x", "c++", "-c", "-", "-o", os.devnull], input=b"#include <cmath>\n",
                               capture_output=True)
        if probe.returncode == 0:
            return True
        why = "the C++ compiler does not work"
    print(f"{why} ({compiler}): the update is not compiled, training is slower but the same", file=sys.stderr)
    return False


def compiled(function: Callable, wanted: bool, device: torch.device, fullgraph: bool = True) -> Callable:
    """`function` compiled into one graph if that is `wanted` and possible, otherwise `function` itself. What the
    compiler fails with, at the first call, is one line."""
    if not wanted or not can_compile(device):
        return function
    from torch._dynamo.exc import BackendCompilerFailed  # a second, for which --help and an error need not wait

    graph, first = torch.compile(function, fullgraph=fullgraph, dynamic=False), True

    def call(*inputs):
        nonlocal graph, first
        if first:
            tell_compiling()
            first = False
        with finishing():  # the first call starts a compiler
            try:
                return graph(*inputs)
            except BackendCompilerFailed as error:  # before anything was computed
                tell_failed(error)
                graph = function
                return function(*inputs)
    return call


def compile_for(function: Callable, options: dict, *example: Any) -> Callable:
    """`function` as one graph, compiled at once, for arguments like `example`.

    Later arguments must be tensors of the same shapes and types, and everything else must be equal. Nobody checks that:
    the check that torch.compile makes at every call takes half as long as the update of a small network."""
    from torch._dynamo.exc import BackendCompilerFailed

    tell_compiling()
    try:
        graph = torch.compile(function, fullgraph=True, dynamic=False, options=options).aot_compile((example, {}))
    except BackendCompilerFailed as error:
        tell_failed(error)
        return function
    graph.disable_guard_check()
    return graph


def tell_compiling() -> None:
    tqdm.write("compiling the update: this takes up to a minute, less at the next start. With --no-compile training "
               "starts at once, but is slower.", file=sys.stderr)  # above a bar


def tell_failed(error: Any) -> None:
    why = f"{type(error.inner_exception).__name__}: {error.inner_exception}".splitlines()[0]
    tqdm.write(f"the update is not compiled ({why}): training is slower but the same", file=sys.stderr)


@contextmanager
def finishing():
    """Delay Ctrl-C until the block is over. Ctrl-C goes to all processes of a terminal, and a compiler process that is
    started in the block would die of it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def use_fast_matmul(device: torch.device) -> bool:
    """Let oneDNN do float32 matrix products if that is faster *and* as accurate. Returns whether it is used.

    torch's "medium" precision hands products to oneDNN. On AMD's Zen 5 that is twice as fast as MKL, on Zen 4 a tenth
    faster, still in true float32. On CPUs with AMX the same setting may compute in bfloat16, so the accuracy is tested
    here. Without AVX-512 nothing is gained.
    """
    torch.set_float32_matmul_precision("highest")
    if device.type != "cpu" or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    a = torch.linspace(-1, 1, 512 * 512).view(512, 512).sin()
    exact = a.double() @ a.double().T
    torch.set_float32_matmul_precision("medium")
    error = ((a @ a.T).double() - exact).abs().max() / exact.abs().max()
    if error > 1e-5:  # bfloat16 is at 4e-3, float32 below 1e-6
        torch.set_float32_matmul_precision("highest")
    return bool(error <= 1e-5)
