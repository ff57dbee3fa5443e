#include "row_codec.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "../common/platform.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define FRESHET_F16C 1
#else
#define FRESHET_F16C 0
#endif

namespace freshet {
namespace {

constexpr float kMaxFp16 = 0x1.ffdffep15F;    // the last float below 65520, which would round to infinity
constexpr float kMaxScale = 0x1.020406p+121F; // the largest with 127 * scale finite
constexpr float kMinScale = 0x1p-126F;        // below this a quotient by the scale is no longer exact enough
constexpr std::size_t kChunk = 64;

FRESHET_INLINE std::uint32_t bits_of(float x) noexcept {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
FRESHET_INLINE float float_of(std::uint32_t bits) noexcept {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// Without a branch, so that loops vectorise.
FRESHET_INLINE std::uint32_t choose(bool first, std::uint32_t a, std::uint32_t b) noexcept {
  const std::uint32_t mask = 0U - static_cast<std::uint32_t>(first);
  return (a & mask) | (b & ~mask);
}

FRESHET_CLONES bool all_within(const float* values, std::size_t n, float limit) noexcept {
  std::uint32_t bad = 0;
  for (std::size_t i = 0; i < n; ++i) bad |= std::fabs(values[i]) <= limit ? 0U : 1U;  // NaN compares false
  return bad == 0;
}

// Of finite values. Their bits without the sign are in the order of their magnitudes, and integers vectorise.
FRESHET_CLONES float largest_magnitude(const float* values, std::size_t n) noexcept {
  std::uint32_t largest = 0;
  for (std::size_t i = 0; i < n; ++i) largest = std::max(largest, bits_of(values[i]) & 0x7fffffffU);
  return float_of(largest);
}

FRESHET_INLINE float scale_of(const float* weights, std::size_t n) noexcept {
  return std::min(std::max(largest_magnitude(weights, n) / 127.0F, kMinScale), kMaxScale);
}

// Adding 1.5 * 2^23 leaves the nearest integer (ties to even) in the low bits of the sum.
FRESHET_CLONES void to_int8(const float* weights, float scale, std::size_t n, std::int8_t* to) noexcept {
  constexpr float kShift = 12582912.0F;
  for (std::size_t i = 0; i < n; ++i) {
    to[i] = static_cast<std::int8_t>(static_cast<std::int32_t>(bits_of(weights[i] / scale + kShift) - bits_of(kShift)));
  }
}

FRESHET_CLONES void from_int8(const std::int8_t* from, float scale, std::size_t n, float* to) noexcept {
  for (std::size_t i = 0; i < n; ++i) to[i] = static_cast<float>(from[i]) * scale;
}

#if FRESHET_F16C
__attribute__((target("avx,f16c"))) void to_fp16_f16c(const float* from, std::size_t n, std::uint16_t* to) noexcept {
  constexpr int kNearestEven = _MM_FROUND_TO_NEAREST_INT;
  std::size_t i = 0;
  for (; i + 8 <= n; i += 8) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), kNearestEven));
  }
  for (; i < n; ++i) {
    to[i] = static_cast<std::uint16_t>(_mm_extract_epi16(_mm_cvtps_ph(_mm_set_ss(from[i]), kNearestEven), 0));
  }
}

__attribute__((target("avx,f16c"))) void from_fp16_f16c(const std::uint16_t* from, std::size_t n, float* to) noexcept {
  std::size_t i = 0;
  for (; i + 8 <= n; i += 8) {
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  }
  for (; i < n; ++i) to[i] = _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(from[i])));
}

bool has_f16c() noexcept {
  __builtin_cpu_init();
  return __builtin_cpu_supports("f16c") != 0;
}
const bool kHasF16c = has_f16c();
#endif

}  // namespace

FRESHET_CLONES void to_fp16_portable(const float* from, std::size_t n, std::uint16_t* to) noexcept {
  for (std::size_t i = 0; i < n; ++i) {
    const std::uint32_t bits = bits_of(from[i]);
    const std::uint32_t magnitude = bits & 0x7fffffffU;
    const std::uint32_t rounded = magnitude + 0xfffU + ((magnitude >> 13) & 1U);  // nearest even of the 13 bits dropped
    const std::uint32_t normal = (rounded - (112U << 23)) >> 13;                  // exponents of bias 127 -> 15
    const std::uint32_t subnormal = bits_of(float_of(magnitude) + 0.5F) - bits_of(0.5F);  // 0.5F counts in 2^-24 steps
    to[i] = static_cast<std::uint16_t>((bits >> 16 & 0x8000U) | choose(magnitude >= 0x38800000U, normal, subnormal));
  }
}

FRESHET_CLONES void from_fp16_portable(const std::uint16_t* from, std::size_t n, float* to) noexcept {
  for (std::size_t i = 0; i < n; ++i) {
    const std::uint32_t magnitude = from[i] & 0x7fffU;
    const std::uint32_t normal = (magnitude << 13) + (112U << 23);
    const std::uint32_t subnormal = bits_of(float_of((magnitude & 0x3ffU) | bits_of(0.5F)) - 0.5F);
    to[i] = float_of((from[i] & 0x8000U) << 16 | choose(magnitude >= 0x400U, normal, subnormal));
  }
}

void to_fp16(const float* from, std::size_t n, std::uint16_t* to) noexcept {
#if FRESHET_F16C
  if (kHasF16c) return to_fp16_f16c(from, n, to);
#endif
  to_fp16_portable(from, n, to);
}

void from_fp16(const std::uint16_t* from, std::size_t n, float* to) noexcept {
#if FRESHET_F16C
  if (kHasF16c) return from_fp16_f16c(from, n, to);
#endif
  from_fp16_portable(from, n, to);
}

Precision parse_precision(const std::string& name) {
  for (const Precision p : {Precision::kFp32, Precision::kFp16, Precision::kInt8}) {
    if (name == name_of(p)) return p;
  }
  throw std::invalid_argument("unknown precision '" + name + "'; use fp32, fp16 or int8");
}

const char* name_of(Precision precision) noexcept {
  return precision == Precision::kFp32 ? "fp32" : precision == Precision::kFp16 ? "fp16" : "int8";
}

RowCodec::RowCodec(Precision precision, std::size_t dim) noexcept : precision_(precision), dim_(dim) {
  const std::size_t bytes = precision == Precision::kFp32   ? dim * sizeof(float)
                            : precision == Precision::kFp16 ? dim * sizeof(std::uint16_t)
                                                            : sizeof(float) + dim;
  row_bytes_ = (bytes + 3) / 4 * 4;
}

float RowCodec::max_weight() const noexcept {
  return precision_ == Precision::kFp16 ? kMaxFp16 : std::numeric_limits<float>::max();
}

std::size_t RowCodec::first_unfit(const float* values, std::size_t n) const noexcept {
  const float limit = max_weight();
  if (all_within(values, n, limit)) return n;
  return static_cast<std::size_t>(
      std::find_if(values, values + n, [limit](float w) { return !(std::fabs(w) <= limit); }) - values);
}

void RowCodec::encode(const float* weights, void* row) const noexcept {
  if (precision_ == Precision::kFp32) {
    std::memcpy(row, weights, row_bytes_);
  } else if (precision_ == Precision::kFp16) {
    auto* const halves = static_cast<std::uint16_t*>(row);
    to_fp16(weights, dim_, halves);
    if (dim_ % 2 != 0) halves[dim_] = 0;
  } else {
    const float scale = scale_of(weights, dim_);
    auto* const values = static_cast<std::int8_t*>(row) + sizeof scale;
    std::memcpy(row, &scale, sizeof scale);
    to_int8(weights, scale, dim_, values);
    std::fill(values + dim_, static_cast<std::int8_t*>(row) + row_bytes_, std::int8_t{0});
  }
}

void RowCodec::decode(const void* row, float* weights) const noexcept {
  if (precision_ == Precision::kFp32) {
    std::memcpy(weights, row, row_bytes_);
  } else if (precision_ == Precision::kFp16) {
    from_fp16(static_cast<const std::uint16_t*>(row), dim_, weights);
  } else {
    float scale;
    std::memcpy(&scale, row, sizeof scale);
    from_int8(static_cast<const std::int8_t*>(row) + sizeof scale, scale, dim_, weights);
  }
}

void RowCodec::round(float* weights) const noexcept {
  if (precision_ == Precision::kFp32) return;
  const float scale = precision_ == Precision::kInt8 ? scale_of(weights, dim_) : 0.0F;
  for (std::size_t at = 0; at < dim_; at += kChunk) {
    const std::size_t n = std::min(kChunk, dim_ - at);
    if (precision_ == Precision::kFp16) {
      std::uint16_t halves[kChunk];
      to_fp16(weights + at, n, halves);
      from_fp16(halves, n, weights + at);
    } else {
      std::int8_t values[kChunk];
      to_int8(weights + at, scale, n, values);
      from_int8(values, scale, n, weights + at);
    }
  }
}

}  // namespace freshet
