"""Blocks that stand in several scripts are letter-for-letter equal; imports run one way only.

A twin block starts with `# twin: <name>` and ends with `# twin end`. `make twins FROM=algos/sac_kian.py` rewrites all
copies of that script's blocks.
"""
import ast
import difflib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^( *)# twin: (?P<name>[^\n]+)\n(?P<body>.*?)^\1# twin end$", re.M | re.S)
# who may import what of ours; tests may import anything
ARROWS = {"algos": {"envs", "knowledge", "llm", "runtime"}, "envs": {"envs"}, "knowledge": {"knowledge", "llm"},
          "llm": {"llm"}, "benchmarks": {"benchmarks"}, "runtime": set()}
OURS = set(ARROWS) | {"tests"}
LINES = {"ppo_kian": 450, "sac_kian": 550, "stream_ac": 450, "stream_q": 450, "stream_td": 450}  # at most
# speed.py times functions of the scripts inside one process, stream_autograd.py is what it compares some with,
# doctor.py tries the environments, rules.py plays them; all else runs commands
EXCEPTIONS = {"benchmarks/speed.py": {"algos", "benchmarks", "envs", "knowledge", "runtime"},
              "benchmarks/stream_autograd.py": {"algos"}, "benchmarks/doctor.py": {"envs"},
              "benchmarks/rules.py": {"envs", "knowledge"}}


def blocks(texts: dict[str, str]) -> dict[str, list[tuple[str, str]]]:
    """{block name: [(file, body)]} of all twin blocks, files in order."""
    found = {}
    for file in sorted(texts):
        for match in BLOCK.finditer(texts[file]):
            found.setdefault(match["name"], []).append((file, match["body"]))
    return found


def drift(texts: dict[str, str]) -> str:
    """Differences between copies of one block, as a diff; empty when there are none."""
    out = []
    for name, copies in blocks(texts).items():
        (first, body), *others = copies
        for file, other in others:
            if other != body:
                out += difflib.unified_diff(body.splitlines(), other.splitlines(), f"{first}: {name}",
                                            f"{file}: {name}", lineterm="")
    return "\n".join(out)


def scripts() -> dict[str, str]:
    return {str(p.relative_to(ROOT)): p.read_text() for p in (ROOT / "algos").glob("*.py")}


def test_twins_are_equal():
    assert drift(scripts()) == ""


def test_every_twin_block_is_closed():
    for file, text in scripts().items():
        opened = len(re.findall(r"# twin: ", text))
        assert opened == len(BLOCK.findall(text)), f"{file} has a twin block without its end"


def test_drift_is_seen():
    block = "# twin: x\na = 1\n# twin end\n"
    assert drift({"a.py": block, "b.py": "import os\n" + block}) == ""
    assert "+a = 2" in drift({"a.py": block, "b.py": block.replace("1", "2")})


@pytest.mark.parametrize("file", sorted(p.relative_to(ROOT).as_posix() for room in ARROWS for p in
                                        [*(ROOT / room).rglob("*.py"), *ROOT.glob(f"{room}.py")]))
def test_arrows(file):
    room = file.split("/")[0].removesuffix(".py")
    allowed = EXCEPTIONS.get(file, ARROWS[room])
    imported = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} uses a relative import"
            imported.add(node.module.split(".")[0])
    assert imported & OURS <= allowed, f"{file} must not import {imported & OURS - allowed}"


def test_scripts_can_be_read_in_one_go():
    for name, most in LINES.items():
        assert scripts()[f"algos/{name}.py"].count("\n") <= most


if __name__ == "__main__":
    texts = scripts()
    if len(sys.argv) != 2 or sys.argv[1] not in texts:
        sys.exit(f"name the script whose blocks the others get: make twins FROM=<one of {', '.join(sorted(texts))}>")
    source = {name: copies[0][1] for name, copies in blocks({sys.argv[1]: texts[sys.argv[1]]}).items()}
    for file, text in texts.items():
        new = BLOCK.sub(lambda m: m[0].replace(m["body"], source.get(m["name"], m["body"])), text)
        if new != text:
            (ROOT / file).write_text(new)
            print(f"rewrote {file}")
