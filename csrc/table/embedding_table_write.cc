// Writing batches: rows that are there are changed on the way through the index, new ones are made complete before they
// are published.
#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "../common/parallel.h"
#include "batch.h"
#include "flight.h"
#include "insertion.h"

namespace freshet {

// Writers hold no Reclaimer::Guard: only they retire segments, each in shards of its own and none that it still looks at.
// So what growth replaces is free for the next growth, and not only after the batch.

// Calls write(shard, item, meta, floats) for every item that has a row, under the lock of its bucket; the others become
// newcomers. What it changes it has to mark dirty.
template <typename Write>
FRESHET_INLINE std::size_t EmbeddingTable::write_rows(Group& group, const Write& write) noexcept {
  const Item* const items = group.items.data();
  const std::unique_ptr<Shard>* const shards = shards_.data();
  const unsigned shard_bits = shard_bits_;
  SnapshotScan::RowKeeper keeper(snapshot_scan());
  std::size_t written = 0;
  fly<Intent::kWrite>(
      group.items.size(), float_bytes(), row_layout(), [items](std::size_t i) { return items[i].id; },
      [shards, shard_bits](std::uint64_t hash) -> Shard& { return *shards[shard_index(hash, shard_bits)]; },
      [&](std::size_t i, const Arrival<Shard>& at) __attribute__((always_inline)) {
        const Item& item = items[i];
        if (at.row == nullptr) {
          if (is_candidate(at.handle)) {
            group.newcomers.emplace_back(i, at.shelf->candidate(at.handle).word.load(std::memory_order_relaxed));
          } else {
            group.newcomers.emplace_back(i);
          }
          return;
        }
        const BucketLock lock(*at.bucket);
        keeper.keep(item.id, at.floats(), at.meta());
        write(*at.shelf, item, at.meta(), at.floats());
        ++written;
      });
  return written;
}

// While newcomer i is inserted, gets the buckets of those after it on their way from memory.
FRESHET_INLINE void EmbeddingTable::send_for_places(const Group& group, std::size_t i) const noexcept {
  constexpr std::size_t kChoices = 20, kRoom = 10;  // newcomers ahead
  const auto hash_of = [&](std::size_t newcomer) { return hash_id(group.items[group.newcomers[newcomer].item].id); };
  if (i + kChoices < group.newcomers.size()) {
    const std::uint64_t hash = hash_of(i + kChoices);
    const Index::Span at = shard_of(hash).index().span(hash);
    prefetch<Intent::kWrite>(&at.bucket());
    Index::prefetch_for_insert(at);
  }
  if (i + kRoom < group.newcomers.size()) {
    const std::uint64_t hash = hash_of(i + kRoom);
    Index::prefetch_room(shard_of(hash).index().span(hash));
  }
}

// Carries out the verdicts on the newcomers: fresh rows, written before anyone sees them, and candidates. All or nothing.
// Returns the rows inserted.
template <typename Write>
std::size_t EmbeddingTable::carry_out(std::size_t threads, const Write& write) {
  std::atomic<std::size_t> inserted{0};
  try {
    parallel_for(active_groups_, threads, [&](std::size_t g) {
      Group& group = *groups_[g];
      std::size_t rows = 0;
      for (std::size_t i = 0; i < group.newcomers.size(); ++i) {
        send_for_places(group, i);
        Newcomer& newcomer = group.newcomers[i];
        const Item& item = group.items[newcomer.item];
        if (newcomer.verdict == Verdict::kInsert) {
          const std::uint64_t hash = hash_id(item.id);
          insert_row(shard_of(hash), shard_of(hash).index().span(hash), item.id, hash, newcomer,
                     [&](Shard& shard, RowMeta& meta, float* floats) { write(group, shard, item, meta, floats); });
          ++rows;
        } else if (newcomer.verdict == Verdict::kCandidate) {
          count_candidate(item, newcomer);
        }
      }
      inserted.fetch_add(rows, std::memory_order_relaxed);
    });
  } catch (...) {
    roll_back();
    throw;
  }
  counters_.inserted.fetch_add(inserted.load(), std::memory_order_relaxed);
  return inserted.load();
}

namespace {

FRESHET_INLINE const float* gradient_of(const EmbeddingTable::Gradients& gradients, const std::vector<float>& sums,
                                        std::uint32_t sum, std::uint32_t position, std::size_t dim) noexcept {
  if (sum != kNoSum) return sums.data() + sum * dim;
  return gradients.grads + (gradients.row != nullptr ? gradients.row[position] : position) * dim;
}

// 0 if there is none, or their times are those of the batch. Proves all times.
Seconds newest_event(const EmbeddingTable::Gradients& gradients, std::size_t n) {
  Seconds newest = 0;
  for (std::size_t i = 0; i < gradients.reads; ++i) check_time("read_us", gradients.read_us[i]);
  for (std::size_t i = 0; gradients.events != nullptr && i < n; ++i) {
    check_time("event_us", gradients.event_us[i]);
    if (gradients.events[i] != 0) newest = std::max(newest, to_seconds(gradients.event_us[i]));
  }
  return newest;
}

}  // namespace

// One optimiser step per item with a row; the others become newcomers.
FRESHET_CLONES std::size_t EmbeddingTable::update_rows(Group& group, const Gradients& gradients,
                                                       float lr) noexcept {
  const std::size_t dim = config_.dim, bytes = float_bytes();
  const OptimizerConfig optimizer = config_.optimizer;
  return write_rows(group, [&](Shard& shard, const Item& item, RowMeta& meta, float* floats)
                               __attribute__((always_inline)) {
    const float* const gradient = gradient_of(gradients, group.sums, item.sum, item.position, dim);
    change_racy(floats, bytes, [&](void* to) __attribute__((always_inline)) {
      update_row(optimizer, dim, lr, gradient, static_cast<float*>(to));
    });
    meta.see(item.seen);
    meta.add(item.events);
    shard.mark_dirty(item.id, meta, epoch());
  });
}

FRESHET_CLONES void EmbeddingTable::update_fresh(const Group& group, const Item& item, const Gradients& gradients,
                                                 float lr, float* floats) const noexcept {
  const float* const gradient = gradient_of(gradients, group.sums, item.sum, item.position, config_.dim);
  change_racy(floats, float_bytes(), [&](void* to) __attribute__((always_inline)) {
    update_row(config_.optimizer, config_.dim, lr, gradient, static_cast<float*>(to));
  });
}

std::size_t EmbeddingTable::apply_gradients(const std::int64_t* ids, std::size_t n, const Gradients& gradients, float lr,
                                            std::int64_t now_us, std::size_t threads) {
  if (!(lr >= 0 && lr <= kMaxLearningRate)) throw std::invalid_argument("lr must be between 0 and 1e6");
  check_time("now_us", now_us);
  const Seconds now = to_seconds(now_us), newest = std::max(now, newest_event(gradients, n));
  const Writing writing(*this);
  collect_checked(ids, n, gradients, now, threads);
  reserve_reads(gradients.read_ids, gradients.reads, active_groups_);  // nothing fails once ids have got their rows
  std::atomic<std::size_t> updated{0}, newcomers{0};
  parallel_for(active_groups_, threads, [&](std::size_t g) {
    updated.fetch_add(update_rows(*groups_[g], gradients, lr), std::memory_order_relaxed);
    newcomers.fetch_add(groups_[g]->newcomers.size(), std::memory_order_relaxed);
  });
  counters_.updated.fetch_add(updated.load(), std::memory_order_relaxed);
  std::size_t inserted = 0;
  if (newcomers.load() != 0) {
    const std::size_t no_room = judge();
    inserted = carry_out(threads, [&](const Group& group, Shard& shard, const Item& item, RowMeta& meta, float* floats) {
      init_floats(item.id, floats);
      update_fresh(group, item, gradients, lr, floats);
      meta.see(item.events != 0 ? item.seen : now);
      meta.add(item.events);
      shard.mark_dirty(item.id, meta, epoch());
    });
    counters_.updated.fetch_add(inserted, std::memory_order_relaxed);
    counters_.refused_full.fetch_add(no_room, std::memory_order_relaxed);
    counters_.refused_admission.fetch_add(newcomers.load() - inserted - no_room, std::memory_order_relaxed);
  }
  ++updates_;
  clock_ = std::max(clock_, newest);
  see_rows(gradients.read_ids, gradients.reads, gradients.read_us);
  make_room();
  return updated.load() + inserted;
}

// Collects, after proving that every gradient and every sum is finite; nothing was changed when one is not.
void EmbeddingTable::collect_checked(const std::int64_t* ids, std::size_t n, const Gradients& gradients, Seconds now,
                                     std::size_t threads) {
  try {
    check_finite(gradients.grads, gradients.grad_rows * config_.dim, kMaxGradient, "gradient");
    collect(ids, n, &gradients, now, threads);
    check_sums();
  } catch (const std::invalid_argument&) {
    counters_.refused_batches.fetch_add(1, std::memory_order_relaxed);
    throw;
  }
}

void EmbeddingTable::check_rows(std::size_t n, const Rows& rows) const {
  check_finite(rows.weights, n * config_.dim, kMaxStored, "weight");
  for (std::size_t i = 0; i < n; ++i) {
    if (rows.state != nullptr && !state_valid(config_.optimizer.kind, config_.dim, rows.state + i * state_dim_)) {
      throw std::invalid_argument("optimiser state of row " + std::to_string(i) +
                                  " is not finite, too large, or negative where it is a sum of squares or a count;"
                                  " nothing was changed");
    }
    if (rows.last_update_us != nullptr) check_time("last_update_us", rows.last_update_us[i]);
  }
}

std::size_t EmbeddingTable::upsert(const std::int64_t* ids, std::size_t n, const Rows& rows, std::size_t threads) {
  check_rows(n, rows);
  const Writing writing(*this);
  collect(ids, n, nullptr, 0, threads);
  const auto put = [&](Shard& shard, const Item& item, RowMeta& meta, float* floats) {
    put_row(rows, item.position, meta, floats);
    if (rows.dirty_epochs != nullptr) {
      meta.dirty_epoch.store(rows.dirty_epochs[item.position], std::memory_order_relaxed);
    } else {
      shard.mark_dirty(item.id, meta, epoch());
    }
  };
  parallel_for(active_groups_, threads, [&](std::size_t g) { write_rows(*groups_[g], put); });
  const std::size_t inserted =
      carry_out(threads, [&](const Group&, Shard& shard, const Item& item, RowMeta& meta, float* floats) {
        put(shard, item, meta, floats);
      });
  counters_.upserted.fetch_add(n, std::memory_order_relaxed);
  return inserted;
}

void EmbeddingTable::put_row(const Rows& rows, std::size_t i, RowMeta& meta, float* floats) const noexcept {
  change_racy(floats, float_bytes(), [&](void* to) {
    auto* const values = static_cast<float*>(to);
    copy_words(rows.weights + i * config_.dim, weight_bytes(), values);
    if (rows.state != nullptr) {
      copy_words(rows.state + i * state_dim_, state_dim_ * sizeof(float), values + config_.dim);
    } else {
      init_state(config_.optimizer, config_.dim, values + config_.dim);
    }
  });
  const std::int64_t seen = rows.last_update_us != nullptr ? rows.last_update_us[i] : 0;
  meta.last_seen.store(to_seconds(seen), std::memory_order_relaxed);
  meta.count.store(rows.counts != nullptr ? rows.counts[i] : 0, std::memory_order_relaxed);
}

}  // namespace freshet
