# What needs .venv first makes it if it is missing or older than pyproject.toml or constraints.txt.

PYTHON ?= python3
# TORCH=cpu installs PyTorch's CPU build, without the CUDA libraries.
TORCH ?=
CPU_INDEX := https://download.pytorch.org/whl/cpu
# WHEELS=folder installs from a kit's wheels, without network. In a kit they are found automatically.
WHEELS ?= $(if $(wildcard ../START.md),$(wildcard ../wheels))
override WHEELS := $(patsubst ~/%,$(HOME)/%,$(WHEELS))
LAPTOP = $$($(PYTHON) -c 'from platform import *; print("-".join([system(), machine(), python_version()]).lower().rpartition(".")[0])')
# make kit: the folder to write, and the kinds of laptop; this kind by default.
KIT ?= kit
FOR ?=
# make cluster-test: which files, and options for pytest.
ONLY ?= tests/cluster
# make test: which files, and options for pytest; all by default.
TESTS ?=

BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
STAMP := .venv/.complete

.PHONY: help setup run lab site test cluster-test bench kit lint clean distclean

help:
	@echo "make run        run all lessons, build the report: report/index.html"
	@echo "make lab        open JupyterLab on the lessons"
	@echo "make site       build the report again from the lessons as they were last run"
	@echo "make test       run all tests, lessons included"
	@echo "make cluster-test  run the tests on three Ray hosts, which are namespaces (Linux, root, ip; 20 minutes)"
	@echo '                or some of them: make cluster-test ONLY=tests/cluster/test_sentences.py'
	@echo "make bench      compare the series with the usual ways to train: report/bench.md (two to three hours)"
	@echo '                or shorter, ten minutes: make bench BENCH=--quick'
	@echo "make kit        write the folder kit/, from which laptops are set up without network; for several kinds:"
	@echo '                make kit FOR="linux-x86_64-3.11 darwin-arm64-3.12" KIT=/path/to/a/stick/kit'
	@echo "make lint       check the style, and that notebooks have no outputs"
	@echo "make clean      delete choices, prepared data, runs and the report; keep .venv and a downloaded archive"
	@echo "make distclean  make clean, and delete .venv and all of storage/"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
	  { echo "Python 3.11, 3.12 or 3.13 is needed; this is $$($(PYTHON) --version). Name one: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
ifneq ($(WHEELS),)
	@[ -f '$(WHEELS)'/$(LAPTOP).txt ] || { echo "$(WHEELS) has no wheels for $(LAPTOP), only for:" \
	  $$(ls '$(WHEELS)' | sed -n 's/\.txt$$//p')". Another Python: make $(MAKECMDGOALS) PYTHON=python3.11; with network: WHEELS="; exit 1; }
	@echo "Setting up .venv from $(WHEELS), without network."
else
	@echo "Setting up .venv: about 2.5 minutes on a fast line. Linux: 3.2 GB to download, 6.6 GB of disk; less with TORCH=cpu."
endif
	@$(PYTHON) -m venv .venv || { echo "Could not make .venv: on Debian or Ubuntu, apt install python3-venv."; exit 1; }
ifneq ($(WHEELS),)
	@$(INSTALL) --no-index --find-links '$(WHEELS)' --require-hashes -r '$(WHEELS)'/$(LAPTOP).txt
	@$(INSTALL) --no-index --no-deps --no-build-isolation -e .
else
	@[ "$(TORCH)" != cpu ] || $(INSTALL) --extra-index-url $(CPU_INDEX) \
	  $$(sed -n 's/^\(torch\(vision\)\{0,1\}==[^ ]*\).*/\1+cpu/p' constraints.txt)
	@$(INSTALL) -c constraints.txt -e '.[test]'
endif
	@touch $@

run: $(STAMP)
	@$(BIN)/python tools/run_lessons.py
lab: $(STAMP)
	@$(BIN)/python tools/run_lessons.py lab
site: $(STAMP)
	@$(BIN)/python tools/build_site.py
test: $(STAMP)
	@$(BIN)/python -m pytest $(TESTS)
cluster-test: $(STAMP)
	@$(BIN)/python -m pytest $(ONLY)
bench: $(STAMP)
	@$(BIN)/python tools/bench $(BENCH)
kit: $(STAMP)
	@$(BIN)/python tools/make_kit.py '$(KIT)' $(if $(FOR),--for $(FOR)) $(if $(TORCH),--torch '$(TORCH)')

lint: $(STAMP)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check helpers tools tests notebooks/*.py && $(BIN)/nbstripout --verify notebooks/*.ipynb

clean:
	@rm -rf report storage/runs storage/tuning storage/settings.json .pytest_cache .ruff_cache *.egg-info
	@[ ! -d storage/data ] || find storage/data -mindepth 1 -maxdepth 1 -type d -exec rm -rf {} +
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
	@echo "Clean: choices, prepared data, runs and report are deleted."

distclean: clean
	@rm -rf .venv storage
