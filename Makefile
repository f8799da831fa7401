PYTHON ?= python3
BIN := .venv/bin
COLAB := .venv-colab/bin
COLAB_PYTHON ?= $(lastword $(PYTHON) $(wildcard $(HOME)/.pyenv/versions/3.13*/bin/python3.13) $(shell \
	python3.13 -c 'import sys; print(sys.executable)' 2>/dev/null))
COLAB_TOOLS := notebook papermill pytest pytest-xdist playwright ranx pytorch-metric-learning efficientnet-lite-pytorch

.PHONY: lab figure picture test assignment browser soak all_heads address install jupyter bench clean

lab: install  ## run main.ipynb headless; writes results, the executed notebook, HTML and figures
	$(BIN)/python -m interface.run_notebook main.ipynb

figure picture: lab  ## the figure in the README: a search with the quickstart's model
	$(BIN)/python evaluate.py search runs/quickstart_s0 "a red star left of a blue circle" --k 5
	cp runs/quickstart_s0/search/a-red-star-left-of-a-blue-circle.png docs/search.png

test: install  ## lint, types, tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile -m "not browser_labs"

colab-test: .venv-colab/.installed  ## tests and notebooks with the versions of Colab's image, on Python 3.13 if available
	$(COLAB)/python --version
	$(COLAB)/pip list --format freeze | grep -iE "^(torch|torchvision|transformers|numpy|ipywidgets|ipython|ipykernel)=="
	OMP_NUM_THREADS=1 $(COLAB)/pytest -n 2 --dist loadfile -m "not browser and not browser_labs"
	for notebook in main.ipynb notebooks/*.ipynb; do \
		$(COLAB)/python -m interface.run_notebook $$notebook -p FAST_RUN=True --folder outputs/colab || exit 1; \
	done
	$(COLAB)/pytest tests/browser/test_controls_in_browser.py

.venv-colab/.installed: requirements.txt constraints-colab.txt
	$(COLAB_PYTHON) -m venv .venv-colab
	$(COLAB)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt $(COLAB_TOOLS) \
		-c constraints-colab.txt
	touch $@

browser: install  ## run every notebook in JupyterLab with a headless Chromium
	$(BIN)/pytest tests/browser -s

all_heads: install  ## train lab 1's configurations on generated scenes and print one table
	test -d data/scene_embeddings || $(BIN)/python encode.py --preset quickstart --folder data/scene_embeddings
	$(BIN)/python tune.py compare configs/attention.yaml configs/clip.yaml configs/mlp.yaml configs/siglip.yaml

assignment: install  ## lab 5 without its solutions, and the course folder that `nbgrader autograde` reads
	mkdir -p outputs/course/source/write_it_yourself
	cp notebooks/5_write_it_yourself.ipynb outputs/course/source/write_it_yourself/
	PATH="$(abspath $(BIN)):$$PATH" nbgrader generate_assignment write_it_yourself --course-dir $(CURDIR)/outputs/course --create --force
	@echo "outputs/course/release/write_it_yourself/5_write_it_yourself.ipynb"

soak: install  ## kill training at 20 random moments, damage files in 24 places, fill 32 small disks
	OMP_NUM_THREADS=1 KILLS=20 DAMAGES=24 DISKS=32 $(BIN)/pytest -n 2 --dist loadfile \
		tests/test_kill.py tests/test_damage.py tests/test_full_disk.py

address: install  ## write the address in pyproject.toml into the notebooks and the README
	$(BIN)/python -c "from interface.colab import write_address; write_address()"

install: .venv/.installed

.venv/.installed: requirements.txt requirements-jupyter.txt requirements-dev.txt constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt -c constraints.txt
	touch $@

jupyter: install
	$(BIN)/jupyter lab main.ipynb

bench: install
	$(BIN)/python -m benchmarks

clean:  ## delete generated files except data/ and runs/
	rm -rf .venv .venv-colab cache outputs .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
