// Reads a whole table as it was at one moment, while training goes on.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "embedding_table.h"

namespace freshet {

// A run of rows of the snapshot. Columns; the rows are those of ids whose hashes lie in virtual buckets [first_bucket,
// last_bucket], in no further order. A bucket's ids may be spread over several blocks.
struct Block {
  std::uint32_t first_bucket = 0;
  std::uint32_t last_bucket = 0;
  std::vector<std::int64_t> keys;           // [n]
  std::vector<float> weights;               // [n, dim]
  std::vector<float> state;                 // [n, state_dim]
  std::vector<std::uint32_t> last_seen;     // [n] seconds
  std::vector<std::uint32_t> dirty_epoch;   // [n]
  std::vector<std::uint16_t> counts;        // [n]
  std::vector<std::int64_t> candidate_keys; // [c]
  std::vector<std::uint32_t> candidates;    // [c]

  void clear();
  void reserve(std::size_t rows, std::size_t dim, std::size_t state_dim);
  std::size_t bytes() const noexcept;
};

// How: the moment is when the constructor returns. From then on the scan walks the index in order of hash and copies
// each row, while the writer, before it changes or erases a row for the first time, hands over the row as it was. Whoever
// comes first claims the row (RowMeta::saved), so each row of that moment is in exactly one block. No lock is held while
// rows are copied; extra memory is at most the rows that training changed before the scan came to them.
//
// One scan at a time (std::runtime_error for a second). Not copied, not moved; its thread may be any but the writer's.
class SnapshotScan {
 public:
  explicit SnapshotScan(EmbeddingTable& table);
  ~SnapshotScan();  // ends the scan; the table goes on as before
  SnapshotScan(const SnapshotScan&) = delete;
  SnapshotScan& operator=(const SnapshotScan&) = delete;

  // After each block, for a thread that does nothing else: rests for as long as rest_after says, so that training on
  // other threads keeps the memory bus and the caches for most of the time.
  void give_way();
  // Seconds, after so many seconds of work since the last rest: none if the table was not changed meanwhile.
  static double rest_after(double worked, bool changed) noexcept;

  // Fills the next block of about 4 MB; false when all has been read. std::runtime_error if training had to give up the
  // snapshot because no memory was left for old rows.
  bool next(Block* block);

  // As of the moment of the snapshot.
  const EmbeddingTable::Progress& progress() const noexcept { return progress_; }
  const std::vector<std::int64_t>& tombstone_keys() const noexcept { return tombstone_keys_; }
  const std::vector<Epoch>& tombstone_epochs() const noexcept { return tombstone_epochs_; }
  Epoch dropped_to() const noexcept { return dropped_to_; }
  std::size_t rows() const noexcept { return rows_; }

  // The writer's side: keeps rows that it is about to change, as they are, for the scan to get. A thread's own for one
  // batch, so that a row costs no lock; blocks are filled across batches.
  class RowKeeper {
   public:
    explicit RowKeeper(SnapshotScan* scan) noexcept : scan_(scan) {}  // nullptr: no snapshot is being taken
    ~RowKeeper() {
      if (!kept_.keys.empty()) scan_->give_back(&kept_);
    }
    RowKeeper(const RowKeeper&) = delete;
    RowKeeper& operator=(const RowKeeper&) = delete;
    // Before the first change of a row, under the lock of its bucket.
    void keep(std::int64_t key, const float* floats, RowMeta& meta) noexcept {
      if (scan_ == nullptr || meta.saved.load(std::memory_order_relaxed) == scan_->number_) return;
      scan_->keep_row(key, floats, meta, &kept_);
    }

   private:
    SnapshotScan* const scan_;
    Block kept_;
  };

  // The writer, before a candidate is changed, removed or becomes a row.
  void keep_candidate(std::int64_t key, std::uint32_t word) noexcept { keep_word(key, word); }
  // Before an id that is none becomes a candidate or a row.
  void keep_no_candidate(std::int64_t key) noexcept { keep_word(key, kNone); }

 private:
  static constexpr std::uint64_t kNone = ~std::uint64_t{0};
  static constexpr std::size_t kBlockBytes = std::size_t{4} << 20;

  void keep_row(std::int64_t key, const float* floats, RowMeta& meta, Block* block) noexcept;
  void take_open(Block* block);
  void give_back(Block* block) noexcept;
  void keep_word(std::int64_t key, std::uint64_t word) noexcept;
  void add(Block* block, std::int64_t key, const float* floats, const RowMeta& meta) const;
  void drop_last(Block* block) const;
  std::size_t rows_per_block() const noexcept {
    return kBlockBytes / (sizeof(RowMeta) + (table_.config_.dim + table_.state_dim_) * sizeof(float)) + 1;
  }
  bool next_candidates(Block* block);
  void scan_segment(Block* block);
  void claim_row(Block* block, const Shard& shard, KeyHandle entry) const;
  void copy_candidate(Block* block, const Shard& shard, KeyHandle entry);

  EmbeddingTable& table_;
  std::uint16_t number_ = 0;
  std::atomic<std::uint64_t> at_{0};  // hash up to which the index has been read
  std::atomic<bool> scanned_{false};  // all of it
  bool settled_ = false;     // and no batch that began before is still under way
  EmbeddingTable::Progress progress_;
  std::vector<std::int64_t> tombstone_keys_;
  std::vector<Epoch> tombstone_epochs_;
  Epoch dropped_to_ = 0;
  std::size_t rows_ = 0;
  std::vector<KeyHandle> entries_;  // of the segment at work
  bool ended_ = false;
  std::uint64_t writes_ = 0;                         // of the table, until the end of the last rest
  std::chrono::steady_clock::time_point rested_at_;  // that end

  std::mutex saved_mutex_;
  std::deque<Block> saved_;   // full
  std::vector<Block> open_;   // not full, and in no writer's hands
  std::vector<Block> spare_;  // emptied by the scan, for the next rows to keep: fresh memory would cost page faults
  std::unordered_map<std::int64_t, std::uint64_t> saved_candidates_;  // words as of the moment; kNone: it was none
  std::atomic<bool> gave_up_{false};
};

}  // namespace freshet
