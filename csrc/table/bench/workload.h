// Keys, batches of them, and rows that show whether they were copied whole.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "../hash.h"

namespace bench {

// The i-th key: all are distinct, and look random in all 64 bits.
inline std::int64_t key_at(std::uint64_t i) {
  return static_cast<std::int64_t>(freshet::mix64(i * 0xd1342543de82ef95ULL + 0x632be59bd9b4e019ULL));
}

inline std::vector<std::int64_t> keys_from(std::uint64_t first, std::size_t n) {
  std::vector<std::int64_t> keys(n);
  for (std::size_t i = 0; i < n; ++i) keys[i] = key_at(first + i);
  return keys;
}

struct Batches {
  std::string name;
  std::size_t size;
  std::vector<std::uint32_t> rows;  // [count * size]
  std::vector<std::int64_t> keys;   // [count * size]: key_at(row)
  std::string file{};               // holds `rows`, once saved

  std::size_t count() const { return rows.size() / size; }
  const std::int64_t* keys_of(std::size_t batch) const { return keys.data() + batch * size; }
  const std::uint32_t* rows_of(std::size_t batch) const { return rows.data() + batch * size; }
};

inline Batches batches_of(std::string name, std::size_t size, std::vector<std::uint32_t> rows) {
  std::vector<std::int64_t> keys(rows.size());
  std::transform(rows.begin(), rows.end(), keys.begin(), [](std::uint32_t row) { return key_at(row); });
  return {std::move(name), size, std::move(rows), std::move(keys)};
}

inline Batches uniform_batches(std::size_t table_rows, std::size_t count, std::size_t size, std::uint64_t seed = 1) {
  std::mt19937_64 random(seed);
  std::uniform_int_distribution<std::uint32_t> row(0, static_cast<std::uint32_t>(table_rows - 1));
  std::vector<std::uint32_t> rows(count * size);
  for (std::uint32_t& r : rows) r = row(random);
  return batches_of("uniform", size, std::move(rows));
}

// P(rank) ~ rank^-1.05; which row has which rank is random, so that hot rows do not lie together.
inline Batches zipf_batches(std::size_t table_rows, std::size_t count, std::size_t size, std::uint64_t seed = 2) {
  std::mt19937_64 random(seed);
  std::vector<double> cumulative(table_rows);
  double sum = 0;
  for (std::size_t rank = 0; rank < table_rows; ++rank) {
    sum += std::pow(static_cast<double>(rank + 1), -1.05);
    cumulative[rank] = sum;
  }
  std::vector<std::uint32_t> row_of_rank(table_rows);
  std::iota(row_of_rank.begin(), row_of_rank.end(), 0U);
  std::shuffle(row_of_rank.begin(), row_of_rank.end(), random);
  std::uniform_real_distribution<double> draw(0, sum);
  std::vector<std::uint32_t> rows(count * size);
  for (std::uint32_t& row : rows) {
    const auto rank = std::upper_bound(cumulative.begin(), cumulative.end() - 1, draw(random)) - cumulative.begin();
    row = row_of_rank[static_cast<std::size_t>(rank)];
  }
  return batches_of("zipf", size, std::move(rows));
}

// Writes the row numbers, uint32, for the process that takes turns.
inline void save_rows(const std::string& directory, Batches* batches) {
  batches->file = directory + "/batches_" + batches->name + ".u32";
  std::FILE* const file = std::fopen(batches->file.c_str(), "wb");
  if (file == nullptr || std::fwrite(batches->rows.data(), 4, batches->rows.size(), file) != batches->rows.size() ||
      std::fclose(file) != 0) {
    std::fprintf(stderr, "error: cannot write %s; use --directory with a writable directory\n", batches->file.c_str());
    std::exit(1);
  }
}

// Every float of a row carries 16 bits of the key and 7 bits of a version. So a row of another key, a row of two
// versions, and zeros are all seen for what they are.
inline float tag(std::int64_t key, std::uint32_t version, std::size_t j) {
  const std::uint64_t part = static_cast<std::uint64_t>(key) >> (16 * (j % 4)) & 0xffff;
  return static_cast<float>((version % 127 + 1) << 16 | part);
}

inline void fill_tagged(std::int64_t key, std::uint32_t version, std::size_t dim, float* row) {
  for (std::size_t j = 0; j < dim; ++j) row[j] = tag(key, version, j);
}

enum class Row { kWhole, kMissing, kTorn };

// dim must be a multiple of 4.
inline Row check_tagged(std::int64_t key, std::size_t dim, const float* row) {
  const bool tagged = row[0] >= 0 && row[0] < 0x1p24F;
  const std::uint32_t version = tagged ? static_cast<std::uint32_t>(row[0]) >> 16 : 0;
  std::size_t wrong = 0;
  if (version != 0) {
    float expected[4];
    for (std::size_t j = 0; j < 4; ++j) expected[j] = tag(key, version - 1, j);
    for (std::size_t j = 0; j < dim; ++j) wrong += row[j] != expected[j % 4];
    return wrong == 0 ? Row::kWhole : Row::kTorn;
  }
  for (std::size_t j = 0; j < dim; ++j) wrong += row[j] != 0.0F;
  return wrong == 0 ? Row::kMissing : Row::kTorn;
}

}  // namespace bench
