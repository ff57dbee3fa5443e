// What the tests of the serving table share.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "serving_table.h"

#define CHECK(condition)                                                             \
  do {                                                                               \
    if (!(condition)) {                                                              \
      std::fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                                  \
    }                                                                                \
  } while (false)

namespace freshet::testing {

using Ids = std::vector<std::int64_t>;
using Floats = std::vector<float>;

inline constexpr Precision kPrecisions[] = {Precision::kFp32, Precision::kFp16, Precision::kInt8};
inline constexpr std::int64_t kMin = std::numeric_limits<std::int64_t>::min();
inline constexpr std::int64_t kMax = std::numeric_limits<std::int64_t>::max();

inline ServingConfig config_of(std::size_t dim, Precision precision) {
  ServingConfig config;
  config.dim = dim;
  config.precision = precision;
  config.seed = 7;
  config.slot_hash = 11;
  return config;
}

inline Floats lookup(const ServingTable& table, const Ids& ids, Missing missing = Missing::kZeros) {
  Floats out(ids.size() * table.dim(), 99.0F);
  table.lookup(ids.data(), ids.size(), out.data(), missing, 1);
  return out;
}

inline ServingTable::Applied apply(ServingTable& table, const Ids& keys, const Floats& weights,
                                   const Ids& tombstones = {}) {
  return table.apply(keys.data(), keys.size(), weights.data(), tombstones.data(), tombstones.size());
}

inline bool same_bits(const Floats& a, const Floats& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

inline std::uint64_t mix(std::uint64_t a, std::uint64_t b, std::uint64_t c) {
  return mix64(mix64(a * 3 + b) * 5 + c);
}

// A row that every precision holds exactly, from which its version (1 to 16) can be told; half of one is no such row.
inline constexpr std::size_t kRowDim = 13;
inline void exact_row(std::int64_t key, int version, float* row) {
  row[0] = 127.0F * static_cast<float>(version);
  for (std::size_t j = 1; j < kRowDim; ++j) {
    const auto q = static_cast<int>(mix(static_cast<std::uint64_t>(key), static_cast<std::uint64_t>(version), j) % 255);
    row[j] = static_cast<float>((q - 127) * version);
  }
}
inline Floats exact_rows(const Ids& keys, int version) {
  Floats rows(keys.size() * kRowDim);
  for (std::size_t i = 0; i < keys.size(); ++i) exact_row(keys[i], version, rows.data() + i * kRowDim);
  return rows;
}
// 0 if there is no row; ends the test if it is half a row or another key's.
inline int version_of(std::int64_t key, const float* row) {
  if (row[0] == 0.0F) return 0;
  const int version = static_cast<int>(row[0] / 127.0F);
  CHECK(version >= 1 && version <= 16);
  float expected[kRowDim];
  exact_row(key, version, expected);
  CHECK(std::memcmp(expected, row, sizeof expected) == 0);
  return version;
}

}  // namespace freshet::testing
