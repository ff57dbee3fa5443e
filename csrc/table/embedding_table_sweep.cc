// What goes: erasure, expiry by event time, eviction when the table is full. All of it in order of hash, in steps whose
// cost does not depend on the size of the table, and independent of how the table is split into shards.
#include <algorithm>
#include <limits>
#include <mutex>
#include <new>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "snapshot_scan.h"
#include "table_walk.h"

namespace freshet {
namespace {

constexpr std::uint64_t kLastHash = std::numeric_limits<std::uint64_t>::max();
constexpr std::size_t kNeighbours = 1024;  // rows among which eviction chooses
constexpr std::size_t kEvictShare = 8;     // of which at most this part goes at once

// The last hash of the step of 2^64 / steps that begins at `from`.
std::uint64_t step_end(std::uint64_t from, std::uint64_t steps) noexcept {
  const std::uint64_t width = steps <= 1 ? kLastHash : kLastHash / steps;
  return from > kLastHash - width ? kLastHash : from + width;
}

}  // namespace

EmbeddingTable::Erased EmbeddingTable::erase_keys(const std::vector<std::int64_t>& keys) {
  std::vector<std::size_t> per_shard(shards_.size(), 0);
  for (const std::int64_t key : keys) ++per_shard[shard_index(hash_id(key))];
  for (std::size_t s = 0; s < shards_.size(); ++s) {
    if (per_shard[s] != 0) shards_[s]->reserve_erasures(epoch(), per_shard[s]);
  }
  Erased erased;
  SnapshotScan::RowKeeper rows(snapshot_scan());
  for (const std::int64_t key : keys) {
    const std::uint64_t hash = hash_id(key);
    Shard& shard = shard_of(hash);
    const Index::Place place = shard.index().locate(key, hash);
    if (place.bucket == nullptr) continue;
    const Handle handle = place.bucket->at(place.slot);
    if (is_row(handle)) {
      rows.keep(key, shard.floats(handle), shard.meta(handle));
      ++erased.rows;
    } else {
      if (snapshot_scan() != nullptr) snapshot_scan()->keep_candidate(key, shard.candidate(handle).word.load());
      ++erased.candidates;
    }
    shard.erase(place, key, hash);
  }
  return erased;
}

std::size_t EmbeddingTable::erase(const std::int64_t* ids, std::size_t n) {
  const Writing writing(*this);
  const Reclaimer::Guard guard(reclaimer_);
  const std::size_t rows = erase_keys(std::vector<std::int64_t>(ids, ids + n)).rows;
  counters_.erased.fetch_add(rows, std::memory_order_relaxed);
  return rows;
}

// Erases rows of the hash range last seen before `before`, the stalest first, down to min_rows; and candidates whose
// last occurrence is as old (in whole hours).
std::size_t EmbeddingTable::expire_range(std::uint64_t from, std::uint64_t to, Seconds before, Seconds now) {
  std::vector<std::tuple<Seconds, std::uint64_t, std::int64_t>> stale;  // last seen, hash, key
  std::vector<std::int64_t> keys;
  for_each_in(from, to, [&](std::int64_t key, std::uint64_t hash, Handle handle) {
    const Shard& shard = shard_of(hash);
    if (is_candidate(handle)) {
      const std::uint32_t word = shard.candidate(handle).word.load(std::memory_order_relaxed);
      const std::uint64_t age = std::uint64_t{Candidate::from(word).age_hours(now)} * 3600;
      if (age > std::uint64_t{now - before} + 3600) keys.push_back(key);
      return;
    }
    const Seconds seen = shard.meta(handle).last_seen.load(std::memory_order_relaxed);
    if (seen != 0 && seen < before) stale.emplace_back(seen, hash, key);
  });
  const std::size_t spare = size() - std::min(size(), config_.min_rows);
  if (stale.size() > spare) {
    std::sort(stale.begin(), stale.end());
    stale.resize(spare);
  }
  for (const auto& row : stale) keys.push_back(std::get<2>(row));
  const Erased erased = erase_keys(keys);
  counters_.expired.fetch_add(erased.rows, std::memory_order_relaxed);
  counters_.expired_candidates.fetch_add(erased.candidates, std::memory_order_relaxed);
  return erased.rows;
}

std::size_t EmbeddingTable::expire(std::int64_t before_us) {
  const Writing writing(*this);
  const Reclaimer::Guard guard(reclaimer_);
  const Seconds before = to_seconds(std::max<std::int64_t>(before_us, 0));
  return expire_range(0, kLastHash, before, std::max(clock_, before));
}

std::size_t EmbeddingTable::expire_stale() {
  const Writing writing(*this);
  const Reclaimer::Guard guard(reclaimer_);
  const Seconds ttl = to_seconds(config_.ttl_us);
  return ttl == 0 || clock_ <= ttl ? 0 : expire_range(0, kLastHash, clock_ - ttl, clock_);
}

// After an update: the next step of the sweep, and eviction while the table is too full.
void EmbeddingTable::make_room() {
  try {
    const Seconds ttl = to_seconds(config_.ttl_us);
    if (ttl != 0 && clock_ > ttl) {
      const std::uint64_t last = step_end(sweep_at_, config_.sweep_steps);
      expire_range(sweep_at_, last, clock_ - ttl, clock_);
      sweep_at_ = last + 1;  // after the last hash: 0
    }
    if (config_.max_rows != 0 && config_.when_full != WhenFull::kRefuse) {
      while (size() > config_.max_rows) evict_neighbours();
    }
  } catch (const std::bad_alloc&) {
    // The update itself is done. Nothing was erased and no cursor has moved: the next update tries again.
    counters_.postponed_sweeps.fetch_add(1, std::memory_order_relaxed);
  }
}

void EmbeddingTable::evict_neighbours() {
  struct Score {
    std::uint64_t first, second, hash;
    std::int64_t key;
    bool operator<(const Score& other) const noexcept {
      return std::tie(first, second, hash) < std::tie(other.first, other.second, other.hash);
    }
  };
  const std::uint64_t last = step_end(eviction_at_, size() / kNeighbours);
  std::vector<Score> scores;
  for_each_in(eviction_at_, last, [&](std::int64_t key, std::uint64_t hash, Handle handle) {
    if (!is_row(handle)) return;
    const RowMeta& meta = shard_of(hash).meta(handle);
    const std::uint64_t seen = meta.last_seen.load(std::memory_order_relaxed);
    const std::uint64_t count = meta.count.load(std::memory_order_relaxed);
    const bool rarest = config_.when_full == WhenFull::kEvictRarest;
    scores.push_back({rarest ? count : seen, rarest ? seen : count, hash, key});
  });
  const std::size_t victims = std::min(size() - config_.max_rows, (scores.size() + kEvictShare - 1) / kEvictShare);
  std::partial_sort(scores.begin(), scores.begin() + static_cast<std::ptrdiff_t>(victims), scores.end());
  std::vector<std::int64_t> keys;
  for (std::size_t i = 0; i < victims; ++i) keys.push_back(scores[i].key);
  counters_.evicted.fetch_add(erase_keys(keys).rows, std::memory_order_relaxed);
  eviction_at_ = last + 1;
}

void EmbeddingTable::check_candidates(std::size_t n) const {
  if (n == 0 || config_.admission == Admission::kThreshold) return;
  throw std::invalid_argument("only a table with an admission threshold has candidates; restore them into one");
}

void EmbeddingTable::put_candidates(const std::int64_t* ids, std::size_t n, const std::uint32_t* words) {
  check_candidates(n);
  const Writing writing(*this);
  const Reclaimer::Guard guard(reclaimer_);
  for (std::size_t i = 0; i < n; ++i) {
    const std::uint64_t hash = hash_id(ids[i]);
    Shard& shard = shard_of(hash);
    const Index::Place place = shard.index().locate(ids[i], hash);
    const Handle before = place.bucket != nullptr ? place.bucket->at(place.slot) : kAbsent;
    if (is_row(before)) continue;
    SnapshotScan* const scan = snapshot_scan();
    if (scan != nullptr && before != kAbsent) scan->keep_candidate(ids[i], shard.candidate(before).word.load());
    if (scan != nullptr && before == kAbsent) scan->keep_no_candidate(ids[i]);
    shard.reserve_changes(epoch(), 1);
    shard.put_candidate(place, ids[i], hash, words[i]);
    shard.dirty().note(ids[i]);
  }
}

void EmbeddingTable::touch(const std::int64_t* ids, std::size_t n, const std::int64_t* now_us) {
  std::for_each(now_us, now_us + n, [](std::int64_t us) { check_time("now_us", us); });
  const Writing writing(*this);
  reserve_reads(ids, n, 0);
  see_rows(ids, n, now_us);
}

// Needs reserve_reads before.
void EmbeddingTable::see_rows(const std::int64_t* ids, std::size_t n, const std::int64_t* now_us) noexcept {
  if (!config_.ttl_on_access) return;
  const Reclaimer::Guard guard(reclaimer_);
  SnapshotScan::RowKeeper keeper(snapshot_scan());
  for (std::size_t i = 0; i < n; ++i) {
    const std::uint64_t hash = hash_id(ids[i]);
    const Seconds now = to_seconds(now_us[i]);
    Shard& shard = shard_of(hash);
    clock_ = std::max(clock_, now);
    const Index::Place place = shard.index().locate(ids[i], hash);
    if (place.bucket == nullptr || !is_row(place.bucket->at(place.slot))) continue;
    const Handle handle = place.bucket->at(place.slot);
    RowMeta& meta = shard.meta(handle);
    if (meta.last_seen.load(std::memory_order_relaxed) >= now) continue;
    const BucketLock lock(*place.bucket);
    keeper.keep(ids[i], shard.floats(handle), meta);
    meta.see(now);
    shard.mark_dirty(ids[i], meta, epoch());
  }
}

}  // namespace freshet
