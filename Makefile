# Each of these works alone on a fresh clone: it makes .venv and installs what is pinned.
PYTHON ?= python3
BIN := .venv/bin
DEMO := out/demo/demo_baseline_seed2 out/demo/demo_seed2

# glibc shall keep freed memory: on a virtual machine a fresh page can cost more than the arithmetic in it
# (circuits of a toy model: 38 CPU seconds without these two, 10 with them)
export MALLOC_MMAP_MAX_ := 0
export MALLOC_TRIM_THRESHOLD_ := 20000000000

.PHONY: demo lint test test-lens clean

demo: .venv/core.stamp  # two small models, what they write, their circuits, a page of neurons: 5 minutes on 2 CPU cores
	$(if $(wildcard data/toy/meta.json),,$(BIN)/python prepare.py toy)
	$(BIN)/python -m bench.sweep config/demo_baseline.py config/demo.py --seeds=2 --per_gpu=2 --out=out/demo
	$(BIN)/python -m interp.circuits $(DEMO)
	$(BIN)/python -m interp.circuits $(DEMO) --method eap --level units
	$(BIN)/python eval.py out/demo/demo_seed2 --sample "Once upon a time" --plot out/demo/units.png
	$(BIN)/python -m interp.n2g out/demo/demo_seed2 --tokens 200000 > out/demo/neurons.txt
	$(BIN)/python -m interp.explain out/demo/demo_seed2 --window 32 >> out/demo/neurons.txt
	$(BIN)/python -m interp.units out/demo/demo_seed2 >> out/demo/neurons.txt
	$(BIN)/python -m interp.tables $(DEMO)
	@echo "pictures: $(DEMO:=/acdc.png) out/demo/units.png; more: out/demo/neurons.txt"
	@echo "a page to look at each neuron, in any browser:"
	@$(BIN)/python -m interp.browse out/demo/demo_seed2

test: .venv/dev.stamp  # two workers of one thread: in tensors this small a second thread only waits
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal test_gate.py tests --ignore=tests/test_train.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/test_train.py  # alone: processes that wait for each other

lint: .venv/dev.stamp
	$(BIN)/ruff check .

# TransformerLens, SAELens, the paper's circuit library and the oldest transformers: 5 GB, so no part of `test`
test-lens: .venv-lens/stamp .venv-saelens/stamp .venv-old/stamp
	OMP_NUM_THREADS=1 .venv-lens/bin/python -m pytest -q tests/test_lens.py
	OMP_NUM_THREADS=1 .venv-saelens/bin/python -m pytest -q tests/test_lens.py

.venv-%/stamp: tests/requirements-%.txt requirements-dev.txt requirements-interp.txt requirements.txt
	test -x .venv-$*/bin/python || $(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install -q -r tests/requirements-$*.txt
	touch $@

.venv/core.stamp: requirements.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -r requirements.txt
	touch $@

.venv/dev.stamp: requirements.txt requirements-interp.txt requirements-dev.txt .venv/core.stamp
	$(BIN)/python -m pip install -q -r requirements-dev.txt
	touch $@

clean:  # the environments only: data/ and out/ are yours
	rm -rf .venv .venv-lens .venv-saelens .venv-old
