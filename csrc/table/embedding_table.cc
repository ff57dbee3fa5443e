#include "embedding_table.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "batch.h"
#include "initializer.h"

namespace freshet {
namespace {

const TableConfig& checked(const TableConfig& c) {
  const OptimizerConfig& o = c.optimizer;
  const auto require = [](bool good, const char* why) {
    if (!good) throw std::invalid_argument(why);
  };
  const auto at_least_zero = [](float x) { return std::isfinite(x) && x >= 0; };
  require(c.dim >= 1 && c.dim <= 65536, "dim must be between 1 and 65536");
  require(at_least_zero(c.init_scale), "init_scale must be finite and >= 0");
  require(std::isfinite(o.epsilon) && o.epsilon > 0, "epsilon must be finite and > 0");
  require(at_least_zero(o.initial_accumulator), "initial_accumulator must be finite and >= 0");
  require(o.beta1 >= 0 && o.beta1 < 1 && o.beta2 >= 0 && o.beta2 < 1, "beta1 and beta2 must be in [0, 1)");
  require(at_least_zero(o.l1) && at_least_zero(o.l2), "l1 and l2 must be finite and >= 0");
  require(std::isfinite(o.ftrl_beta) && o.ftrl_beta > 0, "ftrl_beta must be finite and > 0");
  require(c.threshold >= 1 && c.threshold <= Candidate::kMaxCount, "the admission threshold must be 1 to 65535");
  require(c.probability > 0 && c.probability <= 1, "the admission probability must be above 0 and at most 1");
  require(c.ttl_us >= 0 && c.ttl_us <= kMaxTimeUs, "ttl_us must be >= 0 (0 = never) and below 136 years");
  require(c.admission != Admission::kThreshold || c.ttl_us <= Candidate::kMaxTtlUs,
          "with an admission threshold ttl_us may be at most 1,000 days: a candidate keeps its hour in 16 bits");
  require(c.sweep_steps >= 1 && c.sweep_steps <= (1U << 30), "sweep_steps must be 1 to 2^30");
  require(c.shards >= 1 && c.shards <= 256 && (c.shards & (c.shards - 1)) == 0,
          "shards must be a power of two from 1 to 256");
  return c;
}

unsigned log2_of(unsigned power) noexcept { return static_cast<unsigned>(__builtin_ctz(power)); }

// Whether a value is beyond the limit or not finite. Magnitudes of floats are in the order of their bits, infinity and
// NaN above all numbers: one `and` and one maximum per vector, since this pass sees every gradient.
FRESHET_CLONES bool any_beyond(const float* values, std::size_t n, float limit) noexcept {
  constexpr std::uint32_t kMagnitude = 0x7fffffff;
  std::uint32_t most = 0;
  for (std::size_t i = 0; i < n; ++i) {
    std::uint32_t bits;
    std::memcpy(&bits, values + i, sizeof bits);
    most = std::max(most, bits & kMagnitude);
  }
  std::uint32_t allowed;
  std::memcpy(&allowed, &limit, sizeof allowed);
  return most > allowed;
}

}  // namespace

EmbeddingTable::EmbeddingTable(const TableConfig& config)
    : config_(checked(config)),
      state_dim_(state_size(config.optimizer.kind, config.dim)),
      init_key_(table_key(config.seed, config.slot_hash)),
      shard_bits_(log2_of(config.shards)) {
  for (unsigned s = 0; s < config.shards; ++s) {
    shards_.push_back(std::make_unique<Shard>(&reclaimer_, shard_bits_, config.dim + state_dim_));
    groups_.push_back(std::make_unique<Group>());
  }
}

EmbeddingTable::~EmbeddingTable() = default;

std::size_t EmbeddingTable::size() const noexcept {
  std::size_t rows = 0;
  for (const auto& shard : shards_) rows += shard->size();
  return rows;
}

TableStats EmbeddingTable::stats() const {
  TableStats stats;
  {
    const std::lock_guard<std::mutex> lock(write_mutex_);  // for the logs alone
    for (const auto& shard : shards_) {
      stats.tombstones += shard->tombstones().size();
      stats.overhead_bytes += shard->tombstones().memory_bytes() + shard->dirty().memory_bytes();
    }
  }
  for (const auto& shard : shards_) {
    stats.rows += shard->size();
    stats.candidates += shard->candidates();
    stats.row_bytes += shard->row_capacity() * float_bytes();
    stats.overhead_bytes += shard->row_memory_bytes() - shard->row_capacity() * float_bytes();
    stats.overhead_bytes += shard->candidate_memory_bytes();
  }
  stats.overhead_bytes += reclaimer_.arena().held_bytes();
  stats.epoch = epoch();
  const auto read = [](const std::atomic<std::uint64_t>& counter) { return counter.load(std::memory_order_relaxed); };
  stats.looked_up = read(counters_.looked_up);
  stats.missed = read(counters_.missed);
  stats.inserted = read(counters_.inserted);
  stats.updated = read(counters_.updated);
  stats.upserted = read(counters_.upserted);
  stats.erased = read(counters_.erased);
  stats.expired = read(counters_.expired);
  stats.expired_candidates = read(counters_.expired_candidates);
  stats.evicted = read(counters_.evicted);
  stats.refused_admission = read(counters_.refused_admission);
  stats.refused_full = read(counters_.refused_full);
  stats.refused_batches = read(counters_.refused_batches);
  stats.postponed_sweeps = read(counters_.postponed_sweeps);
  return stats;
}

void EmbeddingTable::check_finite(const float* values, std::size_t n, float limit, const char* what) const {
  if (!any_beyond(values, n, limit)) return;
  const std::size_t i = static_cast<std::size_t>(
      std::find_if(values, values + n, [limit](float v) { return !(std::fabs(v) <= limit); }) - values);
  throw std::invalid_argument(std::string(what) + " is not finite or too large at row " +
                              std::to_string(i / config_.dim) + ", column " + std::to_string(i % config_.dim) +
                              "; nothing was changed");
}

void EmbeddingTable::check_sums() const {
  for (std::size_t g = 0; g < active_groups_; ++g) {
    const Group& group = *groups_[g];
    if (!any_beyond(group.sums.data(), group.sums.size(), kMaxGradient)) continue;
    for (const Item& item : group.items) {
      if (item.sum == kNoSum || !any_beyond(group.sums.data() + item.sum * config_.dim, config_.dim, kMaxGradient)) continue;
      throw std::invalid_argument("the sum of the gradients of id " + std::to_string(item.id) +
                                  " is not finite or too large; nothing was changed");
    }
  }
}

EmbeddingTable::Progress EmbeddingTable::progress() const {
  const std::lock_guard<std::mutex> lock(write_mutex_);
  return {epoch(), updates_, sweep_at_, eviction_at_, clock_};
}

void EmbeddingTable::begin_restore(const Progress& progress, Epoch dropped_to, const std::int64_t* tombstones,
                                   const Epoch* tombstone_epochs, std::size_t n) {
  const std::lock_guard<std::mutex> lock(write_mutex_);
  const bool empty = std::all_of(shards_.begin(), shards_.end(), [](const auto& s) { return s->index().size() == 0; });
  if (!empty) throw std::invalid_argument("a snapshot can be restored into an empty table only");
  if (progress.epoch < 1 || dropped_to >= progress.epoch) throw std::invalid_argument("the snapshot's epochs are damaged");
  std::vector<std::pair<Epoch, std::int64_t>> by_epoch;
  for (std::size_t i = 0; i < n; ++i) by_epoch.emplace_back(tombstone_epochs[i], tombstones[i]);
  std::stable_sort(by_epoch.begin(), by_epoch.end());
  std::vector<EpochLog> logs(shards_.size());
  for (EpochLog& log : logs) log.clear(dropped_to);
  for (const auto& [epoch, key] : by_epoch) {
    EpochLog& log = logs[shard_index(hash_id(key))];
    log.reserve(epoch, 1);
    log.note(key);
  }
  for (std::size_t s = 0; s < shards_.size(); ++s) {
    shards_[s]->tombstones() = std::move(logs[s]);
    shards_[s]->dirty().clear(progress.epoch);  // it never knew of the rows to come; exports look at every row instead
  }
  epoch_.store(progress.epoch, std::memory_order_relaxed);
  dropped_to_ = dropped_to;
  updates_ = progress.updates;
  sweep_at_ = progress.sweep_at;
  eviction_at_ = progress.eviction_at;
  clock_ = progress.clock;
}

}  // namespace freshet
