"""Every command that README and docs print runs as it stands, with few steps."""
import re
import shlex
from pathlib import Path

import pytest
import tyro

from algos import sac_kian

ROOT = Path(__file__).resolve().parent.parent
FEW = ["--total-timesteps", "400", "--num-envs", "4", "--hidden", "16x1", "--batch-size", "32", "--updates-per-step", "0.05",
       "--no-compile", "--eval-every", "0", "--eval-episodes", "2", "--video", "0"]


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
    if "my_idea" in script:
        script = "algos/sac_kian.py"
    assert (ROOT / script).is_file()
    run = tmp_path / "RUN"
    if any(word.startswith("runs/") or word == "RUN" or "run:RUN" in word for word in flags):
        args = tyro.cli(sac_kian.Args, args=[*FEW, "--run-dir", str(run), "--checkpoint-every", "200"])
        sac_kian.main(args)
        if "--resume" in flags:  # a finished run has nothing to resume; test_runs.py cuts and resumes
            return
    flags = [str(run) if word.startswith("runs/") else word for word in flags]
    few = ["--eval-episodes", "2"] if "--evaluate" in flags else FEW
    sac_kian.main(tyro.cli(sac_kian.Args, args=[*flags, *few]))
