"""What surrounds a run: arguments and where they come from, what is kept of the code, exit codes, films.

test_contract.py has what every script does with it.
"""
import contextlib
import errno
import json
import os
import pty
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed
from torch.utils._pytree import tree_leaves

import envs
import runtime
from algos import sac, sac_kian

ROOT = Path(__file__).resolve().parent.parent
SMALL = dict(env="tests.tasks:Point-v0", num_envs=4, hidden="8x1", batch_size=16, compile=False, eval_every=0,
             eval_episodes=2, checkpoint_every=0, device="cpu", total_timesteps=48)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    sac.main(sac.Args(**SMALL, gamma=0.9, run_dir=str(folder)))
    return folder


def change(folder, tmp_path, **args):
    """A copy of a run whose config.json has other arguments; None: it has none of this name."""
    copy = tmp_path / "copy"
    copy.mkdir(exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    config["args"] = {name: value for name, value in (config["args"] | args).items() if value is not None}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "checkpoint.pt").write_bytes((folder / "checkpoint.pt").read_bytes())
    return str(copy)


def test_a_run_goes_on_with_the_arguments_that_it_has(run):
    args = runtime.cli(sac.Args, "sac", ["--resume", str(run), "--total-timesteps", "96"])
    assert args == sac.Args(**(SMALL | {"total_timesteps": 96}), gamma=0.9, run_dir=str(run), resume=str(run))
    args = runtime.cli(sac.Args, "sac", ["--evaluate", str(run)])
    assert (args.gamma, args.evaluate, args.video, args.device) == (0.9, str(run), 0, "auto")  # another machine's
    assert runtime.checked(args, "sac", sac.RANGES)[1]["step"] == 48


def test_an_evaluation_can_start_elsewhere_and_is_written_down(run, tmp_path, monkeypatch, capsys):
    folder, seeds, play = change(run, tmp_path), [], envs.evaluation.evaluate
    monkeypatch.setattr(envs.evaluation, "evaluate", lambda *given: seeds.append(given[3]) or play(*given))
    for seed in ("1", "7"):
        sac.main(runtime.cli(sac.Args, "sac", ["--evaluate", folder, "--seed", seed]))
        assert f"after 48 steps, start states of seed {seed}:" in capsys.readouterr().out
    head, *rows = (row.split(",") for row in (Path(folder) / "evaluation.csv").read_text().splitlines())
    assert head == ["env", "seed", "step", *runtime.EVALUATION] and [row[1] for row in rows] == ["1", "7"]
    assert seeds == [15_000, 75_000]


@pytest.mark.parametrize("flags, words", [
    (["--gamma", "0.95"], "--gamma 0.95: a run keeps"),  # the script's default is another value than the run's, too
    (["--compile"], "--compile: a run keeps"), (["--no-normalize"], "--no-normalize: a run keeps"),
    (["--eval-episodes", "4"], "--eval-episodes 4: a run keeps")])
def test_an_argument_that_would_have_no_effect_is_refused(flags, words, run):
    args = runtime.cli(sac.Args, "sac", ["--resume", str(run), "--total-timesteps", "96", *flags])
    with pytest.raises(runtime.UserError, match=f"^{words}"):
        sac.main(args)


def test_runs_of_other_versions(run, tmp_path, capsys):
    with pytest.raises(runtime.UserError, match="with --critic-norm, which algos/sac.py does not have; use its own"):
        runtime.cli(sac.Args, "sac", ["--resume", change(run, tmp_path, critic_norm=True)])
    args = runtime.cli(sac.Args, "sac", ["--evaluate", change(run, tmp_path, tau=None)])
    assert args.tau == sac.Args().tau and capsys.readouterr().err.endswith("is older than tau: as by default\n")
    if not torch.cuda.is_available():
        elsewhere = change(run, tmp_path, device="cuda")
        with pytest.raises(runtime.UserError, match="--device cuda: torch sees no GPU"):
            sac.main(runtime.cli(sac.Args, "sac", ["--resume", elsewhere, "--total-timesteps", "96"]))


@pytest.mark.parametrize("args", [dict(seed="1"), dict(seed=1.5), dict(num_envs=True), dict(compile=1),
                                  dict(device="tpu"), dict(hidden=8)])
def test_a_config_with_values_that_no_flag_allows(args, run, tmp_path):
    with pytest.raises(runtime.UserError, match=f"config.json is damaged: {next(iter(args))} cannot be"):
        runtime.cli(sac.Args, "sac", ["--resume", change(run, tmp_path, **args)])


def test_a_strangers_run_executes_nothing_before_it_is_named(tmp_path, monkeypatch, capsys):
    """Neither rules that it brings nor modules that it names; and it writes into itself alone."""
    monkeypatch.chdir(tmp_path)
    folder, mark = tmp_path / "run", tmp_path / "executed"
    Path("mine.py").write_text("def still(obs):\n    return obs['observation'][:, :2] * 0\n")
    sac_kian.main(sac_kian.Args(**SMALL, knowledge="mine.py", run_dir=str(folder)))
    assert f"--evaluate {folder} --video 2 --knowledge mine.py" in capsys.readouterr().err
    evil = f"open({str(mark)!r}, 'w')\n" + Path("mine.py").read_text()
    (folder / "mine.py").write_text(evil)
    Path("evil.py").write_text(evil)
    config = json.loads((folder / "config.json").read_text())

    def go_on(how: str, *flags: str, exact: str = "", **changed):
        stranger = config | {"args": config["args"] | changed} | ({"exact_env": exact} if exact else {})
        (folder / "config.json").write_text(json.dumps(stranger))
        more = ["--total-timesteps", "96"] if how == "--resume" else []
        sac_kian.main(runtime.cli(sac_kian.Args, "sac_kian", [how, str(folder), *flags, *more]))
    for how in ("--resume", "--evaluate"):
        for changed, named in (({}, "--knowledge mine.py"),
                               ({"knowledge": "none", "env": "evil:Point-v0"}, "--env evil:Point-v0"),
                               ({"knowledge": "none", "env": "evil.py:Point-v0"}, "--env evil.py:Point-v0"),
                               ({"knowledge": "none", "env": "run/envs.py:Point-v0"}, "--env run/envs.py:Point-v0"),
                               ({"knowledge": "none", "env": "envs.py:Point-v0"}, "--env envs.py:Point-v0"),
                               ({"knowledge": "none", "env": "runs.evil:Point-v0"}, "--env runs.evil:Point-v0"),
                               ({"knowledge": "none", "env": "benchmarks.run:X-v0"}, "--env benchmarks.run:X-v0"),
                               ({"knowledge": "none", "init_from": "x,mine.py"}, "--init-from x,mine.py")):
            with pytest.raises(runtime.UserError, match=f"name it again: {how} {folder} {named}$"):
                go_on(how, **changed)
        with pytest.raises(runtime.UserError, match="was trained with mine.still, and nothing of that is from evil.py"):
            go_on(how, "--knowledge", "evil.py", knowledge="evil.py")
    (folder / "checkpoint.pt.tmp").symlink_to(tmp_path / "mine.py")
    with pytest.raises(runtime.UserError, match="checkpoint.pt.tmp is a symbolic link"):
        go_on("--resume", "--knowledge", "mine.py")
    (folder / "checkpoint.pt.tmp").unlink()
    assert not mark.exists()
    go_on("--resume", "--knowledge", "mine.py", exact="evil:Point-v0")
    assert mark.exists()  # the copy, which was named; the module was not imported
    assert "evil" not in sys.modules


@pytest.mark.parametrize("words", [["--resume", ""], ["--evaluate="], ["--seed", "2", "--evaluate", ""]])
def test_an_empty_folder_is_no_new_run(words):
    """As of a shell variable that is not set."""
    with pytest.raises(runtime.UserError, match="is empty; name the folder of a run"):
        runtime.cli(sac.Args, "sac", words)


def test_a_folder_of_runs_names_its_last_one(run):
    with pytest.raises(runtime.UserError, match=f"no config.json; the last one in it is {run}$"):
        runtime.cli(sac.Args, "sac", ["--resume", str(run.parent)])


def test_ranges():
    args = sac.Args()
    for name, values in (("her_goals", [0]), ("gamma", [0.0, 1.0]), ("eval_every", [0]), ("seed", [0, 2 ** 63 - 1])):
        for value in values:
            runtime.checked(replace(args, **{name: value}), "sac", sac.RANGES)
    assert torch.initial_seed() == 2 ** 63 - 1  # the last one: `checked` seeds torch
    for name, values in (("gamma", [1.01]), ("num_envs", [0]), ("seed", [2 ** 63]), ("her_goals", [float("inf")]),
                         ("learning_rate", [0.0, 1e39]), ("goal_range", [10.1]), ("num_envs", [10 ** 8, 10 ** 400]),
                         ("buffer_size", [2 ** 63]), ("checkpoint_every", [2 ** 63, 10 ** 400])):
        for value in values:
            with pytest.raises(runtime.UserError, match=f"--{name.replace('_', '-')} must be"):
                runtime.checked(replace(args, **{name: value}), "sac", sac.RANGES)


@pytest.mark.parametrize("hidden", ["9" * 20 + "x3", "8x1000", "8", "x3", "0x3"])
def test_layers_that_cannot_be_made(hidden, tmp_path):
    with pytest.raises(runtime.UserError, match=f"--hidden is width x depth, .* not '{hidden}'$"):
        sac.main(sac.Args(**(SMALL | {"hidden": hidden}), run_dir=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_a_run_says_which_code_made_it(tmp_path, monkeypatch, capsys):
    """A commit alone would not: a fork is in none yet."""
    script = tmp_path / "algos" / "sac.py"
    for words in (["init", "-q"],
                  ["-c", "user.name=x", "-c", "user.email=x", "commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    monkeypatch.setattr(runtime.run, "__file__", str(tmp_path / "runtime" / "run.py"))
    monkeypatch.delenv("RUN_COMMIT", raising=False)
    (tmp_path / "mine.txt").write_text("no code")
    assert not runtime.run.describe_machine()["commit"].endswith("dirty")
    script.parent.mkdir()
    script.write_text("first")
    assert runtime.run.describe_machine()["commit"].endswith("-dirty")
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(script), raising=False)
    sac.main(sac.Args(**SMALL, run_dir=str(tmp_path / "run")))
    kept = tmp_path / "run" / "algos-sac.py"
    assert kept.read_text() == "first" and "note" not in capsys.readouterr().err
    script.write_text("second")
    sac.main(runtime.cli(sac.Args, "sac", ["--resume", str(tmp_path / "run"), "--total-timesteps", "60"]))
    assert kept.read_text() == "first"
    assert f"note: {script} has changed since this run began" in capsys.readouterr().err


NO_MEMORY = "x: there is not enough memory; lower what sizes were given, as --hidden, --batch-size, --num-envs"


@pytest.mark.parametrize("error, code, line", [
    (MemoryError(), 2, NO_MEMORY), (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, NO_MEMORY),
    (runtime.UserError("no"), 2, "x: no"), (envs.EnvError("none"), 2, "x: none"),
    (envs.EnvError("no [0. \n  1.]\n at all"), 2, "x: no [0. 1.] at all"),
    (KeyboardInterrupt(), 130, "x: interrupted")])
def test_one_line_and_an_exit_code(error, code, line, capsys):
    with pytest.raises(SystemExit) as end, runtime.exit_codes("x"):
        raise error
    assert end.value.code == code and capsys.readouterr().err == line + "\n"


def test_a_ctrl_c_while_torch_is_imported_is_one_line():
    """Also where a library makes another error of it."""
    code = "import start\ntry: raise KeyboardInterrupt\nexcept KeyboardInterrupt as error: raise {} from error"
    for error, said in (("error", "interrupted\n"), ("ImportError('mujoco')", "interrupted\n")):
        done = subprocess.run([sys.executable, "-c", code.format(error)], cwd=ROOT, capture_output=True, text=True)
        assert done.stderr == said and done.returncode


def test_an_unknown_renderer_is_one_line():
    """mujoco cannot be imported then."""
    done = subprocess.run([sys.executable, "algos/sac.py", "--help"], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "MUJOCO_GL": "bogus"})
    assert done.returncode == 2 and done.stderr.startswith("MUJOCO_GL is bogus") and done.stderr.count("\n") == 1


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(run, tmp_path, monkeypatch, capsys):
    folder = Path(change(run, tmp_path))
    before = (folder / "checkpoint.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(os, "_exit", sys.exit)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(SystemExit) as end, runtime.exit_codes("sac"):
            sac.main(runtime.cli(sac.Args, "sac", ["--resume", str(folder), "--total-timesteps", "60"]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert end.value.code == 2 and capsys.readouterr().err.splitlines()[-1].startswith("sac: File too large; make room")
    assert (folder / "checkpoint.pt").read_bytes() == before and not list(folder.glob("*.tmp"))


@pytest.mark.parametrize("number, content", [(errno.EINVAL, "new"), (errno.ENOTSUP, "new"), (errno.ENOSPC, "old")])
def test_a_disk_that_is_full_at_the_flush_keeps_the_old_file(number, content, tmp_path, monkeypatch):
    """And one without a flush takes the new one."""
    def fsync(_file):
        raise OSError(number, os.strerror(number))

    path = tmp_path / "file"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", fsync)
    with contextlib.nullcontext() if content == "new" else pytest.raises(OSError):
        runtime.write_whole(path, lambda temporary: temporary.write_text("new"))
    assert path.read_text() == content and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("log_every, words", [(4, "critic_loss is nan at step"), (1000, "lower")])
def test_a_loss_that_is_no_number_ends_the_run(log_every, words, tmp_path, monkeypatch):
    """Its last checkpoint stays, the last good one."""
    monkeypatch.setattr(sac, "LOG_EVERY", log_every)
    with pytest.raises(runtime.UserError, match=f"diverged: {words}"):
        sac.main(sac.Args(**(SMALL | {"learning_rate": 1e30, "total_timesteps": 400}), updates_per_step=1.0,
                          run_dir=str(tmp_path / "run")))


def test_an_agent_that_is_no_number_does_not_replace_the_last_good_one(run, tmp_path, monkeypatch):
    """Where no loss was logged since."""
    folder, update = Path(change(run, tmp_path)), sac.update

    def ruined(agent, *given):
        scalars = update(agent, *given)
        agent["target"]["q.0.weight"][0, 0, 0] = torch.nan
        return scalars
    before = (folder / "checkpoint.pt").read_bytes()
    monkeypatch.setattr(sac, "update", ruined)
    with pytest.raises(runtime.UserError, match="diverged: the agent holds a number that is not finite at step 60; .*"
                                                f"[(]{folder} keeps its last checkpoint"):
        sac.main(runtime.cli(sac.Args, "sac", ["--resume", str(folder), "--total-timesteps", "60"]))
    assert (folder / "checkpoint.pt").read_bytes() == before


def test_one_process_writes_a_run(run, tmp_path):
    """A second one is refused, whether it goes on with the run or names its folder, and told who holds it."""
    folder = change(run, tmp_path)
    hold = ("import fcntl, sys; lock = open(sys.argv[1], 'w'); fcntl.lockf(lock, fcntl.LOCK_EX); "
            "lock.write('77 of elsewhere'); lock.flush(); print(flush=True); sys.stdin.read()")
    holder = subprocess.Popen([sys.executable, "-c", hold, f"{folder}/lock"], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE)
    holder.stdout.readline()
    more = ["--resume", folder, "--total-timesteps", "60"]
    try:
        with pytest.raises(runtime.UserError, match="is being written by process 77 of elsewhere"):
            sac.main(runtime.cli(sac.Args, "sac", more))
        sac.main(runtime.cli(sac.Args, "sac", ["--evaluate", folder]))  # it only reads
    finally:
        holder.communicate()
    sac.main(runtime.cli(sac.Args, "sac", more))


def test_a_run_that_has_gone_on_meanwhile_is_left_as_it_is(run, tmp_path, monkeypatch):
    """Between the reading of its checkpoint and the lock."""
    folder, begin = change(run, tmp_path), runtime.Run

    def late(*given):
        monkeypatch.setattr(runtime, "Run", begin)
        sac.main(runtime.cli(sac.Args, "sac", ["--resume", folder, "--total-timesteps", "96"]))
        return begin(*given)
    monkeypatch.setattr(runtime, "Run", late)
    with pytest.raises(runtime.UserError, match=f"another process has gone on with {folder} since"):
        sac.main(runtime.cli(sac.Args, "sac", ["--resume", folder, "--total-timesteps", "64"]))
    assert runtime.load_run(folder, "sac", sac.Args)[1]["step"] == 96
    assert json.loads((tmp_path / "copy" / "config.json").read_text())["args"]["total_timesteps"] == 96


def test_a_checkpoint_with_one_wrong_bit_is_refused(run, tmp_path):
    """Or it holds the same numbers: some bits of the archive say nothing."""
    folder = Path(change(run, tmp_path))
    good, whole = runtime.load_run(str(run), "sac", sac.Args)[1], (run / "checkpoint.pt").read_bytes()
    generator, refused = torch.Generator().manual_seed(0), 0
    for place in torch.randint(8 * len(whole), (200,), generator=generator).tolist():
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        (folder / "checkpoint.pt").write_bytes(damaged)
        try:
            loaded = runtime.load_run(str(folder), "sac", sac.Args)[1] | {"read_ns": good["read_ns"]}
            assert all(torch.equal(x, y) if isinstance(y, torch.Tensor) else x == y
                       for x, y in zip(tree_leaves(loaded), tree_leaves(good), strict=True))
        except runtime.UserError as error:
            refused += 1
            assert f"{folder / 'checkpoint.pt'} is damaged" in str(error)
    assert refused > 100


@pytest.mark.parametrize("error, reason", [
    (MemoryError(), "there is not enough memory"), (OSError(errno.EIO, "Input/output error"), "Input/output error"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "there is not enough memory"),
    (PermissionError(errno.EACCES, "Permission denied"), "Permission denied")])
def test_what_cannot_be_read_may_be_whole(error, reason, run, monkeypatch):
    """It is not called damaged."""
    def fails(*_given, **_kwargs):
        raise error
    places = [(torch, "load", "checkpoint.pt")]
    if isinstance(error, OSError):
        places.append((Path, "read_text", "config.json"))
    if isinstance(error, PermissionError):  # of the folder
        places.append((Path, "is_file", "config.json"))
    for place, name, file in places:
        with monkeypatch.context() as patch, pytest.raises(runtime.UserError) as said:
            patch.setattr(place, name, fails)
            runtime.load_run(str(run), "sac", sac.Args)
        assert str(said.value) == f"{run / file} cannot be read ({reason}); put that right, and try again"


def test_rows_that_are_lost_are_missed(run, tmp_path, capsys):
    folder = Path(change(run, tmp_path))
    (folder / "eval.csv").write_text("".join((run / "eval.csv").read_text().splitlines(keepends=True)[:-1]))
    sac.main(runtime.cli(sac.Args, "sac", ["--resume", str(folder), "--total-timesteps", "60"]))
    said = capsys.readouterr().err
    assert f"note: {folder / 'eval.csv'} lacks 1 rows that it had at step 48" in said
    assert "scalars.csv lacks" in said  # all of them
    (folder / "eval.csv").write_bytes(bytes(range(256)))
    sac.main(runtime.cli(sac.Args, "sac", ["--resume", str(folder), "--total-timesteps", "72"]))
    assert f"note: {folder / 'eval.csv'} lacks " in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--resume", "--evaluate", "--run-dir", "--knowledge"])
def test_a_path_that_is_too_long_is_one_line(flag, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end, runtime.exit_codes("sac_kian"):
        words = ["--env", "Pendulum-v1", "--no-compile", "--knowledge", "none", flag, "a" * 300 + ".py"]
        sac_kian.main(runtime.cli(sac_kian.Args, "sac_kian", words))
    said = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and len(said) == 1 and "aaa" in said[0] and not list(tmp_path.iterdir())


def test_a_resume_goes_on_with_numpys_global_generator(tmp_path):
    """Which some tasks draw from."""
    args = sac.Args(**(SMALL | {"total_timesteps": 4}), run_dir=str(tmp_path / "run"))
    first = runtime.Run("sac", args, "Point-v0", None, {})
    first.advance(4)
    first.save_if_due()
    expected = np.random.random(3).tolist()
    first.finish()
    saved = runtime.load_run(str(tmp_path / "run"), "sac", sac.Args)[1]
    np.random.seed(0)
    again = runtime.Run("sac", replace(args, resume=str(tmp_path / "run"), total_timesteps=8), "Point-v0", saved, {})
    assert np.random.random(3).tolist() == expected
    again.advance(4)
    again.finish()


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(runtime.UserError, match="name another --run-dir"):
            sac.main(sac.Args(**SMALL, run_dir=str(folder)))
    assert (tmp_path / "file").read_text() == ""


def test_a_ctrl_c_at_the_very_start_leaves_a_run_that_goes_on(tmp_path, monkeypatch):
    folder, board = tmp_path / "run", runtime.run.SummaryWriter

    def interrupted(*given, **named):
        os.kill(os.getpid(), signal.SIGINT)
        return board(*given, **named)
    monkeypatch.setattr(runtime.run, "SummaryWriter", interrupted)
    with pytest.raises(SystemExit, match="130"):
        sac.main(sac.Args(**SMALL, run_dir=str(folder)))
    assert runtime.load_run(str(folder), "sac", sac.Args)[1]["step"] == 4


def test_a_run_whose_terminal_is_closed_is_saved(tmp_path):
    """What it writes there fails from then on; and the shell and the kernel each send a SIGHUP."""
    folder, (ours, theirs) = tmp_path / "run", pty.openpty()
    flags = SMALL | {"eval_every": 4, "total_timesteps": 10 ** 6, "run_dir": folder}
    del flags["compile"]
    words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    run = subprocess.Popen([sys.executable, "algos/sac.py", *words, "--no-compile"], cwd=ROOT, stderr=theirs,
                           preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL))  # under nohup it is ignored
    said = b""
    while b"step 8:" not in said:
        said += os.read(ours, 1000)
    for signum in (signal.SIGSTOP, signal.SIGHUP):
        run.send_signal(signum)
    os.close(ours)
    os.close(theirs)
    run.send_signal(signal.SIGCONT)
    run.send_signal(signal.SIGHUP)
    assert run.wait(60) == 129 and runtime.load_run(str(folder), "sac", sac.Args)[1]["step"] >= 8


def test_ctrl_c_spares_what_is_started_while_finishing():
    """A terminal's Ctrl-C goes to all its processes: the child lives on, this process hears of it after the block."""
    code = """
import os, signal, subprocess
from runtime import finishing
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
try:
    with finishing():
        child = subprocess.Popen(["sleep", "0.5"])
        os.killpg(0, signal.SIGINT)
        print(child.wait(), flush=True)
    print("not heard")
except KeyboardInterrupt:
    print("heard")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          start_new_session=True)
    assert done.stdout.split() == ["0", "heard"], done.stdout + done.stderr


def test_no_compiler_is_said_and_runs(monkeypatch, capsys):
    monkeypatch.setenv("CXX", shutil.which("false"))
    assert runtime.compiled(len, True, torch.device("cpu")) is len
    assert "the C++ compiler does not work" in capsys.readouterr().err
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("PATH", "/nowhere")
    assert runtime.compiled(len, True, torch.device("cpu")) is len
    assert "no C++ compiler (no-such-compiler)" in capsys.readouterr().err


def test_a_compiler_that_fails_is_one_line_and_runs(monkeypatch, capsys):
    def fails(*_inputs):
        raise BackendCompilerFailed("inductor", RuntimeError("C++ compile error\n80 lines of it"), None)
    monkeypatch.setattr(torch, "compile", lambda *_given, **_kwargs: fails)
    call = runtime.compiled(len, True, torch.device("cuda"))
    assert [call("abc"), call("ab")] == [3, 2]
    assert capsys.readouterr().err.splitlines()[1:] == ["the update is not compiled (RuntimeError: C++ compile error): "
                                                        "training is slower but the same"]


@pytest.mark.parametrize("part, saved", [
    (envs.Normalizer(3), envs.Normalizer(2).state_dict()), ({"x": torch.zeros(3)}, {"x": torch.zeros(1)}),
    ({"inside": {"x": torch.zeros(2)}}, {"inside": {"x": torch.zeros(2, 1)}})])
def test_a_part_of_other_sizes_is_not_replaced(part, saved):
    with pytest.raises(runtime.UserError, match="other observations or actions .part has other sizes."):
        runtime.restore({"part": part}, {"part": saved})


def test_means_are_since_the_last_time():
    means = runtime.Means()
    for x in (1.0, 2.0, 6.0):
        means.add({"a": torch.tensor(x), "b": torch.tensor([x, 0.0])})
    again = runtime.Means()
    again.load_state_dict(means.state_dict())
    for part in (means, again):
        assert {name: value.tolist() for name, value in part.take().items()} == {"a": 3.0, "b": [3.0, 0.0]}
        assert part.take() == {}


def test_films_and_the_picture_of_who_acts(tmp_path, capsys):
    (tmp_path / "rules.py").write_text("def still(obs):\n    return obs[:, :1] * 0\n")
    run = str(tmp_path / "run")
    sac_kian.main(sac_kian.Args(**(SMALL | {"env": "Pendulum-v1", "eval_episodes": 1}), run_dir=run, video=1,
                                knowledge=str(tmp_path / "rules.py")))
    assert (tmp_path / "run" / "video" / "episode-0.mp4").stat().st_size > 1000
    assert (tmp_path / "run" / "video" / "attention-0.png").stat().st_size > 10_000
    assert "filmed into" in capsys.readouterr().err


def test_without_a_renderer_it_goes_on(run, monkeypatch, capsys):
    monkeypatch.setattr(envs.evaluation, "find_renderer", lambda: None)
    envs.record(None, "FetchReach-v2", 1, 0, run / "video")
    assert "apt-get install" in capsys.readouterr().err and not (run / "video").exists()
