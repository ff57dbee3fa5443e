// Lookups of the serving table: lock-free, in blocks whose cache misses overlap.
#include <algorithm>
#include <array>

#include "../common/parallel.h"
#include "../common/platform.h"
#include "hash.h"
#include "initializer.h"
#include "pooled.h"
#include "serving_table.h"

namespace freshet {
namespace {

constexpr std::size_t kBlock = 64;          // probes in flight
constexpr std::size_t kTask = 16 * kBlock;  // ids per task of a thread

// One id of a block on its way: which bucket is being looked at, and what came out.
struct Probe {
  enum class State { kSearching, kFound, kAbsent, kUnclear } state;
  std::uint64_t hash;
  Index::Span span;
  std::uint32_t control;
  const char* row;
};

// Looks for the id in the bucket that has arrived. Unclear: a writer is at work on it, or has replaced it. Each bucket
// is proven before the next, as in Index::find, and a handle before it is followed.
inline void look(Probe& probe, std::int64_t id, const RowStore& store) noexcept {
  const Bucket& bucket = probe.span.bucket();
  probe.control = bucket.control.load(std::memory_order_acquire);
  const Handle handle = bucket.find(id);
  const bool proven = (probe.control & (Bucket::kVersion | Bucket::kRetired)) == 0 && bucket.end_read(probe.control);
  if (!proven) {
    probe.state = Probe::State::kUnclear;
  } else if (handle != kAbsent) {
    probe.row = store.row(handle);
    probe.state = Probe::State::kFound;
  } else if (Bucket::overflow(probe.control) == 0 || !probe.span.step()) {
    probe.state = Probe::State::kAbsent;
  }
}

FRESHET_INLINE void prefetch_row(const char* row, std::size_t bytes) noexcept {
  const std::size_t before = reinterpret_cast<std::uintptr_t>(row) % kCacheLine;
  prefetch_lines(row - before, before + bytes);
}

// The weights of a row that the writer may be changing; the caller validates.
inline void decode_racy(const RowCodec& codec, const char* row, float* out) {
#if FRESHET_TSAN
  static thread_local std::vector<char> copy;
  copy.resize(codec.row_bytes());
  copy_racy(row, codec.row_bytes(), copy.data());
  codec.decode(copy.data(), out);
#else
  codec.decode(row, out);
#endif
}

}  // namespace

void ServingTable::count(std::size_t ids, std::size_t absent) const noexcept {
  looked_up_.fetch_add(ids, std::memory_order_relaxed);
  missed_.fetch_add(absent, std::memory_order_relaxed);
}

void ServingTable::read_missing(std::int64_t id, Missing missing, float* out) const noexcept {
  if (missing == Missing::kZeros) {
    std::fill_n(out, config_.dim, 0.0F);
  } else {
    init_weights(init_key_, id, config_.init_scale, config_.dim, out);
    codec_.round(out);
  }
}

// One id by the complete search; false if it has no row.
bool ServingTable::read_row(std::int64_t id, std::uint64_t hash, float* out) const noexcept {
  for (;;) {
    const Index::Found found = index_.find(id, hash);
    if (!found.bucket->end_read(found.control)) continue;  // believe the handle before following it
    if (found.handle == kAbsent) return false;
    decode_racy(codec_, store_.row(found.handle), out);
    if (found.bucket->end_read(found.control)) return true;
  }
}

// In passes, so that cache misses overlap: the buckets are on their way while hashes are computed, the rows (or, where
// a bucket was full, the next one) while keys are compared. Then rows are decoded, and proven by the bucket's version.
// What is not so plain takes the complete search.
std::size_t ServingTable::read_block(const std::int64_t* ids, std::size_t n, float* out,
                                     Missing missing) const noexcept {
  using State = Probe::State;
  std::array<Probe, kBlock> probes;
  std::array<std::uint8_t, kBlock> searching;
  for (std::size_t i = 0; i < n; ++i) {
    const std::uint64_t hash = hash_id(ids[i]);
    probes[i] = {State::kSearching, hash, index_.span(hash), 0, nullptr};
    prefetch_read(&probes[i].span.bucket());
    searching[i] = static_cast<std::uint8_t>(i);
  }
  for (std::size_t left = n, still = 0; left != 0; left = still, still = 0) {
    for (std::size_t s = 0; s < left; ++s) {
      Probe& probe = probes[searching[s]];
      look(probe, ids[searching[s]], store_);
      if (probe.state == State::kFound) prefetch_row(probe.row, codec_.row_bytes());
      if (probe.state != State::kSearching) continue;
      prefetch_read(&probe.span.bucket());
      searching[still++] = searching[s];
    }
  }
  std::size_t absent = 0;
  for (std::size_t i = 0; i < n; ++i, out += config_.dim) {
    const Probe& probe = probes[i];
    bool found = probe.state == State::kFound;
    if (found) decode_racy(codec_, probe.row, out);
    const bool proven = probe.state == State::kAbsent || (found && probe.span.bucket().end_read(probe.control));
    if (!proven) found = read_row(ids[i], probe.hash, out);
    if (found) continue;
    ++absent;
    read_missing(ids[i], missing, out);
  }
  return absent;
}

std::size_t ServingTable::lookup(const std::int64_t* ids, std::size_t n, float* out, Missing missing,
                                 std::size_t threads) const {
  const Reclaimer::Guard guard(reclaimer_);  // for all threads of this call: they work only while it waits
  std::atomic<std::size_t> absent{0};
  parallel_for((n + kTask - 1) / kTask, threads, [&](std::size_t task) {
    std::size_t misses = 0;
    for (std::size_t at = task * kTask; at < std::min(n, (task + 1) * kTask); at += kBlock) {
      misses += read_block(ids + at, std::min(kBlock, n - at), out + at * config_.dim, missing);
    }
    absent.fetch_add(misses, std::memory_order_relaxed);
  });
  count(n, absent.load());
  return absent.load();
}

std::size_t ServingTable::lookup_pooled(const std::int64_t* ids, std::size_t n, const std::int64_t* offsets,
                                        std::size_t bags, Pooling pooling, float* out, Missing missing,
                                        std::size_t threads) const {
  const Reclaimer::Guard guard(reclaimer_);
  const BagMean mean = pooling == Pooling::kMean ? BagMean::kYes : BagMean::kNo;
  const std::size_t absent = pool_bags(
      ids, n, offsets, bags, mean, config_.dim, kBlock, threads, out,
      [&](const std::int64_t* some, std::size_t count, float* rows) { return read_block(some, count, rows, missing); });
  count(n, absent);
  return absent;
}

}  // namespace freshet
