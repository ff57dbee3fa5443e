// The collisionless embedding table of one slot: full 64-bit ids -> rows of float weights + optimiser state.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <shared_mutex>
#include <vector>

#include "id_map.h"
#include "optimizer.h"
#include "row_store.h"

namespace freshet {

struct TableConfig {
  std::size_t dim = 0;
  OptimizerConfig optimizer;
  float init_scale = 0.05F;    // new weights are uniform in (-init_scale, init_scale)
  std::uint64_t seed = 0;
  std::uint64_t slot_hash = 0;  // a stable 64-bit hash of the slot's name
};

// What `lookup` writes for an id that has no row.
enum class Missing { kZeros, kInitial };

// Rows in ascending order of key, and erased keys in ascending order. keys and tombstones are disjoint.
struct Delta {
  std::vector<std::int64_t> keys;            // [n]
  std::vector<float> weights;                // [n, dim]
  std::vector<float> state;                  // [n, state_dim]
  std::vector<std::int64_t> last_update_us;  // [n]
  std::vector<std::int64_t> tombstones;      // [m]
};

struct TableStats {
  std::uint64_t rows = 0;
  std::uint64_t tombstones = 0;
  std::uint64_t epoch = 0;
  std::uint64_t memory_bytes = 0;
  std::uint64_t looked_up = 0;  // ids asked for by lookup; this and the rest count since the table was made
  std::uint64_t missed = 0;     // of these, ids that had no row
  std::uint64_t inserted = 0;
  std::uint64_t updated = 0;    // rows changed by gradients
  std::uint64_t upserted = 0;
  std::uint64_t erased = 0;     // by erase
  std::uint64_t expired = 0;    // by expire
};

// Invariants:
//  * index_ maps exactly the keys of the taken rows, each to its own row: no two ids share a row, for any ids;
//  * a key is in index_ or in tombstones_ or in neither, never in both;
//  * every change of a row stores the open epoch in its meta, and every erasure stores it in tombstones_. Therefore
//    {rows with dirty_epoch > e} + {tombstones with epoch > e} is all that changed after epoch e closed;
//  * a fresh row is a pure function of (seed, slot_hash, id, config): see initializer.h;
//  * weights and state are finite: gradients, weights and state that are not are refused;
//  * a call that throws has changed nothing that any other call can see (inputs are checked and memory is reserved
//    before the first write).
//
// Thread-safety: any number of readers (lookup, export, stats), or one writer; a batch is atomic to readers.
class EmbeddingTable {
 public:
  // Larger gradients are refused like non-finite ones: their squares would overflow the optimiser state.
  static constexpr float kMaxGradient = 1e15F;
  static constexpr float kMaxLearningRate = 1e6F;

  explicit EmbeddingTable(const TableConfig& config);  // std::invalid_argument for a bad config

  std::size_t dim() const noexcept { return config_.dim; }
  std::size_t state_dim() const noexcept { return state_dim_; }
  std::size_t size() const;
  std::uint64_t epoch() const;
  TableStats stats() const;

  // Writes weights of ids[n] to out[n, dim]; inserts nothing. Returns how many ids had no row.
  std::size_t lookup(const std::int64_t* ids, std::size_t n, float* out, Missing missing) const;

  // As lookup, after giving every absent id a fresh row. Returns how many rows are new.
  std::size_t find_or_insert(const std::int64_t* ids, std::size_t n, float* out);

  // One optimiser update per distinct id (absent ids get a fresh row first), with the gradients of its occurrences in
  // grads[n, dim] summed in order. Sets last_update_us to the later of itself and now_us. Returns the distinct ids.
  // std::invalid_argument for a gradient, or a sum, that is not finite or above kMaxGradient.
  std::size_t apply_gradients(const std::int64_t* ids, std::size_t n, const float* grads, float lr,
                              std::int64_t now_us);

  // Makes the rows of ids[n] exactly weights[n, dim], state[n, state_dim] (nullptr: a fresh row's state) and
  // last_update_us[n] (nullptr: 0), whatever they were. Of a repeated id the last occurrence stays. Returns new rows.
  std::size_t upsert(const std::int64_t* ids, std::size_t n, const float* weights, const float* state,
                     const std::int64_t* last_update_us);

  // Removes the rows of ids[n], leaving tombstones; absent ids are ignored. Returns the rows removed.
  std::size_t erase(const std::int64_t* ids, std::size_t n);

  // Erases the rows last updated before before_us. Rows whose time is unknown (0) stay.
  std::size_t expire(std::int64_t before_us);

  // Closes the open epoch and opens the next. Returns the epoch just closed (the first is 1).
  std::uint64_t advance_epoch();

  // All that changed in epochs > since_epoch, the open one included. std::invalid_argument if since_epoch is not closed
  // (0 counts as closed), or if tombstones of later epochs were dropped: the answer would not be complete.
  Delta export_delta(std::uint64_t since_epoch) const;

  // All rows; no tombstones, since a snapshot is applied to an empty table.
  Delta export_all() const;

  // Forgets tombstones of epochs <= up_to_epoch (a closed epoch). Returns how many.
  std::size_t drop_tombstones(std::uint64_t up_to_epoch);

 private:
  struct Gradients;  // one summed gradient per distinct id

  void check_finite(const float* values, std::size_t n, float limit, const char* what) const;
  Gradients sum_by_id(const std::int64_t* ids, std::size_t n, const float* grads) const;
  void reserve_rows_for(const std::int64_t* ids, std::size_t n);
  std::uint64_t row_of(std::int64_t id) noexcept;
  void erase_row(std::int64_t id, std::uint64_t row) noexcept;
  void export_rows(std::uint64_t since_epoch, Delta* delta) const;

  const TableConfig config_;
  const std::size_t state_dim_;
  const std::uint64_t init_key_;  // hash(seed, slot)

  mutable std::shared_mutex mutex_;
  IdMap index_;       // id -> row
  IdMap tombstones_;  // erased id -> epoch of the erasure
  RowStore rows_;
  std::uint64_t epoch_ = 1;
  std::uint64_t dropped_to_ = 0;  // tombstones up to this epoch are gone
  TableStats counters_;
  mutable std::atomic<std::uint64_t> looked_up_{0};
  mutable std::atomic<std::uint64_t> missed_{0};
};

}  // namespace freshet
