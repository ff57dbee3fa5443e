// The ceilings: rows whose number is known, with prefetch and nothing else. What a table does beyond that is its price.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

#include "../bucket.h"
#include "../row_meta.h"
#include "peer_slab.h"

namespace bench {

inline constexpr std::size_t kRowsAhead = 32;  // rows prefetched ahead of the one at hand

// Calls visit(i, row) for i in [begin, end), with the rows' `floats` on their way.
template <typename Visit>
FRESHET_INLINE void for_each_row(float* table, std::size_t floats, const std::uint32_t* rows, std::size_t begin,
                                 std::size_t end, const Visit& visit) {
  const auto send = [&](std::size_t i) __attribute__((always_inline)) {
    freshet::prefetch_row(table + rows[i] * floats, floats * sizeof(float));
  };
  for (std::size_t i = begin; i < std::min(begin + kRowsAhead, end); ++i) send(i);
  for (std::size_t i = begin; i < end; ++i) {
    if (i + kRowsAhead < end) send(i + kRowsAhead);
    visit(i, table + rows[i] * floats);
  }
}

FRESHET_CLONES inline void gather_part(float* table, std::size_t dim, const std::uint32_t* rows, std::size_t begin,
                                       std::size_t end, float* out) {
  const auto copy = [=](std::size_t i, const float* row) __attribute__((always_inline)) {
    freshet::copy_words(row, dim * sizeof(float), out + i * dim);
  };
  for_each_row(table, dim, rows, begin, end, copy);
}

FRESHET_CLONES inline void adagrad_part(float* table, std::size_t dim, const std::uint32_t* rows, std::size_t n,
                                        const float* gradients, float lr) {
  const freshet::OptimizerConfig config;
  const auto update = [=](std::size_t i, float* row) __attribute__((always_inline)) {
    freshet::update_row(config, dim, lr, gradients + i * dim, row);
  };
  for_each_row(table, 2 * dim, rows, 0, n, update);
}

inline constexpr std::size_t kRowsPerBucket = 4;  // of five slots

// Also changes, of each row, what an update of a table with an index has to: its bucket's lock and its bookkeeping.
FRESHET_CLONES inline void adagrad_in_places(float* table, std::size_t dim, freshet::Bucket* buckets,
                                             freshet::RowMeta* headers, const std::uint32_t* rows, std::size_t n,
                                             const float* gradients, float lr) {
  const freshet::OptimizerConfig config;
  const auto update = [=](std::size_t i, float* row) __attribute__((always_inline)) {
    if (i + 2 * kRowsAhead < n) freshet::prefetch_line(buckets + rows[i + 2 * kRowsAhead] / kRowsPerBucket);
    if (i + kRowsAhead < n) freshet::prefetch_line(headers + rows[i + kRowsAhead]);
    const freshet::BucketLock lock(buckets[rows[i] / kRowsPerBucket]);
    freshet::update_row(config, dim, lr, gradients + i * dim, row);
    headers[rows[i]].add(1);
  };
  for_each_row(table, 2 * dim, rows, 0, n, update);
}

// A bucket's lock and a header for each row.
class KnownPlaces {
 public:
  explicit KnownPlaces(std::size_t rows)
      : buckets_(reinterpret_cast<freshet::Bucket*>(allocate_huge((rows / kRowsPerBucket + 1) * sizeof(freshet::Bucket)))),
        headers_(reinterpret_cast<freshet::RowMeta*>(allocate_huge(rows * sizeof(freshet::RowMeta)))) {
    for (std::size_t i = 0; i <= rows / kRowsPerBucket; ++i) (new (buckets_ + i) freshet::Bucket)->clear();
    for (std::size_t i = 0; i < rows; ++i) new (headers_ + i) freshet::RowMeta{};
  }
  ~KnownPlaces() {
    std::free(buckets_);
    std::free(headers_);
  }
  KnownPlaces(const KnownPlaces&) = delete;
  KnownPlaces& operator=(const KnownPlaces&) = delete;

  freshet::Bucket* buckets() noexcept { return buckets_; }
  freshet::RowMeta* headers() noexcept { return headers_; }

 private:
  freshet::Bucket* const buckets_;
  freshet::RowMeta* const headers_;
};

// dim must be a multiple of 16: whole cache lines.
class KnownRows {
 public:
  static constexpr const char* kGather = "gather";
  static constexpr const char* kUpdate = "known rows";
  static constexpr const char* kUpdateInPlaces = "known places";

  KnownRows(std::size_t rows, std::size_t dim, std::size_t state_dim)
      : dim_(dim),
        table_(reinterpret_cast<float*>(allocate_huge(rows * (dim + state_dim) * sizeof(float)))) {
    for (std::size_t i = 0; i < rows * (dim + state_dim); ++i) table_[i] = static_cast<float>(i % 1024);
  }
  ~KnownRows() { std::free(table_); }
  KnownRows(const KnownRows&) = delete;
  KnownRows& operator=(const KnownRows&) = delete;

  // Without state.
  void gather(const std::uint32_t* rows, std::size_t n, float* out, std::size_t threads) const {
    freshet::parallel_for(threads, threads, [&](std::size_t part) {
      gather_part(table_, dim_, rows, n * part / threads, n * (part + 1) / threads, out);
    });
  }
  // With as much state as weights. One thread: equal rows follow each other.
  void adagrad(const std::uint32_t* rows, std::size_t n, const float* gradients, float lr) {
    adagrad_part(table_, dim_, rows, n, gradients, lr);
  }
  // The same, and each row's bucket and header.
  void adagrad_in(KnownPlaces& places, const std::uint32_t* rows, std::size_t n, const float* gradients, float lr) {
    adagrad_in_places(table_, dim_, places.buckets(), places.headers(), rows, n, gradients, lr);
  }

 private:
  const std::size_t dim_;
  float* const table_;
};

}  // namespace bench
