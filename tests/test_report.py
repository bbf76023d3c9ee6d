"""make report: pages say what the CSVs say, and report.html works in a browser without server or network."""
import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import curves, forms, report

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]


def test_pages_say_what_the_results_say(tmp_path, monkeypatch):
    """`make report` on a copy changes no page: whoever adds curves and forgets it is reminded here."""
    for name in ("docs", "benchmarks", "algos"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*_curves.svg"))
    shutil.copy(ROOT / "README.md", tmp_path)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    report.main(tmp_path / "report.html")
    for page in ["README.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]:
        assert (tmp_path / page).read_text() == (ROOT / page).read_text(), f"{page} is out of date: make report"
    drawn, committed = ({figure.name for figure in (root / "docs" / "figures").glob("*_curves.svg")}
                        for root in (tmp_path, ROOT))
    assert drawn == committed, "make report"


def test_a_page_that_cannot_be_written_is_one_line_before_all_is_drawn(tmp_path):
    (tmp_path / "file").touch()
    done = subprocess.run([sys.executable, "benchmarks/report.py", str(tmp_path / "file" / "report.html")], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("report: ") and done.stderr.count("\n") == 1
    assert not done.stdout


def test_rows_beside_a_method_are_read_by_its_score():
    """bk_pref has no entry of its own in paper.toml; in the tables of bk_code success counts."""
    door = "MiniGrid-DoorKey-8x8-v0"
    beside = report.all_results()["bk_code"][door]
    for algo in ("bk_code", "bk_pref", "ppo_rnd"):
        alone = curves.load_curves(curves.file_of(algo, door), "success_rate")
        assert alone and all(beside[name] == variant for name, variant in alone.items())


def test_the_figure_of_forms_finds_its_curves():
    """A form whose variant has another name in the results would be drawn as "not run"."""
    env, budget, score, nothing, names = forms.TASKS[0]
    curves_of = forms.all_curves(env, score)
    for name in (nothing, *(name.format(forms.KNOWLEDGE[env] + ending) for name in names.values()
                            for ending in forms.QUALITIES.values())):
        assert len(forms.scores(curves_of, name, budget)) == 3, name


def test_runs_are_gathered_by_what_they_differ_in(tmp_path, monkeypatch, capsys):
    """Variants are named by script, knowledge and changed flags; a run replaces its rows, but no longer one's; a cut
    one is said to be cut."""
    shutil.copytree(ROOT / "algos", tmp_path / "algos")
    monkeypatch.setattr(curves, "RESULTS", tmp_path / "benchmarks" / "results")
    usual = curves.defaults("sac_kian") | {"env": "FetchPush-v2", "total_timesteps": 1000}
    for k, changed in enumerate([{}, {"knowledge": "none"}, {"knowledge": "fetch.official", "seed": 2},
                                 {"gamma": 0.9, "eval_every": 7, "gone": 5}]):
        run = tmp_path / f"run{k}" / "MinAtar"  # runs may lie deeper
        run.mkdir(parents=True)
        config = {"algo": "sac_kian", "args": usual | changed, "commit": "c", "cpu": "x"}
        config |= {"resumed": [{"step": 0, "commit": "b"}, {"step": 400, "commit": "d"}]} if k == 1 else {}
        (run / "config.json").write_text(json.dumps(config))
        (run / "eval.csv").write_text("step,wall_s,episodes,return_mean,return_std,success_rate,length_mean\n"
                                      f"0,1,8,-50,0,0.1,50\n{1000 - k},2,8,-5,0,0.{k},50\n")
    folders = [str(tmp_path / f"run{k}") for k in (0, 1, 2, 3, 0, 4)]
    with pytest.raises(ValueError, match=f"{folders[-1]} holds no run"):
        curves.gather(folders)
    with pytest.raises(ValueError, match="--into takes a name in benchmarks/results"):
        curves.gather(folders[:1], "../../elsewhere")
    shutil.copytree(tmp_path / "run0", tmp_path / "smoke" / "run0")
    with pytest.raises(ValueError, match="holds smoke runs"):
        curves.gather([*folders[:1], str(tmp_path / "smoke")])
    shutil.copytree(tmp_path / "run0" / "MinAtar", tmp_path / "foreign")
    for text in ('{"model": "of something else"}', '{"algo": "sac", "args": []}', "[]", "cut"):
        (tmp_path / "foreign" / "config.json").write_text(text)
        with pytest.raises(ValueError, match="foreign/config.json is not that of a run"):
            curves.gather([*folders[:1], str(tmp_path / "foreign")])
    assert not curves.RESULTS.exists()  # nothing was written
    curves.gather(folders[1:2])
    assert "has 999 of 1000 steps; finish it with --resume" in capsys.readouterr().out and not curves.RESULTS.exists()
    curves.gather(folders[:-1], unfinished=True)
    said = capsys.readouterr().out.splitlines()
    assert "unfinished" not in said[0] and said[1].endswith("sac_kian none, seed 1; unfinished, 999 of 1000 steps")
    found = curves.load_curves(curves.RESULTS / "sac_kian" / "FetchPush-v4.csv", "success_rate")
    assert {name: [(c.seed, c.steps, c.scores) for c in seeds] for name, seeds in found.items()} == {
        "sac_kian": [(1, [0, 1000], [0.1, 0.0])], "sac_kian --gamma 0.9 --gone 5": [(1, [0, 997], [0.1, 0.3])],
        "sac_kian fetch.official": [(2, [0, 998], [0.1, 0.2])], "sac_kian none": [(1, [0, 999], [0.1, 0.1])]}
    assert said[-2].endswith("sac_kian, seed 1; replaces a run of c")
    assert said[-1] == "note: rows of sac_kian none in FetchPush-v4.csv differ in commit: c, d"
    assert [seeds[0].cut for seeds in found.values()] == [False, True, True, True]
    assert found["sac_kian"][0].commits == {"c"}
    assert found["sac_kian none"][0].commits == {"c", "d"}  # nothing is left of b's
    (tmp_path / "run1" / "MinAtar" / "eval.csv").write_text("step,wall_s,success_rate\n0,1,0.7\n400,2,0.7\n")
    curves.gather(folders[1:2], unfinished=True)  # a smoke run by the same name
    assert "kept, longer: sac_kian none, seed 1 of FetchPush-v4.csv has 999 steps" in capsys.readouterr().out
    assert curves.load_curves(curves.RESULTS / "sac_kian" / "FetchPush-v4.csv", "success_rate") == found
    script = (tmp_path / "algos" / "sac_kian.py").read_text()  # a flag of a fork
    field = '    init_from: str = ""'
    assert field in script
    (tmp_path / "algos" / "sac_kian.py").write_text(script.replace(field, f"    norm: bool = True  # new\n{field}"))
    for changed, name in (({"knowledge": "none", "norm": False}, "sac_kian none --no-norm"),
                          ({"env": "MobileRobot-v0:pca", "knowledge": "none"}, "sac_kian pca none"),
                          ({"init_from": "a/RUN", "tau": 0.1}, "sac_kian --init-from RUN --tau 0.1")):
        assert curves.variant({"algo": "sac_kian", "args": usual | changed}) == name
    capsys.readouterr()
    curves.gather(folders[:1])
    older = tmp_path / "run0" / "MinAtar"
    assert f"note: {older} is older than norm: named as if by default" in capsys.readouterr().out
    (tmp_path / "algos" / "sac_kian.py").write_text(script.replace("gamma: float = 0.95", "gamma: float = 19 / 20"))
    with pytest.raises(ValueError, match="algos/sac_kian.py: the default of gamma is computed; write it as it is"):
        curves.gather(folders[:1])
    (tmp_path / "algos" / "sac_kian.py").write_text(script)
    (tmp_path / "benchmarks/results/side").mkdir()
    (tmp_path / "benchmarks/results/side/FetchPush-v2.csv").write_text(",".join(curves.COLUMNS) + "\n")
    curves.gather(folders[1:2], into="side", unfinished=True)
    assert curves.file_of("side", "FetchPush-v4").stem == "FetchPush-v2"  # tables show the id that ran, v4
    (tmp_path / "run1/MinAtar/config.json").write_text(json.dumps(config | {"env_id": "FetchPush-v5"}))
    with pytest.raises(ValueError, match="run1/MinAtar ran in FetchPush-v5, and the tables have FetchPush-v4"):
        curves.gather(folders[1:2], into="side", unfinished=True)
    assert list(curves.load_curves(curves.RESULTS / "side" / "FetchPush-v2.csv", "success_rate")) == ["sac_kian none"]


def test_parts_of_the_tasks_are_gathered_apart(tmp_path, monkeypatch):
    """eval-extreme.csv as an environment of its own, beside that of eval.csv, under the same variant."""
    monkeypatch.setattr(curves, "RESULTS", tmp_path / "algos" / "results")
    shutil.copytree(ROOT / "algos", tmp_path / "algos")
    args = curves.defaults("satesac") | {"env": "Walker-dyn-v0", "total_timesteps": 9, "fixed_weight": True}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps({"algo": "satesac", "args": args}))
    for name, value in (("eval", 5), ("eval-extreme", 2)):
        (tmp_path / "run" / f"{name}.csv").write_text("step,wall_s,episodes,return_mean,return_std,success_rate,"
                                                      f"length_mean\n9,1,8,{value},0,nan,50\n")
    curves.gather([str(tmp_path / "run")])
    for env, value in (("Walker-dyn-v0", 5), ("Walker-dyn-v0-extreme", 2)):
        found = curves.load_curves(curves.RESULTS / "satesac" / f"{env}.csv", "return_mean")
        assert {name: [c.scores for c in seeds] for name, seeds in found.items()} == {"satesac --fixed-weight": [[value]]}


def test_online_returns_are_means_of_episodes_and_keep_divergence(tmp_path):
    nan = float("nan")
    logged = [(100, nan), (150, 2.0), (200, 4.0), (250, 6.0), (350, nan), (450, 1.0), (480, nan)]
    lines = ["step,wall_s,name,value", *(f"{step},1,return,{value}" for step, value in logged)]
    (tmp_path / "scalars.csv").write_text("\n".join(lines))
    rows = [{"step": str(step)} for step in (0, 100, 200, 300, 400, 500)]
    curves.add_online_returns(rows, tmp_path / "scalars.csv")
    assert [row["online_return"] for row in rows] == ["", "", "3", "6", "nan", "nan"]  # NaN before any episode: none


def write(path: Path, rows: list[tuple]) -> Path:
    with path.open("w") as file:
        writer = csv.writer(file)
        writer.writerow(["variant", "seed", "step", "wall_s", "success_rate", "return_mean", "commit"])
        writer.writerows((*row, "abc") for row in rows)
    return path


def test_summary_of_hand_made_curves(tmp_path):
    rows = [("kian", 1, 0, 0, 0.1, 0), ("kian", 1, 5000, 15, 0.3, 0), ("kian", 1, 20_000, 60, 0.9, 0),
            ("kian", 1, 50_000, 150, 1.0, 0), ("kian", 2, 0, 0, 0.0, 0), ("kian", 2, 5000, 15, 0.1, 0),
            ("kian", 2, 20_000, 60, 0.5, 0), ("kian", 2, 50_000, 150, 0.9, 0),
            ("plain", 1, 0, 0, 0.0, 0), ("plain", 1, 5000, 10, 0.12, 0), ("plain", 1, 20_000, 40, 0.6, 0)]
    variants = curves.load_curves(write(tmp_path / "x.csv", rows), "success_rate")
    head, (kian, plain) = report.summarise(variants, report.Reading("success_rate", 0.9, "plain"))
    assert head == ["", "seeds", "steps to 0.9, median (range)", "minutes, median", "success at 5k", "success at 20k",
                    "mean up to 20k", "P(above plain)", "last (at step)", "worst seed", "code"]
    assert kian == ["kian", "2", "35k (20k to 50k)", "1.8", "0.20", "0.70", "0.37", "0.50", "0.95 (50k)", "0.90", "abc"]
    assert plain == ["plain", "1", "not reached", "", "0.12", "0.60", "0.28", "", "0.60 (20k)", "0.60", "abc"]
    short = rows + [("peer", 1, 0, 0, 0.0, 0), ("peer", 1, 6000, 99, 0.2, 0)]  # shortens nobody, claims nothing
    _, (_, peer, _) = (same := report.summarise(curves.load_curves(write(tmp_path / "x.csv", short), "success_rate"),
                                                report.Reading("success_rate", 0.9, "plain")))
    assert same[0] == head and same[1][0] == kian
    assert peer == ["peer", "1", "not reached", "", "0.17", "", "", "", "0.20 (6k)", "0.20", "abc"]
    plain, = variants["plain"]
    plain.cut = True
    assert report.summarise(variants, report.Reading())[1][1][1] == "1 (1 unfinished)"
    rows += [("kian --gamma 2.0", 1, 0, 0, 0.1, 0), ("kian --gamma 2.0", 1, 20_000, 9, "nan", "nan")]  # diverged
    _, (_, wild, _) = report.summarise(curves.load_curves(write(tmp_path / "x.csv", rows), "success_rate"),
                                       report.Reading("success_rate", 0.9, "plain"))
    assert wild == ["kian --gamma 2.0", "1", "not reached", "", *["nan"] * 3, "0.00", "nan (20k)", "nan", "abc"]


def test_last_scores_of_seeds_are_compared_at_one_step(tmp_path):
    """Seed 1 of kian goes on and falls; that of plain goes on by less than 1 %, which counts as the same."""
    rows = [("kian", 1, 0, 0, 0.1, 0), ("kian", 1, 10_000, 1, 0.7, 0), ("kian", 1, 30_000, 3, 0.2, 0),
            ("kian", 2, 0, 0, 0.1, 0), ("kian", 2, 5000, 1, 0.1, 0), ("kian", 2, 10_000, 1, 0.5, 0),
            ("plain", 1, 0, 0, 0.0, 0), ("plain", 1, 20_180, 2, 0.9, 0),
            ("plain", 2, 0, 0, 0.0, 0), ("plain", 2, 20_000, 2, 0.6, 0)]
    variants = curves.load_curves(write(tmp_path / "x.csv", rows), "success_rate")
    head, (kian, plain) = report.summarise(variants, report.Reading("success_rate"))
    assert head[-3:] == ["last (at step)", "worst seed", "code"]
    assert kian[-3:-1] == ["0.60 (10k)", "0.50"] and plain[-3:-1] == ["0.75 (20k)", "0.60"]
    cut = [("kian", 3, 0, 0, 0.0, 0), ("kian", 3, 2000, 1, 0.3, 0)]  # too short to decide where the others are read
    with_cut = curves.load_curves(write(tmp_path / "cut.csv", rows + cut), "success_rate")["kian"]
    assert report.last_scores(with_cut) == (pytest.approx([0.7, 0.5, 0.3]), "2k, 10k")
    assert report.last_scores(with_cut[1:]) == ([0.5, 0.3], "2k, 10k") and report.last_scores(with_cut[2:])[1] == "2k"
    head, (kian,) = report.summarise({"kian": variants["kian"]}, report.Reading("success_rate"))
    assert head[2:] == ["success at 10k", "mean up to 10k", "worst seed", "code"] and kian[-2] == "0.50"


def returns(tmp_path: Path, env: str, last: int) -> Path:
    """Six variants of three seeds that have returns and know no success; the k-th variant ends at k - 2 + seed / 10."""
    names = ["a2t", "kian", "kogun", "mix", "plain", "rule"]
    return write(tmp_path / f"{env}.csv", [
        (name, seed, step, step, "nan", (k - 2 + seed / 10) * step / last) for k, name in enumerate(names)
        for seed in (1, 2, 3) for step in (0, last // 2 // 2048 * 2048, last)])


def test_a_method_that_is_judged_by_returns(tmp_path, monkeypatch):
    """Nothing is about success, or about a threshold where there is none; environments with other budgets together."""
    files = [returns(tmp_path, "Maze", 99_000), returns(tmp_path, "Door", 400_000)]
    with pytest.raises(ValueError, match="Maze.csv has no success_rate"):
        curves.load_curves(files[0], "success_rate")
    (tmp_path / "sac").mkdir()
    shutil.copy(files[0], tmp_path / "sac" / "Maze.csv")
    with monkeypatch.context() as patch:  # a method of successes, in a task without
        patch.setattr(curves, "RESULTS", tmp_path)
        assert (report.reading("sac", "Maze").score, report.reading("sac").score) == ("return_mean", "success_rate")
    environments = {path.stem: curves.load_curves(path, "return_mean") for path in files}
    assert report.reading("new", "Maze") == report.Reading("return_mean", None, "", (), False, "none given")
    monkeypatch.setattr(report, "reading", lambda algo, env="": report.Reading(baseline="plain"))
    head, rows = report.summarise(environments["Maze"], report.reading("new", "Maze"))
    assert head == ["", "seeds", "return at 99k", "mean up to 99k", "P(above plain)",
                    "worst seed", "code"]
    assert rows[0][2] == "-1.80 [-2.05, -1.55]" and rows[0][4] == "0.00 [0.00, 0.50]" and rows[4][4] == ""
    head, rows = report.across("new", environments)
    assert head[-1] == "P(above plain)" and [row[1:3] for row in rows] == [["2", "3"]] * 6
    assert [row[-1][:4] for row in rows] == ["0.00"] * 4 + ["", "1.00"] and rows[1][3].startswith("-0.40 [")
    assert report.status("new", environments)[0][2] == "return, last evaluation"
    with pytest.raises(ValueError, match="scores of -1.9 to -1.7 are out of the bounds"):
        report.summarise(environments["Maze"], report.Reading(bounds=(-1, 1)))
    report.draw("new", environments, tmp_path / "new.svg")
    drawn = (tmp_path / "new.svg").read_text()
    assert drawn.count(">return</text>") == 2 and all(f">{name}</text>" in drawn for name in environments["Door"])
    assert len(set(report.paint(environments).values())) == 6


def test_what_does_not_learn_holds_for_the_budget_of_the_others(tmp_path):
    variants = curves.load_curves(returns(tmp_path, "Maze", 99_000), "return_mean")
    name = next(name for name in variants if name != "plain")
    last = [curve.scores[-1] for curve in variants[name]]
    for curve in variants[name]:
        curve.steps, curve.minutes, curve.scores = curve.steps[:1], curve.minutes[:1], curve.scores[-1:]
    report.hold(variants, (name,))
    assert report.shared_budget(variants) == 99_000
    assert [curve.scores for curve in variants[name]] == [[score, score] for score in last]


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium: apt-get install chromium")
def test_page_in_a_browser(tmp_path):
    """The script inside draws every curve, those of runs that diverged aside, pointing gives values, the address
    filters, and nothing is fetched."""
    results = {"sac_kian": {p.stem: curves.load_curves(p, "success_rate") | curves.load_curves(
        curves.RESULTS / "sac_handover" / p.name, "success_rate")
        for p in sorted((curves.RESULTS / "sac").glob("*.csv"))},
               "new": {env: curves.load_curves(returns(tmp_path, env, 99_000), "return_mean")
                       for env in ("Maze", "Door")},
               "stream_ac": {"HalfCheetah-v4": curves.load_curves(curves.RESULTS / "stream_ac" / "HalfCheetah-v4.csv",
                                                                  "online_return")}}
    assert any(c.scores[-1] != c.scores[-1] for seeds in results["stream_ac"]["HalfCheetah-v4"].values() for c in seeds)
    html = report.page(results)
    assert set(re.findall(r"https?://[^\"]*", html)) == {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert all(source.startswith("`data:") for source in re.findall(r"\b(?:src|href)\b\W+?([`'\"].{5})", html))
    point = """<script>document.querySelector("circle").dispatchEvent(new MouseEvent("mouseenter"));
        document.querySelector("[data-box=sac]").click()</script></html>"""
    (tmp_path / "report.html").write_text(html.replace("</html>", point))

    def dom(fragment: str = "") -> str:
        done = subprocess.run([CHROMIUM, *QUIET, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom",
                               f"file://{tmp_path / 'report.html'}{fragment}"], capture_output=True, text=True,
                              timeout=120)
        return done.stdout

    everything, push = dom(), dom("#env=FetchPush-v2")
    assert 'hidden=""' not in everything.split("<main")[1].split("</main")[0]
    for algo, environments in results.items():
        assert everything.count(f'<section data-algo="{algo}"') == len(environments) + (algo == "sac_kian")  # together
        for env, variants in environments.items():
            section = everything.split(f'data-env="{env}"')[1].split("</section>")[0]
            assert section.count("<circle") == sum(
                mean == mean for c in variants.values() for mean in report.band(c, (-9, 9))[1])
            name, (first, *_) = next(iter(variants.items()))
            assert f"{name}\n{first.steps[0]} steps" in section  # what pointing there shows
            assert "NaN" not in section and "undefined" not in section
            for other in variants:  # sac was unticked, in every environment
                shown = section.split(f'<g data-name="{other}"')[1].split(">")[0]
                assert ("display: none" in shown) == (other == "sac")
    tip = everything.split('id="tip"')[1].split("</div>")[0]
    assert "hidden" not in tip and "sac\n0 steps\nsuccess 0." in tip
    shown = [part.split(">")[0] for part in push.split("<section")[1:]]
    assert [s for s in shown if "hidden" not in s] == [s for s in shown if 'data-env="FetchPush-v2"' in s] != []
