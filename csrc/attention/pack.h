// Rows in storage format <-> float tiles, straight and transposed.
#pragma once

#include "simd.h"
#include "task.h"

namespace freshet::attention {
namespace {

FRESHET_INLINE float widen(std::uint16_t half) {
  const std::uint32_t bits = static_cast<std::uint32_t>(half) << 16;
  float out;
  __builtin_memcpy(&out, &bits, sizeof out);
  return out;
}

// To nearest, ties to even; NaN stays NaN.
FRESHET_INLINE std::uint16_t narrow(float value) {
  std::uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  if (value != value) return static_cast<std::uint16_t>((bits >> 16) | 0x40);
  return static_cast<std::uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// `count` rows of `width` numbers, `stride` apart -> rows of `padded` floats times `scale`, zeros behind.
inline void read_rows(const void* from, Storage storage, std::size_t offset, std::size_t stride, std::size_t count,
                      std::size_t width, float scale, float* to, std::size_t padded) {
  for (std::size_t r = 0; r < count; ++r, offset += stride, to += padded) {
    if (storage == Storage::kFloat32) {
      const float* row = static_cast<const float*>(from) + offset;
      for (std::size_t i = 0; i < width; ++i) to[i] = row[i] * scale;
    } else {
      const std::uint16_t* row = static_cast<const std::uint16_t*>(from) + offset;
      for (std::size_t i = 0; i < width; ++i) to[i] = widen(row[i]) * scale;
    }
    for (std::size_t i = width; i < padded; ++i) to[i] = 0;
  }
}

inline void write_rows(const float* from, std::size_t padded, float scale, void* to, Storage storage,
                       std::size_t offset, std::size_t stride, std::size_t count, std::size_t width) {
  for (std::size_t r = 0; r < count; ++r, offset += stride, from += padded) {
    if (storage == Storage::kFloat32) {
      float* row = static_cast<float*>(to) + offset;
      for (std::size_t i = 0; i < width; ++i) row[i] = from[i] * scale;
    } else {
      std::uint16_t* row = static_cast<std::uint16_t*>(to) + offset;
      for (std::size_t i = 0; i < width; ++i) row[i] = narrow(from[i] * scale);
    }
  }
}

inline void fill_zero(float* to, std::size_t count) { __builtin_memset(to, 0, count * sizeof(float)); }

// out[c][r] = in[r][c]; rows and columns are multiples of 4.
inline void transpose(const float* in, std::size_t in_stride, std::size_t rows, std::size_t columns, float* out,
                      std::size_t out_stride) {
  typedef float Four __attribute__((vector_size(16)));
  for (std::size_t r = 0; r < rows; r += 4) {
    for (std::size_t c = 0; c < columns; c += 4) {
      Four a, b, d, e;
      __builtin_memcpy(&a, in + r * in_stride + c, 16);
      __builtin_memcpy(&b, in + (r + 1) * in_stride + c, 16);
      __builtin_memcpy(&d, in + (r + 2) * in_stride + c, 16);
      __builtin_memcpy(&e, in + (r + 3) * in_stride + c, 16);
      const Four ab_low = __builtin_shufflevector(a, b, 0, 4, 1, 5);
      const Four ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
      const Four de_low = __builtin_shufflevector(d, e, 0, 4, 1, 5);
      const Four de_high = __builtin_shufflevector(d, e, 2, 6, 3, 7);
      a = __builtin_shufflevector(ab_low, de_low, 0, 1, 4, 5);
      b = __builtin_shufflevector(ab_low, de_low, 2, 3, 6, 7);
      d = __builtin_shufflevector(ab_high, de_high, 0, 1, 4, 5);
      e = __builtin_shufflevector(ab_high, de_high, 2, 3, 6, 7);
      __builtin_memcpy(out + c * out_stride + r, &a, 16);
      __builtin_memcpy(out + (c + 1) * out_stride + r, &b, 16);
      __builtin_memcpy(out + (c + 2) * out_stride + r, &d, 16);
      __builtin_memcpy(out + (c + 3) * out_stride + r, &e, 16);
    }
  }
}

}  // namespace
}  // namespace freshet::attention
