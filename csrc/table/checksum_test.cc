// Tests of the checksum; run by `make -C csrc test`, `asan` and `tsan`.
#include "checksum.h"

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "hash.h"

namespace {

using freshet::crc32c;
using freshet::crc32c_portable;

#define CHECK(condition)                                                        \
  do {                                                                          \
    if (!(condition)) {                                                         \
      std::fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                             \
    }                                                                           \
  } while (false)

// One bit at a time, as the definition says.
std::uint32_t by_definition(const unsigned char* p, std::size_t bytes) {
  std::uint32_t crc = ~std::uint32_t{0};
  for (std::size_t i = 0; i < bytes; ++i) {
    crc ^= p[i];
    for (int bit = 0; bit < 8; ++bit) crc = (crc & 1U) != 0 ? crc >> 1 ^ 0x82f63b78U : crc >> 1;
  }
  return ~crc;
}

std::vector<unsigned char> noise(std::size_t bytes) {
  std::vector<unsigned char> data(bytes);
  for (std::size_t i = 0; i < bytes; ++i) data[i] = static_cast<unsigned char>(freshet::mix64(i + 1));
  return data;
}

// RFC 3720, appendix B.4.
void the_published_examples_hold() {
  const std::string digits = "123456789", zeros(32, '\0'), ones(32, '\xff');
  std::string ascending;
  for (char c = 0; c < 32; ++c) ascending += c;
  for (const auto& [text, crc] : {std::pair{digits, 0xe3069283U}, {zeros, 0x8a9136aaU}, {ones, 0x62a8ab43U},
                                  {ascending, 0x46dd794eU}, {std::string(), 0U}}) {
    CHECK(crc32c(text.data(), text.size()) == crc);
    CHECK(crc32c_portable(text.data(), text.size()) == crc);
  }
}

void every_length_and_alignment_agrees_with_the_definition() {
  const auto data = noise(20000);
  for (std::size_t start = 0; start < 9; ++start) {
    for (const std::size_t bytes : {0, 1, 7, 8, 9, 63, 6143, 6144, 6145, 6151, 12288, 19990}) {
      const std::uint32_t expected = by_definition(data.data() + start, bytes);
      CHECK(crc32c(data.data() + start, bytes) == expected);
      CHECK(crc32c_portable(data.data() + start, bytes) == expected);
    }
  }
}

void parts_in_order_give_the_checksum_of_the_whole() {
  const auto data = noise(20000);
  const std::uint32_t whole = crc32c(data.data(), data.size());
  for (std::size_t cut = 0; cut <= data.size(); cut += 617) {
    CHECK(crc32c(data.data() + cut, data.size() - cut, crc32c(data.data(), cut)) == whole);
    CHECK(crc32c_portable(data.data() + cut, data.size() - cut, crc32c_portable(data.data(), cut)) == whole);
  }
}

}  // namespace

int main() {
  the_published_examples_hold();
  every_length_and_alignment_agrees_with_the_definition();
  parts_in_order_give_the_checksum_of_the_whole();
  std::puts("ok");
}
