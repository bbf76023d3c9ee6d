"""Every command that README and the pages print runs as it stands, with few steps; algos/README.md tells the truth.

`python tests/test_readme.py` rewrites the counts of lines and hunks in algos/README.md.
"""
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for `python tests/test_readme.py`

import runtime
from benchmarks import offline

TREE = ROOT / "algos" / "README.md"
FEW_SAC = ["--total-timesteps", "400", "--num-envs", "4", "--hidden", "16x1", "--batch-size", "32",
           "--updates-per-step", "0.05", "--no-compile", "--eval-every", "0", "--eval-episodes", "2", "--video", "0"]
FEW_SPLITS = [*FEW_SAC, "--num-envs", "6", "--horizon", "10", "--encoder-hidden", "8"]  # FrankaSkill has six buckets
FEW_DDPG = [*FEW_SAC, "--learning-starts", "100"]
FEW_MEOW = [*FEW_DDPG, "--shift-hidden", "16x1"]
FEW_OFFLINE = ["--total-timesteps", "40", "--hidden", "16x1", "--batch-size", "16", "--bins", "8", "--negatives", "4",
               "--samples", "8", "--no-compile", "--eval-every", "0", "--eval-episodes", "2", "--video", "0"]
FEW_DQN = [*(word for word in FEW_DDPG if word not in ("--updates-per-step", "0.05")), "--train-every", "100",
           "--updates", "2"]
FEW_PPO = ["--total-timesteps", "256", "--num-envs", "2", "--num-steps", "64", "--batch-size", "64", "--eval-every",
           "0", "--eval-episodes", "2", "--video", "0"]
FEW_A2C = [word for word in FEW_PPO if word not in ("--batch-size", "64", "--num-steps")]
FEW_ACER = [*FEW_A2C, "--replay-starts", "100"]
FEW_SEARCH = ["--total-timesteps", "400", "--num-envs", "8", "--eval-every", "0", "--eval-episodes", "2", "--video",
              "0"]
FEW_SRL = ["--total-timesteps", "128", "--frames", "200", "--eval-every", "0", "--video", "0"]
FEW_SERIES = ["--total-timesteps", "300", "--hidden", "16x1", "--no-compile", "--eval-every", "0"]
FEW_STREAM = [*FEW_SERIES, "--eval-episodes", "1"]
# flags that make a run of each script short; a new script is a line here
WHOLE = {"sac": FEW_SAC, "sac_kian": FEW_SAC, "sac_handover": FEW_SAC, "ddpg": FEW_DDPG, "td3": FEW_DDPG,
         "camel": FEW_DDPG, "lesr": FEW_DDPG, "meow": FEW_MEOW, "br_rcrl": FEW_OFFLINE,
         "ppo": FEW_PPO, "ppo_continuous": FEW_PPO, "ppo_kian": FEW_PPO, "ppo_kogun": FEW_PPO, "ppo_a2t": FEW_PPO,
         "ppo_bc": FEW_PPO, "ppo_pixels": FEW_PPO, "srl": FEW_SRL, "a2c": FEW_A2C, "acer": FEW_ACER, "acktr": FEW_A2C,
         "trpo": FEW_PPO, "ars": FEW_SEARCH, "cma_es": FEW_SEARCH, "dqn": FEW_DQN,
         "sac_kogun": FEW_SAC, "sac_bc": FEW_SAC, "sac_demos": FEW_SAC, "sac_shaping": FEW_SAC, "ppo_mask": FEW_PPO,
         "ppo_rnd": FEW_PPO, "bk_code": FEW_PPO, "bk_pref": FEW_PPO, "bk_goal": FEW_PPO,
         "tesac": FEW_SPLITS, "ccm": FEW_SPLITS, "satesac": FEW_SPLITS, "saccm": FEW_SPLITS,
         "stream_ac": FEW_STREAM, "stream_q": FEW_STREAM, "stream_td": FEW_SERIES}
OPTIONAL = {"MinAtar/": "minatar", "dm_control/": "dm_control", "NoFrameskip": "ale_py",
            "Crafter-": "crafter"}  # requirements-envs.txt
ROW = re.compile(r"^\| \[`(\w+)\.py`\]\([^)]*\) \| (\d+) \|", re.M)  # of the table of scripts: name, lines
EDGE = re.compile(r"`diff -u algos/(\w+)\.py algos/(\w+)\.py` \| (\d+) \|")  # parent, child, hunks


def pages() -> list[Path]:
    return [ROOT / "README.md", TREE, *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(language: str) -> list[str]:
    text = "\n".join(page.read_text() for page in pages())
    return [body for name, body in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S) if name == language]


def commands() -> list[str]:
    joined = "\n".join(blocks("")).replace("\\\n", " ")
    lines = [line.split("#")[0].strip() for line in joined.splitlines()]
    return sorted({" ".join(line.split()) for line in lines if line.startswith("python algos/")})


def hunks(parent: str, child: str) -> int:
    """Hunks of `diff -u` between two scripts."""
    paths = [f"algos/{name}.py" for name in (parent, child)]
    diff = subprocess.run(["diff", "-u", *paths], cwd=ROOT, capture_output=True, text=True).stdout
    return len(re.findall(r"^@@ ", diff, re.M))


def lines(script: str) -> int:
    return (ROOT / "algos" / f"{script}.py").read_text().count("\n")


def test_there_are_commands_and_knowledge():
    assert len(commands()) >= 5 and any("def " in block for block in blocks("python"))


@pytest.mark.exports
@pytest.mark.parametrize("command", commands())
def test_command(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for block in blocks("python"):
        (tmp_path / re.match(r"# (\w+\.py)", block)[1]).write_text(block)
    (tmp_path / "ETTm2.csv").write_text("date,a,OT\n" + "".join(f"now,{i % 7},{i % 11}\n" for i in range(400)))
    for mark, package in OPTIONAL.items():
        if mark in command:
            pytest.importorskip(package)
    if made := re.search(r"--env (\S+) --dataset (\S+)", command):
        few = ["--policies", "random", "--steps", "300"]
        monkeypatch.setattr(sys, "argv", ["", "--env", made[1], "--out", made[2], *few])
        offline.main()
    _, script, *flags = shlex.split(command)
    stem = Path(script.replace("my_idea", "sac_kian")).stem
    assert stem in WHOLE, f"a page names a new script: put {stem} and flags for a short run into WHOLE"
    module, few = importlib.import_module(f"algos.{stem}"), WHOLE[stem]

    def read(words: list[str]):
        return runtime.cli(module.Args, stem, words)
    run = tmp_path / "RUN"
    if any(word.startswith("runs/") or word == "RUN" or word.endswith(":RUN") or ":RUN," in word for word in flags):
        if ":RUN" not in command and "--init-from" not in command:  # nothing reads its policy
            monkeypatch.setattr(runtime.policy, "save_policy", lambda *args: False)
        module.main(read([*few, "--run-dir", str(run), "--checkpoint-every", "200"]))
    monkeypatch.setattr(runtime.policy, "save_policy", lambda *args: False)
    flags = [str(run) if word.startswith("runs/") else word for word in flags]
    if "--resume" in flags:  # test_contract.py cuts and resumes
        assert read(flags).resume
    elif "--evaluate" in flags:
        module.main(read([*flags, "--eval-episodes", "2"]))
    else:
        module.main(read([*flags, *few, "--run-dir", str(tmp_path / "new")]))


def test_a_page_can_be_read_in_five_minutes():
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        assert page.read_text().count("\n") <= (120 if page.name == "README.md" else 200), page


def test_links_lead_somewhere():
    for page in [*pages(), ROOT / "CONTRIBUTING.md"]:
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)", page.read_text()):
            file = (page.parent / target).resolve() if target else page
            assert file.exists(), f"{page}: {target}"
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.M) if anchor else []
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert not anchor or anchor in slugs, f"{page}: {target}#{anchor}"


def test_the_tree_names_every_script_and_its_size():
    scripts = sorted(path.stem for path in (ROOT / "algos").glob("*.py") if path.stem != "__init__")
    assert sorted(name for name, _ in ROW.findall(TREE.read_text())) == scripts
    assert TREE.read_text() == counted(TREE.read_text()), "python tests/test_readme.py rewrites the counts"


def counted(text: str) -> str:
    """The page with the counts as they are."""
    text = ROW.sub(lambda row: row[0].replace(f"| {row[2]} |", f"| {lines(row[1])} |"), text)
    return EDGE.sub(lambda edge: edge[0].replace(f"| {edge[3]} |", f"| {hunks(edge[1], edge[2])} |"), text)


if __name__ == "__main__":
    TREE.write_text(counted(TREE.read_text()))
