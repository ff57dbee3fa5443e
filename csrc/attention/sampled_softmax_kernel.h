// The softmax over a row's own candidates, row by row, and what they give to an item.
#pragma once

#include "norm.h"
#include "sampled_softmax.h"
#include "workspace.h"

namespace freshet::attention {
namespace {

constexpr std::size_t kDots = 4;     // candidates at a time
constexpr std::size_t kSums = 4;     // vectors of a weighted sum at a time
constexpr std::size_t kFetched = 8;  // candidates sent for ahead

inline std::size_t sampled_wide(std::size_t dim) { return round_up(dim, kLanes); }

struct SampledRow {
  SampledRow(const SampledSoftmax& in, float* base) : arena(base) {
    weights = arena.take(round_up(in.candidates(), kLanes)), gradient = arena.take(sampled_wide(in.dim));
  }
  Arena arena;
  float *weights, *gradient;  // [candidates], in whole vectors, and [wide]
};

inline std::size_t sampled_row_floats(const SampledSoftmax& in) { return SampledRow(in, nullptr).arena.used(); }

FRESHET_INLINE std::size_t candidate(const SampledSoftmax& in, std::size_t row, std::size_t i) {
  return static_cast<std::size_t>(i == 0 ? in.wanted[row] : in.drawn[row * in.samples + i - 1]);
}

// out[n] = x . rows[n] for kCount rows.
template <std::size_t kCount>
FRESHET_INLINE void dots(const float* x, const float* const* rows, std::size_t wide, float* out) {
  Floats sum[kCount] = {};
  for (std::size_t d = 0; d < wide; d += kLanes) {
    const Floats own = load(x + d);
    for (std::size_t n = 0; n < kCount; ++n) sum[n] += own * load(rows[n] + d);
  }
  for (std::size_t n = 0; n < kCount; ++n) out[n] = sum_of(sum[n]);
}

// to[d] = sum over i < count of weight(i) * row(i)[d], for kVectors vectors of d.
template <std::size_t kVectors, typename Weight, typename Row>
FRESHET_INLINE void weighted_sum(std::size_t count, const Weight& weight, const Row& row, std::size_t d, float* to) {
  Floats sum[kVectors] = {};
  for (std::size_t i = 0; i < count; ++i) {
    const float* const from = row(i) + d;
    const float by = weight(i);
    for (std::size_t n = 0; n < kVectors; ++n) sum[n] += by * load(from + n * kLanes);
  }
  for (std::size_t n = 0; n < kVectors; ++n) store(to + d + n * kLanes, sum[n]);
}
template <typename Weight, typename Row>
FRESHET_INLINE void weighted_sum(std::size_t count, const Weight& weight, const Row& row, std::size_t wide, float* to) {
  std::size_t d = 0;
  for (; d + kSums * kLanes <= wide; d += kSums * kLanes) weighted_sum<kSums>(count, weight, row, d, to);
  for (; d < wide; d += kLanes) weighted_sum<1>(count, weight, row, d, to);
}

// Scores of the row's candidates, and exp(score - the highest) into `weights`, of which there are whole vectors; weight
// 0 for a drawn item that is the wanted one. Returns the loss, and in *sum what the weights add up to.
inline double sampled_weights(const SampledSoftmax& in, const float* x, const float* items, std::size_t row,
                              std::size_t wide, float* weights, float* sum) {
  constexpr float kLowest = -3.4028235e38f;
  const std::size_t count = in.candidates();
  const auto item = [&](std::size_t i) { return items + candidate(in, row, i) * wide; };
  const auto is_out = [&](std::size_t i) { return i != 0 && candidate(in, row, i) == candidate(in, row, 0); };
  std::size_t i = 0;
  for (; i + kDots <= count; i += kDots) {
    const float* rows[kDots];
    for (std::size_t n = 0; n < kDots; ++n) {
      rows[n] = item(i + n);
      if (i + n + kFetched >= count) continue;
      const float* const later = item(i + n + kFetched);
      for (std::size_t d = 0; d < wide; d += 16) __builtin_prefetch(later + d);
    }
    dots<kDots>(x, rows, wide, weights + i);
  }
  for (; i < count; ++i) {
    const float* const one = item(i);
    dots<1>(x, &one, wide, weights + i);
  }
  float top = in.scale * weights[0];
  const float own = top;
  for (i = 0; i < count; ++i) {
    weights[i] = is_out(i) ? kLowest : in.scale * weights[i];
    top = weights[i] > top ? weights[i] : top;
  }
  for (i = count; i % kLanes != 0; ++i) weights[i] = kLowest;
  for (i = 0; i < count; i += kLanes) store(weights + i, exp(load(weights + i) - top));
  *sum = 0;
  for (i = 0; i < count; ++i) {
    if (is_out(i)) weights[i] = 0;
    *sum += weights[i];
  }
  return __builtin_log(static_cast<double>(*sum)) - (static_cast<double>(own) - top);
}

inline void sampled_rows(const SampledSoftmax& in, const float* vectors, const float* items, std::size_t first,
                         std::size_t count, float* scratch, double* loss, float* gradient, float* slopes) {
  const SampledRow s(in, scratch);
  const std::size_t wide = sampled_wide(in.dim), candidates = in.candidates();
  const float share = in.scale / static_cast<float>(in.rows);
  for (std::size_t r = 0; r < count; ++r) {
    const std::size_t row = first + r;
    float sum;
    loss[r] = sampled_weights(in, vectors + row * wide, items, row, wide, s.weights, &sum);
    if (gradient == nullptr) continue;
    float* const slope = slopes + r * candidates;
    for (std::size_t i = 0; i < candidates; ++i) slope[i] = s.weights[i] / sum * share;
    slope[0] -= share;
    weighted_sum(
        candidates, [&](std::size_t i) { return slope[i]; },
        [&](std::size_t i) { return items + candidate(in, row, i) * wide; }, wide, s.gradient);
    __builtin_memcpy(gradient + r * in.dim, s.gradient, in.dim * sizeof(float));
  }
}

inline void sampled_item_gradient(const SampledSoftmax& in, const float* vectors, const Slope* slopes,
                                  std::size_t count, float* gradient) {
  const std::size_t wide = sampled_wide(in.dim);
  float sum[kSums * kLanes];
  for (std::size_t d = 0; d < wide; d += kSums * kLanes) {
    const std::size_t floats = smaller(kSums * kLanes, wide - d);
    weighted_sum(
        count, [&](std::size_t i) { return slopes[i].value; },
        [&](std::size_t i) { return vectors + slopes[i].row * wide + d; }, floats, sum);
    __builtin_memcpy(gradient + d, sum, smaller(floats, in.dim - d) * sizeof(float));
  }
}

constexpr SampledSoftmaxKernels kSampledSoftmaxKernels = {sampled_wide, sampled_row_floats, sampled_rows,
                                                          sampled_item_gradient};

}  // namespace
}  // namespace freshet::attention
