#include "serving_table.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "../common/platform.h"
#include "hash.h"

namespace freshet {
namespace {

constexpr std::size_t kBlock = 64;  // keys whose cache misses overlap

const ServingConfig& checked(const ServingConfig& c) {
  if (c.dim < 1 || c.dim > 65536) throw std::invalid_argument("dim must be between 1 and 65536");
  const float limit = RowCodec(c.precision, c.dim).max_weight();
  if (!(c.init_scale >= 0 && c.init_scale <= limit)) {
    throw std::invalid_argument("init_scale must be finite, >= 0 and fit the precision");
  }
  return c;
}

}  // namespace

ServingTable::ServingTable(const ServingConfig& config)
    : config_(checked(config)),
      codec_(config.precision, config.dim),
      init_key_(table_key(config.seed, config.slot_hash)),
      store_(&reclaimer_, 0, codec_.row_bytes()),
      index_(&reclaimer_, 0),
      encoded_(codec_.row_bytes()) {}

ServingStats ServingTable::stats() const noexcept {
  ServingStats stats;
  stats.rows = size();
  stats.row_bytes = store_.capacity() * codec_.row_bytes();
  stats.overhead_bytes =
      store_.capacity() * (store_.bytes_per_row() - codec_.row_bytes()) + reclaimer_.arena().held_bytes();
  stats.looked_up = looked_up_.load(std::memory_order_relaxed);
  stats.missed = missed_.load(std::memory_order_relaxed);
  stats.upserted = upserted_.load(std::memory_order_relaxed);
  stats.erased = erased_.load(std::memory_order_relaxed);
  return stats;
}

void ServingTable::check(const std::int64_t* keys, std::size_t n, const float* weights) const {
  const std::size_t bad = codec_.first_unfit(weights, n * config_.dim);
  if (bad == n * config_.dim) return;
  const std::size_t row = bad / config_.dim;
  const float value = weights[bad];
  throw std::invalid_argument(
      "row " + std::to_string(row) + " (id " + std::to_string(keys[row]) + ") has weight " + std::to_string(value) +
      (std::isfinite(value) ? ", too large for fp16 (at most 65504): serve this table in fp32 or int8"
                            : ": weights must be finite") +
      "; nothing was changed");
}

// Gets the buckets and rows of keys [from, to) on their way, so that their cache misses overlap.
template <typename KeyAt>
void ServingTable::send_for(std::size_t from, std::size_t to, const KeyAt& key_at) const noexcept {
  for (std::size_t i = from; i < to; ++i) prefetch<Intent::kWrite>(index_.places(hash_id(key_at(i))).home);
  for (std::size_t i = from; i < to; ++i) {
    const Handle handle = index_.places(hash_id(key_at(i))).home->find(key_at(i));
    if (handle != kAbsent) prefetch_row(store_.row(handle), codec_.row_bytes());
  }
}

// Fills a row that no reader can find, then lets them find it.
void ServingTable::insert_row(std::int64_t key, std::uint64_t hash, const float* weights) {
  store_.reserve(1);
  const Handle handle = store_.take();
  codec_.encode(weights, encoded_.data());
  write_encoded(store_.row(handle));  // which a reader of its former key may still be copying
  try {
    index_.insert(key, hash, handle);
  } catch (...) {
    store_.give_back(handle);
    throw;
  }
}

void ServingTable::overwrite(std::int64_t key, std::uint64_t hash, const float* weights) noexcept {
  const Index::Place place = index_.locate(key, hash);
  codec_.encode(weights, encoded_.data());
  const BucketLock lock(*place.bucket);
  write_encoded(store_.row(place.bucket->at(place.slot)));
}

void ServingTable::write_encoded(char* to) noexcept {
  change_racy(to, encoded_.size(), [this](void* bytes) { copy_words(encoded_.data(), encoded_.size(), bytes); });
}

// Needs store_.reserve_back before.
bool ServingTable::erase_row(std::int64_t key, std::uint64_t hash) noexcept {
  const Index::Place place = index_.locate(key, hash);
  if (place.bucket == nullptr) return false;
  const Handle handle = place.bucket->at(place.slot);
  index_.erase(place, hash);
  store_.give_back(handle);
  return true;
}

// Returns the positions of keys that have a row already, in order. On an exception no row is new.
std::vector<std::size_t> ServingTable::insert_absent(const std::int64_t* keys, std::size_t n, const float* weights) {
  std::vector<std::size_t> present;
  std::size_t i = 0;
  try {
    for (; i < n; ++i) {
      if (i % kBlock == 0) send_for(i, std::min(n, i + kBlock), [keys](std::size_t k) { return keys[k]; });
      const std::uint64_t hash = hash_id(keys[i]);
      if (index_.locate(keys[i], hash).bucket != nullptr) {
        present.push_back(i);
      } else {
        insert_row(keys[i], hash, weights + i * config_.dim);
      }
    }
  } catch (...) {
    undo_inserts(keys, i, present);
    throw;
  }
  return present;
}

// Erases the first n keys that were not there before: the others are at `present`, or (repeated keys) erased already.
void ServingTable::undo_inserts(const std::int64_t* keys, std::size_t n,
                                const std::vector<std::size_t>& present) noexcept {
  auto next = present.begin();
  for (std::size_t i = 0; i < n; ++i) {
    if (next != present.end() && *next == i) {
      ++next;
    } else {
      erase_row(keys[i], hash_id(keys[i]));
    }
  }
}

ServingTable::Applied ServingTable::apply(const std::int64_t* keys, std::size_t n, const float* weights,
                                          const std::int64_t* tombstones, std::size_t m) {
  check(keys, n, weights);
  const std::lock_guard<std::mutex> lock(write_mutex_);
  store_.reserve_back(n + m);  // for the rows that are inserted and then erased, by a tombstone or a failure
  const std::vector<std::size_t> present = insert_absent(keys, n, weights);
  for (std::size_t i = 0; i < present.size(); ++i) {
    const auto key_at = [&](std::size_t k) { return keys[present[k]]; };
    if (i % kBlock == 0) send_for(i, std::min(present.size(), i + kBlock), key_at);
    overwrite(key_at(i), hash_id(key_at(i)), weights + present[i] * config_.dim);
  }
  Applied applied{n - present.size(), 0};
  for (std::size_t i = 0; i < m; ++i) applied.erased += erase_row(tombstones[i], hash_id(tombstones[i])) ? 1 : 0;
  upserted_.fetch_add(n, std::memory_order_relaxed);
  erased_.fetch_add(applied.erased, std::memory_order_relaxed);
  return applied;
}

}  // namespace freshet
