# make demo | test | test-fast | test-newest | lint | clean. The first run sets the environment up.
#
#   PYTHON=python3.12    the interpreter that .venv is made with
#   VENV=DIR             use the environment DIR as it is, with nothing installed into it
#   PYTEST_ARGS=...      passed on to pytest
#
# PyPI's torch for Linux brings several GB of CUDA: where there is no GPU, have pip find PyTorch's CPU build first.

PYTHON ?= python3
VENV ?= .venv
ifeq ($(VENV),.venv)
READY := .venv/.installed
endif

.PHONY: demo test test-fast test-newest lint clean

demo: $(READY)
	$(VENV)/bin/dmoerm demo

test: $(READY)
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile --maxfail 5 $(PYTEST_ARGS)

# Between two edits: all tests but those that train, start servers or processes, run benchmarks or every chat template, or are slow.
test-fast: $(READY)
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile -m "not slow" --maxfail 5 \
	  $(foreach one,training rl distributed labelling scripts data/test_chat_templates.py test_auto_classes.py test_benchmarks.py test_cli.py test_folders.py test_fuzz.py test_memory.py test_public_names.py test_real_text_benchmark.py test_recipes.py test_trl_contract.py,--ignore=tests/$(one)) $(PYTEST_ARGS)

# TRL's contracts once more, with the newest TRL, which has no PPO.
test-newest: .venv-newest/.installed
	.venv-newest/bin/python -m pytest -m trl_contract $(PYTEST_ARGS)

lint: $(READY)
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .

.venv/.installed: EXTRAS = ppo,dev
.venv-newest/.installed: EXTRAS = dev

# The stamp is written last and removed first: an environment without it is half made, and is made anew.
.venv/.installed .venv-newest/.installed: setup.cfg pyproject.toml constraints.txt
	test -f $@ || $(PYTHON) -m venv --clear $(@D)
	rm -f $@
	$(@D)/bin/python -m pip install -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

# Keeps runs/, where trained models are.
clean:
	rm -rf .venv .venv-newest .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
