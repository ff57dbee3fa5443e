// How a serving table stores a row of weights: as it is, in half precision, or in bytes with one scale.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace freshet {

enum class Precision {
  kFp32,  // equal to the bit
  kFp16,  // IEEE binary16, round to nearest even; magnitudes from 65520 on do not fit
  kInt8,  // q * scale with q = -127 to 127 and scale = max|w| / 127 of the row; error at most scale / 2 (up to the
          // rounding of the float operations, a factor 1 + 2^-14). scale >= 2^-126, so that tiny rows keep the bound
};

Precision parse_precision(const std::string& name);  // std::invalid_argument unless fp32, fp16 or int8
const char* name_of(Precision precision) noexcept;

// Every function gives the same bits on every CPU. A row is row_bytes() long, a multiple of 4; any bytes can be decoded
// (to some numbers), so a row may be decoded while it changes if the result is then thrown away.
class RowCodec {
 public:
  RowCodec(Precision precision, std::size_t dim) noexcept;

  Precision precision() const noexcept { return precision_; }
  std::size_t row_bytes() const noexcept { return row_bytes_; }
  float max_weight() const noexcept;  // the largest magnitude that fits

  // Position of the first value that is not finite or does not fit; n if all are good.
  std::size_t first_unfit(const float* values, std::size_t n) const noexcept;

  // weights[dim], all of which must fit, to row and back.
  void encode(const float* weights, void* row) const noexcept;
  void decode(const void* row, float* weights) const noexcept;
  // decode(encode(weights)) in place: what is served of weights.
  void round(float* weights) const noexcept;

 private:
  Precision precision_;
  std::size_t dim_;
  std::size_t row_bytes_;
};

// Half precision: round to nearest even of finite values below 65520, and exactly back. The first two take the CPU's
// own instructions where it has them; the portable ones give the same bits.
void to_fp16(const float* from, std::size_t n, std::uint16_t* to) noexcept;
void from_fp16(const std::uint16_t* from, std::size_t n, float* to) noexcept;
void to_fp16_portable(const float* from, std::size_t n, std::uint16_t* to) noexcept;
void from_fp16_portable(const std::uint16_t* from, std::size_t n, float* to) noexcept;

}  // namespace freshet
