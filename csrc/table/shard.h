// One part of a table: the ids whose hashes begin with certain bits, their rows, and the logs of what changed.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>

#include "epoch_log.h"
#include "hash.h"
#include "index.h"
#include "reclaimer.h"
#include "row_meta.h"
#include "row_store.h"

namespace freshet {

// Invariants:
//  * index_ maps exactly the keys of the taken rows, each to its own row, and the candidates: no two ids share a row;
//  * a key's handle is in the index after its row is complete, and a row is given back after its handle is gone;
//  * every change of a row stores the open epoch in its meta and, once per epoch, its key in dirty_; every erasure notes
//    the key in tombstones_. So {rows with dirty_epoch > e} + {tombstones after e} is all that changed after e closed.
// One writer at a time; readers use index(), meta() and floats() under a Reclaimer::Guard.
class Shard {
 public:
  // bits: how many top bits of the hash are the same for all ids here. floats: weights and optimiser state of a row.
  Shard(Reclaimer* reclaimer, unsigned bits, std::size_t floats)
      : rows_(reclaimer, sizeof(RowMeta), floats * sizeof(float)),
        candidates_(reclaimer, sizeof(CandidateRecord), 0),
        index_(reclaimer, bits) {}

  // Any thread

  const Index& index() const noexcept { return index_; }
  const RowStore& rows() const noexcept { return rows_; }
  RowMeta& meta(Handle handle) const noexcept { return *reinterpret_cast<RowMeta*>(rows_.header(handle)); }
  float* floats(Handle handle) const noexcept { return reinterpret_cast<float*>(rows_.row(handle)); }
  CandidateRecord& candidate(Handle handle) const noexcept {
    return *reinterpret_cast<CandidateRecord*>(candidates_.header(handle & ~kCandidateBit));
  }
  std::size_t size() const noexcept { return size_.load(std::memory_order_relaxed); }
  std::size_t candidates() const noexcept {  // beside the writer, the two sizes may be of different moments
    const std::size_t rows = size(), all = index_.size();
    return all - std::min(all, rows);
  }
  std::size_t row_memory_bytes() const noexcept { return rows_.capacity() * rows_.bytes_per_row(); }
  std::size_t row_capacity() const noexcept { return rows_.capacity(); }
  std::size_t candidate_memory_bytes() const noexcept { return candidates_.capacity() * candidates_.bytes_per_row(); }

  // The writer. Handles of rows it may change under the BucketLock of their bucket.

  Index& index() noexcept { return index_; }
  EpochLog& dirty() noexcept { return dirty_; }
  const EpochLog& dirty() const noexcept { return dirty_; }
  EpochLog& tombstones() noexcept { return tombstones_; }
  const EpochLog& tombstones() const noexcept { return tombstones_; }

  // Before changing, or adding, up to n rows or candidates in `epoch`. std::bad_alloc: nothing has changed.
  void reserve_changes(Epoch epoch, std::size_t n) {
    rows_.reserve_back(n);  // what the batch adds can go again when it fails
    candidates_.reserve_back(n);
    dirty_.reserve(epoch, n, log_limit() + n);
  }
  void mark_dirty(std::int64_t key, RowMeta& meta, Epoch epoch) noexcept {
    if (meta.dirty_epoch.load(std::memory_order_relaxed) == epoch) return;
    meta.dirty_epoch.store(epoch, std::memory_order_relaxed);
    dirty_.note(key);
  }

  // A row that nobody sees yet; complete it, then publish it. std::bad_alloc: nothing has changed.
  struct FreshRow {
    Handle handle;
    RowMeta* meta;
    float* floats;
  };
  FreshRow take_row() {
    rows_.reserve(1);
    const Handle handle = rows_.take();
    const RowLayout::Place place = rows_.place_of(rows_.layout(), handle);
    char* const row = rows_.layout().row(place);
    rows_.prefetch_after(place);
    return {handle, reinterpret_cast<RowMeta*>(rows_.layout().header(place)), reinterpret_cast<float*>(row)};
  }
  void untake_row(Handle handle) noexcept { rows_.give_back(handle); }

  // Makes the row stand for its key, which is absent, or (place) a candidate. std::bad_alloc: nothing has changed.
  void publish_row(Index::Place place, const Index::Span& at, std::int64_t key, std::uint64_t hash, Handle handle) {
    candidates_.reserve_back(1);
    if (place.bucket == nullptr) {
      index_.insert_at(at, key, hash, handle);
    } else {
      const Handle candidate = place.bucket->at(place.slot);
      {
        const BucketLock lock(*place.bucket);
        place.bucket->set(place.slot, key, handle);
      }
      candidates_.give_back(candidate & ~kCandidateBit);
    }
    set_size(size() + 1);
  }

  // Makes the key a candidate with that word; it is absent, or (place) one already. std::bad_alloc: nothing has changed.
  void put_candidate(Index::Place place, std::int64_t key, std::uint64_t hash, std::uint32_t word) {
    if (place.bucket != nullptr) {
      const BucketLock lock(*place.bucket);
      candidate(place.bucket->at(place.slot)).word.store(word, std::memory_order_relaxed);
      return;
    }
    candidates_.reserve(1);
    const Handle handle = candidates_.take();
    candidate(handle).word.store(word, std::memory_order_relaxed);
    try {
      index_.insert(key, hash, handle | kCandidateBit);
    } catch (...) {
      candidates_.give_back(handle);
      throw;
    }
  }

  // Before erasing up to n rows or candidates in `epoch`. std::bad_alloc: nothing has changed.
  void reserve_erasures(Epoch epoch, std::size_t n) {
    rows_.reserve_back(n);
    candidates_.reserve_back(n);
    tombstones_.reserve(epoch, n);
  }
  // Needs reserve_erasures before. Candidates leave a tombstone too, so that who replays deltas forgets them.
  void erase(Index::Place place, std::int64_t key, std::uint64_t hash) noexcept {
    remove(place, hash);
    tombstones_.note(key);
  }
  // As if it had never been there: for a batch that fails half way.
  void remove(Index::Place place, std::uint64_t hash) noexcept {
    const Handle handle = place.bucket->at(place.slot);
    index_.erase(place, hash);
    if (is_row(handle)) {
      rows_.give_back(handle);
      set_size(size() - 1);
    } else {
      candidates_.give_back(handle & ~kCandidateBit);
    }
  }
  // The inverse of publishing a row for a candidate; the place it gave up is still free.
  void demote(Index::Place place, std::int64_t key, std::uint32_t word) noexcept {
    const Handle row = place.bucket->at(place.slot), handle = candidates_.take();
    candidate(handle).word.store(word, std::memory_order_relaxed);
    {
      const BucketLock lock(*place.bucket);
      place.bucket->set(place.slot, key, handle | kCandidateBit);
    }
    rows_.give_back(row);
    set_size(size() - 1);
  }

 private:
  void set_size(std::size_t size) noexcept { size_.store(size, std::memory_order_relaxed); }

  // Keys that the dirty log may hold: a longer one would save nothing over a look at every row.
  std::size_t log_limit() const noexcept { return size() / 8 + 1024; }

  RowStore rows_;
  RowStore candidates_;
  Index index_;
  EpochLog dirty_;
  EpochLog tombstones_;
  std::atomic<std::size_t> size_{0};
};

}  // namespace freshet
