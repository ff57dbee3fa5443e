// find_or_insert: one way through the index, on which rows that are there are copied and the others made.
#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>

#include "../common/parallel.h"
#include "initializer.h"
#include "insertion.h"

namespace freshet {

FRESHET_CLONES void EmbeddingTable::init_floats(std::int64_t id, float* floats) const noexcept {
  change_racy(floats, float_bytes(), [&](void* to) __attribute__((always_inline)) {
    auto* const weights = static_cast<float*>(to);
    init_weights(init_key_, id, config_.init_scale, config_.dim, weights);
    init_state(config_.optimizer, config_.dim, weights + config_.dim);
  });
}

// Deals the positions of ids[n] out to the groups, by shard, and makes room in the logs for as many new rows.
void EmbeddingTable::deal(const std::int64_t* ids, std::size_t n, std::size_t threads) {
  set_groups(n, threads);
  parallel_for(active_groups_, threads, [&](std::size_t g) {
    Group& group = *groups_[g];
    group.clear_positions(n / active_groups_ + 1, shards_.size());
    for (std::size_t i = 0; i < n; ++i) {
      const std::size_t shard = shard_index(hash_id(ids[i]));
      if (active_groups_ > 1 && shard % active_groups_ != g) continue;
      group.positions.push_back(static_cast<std::uint32_t>(i));
      ++group.items_of_shard[shard];
    }
    for (std::size_t s = 0; s < shards_.size(); ++s) {
      if (group.items_of_shard[s] != 0) shards_[s]->reserve_changes(epoch(), group.items_of_shard[s]);
    }
  });
}

std::size_t EmbeddingTable::find_or_insert(const std::int64_t* ids, std::size_t n, float* out, std::size_t threads) {
  const Writing writing(*this);
  deal(ids, n, threads);
  std::atomic<std::size_t> inserted{0};
  try {
    parallel_for(active_groups_, threads, [&](std::size_t g) {
      read_or_insert(*groups_[g], ids, out);
      inserted.fetch_add(groups_[g]->newcomers.size(), std::memory_order_relaxed);
    });
  } catch (...) {
    roll_back();
    throw;
  }
  counters_.inserted.fetch_add(inserted.load(), std::memory_order_relaxed);
  return inserted.load();
}

// As fly() in flight.h, with the misses of many ids overlapping, but what arrives changes the index: the buckets of those
// still on the way are looked up again when a segment was replaced. Their rows stay where they are.
void EmbeddingTable::read_or_insert(Group& group, const std::int64_t* ids, float* out) {
  constexpr std::size_t kLook = 12, kRoom = 24, kArrive = 36;  // ids after take-off
  constexpr std::size_t kRing = 64;
  struct InFlight {
    std::int64_t id;
    std::uint64_t hash;
    Shard* shard;
    Index::Span at;
    const char* row;  // nullptr: none was seen on the way
    std::uint32_t position;
  };
  InFlight ring[kRing];
  const std::size_t n = group.positions.size(), dim = config_.dim, bytes = weight_bytes();
  const std::uint32_t* const positions = group.positions.data();
  const RowLayout layout = row_layout();
  const auto take_off = [&](std::uint32_t position, InFlight& it) __attribute__((always_inline)) {
    it.position = position;
    it.id = ids[position];
    it.hash = hash_id(it.id);
    it.shard = &shard_of(it.hash);
    it.at = it.shard->index().span(it.hash);
    it.row = nullptr;
    prefetch<Intent::kWrite>(&it.at.bucket());
  };
  const auto look = [&](InFlight& it) __attribute__((always_inline)) {
    const Handle handle = it.at.bucket().find(it.id);
    if (is_row(handle)) {
      it.row = layout.row(it.shard->rows().place_of(layout, handle));
      prefetch_row(it.row, bytes);
    } else {
      Index::prefetch_for_insert(it.at);
    }
  };
  const auto arrive = [&](const InFlight& it) __attribute__((always_inline)) {
    const char* const row = it.row != nullptr ? it.row : row_of(group, *it.shard, it.at, it.id, it.hash);
    copy_words(row, bytes, out + it.position * dim);
  };

  for (std::size_t t = 0; t < n + kArrive; ++t) {
    if (t >= kArrive) {
      const InFlight& it = ring[(t - kArrive) % kRing];
      const std::size_t growths = it.shard->index().growths();
      arrive(it);
      if (it.shard->index().growths() != growths) {
        for (std::size_t later = t - kArrive + 1; later < std::min(t, n); ++later) {
          InFlight& other = ring[later % kRing];
          other.at = other.shard->index().span(other.hash);
        }
      }
    }
    if (t < n) take_off(positions[t], ring[t % kRing]);
    if (t >= kLook && t < n + kLook) look(ring[(t - kLook) % kRing]);
    if (t >= kRoom && t < n + kRoom && ring[(t - kRoom) % kRing].row == nullptr) {
      Index::prefetch_room(ring[(t - kRoom) % kRing].at);
    }
  }
}

// The row of an id, which gets one if it has none: another occurrence of it may have got it meanwhile.
FRESHET_INLINE const char* EmbeddingTable::row_of(Group& group, Shard& shard, const Index::Span& at, std::int64_t id,
                                                  std::uint64_t hash) {
  const Index::Place place = shard.index().locate_from(at, id);
  const Handle handle = place.bucket == nullptr ? kAbsent : place.bucket->at(place.slot);
  if (is_row(handle)) return reinterpret_cast<const char*>(shard.floats(handle));
  Newcomer& newcomer = group.newcomers.emplace_back(group.newcomers.size());
  group.items.emplace_back(id);
  if (is_candidate(handle)) {
    newcomer.was_candidate = true;
    newcomer.word = shard.candidate(handle).word.load(std::memory_order_relaxed);
  }
  const char* row = nullptr;
  insert_row(shard, at, id, hash, newcomer, [&](Shard&, RowMeta& meta, float* floats) {
    init_floats(id, floats);
    shard.mark_dirty(id, meta, epoch());
    row = reinterpret_cast<const char*>(floats);
  });
  return row;
}

}  // namespace freshet
