# Builds csrc/attention -> ../model/_native/freshet_attention*.so and its C++ test. Included by ../Makefile.
# The kernels are built once per instruction set and chosen when the program runs. Unlike the rest they may contract
# multiply and add: their promises (see attention.h) are about one machine.

ATTENTION_KERNELS := portable avx2 avx512
ATTENTION_X86 := $(findstring x86_64,$(shell $(CXX) -dumpmachine))
ATTENTION_FLAGS_avx2 := $(if $(ATTENTION_X86),-mavx2 -mfma)
ATTENTION_FLAGS_avx512 := $(if $(ATTENTION_X86),-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma)
ATTENTION_PARTS := attention dispatch layer sampled_softmax softmax time_table $(ATTENTION_KERNELS:%=kernel_%)
ATTENTION_HEADERS := $(wildcard attention/*.h common/*.h)
ATTENTION_KERNEL_FLAGS = -ffp-contract=fast $(ATTENTION_FLAGS_$(patsubst kernel_%,%,$*))

# attention_objects: directory, flags. One object per part.
define attention_objects
$(BUILD)/$(1)/%.o: attention/%.cc $(ATTENTION_HEADERS) Makefile attention/attention.mk $(BUILD)/flags
	@mkdir -p $$(@D)
	$(CXX) $(COMMON) $(2) $$(if $$(findstring kernel_,$$*),$$(ATTENTION_KERNEL_FLAGS)) -fPIC -fvisibility=hidden \
	  -c $$< -o $$@
endef
$(eval $(call attention_objects,attention,$(OPTIMIZE)))
$(eval $(call attention_objects,attention_asan,$(ASAN)))
$(eval $(call attention_objects,attention_tsan,$(TSAN)))
.SECONDARY: $(foreach kind,attention attention_asan attention_tsan,$(ATTENTION_PARTS:%=$(BUILD)/$(kind)/%.o))

.PHONY: attention attention_test attention_asan attention_tsan attention_clean
attention:
	$(if $(word 3,$(PY_FACTS)),,$(error '$(PYTHON)' has no pybind11; run make with PYTHON=<the project's python>))
	@$(MAKE) --no-print-directory $(NATIVE)/freshet_attention$(word 1,$(PY_FACTS))
all: attention

$(NATIVE)/freshet_attention%: attention/bindings.cc $(ATTENTION_PARTS:%=$(BUILD)/attention/%.o)
	@mkdir -p $(NATIVE)
	$(CXX) $(COMMON) $(OPTIMIZE) -fPIC -shared -fvisibility=hidden $(PY_INCLUDE) $^ -o $@.tmp
	mv $@.tmp $@

$(BUILD)/attention_test: FLAGS = $(OPTIMIZE)
$(BUILD)/attention_asan_test: FLAGS = $(ASAN)
$(BUILD)/attention_tsan_test: FLAGS = $(TSAN)
$(BUILD)/%_test: $(wildcard attention/*_test.cc) \
  $(addprefix $(BUILD)/%/,$(ATTENTION_PARTS:=.o))
	$(CXX) $(COMMON) $(FLAGS) $^ -o $@

attention_test: $(BUILD)/attention_test
	./$<
attention_asan: $(BUILD)/attention_asan_test
	./$<
attention_tsan: $(BUILD)/attention_tsan_test
	./$<
attention_clean:
	rm -f $(NATIVE)/freshet_attention*.so
test: attention_test
asan: attention_asan
tsan: attention_tsan
clean: attention_clean
