"""The form of the scripts: what a reader can hold in the head, who imports whom, what a derived script changes.

A twin block starts with `# twin: <name>` and ends with `# twin end`, and is equal to the letter wherever it stands.
`make twins FROM=algos/stream_ac.py` rewrites all copies of that script's blocks.
"""
import ast
import difflib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {path.stem: path for path in sorted((ROOT / "algos").glob("*.py"))}

# what a child changes of its parent's functions and classes, Args and main aside; it may add others. Who is whose child
# says algos/README.md, by its diff commands
CHANGED = {
    "a2c": {"Agent", "Batch", "Output", "collect"},
    "acer": {"Agent", "Batch", "Output", "collect", "update"},
    "acktr": {"Agent", "a2c_loss", "update"},
    "bk_code": {"Agent", "collect"},
    "bk_goal": set(),
    "bk_pref": set(),
    "camel": {"actor_loss", "critic_inputs", "make_buffer", "update"},
    "ccm": {"critic_loss", "make_agent", "make_player", "make_row", "make_windows", "update", "with_context"},
    "cma_es": {"ask", "check", "make_agent", "update"},
    "ddpg": {"actor_loss", "critic_loss", "decide", "make_agent", "update"},
    "lesr": set(),
    "ppo_a2t": {"Agent", "Output", "ppo_loss"},
    "ppo_bc": {"Agent", "ppo_loss"},
    "ppo_continuous": {"Agent", "Batch", "Output", "collect", "linear", "ppo_loss"},
    "ppo_kian": {"Agent", "Output", "ppo_loss"},
    "ppo_kogun": {"Agent"},
    "ppo_mask": {"Agent", "Output"},
    "ppo_pixels": {"Agent", "PixelEncoder"},
    "ppo_rnd": {"Agent", "Batch", "Output", "collect", "ppo_loss"},
    "sac_bc": {"actor_loss", "update"},
    "sac_demos": set(),
    "sac_handover": {"Decision", "actor_loss", "decide", "make_agent", "update"},
    "sac_kian": {"Decision", "actor_loss", "critic_inputs", "decide", "draw_noise", "make_agent", "update"},
    "sac_kogun": {"actor_loss", "critic_inputs", "decide", "make_agent"},
    "sac_shaping": set(),
    "saccm": {"draw_trajectories"},
    "satesac": {"critic_loss", "make_agent", "make_player", "make_row", "make_windows", "update", "with_context"},
    "stream_q": {"choose", "make_agent", "policy", "step", "td_error", "update"},
    "stream_td": {"make_agent", "step", "update"},
    "td3": {"actor_loss", "critic_loss", "make_agent", "update"},
    "tesac": {"critic_loss", "make_agent", "update"},
    "trpo": {"Agent", "Batch", "Output", "collect", "update"},
}
PARENT = {child: parent for parent, child in re.findall(r"`diff -u algos/(\w+)\.py algos/(\w+)\.py`",
                                                        (ROOT / "algos" / "README.md").read_text())}
HUNKS = 25  # a diff between parent and child has fewer

# who may import what of ours; benchmarks time functions of all others, tests may import anything
ARROWS = {"algos": {"runtime", "envs", "knowledge", "llm", "buffers", "networks", "streamnet", "errors", "start"},
          "envs": {"envs", "pt2", "env_id", "errors"}, "knowledge": {"knowledge", "llm", "pt2", "env_id", "errors"},
          "llm": {"llm", "env_id", "errors"},
          "runtime": {"runtime", "env_id", "errors"}, "streamnet": {"errors"}, "buffers": set(), "networks": set(),
          "pt2": set(), "env_id": set(), "errors": set(), "start": set()}
OURS = {*ARROWS, "benchmarks", "tests"}
RUN = ["env", "seed", "total_timesteps", "num_envs", "eval_every", "eval_episodes", "checkpoint_every", "video",
       "device", "compile", "run_dir", "resume", "evaluate", "track"]  # arguments of every script, in this order
UNPLAYED = {"num_envs", "eval_episodes"}  # which a script without episodes does not have
ALIKE = {"run_dir", "resume", "evaluate", "track"}  # equal to the letter
ENDING = '''

if __name__ == "__main__":
    with runtime.exit_codes(ALGO):
        main(runtime.cli(Args, ALGO))
'''
BLOCK = re.compile(r"^( *)# twin: (?P<name>[^\n]+)\n(?P<body>.*?)^\1# twin end$", re.M | re.S)
FIELD = re.compile(r"^    (\w+): .*$", re.M)


def definitions(path: Path) -> dict[str, str]:
    """{name: source} of the functions and classes of a file, comments included, in its order."""
    text = path.read_text()
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found[node.name] = "\n".join(text.splitlines()[first - 1:node.end_lineno])
    return found


def shared(name: str, body: str) -> str:
    """What of a twin block is equal in all scripts: of the run arguments, those that are runtime's alone."""
    if name != "run arguments":
        return body
    return "\n".join(field[0] for field in FIELD.finditer(body) if field[1] in ALIKE)


def drift(texts: dict[str, str]) -> str:
    """Differences between copies of one twin block, as a diff; empty where there are none."""
    first, out = {}, []
    for file, text in sorted(texts.items()):
        for match in BLOCK.finditer(text):
            body = shared(match["name"], match["body"])
            source, expected = first.setdefault(match["name"], (file, body))
            out += difflib.unified_diff(expected.splitlines(), body.splitlines(), f"{source}: {match['name']}",
                                        f"{file}: {match['name']}", lineterm="")
    return "\n".join(out)


def rewritten(text: str, source: str) -> str:
    """`text` with the twin blocks of `source`."""
    blocks = {match["name"]: match["body"] for match in BLOCK.finditer(source)}

    def one(match: re.Match) -> str:
        body = blocks.get(match["name"], match["body"])
        if match["name"] == "run arguments":
            theirs = {field[1]: field[0] for field in FIELD.finditer(body) if field[1] in ALIKE}
            body = FIELD.sub(lambda field: theirs.get(field[1], field[0]), match["body"])
        return match[0].replace(match["body"], body)
    return BLOCK.sub(one, text)


def texts() -> dict[str, str]:
    return {path.name: path.read_text() for path in SCRIPTS.values()}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_read_in_one_go(name):
    text = SCRIPTS[name].read_text()
    assert text.count("\n") <= 400 and text.endswith(ENDING)
    main = definitions(SCRIPTS[name])["main"]
    assert main[main.index("def main("):].count("\n") + 1 <= 90
    assert "sys.argv" not in text and text.index("\nimport start ") < text.index("\nimport numpy ")
    doc = ast.get_docstring(ast.parse(text))
    assert doc and f"python algos/{name}.py" in doc
    fields = [field[1] for field in FIELD.finditer(definitions(SCRIPTS[name])["Args"])]
    ours = [field for field in RUN if field in fields]
    assert fields[:len(ours)] == ours and set(RUN) - set(ours) in (set(), UNPLAYED) and len(fields) - len(ours) <= 20


@pytest.mark.parametrize("name", sorted({*CHANGED, *PARENT}))
def test_a_derived_script_is_a_diff_of_its_parent(name):
    old, new = SCRIPTS[PARENT[name]], SCRIPTS[name]
    diff = subprocess.run(["diff", "-u", old, new], capture_output=True, text=True).stdout
    assert 0 < len(re.findall("^@@", diff, re.M)) < HUNKS
    theirs, ours = definitions(old), definitions(new)
    both = [word for word in ours if word in theirs]
    assert both == [word for word in theirs if word in ours], "in another order"
    assert {word for word in both if ours[word] != theirs[word]} - {"Args", "main"} == CHANGED[name]


def test_twins_are_equal():
    assert drift(texts()) == ""
    for file, text in texts().items():
        assert text.count("# twin: ") == len(BLOCK.findall(text)), f"{file} has a twin block without its end"


def test_drift_is_seen_and_mended():
    block = "# twin: x\na = 1\n# twin end\n"
    assert drift({"a": block, "b": "import os\n" + block}) == ""
    other = block.replace("1", "2")
    assert "+a = 2" in drift({"a": block, "b": other}) and rewritten(other, block) == block
    run = '    # twin: run arguments\n    env: str = "A"  # id\n    track: bool = False  # mirror\n    # twin end\n'
    other = run.replace('"A"  # id', '"B"  # file')
    assert drift({"a": run, "b": other}) == "" and rewritten(other, run) == other
    worse = other.replace("mirror", "copy")
    assert "+    track: bool = False  # copy" in drift({"a": run, "b": worse}) and rewritten(worse, run) == other


def our_files() -> list[str]:
    paths = [path for room in ARROWS for path in [*(ROOT / room).rglob("*.py"), *ROOT.glob(f"{room}.py")]]
    return sorted(path.relative_to(ROOT).as_posix() for path in paths)


@pytest.mark.parametrize("file", our_files())
def test_arrows(file):
    imported = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} uses a relative import"
            imported.add(node.module.split(".")[0])
    allowed = ARROWS[file.split("/")[0].removesuffix(".py")]
    assert imported & OURS <= allowed, f"{file} must not import {imported & OURS - allowed}"


if __name__ == "__main__":
    if len(sys.argv) != 2 or Path(sys.argv[1]).stem not in SCRIPTS:
        sys.exit(f"name the script whose blocks the others get: make twins FROM=algos/<one of {', '.join(SCRIPTS)}>.py")
    source = SCRIPTS[Path(sys.argv[1]).stem].read_text()
    for path in SCRIPTS.values():
        if (new := rewritten(path.read_text(), source)) != path.read_text():
            path.write_text(new)
            print(f"rewrote {path.relative_to(ROOT)}")
