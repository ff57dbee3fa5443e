// The ceiling: rows whose number is known, with prefetch and nothing else.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "peer_slab.h"

namespace bench {

inline constexpr std::size_t kGatherAhead = 16;  // rows prefetched ahead of the copy

FRESHET_CLONES inline void gather_part(const float* table, std::size_t dim, const std::uint32_t* rows,
                                       std::size_t begin, std::size_t end, float* out) {
  const std::size_t bytes = dim * sizeof(float);
  for (std::size_t i = begin; i < std::min(begin + kGatherAhead, end); ++i) {
    freshet::prefetch_lines(table + rows[i] * dim, bytes);
  }
  for (std::size_t i = begin; i < end; ++i) {
    if (i + kGatherAhead < end) freshet::prefetch_lines(table + rows[i + kGatherAhead] * dim, bytes);
    const char* const from = reinterpret_cast<const char*>(table + rows[i] * dim);
    char* const to = reinterpret_cast<char*>(out + i * dim);
    freshet::copy_words(from, bytes, to);
  }
}

// dim must be a multiple of 16: whole cache lines.
class GatherTable {
 public:
  static constexpr const char* kName = "gather";

  GatherTable(std::size_t rows, std::size_t dim)
      : dim_(dim), table_(reinterpret_cast<float*>(allocate_huge(rows * dim * sizeof(float)))) {
    for (std::size_t i = 0; i < rows * dim; ++i) table_[i] = static_cast<float>(i % 1024);
  }
  ~GatherTable() { std::free(table_); }
  GatherTable(const GatherTable&) = delete;
  GatherTable& operator=(const GatherTable&) = delete;

  void gather(const std::uint32_t* rows, std::size_t n, float* out, std::size_t threads) const {
    freshet::parallel_for(threads, threads, [&](std::size_t part) {
      gather_part(table_, dim_, rows, n * part / threads, n * (part + 1) / threads, out);
    });
  }

 private:
  const std::size_t dim_;
  float* const table_;
};

}  // namespace bench
