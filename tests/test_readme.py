"""Every command that README and docs print runs as it stands, with few steps."""
import re
import shlex
from pathlib import Path

import pytest
import tyro

from algos import ppo, ppo_kian, sac_kian, stream_ac, stream_q, stream_td

ROOT = Path(__file__).resolve().parent.parent
FEW = ["--total-timesteps", "400", "--num-envs", "4", "--hidden", "16x1", "--batch-size", "32", "--updates-per-step",
       "0.05", "--no-compile", "--eval-every", "0", "--eval-episodes", "2", "--video", "0"]
FEW_GRID = ["--total-timesteps", "256", "--num-envs", "2", "--num-steps", "64", "--batch-size", "64", "--eval-every",
            "0", "--eval-episodes", "2", "--video", "0"]
WHOLE = {"sac_kian": (sac_kian, FEW), "ppo_kian": (ppo_kian, FEW_GRID), "ppo": (ppo, FEW_GRID)}  # script: (module, few steps)
FEW_STREAM = ["--total-timesteps", "300", "--hidden", "16x1", "--no-compile", "--eval-every", "0"]
STREAMS = {"stream_ac": (stream_ac, [*FEW_STREAM, "--eval-episodes", "1"]),
           "stream_q": (stream_q, [*FEW_STREAM, "--eval-episodes", "1"]), "stream_td": (stream_td, FEW_STREAM)}
OPTIONAL = {"MinAtar/": "minatar", "dm_control/": "dm_control", "NoFrameskip": "ale_py"}  # requirements-envs.txt


def blocks(language: str) -> list[str]:
    text = "\n".join(p.read_text() for p in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))])
    return [body for name, body in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S) if name == language]


def commands() -> list[str]:
    joined = "\n".join(blocks("")).replace("\\\n", " ")
    lines = [line.split("#")[0].strip() for line in joined.splitlines()]
    return sorted({" ".join(line.split()) for line in lines if line.startswith("python algos/")})


def test_there_are_commands_and_knowledge():
    assert len(commands()) >= 5 and any("def " in block for block in blocks("python"))


@pytest.mark.parametrize("command", commands())
def test_command(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for block in blocks("python"):
        (tmp_path / re.match(r"# (\S+\.py)", block)[1]).write_text(block)
    _, script, *flags = shlex.split(command)
    script = script.replace("my_idea", "sac_kian")
    assert (ROOT / script).is_file()
    if (stem := Path(script).stem) in STREAMS:
        for mark, package in OPTIONAL.items():
            if mark in command:
                pytest.importorskip(package)
        (tmp_path / "ETTm2.csv").write_text("date,a,OT\n" + "".join(f"now,{i % 7},{i % 11}\n" for i in range(400)))
        module, few = STREAMS[stem]
        module.main(tyro.cli(module.Args, args=[*flags, *few, "--run-dir", str(tmp_path / "RUN")]))
        return
    assert stem in WHOLE, f"a page names a new script: put {stem} and flags for a short run into WHOLE"
    module, few = WHOLE[stem]
    run = tmp_path / "RUN"
    if any(word.startswith("runs/") or word == "RUN" or "run:RUN" in word for word in flags):
        module.main(tyro.cli(module.Args, args=[*few, "--run-dir", str(run), "--checkpoint-every", "200"]))
        if "--resume" in flags:  # test_runs.py cuts and resumes
            tyro.cli(module.Args, args=flags)
            return
    if "--run-dir" in flags:  # where it writes is not where it reads
        flags[flags.index("--run-dir") + 1] = str(tmp_path / "new")
    flags = [str(run) if word.startswith("runs/") else word for word in flags]
    few = ["--eval-episodes", "2"] if "--evaluate" in flags else few
    module.main(tyro.cli(module.Args, args=[*flags, *few]))
