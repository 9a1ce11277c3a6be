# Needs Python 3.11 or newer, git and make, and nothing else. `make help` lists the targets, README.md explains them.

VENV      ?= .venv
PYTHON    ?= python3.13 python3.12 python3.11 python3.14 python3
MODE      ?= quick
NOTEBOOKS ?=
ARGS      ?=

venv  := $(patsubst %/,%,$(VENV))
py    := $(venv)/bin/python
stamp := $(venv)/.fa-installed
half  := $(venv).installing
made  := $(filter own lock,$(shell cat '$(stamp)' 2>/dev/null))
TORCH ?= $(made)

# A process for each processor, up to four, for each holds torch; one thread in each.
pytest = OMP_NUM_THREADS=1 $(py) -m pytest -n logical --maxprocesses 4

oldest := $(venv)-oldest
newest := $(venv)-newest

pages  = $(if $(NOTEBOOKS),$(foreach n,$(NOTEBOOKS),$(wildcard notebooks/$(n)*.ipynb)),$(wildcard notebooks/*.ipynb))

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help env test test-all test-slow test-oldest test-newest test-cluster test-browser harness mutants lint site reproduce refresh lab clean always

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile
	@echo
	@echo "  MODE=$(MODE)              quick, record, small or paper: what reproduce does"
	@echo "  NOTEBOOKS='32_… 33_…'   the notebooks reproduce runs; empty: all"
	@echo "  ARGS='-k pfa'           more arguments for pytest, JupyterLab or fa reproduce"
	@echo "  VENV=$(VENV)              the environment that is made and used"
	@echo "  PYTHON=python3.12       the Python it is made with; else the first of several that is new enough"
	@echo "  TORCH=own               keep the torch and torchvision that VENV holds already, and fetch no CUDA wheel"

env: $(stamp)  ## make the environment, as requirements.lock pins it
	@$(py) -c "$$check"

test: $(stamp)  ## units, properties and notebooks
	$(pytest) -m "not slow and not browser" $(ARGS)

test-all: test-slow harness mutants test-oldest test-newest test-cluster test-browser  ## everything: each of its parts can be run alone
	$(py) -m fa reproduce --mode quick

test-slow: $(stamp)  ## units, properties and notebooks, the slow ones too
	$(pytest) $(ARGS)

# Newest Python: make test VENV=.venv-newest PYTHON=python3.14
test-oldest: $(stamp)  ## as test, with the oldest packages that pyproject.toml allows, in an environment of their own
	@[ -x '$(oldest)/bin/python' ] || $(py) -m venv '$(oldest)'
	@$(py) -c "$$lowest" | $(oldest)/bin/python -m pip install --quiet -r /dev/stdin
	@$(oldest)/bin/python -m pip install --no-deps --no-build-isolation --quiet -e .
	$(subst $(py),$(oldest)/bin/python,$(pytest)) -m "not slow and not browser" $(ARGS)

test-newest: $(stamp)  ## as test, with the newest packages that pip finds, in an environment of their own
	@[ -x '$(newest)/bin/python' ] || $(py) -m venv '$(newest)'
	@$(newest)/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager -e '.[notebooks,dev]'
	@$(newest)/bin/python -c "$$check"
	$(subst $(py),$(newest)/bin/python,$(pytest)) -m "not slow and not browser" $(ARGS)

test-cluster: $(stamp)  ## kills workers of a Dask cluster, and a search on PostgreSQL; the extra cluster is installed when it is not there
	@$(py) -c 'import distributed, submitit, optuna, psycopg' 2>/dev/null || $(py) -m pip install --quiet -e '.[cluster]'
	$(py) -m pytest tests/test_cluster.py tests/test_tuning.py $(ARGS)
	$(py) tests/cluster_harness.py

test-browser: $(stamp)  ## JupyterLab and the site in a Chromium; its driver is installed when it is not there
	@$(py) -c 'import playwright, furo' 2>/dev/null || $(py) -m pip install --quiet -e '.[browser,docs]'
	$(py) -m pytest -m browser tests/test_browser.py $(ARGS)

harness: $(stamp)  ## kills campaigns at every write and at random moments, and fills their disk
	$(py) tests/harness.py $(ARGS)

mutants: $(stamp)  ## wrong lines, one at a time: do the tests notice each?
	$(py) tests/mutants.py $(ARGS)

reproduce: $(stamp)  ## train and draw the notebooks (MODE, NOTEBOOKS); says where figures and report are
	$(py) -m fa reproduce --mode $(MODE) $(NOTEBOOKS) $(ARGS)

lint: $(stamp)  ## ruff and mypy, installed when they are not there
	@$(py) -m ruff --version >/dev/null 2>&1 && $(py) -m mypy --version >/dev/null || $(py) -m pip install --quiet -e '.[lint]'
	$(py) -m ruff check
	$(py) -m ruff format --check
	$(py) -m mypy

site: $(stamp)  ## the site, in build/site; Sphinx is installed when it is not there
	@$(py) -c 'import furo, myst_nb, sphinx_copybutton; __import__("sphinx-mathjax-offline")' 2>/dev/null || $(py) -m pip install --quiet -e '.[docs]'
	$(py) -m sphinx -qW --keep-going -c docs -d build/doctrees . build/site
	@echo "fa: build/site/index.html"

refresh: $(stamp)  ## for those who commit: run the notebooks (NOTEBOOKS) in place in record mode, and strip them
	$(py) -m nbconvert --execute --inplace --coalesce-streams $(pages)
	$(py) -m nbstripout --keep-count --keep-id --extra-keys metadata.language_info.version $(pages)

lab: $(stamp)  ## JupyterLab in the environment
	$(py) -m jupyterlab --LabApp.default_url=/lab/tree/notebooks/00_index.ipynb \
	    --FileContentsManager.pre_save_hook=fa.results.contents.before_saving $(ARGS)

clean:  ## remove build/, and nothing else
	rm -rf build

# The stamp is written last. An environment that was made here and cut short ($(half) is still there) is made anew, for pip
# takes a package that is half there for a whole one; any other gets the pinned packages, except torch if TORCH=own.
$(stamp): requirements.lock pyproject.toml
	@set -e; fail() { echo "fa: $$1" >&2; exit 1; }; without='^$$'; \
	case '$(TORCH)' in ''|lock) ;; own) without='^(torch|torchvision|triton|(nvidia|cuda)-[a-z0-9-]+)=='; \
	        '$(py)' -c 'import torch, torchvision' 2>/dev/null || fail "TORCH=own keeps the torch and torchvision of $(venv), but they cannot be imported there.";; \
	    *) fail "TORCH=$(TORCH) is not known; TORCH=own keeps the torch that $(venv) holds already.";; esac; \
	if [ -e '$(half)' ] || ! '$(py)' -m pip --version >/dev/null 2>&1; then \
	    [ ! -e '$(venv)' ] || [ -e '$(venv)/pyvenv.cfg' ] || rmdir '$(venv)' 2>/dev/null || \
	        fail "$(venv) is there and is not a Python environment; remove it or set VENV=."; \
	    for p in $(PYTHON) ''; do [ -z "$$p" ] || "$$p" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && break; done; \
	    [ "$$p" ] || fail "no Python 3.11 or newer with venv and pip among: $(PYTHON). Install one, or set PYTHON=."; \
	    echo "fa: making $(venv) with `"$$p" --version`; torch and CUDA are a large download the first time"; \
	    : > '$(half)'; "$$p" -m venv --clear '$(venv)'; \
	fi; \
	grep -Ev "$$without" requirements.lock | '$(py)' -m pip install -r /dev/stdin; \
	'$(py)' -m pip install --no-deps --no-build-isolation --quiet -e .; \
	'$(py)' -c "$$check" >/dev/null || fail "torch and torchvision do not import together in $(venv); see the error above."; \
	echo '$(or $(TORCH),lock)' > '$(stamp)'; rm -f '$(half)'

ifneq ($(TORCH),$(made))
$(stamp): always
endif

define check
import sys, torch, torchvision
torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
print(f"fa: {sys.prefix}: Python {sys.version.split()[0]}, torch {torch.__version__}, torchvision {torchvision.__version__}")
endef
export check

define lowest
import re, tomllib
about = tomllib.load(open("pyproject.toml", "rb"))["project"]
extras = about["optional-dependencies"]
for requirement in [*about["dependencies"], *extras["notebooks"], *extras["dev"]]:
    print(re.sub(r">=([\d.]+).*", r"==\1", requirement))
endef
export lowest
