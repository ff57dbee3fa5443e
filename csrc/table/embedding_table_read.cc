// Lookups: lock-free, with the cache misses of many ids overlapping.
#include <algorithm>

#include "../common/parallel.h"
#include "embedding_table.h"
#include "flight.h"
#include "initializer.h"
#include "pooled.h"

namespace freshet {
namespace {

constexpr std::size_t kTask = 1024;   // ids per task of a thread
constexpr std::size_t kPooled = 128;  // rows of bags that are read before they are added up

FRESHET_INLINE void read_missing(std::uint64_t key, std::int64_t id, float scale, std::size_t dim, bool initial,
                                 float* out) noexcept {
  if (initial) {
    init_weights(key, id, scale, dim, out);
  } else {
    std::fill_n(out, dim, 0.0F);
  }
}

}  // namespace

// One id by the complete search; false if it has no row.
bool EmbeddingTable::read_row(std::int64_t id, std::uint64_t hash, float* out) const noexcept {
  const Shard& shard = shard_of(hash);
  for (;;) {
    const Index::Found found = shard.index().find(id, hash);
    if (found.handle == kAbsent) return false;
    if (is_row(found.handle)) copy_racy(shard.floats(found.handle), weight_bytes(), out);
    if (found.bucket->end_read(found.control)) return is_row(found.handle);
  }
}

// The copies of a block are proven at once if nothing was written meanwhile: a second look at each bucket would cost a
// lookup a fifteenth of its time. Otherwise each is proven by the version of the row's bucket, and where that has changed
// the id is searched anew.
FRESHET_CLONES std::size_t EmbeddingTable::read_rows(const std::int64_t* ids, std::size_t n, float* out,
                                                     Missing missing) const noexcept {
  std::size_t absent = 0;
  const std::size_t dim = config_.dim, bytes = weight_bytes();
  const std::unique_ptr<Shard>* const shards = shards_.data();
  const unsigned shard_bits = shard_bits_;
  const auto miss = [&](std::size_t i) __attribute__((always_inline)) {
    ++absent;
    read_missing(init_key_, ids[i], config_.init_scale, dim, missing == Missing::kInitial, out + i * dim);
  };
  const auto search = [&](std::size_t i) __attribute__((always_inline)) {
    if (!read_row(ids[i], hash_id(ids[i]), out + i * dim)) miss(i);
  };
  std::uint64_t writes = writes_.load(std::memory_order_acquire);
  fly<Intent::kRead>(
      n, bytes, row_layout(), [ids](std::size_t i) { return ids[i]; },
      [shards, shard_bits](std::uint64_t hash) -> Shard& { return *shards[shard_index(hash, shard_bits)]; },
      [&](std::size_t i, const Arrival<Shard>& arrival) __attribute__((always_inline)) {
        if (arrival.row != nullptr) return copy_racy(arrival.row, bytes, out + i * dim);
        arrival.handle == kAbsent ? miss(i) : search(i);
      },
      [&](std::size_t start, std::size_t count, const Arrival<Shard>* arrivals) __attribute__((always_inline)) {
        if (!nothing_written_since(writes)) {
          for (std::size_t i = start; i < start + count; ++i) {
            const Arrival<Shard>& arrival = arrivals[i - start];
            if (arrival.row != nullptr && !arrival.bucket->end_read(arrival.control)) search(i);
          }
        }
        writes = writes_.load(std::memory_order_acquire);  // for the next block
      });
  return absent;
}

std::size_t EmbeddingTable::lookup(const std::int64_t* ids, std::size_t n, float* out, Missing missing,
                                   std::size_t threads) const {
  std::atomic<std::size_t> absent{0};
  // A task for each thread: nothing is in flight across tasks.
  const std::size_t size = std::max(kTask, (n + threads - 1) / std::max<std::size_t>(threads, 1));
  parallel_for((n + size - 1) / size, threads, [&](std::size_t task) {
    const Reclaimer::Guard guard(reclaimer_);
    const std::size_t at = task * size;
    absent.fetch_add(read_rows(ids + at, std::min(size, n - at), out + at * config_.dim, missing),
                     std::memory_order_relaxed);
  });
  counters_.looked_up.fetch_add(n, std::memory_order_relaxed);
  counters_.missed.fetch_add(absent.load(), std::memory_order_relaxed);
  return absent.load();
}

std::size_t EmbeddingTable::lookup_pooled(const std::int64_t* ids, std::size_t n, const std::int64_t* offsets,
                                          std::size_t bags, Pooling pooling, float* out, Missing missing,
                                          std::size_t threads) const {
  const Reclaimer::Guard guard(reclaimer_);
  const std::size_t absent =
      pool_bags(ids, n, offsets, bags, pooling == Pooling::kMean ? BagMean::kYes : BagMean::kNo, config_.dim,
                kPooled, threads, out, [&](const std::int64_t* block, std::size_t count, float* rows) {
                  return read_rows(block, count, rows, missing);
                });
  counters_.looked_up.fetch_add(n, std::memory_order_relaxed);
  counters_.missed.fetch_add(absent, std::memory_order_relaxed);
  return absent;
}

}  // namespace freshet
