// The softmax over a catalogue for one tile of rows, one tile of items after the other.
#pragma once

#include "norm.h"
#include "softmax.h"
#include "workspace.h"

namespace freshet::attention {
namespace {

static_assert(kSoftmaxItems % (2 * kLanes) == 0, "a tile of items is whole pairs of vectors");

// A tile of items, packed: turned [tall][kSoftmaxItems], then straight [kSoftmaxItems][wide]; zeros behind the last
// item.
struct PackedItems {
  explicit PackedItems(const Softmax& in)
      : wide(round_up(in.dim, kLanes)), tall(round_up(in.dim, 4)), straight_at(tall * kSoftmaxItems),
        floats(straight_at + kSoftmaxItems * wide) {}
  std::size_t wide, tall, straight_at, floats;
};

struct SoftmaxTile {
  SoftmaxTile(const Softmax& in, float* base) : arena(base) {
    wide = round_up(in.dim, kLanes), tall = round_up(in.dim, 4);
    x = arena.take(kSoftmaxRows * wide), x_t = arena.take(tall * kSoftmaxRows);
    gradient = arena.take(kSoftmaxRows * wide);
    weights = arena.take(in.tiles() * kSoftmaxRows * kSoftmaxItems);
  }
  float* weights_of(std::size_t item_tile) const { return weights + item_tile * kSoftmaxRows * kSoftmaxItems; }

  Arena arena;
  std::size_t wide, tall;
  float *x, *gradient;  // [kSoftmaxRows][wide]; x is times `scale`, in the end times the row's factor, too
  float* x_t;           // [tall][kSoftmaxRows]
  float* weights;       // [tiles][kSoftmaxRows][kSoftmaxItems]: scores, then exp(score - the row's highest)
};

inline std::size_t softmax_packed_floats(const Softmax& in) { return in.tiles() * PackedItems(in).floats; }
inline std::size_t softmax_tile_floats(const Softmax& in) { return SoftmaxTile(in, nullptr).arena.used(); }

inline void pack_items(const Softmax& in, float* packed) {
  const PackedItems layout(in);
  for (std::size_t tile = 0; tile < in.tiles(); ++tile, packed += layout.floats) {
    const std::size_t first = tile * kSoftmaxItems, count = smaller(kSoftmaxItems, in.items - first);
    float* const straight = packed + layout.straight_at;
    read_rows(in.item_vectors, Storage::kFloat32, first * in.dim, in.dim, count, in.dim, 1, straight, layout.wide);
    fill_zero(straight + count * layout.wide, (kSoftmaxItems - count) * layout.wide);
    transpose(straight, layout.wide, kSoftmaxItems, layout.tall, packed, kSoftmaxItems);
  }
}

// The larger one in each lane; a NaN of x is left out (its exponential is NaN again).
FRESHET_INLINE Floats highest(Floats best, Floats x) { return x > best ? x : best; }

FRESHET_INLINE float highest_of(Floats v) {
  float lanes[kLanes], best;
  store(lanes, v);
  best = lanes[0];
  for (std::size_t i = 1; i < kLanes; ++i) best = lanes[i] > best ? lanes[i] : best;
  return best;
}

// Scores of the rows for all items into s.weights, the highest of each row into `top`. Where a tile has fewer items the
// scores behind them are the lowest there are, and weigh nothing.
inline void softmax_scores(const Softmax& in, const float* packed, std::size_t count, const SoftmaxTile& s,
                           float* top) {
  constexpr float kLowest = -3.4028235e38f;
  const PackedItems layout(in);
  Floats best[kSoftmaxRows];
  for (std::size_t r = 0; r < count; ++r) best[r] = Floats{} + kLowest;
  for (std::size_t tile = 0; tile < in.tiles(); ++tile, packed += layout.floats) {
    float* const scores = s.weights_of(tile);
    multiply<1, false>(count, kSoftmaxItems / kLanes, in.dim, s.x_t, kSoftmaxRows, packed, kSoftmaxItems, scores,
                       kSoftmaxItems);
    const std::size_t items = smaller(kSoftmaxItems, in.items - tile * kSoftmaxItems);
    for (std::size_t r = 0; r < count; ++r) {
      float* const line = scores + r * kSoftmaxItems;
      for (std::size_t i = items; i < kSoftmaxItems; ++i) line[i] = kLowest;
      for (std::size_t i = 0; i < kSoftmaxItems; i += kLanes) best[r] = highest(best[r], load(line + i));
    }
  }
  for (std::size_t r = 0; r < count; ++r) top[r] = highest_of(best[r]);
}

// Scores -> exp(score - top), their sum by row into `sums`; and s.gradient = weights x items where `gradients`.
inline void softmax_weights(const Softmax& in, const float* packed, std::size_t count, const SoftmaxTile& s,
                            const float* top, bool gradients, float* sums) {
  const PackedItems layout(in);
  Floats sum[kSoftmaxRows] = {};
  fill_zero(s.gradient, kSoftmaxRows * s.wide);
  for (std::size_t tile = 0; tile < in.tiles(); ++tile, packed += layout.floats) {
    float* const weights = s.weights_of(tile);
    for (std::size_t r = 0; r < count; ++r) {
      float* const line = weights + r * kSoftmaxItems;
      for (std::size_t i = 0; i < kSoftmaxItems; i += kLanes) {
        const Floats weight = exp(load(line + i) - top[r]);
        sum[r] += weight;
        store(line + i, weight);
      }
    }
    if (!gradients) continue;
    multiply<kSoftmaxItems, true>(count, s.wide / kLanes, kSoftmaxItems, weights, 1, packed + layout.straight_at,
                                  s.wide, s.gradient, s.wide);
  }
  for (std::size_t r = 0; r < count; ++r) sums[r] = sum_of(sum[r]);
}

inline void softmax_rows(const Softmax& in, const float* packed, std::size_t first, std::size_t count, float* tile,
                         double* loss, float* gradient) {
  const SoftmaxTile s(in, tile);
  read_rows(in.vectors, Storage::kFloat32, first * in.dim, in.dim, count, in.dim, in.scale, s.x, s.wide);
  fill_zero(s.x + count * s.wide, (kSoftmaxRows - count) * s.wide);
  transpose(s.x, s.wide, kSoftmaxRows, s.tall, s.x_t, kSoftmaxRows);
  float top[kSoftmaxRows], own[kSoftmaxRows], sums[kSoftmaxRows];
  softmax_scores(in, packed, count, s, top);
  const auto wanted = [&](std::size_t r) { return static_cast<std::size_t>(in.wanted[first + r]); };
  for (std::size_t r = 0; r < count; ++r) {
    own[r] = s.weights_of(wanted(r) / kSoftmaxItems)[r * kSoftmaxItems + wanted(r) % kSoftmaxItems];
  }
  softmax_weights(in, packed, count, s, top, gradient != nullptr, sums);
  const float share = 1 / static_cast<float>(in.rows);
  for (std::size_t r = 0; r < count; ++r) {
    loss[r] = __builtin_log(static_cast<double>(sums[r])) - (static_cast<double>(own[r]) - top[r]);
    if (gradient == nullptr) continue;
    const float factor = share / sums[r];
    const float* const item = in.item_vectors + wanted(r) * in.dim;
    for (std::size_t d = 0; d < in.dim; ++d) {
      gradient[r * in.dim + d] = in.scale * (s.gradient[r * s.wide + d] * factor - item[d] * share);
    }
    for (std::size_t d = 0; d < s.wide; ++d) s.x[r * s.wide + d] *= factor;
  }
}

inline void softmax_item_gradients(const Softmax& in, std::size_t item_tile, std::size_t count, float* tile,
                                   float* sums_t) {
  const SoftmaxTile s(in, tile);
  multiply<1, true>(in.dim, kSoftmaxItems / kLanes, count, s.x, s.wide, s.weights_of(item_tile), kSoftmaxItems,
                    sums_t + item_tile * in.dim * kSoftmaxItems, kSoftmaxItems);
}

constexpr SoftmaxKernels kSoftmaxKernels = {softmax_packed_floats, softmax_tile_floats, pack_items, softmax_rows,
                                            softmax_item_gradients};

}  // namespace
}  // namespace freshet::attention
