# Two commands matter: `make lab` opens the course, `make test` checks it. Every target is a plain command or two;
# README.md lists them for machines without make.

# Which Python builds .venv. Any 3.11 or newer will do: make PYTHON=/path/to/python3 lab
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)

# Which build of torch goes into a new .venv; one that is already there is left alone (`make clean` first to change it).
#   cpu    the CPU build (default)         cuda   the build that fits the driver found on this machine
#   pip    whatever pip picks by itself    cu130  (or another name that uv knows) exactly that build
TORCH ?= cpu

# Further requirements from pyproject.toml. EXTRAS=cuda: kernels for an NVIDIA GPU, and the tests that compile them
# without one (0.6 GB, on Linux and Windows).
EXTRAS ?=

# Passed on to JupyterLab: make lab LAB_FLAGS="--no-browser --ServerApp.port=9999"
LAB_FLAGS ?=

# Two threads that wait by spinning stand in each other's way as soon as anything else runs (measured: a training step
# took more than ten times as long). So they spin briefly and then sleep.
export GOMP_SPINCOUNT ?= 1000

VENV := .venv
LAB := $(VENV)/.lab$(EXTRAS:%=-%)
TEST := $(VENV)/.test$(EXTRAS:%=-%)
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
TORCH_VERSION := $(shell sed -n 's/^torch==//p' constraints.txt)
AS_ROOT := $(if $(filter 0,$(shell id -u)),--allow-root)
START := /lab/tree/notebooks/00_start_here.ipynb
NBVAL := --nbval --nbval-current-env --nbval-cell-timeout=300

.PHONY: help lab test setup notebooks figures checkpoints lint bench clean

help:  ## show this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1|\2/p' Makefile | awk -F'|' '{ printf "%-18s%s\n", $$1, $$2 }'

lab: $(LAB)  ## set up what is missing, then open the course in JupyterLab
	$(PY) -m jupyterlab --ServerApp.ip=127.0.0.1 --ServerApp.root_dir=. --LabApp.default_url=$(START) $(AS_ROOT) $(LAB_FLAGS)

test: $(TEST)  ## every test: the library, the widgets in a browser, the notebooks cell by cell
	env -u MPLBACKEND $(PY) -m pytest -q $(NBVAL) tests notebooks

setup: $(LAB)  ## only set up .venv

notebooks: $(TEST)  ## run every notebook and store it in its canonical form
	$(PY) -m deepseek_lab.notebook run

figures: $(LAB)  ## rebuild the static pictures in figures/
	$(PY) -m deepseek_lab.plots.build

checkpoints: $(LAB)  ## train again the small checkpoints that later notebooks start from
	$(PY) -m deepseek_lab.checkpoints

lint: $(TEST)  ## ruff, over the library, the tests and the notebooks
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

bench: $(TEST)  ## timings; they judge nothing, they print
	$(PY) -m pytest tests/benchmarks -q -s

clean:  ## remove .venv
	rm -rf $(VENV)

# .venv is a chain of stamps. Each is newer than what it was made from, so a second `make lab` installs nothing.
$(VENV)/.python:
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer found (tried python3.11, python3.12, python3.13, python3)." \
		"Install one, or name it: make PYTHON=/path/to/python3 lab" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and \
		"$(PYTHON) is Python %d.%d; the course needs 3.11 or newer. Name another: make PYTHON=/path/to/python3 lab" % v[:2])'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.torch: constraints.txt | $(VENV)/.python
	@$(PY) -c 'from importlib.metadata import version; assert version("torch").split("+")[0] == "$(TORCH_VERSION)"' 2>/dev/null \
		|| { echo "Installing torch $(TORCH_VERSION), the $(TORCH) build"; $(TORCH_$(TORCH_WAY)); }
	@touch $@

$(LAB): pyproject.toml constraints.txt $(VENV)/.torch
	$(PIP) install -q -c constraints.txt -e ".[lab$(EXTRAS:%=,%)]"
	$(PY) -m deepseek_lab.kernels
	@touch $@

$(TEST): $(LAB)
	$(PIP) install -q -c constraints.txt -e ".[lab,test$(EXTRAS:%=,%)]"
	@touch $@

# The CPU build: from a local wheel directory or mirror where one has it (elsewhere pip says no within a second),
# otherwise through uv, which knows where PyTorch keeps its builds.
TORCH_WAY := $(if $(filter cpu pip,$(TORCH)),$(TORCH),uv)
UV_TORCH = $(PIP) install -q uv && $(PY) -m uv pip install --python $(PY) --torch-backend=$(1) -c constraints.txt torch
TORCH_pip = $(PIP) install -q -c constraints.txt torch
TORCH_uv = { $(call UV_TORCH,$(if $(filter cuda,$(TORCH)),auto,$(TORCH))) || { $(call TORCH_FAILED,$(TORCH)); }; }
TORCH_cpu = $(PIP) install -q -c constraints.txt "torch==$(TORCH_VERSION)+cpu" 2>/dev/null \
	|| { $(call UV_TORCH,cpu); } || { $(call TORCH_FAILED,cpu); }
TORCH_FAILED = echo "The $(1) build of torch $(TORCH_VERSION) could not be installed; the lines above say why." \
	"To let pip choose a build by itself (on Linux the large CUDA one): make TORCH=pip $(MAKECMDGOALS)" >&2; exit 1
