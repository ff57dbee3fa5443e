// Layer norm, dropout and packed matrices on a tile of rows.
#pragma once

#include "gemm.h"
#include "layer.h"
#include "pack.h"

namespace freshet::attention {
namespace {

constexpr std::size_t kLayerRows = 48;

FRESHET_INLINE float sum_of(Floats v) {
  float lanes[kLanes], sum = 0;
  store(lanes, v);
  for (std::size_t i = 0; i < kLanes; ++i) sum += lanes[i];
  return sum;
}

// hat = (row - mean) / deviation, zeros behind `width`; returns 1 / deviation. `row` has zeros behind `width`.
inline float normalise(const float* row, std::size_t width, std::size_t wide, float epsilon, float* hat) {
  Floats sum = {};
  for (std::size_t i = 0; i < wide; i += kLanes) sum += load(row + i);
  const float mean = sum_of(sum) / static_cast<float>(width);
  for (std::size_t i = 0; i < wide; i += kLanes) store(hat + i, load(row + i) - mean);
  for (std::size_t i = width; i < wide; ++i) hat[i] = 0;
  Floats squares = {};
  for (std::size_t i = 0; i < wide; i += kLanes) squares += load(hat + i) * load(hat + i);
  const float inverse = 1 / __builtin_sqrtf(sum_of(squares) / static_cast<float>(width) + epsilon);
  for (std::size_t i = 0; i < wide; i += kLanes) store(hat + i, load(hat + i) * inverse);
  return inverse;
}

// normed = hat * weight + bias.
inline void scale_and_shift(const LayerNorm& norm, const float* hat, std::size_t width, float* normed) {
  for (std::size_t i = 0; i < width; ++i) {
    normed[i] = norm.weight != nullptr ? hat[i] * norm.weight[i] + norm.bias[i] : hat[i];
  }
}

// Gradient of the row from that of the normed row (destroyed; zeros behind `width`), and shares of weight and bias.
inline void normalise_backward(const LayerNorm& norm, const float* hat, float inverse, std::size_t width,
                               std::size_t wide, float* gradient, float* weight_sum, float* bias_sum) {
  if (norm.weight != nullptr) {
    for (std::size_t i = 0; i < width; ++i) {
      weight_sum[i] += gradient[i] * hat[i];
      bias_sum[i] += gradient[i];
      gradient[i] *= norm.weight[i];
    }
  }
  Floats sum = {}, product = {};
  for (std::size_t i = 0; i < wide; i += kLanes) {
    sum += load(gradient + i);
    product += load(gradient + i) * load(hat + i);
  }
  const float mean = sum_of(sum) / static_cast<float>(width), slope = sum_of(product) / static_cast<float>(width);
  for (std::size_t i = 0; i < wide; i += kLanes) {
    store(gradient + i, (load(gradient + i) - mean - load(hat + i) * slope) * inverse);
  }
}

// A matrix [depth][columns] as panels of two vectors: panel after panel, each [depth][2 * kLanes], the last one maybe
// of one vector. element(k, n) gives the numbers.
template <typename F>
void pack_panels(std::size_t depth, std::size_t columns, float* to, const F& element) {
  const std::size_t wide = round_up(columns, kLanes);
  for (std::size_t first = 0; first < wide; first += 2 * kLanes) {
    const std::size_t panel = smaller(2 * kLanes, wide - first);
    for (std::size_t k = 0; k < depth; ++k) {
      for (std::size_t n = 0; n < panel; ++n) *to++ = first + n < columns ? element(k, first + n) : 0;
    }
  }
}

// c[rows][wide] = a * panels, with a turned: number (row, k) at k * step_k + row.
inline void multiply_panels(std::size_t rows, std::size_t columns, std::size_t depth, const float* a,
                            std::size_t step_k, const float* panels, float* c, std::size_t ldc) {
  const std::size_t wide = round_up(columns, kLanes);
  for (std::size_t first = 0; first < wide; first += 2 * kLanes) {
    const std::size_t panel = smaller(2 * kLanes, wide - first);
    multiply<1, false>(rows, panel / kLanes, depth, a, step_k, panels, panel, c + first, ldc);
    panels += depth * panel;
  }
}

// Reads rows [first, first + count) of an array [rows][width] into lines of `wide` floats; the lines up to a multiple
// of 4 are zeros.
inline void read_tile(const float* from, std::size_t first, std::size_t count, std::size_t width, float* to,
                      std::size_t wide) {
  read_rows(from, Storage::kFloat32, first * width, width, count, width, 1, to, wide);
  fill_zero(to + count * wide, (round_up(count, 4) - count) * wide);
}

// 32 well-mixed bits of (seed, row): the key of a row's dropout.
inline std::uint32_t dropout_key(std::uint64_t seed, std::size_t row) {
  std::uint64_t x = seed + (static_cast<std::uint64_t>(row) + 1) * 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return static_cast<std::uint32_t>((x ^ (x >> 31)) >> 32);
}

// factor[i] = 0 with the probability `dropout`, else 1 / (1 - dropout); the same for the same seed, row and column.
inline void dropout_factors(float dropout, std::uint64_t seed, std::size_t row, std::size_t wide, float* factor) {
  typedef std::uint32_t Bits __attribute__((vector_size(kLanes * 4)));
  const auto limit = static_cast<std::int32_t>(static_cast<double>(dropout) * 16777216);
  const float kept = 1 / (1 - dropout);
  Bits column;
  for (std::size_t lane = 0; lane < kLanes; ++lane) column[lane] = static_cast<std::uint32_t>(lane);
  const std::uint32_t key = dropout_key(seed, row);
  for (std::size_t i = 0; i < wide; i += kLanes, column += static_cast<std::uint32_t>(kLanes)) {
    Bits x = column * 0x9E3779B9u + key;
    x = (x ^ (x >> 16)) * 0x85EBCA6Bu;
    x = (x ^ (x >> 13)) * 0xC2B2AE35u;
    x = (x ^ (x >> 16)) >> 8;
    store(factor + i, (Ints)x < limit ? Floats{} : Floats{} + kept);
  }
}

}  // namespace
}  // namespace freshet::attention
