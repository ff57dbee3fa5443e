// Tests of the row formats of the serving table; run by `make -C csrc test` and `asan`.
#include "row_codec.h"

#include <algorithm>
#include <cmath>
#include <random>

#include "serving_test.h"

namespace {

using namespace freshet::testing;
using freshet::Precision;
using freshet::RowCodec;

float float_of(std::uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

void test_fp16_rounds_to_nearest_even() {
  const struct { float value; std::uint16_t half; } cases[] = {
      {0.0F, 0}, {-0.0F, 0x8000}, {1.0F, 0x3c00}, {-2.0F, 0xc000}, {65504.0F, 0x7bff}, {65519.996F, 0x7bff},
      {1.0F + 0x1p-11F, 0x3c00}, {1.0F + 3 * 0x1p-11F, 0x3c02}, {1.0F + 0x1.002p-11F, 0x3c01},  // ties, and beyond one
      {0x1p-14F, 0x0400}, {0x1.ff8p-15F, 0x03ff}, {0x1.ffcp-15F, 0x0400},  // around the smallest normal
      {0x1p-24F, 1}, {0x1p-25F, 0}, {0x1.000002p-25F, 1}, {0x1.8p-24F, 2}, {-0x1p-149F, 0x8000}};
  for (const auto& c : cases) {
    std::uint16_t half = 99;
    freshet::to_fp16(&c.value, 1, &half);
    CHECK(half == c.half);
  }
}

void test_fp16_is_the_same_with_and_without_the_instructions() {
  std::vector<std::uint16_t> halves, back(1U << 16);
  for (std::uint32_t h = 0; h < 1U << 16; ++h) {
    if ((h & 0x7c00U) != 0x7c00U) halves.push_back(static_cast<std::uint16_t>(h));
  }
  Floats by_cpu(halves.size()), portable(halves.size());
  freshet::from_fp16(halves.data(), halves.size(), by_cpu.data());
  freshet::from_fp16_portable(halves.data(), halves.size(), portable.data());
  CHECK(same_bits(by_cpu, portable));
  back.resize(halves.size());
  freshet::to_fp16(by_cpu.data(), by_cpu.size(), back.data());
  CHECK(back == halves);

  constexpr std::uint32_t kStep = 1021;
  Floats values;
  for (std::uint32_t magnitude = 0; magnitude < 0x477ff000U; magnitude += kStep) {
    values.push_back(float_of(magnitude | (magnitude % 2) << 31));
  }
  std::vector<std::uint16_t> a(values.size()), b(values.size());
  freshet::to_fp16(values.data(), values.size(), a.data());
  freshet::to_fp16_portable(values.data(), values.size(), b.data());
  CHECK(a == b);
}

void test_int8_keeps_its_bound_at_every_magnitude() {
  std::mt19937 random(1);
  for (const std::size_t dim : {1, 2, 3, 64, 77}) {
    const RowCodec codec(Precision::kInt8, dim);
    std::vector<char> row(codec.row_bytes());
    for (int exponent = -149; exponent <= 128; ++exponent) {
      Floats weights(dim), served(dim);
      for (float& w : weights) {
        w = std::ldexp(std::uniform_real_distribution<float>(-1.0F, 1.0F)(random), exponent);
        if (!std::isfinite(w)) w = std::numeric_limits<float>::max();
      }
      codec.encode(weights.data(), row.data());
      codec.decode(row.data(), served.data());
      double largest = 0.0;
      for (const float w : weights) largest = std::max(largest, std::fabs(static_cast<double>(w)));
      const double scale = std::max(largest / 127.0, 0x1p-126);
      for (std::size_t j = 0; j < dim; ++j) {
        CHECK(std::fabs(static_cast<double>(weights[j]) - static_cast<double>(served[j])) <= scale / 2 * (1 + 0x1p-14));
      }
    }
  }
}

void test_rounding_is_decoding_what_was_encoded() {
  std::mt19937 random(2);
  for (const Precision precision : kPrecisions) {
    for (const std::size_t dim : {1, 7, 64, 65, 200}) {
      const RowCodec codec(precision, dim);
      std::vector<char> row(codec.row_bytes());
      Floats weights(dim), served(dim);
      for (float& w : weights) w = std::normal_distribution<float>()(random);
      codec.encode(weights.data(), row.data());
      codec.decode(row.data(), served.data());
      CHECK(precision != Precision::kFp32 || same_bits(served, weights));
      codec.round(weights.data());
      CHECK(same_bits(served, weights));
    }
  }
}

}  // namespace

int main() {
  test_fp16_rounds_to_nearest_even();
  test_fp16_is_the_same_with_and_without_the_instructions();
  test_int8_keeps_its_bound_at_every_magnitude();
  test_rounding_is_decoding_what_was_encoded();
  std::puts("row_codec_test: all passed");
  return 0;
}
