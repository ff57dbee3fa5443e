// Row-wise optimisers. Each is a pure function of (row, gradient, learning rate), so replays agree to the bit
// (built without floating-point contraction; see csrc/Makefile).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "../common/platform.h"

namespace freshet {

enum class OptimizerKind { kSgd, kAdagrad, kRowwiseAdagrad, kAdam, kFtrl };

struct OptimizerConfig {
  OptimizerKind kind = OptimizerKind::kAdagrad;
  float initial_accumulator = 0.0F;  // of both Adagrads and of FTRL's n
  float epsilon = 1e-10F;
  float beta1 = 0.9F;  // beta1 and beta2: of Adam
  float beta2 = 0.999F;
  float l1 = 0.0F;  // l1, l2 and beta: of FTRL
  float l2 = 0.0F;
  float ftrl_beta = 1.0F;
};

inline OptimizerKind parse_optimizer(const std::string& name) {
  if (name == "sgd") return OptimizerKind::kSgd;
  if (name == "adagrad") return OptimizerKind::kAdagrad;
  if (name == "rowwise_adagrad") return OptimizerKind::kRowwiseAdagrad;
  if (name == "adam") return OptimizerKind::kAdam;
  if (name == "ftrl") return OptimizerKind::kFtrl;
  throw std::invalid_argument("unknown optimizer '" + name + "'; use sgd, adagrad, rowwise_adagrad, adam or ftrl");
}

// Floats of state per row. adagrad: sum of squares per weight. rowwise_adagrad: one sum of mean squares.
// adam: first moments, second moments, step count (a float is exact to 2^24 steps and then stays there, where the
// bias corrections have long been 1). ftrl: z, then n (sums of squares).
inline std::size_t state_size(OptimizerKind kind, std::size_t dim) noexcept {
  switch (kind) {
    case OptimizerKind::kSgd: return 0;
    case OptimizerKind::kAdagrad: return dim;
    case OptimizerKind::kRowwiseAdagrad: return 1;
    case OptimizerKind::kAdam: return 2 * dim + 1;
    case OptimizerKind::kFtrl: return 2 * dim;
  }
  return 0;
}

// Floats at the start of the state that may be negative.
inline std::size_t signed_state(OptimizerKind kind, std::size_t dim) noexcept {
  return kind == OptimizerKind::kAdam || kind == OptimizerKind::kFtrl ? dim : 0;
}

inline void init_state(const OptimizerConfig& config, std::size_t dim, float* state) noexcept {
  const std::size_t zeros = config.kind == OptimizerKind::kAdam ? state_size(config.kind, dim) : signed_state(config.kind, dim);
  std::fill_n(state, state_size(config.kind, dim), config.initial_accumulator);
  std::fill_n(state, zeros, 0.0F);
}

// Larger weights, moments and z are refused: one more step could make them infinite.
inline constexpr float kMaxStored = 1e21F;
inline constexpr float kMaxAdamSteps = 16777216.0F;  // 2^24

// True if a row of state could have come from this optimiser: finite, at most kMaxStored where it may be negative, and
// else, as sums of squares and counts are, not negative.
inline bool state_valid(OptimizerKind kind, std::size_t dim, const float* state) noexcept {
  const std::size_t size = state_size(kind, dim), sign = signed_state(kind, dim);
  for (std::size_t j = 0; j < size; ++j) {
    const bool good = j < sign ? std::fabs(state[j]) <= kMaxStored : state[j] >= 0.0F && std::isfinite(state[j]);
    if (!good) return false;
  }
  return kind != OptimizerKind::kAdam || state[size - 1] <= kMaxAdamSteps;
}

// base^n by repeated squaring: unlike std::pow, the same bits with every maths library.
inline double power(double base, std::uint64_t n) noexcept {
  double result = 1.0;
  for (; n != 0; n >>= 1, base *= base) {
    if ((n & 1) != 0) result *= base;
  }
  return result;
}

// The loops below are inlined into functions that are compiled for several instruction sets.

// w -= lr * g
FRESHET_INLINE void sgd(std::size_t dim, float lr, const float* __restrict g, float* __restrict w) noexcept {
  for (std::size_t j = 0; j < dim; ++j) w[j] -= lr * g[j];
}

// s += g^2;  w -= lr * g / (sqrt(s) + eps)
FRESHET_INLINE void adagrad(const OptimizerConfig& c, std::size_t dim, float lr, const float* __restrict g,
                            float* __restrict w, float* __restrict s) noexcept {
  const float epsilon = c.epsilon;
  for (std::size_t j = 0; j < dim; ++j) {
    s[j] += g[j] * g[j];
    w[j] -= lr * (g[j] / (std::sqrt(s[j]) + epsilon));
  }
}

// s += mean(g^2);  w -= lr * g / (sqrt(s) + eps)
FRESHET_INLINE void rowwise_adagrad(const OptimizerConfig& c, std::size_t dim, float lr, const float* __restrict g,
                                    float* __restrict w, float* __restrict s) noexcept {
  double sum = 0.0;
  for (std::size_t j = 0; j < dim; ++j) sum += static_cast<double>(g[j]) * g[j];
  *s += static_cast<float>(sum / static_cast<double>(dim));
  const float denominator = std::sqrt(*s) + c.epsilon;
  for (std::size_t j = 0; j < dim; ++j) w[j] -= lr * (g[j] / denominator);
}

// m = b1 m + (1-b1) g;  v = b2 v + (1-b2) g^2;  w -= lr * (m / (1-b1^t)) / (sqrt(v / (1-b2^t)) + eps), where t counts
// this row's own updates: an id that was not in the batch is not moved (lazy).
FRESHET_INLINE void adam(const OptimizerConfig& c, std::size_t dim, float lr, const float* __restrict g,
                         float* __restrict w, float* __restrict m, float* __restrict v, float* step) noexcept {
  *step += 1.0F;
  const auto t = static_cast<std::uint64_t>(*step);
  const auto correction1 = static_cast<float>(1.0 - power(c.beta1, t));
  const auto correction2 = static_cast<float>(1.0 - power(c.beta2, t));
  const float beta1 = c.beta1, beta2 = c.beta2, epsilon = c.epsilon;
  for (std::size_t j = 0; j < dim; ++j) {
    m[j] = beta1 * m[j] + (1.0F - beta1) * g[j];
    v[j] = beta2 * v[j] + (1.0F - beta2) * g[j] * g[j];
    w[j] -= lr * (m[j] / correction1) / (std::sqrt(v[j] / correction2) + epsilon);
  }
}

// FTRL-proximal per weight (McMahan et al., KDD 2013, algorithm 1) at a rate lr that may change, with the learning rate
// 1 / r, r = (beta + sqrt(n)) / lr. The centres of the proximal terms add up to r after every step, so
//   n += g^2;  z += g - (r - r before) w,   where w = -(z - sign(z) l1) / (r before + l2) tells r before
//   w = 0 if |z| <= l1, else -(z - sign(z) l1) / (r + l2)
// Without l1 and l2 that is w -= g / r. A new row (z = 0) has its initial weights as the first centre.
FRESHET_INLINE void ftrl(const OptimizerConfig& c, std::size_t dim, float lr, const float* __restrict g,
                         float* __restrict w, float* __restrict z, float* __restrict n) noexcept {
  const float l1 = c.l1, l2 = c.l2, beta = c.ftrl_beta;
  if (!(lr >= 1e-12F)) return;  // a rate of zero moves nothing, and 1 / lr must not overflow
  for (std::size_t j = 0; j < dim; ++j) {
    n[j] += g[j] * g[j];
    const float r = (beta + std::sqrt(n[j])) / lr;
    const float regular = z[j] == 0 ? 0.0F : (z[j] > 0 ? l1 : -l1) - l2 * w[j];
    const float centred = regular - r * w[j];
    z[j] = g[j] + (w[j] == 0 ? z[j] : centred);
    const float shrunk = z[j] > 0 ? z[j] - l1 : z[j] + l1;
    w[j] = std::fabs(z[j]) <= l1 ? 0.0F : -shrunk / (r + l2);
  }
}

FRESHET_INLINE void update_row(const OptimizerConfig& c, std::size_t dim, float lr, const float* g, float* w) noexcept {
  constexpr std::size_t kLine = kCacheLine / sizeof(float);
  float* const state = w + dim;
  switch (c.kind) {
    case OptimizerKind::kSgd:
      return upper_lines_first<kLine>(dim, [=](std::size_t j, std::size_t n) __attribute__((always_inline)) {
        sgd(n, lr, g + j, w + j);
      });
    case OptimizerKind::kAdagrad:
      return upper_lines_first<kLine>(dim, [=, &c](std::size_t j, std::size_t n) __attribute__((always_inline)) {
        adagrad(c, n, lr, g + j, w + j, state + j);
      });
    case OptimizerKind::kRowwiseAdagrad: return rowwise_adagrad(c, dim, lr, g, w, state);
    case OptimizerKind::kAdam: return adam(c, dim, lr, g, w, state, state + dim, state + 2 * dim);
    case OptimizerKind::kFtrl:
      return upper_lines_first<kLine>(dim, [=, &c](std::size_t j, std::size_t n) __attribute__((always_inline)) {
        ftrl(c, n, lr, g + j, w + j, state + j, state + dim + j);
      });
  }
}

}  // namespace freshet
