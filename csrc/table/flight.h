// Ids on the way to their rows, with the cache misses of many of them overlapping.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "shard.h"

namespace freshet {

// Where an id has arrived. A handle of a row or a candidate is to be believed only if `control` is still the bucket's once
// the row was copied; kAbsent is proven already.
template <typename Shelf>
struct Arrival {
  Shelf* shelf;
  Bucket* bucket;
  char* row;              // nullptr if the id has none
  std::uint32_t control;  // of the bucket, before its slots were read
  Handle handle;

  float* floats() const noexcept { return reinterpret_cast<float*>(row); }
};

template <Intent intent, typename Shelf>
FRESHET_INLINE char* send_for_row(const RowLayout& layout, const Shelf& shelf, Handle handle, std::size_t bytes) noexcept {
  const RowLayout::Place place = shelf.rows().place_of(layout, handle);
  prefetch_row(layout.row(place), bytes);
  if (intent == Intent::kWrite) prefetch_row(layout.header(place), sizeof(RowMeta));
  return layout.row(place);
}

// Takes ids [0, n) to their rows and calls arrive(i, arrival) once for each, most of them in order. One id takes off for
// each that arrives, so that prefetches come evenly and computing goes on meanwhile. Ids whose home bucket does not settle
// the matter (it is full, and they may be guests elsewhere, or a writer is at work there) stand aside, and take the
// complete search when there are many of them.
// id_of(i), i < n. shelf_of(hash): what has index() and rows() for it. row_bytes: how much of a row is wanted. All is
// passed by value, and kept in arrays of one kind each, on purpose: rows are copied as bytes, after which a compiler loads
// again what could be reached from outside.
template <Intent intent, typename IdOf, typename ShelfOf, typename Arrive>
FRESHET_INLINE void fly(std::size_t n, std::size_t row_bytes, const RowLayout layout, const IdOf id_of,
                        const ShelfOf shelf_of, const Arrive arrive) {
  using Shelf = std::remove_reference_t<decltype(shelf_of(0))>;
  using At = Arrival<Shelf>;
  constexpr std::size_t kLook = 16, kArrive = 32;  // ids after take-off
  constexpr std::size_t kRing = 64, kAside = 32;
  constexpr std::uint32_t kUnstable = Bucket::kVersion | Bucket::kRetired;
  Shelf* shelves[kRing];
  Index::Places buckets[kRing];
  char* rows[kRing];
  Handle handles[kRing];
  std::uint32_t controls[kRing];
  std::size_t aside[kAside];
  At guests[kAside];
  std::size_t waiting = 0;
  // Most guests are in their second bucket, which has come meanwhile.
  const auto stand_aside = [&](std::size_t i, Shelf* shelf, Bucket* bucket) __attribute__((always_inline)) {
    const std::uint32_t control = bucket->control.load(std::memory_order_acquire);
    At& guest = guests[waiting];
    guest = {shelf, bucket, nullptr, control, bucket->find(id_of(i))};
    if (is_row(guest.handle) && (control & kUnstable) == 0) {
      guest.row = send_for_row<intent>(layout, *shelf, guest.handle, row_bytes);
    }
    aside[waiting++] = i;
  };
  const auto search_aside = [&]() __attribute__((always_inline)) {
    for (std::size_t k = 0; k < waiting; ++k) {
      if (guests[k].row != nullptr) continue;
      const std::int64_t id = id_of(aside[k]);
      Shelf& shelf = *guests[k].shelf;
      const Index::Found at = shelf.index().find(id, hash_id(id));
      guests[k] = {&shelf, at.bucket, nullptr, at.control, at.handle};
      if (is_row(at.handle)) guests[k].row = send_for_row<intent>(layout, shelf, at.handle, row_bytes);
    }
    for (std::size_t k = 0; k < waiting; ++k) arrive(aside[k], guests[k]);
    waiting = 0;
  };

  for (std::size_t t = 0; t < n + kArrive; ++t) {
    if (t >= kArrive) {
      const std::size_t i = t - kArrive, at = i % kRing;
      bool settled = rows[at] != nullptr;
      if (!settled) {
        const bool nowhere = handles[at] == kAbsent && (controls[at] & (kUnstable | Bucket::kOverflowMax)) == 0;
        settled = nowhere && buckets[at].home->end_read(controls[at]);
      }
      if (settled) {
        arrive(i, At{shelves[at], buckets[at].home, rows[at], controls[at], handles[at]});
      } else {
        stand_aside(i, shelves[at], buckets[at].second);
        if (waiting == kAside) search_aside();
      }
    }
    if (t < n) {
      const std::uint64_t hash = hash_id(id_of(t));
      Shelf& shelf = shelf_of(hash);
      shelves[t % kRing] = &shelf;
      buckets[t % kRing] = shelf.index().places(hash);
      prefetch<intent>(buckets[t % kRing].home);
    }
    if (t >= kLook && t < n + kLook) {
      const std::size_t i = t - kLook, at = i % kRing;
      const Bucket& bucket = *buckets[at].home;
      const std::uint32_t control = bucket.control.load(std::memory_order_acquire);
      const Handle handle = bucket.find(id_of(i));
      controls[at] = control;
      handles[at] = handle;
      // Without a branch, which could not be foreseen: it decides for one id in eight that it is a guest.
      const std::uintptr_t there = std::uintptr_t{0} - static_cast<std::uintptr_t>(is_row(handle) && (control & kUnstable) == 0);
      const RowLayout::Place place = shelves[at]->rows().place_of(layout, handle & static_cast<Handle>(there));
      const auto row = reinterpret_cast<std::uintptr_t>(layout.row(place)) & there;
      rows[at] = reinterpret_cast<char*>(row);
      const char* const next = reinterpret_cast<const char*>(row | (reinterpret_cast<std::uintptr_t>(buckets[at].second) & ~there));
      prefetch_row(next, row_bytes);
      if (intent == Intent::kWrite) prefetch_row(layout.header(place), sizeof(RowMeta));
    }
  }
  search_aside();
}

}  // namespace freshet
