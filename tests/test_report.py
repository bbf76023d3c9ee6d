"""make report: pages say what the CSVs say, and report.html works in a browser without server or network."""
import csv
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks import curves, report

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]


def test_pages_say_what_the_results_say(tmp_path, monkeypatch):
    """`make report` on a copy changes no page: whoever adds curves and forgets it is reminded here."""
    for name in ("docs", "benchmarks", "algos"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "README.md", tmp_path)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    report.main(tmp_path / "report.html")
    for page in ["README.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]:
        assert (tmp_path / page).read_text() == (ROOT / page).read_text(), f"{page} is out of date: make report"


def test_summary_of_hand_made_curves(tmp_path):
    rows = [("kian", 1, 0, 0, 0.1), ("kian", 1, 20_000, 60, 0.9), ("kian", 1, 50_000, 150, 1.0),
            ("kian", 2, 0, 0, 0.0), ("kian", 2, 20_000, 60, 0.5), ("kian", 2, 50_000, 150, 0.9),
            ("plain", 1, 0, 0, 0.0), ("plain", 1, 20_000, 40, 0.2)]
    with (tmp_path / "x.csv").open("w") as file:
        writer = csv.writer(file)
        writer.writerow(["variant", "seed", "step", "wall_s", "success_rate", "return_mean", "commit"])
        writer.writerows((*row, 0, "abc") for row in rows)
    head, (kian, plain) = report.summarise(curves.load_curves(tmp_path / "x.csv"))
    assert head[4:6] == ["success at 20k", "success at 50k"]
    assert kian == ["kian", "2", "35k (20k, 50k)", "1.8", "0.70", "0.95", "0.95", "0.90", "50k", "abc"]
    assert plain == ["plain", "1", "not reached (not reached)", "not reached", "0.20", "", "0.20", "0.20", "20k", "abc"]


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium: apt-get install chromium")
def test_page_in_a_browser(tmp_path):
    """The script inside draws every curve, gives hover values, and the address filters by environment."""
    results = {"sac_kian": {p.stem: curves.load_curves(p) for p in sorted((curves.RESULTS / "sac_kian").glob("*.csv"))}}
    (tmp_path / "report.html").write_text(report.page(results))

    def dom(fragment: str = "") -> str:
        done = subprocess.run([CHROMIUM, *QUIET, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom",
                               f"file://{tmp_path / 'report.html'}{fragment}"], capture_output=True, text=True,
                              timeout=120)
        return done.stdout

    everything, push = dom(), dom("#env=FetchPush-v2")
    environments = results["sac_kian"]
    assert everything.count("<section") == len(environments)
    assert 'hidden=""' not in everything.split("<main")[1].split("</main")[0]
    for env, variants in environments.items():
        section = everything.split(f'data-env="{env}"')[1].split("</section>")[0]
        assert section.count("<circle") == sum(len(report.band(c)[0]) for c in variants.values())
        name, (first, *_) = next(iter(variants.items()))
        assert f"{name}\n{first.steps[0]} steps" in section  # what pointing there shows
    shown = [part.split(">")[0] for part in push.split("<section")[1:]]
    assert [s for s in shown if "hidden" not in s] == [s for s in shown if 'data-env="FetchPush-v2"' in s] != []
