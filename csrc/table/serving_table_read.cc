// Lookups of the serving table: lock-free, with the cache misses of many ids overlapping.
#include <algorithm>

#include "../common/parallel.h"
#include "../common/platform.h"
#include "flight.h"
#include "hash.h"
#include "initializer.h"
#include "pooled.h"
#include "serving_table.h"

namespace freshet {
namespace {

constexpr std::size_t kTask = 1024;   // ids per task of a thread
constexpr std::size_t kPooled = 128;  // rows of bags that are read before they are added up

// What `fly` wants of a table with one index.
struct Shelf {
  const Index& index_;
  const RowStore& rows_;
  const Index& index() const noexcept { return index_; }
  const RowStore& rows() const noexcept { return rows_; }
};

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

// Each row is proven by the version of its bucket once it was decoded; where the writer was at work meanwhile, the id is
// searched anew.
FRESHET_CLONES std::size_t ServingTable::read_rows(const std::int64_t* ids, std::size_t n, float* out,
                                                   Missing missing) const noexcept {
  std::size_t absent = 0;
  const std::size_t dim = config_.dim;
  const Shelf shelf{index_, store_};
  fly<Intent::kRead>(
      n, codec_.row_bytes(), store_.layout(), [ids](std::size_t i) { return ids[i]; },
      [&shelf](std::uint64_t) -> const Shelf& { return shelf; },
      [&](std::size_t i, const Arrival<const Shelf>& arrival) __attribute__((always_inline)) {
        float* const to = out + i * dim;
        if (arrival.row != nullptr) {
          decode_racy(codec_, arrival.row, to);
          if (arrival.bucket->end_read(arrival.control)) return;
        }
        if (arrival.handle != kAbsent && read_row(ids[i], hash_id(ids[i]), to)) return;
        ++absent;
        read_missing(ids[i], missing, to);
      });
  return absent;
}

std::size_t ServingTable::lookup(const std::int64_t* ids, std::size_t n, float* out, Missing missing,
                                 std::size_t threads) const {
  const Reclaimer::Guard guard(reclaimer_);  // for all threads of this call: they work only while it waits
  std::atomic<std::size_t> absent{0};
  parallel_for((n + kTask - 1) / kTask, threads, [&](std::size_t task) {
    const std::size_t at = task * kTask;
    absent.fetch_add(read_rows(ids + at, std::min(kTask, n - at), out + at * config_.dim, missing),
                     std::memory_order_relaxed);
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
      ids, n, offsets, bags, mean, config_.dim, kPooled, threads, out,
      [&](const std::int64_t* some, std::size_t count, float* rows) { return read_rows(some, count, rows, missing); });
  count(n, absent);
  return absent;
}

}  // namespace freshet
