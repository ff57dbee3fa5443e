// Dirty epochs and exports.
#include <algorithm>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#include "table_walk.h"

namespace freshet {

Epoch EmbeddingTable::advance_epoch() {
  const std::lock_guard<std::mutex> lock(write_mutex_);
  if (epoch() == ~Epoch{0}) throw std::runtime_error("the table is at its last epoch; save it and restore it anew");
  return epoch_.fetch_add(1, std::memory_order_relaxed);
}

// Entries are (key, handle) of rows and candidates; tombstones may name keys that live again.
Delta EmbeddingTable::export_entries(std::vector<Entry> entries, std::vector<std::int64_t> tombstones) const {
  constexpr std::size_t kAhead = 8;
  std::sort(entries.begin(), entries.end());
  entries.erase(std::unique(entries.begin(), entries.end()), entries.end());
  const auto first_candidate =
      std::stable_partition(entries.begin(), entries.end(), [](const Entry& entry) { return is_row(entry.second); });
  const auto n = static_cast<std::size_t>(first_candidate - entries.begin());
  const auto shard_at = [&](std::size_t i) -> const Shard& { return shard_of(hash_id(entries[i].first)); };
  Delta delta;
  delta.keys.resize(n);
  delta.weights.resize(n * config_.dim);
  delta.state.resize(n * state_dim_);
  delta.last_update_us.resize(n);
  delta.counts.resize(n);
  for (std::size_t i = 0; i < n; ++i) {
    if (i + kAhead < n) {
      prefetch<Intent::kRead>(&shard_at(i + kAhead).meta(entries[i + kAhead].second));
      prefetch_row(shard_at(i + kAhead).floats(entries[i + kAhead].second), float_bytes());
    }
    const float* const floats = shard_at(i).floats(entries[i].second);
    const RowMeta& meta = shard_at(i).meta(entries[i].second);
    delta.keys[i] = entries[i].first;
    delta.last_update_us[i] = to_microseconds(meta.last_seen.load(std::memory_order_relaxed));
    delta.counts[i] = meta.count.load(std::memory_order_relaxed);
    copy_words(floats, weight_bytes(), delta.weights.data() + i * config_.dim);
    copy_words(floats + config_.dim, state_dim_ * sizeof(float), delta.state.data() + i * state_dim_);
  }
  for (std::size_t i = n; i < entries.size(); ++i) {
    delta.candidate_keys.push_back(entries[i].first);
    delta.candidates.push_back(shard_at(i).candidate(entries[i].second).word.load(std::memory_order_relaxed));
  }
  std::sort(tombstones.begin(), tombstones.end());
  tombstones.erase(std::unique(tombstones.begin(), tombstones.end()), tombstones.end());
  for (const std::int64_t key : tombstones) {
    const std::uint64_t hash = hash_id(key);
    if (!is_row(shard_of(hash).index().find(key, hash).handle)) delta.tombstones.push_back(key);
  }
  return delta;
}

Delta EmbeddingTable::export_delta(Epoch since) const {
  const std::lock_guard<std::mutex> lock(write_mutex_);
  const Reclaimer::Guard guard(reclaimer_);
  if (since >= epoch()) {
    throw std::invalid_argument("epoch " + std::to_string(since) + " is not closed; pass what advance_epoch() returned"
                                " at the last export, or 0 for everything");
  }
  if (since < dropped_to_) {
    throw std::invalid_argument("tombstones up to epoch " + std::to_string(dropped_to_) + " were dropped, so the delta"
                                " since epoch " + std::to_string(since) + " is not complete; use export_all()");
  }
  std::vector<Entry> entries;
  std::vector<std::int64_t> tombstones;
  for (std::size_t s = 0; s < shards_.size(); ++s) {
    const Shard* const shard = shards_[s].get();
    const auto changed = [&](std::int64_t key, Handle handle) {
      if (is_row(handle) && shard->meta(handle).dirty_epoch.load(std::memory_order_relaxed) <= since) return;
      entries.emplace_back(key, handle);
    };
    if (since >= shard->dirty().complete_after()) {
      shard->dirty().for_each_after(since, [&](std::int64_t key, Epoch) {
        const Handle handle = shard->index().find(key, hash_id(key)).handle;
        if (handle != kAbsent) changed(key, handle);
      });
    } else {  // so much has changed since that the log was cut: every row is looked at
      const auto [first, last] = range_of(s);
      for_each_in(first, last, [&](std::int64_t key, std::uint64_t, Handle handle) { changed(key, handle); });
    }
    shard->tombstones().for_each_after(since, [&](std::int64_t key, Epoch) { tombstones.push_back(key); });
  }
  return export_entries(std::move(entries), std::move(tombstones));
}

Delta EmbeddingTable::export_all() const {
  const std::lock_guard<std::mutex> lock(write_mutex_);
  const Reclaimer::Guard guard(reclaimer_);
  std::vector<Entry> entries;
  entries.reserve(size());
  for_each_in(0, ~std::uint64_t{0}, [&](std::int64_t key, std::uint64_t, Handle handle) {
    entries.emplace_back(key, handle);
  });
  return export_entries(std::move(entries), {});
}

std::size_t EmbeddingTable::drop_tombstones(Epoch up_to) {
  const std::lock_guard<std::mutex> lock(write_mutex_);
  if (up_to >= epoch()) {
    throw std::invalid_argument("epoch " + std::to_string(up_to) + " is not closed; call advance_epoch() first");
  }
  std::size_t dropped = 0;
  for (const auto& shard : shards_) {
    dropped += shard->tombstones().drop(up_to);
    shard->dirty().drop(up_to);
  }
  dropped_to_ = std::max(dropped_to_, up_to);
  return dropped;
}

}  // namespace freshet
