// The forward and backward pass of one task, tile by tile.
#pragma once

#include "gemm.h"
#include "workspace.h"

namespace freshet::attention {
namespace {

// Reads a tile's rows into `to` (zeros behind the last key) and, when asked, turns them.
inline void pack_keys(const void* from, Storage storage, std::size_t offset, std::size_t stride, std::size_t count,
                      std::size_t width, float* to, std::size_t wide, float* turned, std::size_t tall) {
  read_rows(from, storage, offset, stride, count, width, 1, to, wide);
  fill_zero(to + count * wide, (kKeyTile - count) * wide);
  if (turned != nullptr) transpose(to, wide, kKeyTile, tall, turned, kKeyTile);
}

inline void pack_tile(const Task& task, const Workspace& w, std::size_t tile, bool backward) {
  if (w.packed[tile] != 0) return;
  w.packed[tile] = 1;
  const Inputs& in = *task.in;
  for (std::size_t h = 0; h < in.heads; ++h) {
    const std::size_t at = h * w.tiles + tile, first = task.first_key + tile * kKeyTile;
    const std::size_t count = smaller(kKeyTile, task.keys - tile * kKeyTile);
    float* const key_t = w.key_t + at * w.tall_qk * kKeyTile;
    float* const key = backward ? w.key + at * kKeyTile * w.wide_qk : w.staging;
    float* const value = backward ? w.staging : w.value + at * kKeyTile * w.wide_v;
    float* const value_t = backward ? w.value_t + at * w.tall_v * kKeyTile : nullptr;
    pack_keys(in.k, in.storage, first * in.k_stride + h * in.dqk, in.k_stride, count, in.dqk, key, w.wide_qk, key_t,
              w.tall_qk);
    pack_keys(in.v, in.storage, first * in.v_stride + h * in.dv, in.v_stride, count, in.dv, value, w.wide_v, value_t,
              w.tall_v);
    if (!backward) continue;
    fill_zero(w.key_gradient_t + at * w.tall_qk * kKeyTile, w.tall_qk * kKeyTile);
    fill_zero(w.value_gradient_t + at * w.tall_v * kKeyTile, w.tall_v * kKeyTile);
  }
}

// Reads the rows of a tile times `scale` into `to`, zeros up to a multiple of 4 rows, and turns them.
inline void pack_rows(const Task& task, const Rows& rows, const void* from, std::size_t stride, std::size_t head,
                      std::size_t width, float scale, float* to, std::size_t wide, float* turned, std::size_t tall) {
  const std::size_t padded = round_up(rows.count, 4);
  read_rows(from, task.in->storage, rows.first * stride + head * width, stride, rows.count, width, scale, to, wide);
  fill_zero(to + rows.count * wide, (padded - rows.count) * wide);
  transpose(to, wide, padded, tall, turned, task.row_tile);
}

inline void store_rows(const Task& task, const Rows& rows, const float* from, std::size_t wide, float scale, void* to,
                       std::size_t head, std::size_t width) {
  const Inputs& in = *task.in;
  write_rows(from, wide, scale, to, in.storage, (rows.first * in.heads + head) * width, in.heads * width, rows.count,
             width);
}

// score = query x keys for the vectors of the span (without the bias).
inline void scores(const Task& task, const Workspace& w, const Rows& rows, const Span& span, std::size_t head) {
  const float* key_t = w.key_t + (head * w.tiles + span.first_key / kKeyTile) * w.tall_qk * kKeyTile;
  multiply<1, false>(rows.count, span.vectors, task.in->dqk, w.query_t + head * w.tall_qk * task.row_tile,
                     task.row_tile, key_t + span.start(), kKeyTile, w.score + span.start(), kKeyTile);
}

inline void forward_tile(const Task& task, const Workspace& w, const Rows& rows, const Span& span) {
  if (w.bias.present()) set_bias(w.bias, rows, span, w.bias_tile, w.buckets);
  for (std::size_t h = 0; h < task.in->heads; ++h) {
    scores(task, w, rows, span, h);
    for (std::size_t r = 0; r < rows.count; ++r) {
      float* line = w.score + r * kKeyTile;
      const float* bias = w.bias_tile + r * kKeyTile;
      for (std::size_t c = span.start(); c < span.stop(); c += kLanes) {
        const Floats s = w.bias.present() ? load(line + c) + load(bias + c) : load(line + c);
        store(line + c, s * sigmoid(s));
      }
      if (!span.whole) hide_unseen(rows, r, span, line);
    }
    const float* value = w.value + (h * w.tiles * kKeyTile + span.first_key + span.first) * w.wide_v;
    multiply<kKeyTile, true>(rows.count, w.wide_v / kLanes, span.last - span.first, w.score + span.first, 1, value,
                             w.wide_v, w.y + h * task.row_tile * w.wide_v, w.wide_v);
  }
}

// Calls f(span) for every tile of keys that a row of the tile sees, in order.
template <typename F>
void each_seen_tile(const Rows& rows, const F& f) {
  const std::size_t end = end_tile(rows);
  for (std::size_t tile = next_tile(rows, 0); tile < end; tile = next_tile(rows, tile + 1)) {
    const Span span = span_of(rows, tile * kKeyTile);
    if (span.first < span.last) f(span);
  }
}

inline void forward_task(const Task& task, void* y, float* scratch) {
  const Inputs& in = *task.in;
  const Workspace w(task, false, scratch);
  for (std::size_t tile = 0; tile < w.tiles; ++tile) w.packed[tile] = 0;
  Rows rows;
  for (std::size_t from = 0; from < task.rows; from += task.row_tile) {
    set_rows(task, from, smaller(task.row_tile, task.rows - from), rows);
    for (std::size_t h = 0; h < in.heads; ++h) {
      pack_rows(task, rows, in.q, in.q_stride, h, in.dqk, in.alpha, w.query, w.wide_qk,
                w.query_t + h * w.tall_qk * task.row_tile, w.tall_qk);
    }
    fill_zero(w.y, in.heads * task.row_tile * w.wide_v);
    each_seen_tile(rows, [&](const Span& span) {
      pack_tile(task, w, span.first_key / kKeyTile, false);
      forward_tile(task, w, rows, span);
    });
    for (std::size_t h = 0; h < in.heads; ++h) {
      store_rows(task, rows, w.y + h * task.row_tile * w.wide_v, w.wide_v, 1 / in.normaliser, y, h, in.dv);
    }
  }
}

// score -> SiLU(score) and score_gradient -> its gradient by the score, in place; adds the latter to bias_gradient.
inline void backward_scores(const Workspace& w, const Rows& rows, const Span& span, bool first_head) {
  for (std::size_t r = 0; r < rows.count; ++r) {
    const std::size_t at = r * kKeyTile;
    for (std::size_t c = at + span.start(); c < at + span.stop(); c += kLanes) {
      const Floats s = w.bias.present() ? load(w.score + c) + load(w.bias_tile + c) : load(w.score + c);
      const Floats part = sigmoid(s), weight = s * part;
      store(w.score + c, weight);
      store(w.score_gradient + c, load(w.score_gradient + c) * (part + weight * (1.0f - part)));
    }
    if (!span.whole) {
      hide_unseen(rows, r, span, w.score + at);
      hide_unseen(rows, r, span, w.score_gradient + at);
    }
    if (!w.bias.present()) continue;
    for (std::size_t c = at + span.start(); c < at + span.stop(); c += kLanes) {
      const Floats gradient = load(w.score_gradient + c);
      store(w.bias_gradient + c, first_head ? gradient : load(w.bias_gradient + c) + gradient);
    }
  }
}

inline void backward_tile(const Task& task, const Workspace& w, const Rows& rows, const Span& span) {
  const std::size_t start = span.start(), tile = span.first_key / kKeyTile;
  if (w.bias.present()) set_bias(w.bias, rows, span, w.bias_tile, w.buckets);
  for (std::size_t h = 0; h < task.in->heads; ++h) {
    const std::size_t qk_t = (h * w.tiles + tile) * w.tall_qk * kKeyTile + start;
    const std::size_t v_t = (h * w.tiles + tile) * w.tall_v * kKeyTile + start;
    const float* key = w.key + (h * w.tiles * kKeyTile + span.first_key + span.first) * w.wide_qk;
    scores(task, w, rows, span, h);
    multiply<1, false>(rows.count, span.vectors, task.in->dv, w.y_gradient_t + h * w.tall_v * task.row_tile,
                       task.row_tile, w.value_t + v_t, kKeyTile, w.score_gradient + start, kKeyTile);
    backward_scores(w, rows, span, h == 0);
    multiply<1, true>(task.in->dv, span.vectors, rows.count, w.y_gradient + h * task.row_tile * w.wide_v, w.wide_v,
                      w.score + start, kKeyTile, w.value_gradient_t + v_t, kKeyTile);
    multiply<1, true>(task.in->dqk, span.vectors, rows.count, w.query + h * task.row_tile * w.wide_qk, w.wide_qk,
                      w.score_gradient + start, kKeyTile, w.key_gradient_t + qk_t, kKeyTile);
    multiply<kKeyTile, true>(rows.count, w.wide_qk / kLanes, span.last - span.first, w.score_gradient + span.first, 1,
                             key, w.wide_qk, w.query_gradient + h * task.row_tile * w.wide_qk, w.wide_qk);
  }
  if (w.bias.present()) add_bias_gradient(w.bias, rows, span, w.buckets, w.bias_gradient);
}

inline void store_turned(const Workspace& w, const float* turned, std::size_t tall, std::size_t wide, bool touched,
                         void* to, Storage storage, std::size_t offset, std::size_t stride, std::size_t count,
                         std::size_t width) {
  if (touched) {
    transpose(turned, kKeyTile, tall, kKeyTile, w.staging, wide);
  } else {
    fill_zero(w.staging, kKeyTile * wide);
  }
  write_rows(w.staging, wide, 1, to, storage, offset, stride, count, width);
}

// Gradients of keys and values; zero for keys that no row saw.
inline void store_key_gradients(const Task& task, const Workspace& w, const TaskGradients& out) {
  const Inputs& in = *task.in;
  for (std::size_t tile = out.first / kKeyTile; tile * kKeyTile < out.end; ++tile) {
    const std::size_t first = tile * kKeyTile - out.first, count = smaller(kKeyTile, out.end - tile * kKeyTile);
    for (std::size_t h = 0; h < in.heads; ++h) {
      const std::size_t at = h * w.tiles + tile;
      const bool touched = w.packed[tile] != 0;
      store_turned(w, w.key_gradient_t + at * w.tall_qk * kKeyTile, w.tall_qk, w.wide_qk, touched, out.k,
                   out.key_storage, (first * in.heads + h) * in.dqk, in.heads * in.dqk, count, in.dqk);
      store_turned(w, w.value_gradient_t + at * w.tall_v * kKeyTile, w.tall_v, w.wide_v, touched, out.v,
                   out.key_storage, (first * in.heads + h) * in.dv, in.heads * in.dv, count, in.dv);
    }
  }
}

inline void backward_task(const Task& task, const TaskGradients& out, float* scratch) {
  const Inputs& in = *task.in;
  const Workspace w(task, true, scratch);
  for (std::size_t tile = 0; tile < w.tiles; ++tile) w.packed[tile] = 0;
  Rows rows;
  for (std::size_t from = 0; from < task.rows; from += task.row_tile) {
    set_rows(task, from, smaller(task.row_tile, task.rows - from), rows);
    for (std::size_t h = 0; h < in.heads; ++h) {
      pack_rows(task, rows, in.q, in.q_stride, h, in.dqk, in.alpha, w.query + h * task.row_tile * w.wide_qk, w.wide_qk,
                w.query_t + h * w.tall_qk * task.row_tile, w.tall_qk);
      pack_rows(task, rows, out.y, in.heads * in.dv, h, in.dv, 1 / in.normaliser,
                w.y_gradient + h * task.row_tile * w.wide_v, w.wide_v, w.y_gradient_t + h * w.tall_v * task.row_tile,
                w.tall_v);
    }
    fill_zero(w.query_gradient, in.heads * task.row_tile * w.wide_qk);
    each_seen_tile(rows, [&](const Span& span) {
      pack_tile(task, w, span.first_key / kKeyTile, true);
      backward_tile(task, w, rows, span);
    });
    for (std::size_t h = 0; h < in.heads; ++h) {
      store_rows(task, rows, w.query_gradient + h * task.row_tile * w.wide_qk, w.wide_qk, in.alpha, out.q, h, in.dqk);
    }
  }
  store_key_gradients(task, w, out);
  finish_bias_gradient(w.bias, out);
}

inline std::size_t scratch_floats(const Task& task, bool backward) {
  return Workspace(task, backward, nullptr).arena.used();
}

}  // namespace
}  // namespace freshet::attention
