// C (+)= A B for the small matrices of one tile: B and C are rows of whole vectors, A is read one number at a time.
#pragma once

#include "simd.h"

namespace freshet::attention {
namespace {

// C[m][n]: rows of ldc floats. B[k][n]: rows of ldb floats. A[m][k] at m * kStepM + k * step_k.
// kStepM is known at compile time, so the block's addresses need one register. Each element of C is one chain of
// additions in the order of k, whatever block it falls into.
template <int kRows, int kVectors, std::size_t kStepM, bool kAdd>
FRESHET_INLINE void block(std::size_t depth, const float* a, std::size_t step_k, const float* b, std::size_t ldb,
                          float* c, std::size_t ldc) {
  Floats sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 2
    for (int n = 0; n < kVectors; ++n) sum[m][n] = kAdd ? load(c + m * ldc + n * kLanes) : Floats{};
  }
  for (std::size_t k = 0; k < depth; ++k, a += step_k, b += ldb) {
    Floats right[kVectors];
#pragma GCC unroll 2
    for (int n = 0; n < kVectors; ++n) right[n] = load(b + n * kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 2
      for (int n = 0; n < kVectors; ++n) sum[m][n] += a[m * kStepM] * right[n];
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 2
    for (int n = 0; n < kVectors; ++n) store(c + m * ldc + n * kLanes, sum[m][n]);
  }
}

using Block = void (*)(std::size_t, const float*, std::size_t, const float*, std::size_t, float*, std::size_t);

template <int kRows, int kVectors, std::size_t kStepM, bool kAdd>
void block_of(std::size_t depth, const float* a, std::size_t step_k, const float* b, std::size_t ldb, float* c,
              std::size_t ldc) {
  block<kRows, kVectors, kStepM, kAdd>(depth, a, step_k, b, ldb, c, ldc);
}

template <int kVectors, std::size_t kStepM, bool kAdd>
Block choose(std::size_t rows) {
  static constexpr Block table[] = {
      nullptr,
      block_of<1, kVectors, kStepM, kAdd>,
      block_of<2, kVectors, kStepM, kAdd>,
      block_of<3, kVectors, kStepM, kAdd>,
      block_of<4, kVectors, kStepM, kAdd>,
      block_of<5, kVectors, kStepM, kAdd>,
      block_of<6, kVectors, kStepM, kAdd>,
#if defined(__AVX512F__)
      block_of<7, kVectors, kStepM, kAdd>,
      block_of<8, kVectors, kStepM, kAdd>,
      block_of<9, kVectors, kStepM, kAdd>,
      block_of<10, kVectors, kStepM, kAdd>,
      block_of<11, kVectors, kStepM, kAdd>,
      block_of<12, kVectors, kStepM, kAdd>,
#endif
  };
  return table[rows];
}

// rows x (vectors * kLanes) of C. Rows are cut into blocks of nearly equal height, at most Isa::kBlockRows.
template <std::size_t kStepM, bool kAdd>
void multiply(std::size_t rows, std::size_t vectors, std::size_t depth, const float* a, std::size_t step_k,
              const float* b, std::size_t ldb, float* c, std::size_t ldc) {
  const std::size_t blocks = (rows + Isa::kBlockRows - 1) / Isa::kBlockRows;
  for (std::size_t i = 0; i < blocks; ++i) {
    const std::size_t first = rows * i / blocks, count = rows * (i + 1) / blocks - first;
    const Block pair = choose<2, kStepM, kAdd>(count), single = choose<1, kStepM, kAdd>(count);
    std::size_t n = 0;
    for (; n + 2 <= vectors; n += 2) {
      pair(depth, a + first * kStepM, step_k, b + n * kLanes, ldb, c + first * ldc + n * kLanes, ldc);
    }
    if (n < vectors) {
      single(depth, a + first * kStepM, step_k, b + n * kLanes, ldb, c + first * ldc + n * kLanes, ldc);
    }
  }
}

}  // namespace
}  // namespace freshet::attention
