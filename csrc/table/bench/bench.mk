# make bench-table: builds build/bench_table, the table beside its peers (included by csrc/Makefile).
# The peers are Debian's libcuckoo-dev and libabsl-dev; nothing else in the project needs them.

BENCH_PACKAGES := libcuckoo-dev libabsl-dev
BENCH_SOURCES := $(wildcard table/bench/*.cc)
BENCH_HEADERS := $(wildcard table/bench/*.h common/*.h)
BENCH_LIBRARIES = $(shell pkg-config --libs absl_flat_hash_map absl_hash 2>/dev/null || \
	echo -labsl_hash -labsl_city -labsl_low_level_hash -labsl_raw_hash_set -labsl_hashtablez_sampler \
	-labsl_raw_logging_internal)

.PHONY: bench-table bench-peers
bench-table: $(BUILD)/bench_table

bench-peers:
	@if ! printf '#include <%s>\n' libcuckoo/cuckoohash_map.hh absl/container/flat_hash_map.h | \
	    $(CXX) -std=c++17 -fsyntax-only -x c++ - 2>/dev/null; then \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    echo "installing $(BENCH_PACKAGES) (the structures to compare with)"; \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $(BENCH_PACKAGES) >/dev/null; \
	  else \
	    echo "error: the structures to compare with are missing; run: sudo apt-get install -y $(BENCH_PACKAGES)" >&2; \
	    exit 1; \
	  fi; \
	fi

BENCH_INPUTS := $(BENCH_SOURCES) $(BENCH_HEADERS) $(TABLE_SOURCES) $(TABLE_HEADERS) Makefile table/bench/bench.mk
$(BUILD)/bench_table: $(BENCH_INPUTS) | bench-peers
	@mkdir -p $(BUILD)
	$(CXX) $(COMMON) $(OPTIMIZE) $(BENCH_SOURCES) $(TABLE_SOURCES) $(BENCH_LIBRARIES) -o $@
