// Dirty epochs and exports of the embedding table.
#include <algorithm>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#include "embedding_table.h"

namespace freshet {

std::uint64_t EmbeddingTable::advance_epoch() {
  const std::unique_lock lock(mutex_);
  return epoch_++;
}

Delta EmbeddingTable::export_delta(std::uint64_t since_epoch) const {
  const std::shared_lock lock(mutex_);
  if (since_epoch >= epoch_) {
    throw std::invalid_argument("epoch " + std::to_string(since_epoch) + " is not closed; pass what advance_epoch()"
                                " returned at the last export, or 0 for everything");
  }
  if (since_epoch < dropped_to_) {
    throw std::invalid_argument("tombstones up to epoch " + std::to_string(dropped_to_) + " were dropped, so the delta"
                                " since epoch " + std::to_string(since_epoch) + " is not complete; use export_all()");
  }
  Delta delta;
  export_rows(since_epoch, &delta);
  tombstones_.for_each([&](std::int64_t id, std::uint64_t erased_epoch) {
    if (erased_epoch > since_epoch) delta.tombstones.push_back(id);
  });
  std::sort(delta.tombstones.begin(), delta.tombstones.end());
  return delta;
}

Delta EmbeddingTable::export_all() const {
  const std::shared_lock lock(mutex_);
  Delta delta;
  export_rows(0, &delta);
  return delta;
}

std::size_t EmbeddingTable::drop_tombstones(std::uint64_t up_to_epoch) {
  const std::unique_lock lock(mutex_);
  if (up_to_epoch >= epoch_) {
    throw std::invalid_argument("epoch " + std::to_string(up_to_epoch) + " is not closed; call advance_epoch() first");
  }
  std::vector<std::int64_t> old;
  tombstones_.for_each([&](std::int64_t id, std::uint64_t erased_epoch) {
    if (erased_epoch <= up_to_epoch) old.push_back(id);
  });
  for (const std::int64_t id : old) tombstones_.erase(id);
  dropped_to_ = std::max(dropped_to_, up_to_epoch);
  return old.size();
}

void EmbeddingTable::export_rows(std::uint64_t since_epoch, Delta* delta) const {
  std::vector<std::pair<std::int64_t, std::uint64_t>> changed;  // (key, row)
  for (std::uint64_t row = 0; row < rows_.end(); ++row) {
    const RowMeta& meta = rows_.meta(row);
    if (meta.dirty_epoch > since_epoch) changed.emplace_back(meta.key, row);
  }
  std::sort(changed.begin(), changed.end());
  const std::size_t n = changed.size();
  delta->keys.resize(n);
  delta->weights.resize(n * config_.dim);
  delta->state.resize(n * state_dim_);
  delta->last_update_us.resize(n);
  for (std::size_t i = 0; i < n; ++i) {
    const auto [key, row] = changed[i];
    const float* values = rows_.row(row);
    delta->keys[i] = key;
    delta->last_update_us[i] = rows_.meta(row).last_update_us;
    copy_floats(values, config_.dim, delta->weights.data() + i * config_.dim);
    copy_floats(values + config_.dim, state_dim_, delta->state.data() + i * state_dim_);
  }
}

}  // namespace freshet
