// The copy of one slot's table that requests read: rows in a serving precision, fed by deltas, read without locks.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

#include "embedding_table.h"
#include "index.h"
#include "reclaimer.h"
#include "row_codec.h"
#include "row_store.h"

namespace freshet {

struct ServingConfig {
  std::size_t dim = 0;
  Precision precision = Precision::kFp32;
  float init_scale = 0.05F;     // these three: as the trainer's, for what an id without a row starts from
  std::uint64_t seed = 0;
  std::uint64_t slot_hash = 0;
};

struct ServingStats {
  std::uint64_t rows = 0;
  std::uint64_t row_bytes = 0;       // encoded weights, free places in slabs included
  std::uint64_t overhead_bytes = 0;  // index
  std::uint64_t looked_up = 0;       // ids asked for since the table was made
  std::uint64_t missed = 0;          // of these, ids without a row
  std::uint64_t upserted = 0;        // rows written
  std::uint64_t erased = 0;          // rows removed
};

// Invariants:
//  * a row is its encoded weights; index_ has exactly one row for each served key;
//  * a new row is complete before it is in the index; a served row changes, and a removed one is taken anew, only after
//    its bucket's version did. So a reader that finds the version unchanged has read one whole row of its key.
//
// Threads: lookups take no lock and see each row as it was at one moment; a key that is present before a lookup begins
// and is not erased before it ends is found. A reader tries again only when the writer is copying to a row, or an entry
// of the index, of the very bucket it reads. Writers wait for each other.
class ServingTable {
 public:
  explicit ServingTable(const ServingConfig& config);  // std::invalid_argument for a bad config

  std::size_t dim() const noexcept { return config_.dim; }
  const ServingConfig& config() const noexcept { return config_; }
  std::size_t size() const noexcept { return index_.size(); }
  ServingStats stats() const noexcept;

  // Writes the served weights of ids[n] to out[n, dim]; an id without a row gets zeros, or what is served of its
  // initial weights. Returns how many had no row.
  std::size_t lookup(const std::int64_t* ids, std::size_t n, float* out, Missing missing, std::size_t threads) const;

  // Sum or mean in float of each bag's rows, in order: see pool_bags.
  std::size_t lookup_pooled(const std::int64_t* ids, std::size_t n, const std::int64_t* offsets, std::size_t bags,
                            Pooling pooling, float* out, Missing missing, std::size_t threads) const;

  struct Applied {
    std::size_t inserted;  // keys that had no row
    std::size_t erased;
  };
  // Makes the rows of keys[n] what is served of weights[n, dim], then removes the rows of tombstones[m] (absent ones
  // are ignored). Of a repeated key the last occurrence stays. Rows change one by one while others are read.
  // std::invalid_argument for weights that are not finite or do not fit the precision, std::bad_alloc or
  // std::length_error if there is no room: then the table is as it was.
  Applied apply(const std::int64_t* keys, std::size_t n, const float* weights, const std::int64_t* tombstones,
                std::size_t m);

 private:
  void check(const std::int64_t* keys, std::size_t n, const float* weights) const;
  std::vector<std::size_t> insert_absent(const std::int64_t* keys, std::size_t n, const float* weights);
  void undo_inserts(const std::int64_t* keys, std::size_t n, const std::vector<std::size_t>& present) noexcept;
  void insert_row(std::int64_t key, std::uint64_t hash, const float* weights);
  void overwrite(std::int64_t key, std::uint64_t hash, const float* weights) noexcept;
  void write_encoded(char* row) noexcept;
  bool erase_row(std::int64_t key, std::uint64_t hash) noexcept;

  template <typename KeyAt>
  void send_for(std::size_t from, std::size_t to, const KeyAt& key_at) const noexcept;

  std::size_t read_rows(const std::int64_t* ids, std::size_t n, float* out, Missing missing) const noexcept;
  bool read_row(std::int64_t id, std::uint64_t hash, float* out) const noexcept;
  void read_missing(std::int64_t id, Missing missing, float* out) const noexcept;
  void count(std::size_t ids, std::size_t absent) const noexcept;

  const ServingConfig config_;
  const RowCodec codec_;
  const std::uint64_t init_key_;

  mutable Reclaimer reclaimer_;
  RowStore store_;
  Index index_;
  std::mutex write_mutex_;
  std::vector<char> encoded_;  // scratch of the writer: the time under a bucket's lock is that of a copy

  mutable std::atomic<std::uint64_t> looked_up_{0}, missed_{0};
  std::atomic<std::uint64_t> upserted_{0}, erased_{0};
};

}  // namespace freshet
