# The commands of this project. CI runs only "make test" (.ci/run), so a commit that passes it here passes there.
#
# Targets that install Debian packages say so and need root; all others run as any user.

SHELL        := /bin/bash
.SHELLFLAGS  := -euo pipefail -c
.DEFAULT_GOAL := help

VERSION      ?= $(shell git describe --tags --match 'v*' 2>/dev/null || echo unreleased)
COMMIT       ?= $(shell git describe --always --abbrev=40 --dirty --exclude '*' 2>/dev/null || echo unknown)
PREFIX       ?= /usr/local
BINDIR       ?= $(PREFIX)/bin
MANDIR       ?= $(PREFIX)/share/man
UNITDIR      ?= $(PREFIX)/lib/systemd/system
DATADIR      ?= $(PREFIX)/share
SYSCONFDIR   ?= /etc
DESTDIR      ?=

# The test cache holds what is slow to make: containerd and its tools, images, guest kernels. It can
# be deleted safely.
DAXFS_TEST_CACHE ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/daxfs-test
export DAXFS_TEST_CACHE

GO           ?= go
MODULE       := github.com/daxfs/daxfs-snapshotter
# Static binaries: one file works on every distribution, and every machine builds the same bytes (-trimpath).
GOBUILD       = CGO_ENABLED=0 $(GO) build -trimpath -buildvcs=false -ldflags '-s -w -X "$(MODULE)/internal/version.linked=$(VERSION) (commit $(COMMIT))"'
# One line for each package, the whole output of failed tests, and the skipped tests with their reasons.
GOTEST        = $(TOOLS)/gotestsum --format pkgname-and-test-fails --
# Time for each fuzz target in "make fuzz"; "make test" gives each 10 s.
FUZZTIME     ?= 60s
TOOLS         = $(DAXFS_TEST_CACHE)/tools
GOFUMPT      := mvdan.cc/gofumpt@v0.12.0
STATICCHECK  := honnef.co/go/tools/cmd/staticcheck@v0.8.2
KUSTOMIZE    := sigs.k8s.io/kustomize/kustomize/v5@v5.7.1
GOTESTSUM    := gotest.tools/gotestsum@v1.13.0
ERRORLINT    := github.com/polyfloyd/go-errorlint@v1.8.0

NFPM         := github.com/goreleaser/nfpm/v2/cmd/nfpm@v2.44.2
CYCLONEDX    := github.com/CycloneDX/cyclonedx-gomod/cmd/cyclonedx-gomod@v1.10.0

COMMANDS     := daxfs daxfs-snapshotter
UNIT_PKGS     = $$($(GO) list ./... | grep -v '/integration')

.PHONY: help build test test-deps test-unit test-integration test-kubernetes test-dist test-versions test-race test-short race fuzz fuzz-smoke lint bench demo demo-vm install uninstall dist man reproducible clean

help: ## List these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

build: $(COMMANDS:%=bin/%) ## Build both programs into bin/

# These always run, because the Go tool knows better than make what is up to date.
.PHONY: $(COMMANDS:%=bin/%)
$(COMMANDS:%=bin/%): bin/%:
	$(GOBUILD) -o $@ ./cmd/$*

test: test-deps ## All that CI runs: lint, unit, race, fuzz smoke, real containerd, QEMU (root; installs packages)
	$(MAKE) lint
	$(MAKE) test-unit
	$(MAKE) test-race
	$(MAKE) fuzz-smoke FUZZTIME=10s
	$(MAKE) test-integration

test-deps: ## Install the Debian packages that the tests use (root)
	.ci/deps test

test-unit: $(TOOLS)/gotestsum ## Test every package but integration/, and the reader of layers against podman's library
	$(GOTEST) -timeout 30m $(UNIT_PKGS)
	cd integration/podman && $(GO) test -tags exclude_graphdriver_btrfs ./...

test-integration: build $(TOOLS)/kustomize $(TOOLS)/nfpm $(TOOLS)/cyclonedx-gomod $(TOOLS)/gotestsum ## Test on real containerd, and kernels in QEMU
	$(GOTEST) -count 1 -timeout 40m -p 1 ./integration/...

# Not part of "make test", because it takes as long as all of that.
test-kubernetes: test-deps $(TOOLS)/kustomize $(TOOLS)/gotestsum ## Run critest beside overlayfs, a kubelet, and an API server (root; 20 minutes)
	.ci/deps kubernetes
	$(GOTEST) -tags kubernetes -count 1 -timeout 60m ./integration/kubernetes

# Not part of "make test", because it downloads two Debian systems and builds everything twice.
test-dist: $(TOOLS)/nfpm $(TOOLS)/cyclonedx-gomod $(TOOLS)/gotestsum ## Install packages in clean Debian systems, play the operator (root; installs packages)
	.ci/deps dist
	$(GOTEST) -tags dist -count 1 -timeout 60m ./integration/packages

# Builds four versions of containerd the first time.
test-versions: $(TOOLS)/nfpm $(TOOLS)/cyclonedx-gomod $(TOOLS)/gotestsum ## Try packages on versions of containerd, 1.7 to 2.4 (root; installs packages)
	.ci/deps dist
	$(GOTEST) -tags dist,versions -count 1 -timeout 60m -run TestVersions ./integration/packages

# Four packages at a time: several of them wait for clocks and disks.
test-short: $(TOOLS)/gotestsum ## Run the tests that need neither root nor packages, in about a minute
	$(GOTEST) -p 4 -short ./...

# Packages with concurrent code; test-race adds the tests of concurrent readers in ./daxfs. The others are single-threaded,
# or spend their time in the kernel; "make race" has them all.
RACE_PKGS     = ./converter ./converter/blob ./converter/chunked ./converter/internal/sink ./converter/recompress \
                ./converter/source/remote ./daemon ./mount/... ./pool/... ./snapshotter ./store/...

test-race: $(TOOLS)/gotestsum ## Test the concurrent packages with the race detector, briefly (needs gcc)
	CGO_ENABLED=1 $(GOTEST) -race -short -timeout 30m $(RACE_PKGS)
	CGO_ENABLED=1 $(GOTEST) -race -short -run 'TestProve|TestConcurrent|TestReadCache' ./daxfs

race: $(TOOLS)/gotestsum ## Test all but integration/ with the race detector (needs gcc)
	CGO_ENABLED=1 $(GOTEST) -race -timeout 40m $(UNIT_PKGS)

fuzz: ## Run every fuzz target for FUZZTIME (60s) each
	.ci/fuzz $(FUZZTIME)

fuzz-smoke: ## Run every fuzz target for FUZZTIME each (what "make test" does, with 10s)
	.ci/fuzz $(FUZZTIME)

$(TOOLS)/%:
	@mkdir -p $(TOOLS)
	GOFLAGS= GOBIN=$(TOOLS) $(GO) install $(TOOL)
$(TOOLS)/gofumpt: TOOL = $(GOFUMPT)
$(TOOLS)/staticcheck: TOOL = $(STATICCHECK)
$(TOOLS)/go-errorlint: TOOL = $(ERRORLINT)
$(TOOLS)/gotestsum: TOOL = $(GOTESTSUM)
$(TOOLS)/kustomize: TOOL = $(KUSTOMIZE)
$(TOOLS)/nfpm: TOOL = $(NFPM)
$(TOOLS)/cyclonedx-gomod: TOOL = $(CYCLONEDX)

lint: $(TOOLS)/gofumpt $(TOOLS)/staticcheck $(TOOLS)/go-errorlint ## Check format, vet, staticcheck, error wrapping
	@out=$$($(TOOLS)/gofumpt -l .); [ -z "$$out" ] || { echo "gofumpt: run $(TOOLS)/gofumpt -w on:"; echo "$$out"; exit 1; }
	$(GO) vet ./...
	$(GO) vet -tags kubernetes ./integration/kubernetes
	$(TOOLS)/staticcheck ./...
	$(TOOLS)/staticcheck -tags kubernetes ./integration/kubernetes
	$(GO) vet -tags dist,versions ./integration/packages
	$(TOOLS)/staticcheck -tags dist,versions ./integration/packages
	$(TOOLS)/go-errorlint -test=false ./...

bench: ## Compare with other snapshotters, converters and filesystems into bench-out/, then run the Go benchmarks (root)
	.ci/deps demo
	integration/bench/prepare
	rm -rf bench-out && mkdir bench-out
	trap 'exit 130' INT TERM; status=0; $(GO) run ./integration/bench $(BENCH) || status=1; \
	$(GO) test -run '^$$' -bench . -benchmem -timeout 60m $(UNIT_PKGS) >bench-out/go.txt || status=1; cat bench-out/go.txt; exit $$status

demo: ## Show the sharing: a private containerd, two images, the proof (root; installs packages; POOL=file or tmpfs)
	.ci/deps demo
	$(MAKE) build
	$(GO) run ./integration/demo $(if $(POOL),-pool $(POOL))

demo-vm: ## Show kernels that share a pool: two virtual machines start containers from it (root; installs packages)
	.ci/deps demo-vm
	$(MAKE) build
	$(GO) run ./integration/demovm

# Directories of shell completion scripts.
COMPLETION   := bash-completion/completions/daxfs zsh/site-functions/_daxfs fish/vendor_completions.d/daxfs.fish

# The directory from which install copies the programs. It builds nothing, because root need not have Go.
FROM         ?= bin
# The program that writes completion scripts. Name another one if the installed one is for another machine.
DAXFS        ?= $(FROM)/daxfs

install: ## Install the built programs, manual pages, completion, units and sample configuration (DESTDIR, PREFIX)
	@for c in $(COMMANDS); do [ -x $(FROM)/$$c ] || { echo "$(FROM)/$$c is missing: run \"make build\" first, as any user"; exit 1; }; done
	install -d $(DESTDIR)$(BINDIR)
	install -m 0755 $(COMMANDS:%=$(FROM)/%) $(DESTDIR)$(BINDIR)/
	for page in docs/man/*.[0-9]; do \
		install -D -m 0644 "$$page" "$(DESTDIR)$(MANDIR)/man$${page##*.}/$${page##*/}"; \
	done
	for file in $(COMPLETION); do \
		install -d "$(DESTDIR)$(DATADIR)/$${file%/*}"; \
		$(DAXFS) completion "$${file%%[-/]*}" >"$(DESTDIR)$(DATADIR)/$$file"; \
		chmod 0644 "$(DESTDIR)$(DATADIR)/$$file"; \
	done
	install -D -m 0644 -t $(DESTDIR)$(DATADIR)/daxfs/containerd config/containerd/*.toml
	install -d $(DESTDIR)$(UNITDIR)
	sed 's|^ExecStart=/usr/local/bin/|ExecStart=$(BINDIR)/|' docs/systemd/daxfs-snapshotter.service >$(DESTDIR)$(UNITDIR)/daxfs-snapshotter.service
	chmod 0644 $(DESTDIR)$(UNITDIR)/daxfs-snapshotter.service
	install -m 0644 docs/systemd/daxfs-snapshotter.socket $(DESTDIR)$(UNITDIR)/
	[ -e $(DESTDIR)$(SYSCONFDIR)/daxfs-snapshotter/config.toml ] || \
		install -D -m 0644 config/sample.toml $(DESTDIR)$(SYSCONFDIR)/daxfs-snapshotter/config.toml

uninstall: ## Remove what install put there; configuration and data stay
	rm -f $(COMMANDS:%=$(DESTDIR)$(BINDIR)/%) $(DESTDIR)$(UNITDIR)/daxfs-snapshotter.service $(DESTDIR)$(UNITDIR)/daxfs-snapshotter.socket $(COMPLETION:%=$(DESTDIR)$(DATADIR)/%)
	for page in docs/man/*.[0-9]; do rm -f "$(DESTDIR)$(MANDIR)/man$${page##*.}/$${page##*/}"; done
	rm -rf $(DESTDIR)$(DATADIR)/daxfs

# Architectures of a release.
ARCHITECTURES ?= amd64 arm64
# The directory that dist rebuilds.
DIST          ?= dist
# The modification time of all files in it. Only dist exports it, because mkfs.erofs in tests would obey it.
dist: export SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct 2>/dev/null || echo 0)

dist: build $(TOOLS)/nfpm $(TOOLS)/cyclonedx-gomod ## Make archives, .deb, .rpm, container image, SBOMs and checksums into dist/
	rm -rf $(DIST)
	for arch in $(ARCHITECTURES); do for c in $(COMMANDS); do \
		GOARCH=$$arch $(GOBUILD) -o $(DIST)/programs/$$arch/$$c ./cmd/$$c; \
	done; done
	GO="$(GO)" packaging/dist $(DIST) $(TOOLS) "$(VERSION)" $(DIST)/programs
	rm -r $(DIST)/programs

man: ## Make the manual pages anew from the commands and flags
	UPDATE_MAN=1 $(GO) test -count=1 -run TestManPage ./cmd/...

# Each build has a copy of the source in another directory, and an empty build cache.
reproducible: ## Build twice, in two directories and from nothing, and compare the bytes
	@dir=$$(mktemp -d); trap 'rm -rf "$$dir"' EXIT; \
	for n in 1 2; do \
		mkdir -p "$$dir/$$n"; tar -c --exclude=./.git --exclude=./bin . | tar -x -C "$$dir/$$n"; \
		GOCACHE="$$dir/cache$$n" $(MAKE) -s -C "$$dir/$$n" build VERSION=$(VERSION) COMMIT=$(COMMIT); \
	done; \
	for c in $(COMMANDS); do cmp "$$dir/1/bin/$$c" "$$dir/2/bin/$$c"; sha256sum "$$dir/1/bin/$$c" | sed "s|$$dir/1/||"; done

clean: ## Remove what build, bench and demo made here
	rm -rf bin dist bench-out
