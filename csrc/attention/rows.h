// A tile of rows: what each of them sees, and which part of a tile of keys any of them sees.
#pragma once

#include "simd.h"
#include "task.h"

namespace freshet::attention {
namespace {

// Positions are relative to the sequence's first key. Row r sees [0, prefix), [begin, end) and itself.
struct Rows {
  std::size_t count = 0;
  std::size_t first = 0;  // of all rows of the call
  std::int64_t prefix[kMaxRowTile], begin[kMaxRowTile], end[kMaxRowTile], self[kMaxRowTile];
  std::int64_t longest_prefix = 0, lowest = 0, highest = 0;  // beyond the prefixes: all they see is [lowest, highest)
};

inline void set_rows(const Task& task, std::size_t from, std::size_t count, Rows& rows) {
  rows.count = count;
  rows.first = task.first_row + from;
  rows.longest_prefix = 0;
  rows.lowest = static_cast<std::int64_t>(task.keys);
  rows.highest = 0;
  for (std::size_t r = 0; r < count; ++r) {
    const std::size_t row = rows.first + r;
    const std::int64_t prefix = task.in->prefix != nullptr ? task.in->prefix[row] : 0;
    const std::int64_t begin = task.in->begin[row], end = task.in->end[row];
    const auto self = static_cast<std::int64_t>(task.own + from + r);
    rows.prefix[r] = prefix, rows.begin[r] = begin, rows.end[r] = end, rows.self[r] = self;
    const std::int64_t low = begin < end && begin < self ? begin : self, high = end > self ? end : self + 1;
    if (prefix > rows.longest_prefix) rows.longest_prefix = prefix;
    if (low < rows.lowest) rows.lowest = low;
    if (high > rows.highest) rows.highest = high;
  }
}

// The part of one tile of keys that some row sees, relative to the tile's first key.
struct Span {
  std::size_t first_key, first = kKeyTile, last = 0;  // keys [first, last); empty when first >= last
  std::size_t first_vector = 0, vectors = 0;
  bool whole = false;  // every row sees every key of these vectors
  std::size_t start() const { return first_vector * kLanes; }
  std::size_t stop() const { return (first_vector + vectors) * kLanes; }
};

FRESHET_INLINE std::size_t inside(std::int64_t position, std::size_t first_key) {
  const std::int64_t local = position - static_cast<std::int64_t>(first_key);
  const auto size = static_cast<std::int64_t>(kKeyTile);
  return static_cast<std::size_t>(local < 0 ? 0 : local > size ? size : local);
}

inline Span span_of(const Rows& rows, std::size_t first_key) {
  Span span{first_key};
  for (std::size_t r = 0; r < rows.count; ++r) {
    const std::size_t prefix = inside(rows.prefix[r], first_key), begin = inside(rows.begin[r], first_key);
    const std::size_t end = inside(rows.end[r], first_key), self = inside(rows.self[r], first_key);
    const std::size_t after_self = inside(rows.self[r] + 1, first_key);
    if (prefix > 0) span.first = 0, span.last = larger(span.last, prefix);
    if (begin < end) span.first = smaller(span.first, begin), span.last = larger(span.last, end);
    if (self < after_self) span.first = smaller(span.first, self), span.last = larger(span.last, after_self);
  }
  if (span.first >= span.last) return span;
  span.first_vector = span.first / kLanes;
  span.vectors = round_up(span.last, kLanes) / kLanes - span.first_vector;
  span.whole = true;
  for (std::size_t r = 0; r < rows.count && span.whole; ++r) {
    const bool interval =
        inside(rows.begin[r], first_key) <= span.start() && inside(rows.end[r], first_key) >= span.stop();
    span.whole = interval || inside(rows.prefix[r], first_key) >= span.stop();
  }
  return span;
}

// The next tile of keys, from `tile` on, that some row may see.
inline std::size_t next_tile(const Rows& rows, std::size_t tile) {
  if (static_cast<std::int64_t>(tile * kKeyTile) < rows.longest_prefix) return tile;
  return larger(tile, static_cast<std::size_t>(rows.lowest) / kKeyTile);
}

inline std::size_t end_tile(const Rows& rows) {
  const std::int64_t end = rows.highest > rows.longest_prefix ? rows.highest : rows.longest_prefix;
  return (static_cast<std::size_t>(end) + kKeyTile - 1) / kKeyTile;
}

// Zeros where row r does not see the key; `values` is the row's line of the tile.
inline void hide_unseen(const Rows& rows, std::size_t r, const Span& span, float* values) {
  const std::size_t self = inside(rows.self[r], span.first_key);
  const bool has_self = rows.self[r] >= static_cast<std::int64_t>(span.first_key) && self < span.stop();
  const float own = has_self ? values[self] : 0.0f;
  std::size_t at = larger(span.start(), inside(rows.prefix[r], span.first_key));
  const std::size_t begin = smaller(inside(rows.begin[r], span.first_key), span.stop());
  for (; at < begin; ++at) values[at] = 0;
  for (at = larger(at, inside(rows.end[r], span.first_key)); at < span.stop(); ++at) values[at] = 0;
  if (has_self) values[self] = own;
}

}  // namespace
}  // namespace freshet::attention
