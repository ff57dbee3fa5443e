// A block of ids on the way to their rows, with the cache misses of all of them overlapping.
#pragma once

#include <cstddef>
#include <cstdint>

#include "shard.h"

namespace freshet {

enum class Intent { kRead, kWrite };

// Buckets are sent for first; then the rows of the ids that they hold; then, where a full bucket does not hold the id, the
// next bucket, which has arrived meanwhile. What was seen has to be proven by `control` once the row was read. Loops that only prefetch are kept apart from those that compute: an address
// has to be translated before its prefetch can retire, and the shorter the loop, the more translations overlap.
template <Intent intent>
struct Flight {
  static constexpr std::size_t kBlock = 64;

  std::uint64_t hash[kBlock];
  Index::Span span[kBlock];        // the bucket that was looked at last
  std::uint32_t control[kBlock];   // of that bucket, before its slots were read
  Handle handle[kBlock];           // what the id stands for by that bucket
  RowMeta* header[kBlock];         // for writing, of a row
  float* row[kBlock];              // nullptr if it is no row
  std::uint16_t open[kBlock];

  // id_of(i), i < n <= kBlock. shard_of(hash).
  template <typename IdOf, typename ShardOf>
  FRESHET_INLINE void send(std::size_t n, std::size_t row_bytes, const IdOf& id_of, const ShardOf& shard_of) noexcept {
    for (std::size_t i = 0; i < n; ++i) {
      hash[i] = hash_id(id_of(i));
      span[i] = shard_of(hash[i]).index().span(hash[i]);
    }
    for (std::size_t i = 0; i < n; ++i) prefetch(span[i].bucket);
    std::size_t left = 0;
    for (std::size_t i = 0; i < n; ++i) left += look(i, id_of(i), left, shard_of(hash[i])) ? 1 : 0;
    for (std::size_t i = 0; i < n; ++i) send_for_row(i, row_bytes);
    while (left != 0) {
      std::size_t still = 0;
      for (std::size_t o = 0; o < left; ++o) {
        const std::size_t i = open[o];
        const bool further = look(i, id_of(i), still, shard_of(hash[i]));
        send_for_row(i, row_bytes);
        still += further ? 1 : 0;
      }
      left = still;
    }
  }

 private:
  FRESHET_INLINE static void prefetch(const void* p) noexcept {
    if (intent == Intent::kWrite) {
      prefetch_write(p);
    } else {
      prefetch_read(p);
    }
  }

  // Reads the bucket's slots; true if the search goes on to the next one, noted in open[place].
  FRESHET_INLINE bool look(std::size_t i, std::int64_t id, std::size_t place, const Shard& shard) noexcept {
    const Bucket& bucket = *span[i].bucket;
    control[i] = bucket.control.load(std::memory_order_acquire);
    handle[i] = bucket.find(id);
    row[i] = is_row(handle[i]) ? shard.floats(handle[i]) : nullptr;
    if (intent == Intent::kWrite) header[i] = is_row(handle[i]) ? &shard.meta(handle[i]) : nullptr;
    if (handle[i] != kAbsent) return false;
    if (Bucket::overflow(control[i]) == 0 || !span[i].step()) return false;
    prefetch(span[i].bucket);
    open[place] = static_cast<std::uint16_t>(i);
    return true;
  }

  FRESHET_INLINE void send_for_row(std::size_t i, std::size_t row_bytes) const noexcept {
    if (intent == Intent::kWrite) {
      prefetch(header[i]);
      prefetch(reinterpret_cast<const char*>(header[i] + 1) - 1);  // one header in eight lies on two cache lines
    }
    const char* const floats = reinterpret_cast<const char*>(row[i]);
    for (std::size_t at = 0; at < row_bytes; at += kCacheLine) prefetch(floats + at);
  }
};

}  // namespace freshet
