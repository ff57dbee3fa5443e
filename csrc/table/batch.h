// The scratch of one batch that is being written: its distinct ids, split among threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "bucket.h"
#include "embedding_table.h"
#include "snapshot_scan.h"

namespace freshet {

inline constexpr std::uint32_t kNoSum = 0xffffffffU;
inline constexpr std::uint32_t kNowhere = 0xffffffffU;

// Made in place: a temporary that is copied as a whole right after its parts were stored waits for each of these stores.
struct EmbeddingTable::Item {
  explicit Item(std::int64_t of) noexcept : id(of) {}
  std::int64_t id;
  std::uint32_t position = kNowhere;  // in the batch: first occurrence (of upsert: the last)
  std::uint32_t events = 0;           // that its occurrences stand for
  std::uint32_t sum = kNoSum;         // row of Group::sums, or kNoSum: the gradient at `position` is the whole sum
  Seconds seen = 0;                   // the newest of its events
};

// An item without a row.
struct EmbeddingTable::Newcomer {
  explicit Newcomer(std::size_t of) noexcept : item(static_cast<std::uint32_t>(of)) {}
  Newcomer(std::size_t of, std::uint32_t candidate) noexcept : Newcomer(of) { was_candidate = true, word = candidate; }
  std::uint32_t item;
  Verdict verdict = Verdict::kInsert;
  bool done = false;              // carried out: what a rollback has to undo
  bool was_candidate = false;
  std::uint32_t word = 0;         // of the candidate that it was
};

// The ids of shards s with s % groups == this group's number. Groups are independent of each other.
struct EmbeddingTable::Group {
  std::vector<Item> items;            // in order of first occurrence
  std::vector<float> sums;            // [*, dim]
  std::vector<std::uint32_t> places;  // open addressing: 1 + index of an item, 0 = empty
  std::vector<std::uint32_t> items_of_shard;
  std::vector<Newcomer> newcomers;    // found while the rows of the others were written

  // find_or_insert takes ids as they come, some of them twice; then items are those that get a row.
  std::vector<std::uint32_t> positions;  // of the ids, in the batch

  void clear_positions(std::size_t ids, std::size_t shards);
  void clear(std::size_t ids, std::size_t shards);
  Item& item_of(std::int64_t id, std::uint64_t hash);  // added, nowhere yet, if it is new

 private:
  void grow();
};

}  // namespace freshet
