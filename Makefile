# Each target makes .venv where it is missing and installs what it needs; only Python >= 3.11 and make are needed.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test test-long test-all test-floor test-cluster test-slow golden mutations lint bench bench-gpu gpu-check

# The text inside CPython -> shards -> a GPT trained in two processes -> its loss curve and a sample.
# On the CPU also where there is a GPU: two processes want two, and the numbers are then the same everywhere.
# --local-addr: otherwise torchrun asks for the address of the host's own name, which containers may not know.
quickstart: .venv/.base
	$(BIN)/python data_prep/textfiles.py --input python-docs --out data/python-docs --tokenizer char
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --local-addr=127.0.0.1 --nproc_per_node=2 train/main.py quickstart
	$(BIN)/python train/curves.py runs/quickstart
	$(BIN)/python model/generate.py runs/quickstart --prompt "The " --max-tokens 300

# Interpreters are started by the hundred: our modules are compiled once, whatever the environment says. Four workers:
# what waits for processes would leave one of two cores idle.
RUN_TESTS := -m pytest -n 4 --dist loadfile --no-loadscope-reorder --durations=15 --durations-min=10
PYTEST := PYTHONDONTWRITEBYTECODE= $(BIN)/python $(RUN_TESTS)

test: .venv/.dev
	$(PYTEST) -m "not long and not slow and not cluster and not gpu"

# What is exhaustive: more kills, more faults in a row, every pair of layouts.
test-long: .venv/.dev
	$(PYTEST) -m "long and not slow and not cluster and not gpu"

# Both at once, as CI runs them: the longest test of the second then runs beside the many of the first.
test-all: .venv/.dev
	$(PYTEST) -m "not slow and not cluster and not gpu"

# The oldest versions that pyproject.toml allows: what trains, saves and resumes on this torch too.
FLOOR := .venv-floor/bin
ON_FLOOR := tests/unit/train tests/unit/model \
    $(addprefix tests/distributed/test_,$(addsuffix .py,async_checkpoints checkpoints exact precision))
test-floor: .venv-floor/.done
	PYTHONDONTWRITEBYTECODE= $(FLOOR)/python $(RUN_TESTS) -n 2 -m "not long and not slow" $(ON_FLOOR)

# A Slurm of several nodes on this machine, as root, from Debian's packages: where that cannot be, it says why and skips.
test-cluster: .venv/.dev
	$(BIN)/python -m pytest -m "cluster and not slow"

test-slow: .venv/.dev
	$(BIN)/python -m pytest -m slow

# Record the golden numbers anew, in a commit that means to change them.
golden: .venv/.dev
	$(BIN)/python -m tests.golden.measure

# Break twenty and more places that matter, one at a time in a copy of the tree: a test must fail for each.
mutations: .venv/.dev
	$(BIN)/python -m tests.golden.mutations

lint: .venv/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: .venv/.dev
	$(BIN)/python benchmarks/bench_step.py
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --local-addr=127.0.0.1 --nproc_per_node=2 benchmarks/bench_parallel.py
	$(BIN)/python benchmarks/bench_saves.py
	$(BIN)/python benchmarks/bench_generate.py
	$(BIN)/python benchmarks/bench_data_prep.py

# The same questions at GPT-2 small's size, on one GPU; `make --keep-going` goes on after one that fails.
SMALL := --preset gpt2-small --vocab-size 50257
GPU := $(addprefix gpu-,step chunked parallel saves generate)
.PHONY: $(GPU)
bench-gpu: $(GPU)
$(GPU): .venv/.dev
gpu-step:
	$(BIN)/python benchmarks/bench_step.py $(SMALL) --sequences 64
gpu-chunked:
	$(BIN)/python benchmarks/bench_step.py $(SMALL) --sequences 64 --loss chunked
gpu-parallel:
	$(BIN)/python benchmarks/bench_parallel.py $(SMALL) --sequences 64 --parallel fsdp
gpu-saves:
	$(BIN)/python benchmarks/bench_saves.py $(SMALL) --sequences 64
gpu-generate:
	$(BIN)/python benchmarks/bench_generate.py

# The first thing to run where there is a GPU: 8 minutes. Any Python that has torch will do; nothing is installed, but for
# the wheels of the folder WHEELS, if it is given.
OUT ?= gpu-check
gpu-check:
	$(or $(wildcard $(BIN)/python),$(PYTHON)) benchmarks/gpu_check.py --out $(OUT) $(if $(WHEELS),--wheels $(WHEELS))

.venv/.base: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[plots]' --constraint constraints.txt
	touch $@

.venv/.dev: .venv/.base
	$(BIN)/python -m pip install --quiet --editable '.[bpe,cluster,data,dev,eval,fast,hf,plots]' --constraint constraints.txt
	touch $@

# Of each name the first line counts, and the first are the floors. A torch this old comes with CUDA's libraries: 2 GB.
.venv-floor/.done: pyproject.toml constraints.txt
	test -x $(FLOOR)/python || $(PYTHON) -m venv .venv-floor
	sed -n 's/^    "\(.*\)>=\(.*\)",$$/\1==\2/p' pyproject.toml | awk -F== '!seen[$$1]++' - constraints.txt >.venv-floor/versions.txt
	$(FLOOR)/python -m pip install --quiet --no-compile --editable '.[hf,plots]' hypothesis pytest pytest-timeout pytest-xdist \
	    --constraint .venv-floor/versions.txt
	touch $@
