#include "embedding_table.h"

#include <algorithm>
#include <cmath>
#include <mutex>
#include <stdexcept>
#include <string>

#include "initializer.h"

namespace freshet {
namespace {

const TableConfig& checked(const TableConfig& c) {
  const OptimizerConfig& o = c.optimizer;
  const auto refuse = [](const char* why) { throw std::invalid_argument(why); };
  if (c.dim < 1 || c.dim > 65536) refuse("dim must be between 1 and 65536");
  if (!std::isfinite(c.init_scale) || c.init_scale < 0) refuse("init_scale must be finite and >= 0");
  if (!std::isfinite(o.epsilon) || o.epsilon <= 0) refuse("epsilon must be finite and > 0");
  if (!std::isfinite(o.initial_accumulator) || o.initial_accumulator < 0) {
    refuse("initial_accumulator must be finite and >= 0");
  }
  if (!(o.beta1 >= 0 && o.beta1 < 1 && o.beta2 >= 0 && o.beta2 < 1)) refuse("beta1 and beta2 must be in [0, 1)");
  return c;
}

}  // namespace

struct EmbeddingTable::Gradients {
  std::vector<std::int64_t> ids;  // distinct, in order of first occurrence
  std::vector<float> sums;        // [ids.size(), dim]; empty if the batch had no duplicates
};

EmbeddingTable::EmbeddingTable(const TableConfig& config)
    : config_(checked(config)),
      state_dim_(freshet::state_size(config.optimizer.kind, config.dim)),
      init_key_(table_key(config.seed, config.slot_hash)),
      index_(init_key_),
      tombstones_(init_key_),
      rows_(config.dim + state_dim_) {}

std::size_t EmbeddingTable::size() const {
  const std::shared_lock lock(mutex_);
  return index_.size();
}

std::uint64_t EmbeddingTable::epoch() const {
  const std::shared_lock lock(mutex_);
  return epoch_;
}

TableStats EmbeddingTable::stats() const {
  const std::shared_lock lock(mutex_);
  TableStats stats = counters_;
  stats.rows = index_.size();
  stats.tombstones = tombstones_.size();
  stats.epoch = epoch_;
  stats.memory_bytes = index_.memory_bytes() + tombstones_.memory_bytes() + rows_.memory_bytes();
  stats.looked_up = looked_up_.load(std::memory_order_relaxed);
  stats.missed = missed_.load(std::memory_order_relaxed);
  return stats;
}

std::size_t EmbeddingTable::lookup(const std::int64_t* ids, std::size_t n, float* out, Missing missing) const {
  const std::shared_lock lock(mutex_);
  std::size_t absent = 0;
  for (std::size_t i = 0; i < n; ++i, out += config_.dim) {
    const std::uint64_t row = index_.find(ids[i]);
    if (row != IdMap::kNone) {
      copy_floats(rows_.row(row), config_.dim, out);
      continue;
    }
    ++absent;
    if (missing == Missing::kInitial) {
      init_weights(init_key_, ids[i], config_.init_scale, config_.dim, out);
    } else {
      std::fill_n(out, config_.dim, 0.0F);
    }
  }
  looked_up_.fetch_add(n, std::memory_order_relaxed);
  missed_.fetch_add(absent, std::memory_order_relaxed);
  return absent;
}

std::size_t EmbeddingTable::find_or_insert(const std::int64_t* ids, std::size_t n, float* out) {
  const std::unique_lock lock(mutex_);
  reserve_rows_for(ids, n);
  const std::size_t before = index_.size();
  for (std::size_t i = 0; i < n; ++i, out += config_.dim) copy_floats(rows_.row(row_of(ids[i])), config_.dim, out);
  return index_.size() - before;
}

std::size_t EmbeddingTable::apply_gradients(const std::int64_t* ids, std::size_t n, const float* grads, float lr,
                                            std::int64_t now_us) {
  if (!(lr >= 0 && lr <= kMaxLearningRate)) throw std::invalid_argument("lr must be between 0 and 1e6");
  if (now_us < 0) throw std::invalid_argument("now_us must be >= 0 (0 = unknown)");
  check_finite(grads, n * config_.dim, kMaxGradient, "gradient");
  const Gradients batch = sum_by_id(ids, n, grads);
  check_finite(batch.sums.data(), batch.sums.size(), kMaxGradient, "sum of the gradients of a repeated id");

  const std::unique_lock lock(mutex_);
  reserve_rows_for(batch.ids.data(), batch.ids.size());
  const float* gradient = batch.sums.empty() ? grads : batch.sums.data();
  for (const std::int64_t id : batch.ids) {
    const std::uint64_t row = row_of(id);
    update_row(config_.optimizer, config_.dim, lr, gradient, rows_.row(row));
    RowMeta& meta = rows_.meta(row);
    meta.dirty_epoch = epoch_;
    meta.last_update_us = std::max(meta.last_update_us, now_us);
    gradient += config_.dim;
  }
  counters_.updated += batch.ids.size();
  return batch.ids.size();
}

std::size_t EmbeddingTable::upsert(const std::int64_t* ids, std::size_t n, const float* weights, const float* state,
                                   const std::int64_t* last_update_us) {
  check_finite(weights, n * config_.dim, std::numeric_limits<float>::max(), "weight");
  for (std::size_t i = 0; i < n; ++i) {
    if (state != nullptr && !state_valid(config_.optimizer.kind, config_.dim, state + i * state_dim_)) {
      throw std::invalid_argument("optimiser state of row " + std::to_string(i) +
                                  " is not finite, or negative where it is a sum of squares; nothing was changed");
    }
    if (last_update_us != nullptr && last_update_us[i] < 0) {
      throw std::invalid_argument("last_update_us of row " + std::to_string(i) + " is negative; nothing was changed");
    }
  }

  const std::unique_lock lock(mutex_);
  reserve_rows_for(ids, n);
  const std::size_t before = index_.size();
  for (std::size_t i = 0; i < n; ++i) {
    const std::uint64_t row = row_of(ids[i]);
    float* values = rows_.row(row);
    copy_floats(weights + i * config_.dim, config_.dim, values);
    if (state != nullptr) {
      copy_floats(state + i * state_dim_, state_dim_, values + config_.dim);
    } else {
      init_state(config_.optimizer, config_.dim, values + config_.dim);
    }
    rows_.meta(row) = {ids[i], last_update_us != nullptr ? last_update_us[i] : 0, epoch_};
  }
  counters_.upserted += n;
  return index_.size() - before;
}

std::size_t EmbeddingTable::erase(const std::int64_t* ids, std::size_t n) {
  const std::unique_lock lock(mutex_);
  std::size_t present = 0;
  for (std::size_t i = 0; i < n; ++i) present += index_.find(ids[i]) != IdMap::kNone ? 1 : 0;
  tombstones_.reserve(tombstones_.size() + present);
  const std::size_t before = index_.size();
  for (std::size_t i = 0; i < n; ++i) {
    const std::uint64_t row = index_.find(ids[i]);
    if (row != IdMap::kNone) erase_row(ids[i], row);
  }
  counters_.erased += before - index_.size();
  return before - index_.size();
}

std::size_t EmbeddingTable::expire(std::int64_t before_us) {
  const std::unique_lock lock(mutex_);
  const auto stale = [&](const RowMeta& meta) {
    return meta.dirty_epoch != 0 && meta.last_update_us != 0 && meta.last_update_us < before_us;
  };
  std::size_t count = 0;
  for (std::uint64_t row = 0; row < rows_.end(); ++row) count += stale(rows_.meta(row)) ? 1 : 0;
  tombstones_.reserve(tombstones_.size() + count);
  for (std::uint64_t row = 0; row < rows_.end(); ++row) {
    if (stale(rows_.meta(row))) erase_row(rows_.meta(row).key, row);
  }
  counters_.expired += count;
  return count;
}

void EmbeddingTable::check_finite(const float* values, std::size_t n, float limit, const char* what) const {
  for (std::size_t i = 0; i < n; ++i) {
    if (!(std::fabs(values[i]) <= limit)) {  // false for NaN
      throw std::invalid_argument(std::string(what) + " is not finite or too large at row " +
                                  std::to_string(i / config_.dim) + ", column " + std::to_string(i % config_.dim) +
                                  "; nothing was changed");
    }
  }
}

EmbeddingTable::Gradients EmbeddingTable::sum_by_id(const std::int64_t* ids, std::size_t n, const float* grads) const {
  Gradients batch;
  IdMap first(init_key_);  // id -> its place in batch.ids
  first.reserve(n);
  batch.ids.reserve(n);
  for (std::size_t i = 0; i < n; ++i) {
    if (first.find(ids[i]) != IdMap::kNone) continue;
    first.set(ids[i], batch.ids.size());
    batch.ids.push_back(ids[i]);
  }
  if (batch.ids.size() == n) return batch;

  const std::size_t dim = config_.dim;
  batch.sums.resize(batch.ids.size() * dim);
  std::size_t seen = 0;
  for (std::size_t i = 0; i < n; ++i, grads += dim) {
    const std::size_t place = first.find(ids[i]);
    float* sum = batch.sums.data() + place * dim;
    if (place == seen) {
      copy_floats(grads, dim, sum);
      ++seen;
    } else {
      for (std::size_t j = 0; j < dim; ++j) sum[j] += grads[j];
    }
  }
  return batch;
}

// Reserves rows and index places for the distinct absent ids of the batch, so that row_of cannot fail.
void EmbeddingTable::reserve_rows_for(const std::int64_t* ids, std::size_t n) {
  IdMap absent(init_key_);
  for (std::size_t i = 0; i < n; ++i) {
    if (index_.find(ids[i]) != IdMap::kNone) continue;
    absent.reserve(absent.size() + 1);
    absent.set(ids[i], 0);
  }
  if (absent.size() == 0) return;
  index_.reserve(index_.size() + absent.size());
  rows_.reserve(absent.size());
}

// The row of `id`, fresh if it had none. Needs reserve_rows_for before.
std::uint64_t EmbeddingTable::row_of(std::int64_t id) noexcept {
  std::uint64_t row = index_.find(id);
  if (row != IdMap::kNone) return row;
  row = rows_.take();
  init_weights(init_key_, id, config_.init_scale, config_.dim, rows_.row(row));
  init_state(config_.optimizer, config_.dim, rows_.row(row) + config_.dim);
  rows_.meta(row) = {id, 0, epoch_};
  index_.set(id, row);
  tombstones_.erase(id);  // the row itself, dirty in this epoch, now tells readers of deltas what became of the id
  ++counters_.inserted;
  return row;
}

// Needs room for one more tombstone.
void EmbeddingTable::erase_row(std::int64_t id, std::uint64_t row) noexcept {
  index_.erase(id);
  tombstones_.set(id, epoch_);
  rows_.give_back(row);
}

}  // namespace freshet
