// Buckets of integer time gaps by a table of boundaries: exactly, and fast for gaps below 2^31.
#pragma once

#include <cstddef>
#include <cstdint>

namespace freshet::attention {

constexpr int kTimeBoundaries = 128;
constexpr int kTimeBuckets = kTimeBoundaries + 1;

// A gap of 1 .. 2^31 - 1 falls into the cell 4 * floor(log2(gap)) + the two bits after its leading one: the top bits of
// the gap as a float. Buckets grow by 1.35 and cells by at most 1.25, so a cell holds at most one boundary and
// bucket = gap >= cell_bound ? high : low.
struct TimeTable {
  std::int64_t boundary[kTimeBoundaries];
  alignas(64) std::int32_t cell_bound[128];
  alignas(64) std::int32_t cell_buckets[128];  // low + 256 * high
};

// Throws std::invalid_argument when the boundaries are not ascending or two of them share a cell.
TimeTable make_time_table(const std::int64_t* boundaries);

// How many boundaries are <= |gap|. Internal linkage: this header is compiled for several instruction sets.
[[maybe_unused]] static int time_bucket(const TimeTable& table, std::int64_t gap) {
  if (gap < 0) gap = static_cast<std::int64_t>(0 - static_cast<std::uint64_t>(gap));  // INT64_MIN stays: bucket 0
  int low = 0, high = kTimeBoundaries;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (table.boundary[middle] <= gap) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

}  // namespace freshet::attention
