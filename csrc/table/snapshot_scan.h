// Reads a whole table as it was at one moment, while training goes on.
#pragma once

#include <cstddef>
#include <cstdint>
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

  // Fills the next block of about 4 MB; false when all has been read. std::runtime_error if training had to give up the
  // snapshot because no memory was left for old rows.
  bool next(Block* block);

  // As of the moment of the snapshot.
  const EmbeddingTable::Progress& progress() const noexcept { return progress_; }
  const std::vector<std::int64_t>& tombstone_keys() const noexcept { return tombstone_keys_; }
  const std::vector<Epoch>& tombstone_epochs() const noexcept { return tombstone_epochs_; }
  Epoch dropped_to() const noexcept { return dropped_to_; }
  std::size_t rows() const noexcept { return rows_; }

  // The writer's side

  // Before the first change of a row, under the lock of its bucket.
  void save_row(std::int64_t key, const float* floats, RowMeta& meta) noexcept;
  // Before a candidate is changed, removed or becomes a row.
  void save_candidate(std::int64_t key, std::uint32_t word) noexcept { save_word(key, word); }
  // Before an id that is none becomes a candidate or a row.
  void save_no_candidate(std::int64_t key) noexcept { save_word(key, kNone); }

 private:
  static constexpr std::uint64_t kNone = ~std::uint64_t{0};

  void save_word(std::int64_t key, std::uint64_t word) noexcept;
  void add(Block* block, std::int64_t key, const float* floats, const RowMeta& meta) const;
  void drop_last(Block* block) const;
  bool next_candidates(Block* block);
  void scan_segment(Block* block);
  void claim_row(Block* block, const Shard& shard, Handle handle) const;
  void copy_candidate(Block* block, const Shard& shard, Handle handle);

  EmbeddingTable& table_;
  std::uint16_t number_ = 0;
  std::uint64_t at_ = 0;     // hash up to which the index has been read
  bool scanned_ = false;     // all of it
  EmbeddingTable::Progress progress_;
  std::vector<std::int64_t> tombstone_keys_;
  std::vector<Epoch> tombstone_epochs_;
  Epoch dropped_to_ = 0;
  std::size_t rows_ = 0;
  std::vector<Handle> handles_;  // of the segment at work
  bool ended_ = false;

  std::mutex saved_mutex_;  // held for the copy of one row
  std::vector<Block> saved_;
  std::unordered_map<std::int64_t, std::uint64_t> saved_candidates_;  // words as of the moment; kNone: it was none
  bool gave_up_ = false;
};

}  // namespace freshet
