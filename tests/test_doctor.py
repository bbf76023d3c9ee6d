"""make doctor: fine where the tests run, and clear about what is not."""
import shutil
import sys

import pytest

import envs
from benchmarks import doctor


def test_this_machine_can_train(capsys):
    assert doctor.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(doctor.REQUIRED | doctor.OPTIONAL) and not any(line.startswith("BROKEN") for line in lines)


def test_what_is_broken_is_named(tmp_path, monkeypatch, capsys):
    """Another numpy than the pinned one is broken, no compiler is a warning. Packages of other systems are not asked
    for."""
    here, elsewhere = (f'{name}==3.0; sys_platform == "{system}"  # why\n'
                       for name, system in (("not-here", sys.platform), ("elsewhere", "amiga")))
    (tmp_path / "requirements.txt").write_text(f"numpy==1.0.0\n{elsewhere}no-such-package==2.0\n{here}")
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(doctor, "OPTIONAL", {"compiler": doctor.compiler})
    assert doctor.main() == 1
    out = capsys.readouterr().out
    assert "BROKEN  packages" in out and "not 1.0.0; no-such-package is missing" in out and "make clean setup" in out
    assert "not-here is missing" in out and "elsewhere" not in out
    assert "warning compiler         no C++ compiler" in out


@pytest.mark.parametrize("chosen", ["", "egl"])
def test_no_renderer_is_a_warning_with_its_remedy(monkeypatch, capsys, chosen):
    """As on a machine without GL: training works, and what to install, or to unset, is said."""
    monkeypatch.setenv("MUJOCO_GL", chosen)
    monkeypatch.setattr(envs, "find_renderer", lambda: None)
    monkeypatch.setattr(doctor, "REQUIRED", {})
    monkeypatch.setattr(doctor, "OPTIONAL", {"rendering": doctor.rendering})
    assert doctor.main() == 0
    out = capsys.readouterr().out
    assert out.startswith("warning rendering") and "apt-get install libegl1" in out
    assert ("unset MUJOCO_GL, which is egl" in out) == bool(chosen)
