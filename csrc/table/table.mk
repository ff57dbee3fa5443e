# Builds csrc/table -> ../model/_native/freshet_table*.so and its C++ tests. Included by ../Makefile.

TABLE_PARTS := checksum embedding_table embedding_table_batch embedding_table_delta embedding_table_insert embedding_table_read embedding_table_sweep \
	embedding_table_write index row_codec serving_table serving_table_read snapshot_scan
TABLE_BINDINGS := bindings checksum_bindings serving_bindings snapshot_bindings
TABLE_TESTS := checksum_test embedding_table_test embedding_table_insert_test embedding_table_model_test \
	embedding_table_memory_test embedding_table_stress flight_test index_test insertion_memory_test reclaimer_test \
	row_codec_test serving_table_test serving_table_stress
# What runs in several threads, and so is worth ThreadSanitizer's time.
TABLE_CONCURRENT := embedding_table_insert_test embedding_table_model_test embedding_table_stress index_test \
	reclaimer_test serving_table_stress
TABLE_SOURCES := $(TABLE_PARTS:%=table/%.cc)
TABLE_HEADERS := $(wildcard table/*.h common/*.h)

# table_objects: directory, flags. One object per source.
define table_objects
$(BUILD)/$(1)/%.o: table/%.cc $(TABLE_HEADERS) Makefile table/table.mk $(BUILD)/flags
	@mkdir -p $$(@D)
	$(CXX) $(COMMON) $(2) -fPIC -fvisibility=hidden $$(if $$(findstring bindings,$$*),$$(PY_INCLUDE)) -c $$< -o $$@
endef
$(eval $(call table_objects,table,$(OPTIMIZE)))
$(eval $(call table_objects,table_asan,$(ASAN)))
$(eval $(call table_objects,table_tsan,$(TSAN)))
.SECONDARY: $(foreach kind,table table_asan table_tsan,$(foreach part,$(TABLE_PARTS) $(TABLE_BINDINGS) $(TABLE_TESTS),$(BUILD)/$(kind)/$(part).o))

.PHONY: table table_test table_asan table_tsan table_clean
table:
	$(if $(word 3,$(PY_FACTS)),,$(error '$(PYTHON)' has no pybind11; run make with PYTHON=<the project's python>))
	@$(MAKE) --no-print-directory $(NATIVE)/freshet_table$(word 1,$(PY_FACTS))
all: table

# Written to a temporary name and moved, so a running process keeps the file it has loaded.
$(NATIVE)/freshet_table%: $(TABLE_PARTS:%=$(BUILD)/table/%.o) $(TABLE_BINDINGS:%=$(BUILD)/table/%.o)
	@mkdir -p $(NATIVE)
	$(CXX) $(COMMON) $(OPTIMIZE) -shared $^ -o $@.tmp
	mv $@.tmp $@

# table_runs: name of the target, directory, flags, programs. Each of them in turn.
define table_runs
$(4:%=$(BUILD)/$(2)/%): $(BUILD)/$(2)/%: $(BUILD)/$(2)/%.o $(TABLE_PARTS:%=$(BUILD)/$(2)/%.o)
	$(CXX) $(COMMON) $(3) $$^ -o $$@
$(1): $(4:%=$(BUILD)/$(2)/%)
	@for test in $$^; do echo $$$$test; $$$$test || exit 1; done
endef
$(eval $(call table_runs,table_test,table,$(OPTIMIZE),$(TABLE_TESTS)))
$(eval $(call table_runs,table_asan,table_asan,$(ASAN),$(TABLE_TESTS)))
$(eval $(call table_runs,table_tsan,table_tsan,$(TSAN),$(TABLE_CONCURRENT)))

table_clean:
	rm -f $(NATIVE)/freshet_table*.so
test: table_test
asan: table_asan
tsan: table_tsan
clean: table_clean
