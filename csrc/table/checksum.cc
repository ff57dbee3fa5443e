#include "checksum.h"

#include <array>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#include <nmmintrin.h>
#define FRESHET_CRC_INSTRUCTION 1
#else
#define FRESHET_CRC_INSTRUCTION 0
#endif

namespace freshet {
namespace {

using Table = std::array<std::uint32_t, 256>;

constexpr std::uint32_t kPolynomial = 0x82f63b78U;  // 0x1edc6f41 with its bits reversed

// tables[k][b]: what byte b leaves in the register after k more bytes of zero.
template <std::size_t N>
constexpr std::array<Table, N> make_tables() noexcept {
  std::array<Table, N> tables{};
  for (std::uint32_t b = 0; b < 256; ++b) {
    std::uint32_t crc = b;
    for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ ((crc & 1U) != 0 ? kPolynomial : 0U);
    tables[0][b] = crc;
  }
  for (std::size_t k = 1; k < N; ++k) {
    for (std::size_t b = 0; b < 256; ++b) tables[k][b] = tables[k - 1][b] >> 8 ^ tables[0][tables[k - 1][b] & 0xff];
  }
  return tables;
}
constexpr std::array<Table, 8> kTables = make_tables<8>();

std::uint64_t load_little_endian(const unsigned char* p) noexcept {
  std::uint64_t word = 0;
  for (int i = 7; i >= 0; --i) word = word << 8 | p[i];
  return word;
}

#if FRESHET_CRC_INSTRUCTION

// The instruction takes 3 cycles but starts every cycle: three lanes keep it busy.
constexpr std::size_t kLane = 2048;

// What kLane bytes of zero make of a register: linear, so the four bytes of the register are looked up one by one.
class ZeroLane {
 public:
  ZeroLane() noexcept {
    for (std::size_t byte = 0; byte < 4; ++byte) {
      for (std::uint32_t b = 0; b < 256; ++b) tables_[byte][b] = append_zeros(b << (8 * byte));
    }
  }
  std::uint32_t operator()(std::uint32_t crc) const noexcept {
    return tables_[0][crc & 0xff] ^ tables_[1][crc >> 8 & 0xff] ^ tables_[2][crc >> 16 & 0xff] ^ tables_[3][crc >> 24];
  }

 private:
  static std::uint32_t append_zeros(std::uint32_t crc) noexcept {
    for (std::size_t i = 0; i < kLane; ++i) crc = crc >> 8 ^ kTables[0][crc & 0xff];
    return crc;
  }

  std::array<Table, 4> tables_;
};

__attribute__((target("sse4.2"))) std::uint64_t step(std::uint64_t crc, const unsigned char* p) noexcept {
  std::uint64_t word;
  std::memcpy(&word, p, sizeof word);
  return _mm_crc32_u64(crc, word);
}

__attribute__((target("sse4.2"))) std::uint32_t crc32c_instruction(const unsigned char* p, std::size_t bytes,
                                                                   std::uint32_t before) noexcept {
  static const ZeroLane zero_lane;
  std::uint64_t crc = ~before;
  for (; bytes >= 3 * kLane; p += 3 * kLane, bytes -= 3 * kLane) {
    std::uint64_t second = 0, third = 0;
    for (std::size_t i = 0; i < kLane; i += 8) {
      crc = step(crc, p + i);
      second = step(second, p + kLane + i);
      third = step(third, p + 2 * kLane + i);
    }
    const std::uint32_t two = zero_lane(static_cast<std::uint32_t>(crc)) ^ static_cast<std::uint32_t>(second);
    crc = zero_lane(two) ^ static_cast<std::uint32_t>(third);
  }
  for (; bytes >= 8; p += 8, bytes -= 8) crc = step(crc, p);
  auto rest = static_cast<std::uint32_t>(crc);
  for (; bytes != 0; ++p, --bytes) rest = _mm_crc32_u8(rest, *p);
  return ~rest;
}

#endif

}  // namespace

std::uint32_t crc32c_portable(const void* data, std::size_t bytes, std::uint32_t before) noexcept {
  const auto* p = static_cast<const unsigned char*>(data);
  std::uint32_t crc = ~before;
  for (; bytes >= 8; p += 8, bytes -= 8) {
    const std::uint64_t word = load_little_endian(p) ^ crc;
    crc = 0;
    for (std::size_t k = 0; k < 8; ++k) crc ^= kTables[7 - k][word >> (8 * k) & 0xff];
  }
  for (; bytes != 0; ++p, --bytes) crc = crc >> 8 ^ kTables[0][(crc ^ *p) & 0xff];
  return ~crc;
}

std::uint32_t crc32c(const void* data, std::size_t bytes, std::uint32_t before) noexcept {
#if FRESHET_CRC_INSTRUCTION
  static const bool available = __builtin_cpu_supports("sse4.2") != 0;
  if (available) return crc32c_instruction(static_cast<const unsigned char*>(data), bytes, before);
#endif
  return crc32c_portable(data, bytes, before);
}

}  // namespace freshet
