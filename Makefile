# run · lab · site · test · bench … each target first makes .venv if it is missing or older than what it is made from.

PYTHON ?= python3
# TORCH=cpu installs PyTorch's CPU build, without the CUDA libraries.
TORCH ?=
ifeq ($(TORCH),cpu)
TORCH_OPTIONS := --extra-index-url https://download.pytorch.org/whl/cpu
TORCH_SUFFIX := +cpu
endif

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.complete
SITE_STAMP := $(VENV)/.site-complete

.PHONY: run lab site test bench lint setup clean distclean help

help:
	@echo "make run        set up, run all lessons, write report/index.html"
	@echo "make lab        set up, open JupyterLab on the lessons"
	@echo "make site       make report/site/index.html: the lessons as they were run, with search, to read offline"
	@echo "make test       set up, run the tests (lessons included)"
	@echo "make bench      set up, measure the series beside the usual ways; write report/bench.md (about an hour)"
	@echo "make lint       set up, check style and that notebooks have no outputs"
	@echo "make clean      forget choices, prepared data, runs and the report; keep .venv and a downloaded archive"
	@echo "make distclean  make clean, and remove .venv and all of storage/"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
	  { echo "Python 3.11, 3.12 or 3.13 is needed; this is $$($(PYTHON) --version). Name one: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	@echo "Setting up $(VENV): about 2.5 minutes on a fast line. On Linux it downloads 3.2 GB, most of it the CUDA"
	@echo "libraries of PyTorch, and takes 6.6 GB of disk; TORCH=cpu leaves those libraries out."
	@$(PYTHON) -m venv $(VENV) || { echo "Could not make $(VENV): on Debian or Ubuntu, apt install python3-venv."; exit 1; }
	@[ -z "$(TORCH_SUFFIX)" ] || $(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH_OPTIONS) \
	  $$(sed -n 's/^\(torch\(vision\)\{0,1\}==[^ ]*\).*/\1$(TORCH_SUFFIX)/p' constraints.txt)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

run: $(STAMP)
	@$(BIN)/python -m helpers.series

lab: $(STAMP)
	@$(BIN)/python -m helpers.series lab

# Only a report that is not there is made first: it takes minutes, so a newer one is for the reader to ask for.
site: $(SITE_STAMP) report/index.html
	@$(BIN)/python -m helpers.site

$(SITE_STAMP): $(STAMP)
	@echo "Adding the site's builder to $(VENV): 12 MB to download."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[site]'
	@touch $@

report/index.html: | $(SITE_STAMP)
	@$(BIN)/python -m helpers.series

test: $(STAMP)
	@$(BIN)/python -m pytest

bench: $(STAMP)
	@$(BIN)/python tests/bench $(BENCH)

lint: $(STAMP)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check helpers tests && $(BIN)/nbstripout --verify notebooks/*.ipynb

clean:
	@rm -rf report storage/runs storage/tuning storage/settings.json .pytest_cache .ruff_cache *.egg-info
	@[ ! -d storage/data ] || find storage/data -mindepth 1 -maxdepth 1 -type d -exec rm -rf {} +
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
	@echo "Clean: choices, prepared data, runs and report are gone."

distclean: clean
	@rm -rf $(VENV) storage
