// project and finish on a range of rows, tile by tile.
#pragma once

#include "norm.h"
#include "workspace.h"

namespace freshet::attention {
namespace {

// Calls f(first, count) for each tile of the rows [first, last).
template <typename F>
void each_row_tile(std::size_t first, std::size_t last, const F& f) {
  for (; first < last; first += kLayerRows) f(first, smaller(kLayerRows, last - first));
}

// Tiles are [kLayerRows][wide]; "_t" is turned, [tall][kLayerRows].
struct ProjectScratch {
  ProjectScratch(const Project& in, bool backward, float* base) : arena(base) {
    wide = round_up(in.dim, kLanes), tall = round_up(in.dim, 4), wide_out = round_up(in.columns, kLanes);
    x = arena.take(kLayerRows * wide), hat = arena.take(kLayerRows * wide), normed = arena.take(kLayerRows * wide);
    normed_t = arena.take(tall * kLayerRows), out = arena.take(kLayerRows * wide_out);
    if (!backward) return;
    out_t = arena.take(wide_out * kLayerRows), weight_sum = arena.take(in.dim * wide_out);
  }
  Arena arena;
  std::size_t wide, tall, wide_out;
  float *x, *hat, *normed, *normed_t, *out, *out_t = nullptr, *weight_sum = nullptr;
  float inverse[kLayerRows];
};

inline std::size_t project_floats(const Project& in, bool backward) {
  return ProjectScratch(in, backward, nullptr).arena.used();
}

inline std::size_t turned_at(const Project& in) { return in.dim * round_up(in.columns, kLanes); }

inline std::size_t project_packed(const Project& in) { return turned_at(in) + in.columns * round_up(in.dim, kLanes); }

inline void pack_project(const Project& in, float* packed) {
  pack_panels(in.dim, in.columns, packed, [&](std::size_t k, std::size_t n) { return in.weight[k * in.columns + n]; });
  pack_panels(in.columns, in.dim, packed + turned_at(in),
              [&](std::size_t k, std::size_t n) { return in.weight[n * in.columns + k]; });
}

// out = norm(x) W + b for one tile, before SiLU.
inline void project_tile(const Project& in, const float* packed, std::size_t first, std::size_t count,
                         ProjectScratch& s) {
  read_tile(in.x, first, count, in.dim, s.x, s.wide);
  fill_zero(s.normed, round_up(count, 4) * s.wide);
  for (std::size_t r = 0; r < count; ++r) {
    s.inverse[r] = normalise(s.x + r * s.wide, in.dim, s.wide, in.norm.epsilon, s.hat + r * s.wide);
    scale_and_shift(in.norm, s.hat + r * s.wide, in.dim, s.normed + r * s.wide);
  }
  transpose(s.normed, s.wide, round_up(count, 4), s.tall, s.normed_t, kLayerRows);
  multiply_panels(count, in.columns, in.dim, s.normed_t, kLayerRows, packed, s.out, s.wide_out);
  if (in.bias == nullptr) return;
  for (std::size_t r = 0; r < count; ++r) {
    for (std::size_t n = 0; n < in.columns; ++n) s.out[r * s.wide_out + n] += in.bias[n];
  }
}

inline void project_forward_rows(const Project& in, const float* packed, std::size_t first, std::size_t last,
                                 float* const parts[kParts], float* scratch) {
  ProjectScratch s(in, false, scratch);
  each_row_tile(first, last, [&](std::size_t tile, std::size_t count) {
    project_tile(in, packed, tile, count, s);
    for (std::size_t r = 0; r < count; ++r) {
      float* line = s.out + r * s.wide_out;
      for (std::size_t n = 0; n < in.silu_columns; n += kLanes) {
        const Floats z = load(line + n), active = z * sigmoid(z);
        if (n + kLanes <= in.silu_columns) {
          store(line + n, active);
        } else {
          float lanes[kLanes];
          store(lanes, active);
          for (std::size_t i = n; i < in.silu_columns; ++i) line[i] = lanes[i - n];
        }
      }
      for (std::size_t p = 0, at = 0; p < kParts; at += in.parts[p], ++p) {
        __builtin_memcpy(parts[p] + (tile + r) * in.parts[p], line + at, in.parts[p] * sizeof(float));
      }
    }
  });
}

// Replaces the outputs before SiLU by the gradient by them; zeros behind the last column.
inline void silu_gradient(const Project& in, const ProjectGradients& out, std::size_t row, float* line,
                          std::size_t wide) {
  for (std::size_t n = 0; n < wide; n += kLanes) {
    const Floats z = load(line + n), part = sigmoid(z);
    store(line + n, part + z * part * (1.0f - part));
  }
  for (std::size_t n = in.silu_columns; n < wide; ++n) line[n] = n < in.columns ? 1.0f : 0.0f;
  for (std::size_t p = 0, at = 0; p < kParts; at += in.parts[p], ++p) {
    const float* gradient = out.parts[p] + row * in.parts[p];
    for (std::size_t n = 0; n < in.parts[p]; ++n) line[at + n] *= gradient[n];
  }
}

inline void project_backward_rows(const Project& in, const float* packed, std::size_t first, std::size_t last,
                                  const ProjectGradients& out, float* sums, float* scratch) {
  ProjectScratch s(in, true, scratch);
  fill_zero(s.weight_sum, in.dim * s.wide_out);
  float* const bias_sum = sums + in.dim * in.columns;
  float* const norm_sum = bias_sum + (in.bias != nullptr ? in.columns : 0);
  each_row_tile(first, last, [&](std::size_t tile, std::size_t count) {
    project_tile(in, packed, tile, count, s);
    for (std::size_t r = 0; r < count; ++r) {
      float* line = s.out + r * s.wide_out;
      silu_gradient(in, out, tile + r, line, s.wide_out);
      for (std::size_t n = 0; in.bias != nullptr && n < in.columns; ++n) bias_sum[n] += line[n];
    }
    fill_zero(s.out + count * s.wide_out, (round_up(count, 4) - count) * s.wide_out);
    multiply<1, true>(in.dim, s.wide_out / kLanes, count, s.normed, s.wide, s.out, s.wide_out, s.weight_sum,
                      s.wide_out);
    transpose(s.out, s.wide_out, round_up(count, 4), s.wide_out, s.out_t, kLayerRows);
    multiply_panels(count, in.dim, in.columns, s.out_t, kLayerRows, packed + turned_at(in), s.x, s.wide);
    for (std::size_t r = 0; r < count; ++r) {
      normalise_backward(in.norm, s.hat + r * s.wide, s.inverse[r], in.dim, s.wide, s.x + r * s.wide, norm_sum,
                         norm_sum + in.dim);
    }
    write_rows(s.x, s.wide, 1, out.x, Storage::kFloat32, tile * in.dim, in.dim, count, in.dim);
  });
  write_rows(s.weight_sum, s.wide_out, 1, sums, Storage::kFloat32, 0, in.columns, in.dim, in.columns);
}

struct FinishScratch {
  FinishScratch(const Finish& in, bool backward, float* base) : arena(base) {
    wide = round_up(in.width, kLanes), wide_in = round_up(in.inputs(), kLanes), tall_in = round_up(in.inputs(), 4);
    wide_out = round_up(in.dim, kLanes), tall_out = round_up(in.dim, 4);
    a = arena.take(kLayerRows * wide), u = arena.take(kLayerRows * wide), hat = arena.take(kLayerRows * wide);
    normed = arena.take(kLayerRows * wide), factor = arena.take(kLayerRows * wide_in);
    gated = arena.take(kLayerRows * wide_in), gated_t = arena.take(tall_in * kLayerRows);
    y = arena.take(kLayerRows * wide_out);
    if (!backward) return;
    y_t = arena.take(tall_out * kLayerRows), gated_gradient = arena.take(kLayerRows * wide_in);
    weight_sum = arena.take(in.dim * wide_in);
  }
  Arena arena;
  std::size_t wide, wide_in, tall_in, wide_out, tall_out;
  float *a, *u, *hat, *normed, *factor, *gated, *gated_t, *y, *y_t = nullptr, *gated_gradient = nullptr;
  float* weight_sum = nullptr;
  float inverse[kLayerRows];
};

inline std::size_t finish_floats(const Finish& in, bool backward) {
  return FinishScratch(in, backward, nullptr).arena.used();
}

inline std::size_t turned_at(const Finish& in) { return in.dim * round_up(in.inputs(), kLanes); }

inline std::size_t finish_packed(const Finish& in) { return turned_at(in) + in.inputs() * round_up(in.dim, kLanes); }

inline void pack_finish(const Finish& in, float* packed) {
  const std::size_t inputs = in.inputs();
  pack_panels(in.dim, inputs, packed, [&](std::size_t k, std::size_t n) { return in.weight[k * inputs + n]; });
  pack_panels(inputs, in.dim, packed + turned_at(in),
              [&](std::size_t k, std::size_t n) { return in.weight[n * inputs + k]; });
}

// gated = dropout(gate(u, norm(a))) for one tile.
inline void gate_tile(const Finish& in, std::size_t first, std::size_t count, FinishScratch& s) {
  const std::size_t width = in.width, product_at = in.inputs() - width;
  read_tile(in.a, first, count, width, s.a, s.wide);
  read_tile(in.u, first, count, width, s.u, s.wide);
  fill_zero(s.gated, round_up(count, 4) * s.wide_in);
  for (std::size_t r = 0; r < count; ++r) {
    const float *a = s.a + r * s.wide, *u = s.u + r * s.wide;
    float *normed = s.normed + r * s.wide, *gated = s.gated + r * s.wide_in, *factor = s.factor + r * s.wide_in;
    s.inverse[r] = normalise(a, width, s.wide, in.norm.epsilon, s.hat + r * s.wide);
    scale_and_shift(in.norm, s.hat + r * s.wide, width, normed);
    for (std::size_t i = 0; i < width; ++i) gated[product_at + i] = u[i] * normed[i];
    if (in.gate != Gate::kProduct) {
      __builtin_memcpy(gated, u, width * sizeof(float));
      __builtin_memcpy(gated + width, in.gate == Gate::kConcat ? normed : a, width * sizeof(float));
    }
    if (in.dropout == 0) continue;
    dropout_factors(in.dropout, in.seed, first + r, s.wide_in, factor);
    for (std::size_t i = 0; i < in.inputs(); ++i) gated[i] *= factor[i];
  }
}

inline void finish_forward_rows(const Finish& in, const float* packed, std::size_t first, std::size_t last, float* y,
                                float* scratch) {
  FinishScratch s(in, false, scratch);
  each_row_tile(first, last, [&](std::size_t tile, std::size_t count) {
    gate_tile(in, tile, count, s);
    transpose(s.gated, s.wide_in, round_up(count, 4), s.tall_in, s.gated_t, kLayerRows);
    multiply_panels(count, in.dim, in.inputs(), s.gated_t, kLayerRows, packed + turned_at(in), s.y, s.wide_out);
    for (std::size_t r = 0; r < count; ++r) {
      const float *from = s.y + r * s.wide_out, *x = in.x + (tile + r) * in.dim;
      float* to = y + (tile + r) * in.dim;
      for (std::size_t n = 0; n < in.dim; ++n) to[n] = x[n] + (in.bias != nullptr ? from[n] + in.bias[n] : from[n]);
    }
  });
}

// From the gradient by the gated row (before dropout) those by u and by norm(a), in place of u and normed; the share of
// a itself (kConcatRaw) goes to a.
inline void gate_gradient(const Finish& in, const float* gradient, float* a, float* u, float* normed,
                          std::size_t wide) {
  const std::size_t width = in.width, product_at = in.inputs() - width;
  for (std::size_t i = 0; i < width; ++i) {
    const float product = gradient[product_at + i], by_u = product * normed[i];
    normed[i] = product * u[i];
    u[i] = by_u;
    a[i] = 0;
    if (in.gate == Gate::kProduct) continue;
    u[i] += gradient[i];
    (in.gate == Gate::kConcat ? normed : a)[i] += gradient[width + i];
  }
  for (std::size_t i = width; i < wide; ++i) normed[i] = 0;
}

inline void finish_backward_rows(const Finish& in, const float* packed, std::size_t first, std::size_t last,
                                 const FinishGradients& out, float* sums, float* scratch) {
  FinishScratch s(in, true, scratch);
  const std::size_t inputs = in.inputs(), width = in.width;
  fill_zero(s.weight_sum, in.dim * s.wide_in);
  float* const bias_sum = sums + in.dim * inputs;
  float* const norm_sum = bias_sum + (in.bias != nullptr ? in.dim : 0);
  each_row_tile(first, last, [&](std::size_t tile, std::size_t count) {
    gate_tile(in, tile, count, s);
    read_tile(out.y, tile, count, in.dim, s.y, s.wide_out);
    for (std::size_t r = 0; in.bias != nullptr && r < count; ++r) {
      for (std::size_t n = 0; n < in.dim; ++n) bias_sum[n] += s.y[r * s.wide_out + n];
    }
    multiply<1, true>(in.dim, s.wide_in / kLanes, count, s.y, s.wide_out, s.gated, s.wide_in, s.weight_sum, s.wide_in);
    transpose(s.y, s.wide_out, round_up(count, 4), s.tall_out, s.y_t, kLayerRows);
    multiply_panels(count, inputs, in.dim, s.y_t, kLayerRows, packed, s.gated_gradient, s.wide_in);
    for (std::size_t r = 0; r < count; ++r) {
      float *gradient = s.gated_gradient + r * s.wide_in, *a = s.a + r * s.wide, *normed = s.normed + r * s.wide;
      const float* factor = s.factor + r * s.wide_in;
      for (std::size_t i = 0; in.dropout != 0 && i < inputs; ++i) gradient[i] *= factor[i];
      gate_gradient(in, gradient, a, s.u + r * s.wide, normed, s.wide);
      normalise_backward(in.norm, s.hat + r * s.wide, s.inverse[r], width, s.wide, normed, norm_sum, norm_sum + width);
      for (std::size_t i = 0; i < width; ++i) a[i] += normed[i];
    }
    write_rows(s.u, s.wide, 1, out.u, Storage::kFloat32, tile * width, width, count, width);
    write_rows(s.a, s.wide, 1, out.a, Storage::kFloat32, tile * width, width, count, width);
  });
  write_rows(s.weight_sum, s.wide_in, 1, sums, Storage::kFloat32, 0, inputs, in.dim, inputs);
}

constexpr LayerKernels kLayerKernels = {
    project_floats, finish_floats,        project_packed,        finish_packed,       pack_project,
    pack_finish,    project_forward_rows, project_backward_rows, finish_forward_rows, finish_backward_rows};

}  // namespace
}  // namespace freshet::attention
