// Lookups: lock-free, with the cache misses of many ids overlapping.
#include <algorithm>

#include "../common/parallel.h"
#include "embedding_table.h"
#include "flight.h"
#include "initializer.h"
#include "pooled.h"

namespace freshet {
namespace {

constexpr std::size_t kTask = 2048;   // ids per task of a thread
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

// Each copy is proven by the version of the row's bucket; what cannot be proven so
// (an id that is absent behind a full bucket, a writer at work) takes the complete search.
FRESHET_CLONES std::size_t EmbeddingTable::read_rows(const std::int64_t* ids, std::size_t n, float* out, Missing missing,
                                                     std::uint8_t* is_absent) const {
  std::size_t absent = 0;
  fly<Intent::kRead>(
      n, weight_bytes(), [ids](std::size_t i) { return ids[i]; },
      [this](std::uint64_t hash) -> const Shard& { return shard_of(hash); },
      [&](std::size_t i, const ReadFlight& flight) __attribute__((always_inline)) {
        float* const to = out + i * config_.dim;
        if (finish_read(flight, ids[i], to)) return;
        ++absent;
        if (is_absent != nullptr) is_absent[i] = 1;
        read_missing(init_key_, ids[i], config_.init_scale, config_.dim, missing == Missing::kInitial, to);
      });
  return absent;
}

// Whether the id has a row; if so, its weights are in out.
FRESHET_INLINE bool EmbeddingTable::finish_read(const ReadFlight& flight, std::int64_t id, float* out) const noexcept {
  const std::uint32_t control = flight.control;
  const Bucket& bucket = *flight.span.bucket;
  if ((control & (Bucket::kVersion | Bucket::kRetired)) != 0) return read_row(id, flight.hash, out);
  if (flight.row != nullptr) {
    copy_racy(flight.row, weight_bytes(), out);
    return bucket.end_read(control) ? true : read_row(id, flight.hash, out);
  }
  const bool alone = flight.span.at_home() && Bucket::overflow(control) == 0;  // no other bucket can hold it
  const bool nowhere = flight.handle == kAbsent && alone && bucket.end_read(control);
  return nowhere ? false : read_row(id, flight.hash, out);
}

std::size_t EmbeddingTable::lookup(const std::int64_t* ids, std::size_t n, float* out, Missing missing,
                                   std::size_t threads) const {
  const std::size_t absent = read(ids, n, out, missing, threads, nullptr);
  counters_.looked_up.fetch_add(n, std::memory_order_relaxed);
  counters_.missed.fetch_add(absent, std::memory_order_relaxed);
  return absent;
}

// is_absent (nullptr: not wanted) gets 1 for every id that has no row.
std::size_t EmbeddingTable::read(const std::int64_t* ids, std::size_t n, float* out, Missing missing,
                                 std::size_t threads, std::uint8_t* is_absent) const {
  std::atomic<std::size_t> absent{0};
  const std::size_t size = threads <= 1 && n != 0 ? n : kTask;  // nothing is in flight across tasks
  parallel_for((n + size - 1) / size, threads, [&](std::size_t task) {
    const Reclaimer::Guard guard(reclaimer_);
    const std::size_t at = task * size;
    absent.fetch_add(read_rows(ids + at, std::min(size, n - at), out + at * config_.dim, missing,
                               is_absent != nullptr ? is_absent + at : nullptr),
                     std::memory_order_relaxed);
  });
  return absent.load();
}

std::size_t EmbeddingTable::lookup_pooled(const std::int64_t* ids, std::size_t n, const std::int64_t* offsets,
                                          std::size_t bags, Pooling pooling, float* out, Missing missing,
                                          std::size_t threads) const {
  const Reclaimer::Guard guard(reclaimer_);
  const std::size_t absent =
      pool_bags(ids, n, offsets, bags, pooling == Pooling::kMean ? BagMean::kYes : BagMean::kNo, config_.dim,
                kPooled, threads, out, [&](const std::int64_t* block, std::size_t count, float* rows) {
                  return read_rows(block, count, rows, missing, nullptr);
                });
  counters_.looked_up.fetch_add(n, std::memory_order_relaxed);
  counters_.missed.fetch_add(absent, std::memory_order_relaxed);
  return absent;
}

}  // namespace freshet
