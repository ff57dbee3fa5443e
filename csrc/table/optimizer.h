// Row-wise optimisers. Each is a pure function of (row, gradient, learning rate), so replays agree to the bit
// (built without floating-point contraction; see csrc/Makefile).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace freshet {

enum class OptimizerKind { kSgd, kAdagrad, kRowwiseAdagrad, kAdam };

struct OptimizerConfig {
  OptimizerKind kind = OptimizerKind::kAdagrad;
  float initial_accumulator = 0.0F;  // of both Adagrads
  float epsilon = 1e-10F;
  float beta1 = 0.9F;  // beta1 and beta2: of Adam
  float beta2 = 0.999F;
};

inline OptimizerKind parse_optimizer(const std::string& name) {
  if (name == "sgd") return OptimizerKind::kSgd;
  if (name == "adagrad") return OptimizerKind::kAdagrad;
  if (name == "rowwise_adagrad") return OptimizerKind::kRowwiseAdagrad;
  if (name == "adam") return OptimizerKind::kAdam;
  throw std::invalid_argument("unknown optimizer '" + name + "'; use sgd, adagrad, rowwise_adagrad or adam");
}

// Floats of state per row. adagrad: sum of squares per weight. rowwise_adagrad: one sum of mean squares.
// adam: first moments, second moments, step count (a float is exact to 2^24 steps and then stays there, where the
// bias corrections have long been 1).
inline std::size_t state_size(OptimizerKind kind, std::size_t dim) noexcept {
  switch (kind) {
    case OptimizerKind::kSgd: return 0;
    case OptimizerKind::kAdagrad: return dim;
    case OptimizerKind::kRowwiseAdagrad: return 1;
    case OptimizerKind::kAdam: return 2 * dim + 1;
  }
  return 0;
}

inline void init_state(const OptimizerConfig& config, std::size_t dim, float* state) noexcept {
  const bool adam = config.kind == OptimizerKind::kAdam;
  std::fill_n(state, state_size(config.kind, dim), adam ? 0.0F : config.initial_accumulator);
}

// True if a row of state could have come from this optimiser: finite, and non-negative where it is a sum of squares.
inline bool state_valid(OptimizerKind kind, std::size_t dim, const float* state) noexcept {
  const std::size_t signed_floats = kind == OptimizerKind::kAdam ? dim : 0;
  for (std::size_t j = 0; j < state_size(kind, dim); ++j) {
    if (!std::isfinite(state[j]) || (j >= signed_floats && state[j] < 0.0F)) return false;
  }
  return true;
}

// base^n by repeated squaring: unlike std::pow, the same bits with every maths library.
inline double power(double base, std::uint64_t n) noexcept {
  double result = 1.0;
  for (; n != 0; n >>= 1, base *= base) {
    if ((n & 1) != 0) result *= base;
  }
  return result;
}

// w -= lr * g
inline void sgd(std::size_t dim, float lr, const float* g, float* w) noexcept {
  for (std::size_t j = 0; j < dim; ++j) w[j] -= lr * g[j];
}

// s += g^2;  w -= lr * g / (sqrt(s) + eps)
inline void adagrad(const OptimizerConfig& c, std::size_t dim, float lr, const float* g, float* w, float* s) noexcept {
  for (std::size_t j = 0; j < dim; ++j) {
    s[j] += g[j] * g[j];
    w[j] -= lr * (g[j] / (std::sqrt(s[j]) + c.epsilon));
  }
}

// s += mean(g^2);  w -= lr * g / (sqrt(s) + eps)
inline void rowwise_adagrad(const OptimizerConfig& c, std::size_t dim, float lr, const float* g, float* w,
                            float* s) noexcept {
  double sum = 0.0;
  for (std::size_t j = 0; j < dim; ++j) sum += static_cast<double>(g[j]) * g[j];
  *s += static_cast<float>(sum / static_cast<double>(dim));
  const float denominator = std::sqrt(*s) + c.epsilon;
  for (std::size_t j = 0; j < dim; ++j) w[j] -= lr * (g[j] / denominator);
}

// m = b1 m + (1-b1) g;  v = b2 v + (1-b2) g^2;  w -= lr * (m / (1-b1^t)) / (sqrt(v / (1-b2^t)) + eps), where t counts
// this row's own updates: an id that was not in the batch is not moved (lazy).
inline void adam(const OptimizerConfig& c, std::size_t dim, float lr, const float* g, float* w, float* state) noexcept {
  float* m = state;
  float* v = state + dim;
  float& step = state[2 * dim];
  step += 1.0F;
  const auto t = static_cast<std::uint64_t>(step);
  const auto correction1 = static_cast<float>(1.0 - power(c.beta1, t));
  const auto correction2 = static_cast<float>(1.0 - power(c.beta2, t));
  for (std::size_t j = 0; j < dim; ++j) {
    m[j] = c.beta1 * m[j] + (1.0F - c.beta1) * g[j];
    v[j] = c.beta2 * v[j] + (1.0F - c.beta2) * g[j] * g[j];
    w[j] -= lr * (m[j] / correction1) / (std::sqrt(v[j] / correction2) + c.epsilon);
  }
}

inline void update_row(const OptimizerConfig& c, std::size_t dim, float lr, const float* g, float* w) noexcept {
  float* state = w + dim;
  switch (c.kind) {
    case OptimizerKind::kSgd: return sgd(dim, lr, g, w);
    case OptimizerKind::kAdagrad: return adagrad(c, dim, lr, g, w, state);
    case OptimizerKind::kRowwiseAdagrad: return rowwise_adagrad(c, dim, lr, g, w, state);
    case OptimizerKind::kAdam: return adam(c, dim, lr, g, w, state);
  }
}

}  // namespace freshet
