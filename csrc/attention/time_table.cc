#include "time_table.h"

#include <algorithm>
#include <stdexcept>

namespace freshet::attention {

TimeTable make_time_table(const std::int64_t* boundaries) {
  TimeTable table{};
  std::copy(boundaries, boundaries + kTimeBoundaries, table.boundary);
  if (!std::is_sorted(boundaries, boundaries + kTimeBoundaries)) {
    throw std::invalid_argument("time boundaries must ascend");
  }
  for (int cell = 0; cell < 31 * 4; ++cell) {
    const std::int64_t power = std::int64_t{1} << (cell / 4);
    const std::int64_t first = (power * (4 + cell % 4) + 3) / 4;  // the cell's gaps are [first, next)
    const std::int64_t next = (power * (5 + cell % 4) + 3) / 4;
    if (first == next) continue;
    const int low = time_bucket(table, first), high = time_bucket(table, next - 1);
    const std::int64_t bound = high == low ? first : table.boundary[high - 1];
    if (high != low && time_bucket(table, bound - 1) != low) {
      throw std::invalid_argument("two time boundaries lie closer together than a quarter of a power of two");
    }
    table.cell_bound[cell] = static_cast<std::int32_t>(bound);
    table.cell_buckets[cell] = low + 256 * high;
  }
  return table;
}

}  // namespace freshet::attention
