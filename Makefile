# Distilled Matryoshka SAEs: every step of the replication. `make help` lists what can be made.
# The stages of an experiment and their dependencies are in runs/<run>/plan.mk, written by dmsae_lib/command/plan.py from the
# configuration; `make -n stages` prints them. All paths are relative, so the clone may lie anywhere.

CONFIG = default
CASE =
RUN =
SET =
STAGE = stages
AS =
REPO =
LICENCE =
PUBLIC =
STRICT =
PYTHON =
PY = .venv/bin/python
TORCH = torch==2.13.0
TIMEOUT =
VERBOSE =

export PY
export NBFLAGS = $(strip $(if $(TIMEOUT),--timeout $(TIMEOUT)) $(if $(VERBOSE),--verbose))
# A thread that waits for others sleeps soon: by default it spins, and any other work on the machine makes a run ten times
# slower. Costs some per cent on an idle machine, and no result depends on it.
export GOMP_SPINCOUNT ?= 1000
# uv does not read pip's settings: a folder of wheels that pip is told of serves it as well.
ifneq ($(PIP_FIND_LINKS),)
comma = ,
export UV_FIND_LINKS ?= $(subst $() ,$(comma),$(strip $(PIP_FIND_LINKS)))
endif

# With an environment of your own (PY=python, say inside conda) there is nothing to set up.
ENVIRONMENT = $(if $(filter .venv/bin/python,$(PY)),.venv/.complete)
# In single quotes for the shell, whatever spaces and quotes are in it.
quoted = '$(subst ','\'',$(value $1))'
WHICH = --config $(call quoted,CONFIG) $(if $(RUN),--run $(call quoted,RUN)) $(if $(value SET),--set $(call quoted,SET))
# Lines that call make run even with -n, where nothing has been set up yet.
DRY = $(findstring n,$(filter-out --%,$(firstword -$(MAKEFLAGS))))
NO_PYTHON = echo "error: there is no $(PY): run 'make setup' or name a Python that there is as PY" >&2; exit 1
UNREADY = $(if $(DRY),echo "the stages are listed once 'make setup' has run"; exit 0,\
  $(NO_PYTHON))
READY = $(if $(ENVIRONMENT),[ -e $(ENVIRONMENT) ] &&) command -v $(PY) > /dev/null || { $(UNREADY); }

.DEFAULT_GOAL = help
.PHONY: help setup reproduce stages model saebench smoke test test-slow test-browser lint base-model status compare publish core push-core figures atlas sizing start-here bench bench-environment mend clean lock

help: ## list what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' Makefile
	@echo
	@echo "CONFIG=name            an experiment: $$(cd configs && for file in *.yaml; do printf '%s ' "$${file%.yaml}"; done) (or a file's path)"
	@echo "SET='training.k=32'    override settings, several with spaces between, also in values;"
	@echo "                       computed in runs/<config>--<hash>"
	@echo "RUN=name               name the folder below runs/ yourself"
	@echo "STAGE=cycle_2_train    for 'make stages': this stage and what it needs"
	@echo "AS=name                for 'make publish' and 'make figures': the name below results/ and figures/"
	@echo "REPO=owner/name        for 'make push-core': where to (or a folder); LICENCE=id of the Hub, PUBLIC=1: not private"
	@echo "PYTHON=python3.12      for 'make setup': which Python; PY=python: use the environment that is active"
	@echo "TIMEOUT=seconds        limit for one notebook cell (a day); VERBOSE=1: show the notebooks' output as it comes"

setup: $(ENVIRONMENT) ## install everything, pinned, into .venv (Python 3.11 or 3.12; about 2.7 GB with a CPU torch)

reproduce: stages ## run the whole paper for CONFIG: every stage, the figures, then compare with what is published
	@$(PY) -m dmsae_lib.command.manage compare $(WHICH)

model: $(ENVIRONMENT) ## install what CONFIG's language model needs beyond the set-up; reproduce and stages do it by themselves
	@command -v $(PY) > /dev/null || { $(NO_PYTHON); }; $(PY) -m dmsae_lib.command.packages $(WHICH)

stages: model ## run the stages that are missing or stale (with -n: print them)
	@$(READY); $(PY) -m dmsae_lib.command.plan $(WHICH) --make "$(MAKE)" $(STAGE)

saebench: stages ## run the rest of SAEBench (saebench.suite: absorption, TPP, SCR ...), then the summary with it
	@$(READY); $(PY) -m dmsae_lib.command.plan $(WHICH) --make "$(MAKE)" saebench_suite
	@$(READY); $(PY) -m dmsae_lib.command.plan $(WHICH) --make "$(MAKE)" stages

smoke: ## the whole paper at toy size, in minutes
	@$(MAKE) --no-print-directory reproduce CONFIG=smoke

compare: $(ENVIRONMENT) ## set the run's numbers and verdicts beside the published ones (STRICT=1: fail unless all are the same)
	@$(PY) -m dmsae_lib.command.manage compare $(WHICH) $(if $(STRICT),--strict)

status: $(ENVIRONMENT) ## show each stage: missing, stale and why, or present; when and by which code it was made
	@$(PY) -m dmsae_lib.command.manage status $(WHICH)

publish: $(ENVIRONMENT) ## copy a finished run to results/ and figures/, write its page and the verdicts in README.md
	@$(PY) -m dmsae_lib.command.manage publish $(WHICH) $(if $(AS),--as $(call quoted,AS))

core: $(ENVIRONMENT) ## write the finished run's core for others to use, runs/<run>/core
	@$(PY) -m dmsae_lib.command.manage core $(WHICH)

push-core: $(ENVIRONMENT) ## push the finished run's core with a model card to the Hub, or into a folder (REPO=)
	@$(PY) -m dmsae_lib.command.manage push-core $(WHICH) --to $(call quoted,REPO) $(if $(LICENCE),--licence $(call quoted,LICENCE)) $(if $(PUBLIC),--public)

figures: $(ENVIRONMENT) ## draw figures/CONFIG and write its page again from results/CONFIG alone
	@$(PY) -m dmsae_lib.command.manage figures $(WHICH) $(if $(AS),--as $(call quoted,AS))

atlas: model ## compute the core atlas of CONFIG's last cycle, and write its page to results/CONFIG/atlas
	@$(READY); $(PY) -m dmsae_lib.command.plan $(WHICH) --make "$(MAKE)" atlas
	@$(READY); $(if $(DRY),:,$(PY) -m dmsae_lib.command.atlas $(WHICH) $(if $(AS),--as $(call quoted,AS)))

sizing: $(ENVIRONMENT) ## predict CONFIG's times, memory and disk beside what was measured, and the Gemma-2-2B run
	@$(PY) -m dmsae_lib.command.run_notebook notebooks/08_sizing.ipynb runs/sizing/sizing.ipynb -p config $(call quoted,CONFIG) -p write true $(NBFLAGS)
	@cp runs/sizing/sizing.ipynb results/$(call quoted,CONFIG)/notebooks/sizing.ipynb
	@$(PY) -m dmsae_lib.command.manage figures $(WHICH)

start-here: $(ENVIRONMENT) ## run the teaching notebook (a minute), and put the executed copy into results/start_here
	@$(PY) -m dmsae_lib.command.run_notebook notebooks/start_here.ipynb runs/start_here/start_here.ipynb $(NBFLAGS)
	@mkdir -p results/start_here
	@sed 's|](\.\./|](../../|g; s|](\([0-9a-z_]*\.ipynb\))|](../../notebooks/\1)|g' runs/start_here/start_here.ipynb > results/start_here/start_here.ipynb # a folder deeper

base-model: $(ENVIRONMENT) ## train the embedded language model again, in runs/base_model (an hour on two cores)
	@$(PY) -m dmsae_lib.command.run_notebook notebooks/00_base_model.ipynb runs/base_model/notebooks/00_base_model.ipynb \
	  -p run base_model -p tokens 30000000 -p documents 0 -p vocab_size 4096 -p batch_rows 32 $(NBFLAGS)

bench: $(ENVIRONMENT) .venv-bench/.complete ## time a training step against SAELens and dictionary_learning (CASE='L-clean': that alone)
	@env -u GOMP_SPINCOUNT $(PY) -m benchmarks.run $(if $(CASE),--case $(call quoted,CASE))

bench-environment: .venv-bench/.complete ## set up .venv-bench, which holds dictionary_learning

.venv-bench/.complete: benchmarks/requirements.txt $(ENVIRONMENT)
	@$(PY) -m benchmarks.environment

mend: $(ENVIRONMENT) ## check every artefact against its hashes, and make the damaged ones again
	@$(PY) -m dmsae_lib.command.manage mend $(WHICH)
	@$(MAKE) --no-print-directory stages

clean: ## remove what was computed for CONFIG (or RUN), naming it first; never results/ or figures/
	@if [ ! -d runs ]; then echo "there is no runs/: nothing to remove"; \
	else $(PY) -m dmsae_lib.command.manage clean $(WHICH); fi

NBVAL = --nbval-lax --nbval-current-env --nbval-cell-timeout=300
# Notebooks that leave the smoke run alone; all others follow each other.
APART = notebooks/start_here.ipynb notebooks/00_base_model.ipynb notebooks/08_sizing.ipynb
test: $(ENVIRONMENT) .venv-bench/.complete lint ## lint, unit tests, and every notebook at toy size
	@$(MAKE) --no-print-directory clean CONFIG=smoke > /dev/null # a change of the library makes no stage stale
	@HF_HUB_OFFLINE=1 $(MAKE) -j2 --no-print-directory stages CONFIG=smoke
	HF_HUB_OFFLINE=1 $(PY) -m pytest -q -m "not slow" -n 2 --dist loadfile $(NBVAL) tests $(APART)
	HF_HUB_OFFLINE=1 $(PY) -m pytest -q $(NBVAL) $(filter-out $(APART),$(wildcard notebooks/*.ipynb))

test-slow: $(ENVIRONMENT) ## the tests that take minutes
	$(PY) -m pytest -q -m slow tests

test-browser: $(ENVIRONMENT) .browser/.complete ## the atlas in a headless browser (Chromium, from the system or from Playwright)
	$(PY) -m pytest -q -rs tests/atlas/test_browser.py

# In a folder of its own, which the test alone looks into.
.browser/.complete: tests/atlas/requirements.txt
	@if command -v uv > /dev/null; then uv pip install --quiet --python $(PY) --target .browser -r $<; \
	else $(PY) -m pip install --quiet --disable-pip-version-check --target .browser -r $<; fi
	@command -v chromium chromium-browser google-chrome > /dev/null || PYTHONPATH=.browser $(PY) -m playwright install chromium
	@touch $@

lint: $(ENVIRONMENT) ## check rules and format of library, tests and notebooks, and the types of the reader's path
	@$(PY) -m ruff check --quiet .
	@$(PY) -m ruff format --quiet --check . || { echo "error: run '$(PY) -m ruff format .'" >&2; exit 1; }
	@$(PY) -m mypy --no-error-summary

lock: ## resolve requirements.lock again from pyproject.toml (needs uv)
	uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --no-emit-package torch \
	  --no-emit-package torchvision --no-emit-package nvidia-nccl-cu12 --no-emit-package nvidia-nccl-cu13 \
	  --no-annotate --no-header --quiet -o requirements.lock

.venv/.complete: pyproject.toml requirements.lock
	@sh setup.sh '$(PYTHON)' '$(TORCH)'
