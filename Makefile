# make demo   fresh clone to a distilled student and its report
# make test   fresh clone to green tests
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python

.PHONY: demo test slow lint benchmark setup clean

setup:
	@$(PYTHON) tools/bootstrap.py --venv $(VENV) --extras dev

demo: setup
	@$(RUN) tools/demo.py

test: setup
	@$(RUN) -m pytest -q -n 2

slow: setup
	@$(RUN) -m pytest -q -m slow

lint: setup
	@$(RUN) -m ruff check . && $(RUN) -m ruff format --check . && $(RUN) -m mypy

benchmark: setup
	@$(RUN) benchmarks/ops.py

clean:
	@rm -rf $(VENV) exp data/sim
