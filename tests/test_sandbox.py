"""Generated code: what is refused, what the process can not do when nothing is refused, and what honest code gets."""
import ctypes.util
import math
import os
import select
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llm import sandbox
from llm.sandbox import Sandbox, SandboxError, check, code_in

pytestmark = pytest.mark.skipif(sys.platform != "linux" or not ctypes.util.find_library("seccomp"),
                                reason="seccomp: apt-get install libseccomp2")
X86 = os.uname().machine == "x86_64"  # whose numbers of system calls stand below
ROOT = Path(__file__).resolve().parent.parent


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text and len(text) < 700 and str(ROOT) not in text
    return text


# ---- what honest code gets ---------------------------------------------------------------------------------------

HONEST = '''
"""Four kinds of generated code in one."""
import math
from typing import Dict
import numpy as np
from numpy.linalg import norm

GAIN: float = 2.0
memory = {}

def policy(obs: Dict[str, np.ndarray]) -> np.ndarray:
    print("thinking", obs)
    obs["goal"] -= obs["hand"]          # a copy: the caller's stays
    way = GAIN * obs["goal"]
    return np.append(np.clip(way, -1, 1), -1.0 if norm(way) < 0.5 else 1)

def potential(history):
    steps = [float(np.abs(b - a).sum()) for a, b in zip(history["obs"][:-1], history["obs"][1:])]
    return math.fsum(steps) / len(steps) + history["count"], {"steps": len(steps), "last": steps[-1]}

def features(s):
    return np.concatenate([s, [np.median(s), np.percentile(s, 30), np.std(s), np.arctan2(s[0], s[1])],
                           np.fft.rfft(s).real[:1], np.polyfit(np.arange(len(s)), s, 1), np.sort(np.unique(s))[:1],
                           [np.einsum("i,i", s, s), np.linalg.det(np.eye(2) * 3), np.interp(0.5, [0, 1], [0, 2])]])

def picky(x):
    if x < 0:
        raise ValueError(f"no {x} please")
    return 1.0 / x if x != 7 else [x, x]

def keeps(x):
    memory["calls"] = memory.get("calls", 0) + 1
    return memory["calls"]
'''


@pytest.fixture(scope="module")
def honest():
    with Sandbox(HONEST, ["policy", "potential", "features", "picky", "keeps"]) as box:
        yield box


def test_policy_with_dict_observations(honest):
    obs = {"hand": np.zeros((3, 2), np.float32), "goal": np.array([[0.1, 0.1], [2, -2], [0.3, 0.5]], np.float32)}
    before = obs["goal"].copy()
    action = honest.call("policy", obs, shape=(3,))
    np.testing.assert_allclose(action, [[0.2, 0.2, -1], [1, -1, 1], [0.6, 1, 1]], rtol=1e-6)
    assert action.dtype == np.float64 and (obs["goal"] == before).all()


def test_potential_and_its_info(honest):
    history = {"obs": np.array([[[0, 0], [1, 2], [1, 4]]], np.int64), "count": np.array([5])}
    assert honest.call("potential", history) == [5 + 2.5]
    value, info = honest.explain("potential", history)
    assert value == 7.5 and info == {"steps": 2.0, "last": 2.0}
    value, info = honest.explain("picky", np.array([7.0]))
    assert math.isnan(value) and info == {} and "shape (2,)" in honest.error
    assert honest.explain("picky", np.array([2.0])) == (0.5, {})


def test_features_find_their_own_shape(honest):
    s = np.random.default_rng(0).normal(size=(3000, 6))  # three exchanges
    out = honest.call("features", s, shape=None)
    assert out.shape == (3000, 17) and (out[:, :6] == s).all() and honest.error == ""
    np.testing.assert_allclose(out[7, 6:10], [np.median(s[7]), np.percentile(s[7], 30), s[7].std(),
                                              math.atan2(s[7, 0], s[7, 1])])
    np.testing.assert_allclose(out[:, -2:], [[9, 1]] * 3000)


def test_rows_that_fail_are_nan_and_said(honest):
    rows, failed = honest.rows, honest.failed
    out = honest.call("picky", np.array([2.0, -1.0, 4.0, 7.0]))
    np.testing.assert_array_equal(out, [0.5, np.nan, 0.25, np.nan])
    assert honest.error.startswith("ValueError in line") and honest.error.endswith(": no -1.0 please")
    assert (honest.rows - rows, honest.failed - failed) == (4, 2)
    assert np.isnan(honest.call("picky", np.array([7.0]))) and "shape (2,)" in honest.error
    assert honest.call("picky", np.array([1.0])) == [1] and honest.error == ""
    assert np.isnan(honest.call("picky", np.array([-1.0, -2.0]), shape=None)).all()


def test_no_rows(honest):
    assert honest.call("policy", {"hand": np.zeros((0, 2)), "goal": np.zeros((0, 2))}, shape=(3,)).shape == (0, 3)


def test_code_in_takes_the_last_block_that_defines_it():
    reply = ("Try\n```python\ndef policy(obs):\n    return 1\n```\nor better\n```py\ndef policy(obs):\n    return 2\n"
             "```\nused so:\n```\npolicy(obs)\n```\n")
    assert code_in(reply, ["policy"]) == "def policy(obs):\n    return 2\n"
    assert code_in("def policy(obs):\n    return 3", ["policy"]) == "def policy(obs):\n    return 3\n"
    both = "```\nimport numpy as np\ndef f(x):\n    return x\n```\nand\n```\ndef g(x):\n    return 2\n```"
    assert code_in(both, ["f", "g"]) == "import numpy as np\ndef f(x):\n    return x\n\ndef g(x):\n    return 2\n"
    with pytest.raises(SandboxError, match="defines f and h"):
        code_in(both, ["f", "h"])
    for bad in ["I cannot.", "```python\ndef policy(obs):\n    return np.cli", "```\nx = 1\n```", ""]:
        with pytest.raises(SandboxError, match="no fenced Python block"):
            code_in(bad, ["policy"])


# ---- the static check --------------------------------------------------------------------------------------------

REFUSED = {
    "import os": "import os\ndef f(x):\n    return x",
    "import as": "import subprocess as np\ndef f(x):\n    return x",
    "import in a function": "def f(x):\n    import socket\n    return x",
    "import of a part": "import numpy.f2py\ndef f(x):\n    return x",
    "from os": "from os import system\ndef f(x):\n    return x",
    "from numpy import load": "from numpy import load\ndef f(x):\n    return x",
    "from numpy import star": "from numpy import *\ndef f(x):\n    return x",
    "from typing import sys": "from typing import sys\ndef f(x):\n    return x",
    "relative import": "from . import client\ndef f(x):\n    return x",
    "typing evaluates": "import typing\ndef f(x: '().__class__'):\n    return typing.get_type_hints(f)",
    "subclasses": "def f(x):\n    return ().__class__.__base__.__subclasses__()",
    "globals of a function": "def f(x):\n    return f.__globals__",
    "builtins by name": "def f(x):\n    return __builtins__",
    "dunder import": "def f(x):\n    return __import__('os').getpid()",
    "frame of a generator": "def f(x):\n    g = (i for i in [1])\n    return g.gi_frame.f_back.f_globals",
    "frame of a traceback": "def f(x):\n    try:\n        1 / 0\n    except Exception as e:\n        return e.tb_frame",
    "object of an AttributeError": "def f(x):\n    try:\n        x.a\n    except Exception as e:\n        return e.obj",
    "format looks attributes up": "def f(x):\n    return '{0.__class__}'.format(x)",
    "format_map": "def f(x):\n    return '{x}'.format_map({'x': x})",
    "attribute in an f-string": "def f(x):\n    return f'{x.__class__}'",
    "match looks attributes up": "def f(x):\n    match x:\n        case int(real=y):\n            return y",
    "eval": "def f(x):\n    return eval('1')",
    "exec under another name": "e = exec\ndef f(x):\n    return e('1')",
    "compile": "def f(x):\n    return compile('1', '', 'eval')",
    "open": "def f(x):\n    return open('/etc/passwd').read()",
    "getattr": "def f(x):\n    return getattr(x, '__cla' + 'ss__')",
    "type makes classes": "def f(x):\n    return type('A', (), {})",
    "vars": "def f(x):\n    return vars()",
    "breakpoint": "def f(x):\n    return breakpoint()",
    "input": "def f(x):\n    return input()",
    "memoryview": "def f(x):\n    return memoryview(x)",
    "class": "class A:\n    pass\ndef f(x):\n    return x",
    "async": "async def f(x):\n    return x",
    "decorator with a dunder": "@__loader__\ndef f(x):\n    return x",
    "while": "def f(x):\n    while True:\n        x = x\n    return x",
    "global": "n = 0\ndef f(x):\n    global n\n    n = n + 1\n    return n",
    "yield": "def f(x):\n    yield x",
    "np.load": "import numpy as np\ndef f(x):\n    return np.load('a.npy', allow_pickle=True)",
    "np.memmap": "import numpy as np\ndef f(x):\n    return np.memmap('a', mode='w+', shape=3)",
    "alias of numpy": "import numpy as np\nm = np\ndef f(x):\n    return m.fromfile('a')",
    "tofile": "def f(x):\n    x.tofile('a')\n    return x",
    "dump": "def f(x):\n    x.dump('a')\n    return x",
    "ctypes of an array": "def f(x):\n    return x.ctypes.data",
    "as_strided": "import numpy as np\ndef f(x):\n    return np.lib.stride_tricks.as_strided(x, (10**9,))",
    "strides": "def f(x):\n    x.strides = (1 << 40,)\n    return x",
    "frombuffer": "import numpy as np\ndef f(x):\n    return np.frombuffer(b'12345678')",
    "bmat reads frames": "import numpy as np\ndef f(x):\n    return np.bmat('x')",
    "r_ reads frames, too": "import numpy as np\ndef f(x):\n    return np.r_['x']",
    "c_": "import numpy as np\ndef f(x):\n    return np.c_['x']",
    "resize leaves views of freed memory": "def f(x):\n    x.resize((1,), refcheck=False)\n    return x",
    "seterrcall": "import numpy as np\ndef f(x):\n    np.seterrcall(f)\n    return x",
    "np.testing": "import numpy as np\ndef f(x):\n    return np.testing.run_module_suite()",
    "np.random": "import numpy as np\ndef f(x):\n    return np.random.rand()",
    "argument with a dunder": "def f(__class__):\n    return 1",
    "keyword with a dunder": "def f(x):\n    return dict(__class__=1)",
    "handler with a dunder": "def f(x):\n    try:\n        1 / 0\n    except Exception as __spec__:\n        return 1",
    "wide letters are folded": "def f(x):\n    return ()._\uff3fclass__",
    "too long": "def f(x):\n    return x\n" + "#" * 30_000,
    "deep": "def f(x):\n    return " + "-" * 15_000 + "1",
    "many brackets": "def f(x):\n    return " + "(" * 9_000 + ")" * 9_000,
    "a number without end": "def f(x):\n    return " + "9" * 10_000,
    "no Python": "def f(x:\n",
    "a null byte": "def f(x):\n    return 1\0",
    "half a letter": "def f(x):\n    return '\ud800'",
    "another function": "def g(x):\n    return x",
    "no function of its own": "f = abs",
    "nothing": "",
}


@pytest.mark.parametrize("case", REFUSED)
def test_static_check_refuses(case):
    with pytest.raises(SandboxError, match="generated code") as error:
        check(REFUSED[case], ["f"])
    one_line(error)


# ---- the process, where the check sees nothing -------------------------------------------------------------------

# A way out of restricted builtins that the check would refuse: from here on the code has all of Python.
OUT = '''
sys = [c for c in ().__class__.__base__.__subclasses__() if c.__name__ == "_wrap_close"][0].close.__globals__["sys"]
B = sys.modules["builtins"]
os = sys.modules["os"]
def load(name):
    return B.__import__(name)
def call(number, *args):
    libc = sys.modules["ctypes"].CDLL(None, use_errno=True)
    result = libc.syscall(number, *args)
    if result < 0:
        raise B.OSError(sys.modules["ctypes"].get_errno(), "syscall")
    return result
def machine(code):
    ctypes = sys.modules["ctypes"]
    libc, code = ctypes.CDLL(None), B.bytes.fromhex(code)
    libc.mmap.restype = ctypes.c_void_p
    page = ctypes.c_void_p(libc.mmap(0, 4096, 7, 0x22, -1, 0))  # may be run
    ctypes.memmove(page, code, len(code))
    result = ctypes.CFUNCTYPE(ctypes.c_long)(page.value)()
    if result < 0:
        raise B.OSError(-result, "machine code")
    return result
'''
# Each writes, reads, starts or reaches something, and returns 1 if it could. DIR, PORT and PID are filled in.
ESCAPES = {
    "open for writing": "B.open('DIR/written', 'w')",
    "os.open": "os.open('DIR/written', os.O_CREAT | os.O_WRONLY)",
    "io.FileIO": "sys.modules['io'].FileIO('DIR/written', 'w')",
    "mkdir": "os.mkdir('DIR/written')",
    "symlink": "os.symlink('/etc/passwd', 'DIR/written')",
    "rename": "os.rename('DIR/secret', 'DIR/written')",
    "unlink": "os.unlink('DIR/secret')",
    "rmtree": "os.rmdir('DIR')",
    "chmod": "os.chmod('DIR/secret', 0)",
    "truncate": "os.truncate('DIR/secret', 0)",
    "utime": "os.utime('DIR/secret')",
    "mkfifo": "os.mkfifo('DIR/written')",
    "np.memmap": "sys.modules['numpy'].memmap('DIR/written', mode='w+', shape=3)",
    "np.save": "sys.modules['numpy'].save('DIR/written', [1])",
    "tofile": "x.tofile('DIR/written')",
    "read a file": "B.open('DIR/secret').read()",
    "read with os": "os.open('DIR/secret', os.O_RDONLY)",
    "list a folder": "os.listdir('DIR')",
    "stat": "os.stat('DIR/secret')",
    "readlink": "os.readlink('/proc/self/exe')",
    "own memory as a file": "B.open('/proc/self/mem', 'wb')",
    "the parent's environment": "B.open('/proc/PID/environ').read()",
    "key in the environment": "os.environ['OPENAI_API_KEY']",
    "chdir": "os.chdir('DIR')",
    "os.system": "1 / (os.system('touch DIR/written') == 0)",
    "os.popen": "os.popen('touch DIR/written').read()",
    "subprocess": "load('subprocess').run(['touch', 'DIR/written'])",
    "fork": "os.fork()",
    "forkpty": "os.forkpty()",
    "exec": "os.execv('/bin/touch', ['touch', 'DIR/written'])",
    "posix_spawn": "os.posix_spawn('/bin/touch', ['touch', 'DIR/written'], {})",
    "thread": "sys.modules['_thread'].start_new_thread(os.getpid, ())",
    "clone": "call(56, 17, 0, 0, 0, 0)",
    "vfork": "call(58)",
    "clone3": "call(435, 0, 0)",
    "TCP": "load('_socket').socket().connect(('127.0.0.1', PORT))",
    "UDP": "load('_socket').socket(2, 2).sendto(b'x', ('127.0.0.1', PORT))",
    "Unix socket": "load('_socket').socket(1, 1)",
    "raw socket": "load('_socket').socket(2, 3, 1)",
    "netlink": "load('_socket').socket(16, 3, 0)",
    "socket pair": "load('_socket').socketpair()",
    "kill the parent": "os.kill(PID, 9)",
    "signal to the parent": "os.kill(PID, 0)",
    "stop itself": "os.kill(os.getpid(), 19)",
    "signal handler": "sys.modules['signal'].signal(14, 1)",
    "sleep": "sys.modules['time'].sleep(0.001)",
    "pipe": "os.pipe()",
    "dup": "os.dup(1)",
    "close": "os.close(0)",
    "fcntl": "os.set_blocking(0, False)",
    "write to stderr": "os.write(2, b'x')",
    "read from stdout": "os.read(1, 1)",
    "a file without a name": "os.memfd_create('x')",
    "raise a limit": "sys.modules['resource'].setrlimit(0, (10, 10))",
    "another user": "os.setuid(65534)",
    "nice": "os.nice(5)",
    "new namespace": "call(272, 0x10000000)",  # unshare
    "ptrace": "call(101, 16, PID, 0, 0)",
    "the parent's memory": "call(310, PID, 0, 0, 0, 0, 0)",  # process_vm_readv
    "io_uring": "call(425, 8, 0)",
    "bpf": "call(321, 0, 0, 0)",
    "keyring": "call(248, 0, 0, 0, 0, 0)",
    "mount": "call(165, 0, b'DIR', b'tmpfs', 0, 0)",
    "chroot": "os.chroot('DIR')",
    "reboot": "call(169, 0, 0, 0, 0)",
    "clock": "sys.modules['time'].clock_settime(0, 0)",
    "shared memory": "call(29, 0, 4096, 0o1600)",  # shmget
    "message queue": "call(68, 0, 0o1600)",
    "inotify": "call(253)",
    "userfaultfd": "call(323, 0)",
    "perf": "call(298, 0, 0, -1, -1, 0)",
    "module": "call(175, 0, 0, 0)",
    "seccomp again": "call(317, 1, 0, 0)",
    "prctl": "call(157, 4, 1, 0, 0, 0)",
    "random numbers of the kernel": "os.urandom(1)",
    "memory out of use": "call(28, 0, 0, 102)",  # madvise; 101 would take a page of the machine from it
    "machine code": "machine('b8390000000f05c3')",  # fork
    "a file by its handle": "call(304, -100, 0, 0)",
    "openat2": "call(437, -100, b'DIR/secret', 0, 24)",
    "execveat": "call(322, -100, b'/bin/true', 0, 0, 0)",
    "a pipe of the parent": "call(438, 0, 0, 0)",  # pidfd_getfd
    "write into the parent": "call(311, PID, 0, 0, 0, 0, 0)",  # process_vm_writev
    "limits of the parent": "call(302, PID, 7, 0, 0)",
    "priority of the parent": "call(141, 0, PID, 19)",
    "ports": "call(172, 3)",  # iopl
    "splice": "call(275, 0, 0, 1, 0, 1, 0)",
    "more bits than a file has": "call(1, sys.modules['ctypes'].c_long(0x100000002), b'x', 1)",
    "type into the terminal": "call(16, 0, 0x5412, b'x')",
}


@pytest.fixture(scope="module")
def jail(tmp_path_factory):
    """All escapes in one process, the check switched off, a listener that nobody may reach."""
    folder = tmp_path_factory.mktemp("outside")
    (folder / "secret").write_text("secret")
    os.environ["OPENAI_API_KEY"] = "sk-not-to-be-read"
    with socket.socket() as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp, pytest.MonkeyPatch.context() as patch:
        tcp.bind(("127.0.0.1", 0))
        port = tcp.getsockname()[1]
        udp.bind(("127.0.0.1", port))
        tcp.listen()
        tcp.setblocking(False)
        udp.setblocking(False)
        patch.setattr(sandbox, "check", lambda source, functions: None)
        source, names = OUT, {}
        for number, (case, body) in enumerate(ESCAPES.items()):
            if ("call(" in body or "machine(" in body) and not X86:
                continue
            body = body.replace("DIR", str(folder)).replace("PORT", str(port)).replace("PID", str(os.getpid()))
            names[case] = f"escape{number}"
            source += f"def escape{number}(x):\n    {body}\n    return 1\n"
        source += "def alive(x):\n    return 42\n"
        with Sandbox(source, [*names.values(), "alive"], allow_unprotected=False) as box:
            yield box, names, folder
        del os.environ["OPENAI_API_KEY"]
        for reached in (tcp.accept, lambda: udp.recv(1)):
            with pytest.raises(BlockingIOError):
                reached()


OTHERWISE = {"key in the environment": "KeyError", "thread": "RuntimeError", "np.memmap": "ModuleNotFoundError",
             "raise a limit": "ValueError", "os.system": "ZeroDivisionError", "tofile": "SystemError"}


@pytest.mark.parametrize("case", ESCAPES)
def test_process_holds(jail, case):
    box, names, folder = jail
    if case not in names:
        pytest.skip("the number of a system call of x86_64")
    pid = box._process.pid
    result = box.call(names[case], np.zeros((1, 3)))
    assert np.isnan(result).all() and box.error.startswith(OTHERWISE.get(case, "PermissionError")), box.error
    assert sorted(p.name for p in folder.iterdir()) == ["secret"] and (folder / "secret").read_text() == "secret"
    assert (folder / "secret").stat().st_mode & 0o777
    assert Path(f"/proc/{pid}/task/{pid}/children").read_text() == "" and len(os.listdir(f"/proc/{pid}/task")) == 1
    assert box.call("alive", np.zeros((1, 1))) == [42] and box._process.pid == pid


BOMBS = {  # what ends the process, and what only fails its row
    "endless loop": ("for i in iter_forever():\n        pass", "longer than"),
    "a power of a power": ("return float(10 ** 10 ** 9)", "longer than"),
    "sum of a range": ("return sum(range(10 ** 15))", "longer than"),
    "endless text": ("return len('a' * 10 ** 9 * 2)", "MemoryError"),
    "memory": ("return np.ones((1 << 30,)).sum()", "MemoryError"),
    "memory by and by": ("a = []\n    for i in range(10 ** 6):\n        a.append(np.empty(10 ** 6))", "MemoryError"),
    "list": ("return len([0] * (1 << 31))", "MemoryError"),
    "list of itself": ("a = []\n    a.append(a)\n    return np.array(a).sum()", ""),
    "nested doubling": ("a = [1]\n    for i in range(64):\n        a = [a, a]\n    return np.array(a).sum()",
                        "longer than|MemoryError"),
    "recursion": ("return f(x)", "RecursionError"),
    "a large answer": ("return np.zeros(10 ** 7)", "shape"),
    "a deep answer": ("return np.zeros((1,) * 40)", "shape"),
    "an answer of another kind": ("return 'text'", "ValueError"),
    "no answer": ("return None", "finite"),
    "not a number": ("return float('nan')", "finite"),
    "infinite": ("return float('inf')", "finite"),
    "complex": ("return 1j", "TypeError"),
    "leave": ("raise system_exit", "SystemExit"),
    "end": ("os._exit(0)", "ended"),
    "abort": ("os.abort()", "ended"),
    "zero pointer": ("sys.modules['ctypes'].string_at(0)", "ended"),
    "a call of 32 bits": ("call(0x40000000 + 39)", "ended"),
    "a call of an older processor": ("machine('b802000000cd80c3')", "ended"),  # int 0x80
    "stack": ("sys.setrecursionlimit(10 ** 9)\n    return B.repr(nested())", "longer than|ended|RecursionError"),
    "all signals blocked": ("load('_signal').pthread_sigmask(0, range(1, 60))\n    for i in iter_forever():\n"
                            "        pass", "longer than"),
    "a lock that nobody opens": ("call(202, sys.modules['ctypes'].byref(sys.modules['ctypes'].c_int(0)), 0, 0, 0)",
                                 "longer than|Errno"),
    "an error whose text does not end": ("raise B.type('E', (B.Exception,), {'__str__': lambda e: [i for i in "
                                         "iter_forever()]})()", "longer than"),
    "a pickle": ("os.write(1, b'\\x80\\x04\\x8c\\x05posix\\x8c\\x06system\\x93.' * 9)", "invalid answer"),
    "the alarm": ("sys.modules['signal'].alarm(0)\n    for i in iter_forever():\n        pass", "longer than"),
    "takes the next question": ("os.read(0, 10 ** 6)", "longer than"),
    "answers by itself": ("os.write(1, B.bytes(1000))\n    return 1", "pipe by itself|invalid answer"),
    "many rows": ("os.write(1, pack(1 << 62, 0, 0, 0, 0))", "invalid answer"),
    "rows below zero": ("os.write(1, pack(-1, 0, 0, 0, 0))", "invalid answer"),
    "many dimensions": ("os.write(1, pack(1, 60, 0, 0, 0))", "invalid answer"),
    "large dimensions": ("os.write(1, pack(1, 2, 1 << 40, 1 << 40, 0))", "invalid answer"),
    "dimensions below zero": ("os.write(1, pack(1, 2, -1, -8, 0))", "invalid answer"),
    "long text": ("os.write(1, pack(1, 0, 0, 0, 1 << 40))", "invalid answer"),
    "text below zero": ("os.write(1, pack(1, 0, 0, 0, -5))", "invalid answer"),
    "half an answer": ("os.write(1, B.bytes(20))\n    for i in iter_forever():\n        pass", "longer than"),
    "letters that move the cursor": ("raise ValueError(B.chr(27) + '[2J' + B.chr(10) + 'x' * 10 ** 6)", "ValueError"),
}


@pytest.fixture(scope="module")
def range_of_bombs():
    source = OUT + """
import numpy as np
def iter_forever():
    return B.iter(int, 1)
def pack(*numbers):
    return b"".join(n.to_bytes(8, "little", signed=True) for n in numbers)
system_exit = B.SystemExit(3)
def nested():
    a = []
    for i in range(10 ** 5):
        a = [a]
    return a
def alive(x):
    return 42
"""
    names = {}
    for number, (case, (body, _)) in enumerate(BOMBS.items()):
        names[case] = f"bomb{number}"
        source += f"def bomb{number}(x):\n    {body.replace('f(x)', f'bomb{number}(x)')}\n"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandbox, "check", lambda source, functions: None)
        with Sandbox(source, [*names.values(), "alive"], seconds=30.0) as patient, \
                Sandbox(source, [*names.values(), "alive"], seconds=0.5) as hasty:
            yield patient, hasty, names


@pytest.mark.parametrize("case", BOMBS)
def test_bomb(range_of_bombs, case):
    patient, hasty, names = range_of_bombs
    box, said = hasty if "longer than" in BOMBS[case][1] else patient, ""
    for function in (names[case], "alive"):  # one that writes by itself is found out by the next
        try:
            result = box.call(function, np.zeros((1, 3)))
            said = said or box.error
        except SandboxError as error:
            said, result = str(error), [np.nan]
            assert box._process is None
        assert np.isnan(result[0]) or function == "alive" or case == "answers by itself"
    assert "\n" not in said and "\x1b" not in said and len(said) < 500
    if BOMBS[case][1]:
        assert any(words in said for words in BOMBS[case][1].split("|")), said
    assert box.call("alive", np.zeros((1, 1))) == [42]


FORGED = """
def forge(text, value):
    os.write(1, b"".join(n.to_bytes(8, "little", signed=True) for n in (1, 0, 0, 0, len(text))) + value + text)
    os._exit(0)
def speaks(x):
    forge(b"\\x1b[2J\\nsecond line", b"\\0" * 6 + b"\\xf8\\x7f")
def counts(x):
    forge(b'{"a": 1' + b"0" * 3900 + b"}", B.bytes(8))
"""


def test_an_answer_that_the_code_writes_itself_is_one_line(monkeypatch):
    monkeypatch.setattr(sandbox, "check", lambda source, functions: None)
    with Sandbox(OUT + FORGED, ["speaks", "counts"]) as box:
        for said in (lambda: box.call("speaks", np.zeros(1)), lambda: box.explain("speaks", np.zeros(1))):
            box.close()
            assert np.isnan(np.asarray(said(), object).ravel()[0]) and box.error == "[2J second line"
        box.close()
        with pytest.raises(SandboxError, match="no dict of numbers") as error:  # a number that no float holds
            box.explain("counts", np.zeros(1))
        one_line(error)


def test_no_array_is_laid_over_other_memory():
    """np.ndarray is there for annotations and isinstance; called, the real one takes any offset for its memory."""
    source = ("import numpy as np\ndef f(x):\n    return np.ndarray((3,), 'f8', x, -80)[0]\n"
              "def g(x: np.ndarray) -> np.ndarray | None:\n"
              "    return isinstance(x, np.ndarray) + isinstance(1, (np.ndarray, list))\n")
    with Sandbox(source, ["f", "g"]) as box:
        assert np.isnan(box.call("f", np.zeros((1, 3)))) and box.error.startswith("TypeError")
        assert box.call("g", np.zeros((1, 3))) == [1]


def test_code_that_hangs_or_ends_while_it_is_loaded():
    loop = "import numpy as np\nx = [i for i in range(10 ** 12)]\ndef f(x):\n    return x\n"
    for source, reason in [(loop, "longer than 0.5 s|MemoryError"), ("x = 1 / 0\ndef f(x):\n    return x\n", "line 1")]:
        with pytest.raises(SandboxError, match=reason) as error:
            Sandbox(source, ["f"], seconds=0.5)
        one_line(error)


def test_a_worker_whose_parent_is_gone_ends(tmp_path):
    """Killed while its worker computes, the parent leaves a process that its own alarm ends."""
    script = tmp_path / "parent.py"
    script.write_text(f"import sys, os, signal, threading\nsys.path.insert(0, {str(ROOT)!r})\nimport numpy as np\n"
                      "from llm.sandbox import Sandbox\n"
                      "box = Sandbox('def f(x):\\n    return sum(range(10 ** 15))\\n', ['f'], seconds=0.5)\n"
                      "print(box._process.pid, flush=True)\n"
                      "threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()\n"
                      "box.call('f', np.zeros((1, 1)))\n")
    parent = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert parent.returncode == -9, parent.stderr
    try:
        ended = os.pidfd_open(int(parent.stdout))
    except ProcessLookupError:
        return  # already
    poll = select.poll()
    poll.register(ended, select.POLLIN)
    assert poll.poll(30_000)
    os.close(ended)


def without_seccomp(folder: Path) -> Path:
    """A copy of this package whose worker finds no pyseccomp."""
    shutil.copytree(ROOT / "llm", folder / "llm", ignore=shutil.ignore_patterns("__pycache__", "recordings"))
    shutil.copy(ROOT / "errors.py", folder)
    (folder / "pyseccomp.py").write_text("raise RuntimeError('Unable to find libseccomp')\n")
    return folder


def test_without_seccomp_code_needs_leave(tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox, "ROOT", without_seccomp(tmp_path))
    monkeypatch.delenv("ALLOW_GENERATED_CODE", raising=False)
    source = "def f(x):\n    return 2 * x\n"
    with pytest.raises(SandboxError, match="files, network and processes are not blocked") as error:
        Sandbox(source, ["f"])
    assert "ALLOW_GENERATED_CODE=1" in one_line(error)
    with Sandbox(source, ["f"], allow_unprotected=True) as box:
        assert box.call("f", np.array([3.0])) == [6]
    (tmp_path / "llm" / "reviewed.txt").write_text(sandbox.digest(source) + "  mine\n")
    with Sandbox(source, ["f"]) as box:
        assert box.call("f", np.array([4.0])) == [8]
    monkeypatch.setenv("ALLOW_GENERATED_CODE", "1")
    with Sandbox(source + "#\n", ["f"]) as box:
        assert box.call("f", np.array([5.0])) == [10]


def test_whether_a_machine_can_shut_code_in_is_said_into_a_file_too(tmp_path):
    with (tmp_path / "said").open("w") as file:
        subprocess.run([sys.executable, "-m", "llm.sandbox"], cwd=ROOT, stdout=file, check=True)
    assert (tmp_path / "said").read_text() == "files, network and processes are blocked for generated code\n"
