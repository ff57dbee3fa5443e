// The collisionless embedding table of one slot: full 64-bit ids -> rows of float weights + optimiser state.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "flight.h"
#include "reclaimer.h"
#include "shard.h"
#include "table_config.h"

namespace freshet {

// What a read gives for an id that has no row.
enum class Missing { kZeros, kInitial };
enum class Pooling { kSum, kMean };

// What becomes of an id without a row in a writing batch.
enum class Verdict : std::uint8_t {
  kInsert,     // it gets a fresh row
  kCandidate,  // it stays, or becomes, a candidate
  kRefuse,     // nothing
};

// Erased keys, rows and candidates, to be applied in this order; each in ascending order of key. keys and tombstones are
// disjoint; a candidate may have been a row before, and then has a tombstone too.
struct Delta {
  std::vector<std::int64_t> keys;            // [n]
  std::vector<float> weights;                // [n, dim]
  std::vector<float> state;                  // [n, state_dim]
  std::vector<std::int64_t> last_update_us;  // [n], whole seconds
  std::vector<std::uint16_t> counts;         // [n]
  std::vector<std::int64_t> candidate_keys;  // [c]
  std::vector<std::uint32_t> candidates;     // [c], see Candidate
  std::vector<std::int64_t> tombstones;      // [m]
};

struct TableStats {
  std::uint64_t rows = 0;
  std::uint64_t candidates = 0;
  std::uint64_t tombstones = 0;
  std::uint64_t epoch = 0;
  std::uint64_t row_bytes = 0;       // weights, state and their slack in slabs
  std::uint64_t overhead_bytes = 0;  // index, bookkeeping of rows, logs
  // Since the table was made:
  std::uint64_t looked_up = 0;             // ids asked for
  std::uint64_t missed = 0;                // of these, ids without a row
  std::uint64_t inserted = 0;              // new rows
  std::uint64_t updated = 0;               // rows changed by gradients
  std::uint64_t upserted = 0;
  std::uint64_t erased = 0;                // by erase
  std::uint64_t expired = 0;               // by time to live
  std::uint64_t expired_candidates = 0;
  std::uint64_t evicted = 0;               // by max_rows
  std::uint64_t refused_admission = 0;     // distinct ids of a batch whose gradient was dropped: not admitted yet
  std::uint64_t refused_full = 0;          // the same: no room
  std::uint64_t refused_batches = 0;       // batches refused for gradients that are not finite
  std::uint64_t postponed_sweeps = 0;      // expiry or eviction that found no memory to work with
};

class SnapshotScan;

// Invariants, beside those of Shard:
//  * a fresh row is a pure function of (seed, slot_hash, id, config): see initializer.h. So is every later state, of the
//    sequence of writing calls: neither the number of shards nor of threads matters;
//  * weights and state are finite: gradients, weights and state that are not are refused;
//  * a writing call that throws has changed nothing that any other call can see, unless it says otherwise;
//  * `writes_` is odd from before the first change of a row or of the index to after the last one of a call.
//
// Threads: reading calls (lookup, lookup_pooled, size) never block and may run beside anything. They see each row
// as it was at one moment, and every row whose insertion returned before they began. All other calls wait for each other;
// a batch is split among up to `threads` threads by shard. A SnapshotScan runs beside the writer.
class EmbeddingTable {
 public:
  // Larger gradients are refused like non-finite ones: their squares would overflow the optimiser state.
  static constexpr float kMaxGradient = 1e15F;
  static constexpr float kMaxLearningRate = 1e6F;

  explicit EmbeddingTable(const TableConfig& config);  // std::invalid_argument for a bad config
  ~EmbeddingTable();

  std::size_t dim() const noexcept { return config_.dim; }
  std::size_t state_dim() const noexcept { return state_dim_; }
  const TableConfig& config() const noexcept { return config_; }
  std::size_t size() const noexcept;
  Epoch epoch() const noexcept { return epoch_.load(std::memory_order_relaxed); }
  TableStats stats() const;

  // Reading

  // Writes weights of ids[n] to out[n, dim]. Returns how many ids had no row.
  std::size_t lookup(const std::int64_t* ids, std::size_t n, float* out, Missing missing, std::size_t threads) const;

  // Bag b holds ids[offsets[b]] to ids[offsets[b + 1] - 1]; writes their sum or mean to out[bags, dim] (zeros for an
  // empty bag). std::invalid_argument unless offsets rise from 0 to n. Returns how many ids had no row.
  std::size_t lookup_pooled(const std::int64_t* ids, std::size_t n, const std::int64_t* offsets, std::size_t bags,
                            Pooling pooling, float* out, Missing missing, std::size_t threads) const;

  // Writing

  // As lookup, after giving every absent id a fresh row, whatever the admission and max_rows. Returns how many are new.
  std::size_t find_or_insert(const std::int64_t* ids, std::size_t n, float* out, std::size_t threads);

  // One optimiser update per distinct id, with the gradients of its occurrences summed in order; absent ids that are
  // admitted get a fresh row first. Position i has gradient scale[i] * grads[row[i]] (row nullptr: i; scale nullptr: 1).
  // Then expiry and eviction, as far as configured. Returns the rows updated.
  // std::invalid_argument for a gradient, or a sum, that is not finite or above kMaxGradient: nothing has changed.
  // std::bad_alloc: rows that were there are updated, and no id got a new one.
  struct Gradients {
    const float* grads;                  // [grad_rows, dim]
    std::size_t grad_rows;
    const std::uint32_t* row = nullptr;  // [n]
    const float* scale = nullptr;        // [n]
    // How many events of its id position i stands for (0: none, as a sampled negative), and when the newest was. They
    // decide admission and expiry; an id without any in the batch has its row updated, and without a row gets none where
    // ids are admitted or expire. Both nullptr: one event each, at now_us. Times: check_time.
    const std::uint32_t* events = nullptr;   // [n]
    const std::int64_t* event_us = nullptr;  // [n]
    // Ids that were read besides, as for touch(): seen before anything expires.
    const std::int64_t* read_ids = nullptr;  // [reads]
    const std::int64_t* read_us = nullptr;   // [reads]
    std::size_t reads = 0;
  };
  std::size_t apply_gradients(const std::int64_t* ids, std::size_t n, const Gradients& gradients, float lr,
                              std::int64_t now_us, std::size_t threads);

  // Makes the rows of ids[n] exactly these, whatever the admission and max_rows. Of a repeated id the last occurrence
  // stays. Returns new rows. std::bad_alloc: rows that were there are written, and no id got a new one.
  struct Rows {
    const float* weights;                          // [n, dim]
    const float* state = nullptr;                  // [n, state_dim]; nullptr: a fresh row's
    const std::int64_t* last_update_us = nullptr;  // [n]; nullptr: unknown
    const std::uint16_t* counts = nullptr;         // [n]; nullptr: 0
    const std::uint32_t* dirty_epochs = nullptr;   // [n]; of a snapshot that is restored; nullptr: the open epoch
  };
  std::size_t upsert(const std::int64_t* ids, std::size_t n, const Rows& rows, std::size_t threads);
  // std::invalid_argument for what upsert or put_candidates would refuse.
  void check_rows(std::size_t n, const Rows& rows) const;
  void check_candidates(std::size_t n) const;

  // Makes ids[n] candidates with the words that an export gave (std::bad_alloc: some of them); ids with a row are
  // left alone. std::invalid_argument for a table without an admission threshold.
  void put_candidates(const std::int64_t* ids, std::size_t n, const std::uint32_t* words);

  // Marks the row of ids[i] as seen at now_us[i] (check_time), if ttl_on_access. std::bad_alloc: nothing has changed.
  void touch(const std::int64_t* ids, std::size_t n, const std::int64_t* now_us);

  // Removes rows and candidates; rows leave tombstones. Absent ids are ignored. Returns the rows removed.
  std::size_t erase(const std::int64_t* ids, std::size_t n);

  // Erases at once all rows last seen before before_us (a time unknown counts as never expiring), down to min_rows.
  std::size_t expire(std::int64_t before_us);
  // Erases at once all that the sweep would come to: for a table that is saved before its round is complete.
  std::size_t expire_stale();

  // Deltas

  Epoch advance_epoch();  // closes the open epoch and opens the next; returns the one just closed (the first is 1)

  // All that changed in epochs > since, the open one included; cost follows the number of changes. std::invalid_argument
  // if `since` is not closed (0 counts as closed), or if tombstones after it were dropped.
  Delta export_delta(Epoch since) const;
  Delta export_all() const;  // no tombstones, since it is applied to an empty table
  std::size_t drop_tombstones(Epoch up_to);

  // What, beside rows and logs, later results depend on.
  struct Progress {
    Epoch epoch = 1;
    std::uint64_t updates = 0;       // calls of apply_gradients
    std::uint64_t sweep_at = 0;      // hash at which the next sweep starts
    std::uint64_t eviction_at = 0;
    Seconds clock = 0;               // newest event time seen
  };
  Progress progress() const;

  // The beginning of a restore, before the rows: std::invalid_argument unless the table is empty.
  void begin_restore(const Progress& progress, Epoch dropped_to, const std::int64_t* tombstones,
                     const Epoch* tombstone_epochs, std::size_t n);

 private:
  friend class SnapshotScan;
  struct Item;
  struct Newcomer;
  struct Group;

  static std::size_t shard_index(std::uint64_t hash, unsigned bits) noexcept {
    return static_cast<std::size_t>(hash >> 1 >> (63 - bits));
  }
  std::size_t shard_index(std::uint64_t hash) const noexcept { return shard_index(hash, shard_bits_); }
  const RowLayout& row_layout() const noexcept { return shards_[0]->rows().layout(); }
  Shard& shard_of(std::uint64_t hash) const noexcept { return *shards_[shard_index(hash)]; }
  std::pair<std::uint64_t, std::uint64_t> range_of(std::size_t shard) const noexcept {  // first and last hash
    if (shard_bits_ == 0) return {0, ~std::uint64_t{0}};
    const std::uint64_t first = static_cast<std::uint64_t>(shard) << (64 - shard_bits_);
    return {first, first | ~std::uint64_t{0} >> shard_bits_};
  }
  std::size_t float_bytes() const noexcept { return (config_.dim + state_dim_) * sizeof(float); }
  std::size_t weight_bytes() const noexcept { return config_.dim * sizeof(float); }

  void check_finite(const float* values, std::size_t n, float limit, const char* what) const;
  std::size_t read_rows(const std::int64_t* ids, std::size_t n, float* out, Missing missing) const noexcept;
  bool read_row(std::int64_t id, std::uint64_t hash, float* out) const noexcept;

  // A writing batch: collect, write the rows that are there, judge the newcomers, carry the verdicts out.
  void collect(const std::int64_t* ids, std::size_t n, const Gradients* gradients, Seconds now, std::size_t threads);
  void collect_checked(const std::int64_t* ids, std::size_t n, const Gradients& gradients, Seconds now,
                       std::size_t threads);
  void check_sums() const;  // of the gradients of repeated ids
  static void add_events(Item& item, const Gradients& gradients, std::size_t i, Seconds now) noexcept;
  static void add_gradient(Group& group, Item& item, const Gradients& gradients, std::size_t i, std::size_t dim);
  static void add_to_sum(const Gradients& gradients, std::size_t i, std::size_t dim, float* sum) noexcept;
  template <typename Write>
  std::size_t write_rows(Group& group, const Write& write) noexcept;
  std::size_t update_rows(Group& group, const Gradients& gradients, float lr) noexcept;
  void update_fresh(const Group& group, const Item& item, const Gradients& gradients, float lr,
                    float* floats) const noexcept;
  void set_groups(std::size_t n, std::size_t threads);
  void deal(const std::int64_t* ids, std::size_t n, std::size_t threads);
  void read_or_insert(Group& group, const std::int64_t* ids, float* out);
  const char* row_of(Group& group, Shard& shard, const Index::Span& at, std::int64_t id, std::uint64_t hash);
  Verdict admit(const Item& item, const Newcomer& newcomer) const noexcept;
  std::size_t judge();
  void send_for_places(const Group& group, std::size_t i) const noexcept;
  template <typename Write>
  std::size_t carry_out(std::size_t threads, const Write& write);
  template <typename Fill>
  void insert_row(Shard& shard, const Index::Span& at, std::int64_t id, std::uint64_t hash, Newcomer& newcomer, const Fill& fill);
  void init_floats(std::int64_t id, float* floats) const noexcept;
  void put_row(const Rows& rows, std::size_t i, RowMeta& meta, float* floats) const noexcept;
  void count_candidate(const Item& item, Newcomer& newcomer);
  void keep_candidate(std::int64_t id, const Newcomer& newcomer) const noexcept;
  void roll_back() noexcept;
  void undo(std::int64_t id, const Newcomer& newcomer) noexcept;

  SnapshotScan* snapshot_scan() const noexcept { return snapshot_.load(std::memory_order_relaxed); }
  struct Erased {
    std::size_t rows = 0;
    std::size_t candidates = 0;
  };
  Erased erase_keys(const std::vector<std::int64_t>& keys);
  template <typename Visit>  // table_walk.h
  void for_each_in(std::uint64_t from, std::uint64_t to, const Visit& visit) const;
  std::size_t expire_range(std::uint64_t from, std::uint64_t to, Seconds before, Seconds now);
  void make_room();
  void reserve_reads(const std::int64_t* ids, std::size_t n, std::size_t groups);
  void see_rows(const std::int64_t* ids, std::size_t n, const std::int64_t* now_us) noexcept;
  void evict_neighbours();

  using Entry = std::pair<std::int64_t, Handle>;
  Delta export_entries(std::vector<Entry> entries, std::vector<std::int64_t> tombstones) const;

  // Scope of a call that changes rows or the index: one at a time.
  class Writing {
   public:
    explicit Writing(EmbeddingTable& table) : lock_(table.write_mutex_), writes_(table.writes_) {
      writes_.store(writes_.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
      std::atomic_thread_fence(std::memory_order_release);
    }
    ~Writing() { writes_.store(writes_.load(std::memory_order_relaxed) + 1, std::memory_order_release); }
    Writing(const Writing&) = delete;
    Writing& operator=(const Writing&) = delete;

   private:
    const std::lock_guard<std::mutex> lock_;
    std::atomic<std::uint64_t>& writes_;
  };
  // For readers: whether nothing was written since `writes_` had this value.
  bool nothing_written_since(std::uint64_t writes) const noexcept {
    std::atomic_thread_fence(std::memory_order_acquire);
    return writes % 2 == 0 && writes_.load(std::memory_order_relaxed) == writes;
  }

  const TableConfig config_;
  const std::size_t state_dim_;
  const std::uint64_t init_key_;  // hash(seed, slot)
  const unsigned shard_bits_;

  mutable std::mutex write_mutex_;
  std::atomic<std::uint64_t> writes_{0};  // begun and ended: odd while one is under way
  mutable Reclaimer reclaimer_;
  std::vector<std::unique_ptr<Shard>> shards_;
  std::vector<std::unique_ptr<Group>> groups_;  // scratch of the batch being written, kept for the next one
  std::size_t active_groups_ = 1;
  std::atomic<SnapshotScan*> snapshot_{nullptr};
  std::uint16_t snapshots_ = 0;

  std::atomic<Epoch> epoch_{1};
  Epoch dropped_to_ = 0;  // tombstones up to this epoch are gone
  std::uint64_t updates_ = 0;
  std::uint64_t sweep_at_ = 0;
  std::uint64_t eviction_at_ = 0;
  Seconds clock_ = 0;

  struct Counters {
    std::atomic<std::uint64_t> looked_up{0}, missed{0}, inserted{0}, updated{0}, upserted{0}, erased{0}, expired{0},
        expired_candidates{0}, evicted{0}, refused_admission{0}, refused_full{0}, refused_batches{0},
        postponed_sweeps{0};
  };
  mutable Counters counters_;
};

}  // namespace freshet
