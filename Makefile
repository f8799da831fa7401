PYTHON ?= python3
BIN := .venv/bin

.PHONY: lab picture test browser soak all_heads install jupyter bench clean

lab: install  ## run main.ipynb headless: results, executed notebook, HTML, figures
	$(BIN)/python -m interface.run_notebook main.ipynb

picture: lab  ## the README's: what the quickstart finds
	$(BIN)/python evaluate.py search runs/quickstart_s0 "a red star left of a blue circle" --k 5
	cp runs/quickstart_s0/search/a-red-star-left-of-a-blue-circle.png docs/search.png

test: install  ## lint, types, tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile -m "not browser_labs"

browser: install  ## every notebook in JupyterLab, driven by a headless Chromium
	$(BIN)/pytest tests/browser -s

all_heads: install  ## lab 1's configurations on generated scenes, one table
	test -d data/scene_embeddings || $(BIN)/python encode.py --preset quickstart --folder data/scene_embeddings
	$(BIN)/python tune.py compare configs/attention.yaml configs/clip.yaml configs/mlp.yaml configs/siglip.yaml

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
