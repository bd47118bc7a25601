# make demo         build a store, train a small model and sample it, in a few minutes on two CPU cores
# make article      the article in miniature: two phases, a sweep, a choice by validation, comparison
# make pictures     the pictures of the documentation, of what `make article` made
# make test         lint, types and tests
# make docs         the documentation in site/; needs no network once installed
# make web          the pages' script and style from web/, with npm; what it makes is committed
# make bench-smoke  one step of the throughput benchmark
# Each creates .venv if it is missing. On a machine with a CUDA GPU, pip installs torch with CUDA.

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo article pictures test lint docs web bench-smoke clean
.DELETE_ON_ERROR:

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		(echo "$(PYTHON) is older than Python 3.11. Use: make PYTHON=python3.11" && false)
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# The commands for a 24 GB GPU, with a smaller model, smaller images and fewer steps.
demo: $(INSTALLED)
	rm -rf demo
	$(BIN)/python -m benchmarks.demo.photos demo/images
	$(BIN)/python -m benchmarks.demo.pipeline demo/model --captions demo/images
	$(BIN)/xlsd-cache build demo/images --out demo/latents --vae demo/model/vae \
		--resolution 128 --captions txt,title
	$(BIN)/xlsd-cache check demo/latents --decode 8
	$(BIN)/xlsd-train --phase unet --batch 5 --data demo/latents --model demo/model \
		--out demo/unet --caption txt --caption-dropout 0.1 --steps 1000 --lr 3e-4 \
		--warmup 50 --sample-every 250 --sample-guidance 3 \
		--sample-prompts benchmarks/demo/tags.txt
	$(BIN)/xlsd-train --phase te --batch 5 --data demo/latents --model demo/unet \
		--out demo/te --caption title --steps 120 --lr 1e-3 \
		--sample-every 60 --sample-guidance 3 \
		--sample-prompts benchmarks/demo/titles.txt
	@echo
	@echo "Samples of the UNet, trained on tags:            demo/unet/samples/grid.png"
	@echo "Samples of the text encoder, trained on titles:  demo/te/samples/grid.png"

# The recipes in order. Flags set the values that differ for about eighty crops on a CPU. D-Lion's d
# reaches no plateau here (dlion's metrics.jsonl: 5.1e-4 at step 150, still growing), so Lion continues
# at about that rate. The sweep chose 1e-4.
HERE := --validation-fraction 0.15 --sample-steps 10 --sample-guidance 3
XLSD := $(BIN)/xlsd-train
article: $(INSTALLED)
	rm -rf article
	$(BIN)/python -m benchmarks.demo.subjects article/images
	$(BIN)/python -m benchmarks.demo.pipeline article/model --captions article/images
	for part in narrow broad; do $(BIN)/xlsd-cache build article/images/$$part \
		--out article/$$part --vae article/model/vae --resolution 128 || exit; done
	$(XLSD) --recipe phase1-unet --batch 8 --steps 150 --warmup 15 --data article/narrow \
		--model article/model --out article/dlion $(HERE) --validate-every 50 --sample-every 150
	$(XLSD) --recipe phase1-unet --optimizer lion --lr 4e-4 --batch 4 --steps 1000 \
		--warmup 20 --data article/narrow --model article/dlion --out article/phase1 $(HERE) \
		--validate-every 250 --sample-every 250
	$(XLSD) sweep --recipe phase1-te --lr 3e-4,1e-4,3e-5,1e-5 --batch 4 --steps 600 \
		--stop-after 30 --data article/narrow --model article/phase1 --out article/sweep \
		$(HERE) --validate-every 10 --sample-every 30
	$(XLSD) --recipe phase1-te --lr 1e-4 --batch 4 --steps 600 --stop-after 50 \
		--data article/narrow --model article/phase1 --out article/te $(HERE) --validate-every 10
	$(XLSD) --recipe phase2-unet --lr 3e-4 --batch 4 --steps 700 --warmup 20 \
		--data article/broad article/narrow --model article/te --out article/phase2 $(HERE) \
		--validate-every 175 --sample-every 350
	$(XLSD) export article/phase2 article/phase2.safetensors --format single-file
	$(XLSD) sample base=article/model phase1=article/phase1 te=article/te phase2=article/phase2 \
		--prompts benchmarks/demo/subjects.txt --size 128x128 --guidance 3 --out article/comparison
	@echo
	@echo "The same prompts with base, phase 1, text encoder and phase 2:  article/comparison/grid.png"
	@echo "A page with a slider between any two of them:                   article/comparison/index.html"
	@echo "The sweep over learning rates of the text encoder:              article/sweep/report.html"
	@echo "Samples of the text encoder during training:                    article/te/samples/grid.png"
	@echo "The model as a single file for other programs:                  article/phase2.safetensors"

pictures: $(INSTALLED)
	$(BIN)/xlsd-cache report article/narrow --vae article/model/vae
	$(XLSD) report article/phase1
	$(XLSD) report article/sweep/lr-* -o article/sweep/report.html
	$(BIN)/python -m benchmarks.demo.pictures

test: $(INSTALLED) lint
	$(BIN)/pytest --numprocesses 2 --dist worksteal

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

$(VENV)/.docs: $(INSTALLED)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

web:
	npm --prefix web ci --ignore-scripts --no-audit --no-fund
	npm --prefix web run build

bench-smoke: $(INSTALLED)
	$(BIN)/python benchmarks/throughput.py --steps 1 --batch 2 --resolution 64

clean:
	rm -rf $(VENV) web/node_modules pictures demo article build site *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
