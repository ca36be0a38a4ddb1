# run · lab · site · test · bench · kit … each target first makes .venv if it is missing or older than what it is
# made from.

PYTHON ?= python3
# TORCH=cpu installs PyTorch's CPU build, without the CUDA libraries.
TORCH ?=
ifeq ($(TORCH),cpu)
TORCH_OPTIONS := --extra-index-url https://download.pytorch.org/whl/cpu
TORCH_SUFFIX := +cpu
endif
# WHEELS=folder installs from a kit's wheels, without network; a series that lies in a kit finds them by itself.
WHEELS ?= $(if $(wildcard ../START.md),$(wildcard ../wheels))
override WHEELS := $(patsubst ~/%,$(HOME)/%,$(WHEELS))
LAPTOP = $$($(PYTHON) -c 'from platform import *; print("-".join([system(), machine(), python_version()]).lower().rpartition(".")[0])')

VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
STAMP := $(VENV)/.complete
SITE_STAMP := $(VENV)/.site-complete

# make kit: where to, and for which laptops; this kind when not said.
KIT ?= kit
FOR ?=

.PHONY: run lab site test bench kit lint setup clean distclean help

help:
	@echo "make run        set up, run all lessons, write report/index.html"
	@echo "make lab        set up, open JupyterLab on the lessons"
	@echo "make site       make report/site/index.html: the lessons as they were run, with search, to read offline"
	@echo "make test       set up, run the tests (lessons included)"
	@echo "make bench      set up, measure the series beside the usual ways; write report/bench.md (two to three hours)"
	@echo "make kit        set up, write the folder kit/ from which laptops are set up without network; for several kinds:"
	@echo '                make kit FOR="linux-x86_64-3.11 darwin-arm64-3.12" KIT=/path/to/a/stick/kit'
	@echo "make lint       set up, check style and that notebooks have no outputs"
	@echo "make clean      forget choices, prepared data, runs and the report; keep .venv and a downloaded archive"
	@echo "make distclean  make clean, and remove .venv and all of storage/"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
	  { echo "Python 3.11, 3.12 or 3.13 is needed; this is $$($(PYTHON) --version). Name one: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
ifneq ($(WHEELS),)
	@[ -f '$(WHEELS)'/$(LAPTOP).txt ] || { echo "$(WHEELS) has no wheels for $(LAPTOP), which this is, only for:" \
	  $$(ls '$(WHEELS)' | sed -n 's/\.txt$$//p')". Another Python: make $(MAKECMDGOALS) PYTHON=python3.11; with network: WHEELS="; exit 1; }
	@echo "Setting up $(VENV) from $(WHEELS), without network."
else
	@echo "Setting up $(VENV): about 2.5 minutes on a fast line. On Linux it downloads 3.2 GB, most of it the CUDA"
	@echo "libraries of PyTorch, and takes 6.6 GB of disk; TORCH=cpu leaves those libraries out."
endif
	@$(PYTHON) -m venv $(VENV) || { echo "Could not make $(VENV): on Debian or Ubuntu, apt install python3-venv."; exit 1; }
ifneq ($(WHEELS),)
	@$(INSTALL) --no-index --find-links '$(WHEELS)' --require-hashes -r '$(WHEELS)'/$(LAPTOP).txt
	@$(INSTALL) --no-index --no-deps --no-build-isolation -e .
else
	@[ -z "$(TORCH_SUFFIX)" ] || $(INSTALL) $(TORCH_OPTIONS) \
	  $$(sed -n 's/^\(torch\(vision\)\{0,1\}==[^ ]*\).*/\1$(TORCH_SUFFIX)/p' constraints.txt)
	@$(INSTALL) -c constraints.txt -e '.[test]'
endif
	@touch $@

run: $(STAMP)
	@$(BIN)/python -m helpers.series

lab: $(STAMP)
	@$(BIN)/python -m helpers.series lab

# Only a report that is not there is made first: it takes minutes, so a newer one is for the reader to ask for.
site: $(SITE_STAMP) report/index.html
	@$(BIN)/python -m helpers.site

# A kit's wheels have the builder in them.
$(SITE_STAMP): $(STAMP)
ifeq ($(WHEELS),)
	@echo "Adding the site's builder to $(VENV): 12 MB to download."
	@$(INSTALL) -c constraints.txt -e '.[site]'
endif
	@touch $@

report/index.html: | $(SITE_STAMP)
	@$(BIN)/python -m helpers.series

test: $(STAMP)
	@$(BIN)/python -m pytest

bench: $(STAMP)
	@$(BIN)/python tests/bench $(BENCH)

kit: $(STAMP)
	@$(BIN)/python -m helpers.kit '$(KIT)' $(if $(FOR),--for $(FOR)) $(if $(TORCH),--torch '$(TORCH)')

lint: $(STAMP)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check helpers tests && $(BIN)/nbstripout --verify notebooks/*.ipynb

clean:
	@rm -rf report storage/runs storage/tuning storage/settings.json .pytest_cache .ruff_cache *.egg-info
	@[ ! -d storage/data ] || find storage/data -mindepth 1 -maxdepth 1 -type d -exec rm -rf {} +
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
	@echo "Clean: choices, prepared data, runs and report are gone."

distclean: clean
	@rm -rf $(VENV) storage
