# posthouse. Two commands on a fresh Debian 12 with Go and git:
#
#	make run     a demo with backends of its own, without root
#	make test    everything, against real Cyrus and real Dovecot (asks sudo)

SHELL := /bin/bash
TOOL  := go tool -modfile=tools/go.mod

.PHONY: build run deps vet lint unit integration test bench clean

build:
	go build -o bin/posthouse ./cmd/posthouse

run: build
	exec bin/posthouse demo

# Real servers, stock clients and the race detector's compiler. Instant when all
# is there.
deps:
	tools/deps

vet:
	go vet ./...
	go vet -tags bench ./integration

lint:
	@unformatted=$$(gofmt -l .); [ -z "$$unformatted" ] || { echo "gofmt -w these:" $$unformatted; exit 1; }
	$(TOOL) staticcheck ./...

unit:
	$(TOOL) gotestsum --format pkgname-and-test-fails --raw-command -- tools/testall unit

integration:
	$(TOOL) gotestsum --format testname --raw-command -- tools/testall integration

test: deps vet lint
	$(TOOL) gotestsum --format pkgname-and-test-fails --raw-command -- tools/testall unit integration

# What LMTP costs beside Dovecot's proxy, and how long a switch takes
# (docs/benchmarks.md, docs/switchover.md), in twenty minutes, on a machine that does
# nothing else. TMPDIR: the mail goes to memory.
bench: deps build
	go vet -tags bench ./integration
	POSTHOUSE_BUILT=$(CURDIR)/bin go test -tags bench -count=1 -timeout 60m -v -run '^TestBench' \
		-exec "$$([ "$$(id -u)" = 0 ] || echo sudo --preserve-env=POSTHOUSE_BUILT) env TMPDIR=/dev/shm" ./integration

clean:
	rm -rf bin
