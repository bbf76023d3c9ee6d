# Two commands, each enough by itself on a fresh machine: make train, make test.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
SUITE ?= quick
WORKERS ?= 1
ALGO ?=
# not from the shell, where a variable of this name may mean something else
ENV :=
TRIALS ?= 20

.PHONY: help train test setup gl twins speed bench report tune llm doctor clean

help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

setup: $(VENV)/.installed  ## virtual environment with the pinned packages

$(VENV)/.tests-installed: requirements-test.txt requirements-envs.txt requirements-sami.txt $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-test.txt
	touch $@

$(VENV)/.installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

train: setup  ## SAC-KIAN on FetchPickAndPlace; ARGS="--total-timesteps 20000" adds flags
	$(BIN)/python algos/sac_kian.py --env FetchPickAndPlace-v2 $(ARGS)

gl:  ## rendering without a display, and a browser for the report's test (Debian, Ubuntu; needs root, else skipped)
	@{ ldconfig -p 2>/dev/null | grep -q libEGL.so && command -v chromium >/dev/null; } || \
	  { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && \
	    apt-get install -y -qq --no-install-recommends libegl1 libgl1 libosmesa6 chromium >/dev/null; } || \
	  echo "tests that film or open a browser are skipped: apt-get install libegl1 libgl1 libosmesa6 chromium"

test: $(VENV)/.tests-installed gl  ## the tests, two files at a time: 5 minutes on two cores; CI=1 runs the slow ones too: 7
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

twins: setup  ## rewrite the twin blocks of all scripts from those of one: FROM=algos/stream_ac.py
	$(BIN)/python tests/test_form.py $(FROM)

speed: setup  ## updates/s and steps/s: ALGO=sac, td3, ppo beside stable-baselines3; stream, bk beside plain code
	$(BIN)/python benchmarks/speed.py $(or $(ALGO),sac) $(ARGS)

bench: setup  ## main results beside committed ones: 100 minutes, an hour with WORKERS=2; SUITE=cpu|bk|..., ALGO=, ENV=
	$(BIN)/python benchmarks/run.py --suite $(SUITE) --workers $(WORKERS) $(if $(ALGO),--algo $(ALGO)) \
	  $(if $(ENV),--env $(ENV)) $(ARGS)

report: setup  ## tables and figures in docs/ and README, and report.html, from benchmarks/results/
	$(BIN)/python benchmarks/report.py
	$(BIN)/python benchmarks/forms.py

tune: setup  ## search hyper-parameters: ALGO=sac_kian ENV=FetchPush-v2 TRIALS=20
	$(BIN)/python -m pip install --quiet --disable-pip-version-check optuna==5.0.0
	$(BIN)/python benchmarks/tune.py --algo $(or $(ALGO),sac_kian) $(if $(ENV),--env $(ENV)) --trials $(TRIALS) $(ARGS)

llm: setup  ## serve a small language model on 127.0.0.1, to try the commands of llm/; ARGS="--port 8080"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-llm.txt
	$(BIN)/python -m llm.serve $(ARGS)

doctor: setup  ## check this machine and say what to fix
	$(BIN)/python benchmarks/doctor.py

clean:  ## remove the virtual environment and caches, keep runs/
	rm -rf $(VENV) .pytest_cache .hypothesis $$(find . -name __pycache__ -not -path './runs/*')
