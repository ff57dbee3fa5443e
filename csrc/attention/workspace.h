// The scratch memory of one task.
#pragma once

#include "bias.h"
#include "pack.h"

namespace freshet::attention {
namespace {

// Hands out parts of a block; without a block it only counts.
class Arena {
 public:
  explicit Arena(float* base) : base_(base) {}
  float* take(std::size_t count) {
    float* const part = base_ != nullptr ? base_ + used_ : nullptr;
    used_ += round_up(count, 16);
    return part;
  }
  std::size_t used() const { return used_; }

 private:
  float* base_;
  std::size_t used_ = 0;
};

// "_t" is transposed: a tile's keys (or rows) run fastest. Widths are padded to whole vectors ("wide") or to 4
// ("tall").
struct Workspace {
  Workspace(const Task& task, bool backward, float* scratch) : arena(scratch) {
    const std::size_t heads = task.in->heads, rows = task.row_tile;
    wide_qk = round_up(task.in->dqk, kLanes), wide_v = round_up(task.in->dv, kLanes);
    tall_qk = round_up(task.in->dqk, 4), tall_v = round_up(task.in->dv, 4);
    tiles = (task.keys + kKeyTile - 1) / kKeyTile;
    packed = reinterpret_cast<std::int32_t*>(arena.take(tiles));
    staging = arena.take(kKeyTile * larger(wide_qk, wide_v));
    key_t = arena.take(heads * tiles * tall_qk * kKeyTile);
    query_t = arena.take(heads * tall_qk * rows);
    score = arena.take(rows * kKeyTile);
    bias_tile = arena.take(rows * kKeyTile);
    buckets = reinterpret_cast<std::int32_t*>(arena.take(rows * kKeyTile));
    if (backward) {
      key = arena.take(heads * tiles * kKeyTile * wide_qk);
      value_t = arena.take(heads * tiles * tall_v * kKeyTile);
      key_gradient_t = arena.take(heads * tiles * tall_qk * kKeyTile);
      value_gradient_t = arena.take(heads * tiles * tall_v * kKeyTile);
      query = arena.take(heads * rows * wide_qk);
      query_gradient = arena.take(heads * rows * wide_qk);
      y_gradient = arena.take(heads * rows * wide_v);
      y_gradient_t = arena.take(heads * tall_v * rows);
      score_gradient = arena.take(rows * kKeyTile);
      bias_gradient = arena.take(rows * kKeyTile);
    } else {
      query = arena.take(rows * wide_qk);
      value = arena.take(heads * tiles * kKeyTile * wide_v);
      y = arena.take(heads * rows * wide_v);
    }
    set_bias_arrays(task, backward, scratch != nullptr);
  }

  void set_bias_arrays(const Task& task, bool backward, bool fill) {
    bias = Bias{&task, nullptr, nullptr, 0, nullptr, 0, false, nullptr, nullptr};
    const std::size_t span = task.keys + tiles * kKeyTile;
    if (task.in->position_weights != nullptr) {
      bias.position = arena.take(span);
      if (backward) bias.position_sum = arena.take(span);
      if (fill) {
        if (backward) fill_zero(bias.position_sum, span), bias.position_sum += task.keys;
        bias.position += task.keys;
        set_position_weights(bias);
      }
    }
    if (task.in->time_weights == nullptr) return;
    bias.time_weights = arena.take(kTimeBoundaries);
    bias.key_time = reinterpret_cast<std::int32_t*>(arena.take(tiles * kKeyTile));
    if (backward) bias.time_sum = arena.take(kTimeBuckets * kLanes);
    if (!fill) return;
    if (backward) fill_zero(bias.time_sum, kTimeBuckets * kLanes);
    set_times(bias);
  }

  Arena arena;
  Bias bias;
  std::size_t wide_qk, wide_v, tall_qk, tall_v, tiles;
  std::int32_t* packed;   // [tiles], 1 when the tile's keys and values are here
  std::int32_t* buckets;  // [rows][kKeyTile], as are score, bias_tile and the gradients of scores
  float *staging, *score, *bias_tile, *score_gradient = nullptr, *bias_gradient = nullptr;
  float *key_t, *key_gradient_t = nullptr;                                       // [heads][tiles][tall_qk][kKeyTile]
  float *value_t = nullptr, *value_gradient_t = nullptr;                         // [heads][tiles][tall_v][kKeyTile]
  float *key = nullptr, *value = nullptr;                                        // [heads][tiles * kKeyTile][wide]
  float *query, *query_gradient = nullptr, *y = nullptr, *y_gradient = nullptr;  // [heads][rows][wide]
  float *query_t, *y_gradient_t = nullptr;                                       // [heads][tall][rows]
};

}  // namespace
}  // namespace freshet::attention
