# `make help` lists the targets. Everything sets itself up: only a Rust toolchain is needed.

TARGET := $(shell rustc -vV | sed -n 's/^host: //p')
STATIC := LIBSECCOMP_LINK_TYPE=static LIBSECCOMP_LIB_PATH=$(shell scripts/libdir) \
	RUSTFLAGS="-C target-feature=+crt-static -C relocation-model=static"

.PHONY: help build demo test lint bench clean

help: ## Show this
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

build: ## Build the static release binary: target/release/skep
	@scripts/bootstrap build
	$(STATIC) cargo build --release --locked --target $(TARGET) --package skep
	@mkdir -p target/release && cp --force target/$(TARGET)/release/skep target/release/skep
	@ls -l target/release/skep

demo: ## Raise five hosts on this machine and show the main job
	@scripts/bootstrap demo
	cargo build --locked --package skep --package skep-chaos-tests
	@scripts/as-root target/debug/demo

test: ## Run every test (those on real hosts need root)
	@scripts/bootstrap test
	cargo build --locked --package skep
	cargo test --locked --workspace --exclude skep-chaos-tests
	SKEP_BENCH_TINY=1 cargo test --locked --package skep-scheduler --package skep-overlay-net --bench place --bench many_services
	cargo test --locked --package skep-chaos-tests --no-run
	@scripts/as-root cargo test --locked --package skep-chaos-tests -- --test-threads=1

lint: ## Check format and lints, warnings as errors
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets -- -D warnings

bench: ## Measure; figures stand in docs/PERFORMANCE.md
	@scripts/bootstrap bench
	cargo bench --locked --package skep-scheduler --package skep-overlay-net --bench place --bench many_services
	$(MAKE) build
	cargo build --locked --release --package skep-chaos-tests
	@SKEP_BIN=$(CURDIR)/target/release/skep scripts/as-root target/release/bench

clean: ## Remove what was built
	cargo clean
