// The kernels for AVX-512 (F, BW, DQ, VL). Built with those instructions switched on; called only where the CPU has
// them.
#if defined(__x86_64__)
#include <immintrin.h>

#include "task.h"

namespace freshet::attention {
namespace {

struct Isa {
  static constexpr std::size_t kLanes = 16;
  static constexpr std::size_t kBlockRows = 12;
  typedef float Floats __attribute__((vector_size(64)));
  typedef std::int32_t Ints __attribute__((vector_size(64)));

  // table[index] for 128 entries, held in eight registers: several times faster than a gather.
  static Ints lookup(const std::int32_t* table, Ints index) {
    const __m512i i = (__m512i)index;
    __m512i part[4];
    for (int n = 0; n < 4; ++n) {
      part[n] = _mm512_permutex2var_epi32(_mm512_load_si512(table + 32 * n), i, _mm512_load_si512(table + 32 * n + 16));
    }
    const __mmask16 odd = _mm512_test_epi32_mask(i, _mm512_set1_epi32(32));
    const __mmask16 upper = _mm512_test_epi32_mask(i, _mm512_set1_epi32(64));
    const __m512i low = _mm512_mask_blend_epi32(odd, part[0], part[1]);
    const __m512i high = _mm512_mask_blend_epi32(odd, part[2], part[3]);
    return (Ints)_mm512_mask_blend_epi32(upper, low, high);
  }
  static Floats lookup(const float* table, Ints index) {
    const __m512i i = (__m512i)index;
    __m512 part[4];
    for (int n = 0; n < 4; ++n) {
      part[n] = _mm512_permutex2var_ps(_mm512_load_ps(table + 32 * n), i, _mm512_load_ps(table + 32 * n + 16));
    }
    const __mmask16 odd = _mm512_test_epi32_mask(i, _mm512_set1_epi32(32));
    const __mmask16 upper = _mm512_test_epi32_mask(i, _mm512_set1_epi32(64));
    const __m512 low = _mm512_mask_blend_ps(odd, part[0], part[1]);
    const __m512 high = _mm512_mask_blend_ps(odd, part[2], part[3]);
    return (Floats)_mm512_mask_blend_ps(upper, low, high);
  }
  static bool all_equal(Ints v) {
    const __m512i first = _mm512_set1_epi32(v[0]);
    return _mm512_cmpeq_epi32_mask((__m512i)v, first) == 0xffff;
  }
};

}  // namespace
}  // namespace freshet::attention

#include "kernel.h"
#include "layer_kernel.h"
#include "sampled_softmax_kernel.h"
#include "softmax_kernel.h"

namespace freshet::attention {
const Kernels kAvx512Kernels = {"avx512", scratch_floats, forward_task, backward_task, &kLayerKernels,
                                &kSoftmaxKernels, &kSampledSoftmaxKernels};
}  // namespace freshet::attention
#endif
