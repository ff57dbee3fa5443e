// The kernels for AVX2 and FMA. Built with those instructions switched on; called only where the CPU has them.
#if defined(__x86_64__)
#include <immintrin.h>

#include "task.h"

namespace freshet::attention {
namespace {

struct Isa {
  static constexpr std::size_t kLanes = 8;
  static constexpr std::size_t kBlockRows = 6;
  typedef float Floats __attribute__((vector_size(32)));
  typedef std::int32_t Ints __attribute__((vector_size(32)));
  static Floats lookup(const float* table, Ints index) { return (Floats)_mm256_i32gather_ps(table, (__m256i)index, 4); }
  static Ints lookup(const std::int32_t* table, Ints index) {
    return (Ints)_mm256_i32gather_epi32(table, (__m256i)index, 4);
  }
  static bool all_equal(Ints v) {
    const __m256i first = _mm256_broadcastd_epi32(_mm256_castsi256_si128((__m256i)v));
    return _mm256_movemask_epi8(_mm256_cmpeq_epi32((__m256i)v, first)) == -1;
  }
};

}  // namespace
}  // namespace freshet::attention

#include "kernel.h"
#include "layer_kernel.h"
#include "sampled_softmax_kernel.h"
#include "softmax_kernel.h"

namespace freshet::attention {
const Kernels kAvx2Kernels = {"avx2", scratch_floats, forward_task, backward_task, &kLayerKernels,
                              &kSoftmaxKernels, &kSampledSoftmaxKernels};
}  // namespace freshet::attention
#endif
