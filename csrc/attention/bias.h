// Position and time bias of one score tile, and the gradient of its weights.
#pragma once

#include "rows.h"

namespace freshet::attention {
namespace {

// Of one task. Any of the arrays may be null: that part of the bias is absent, or no gradient is asked for.
struct Bias {
  const Task* task;
  float* position;      // position[j - end]: the weight of key j for a row that counts from `end`
  float* time_weights;  // [128], aligned; the last bucket's weight apart
  float last_time_weight;
  std::int32_t* key_time;  // [keys, padded with 0] seconds after `base`
  std::int64_t base;
  bool near;            // all gaps of the sequence are below 2^31 seconds
  float* position_sum;  // gradient, laid out as `position`
  float* time_sum;      // [kTimeBuckets][kLanes]: a partial sum per lane
  bool present() const { return position != nullptr || time_weights != nullptr; }
};

inline std::int64_t wrapping_difference(std::int64_t a, std::int64_t b) {
  return static_cast<std::int64_t>(static_cast<std::uint64_t>(a) - static_cast<std::uint64_t>(b));
}

inline void set_position_weights(Bias& bias) {
  const Inputs& in = *bias.task->in;
  const auto keys = static_cast<std::int64_t>(bias.task->keys);
  const auto padded = static_cast<std::int64_t>(round_up(bias.task->keys, kKeyTile));
  for (std::int64_t x = -keys; x < padded; ++x) {
    const std::size_t distance = x < 0 ? static_cast<std::size_t>(-x) : 0;
    bias.position[x] = in.position_weights[smaller(distance, in.positions - 1)];
  }
}

inline void set_times(Bias& bias) {
  const Task& task = *bias.task;
  const std::int64_t* key_time = task.in->key_time + task.first_key;
  const std::int64_t* query_time = task.in->query_time + task.first_row;
  std::int64_t low = key_time[0], high = key_time[0];
  for (std::size_t i = 0; i < task.keys; ++i) {
    low = key_time[i] < low ? key_time[i] : low;
    high = key_time[i] > high ? key_time[i] : high;
  }
  for (std::size_t i = 0; i < task.rows; ++i) {
    low = query_time[i] < low ? query_time[i] : low;
    high = query_time[i] > high ? query_time[i] : high;
  }
  const std::uint64_t range = static_cast<std::uint64_t>(high) - static_cast<std::uint64_t>(low);
  bias.base = low;
  bias.near = range < (std::uint64_t{1} << 31);
  const std::size_t padded = round_up(task.keys, kKeyTile);
  for (std::size_t i = 0; i < padded; ++i) {
    bias.key_time[i] = bias.near && i < task.keys ? static_cast<std::int32_t>(key_time[i] - low) : 0;
  }
  __builtin_memcpy(bias.time_weights, task.in->time_weights, kTimeBoundaries * sizeof(float));
  bias.last_time_weight = task.in->time_weights[kTimeBoundaries];
}

inline void set_time_buckets(const Bias& bias, const Rows& rows, const Span& span, std::int32_t* buckets) {
  const Task& task = *bias.task;
  for (std::size_t r = 0; r < rows.count; ++r) {
    const std::int64_t time = task.in->query_time[rows.first + r];
    std::int32_t* line = buckets + r * kKeyTile;
    if (bias.near) {
      const Ints now = Ints{} + static_cast<std::int32_t>(time - bias.base);
      for (std::size_t c = span.start(); c < span.stop(); c += kLanes) {
        store(line + c, time_buckets(*task.times, now - load(bias.key_time + span.first_key + c)));
      }
    } else {
      for (std::size_t c = span.start(); c < span.stop(); ++c) {
        const std::size_t key = span.first_key + c;
        const bool real = key < task.keys;
        line[c] =
            !real ? 0 : time_bucket(*task.times, wrapping_difference(time, task.in->key_time[task.first_key + key]));
      }
    }
    const std::int64_t self = rows.self[r] - static_cast<std::int64_t>(span.first_key);
    if (self >= 0 && self < static_cast<std::int64_t>(kKeyTile)) {
      const std::int64_t gap = task.in->self_gap != nullptr ? task.in->self_gap[rows.first + r] : 0;
      line[self] = time_bucket(*task.times, gap);
    }
  }
}

// Fills the tile's bias and, with time weights, its buckets (needed again for the gradient).
inline void set_bias(const Bias& bias, const Rows& rows, const Span& span, float* out, std::int32_t* buckets) {
  if (bias.time_weights != nullptr) set_time_buckets(bias, rows, span, buckets);
  for (std::size_t r = 0; r < rows.count; ++r) {
    const std::int64_t offset = static_cast<std::int64_t>(span.first_key) - rows.end[r];
    const std::int64_t self = rows.self[r] - static_cast<std::int64_t>(span.first_key);
    float* line = out + r * kKeyTile;
    if (bias.position != nullptr) {
      const float* weights = bias.position + offset;
      for (std::size_t c = span.start(); c < span.stop(); c += kLanes) store(line + c, load(weights + c));
      if (self >= 0 && self < static_cast<std::int64_t>(kKeyTile)) line[self] = bias.position[0];
    }
    if (bias.time_weights == nullptr) continue;
    for (std::size_t c = span.start(); c < span.stop(); c += kLanes) {
      const Ints bucket = load(buckets + r * kKeyTile + c);
      const Floats found = Isa::lookup(bias.time_weights, bucket & (kTimeBoundaries - 1));
      const Floats weight = bucket == kTimeBoundaries ? Floats{} + bias.last_time_weight : found;
      store(line + c, bias.position != nullptr ? load(line + c) + weight : weight);
    }
  }
}

inline void add_to_bucket(float* sums, const std::int32_t* buckets, const float* values) {
  const Ints bucket = load(buckets);
  if (Isa::all_equal(bucket)) {
    float* sum = sums + static_cast<std::size_t>(bucket[0]) * kLanes;
    store(sum, load(sum) + load(values));
    return;
  }
  for (std::size_t lane = 0; lane < kLanes; ++lane) {
    sums[static_cast<std::size_t>(buckets[lane]) * kLanes + lane] += values[lane];
  }
}

// Adds the gradient of one tile of scores (zero where unseen; changed here) to the weights' sums.
inline void add_bias_gradient(const Bias& bias, const Rows& rows, const Span& span, const std::int32_t* buckets,
                              float* gradient) {
  for (std::size_t r = 0; r < rows.count; ++r) {
    float* line = gradient + r * kKeyTile;
    if (bias.time_sum != nullptr) {
      for (std::size_t c = span.start(); c < span.stop(); c += kLanes) {
        add_to_bucket(bias.time_sum, buckets + r * kKeyTile + c, line + c);
      }
    }
    if (bias.position_sum == nullptr) continue;
    const std::int64_t self = rows.self[r] - static_cast<std::int64_t>(span.first_key);
    if (self >= static_cast<std::int64_t>(span.start()) && self < static_cast<std::int64_t>(span.stop())) {
      bias.position_sum[0] += line[self];
      line[self] = 0;
    }
    float* sums = bias.position_sum + (static_cast<std::int64_t>(span.first_key) - rows.end[r]);
    for (std::size_t c = span.start(); c < span.stop(); c += kLanes) store(sums + c, load(sums + c) + load(line + c));
  }
}

// The sums of a task, per weight.
inline void finish_bias_gradient(const Bias& bias, const TaskGradients& out) {
  if (bias.position_sum != nullptr) {
    const std::size_t count = smaller(bias.task->in->positions, bias.task->keys + 1);
    for (std::size_t i = 0; i < count; ++i) out.position_weights[i] = 0;
    for (std::size_t d = 0; d <= bias.task->keys; ++d) {
      out.position_weights[smaller(d, count - 1)] += bias.position_sum[-static_cast<std::int64_t>(d)];
    }
    for (std::size_t x = 1; x < bias.task->keys; ++x) out.position_weights[0] += bias.position_sum[x];
  }
  if (bias.time_sum == nullptr) return;
  for (std::size_t b = 0; b < kTimeBuckets; ++b) {
    out.time_weights[b] = 0;
    for (std::size_t lane = 0; lane < kLanes; ++lane) out.time_weights[b] += bias.time_sum[b * kLanes + lane];
  }
}

}  // namespace
}  // namespace freshet::attention
