// Ids on the way to their rows, with the cache misses of many of them overlapping.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "shard.h"

namespace freshet {

enum class Intent { kRead, kWrite };

// One id on its way: its bucket is sent for; then the row that the bucket names; then, where a full bucket does not hold
// the id, the buckets after it; then the row has arrived. What was seen has to be proven by `control` once the row was
// read.
template <Intent intent>
struct Flight {
  const Shard* shard;
  std::uint64_t hash;
  Index::Span span;       // the bucket that was looked at last
  std::uint32_t control;  // of that bucket, before its slots were read
  Handle handle;          // what the id stands for by that bucket
  RowMeta* header;        // for writing, of a row
  float* row;             // nullptr if it is no row
  bool further;           // the search goes on in the next bucket, which is in span

  FRESHET_INLINE void send_for_bucket(std::uint64_t of, const Shard& in) noexcept {
    shard = &in;
    hash = of;
    span = in.index().span(of);
    prefetch(span.bucket);
  }

  FRESHET_INLINE void look(std::int64_t id, std::size_t row_bytes) noexcept {
    const Bucket& bucket = *span.bucket;
    control = bucket.control.load(std::memory_order_acquire);
    handle = bucket.find(id);
    row = is_row(handle) ? shard->floats(handle) : nullptr;
    further = handle == kAbsent && Bucket::overflow(control) != 0 && span.step();
    if (further) prefetch(span.bucket);
    if (row == nullptr) return;
    for (std::size_t at = 0; at < row_bytes; at += kCacheLine) prefetch(reinterpret_cast<const char*>(row) + at);
    if (intent == Intent::kWrite) {
      header = &shard->meta(handle);
      prefetch(header);
      prefetch(reinterpret_cast<const char*>(header + 1) - 1);  // one header in eight lies on two cache lines
    }
  }

  FRESHET_INLINE void search_on(std::int64_t id, std::size_t row_bytes) noexcept {
    while (further) look(id, row_bytes);
  }

 private:
  FRESHET_INLINE static void prefetch(const void* p) noexcept {
    if (intent == Intent::kWrite) {
      prefetch_write(p);
    } else {
      prefetch_read(p);
    }
  }
};

// Takes ids [0, n) to their rows and calls arrive(i, flight) for each, in order. One id takes off for each that arrives:
// in a burst of prefetches those after the first two dozen wait for a free line buffer, and nothing is computed meanwhile.
// id_of(i), i < n. shard_of(hash). row_bytes: how much of a row is wanted.
template <Intent intent, typename IdOf, typename ShardOf, typename Arrive>
FRESHET_INLINE void fly(std::size_t n, std::size_t row_bytes, const IdOf& id_of, const ShardOf& shard_of,
                        const Arrive& arrive) {
  constexpr std::size_t kLook = 16, kSearch = 24, kArrive = 32;  // ids after take-off
  Flight<intent> flights[kArrive];
  const auto in_air = [&](std::size_t i) -> Flight<intent>& { return flights[i % kArrive]; };
  const auto take_off = [&](std::size_t i) __attribute__((always_inline)) {
    const std::uint64_t hash = hash_id(id_of(i));
    in_air(i).send_for_bucket(hash, shard_of(hash));
  };
  const auto look = [&](std::size_t i) __attribute__((always_inline)) { in_air(i).look(id_of(i), row_bytes); };
  const auto search_on = [&](std::size_t i) __attribute__((always_inline)) { in_air(i).search_on(id_of(i), row_bytes); };
  std::size_t t = 0;
  for (; t < std::min(n, kArrive); ++t) {
    take_off(t);
    if (t >= kLook) look(t - kLook);
    if (t >= kSearch) search_on(t - kSearch);
  }
  for (; t < n; ++t) {
    arrive(t - kArrive, in_air(t));
    take_off(t);
    look(t - kLook);
    search_on(t - kSearch);
  }
  for (; t < n + kArrive; ++t) {
    if (t >= kArrive) arrive(t - kArrive, in_air(t));
    if (t >= kLook && t < n + kLook) look(t - kLook);
    if (t >= kSearch && t < n + kSearch) search_on(t - kSearch);
  }
}

}  // namespace freshet
