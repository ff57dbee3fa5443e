// How an id without a row gets one.
#pragma once

#include <cstdint>

#include "batch.h"

namespace freshet {

// A fresh row, complete before anyone sees it: fill(shard, meta, floats) writes it. std::bad_alloc: nothing has changed.
template <typename Fill>
FRESHET_INLINE void EmbeddingTable::insert_row(Shard& shard, const Index::Span& at, std::int64_t id, std::uint64_t hash,
                                               Newcomer& newcomer, const Fill& fill) {
  keep_candidate(id, newcomer);
  const Shard::FreshRow row = shard.take_row();
  RowMeta& meta = *row.meta;
  meta.dirty_epoch.store(0, std::memory_order_relaxed);
  meta.last_seen.store(0, std::memory_order_relaxed);
  const std::uint32_t count = newcomer.was_candidate ? Candidate::from(newcomer.word).count : 0;
  meta.count.store(static_cast<std::uint16_t>(count), std::memory_order_relaxed);
  meta.saved.store(snapshots_, std::memory_order_relaxed);  // a running snapshot is older than this row
  fill(shard, meta, row.floats);
  try {
    const Index::Place place = newcomer.was_candidate ? shard.index().locate_from(at, id) : Index::Place{nullptr, 0};
    shard.publish_row(place, at, id, hash, row.handle);
  } catch (...) {
    shard.untake_row(row.handle);
    throw;
  }
  newcomer.done = true;
}

}  // namespace freshet
