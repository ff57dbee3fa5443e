// Ids on the way to their rows, with the cache misses of many of them overlapping.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "shard.h"

namespace freshet {

inline constexpr std::size_t kFlight = 512;  // ids that are found in the index before the first of them gets to its row

// Where an id has arrived. A handle of a row or a candidate is to be believed only if `control` is still the bucket's once
// the row was copied; kAbsent is proven already.
template <typename Shelf>
struct Arrival {
  Shelf* shelf;
  Bucket* bucket;
  char* header;           // of the row
  char* row;              // nullptr if the id has none
  std::uint32_t control;  // of the bucket, before its slots were read
  Handle handle;

  float* floats() const noexcept { return reinterpret_cast<float*>(row); }
  RowMeta& meta() const noexcept { return *reinterpret_cast<RowMeta*>(header); }

  bool stable() const noexcept { return (control & (Bucket::kVersion | Bucket::kRetired)) == 0; }
  // Whether the bucket alone tells what the handle is, even that there is none.
  bool settled() const noexcept {
    return stable() && (handle != kAbsent || (Bucket::overflow(control) == 0 && bucket->end_read(control)));
  }

  FRESHET_INLINE void look(const RowLayout& layout, std::int64_t id) noexcept {
    control = bucket->control.load(std::memory_order_acquire);
    resolve(layout, bucket->find(id));
  }
  // The row without a branch, which could not be foreseen: it decides for one id in eight that it is a guest elsewhere.
  FRESHET_INLINE void resolve(const RowLayout& layout, Handle to) noexcept {
    handle = to;
    const std::uintptr_t there = std::uintptr_t{0} - static_cast<std::uintptr_t>(is_row(handle) && stable());
    const RowLayout::Place place = shelf->rows().place_of(layout, handle & static_cast<Handle>(there));
    header = layout.header(place);
    row = reinterpret_cast<char*>(reinterpret_cast<std::uintptr_t>(layout.row(place)) & there);
  }
};

// Finds ids [0, n), n <= kFlight, in the index; the buckets of those to come are on their way meanwhile. Ids whose home
// does not settle the matter (it is full, and they may be guests elsewhere, or a writer is at work there) stand aside,
// until their second buckets have come, too; where those do not have them there is the complete search.
template <typename Shelf, typename IdOf, typename ShelfOf>
FRESHET_INLINE void locate(std::size_t n, const RowLayout layout, const IdOf id_of, const ShelfOf shelf_of,
                           Arrival<Shelf>* const arrivals) {
  constexpr std::size_t kAhead = 24;
  std::uint64_t hashes[kFlight];
  std::uint32_t aside[kFlight];
  std::size_t waiting = 0;
  for (std::size_t i = 0; i < n; ++i) hashes[i] = hash_id(id_of(i));  // in vectors
  for (std::size_t t = 0; t < n + kAhead; ++t) {
    if (t < n) {
      Shelf& shelf = shelf_of(hashes[t]);
      Bucket* const home = shelf.index().places(hashes[t]).home;
      arrivals[t].shelf = &shelf;
      arrivals[t].bucket = home;
      prefetch_line(home);
    }
    if (t >= kAhead) {
      const std::size_t i = t - kAhead;
      arrivals[i].look(layout, id_of(i));
      aside[waiting] = static_cast<std::uint32_t>(i);
      waiting += arrivals[i].row == nullptr ? 1 : 0;
    }
  }
  std::size_t searching = 0;
  for (std::size_t k = 0; k < waiting; ++k) {
    const std::size_t i = aside[k];
    if (arrivals[i].settled()) continue;
    arrivals[i].bucket = arrivals[i].shelf->index().places(hashes[i]).second;
    prefetch_line(arrivals[i].bucket);
    aside[searching++] = static_cast<std::uint32_t>(i);
  }
  for (std::size_t k = 0; k < searching; ++k) {
    const std::size_t i = aside[k];
    Arrival<Shelf>& at = arrivals[i];
    at.look(layout, id_of(i));
    if (at.row != nullptr) continue;
    const Index::Found found = at.shelf->index().find(id_of(i), hashes[i]);
    at.bucket = found.bucket;
    at.control = found.control;
    at.resolve(layout, found.handle);
  }
}

// A visitor that does nothing.
struct Nothing {
  template <typename... Args>
  void operator()(const Args&...) const noexcept {}
};

// Takes ids [0, n) to their rows and calls arrive(i, arrival) for each, in order. First a block of ids is found in the
// index, then their rows are sent for, some ahead of the one at hand; then landed(start, count, arrivals) is called.
// Finding and fetching in one loop is slower by a third, however far ahead both are sent for (docs/experiments.md).
// id_of(i), i < n. shelf_of(hash): what has index() and rows() for it. row_bytes: how much of a row is wanted. All is
// passed by value on purpose: rows are copied as bytes, after which a compiler loads again what could be reached from
// outside.
template <Intent intent, typename IdOf, typename ShelfOf, typename Arrive, typename Landed = Nothing>
FRESHET_INLINE void fly(std::size_t n, std::size_t row_bytes, const RowLayout layout, const IdOf id_of,
                        const ShelfOf shelf_of, const Arrive arrive, const Landed landed = {}) {
  constexpr std::size_t kAhead = 32;
  Arrival<std::remove_reference_t<decltype(shelf_of(0))>> arrivals[kFlight];
  for (std::size_t start = 0; start < n; start += kFlight) {
    const std::size_t count = std::min(kFlight, n - start);
    locate(count, layout, [=](std::size_t i) { return id_of(start + i); }, shelf_of, arrivals);
    for (std::size_t t = 0; t < count + kAhead; ++t) {
      if (t < count && arrivals[t].row != nullptr) {
        prefetch_row(arrivals[t].row, row_bytes);
        if (intent == Intent::kWrite) {
          prefetch_row(arrivals[t].header, sizeof(RowMeta));
          prefetch_line(arrivals[t].bucket);
        }
      }
      if (t >= kAhead) arrive(start + t - kAhead, arrivals[t - kAhead]);
    }
    landed(start, count, arrivals);
  }
}

}  // namespace freshet
