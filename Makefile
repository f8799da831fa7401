PYTHON ?= python3
BIN := .venv/bin

.PHONY: lab test soak install jupyter bench clean

lab: install  ## run main.ipynb headless: results, executed notebook, HTML, figures
	$(BIN)/python run_notebook.py main.ipynb

test: install  ## lint, types, tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

soak: install  ## kill a training run at twenty random moments; each must end with the same bits
	OMP_NUM_THREADS=1 KILLS=20 $(BIN)/pytest tests/test_kill.py -n 2

install: .venv/.installed

.venv/.installed: requirements.txt requirements-dev.txt constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt -c constraints.txt
	touch $@

jupyter: install
	$(BIN)/jupyter lab main.ipynb

bench: install
	$(BIN)/python -m benchmarks

clean:  ## what was made here, but not data/ and runs/
	rm -rf .venv cache outputs .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
