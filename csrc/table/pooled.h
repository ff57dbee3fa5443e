// Sums of rows over bags of ids.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "../common/parallel.h"

namespace freshet {

enum class BagMean : bool { kNo, kYes };  // divide a bag's sum by its number of ids

// Bag b holds ids[offsets[b]] to ids[offsets[b + 1] - 1]; writes the sum of their rows, in that order, to out[b, dim]:
// zeros for an empty bag. read(ids, count, rows[count, dim]) gets up to `block` ids at a time, full blocks across short
// bags, and returns how many of them had no row; so does this. std::invalid_argument unless offsets rise from 0 to n.
template <typename ReadBlock>
std::size_t pool_bags(const std::int64_t* ids, std::size_t n, const std::int64_t* offsets, std::size_t bags,
                      BagMean mean, std::size_t dim, std::size_t block, std::size_t threads, float* out,
                      const ReadBlock& read) {
  bool rising = offsets[0] == 0 && offsets[bags] == static_cast<std::int64_t>(n);
  for (std::size_t b = 0; b < bags; ++b) rising &= offsets[b] <= offsets[b + 1];
  if (!rising) throw std::invalid_argument("offsets must rise from 0 to the number of ids");
  constexpr std::size_t kTask = 256;  // bags
  const auto offset = [offsets](std::size_t bag) { return static_cast<std::size_t>(offsets[bag]); };
  std::atomic<std::size_t> absent{0};
  parallel_for((bags + kTask - 1) / kTask, threads, [&](std::size_t task) {
    const std::size_t first = task * kTask, last = std::min(bags, first + kTask);
    std::vector<float> rows(block * dim);
    std::fill_n(out + first * dim, (last - first) * dim, 0.0F);
    std::size_t misses = 0, bag = first;
    for (std::size_t at = offset(first); at < offset(last); at += block) {
      const std::size_t count = std::min(block, offset(last) - at);
      misses += read(ids + at, count, rows.data());
      for (std::size_t i = 0; i < count; ++i) {
        while (offset(bag + 1) <= at + i) ++bag;
        for (std::size_t j = 0; j < dim; ++j) out[bag * dim + j] += rows[i * dim + j];
      }
    }
    for (bag = first; mean == BagMean::kYes && bag < last; ++bag) {
      const auto size = static_cast<float>(std::max<std::size_t>(offset(bag + 1) - offset(bag), 1));
      for (std::size_t j = 0; j < dim; ++j) out[bag * dim + j] /= size;
    }
    absent.fetch_add(misses, std::memory_order_relaxed);
  });
  return absent.load();
}

}  // namespace freshet
