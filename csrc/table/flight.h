// A block of ids on the way to their rows, with the cache misses of all of them overlapping.
#pragma once

#include <cstddef>
#include <cstdint>

#include "shard.h"

namespace freshet {

enum class Intent { kRead, kWrite };

// Buckets are sent for first; then the rows of all slots with an id's tag; then, where a full bucket had no such slot, the
// next bucket, which has arrived meanwhile. Loops that only prefetch are kept apart from those that compute: an address
// has to be translated before its prefetch can retire, and the shorter the loop, the more translations overlap.
template <Intent intent>
struct Flight {
  static constexpr std::size_t kBlock = 64;

  std::uint64_t hash[kBlock];
  Index::Span span[kBlock];        // the bucket that was looked at last
  std::uint32_t control[kBlock];   // of that bucket, before its slots were read
  SlotSet slots[kBlock];           // of that bucket, with the id's tag
  RowMeta* header[kBlock];   // of the last of these
  float* row[kBlock];
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
    for (std::size_t i = 0; i < n; ++i) left += look(i, left, row_bytes, shard_of(hash[i])) ? 1 : 0;
    for (std::size_t i = 0; i < n; ++i) send_for_row(i, row_bytes);
    while (left != 0) {
      std::size_t still = 0;
      for (std::size_t o = 0; o < left; ++o) {
        const std::size_t i = open[o];
        const bool further = look(i, still, row_bytes, shard_of(hash[i]));
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
  FRESHET_INLINE bool look(std::size_t i, std::size_t place, std::size_t row_bytes, const Shard& shard) noexcept {
    const Bucket& bucket = *span[i].bucket;
    control[i] = bucket.control.load(std::memory_order_acquire);
    slots[i] = bucket.slots_with(tag_of(hash[i]));
    header[i] = nullptr;
    row[i] = nullptr;
    if (!slots[i].empty()) {
      for (SlotSet more = slots[i]; !more.empty(); more.remove_first()) {  // seldom more than one
        const Handle handle = bucket.at(more.first());
        if (!is_row(handle)) continue;
        if (row[i] != nullptr) send_for_row(i, row_bytes);
        header[i] = &shard.meta(handle);
        row[i] = shard.floats(handle);
      }
      return false;
    }
    if (Bucket::overflow(control[i]) == 0 || !span[i].step()) return false;
    prefetch(span[i].bucket);
    open[place] = static_cast<std::uint16_t>(i);
    return true;
  }

  FRESHET_INLINE void send_for_row(std::size_t i, std::size_t row_bytes) const noexcept {
    prefetch(header[i]);
    prefetch(reinterpret_cast<const char*>(header[i] + 1) - 1);  // one header in four lies on two cache lines
    const char* const floats = reinterpret_cast<const char*>(row[i]);
    for (std::size_t at = 0; at < row_bytes; at += kCacheLine) prefetch(floats + at);
  }
};

}  // namespace freshet
