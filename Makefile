# The study as a graph of files. A notebook runs again when its source, the profile, a library file
# that it uses or a notebook whose results it reads is newer than its last run.
# `make` alone lists what there is.

PROFILE  ?= caltech24
SEED     ?= 0
VENV     ?= .venv
RUN      ?= avit_finetuned
NPROC    ?= 1
PYTHON   ?= python3
PIP_ARGS ?=

BIN    := $(VENV)/bin
STAMP  := $(VENV)/.avit-setup
AVIT   := $(BIN)/python -m avit_lib
LAUNCH := $(BIN)/$(if $(filter 1,$(NPROC)),python,torchrun --standalone --nproc-per-node "$(NPROC)")

# glibc: keep freed memory, or every training step pays for large tensors with page faults.
export MALLOC_MMAP_THRESHOLD_ ?= 1073741824
export MALLOC_TRIM_THRESHOLD_ ?= 4294967296
# And in huge pages: where memory is in many pieces, small ones make everything half as fast.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
# torch's profiler: no lines of its own in a notebook, such as that it found no GPU.
export KINETO_LOG_LEVEL ?= 6
# The kernel of this environment, though the user may have others.
export JUPYTER_PREFER_ENV_PATH = 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:  # notebooks measure times
.SECONDEXPANSION:
.PHONY: help setup lab reproduce seeds paper readme site train release animate benchmark test lint lock clean clean-results

help:  ## List the targets and variables
	@echo "usage: make TARGET [VARIABLE=value ...]"; echo; echo "targets:"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-14s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo; echo "variables (with their present values):"
	@echo "  PROFILE=$(PROFILE)  which study: caltech24, caltech101, ... or a TOML file of your own (avit_lib/study/profiles)"
	@echo "  SEED=$(SEED)  seed of everything random"
	@echo "  RUN=$(RUN)  what \`make train\` trains: one of the profile's runs"
	@echo "  NPROC=$(NPROC)  in how many processes, one to a GPU"
	@echo "  PYTHON=$(PYTHON)  the Python that .venv is made from, 3.10 or newer"
	@echo "  VENV=$(VENV)  where it lies; in a conda environment: VENV=\$$CONDA_PREFIX"
	@echo "  PIP_ARGS=$(PIP_ARGS)  more arguments of pip install; without a GPU, for a download of 1 GB in place of 5:"
	@echo "    PIP_ARGS='--extra-index-url https://download.pytorch.org/whl/cpu'"

# --- the environment ------------------------------------------------------------------------------

setup: $(STAMP)  ## Make .venv with everything the study needs (does nothing when up to date)

# The stamp is written last: a set-up that was cut short does not count as done. The locked versions
# need Python 3.11; on 3.10 pip chooses within the ranges of pyproject.toml. Python compiles what it
# imports; to compile all of torch beforehand would take a minute.
$(STAMP): pyproject.toml requirements.lock
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { $(check_python) && $(PYTHON) -m venv $(VENV); }
	$(BIN)/python -m pip install --no-compile $(PIP_ARGS) -e ".[notebooks,dev]" \
		$$($(BIN)/python -c 'import sys; print("-c requirements.lock" if sys.version_info >= (3, 11) else "")')
	@touch $@

define check_python
{ $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null \
	|| { echo "error: $(PYTHON) is not Python 3.10 or newer; name one that is: make setup PYTHON=python3.12" >&2; exit 1; }; } \
&& { $(PYTHON) -c 'import venv, ensurepip' 2>/dev/null \
	|| { echo "error: $(PYTHON) cannot make environments; on Debian or Ubuntu: apt install python3-venv" >&2; exit 1; }; }
endef

lab: setup  ## Open the notebooks in JupyterLab
	$(BIN)/jupyter lab --ServerApp.root_dir="$(CURDIR)" notebooks/01_algorithm.ipynb

# --- the notebooks --------------------------------------------------------------------------------

# Notebooks run in their own folder.
$(foreach name,AVIT_DATA AVIT_WEIGHTS AVIT_RESULTS,$(if $($(name)),$(eval export $(name) := $(abspath $($(name))))))

RESULTS := $(or $(AVIT_RESULTS),results)/$(basename $(notdir $(PROFILE)))
COPIES  := $(RESULTS)/notebooks
STAMPS  := $(RESULTS)/.stamps
# notebooks run in their own folder
AS_SEEN_FROM_NOTEBOOKS := $(if $(filter %.toml,$(filter-out /%,$(PROFILE))),../)$(PROFILE)

# $(call dependencies,NOTEBOOK): the profile's files and, with NOTEBOOK, those of the library
dependencies = $(or $(shell $(or $(wildcard $(BIN)/python),$(PYTHON)) scripts/dependencies.py "$(PROFILE)" $(1)), \
	$(error cannot tell what the notebooks of PROFILE=$(PROFILE) depend on))

ifneq ($(filter reproduce seeds paper,$(MAKECMDGOALS)),)
NAMES := $(basename $(notdir $(sort $(wildcard notebooks/[0-9]*.ipynb))))
# An executed copy that somebody removed or replaced, as `git checkout results` does, is made again.
$(foreach name,$(NAMES),$(if $(shell cd $(COPIES) 2>/dev/null && find . -name $(name).ipynb ! -newer ../.stamps/$(name) 2>/dev/null), \
	,$(eval $(STAMPS)/$(name): other-copy)))
.PHONY: other-copy
endif

SEEDS := 08_seeds 10_verdicts
PAPER := 09_paper 11_ablations
reproduce: $(patsubst %,$(STAMPS)/%,$(filter-out $(SEEDS) $(PAPER),$(NAMES)))  ## Train and run what is out of date in PROFILE: in a fresh clone, 01 to 07
seeds: $(SEEDS:%=$(STAMPS)/%)  ## Run 08, 10 and what they read: models and peers, trained alike from several seeds
paper: $(PAPER:%=$(STAMPS)/%)  ## Run 09, 11 and what they read: the paper's own settings for many epochs, its objective part by part from several seeds
reproduce seeds paper:
	@$(BIN)/python scripts/pages.py --profile "$(PROFILE)"

# What a notebook reads of others: trained models, tables.
$(STAMPS)/03_train_avit: $(STAMPS)/02_finetune_deit
$(STAMPS)/04_evaluation: $(STAMPS)/03_train_avit
$(STAMPS)/05_halting_analysis: $(STAMPS)/04_evaluation
$(STAMPS)/06_efficiency: $(STAMPS)/04_evaluation
$(STAMPS)/07_adapt: $(STAMPS)/06_efficiency
$(STAMPS)/08_seeds: $(STAMPS)/04_evaluation
$(STAMPS)/09_paper: $(STAMPS)/02_finetune_deit
$(STAMPS)/10_verdicts: $(STAMPS)/07_adapt $(STAMPS)/08_seeds
$(STAMPS)/11_ablations: $(STAMPS)/02_finetune_deit

# A stamp bears the time at which the last good run started, so that what changed meanwhile counts as
# newer. The executed copy is replaced by a good one only.
$(STAMPS)/%: notebooks/%.ipynb $$(call dependencies,$$*) $(STAMPS)/seed | $(STAMP)
	@echo "notebook $*: $(if $(wildcard $@),since its last run: $?,has not run yet)"
	@mkdir -p $(COPIES) && touch $@.started
	@$(BIN)/python -m papermill $< $(COPIES)/$*.running.ipynb --cwd notebooks --kernel python3 \
		-r PROFILE "$(AS_SEEN_FROM_NOTEBOOKS)" -p SEED $(SEED) --start-timeout 300 --stdout-file - \
		--log-level WARNING --no-progress-bar 2> $(STAMPS)/$*.log \
	&& $(BIN)/python scripts/tidy.py $(COPIES)/$*.running.ipynb 2>> $(STAMPS)/$*.log \
	|| { mv -f $(COPIES)/$*.running.ipynb $(COPIES)/$*.failed.ipynb 2>/dev/null; \
		echo "error: notebook $* failed: $$(grep '[^ ]' $(STAMPS)/$*.log | tail -n 1); see $(COPIES)/$*.failed.ipynb" >&2; exit 1; }
	@mv -f $(COPIES)/$*.running.ipynb $(COPIES)/$*.ipynb
	@rm -f $(COPIES)/$*.failed.ipynb $(STAMPS)/$*.log
	@touch -r $@.started $(COPIES)/$*.ipynb && mv -f $@.started $@

# All runs again with another seed, profile file, folder of images or of weights than in the last run.
GIVEN := $(SEED) $(PROFILE) data=$(AVIT_DATA) weights=$(AVIT_WEIGHTS)
$(STAMPS)/seed:
	@mkdir -p $(STAMPS) && echo "$(GIVEN)" > $@
ifneq ($(GIVEN),$(shell cat $(STAMPS)/seed 2>/dev/null))
.PHONY: $(STAMPS)/seed
endif

readme: setup  ## Write results/PROFILE/README.md and the tables in README.md again from the results
	@$(BIN)/python scripts/pages.py --profile "$(PROFILE)"

site: setup  ## Write all pages and the executed notebooks of PROFILE as a website: site/index.html
	@$(BIN)/python scripts/website.py --profile "$(basename $(notdir $(PROFILE)))"

# --- commands -------------------------------------------------------------------------------------

train: setup  ## Train RUN of PROFILE in NPROC processes (goes on after an interruption)
	@$(LAUNCH) -m avit_lib fit --profile "$(PROFILE)" --seed "$(SEED)" --model "$(RUN)"

release: setup  ## Write the headline models of PROFILE in half precision, to be committed
	@$(BIN)/python scripts/release.py --profile "$(PROFILE)" --seed "$(SEED)"

animate: setup  ## Draw the moving picture of the README with the trained models of PROFILE
	@$(BIN)/python scripts/animate.py --profile "$(PROFILE)" --seed "$(SEED)"

benchmark: setup  ## Time all methods side by side (25 minutes on 2 cores; leave it alone)
	@$(BIN)/python scripts/benchmark.py --seed "$(SEED)"
	@$(BIN)/python scripts/pages.py --profile benchmark

# Two processes of one thread each: most tests are too small to gain by a second thread.
test: lint  ## Check the style, run the tests, run every notebook in the smoke profile
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile
	rm -rf "$(dir $(RESULTS))smoke"
	$(MAKE) --no-print-directory reproduce seeds paper PROFILE=smoke SEED=0

lint: setup  ## Check style, types and the direction of imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy

lock:  ## Write requirements.lock from what is installed in .venv
	@{ echo "# The exact versions the study was tested with, as constraints for pip. Written by \`make lock\`:"; \
	   echo "# pip freeze --exclude-editable, without local version labels; $$($(BIN)/python --version)."; \
	   $(BIN)/python -m pip freeze --exclude-editable | sed -n 's/^\([A-Za-z0-9._-]*==[^+ ]*\).*/\1/p'; } > requirements.lock.tmp
	@mv requirements.lock.tmp requirements.lock

clean:  ## Remove caches, failed notebooks and smoke results
	rm -rf "$(dir $(RESULTS))"smoke "$(dir $(RESULTS))"*/notebooks/*.failed.ipynb "$(dir $(RESULTS))"*/notebooks/*.running.ipynb
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis build site *.egg-info
	find avit_lib scripts tests notebooks -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf

clean-results:  ## Remove all results of PROFILE, trained models too (asks for CONFIRM=yes)
	@case "$(notdir $(RESULTS))" in ""|*[!a-z0-9_]*) echo "error: no such profile" >&2; exit 1;; esac
	@test -d "$(RESULTS)" || { echo "error: there is no folder $(RESULTS)" >&2; exit 1; }
	@test "$(CONFIRM)" = yes || { echo "this removes $(RESULTS), checkpoints too: add CONFIRM=yes" >&2; exit 1; }
	rm -rf "$(RESULTS)"
