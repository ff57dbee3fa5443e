// Vectors of kLanes floats, and SiLU on them. Included once by each kernel_*.cc, after it has defined Isa; everything
// is in an unnamed namespace, so the copies for different instruction sets never mix.
#pragma once

#include <cstddef>
#include <cstdint>

#include "time_table.h"

#define FRESHET_INLINE inline __attribute__((always_inline))

namespace freshet::attention {
namespace {

constexpr std::size_t kLanes = Isa::kLanes;
typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef std::int32_t Ints __attribute__((vector_size(kLanes * 4)));

FRESHET_INLINE Floats load(const float* from) {
  Floats out;
  __builtin_memcpy(&out, from, sizeof out);
  return out;
}
FRESHET_INLINE Ints load(const std::int32_t* from) {
  Ints out;
  __builtin_memcpy(&out, from, sizeof out);
  return out;
}
FRESHET_INLINE void store(float* to, Floats value) { __builtin_memcpy(to, &value, sizeof value); }
FRESHET_INLINE void store(std::int32_t* to, Ints value) { __builtin_memcpy(to, &value, sizeof value); }

constexpr std::size_t round_up(std::size_t n, std::size_t to) { return (n + to - 1) / to * to; }
constexpr std::size_t smaller(std::size_t a, std::size_t b) { return a < b ? a : b; }
constexpr std::size_t larger(std::size_t a, std::size_t b) { return a > b ? a : b; }

// exp(x) for x in [-87, 87]; relative error below 1.2e-7 (tested). NaN stays NaN; beyond the range, the value at its
// end. e^x = 2^n e^f, |f| <= ln(2)/2; e^f - 1 - f over f^2 is a minimax polynomial of degree 4 (3e-9 relative).
FRESHET_INLINE Floats exp(Floats x) {
  const Floats zero = {};
  x = x > 87.0f ? zero + 87.0f : x;
  x = x < -87.0f ? zero - 87.0f : x;
  const Floats magic = zero + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const Floats shifted = x * 1.44269504f + magic;
  const Floats n = shifted - magic;
  Floats f = x - n * 0.693145752f;  // ln(2) in two parts; the product with the first is exact
  f = f - n * 1.42860682e-6f;
  Floats p = f * 0.00138145394f + 0.00836874545f;
  p = p * f + 0.0416683890f;
  p = p * f + 0.166665211f;
  p = p * f + 0.499999940f;
  p = p * (f * f) + f + 1.0f;
  const Ints scale = ((Ints)shifted - (Ints)magic + 127) << 23;
  return p * (Floats)scale;
}

FRESHET_INLINE Floats sigmoid(Floats x) { return 1.0f / (1.0f + exp(-x)); }

FRESHET_INLINE Ints pick(Ints condition, Ints yes, Ints no) { return (condition & yes) | (~condition & no); }

// Time buckets of gaps whose absolute value is below 2^31.
FRESHET_INLINE Ints time_buckets(const TimeTable& table, Ints gap) {
  gap = gap < 0 ? -gap : gap;
  gap = gap < 1 ? gap - gap + 1 : gap;
  const Ints cut = gap & ~(gap >> 24);  // drops what would make the conversion round up into the next cell
  const Ints cell = ((Ints) __builtin_convertvector(cut, Floats) >> 21) - (127 << 2);
  const Ints bound = Isa::lookup(table.cell_bound, cell);
  const Ints buckets = Isa::lookup(table.cell_buckets, cell);
  return pick(gap >= bound, buckets >> 8, buckets & 255);
}

}  // namespace
}  // namespace freshet::attention
