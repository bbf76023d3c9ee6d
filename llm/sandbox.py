"""Runs generated code in a process that can only compute: policies, potentials and state features in the same way.

    code = sandbox.code_in(reply.text, ["policy"])      # the last fenced block that defines it; raises SandboxError
    with Sandbox(code, ["policy"]) as box:              # static check, then a process of its own; raises SandboxError
        action = box.call("policy", obs, shape=(3,))    # obs (B, 11) -> (B, 3) float64: once per row

`call(function, *arguments, shape)` calls the function once per row. An argument is an array (B, ...), whose row comes
as an array, or as a number where it is (B,); or a dict of such arrays, which comes as a dict. `shape` is that of one
result, () for a number; None takes that of the first row, at most two dimensions. A result may be (value, info) with a
dict `info` of numbers: `explain` gives it for one row, `call` drops it. Used as

    policy(obs) -> action                   box.call("policy", obs, shape=(d,))     obs: (B, n), or a dict of them
    potential(history) -> float             box.call("potential", {"obs": (B, 6, 147), "action": (B, 5)}, shape=())
    compute_reward(obs, past_obs, past_actions) -> (float, info)       box.call("compute_reward", a, b, c, shape=())
    revise_state(s) -> s with features      box.call("revise_state", s, shape=None)            (B, n) -> (B, n + m)
    intrinsic_reward(s) -> float            box.call("intrinsic_reward", s, shape=())

A row whose call raises, or gives another shape or a number that is not finite, is NaN; `box.error` then says what
happened in the first of them, fit for the model to read, and `box.failed` of `box.rows` counts them since the start.
SandboxError is raised where the process is lost: out of time, out of memory, an invalid answer. The next call
starts it again. SandboxUnavailable, one of them, means that the machine is the reason, not the code.

What holds the code: a static check (a list of what is allowed), then a process that has no environment variables, at
most 1 GiB of memory, `seconds` per 1,024 rows, and, on Linux, a seccomp filter set after numpy is imported: it may
compute, read from its one pipe and write to the other; no file can be opened, no socket, no process, no signal sent.
The parent bounds whatever it reads. It does not protect against holes in the kernel or the
processor, nor against side channels. Where seccomp is not available, files, network and processes are not blocked: then
only code whose hash is in llm/reviewed.txt runs, unless `allow_unprotected` or ALLOW_GENERATED_CODE=1 in the
environment allows it.
"""
import ast
import builtins
import hashlib
import json
import math
import os
import re
import select
import struct
import subprocess
import sys
import time
import types
import typing
from pathlib import Path

import numpy as np

from errors import UserError

ROOT = Path(__file__).resolve().parent.parent
ROWS = 1024  # per exchange with the worker; time is allowed per exchange
HEADER = struct.Struct("<5q")  # of an answer: rows, dimensions of a result, the two, bytes of text
LONGEST_SOURCE = 20_000  # characters
LARGEST_RESULT = 4096  # numbers in the result of one row
LONGEST_TEXT = 4000  # bytes of an error, or of info
START_SECONDS = 60.0  # to import numpy on a machine that is busy

Arrays = np.ndarray | dict[str, np.ndarray]


class SandboxError(UserError):
    """Generated code that cannot be used; the message is one line."""


class SandboxUnavailable(SandboxError):
    """This machine cannot shut code in, whatever the code is: no reason to tell the model."""


# ---- static check: what is not listed is refused -----------------------------------------------------------------

# Not all of typing: get_type_hints evaluates strings
TYPING = set("Any Callable Dict Iterable List Mapping Optional Sequence Tuple Union".split())
MODULES = {"numpy": np, "numpy.linalg": np.linalg, "numpy.fft": np.fft, "math": math, "typing": typing}
BUILTINS = {name: getattr(builtins, name) for name in (
    "abs all any bool dict divmod enumerate filter float frozenset int isinstance len list map max min pow range "
    "reversed round set slice sorted str sum tuple zip True False None Exception ArithmeticError AssertionError "
    "AttributeError FloatingPointError IndexError KeyError LookupError NotImplementedError OverflowError RuntimeError "
    "StopIteration TypeError ValueError ZeroDivisionError").split()} | {"print": lambda *args, **kwargs: None}
NODES = tuple(getattr(ast, name) for name in (
    "Module FunctionDef arguments arg Return Assign AugAssign AnnAssign For If With withitem Raise Try ExceptHandler "
    "Assert Import ImportFrom alias Expr Pass Break Continue Delete BoolOp NamedExpr BinOp UnaryOp Lambda IfExp Dict "
    "Set ListComp SetComp DictComp GeneratorExp comprehension Compare Call keyword JoinedStr FormattedValue Constant "
    "Attribute Subscript Starred Name List Tuple Slice expr_context boolop operator unaryop cmpop").split())
# Names in numpy and methods that read or write files, reach into memory, or look names up
DENIED = set("""load save savez savez_compressed savetxt loadtxt genfromtxt fromfile fromregex fromstring frombuffer
    from_dlpack memmap tofile dump dumps bmat asmatrix matrix info show_config show_runtime get_include test setbufsize
    seterr seterrcall geterrcall set_printoptions format format_map ctypes data setflags getfield setfield
    newbyteorder mro record recarray nditer nested_iters strides flags view base byteswap getbufsize geterr
    get_printoptions resize""".split())
TYPES = (np.ufunc, np.number, types.FunctionType, types.BuiltinFunctionType, float, type(np.sum), type(np.dot))


def _allowed_attributes() -> set[str]:
    """Functions, number types and constants of numpy, and methods of arrays, numbers, strings and containers."""
    names = {"linalg", "fft", "norm", "newaxis", "vectorize", "ndarray", "bool", "bool_", "errstate", "s_",
             "finfo", "iinfo", "eps", "tiny", "ndindex", "ndenumerate", "mgrid", "ogrid", "LinAlgError", "args"}
    for module in (np, np.linalg, np.fft, math):
        for name in dir(module):
            value = getattr(module, name)
            if isinstance(value, TYPES) or isinstance(value, type) and issubclass(value, np.number):
                names.add(name)
    for kind in (np.ndarray, np.float64, np.int64, float, int, str, list, tuple, dict, set):
        names |= set(dir(kind))
    return {name for name in names if not name.startswith("_")} - DENIED


ATTRIBUTES = _allowed_attributes()


def check(source: str, functions: list[str]) -> None:
    """Raise SandboxError, which names the line, unless `source` holds nothing but plain numeric Python that defines
    `functions`. A first filter: what it lets through still runs in the sandbox."""
    if len(source) > LONGEST_SOURCE:
        raise SandboxError(f"generated code has {len(source)} characters; at most {LONGEST_SOURCE} are read")
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else type(error).__name__
        line = getattr(error, "lineno", None) or 1
        raise SandboxError(f"generated code, line {line}: {_printable(reason)}; it is not Python") from None
    for node in ast.walk(tree):
        reason = _objection(node)
        if reason:
            raise SandboxError(f"generated code, line {getattr(node, 'lineno', 1)}: {_printable(reason)}")
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    for name in functions:
        if name not in defined:
            raise SandboxError(f"generated code defines no function '{name}'; it has "
                               f"{', '.join(sorted(defined)) or 'none'}")


def _objection(node: ast.AST) -> str:
    """What is wrong with one node, empty where nothing is."""
    if not isinstance(node, NODES):
        return f"{type(node).__name__} is not allowed; write functions with for loops over arrays"
    if isinstance(node, ast.Import):
        unknown = [alias.name for alias in node.names if alias.name not in MODULES]
        if unknown:
            return f"import of {unknown[0]} is not allowed; numpy and math are"
    if isinstance(node, ast.ImportFrom):
        if node.level or node.module not in MODULES:
            return f"import from {node.module} is not allowed; numpy and math are"
        listed = TYPING if node.module == "typing" else ATTRIBUTES
        unknown = [alias.name for alias in node.names if alias.name not in listed]
        if unknown:
            return f"import of {unknown[0]} from {node.module} is not allowed"
    if isinstance(node, ast.Attribute) and node.attr not in ATTRIBUTES | TYPING:
        return f".{node.attr} is not allowed"
    for name in _names(node):
        if name.startswith("_") and name != "_":
            return f"the name {name} is not allowed; use names that do not start with _"
        if hasattr(builtins, name) and name not in BUILTINS:
            return f"{name} is not allowed"
    return ""


def _names(node: ast.AST) -> list[str]:
    """The identifiers that a node binds or reads, attributes aside."""
    fields = ["asname"] if isinstance(node, ast.alias) else ["id", "name", "arg"]
    return [getattr(node, field) for field in fields if isinstance(getattr(node, field, None), str)]


def code_in(reply: str, functions: list[str]) -> str:
    """The last fenced block of `reply` that defines all `functions`, else those that define some of them, together; all
    of it where it has no fence. Raises SandboxError where one of them is missing."""
    blocks, lines = [], None  # lines of the block that is open
    for line in reply.splitlines():
        if not line.lstrip().startswith("```"):
            if lines is not None:
                lines.append(line)
        elif lines is None:
            lines = []
        else:
            blocks.append("\n".join(lines))
            lines = None
    if not blocks and lines is None:
        blocks = [reply]
    defines = [[bool(re.search(rf"^def {name}\b", block, re.M)) for name in functions] for block in blocks]
    whole = [block for block, has in zip(blocks, defines) if all(has)]
    parts = [block for block, has in zip(blocks, defines) if any(has)]
    if not whole and not all(any(column) for column in zip(*defines)) or not blocks:
        cut = ", and its last one is not closed" if lines is not None else ""
        raise SandboxError(f"the reply has no fenced Python block that defines {' and '.join(functions)}{cut}")
    return (whole[-1] if whole else "\n\n".join(parts)).strip() + "\n"


def _printable(text: str) -> str:
    """One line of at most 300 characters without control codes, whatever a model or a process wrote."""
    return "".join(c if c.isprintable() else " " for c in str(text))[:300].strip()


# ---- the parent's side -------------------------------------------------------------------------------------------


class Sandbox:
    """One process that holds one piece of generated code. Not for use from several threads at once."""

    def __init__(self, source: str, functions: list[str], seconds: float = 5.0, memory: int = 2**30,
                 allow_unprotected: bool = False):
        """`source` has to define `functions`; `seconds` are allowed per 1,024 rows, `memory` in bytes for numpy and the
        code together. Raises SandboxError where the check, the machine or the code itself says no."""
        check(source, functions)
        self.source, self.functions, self.seconds, self.memory = source, list(functions), seconds, memory
        self.allowed = (allow_unprotected or os.environ.get("ALLOW_GENERATED_CODE") == "1"
                        or digest(source) in reviewed())
        self.error = ""  # what happened in the first failed row of the last call
        self.rows = self.failed = 0  # since the start
        self._process = None
        self._start()

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __del__(self):
        self.close()

    def close(self) -> None:
        """End the process; a later call starts a new one."""
        process, self._process = getattr(self, "_process", None), None
        if process:
            process.kill()
            process.stdin.close()
            process.stdout.close()
            process.wait()

    def call(self, function: str, *arguments: Arrays, shape: tuple[int, ...] | None = ()) -> np.ndarray:
        """What `function` returns for each of B rows, (B, *shape) float64, NaN in rows that failed; see the module."""
        size = len(_arrays(arguments)[0])
        results = []
        self.error = ""
        if not size:
            return np.zeros((0, *(shape or ())))
        for start in range(0, size, ROWS):
            part = [_rows(argument, start, start + ROWS) for argument in arguments]
            result, text = self._ask(function, part, shape)
            failed = ~np.isfinite(result).reshape(len(result), -1).all(1)
            if failed.any() and not self.error:
                self.error = _printable(text) or "a number in the result is not finite"
            result[failed] = np.nan
            self.rows, self.failed = self.rows + len(result), self.failed + int(failed.sum())
            if shape is None and not failed.all():
                shape = result.shape[1:]
            results.append(result)
        if shape is None:  # not one row succeeded
            return np.full(size, np.nan)
        filled = [r if r.shape[1:] == shape else np.full((len(r), *shape), np.nan) for r in results]
        return np.concatenate(filled)

    def explain(self, function: str, *arguments: Arrays) -> tuple[float, dict[str, float]]:
        """Value and info of a batch of one row, for a function that returns (value, info); NaN where it failed."""
        self.error = ""
        result, text = self._ask(function, list(arguments), (), info=True)
        self.rows, self.failed = self.rows + 1, self.failed + int(not np.isfinite(result[0]))
        if not np.isfinite(result[0]):
            self.error = _printable(text) or "the value is not finite"
            return math.nan, {}
        try:
            info = json.loads(text)
            return float(result[0]), {_printable(name): float(value) for name, value in info.items()}
        except (ValueError, TypeError, AttributeError, RecursionError, OverflowError):
            self.close()
            raise SandboxError("generated code gave info that is no dict of numbers") from None

    def _start(self) -> None:
        """Start the process, let it shut itself in, and give it the code."""
        if not hasattr(select, "poll"):
            raise SandboxUnavailable("generated code runs on Linux and macOS alone; use rules, or a file of your own")
        keep = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
        quiet = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
        serve = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from llm.sandbox import serve; serve({self.memory})"
        self._process = subprocess.Popen(
            [sys.executable, "-s", "-P", "-c", serve], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, env=keep | quiet, cwd=os.sep, bufsize=0,
            start_new_session=True)  # a Ctrl-C goes to all of a terminal's group; the run that saves still needs it
        for pipe in (self._process.stdin, self._process.stdout):
            os.set_blocking(pipe.fileno(), False)
        try:
            _, missing = self._answer(0, (), time.monotonic() + START_SECONDS)
        except SandboxError:
            raise SandboxUnavailable("the process for generated code does not start; python -m llm.sandbox says why"
                                     ) from None
        if missing and not self.allowed:
            self.close()
            raise SandboxUnavailable(f"generated code is refused: {_printable(missing)}, so that files, network and "
                               "processes are not blocked; read the code, then set ALLOW_GENERATED_CODE=1")
        load = {"source": self.source, "functions": self.functions, "seconds": self.seconds}
        _, text = self._exchange(load, b"", 0, ())
        if text:
            self.close()
            raise SandboxError(f"generated code fails as it is loaded: {_printable(text)}")

    def _ask(self, function: str, arguments: list[Arrays], shape: tuple | None, info: bool = False
             ) -> tuple[np.ndarray, str]:
        """One exchange: at most ROWS rows."""
        arrays = _arrays(arguments)
        size = len(arrays[0])
        if any(len(array) != size for array in arrays):
            raise ValueError(f"rows differ: {[array.shape for array in arrays]}")
        if function not in self.functions:
            raise ValueError(f"{function} is none of {self.functions}")
        if self._process is None:
            self._start()
        arguments = [{k: _plain(x) for k, x in a.items()} if isinstance(a, dict) else _plain(a) for a in arguments]
        layout = [{k: _layout(x) for k, x in a.items()} if isinstance(a, dict) else _layout(a) for a in arguments]
        request = {"function": function, "rows": size, "layout": layout, "shape": shape, "info": info}
        return self._exchange(request, b"".join(array.tobytes() for array in _arrays(arguments)), size, shape)

    def _exchange(self, request: dict, body: bytes, rows: int, shape: tuple | None) -> tuple[np.ndarray, str]:
        """Send a request and read its answer. What is interrupted, by Ctrl-C say, leaves no half of either."""
        deadline = time.monotonic() + self.seconds
        head = json.dumps(request).encode()
        poll = select.poll()
        poll.register(self._process.stdout.fileno(), select.POLLIN)
        if poll.poll(0):
            self._lose("has written to its pipe by itself, or ended")
        try:
            self._write(struct.pack("<2q", len(head), len(body)) + head + body, deadline)
            return self._answer(rows, shape, deadline)
        except BaseException:
            self.close()
            raise

    def _write(self, message: bytes, deadline: float) -> None:
        """Give the worker a message, which it reads whole before it does anything."""
        poll = select.poll()
        poll.register(self._process.stdin.fileno(), select.POLLOUT)
        left = memoryview(message)
        while left:
            self._wait(poll, deadline)
            try:
                left = left[os.write(self._process.stdin.fileno(), left):]
            except BlockingIOError:
                continue
            except OSError:
                self._lose("has ended, as if out of memory")

    def _answer(self, rows: int, shape: tuple | None, deadline: float) -> tuple[np.ndarray, str]:
        """Results and text. The code can write to the pipe, too, so that every length is checked before it is used."""
        got, dimensions, *sizes, text_bytes = HEADER.unpack(self._read(HEADER.size, deadline))
        whole = tuple(sizes[:dimensions]) if 0 <= dimensions <= 2 else (-1,)
        if got != rows or min(whole, default=0) < 0 or math.prod(whole) > LARGEST_RESULT or (
                shape is not None and whole != tuple(shape)) or not 0 <= text_bytes <= LONGEST_TEXT:
            self._lose("sends an invalid answer")
        body = self._read(8 * rows * math.prod(whole), deadline)
        text = self._read(text_bytes, deadline).decode(errors="replace")
        return np.frombuffer(body, np.float64).reshape(rows, *whole).copy(), text

    def _read(self, count: int, deadline: float) -> bytes:
        poll = select.poll()
        poll.register(self._process.stdout.fileno(), select.POLLIN)
        parts = []
        while count:
            self._wait(poll, deadline)
            try:
                part = os.read(self._process.stdout.fileno(), min(count, 2**20))
            except BlockingIOError:
                continue
            if not part:
                self._lose("has ended, as if out of memory")
            parts.append(part)
            count -= len(part)
        return b"".join(parts)

    def _wait(self, poll: "select.poll", deadline: float) -> None:
        if not poll.poll(max(0.0, 1000 * (deadline - time.monotonic()))):
            self._lose(f"takes longer than {self.seconds:g} s")

    def _lose(self, reason: str) -> typing.NoReturn:
        self.close()
        raise SandboxError(f"generated code {reason}; correct it, or take other code")


def digest(source: str) -> str:
    """The hash by which code is known."""
    return hashlib.sha256(source.encode(errors="replace")).hexdigest()


def reviewed() -> set[str]:
    """Hashes of code that ships here and was read by a person: it also runs where seccomp is not to be had."""
    return {line.split()[0] for line in (ROOT / "llm" / "reviewed.txt").read_text().splitlines() if line.strip()}


def _arrays(arguments: tuple[Arrays, ...] | list[Arrays]) -> list[np.ndarray]:
    """The arrays in the arguments, in order."""
    return [x for a in arguments for x in (a.values() if isinstance(a, dict) else [a])]


def _rows(argument: Arrays, start: int, stop: int) -> Arrays:
    return {k: x[start:stop] for k, x in argument.items()} if isinstance(argument, dict) else argument[start:stop]


def _plain(array: np.ndarray) -> np.ndarray:
    """float64 of any float, else integers as they are: what code sees does not depend on the caller's precision."""
    return np.ascontiguousarray(array, np.float64 if array.dtype.kind == "f" else array.dtype)


def _layout(array: np.ndarray) -> list:
    return [array.dtype.str, array.shape]


# ---- the worker's side -------------------------------------------------------------------------------------------


def serve(memory: int) -> None:
    """The worker: shut in, take the code, answer requests until the pipe is closed."""
    missing = _shut_in(memory)
    _reply(np.zeros(0), missing)
    request, _ = _receive()
    functions, text = {}, ""
    seconds = math.ceil(request["seconds"]) + 1
    _alarm(seconds)
    try:
        namespace = {"__name__": "generated", "__builtins__": BUILTINS | {"__import__": _import}}
        exec(compile(request["source"], "<generated>", "exec"), namespace)
        functions = {name: namespace[name] for name in request["functions"]}
    except BaseException as error:  # SystemExit, too
        text = _what_happened(error)
    _alarm(0)
    _reply(np.zeros(0), text)
    while True:
        request, body = _receive()
        _alarm(seconds)  # ends a worker whose parent is gone; the parent has its own clock
        arguments, at = [], 0
        for entry in request["layout"]:
            one = {}
            for name, (dtype, shape) in entry.items() if isinstance(entry, dict) else [("", entry)]:
                array = np.frombuffer(body, dtype, math.prod(shape), at).reshape(shape)
                one[name], at = array, at + array.nbytes
            arguments.append(one if isinstance(entry, dict) else one[""])
        results, text = _call_rows(functions[request["function"]], arguments, request)
        _alarm(0)
        _reply(results, text)


def _call_rows(function, arguments: list[Arrays], request: dict) -> tuple[np.ndarray, str]:
    """Results (rows, *shape), and what happened in the first row that failed, or info if that is asked for."""
    shape = None if request["shape"] is None else tuple(request["shape"])
    results = None if shape is None else np.full((request["rows"], *shape), np.nan)
    text = ""
    for i in range(request["rows"]):
        try:
            value = function(*[{k: _row(x, i) for k, x in a.items()} if isinstance(a, dict) else _row(a, i)
                               for a in arguments])
            info = {}
            if type(value) is tuple and len(value) == 2 and isinstance(value[1], dict):
                value, info = value
            value = np.asarray(value, np.float64)
            if results is None and value.ndim <= 2 and value.size <= LARGEST_RESULT:
                shape = value.shape
                results = np.full((request["rows"], *shape), np.nan)
            if value.shape != shape:
                raise ValueError(f"returns shape {value.shape}, not {shape or 'a number'}")
            if request["info"]:
                text = json.dumps({str(name): float(number) for name, number in info.items()})
            results[i] = value
        except BaseException as error:
            text = text or _what_happened(error)
    return np.full(request["rows"], np.nan) if results is None else results, text


def _row(array: np.ndarray, i: int) -> np.ndarray | float:
    """A copy, so that a function may write into what it is given."""
    return array[i].item() if array.ndim == 1 else array[i].copy()


def _what_happened(error: BaseException) -> str:
    """The error and the line of the code, without paths of this machine."""
    trace, line = error.__traceback__, None
    while trace:
        line = trace.tb_lineno if trace.tb_frame.f_code.co_filename == "<generated>" else line
        trace = trace.tb_next
    where = "" if line is None else f" in line {line}"
    try:
        return _printable(f"{type(error).__name__}{where}: {error}")
    except BaseException:
        return f"{type(error).__name__}{where}"


def _import(name: str, globals=None, locals=None, fromlist=(), level: int = 0):
    """What `import` does in generated code. numpy itself imports its parts through it, when called from there."""
    if name.partition(".")[0] not in MODULES or level:
        raise ImportError(f"import of {name} is not allowed")
    module = builtins.__import__(name, globals, locals, fromlist)
    return NUMPY if module is np else module


class _ArrayType(type):
    """np.ndarray in generated code, for annotations and isinstance: the real one lays arrays over any memory."""

    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, np.ndarray)


NUMPY = types.ModuleType("numpy")  # the numpy of generated code
NUMPY.__dict__.update(vars(np), ndarray=_ArrayType("ndarray", (), {}))


def _receive() -> tuple[dict, bytes]:
    """The next request; ends the process where there is none."""
    head_bytes, body_bytes = struct.unpack("<2q", _read_exactly(16))
    return json.loads(_read_exactly(head_bytes)), _read_exactly(body_bytes)


def _read_exactly(count: int) -> bytes:
    parts = []
    while count:
        part = os.read(0, min(count, 2**20))
        if not part:
            os._exit(0)
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _reply(results: np.ndarray, text: str) -> None:
    shape = [*results.shape[1:], 0, 0][:2]
    text = text.encode(errors="replace")[:LONGEST_TEXT]
    message = memoryview(HEADER.pack(len(results), results.ndim - 1, *shape, len(text)) + results.tobytes() + text)
    while message:
        message = message[os.write(1, message):]


def _alarm(seconds: int) -> None:
    import signal
    signal.alarm(seconds)


# What a worker may ask of the kernel: memory, locks of its own, clocks, the alarm, its end. Reading and writing are
# allowed on the two pipes alone. Everything else fails with EPERM.
SYSCALLS = """brk mmap munmap mremap mprotect futex rt_sigreturn rt_sigprocmask sigaltstack alarm setitimer
    clock_gettime gettimeofday time sched_yield restart_syscall exit exit_group""".split()


def _shut_in(memory: int) -> str:
    """Give up what the code does not need; what could not be given up, in words, else nothing."""
    import errno
    import resource
    import signal
    import warnings

    import numpy.fft
    import numpy.linalg
    import numpy.polynomial
    import numpy.random  # noqa: F401  (numpy imports these when first used, which then would fail)

    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # which a cluster sends to every process of a job
        signal.signal(signum, signal.SIG_IGN)  # it ends when its pipe does
    signal.alarm(0)
    np.seterr(all="ignore")
    warnings.simplefilter("ignore")
    limits = {"RLIMIT_AS": memory, "RLIMIT_FSIZE": 0, "RLIMIT_CORE": 0, "RLIMIT_NPROC": 0,
              "RLIMIT_NOFILE": 3}  # the files that are open
    missing = ""
    try:
        import pyseccomp
        box = pyseccomp.SyscallFilter(pyseccomp.ERRNO(errno.EPERM))
        for name in SYSCALLS:
            try:
                box.add_rule(pyseccomp.ALLOW, name)
            except OSError:
                pass  # not a call of this processor
        box.add_rule(pyseccomp.ALLOW, "read", pyseccomp.Arg(0, pyseccomp.EQ, 0))
        box.add_rule(pyseccomp.ALLOW, "write", pyseccomp.Arg(0, pyseccomp.EQ, 1))
        box.add_rule(pyseccomp.ALLOW, "madvise", pyseccomp.Arg(2, pyseccomp.LT, 100))  # 100 and 101 retire memory
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        missing = f"this machine has no seccomp ({type(error).__name__}: {error})"
    for name, value in limits.items():
        try:
            resource.setrlimit(getattr(resource, name), (value, value))
        except (AttributeError, ValueError, OSError):
            pass  # macOS has no limit of addresses
    if not missing:
        try:
            box.load()
        except OSError as error:
            missing = f"this machine's kernel takes no seccomp filter ({error})"
    return missing


if __name__ == "__main__":  # python -m llm.sandbox: is this machine able to shut code in?
    trial = [sys.executable, "-c", "from llm import sandbox; print(sandbox._shut_in(2**30))"]
    worker = subprocess.run(trial, cwd=ROOT, stdout=subprocess.PIPE, text=True)  # one that is shut in writes no file
    if worker.returncode:
        sys.exit(f"no process for generated code starts here, it ends with {worker.returncode}")
    print(worker.stdout.strip() or "files, network and processes are blocked for generated code")
