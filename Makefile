# A fresh machine needs Python 3.10 or newer, make and a package index; the rest happens here.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO ?= demo-output
BENCH ?=
# Its notices are for who installs by hand.
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore

.PHONY: demo test test-slow test-hostile test-versions lint format bench bench-compare dist check-dist clean

demo: $(VENV)/ready
	@$(BIN)/mergekit-somf demo $(DEMO)

test: $(VENV)/ready
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

# What starts many processes, or takes long for other reasons.
test-slow: $(VENV)/ready
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slow

# Thousands of examples for each property that `make test` tries with a few.
test-hostile: $(VENV)/ready
	HOSTILE_PROFILE=thousands $(BIN)/python -m pytest tests/test_hostile.py --hypothesis-show-statistics

# The whole suite against the lowest and the highest supported versions, see docs/versions.md.
test-versions: .venv-lowest/ready .venv-highest/ready
	.venv-lowest/bin/python -m pytest
	.venv-highest/bin/python -m pytest

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# BENCH="--data DIR" uses local files instead of hub ids; each command's --help says more.
bench: $(VENV)/ready
	$(BIN)/python -m benchmarks.speed $(BENCH)

# Takes many hours; a call that is broken off is called again.
bench-compare: $(VENV)/ready
	$(BIN)/python -m benchmarks.compare $(BENCH)

dist: $(VENV)/ready
	rm -rf dist
	$(BIN)/python -m build

# Installs the wheel and the sdist, each in an empty environment, and asks mergekit for somf.
check-dist: dist
	for file in dist/*.whl dist/*.tar.gz; do \
	  rm -rf .venv-dist && $(PYTHON) -m venv .venv-dist && \
	  .venv-dist/bin/pip install --quiet -c constraints.txt $$file && \
	  (cd .venv-dist && bin/python -c "import mergekit.merge_methods as m; print(m.get('somf').spec.name)" && \
	  bin/mergekit-somf --version) || exit 1; \
	done
	rm -rf .venv-dist

$(VENV)/ready .venv-highest/ready: constraints.txt
.venv-lowest/ready: constraints-lowest.txt
$(VENV)/ready .venv-lowest/ready .venv-highest/ready: pyproject.toml somf_mergekit/plugin/torch_entry_point.py
	@echo "setting up $(@D): torch, transformers and mergekit, a few minutes the first time"
	@$(PYTHON) -m venv --clear $(@D)
	@$(@D)/bin/pip install --quiet -c $(filter constraints%,$^) -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) .venv-lowest .venv-highest .venv-dist dist build demo-output
