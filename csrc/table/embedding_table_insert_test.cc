// How ids get their rows, beside readers and snapshots too; run by `make -C csrc test`, `asan` and `tsan`.
#include <atomic>
#include <random>
#include <set>
#include <thread>

#include "table_test.h"

namespace {

using namespace freshet::testing;
using freshet::Admission;
using freshet::Block;
using freshet::Bucket;
using freshet::EmbeddingTable;
using freshet::Index;
using freshet::Missing;
using freshet::OptimizerKind;
using freshet::Reclaimer;
using freshet::Shard;
using freshet::SnapshotScan;
using freshet::TableConfig;

// In each round the writer makes the first half of that round's ids candidates, gives all of them rows in a batch in
// which ids come twice, and erases the ids of four rounds before. Every row is a fresh one, so its floats are known.
class Insertions {
 public:
  void write() {
    for (int round = 0; round < kRounds; ++round) {
      begun_ = round;
      const Ids half = ids_from(round * kIds, kIds / 2);
      train(table_, half, Floats(half.size() * kDim, 0.0F), kHour, 0.1F, 2);
      Ids batch = ids_from(round * kIds, kIds);
      batch.insert(batch.end(), half.begin(), half.end());
      std::shuffle(batch.begin(), batch.end(), std::mt19937_64(static_cast<std::uint64_t>(round)));
      const Floats rows = find_or_insert(table_, batch, 1 + static_cast<std::size_t>(round) % 3);
      CHECK(same_bits(rows, lookup(empty_, batch, Missing::kInitial)));
      finished_ = round;
      if (round >= kStay) erase(table_, ids_from((round - kStay) * kIds, kIds));
    }
    done_ = true;
  }

  void read() const {
    std::mt19937_64 random(1);
    Ids ids(300);
    while (!done_) {
      const int after = finished_;
      for (std::int64_t& id : ids) id = (after + 2) * kIds - 1 - static_cast<std::int64_t>(random() % (6 * kIds));
      const Floats rows = lookup(table_, ids), fresh = lookup(empty_, ids, Missing::kInitial);
      const int before = begun_;
      for (std::size_t i = 0; i < ids.size(); ++i) {
        const float* const row = rows.data() + i * kDim;
        const bool is_absent = std::count(row, row + kDim, 0.0F) == kDim;
        const std::int64_t round = ids[i] < 0 ? before + 1 : ids[i] / kIds;
        CHECK(is_absent ? round > after || round <= before - kStay : std::equal(row, row + kDim, fresh.data() + i * kDim));
      }
    }
  }

  void take_snapshots() {
    while (!done_) {
      SnapshotScan scan(table_);
      std::set<std::int64_t> keys, candidates, rounds, candidates_of;
      for (Block block; scan.next(&block);) {
        CHECK(same_bits(block.weights, lookup(empty_, block.keys, Missing::kInitial)));
        for (const std::int64_t key : block.keys) {
          CHECK(keys.insert(key).second);
          rounds.insert(key / kIds);
        }
        for (const std::int64_t key : block.candidate_keys) {
          candidates.insert(key);
          candidates_of.insert(key / kIds);
        }
      }
      CHECK(keys.size() == scan.rows() && keys.size() == rounds.size() * kIds);
      CHECK(candidates_of.size() <= 1 && candidates.size() == candidates_of.size() * (kIds / 2));
      for (const std::int64_t key : candidates) CHECK(keys.count(key) == 0);
    }
  }

 private:
  static constexpr std::size_t kDim = 19;
  static constexpr std::int64_t kIds = 2100, kStay = 4;
  static constexpr int kRounds = FRESHET_TSAN ? 20 : kSanitized ? 60 : 300;

  static TableConfig config() {
    TableConfig config = table_config(OptimizerKind::kSgd, kDim, 2);
    config.admission = Admission::kThreshold;
    config.threshold = 1000;
    return config;
  }

  EmbeddingTable table_{config()};
  const EmbeddingTable empty_{config()};
  std::atomic<int> begun_{-1}, finished_{-1};
  std::atomic<bool> done_{false};
};

// Lengths about which rows are copied in vectors, and batches about which they are split among threads.
void test_rows_of_any_length_and_batches_of_any_size_come_whole() {
  for (const std::size_t dim : {1U, 15U, 16U, 17U, 31U, 33U}) {
    for (const std::size_t n : {0U, 1U, 2U, 36U, 37U, 64U, 65U, 2047U, 2048U, 8192U}) {
      for (const std::size_t threads : {0U, 1U, 2U, 3U}) {
        EmbeddingTable table(table_config(OptimizerKind::kSgd, dim, 8));
        Ids ids = ids_from(-static_cast<std::int64_t>(n / 3), n / 2);
        ids.resize(n, kMin);  // half of them one and the same
        const Floats fresh = lookup(table, ids, Missing::kInitial);
        CHECK(same_bits(find_or_insert(table, ids, threads), fresh));
        CHECK(same_bits(find_or_insert(table, ids, threads), fresh));
        CHECK(table.size() == n / 2 + (n != 0 ? 1 : 0) && same_bits(lookup(table, ids), fresh));
      }
    }
  }
}

void test_asking_again_takes_no_memory() {
  EmbeddingTable table(table_config());
  const Ids ids = ids_from(0, 1000);
  for (int i = 0; i < 2; ++i) find_or_insert(table, ids);
  const std::uint64_t bytes = table.stats().overhead_bytes;
  for (int i = 0; i < 100; ++i) find_or_insert(table, ids);
  CHECK(table.stats().overhead_bytes == bytes);
}

// A candidate, counted, made a row, taken back, and removed: each under the version of its bucket, on which readers rely,
// and however often, in the same memory.
void test_a_key_changes_what_it_stands_for_under_its_version_and_leaves_nothing_behind() {
  Reclaimer memory;
  Shard shard(&memory, 0, 3);
  const std::int64_t key = 5;
  const std::uint64_t hash = freshet::hash_id(key);
  const Index::Span at = shard.index().span(hash);
  std::uint32_t version = 0;
  const auto place = [&] { return shard.index().locate_from(at, key); };
  const auto check_changed = [&] {
    const std::uint32_t control = at.bucket().control.load();
    CHECK(!Bucket::changing(control) && control / Bucket::kVersion != version);
    version = control / Bucket::kVersion;
  };
  for (int i = 0; i < 200; ++i) {
    shard.reserve_changes(1, 2);
    shard.put_candidate({nullptr, 0}, key, hash, 1);
    check_changed();
    shard.put_candidate(place(), key, hash, 2);
    check_changed();
    shard.publish_row(place(), at, key, hash, shard.take_row().handle);
    check_changed();
    CHECK(shard.size() == 1 && shard.candidates() == 0);
    shard.demote(place(), key, 1);
    check_changed();
    CHECK(shard.size() == 0 && shard.candidates() == 1);
    shard.publish_row(place(), at, key, hash, shard.take_row().handle);
    check_changed();
    shard.remove(place(), hash);
    check_changed();
    shard.put_candidate({nullptr, 0}, key, hash, 1);
    check_changed();
    shard.remove(place(), hash);
    check_changed();
  }
  CHECK(shard.row_capacity() == 64 && shard.candidate_memory_bytes() == 64 * sizeof(freshet::CandidateRecord));
}

// From the first row of an empty table on.
void test_ids_get_their_rows_beside_readers_and_snapshots() {
  Insertions insertions;
  std::thread reader([&] { insertions.read(); });
  std::thread snapshots([&] { insertions.take_snapshots(); });
  insertions.write();
  reader.join();
  snapshots.join();
}

}  // namespace

int main() {
  test_a_key_changes_what_it_stands_for_under_its_version_and_leaves_nothing_behind();
  test_rows_of_any_length_and_batches_of_any_size_come_whole();
  test_asking_again_takes_no_memory();
  test_ids_get_their_rows_beside_readers_and_snapshots();
  std::puts("embedding_table_insert_test: all passed");
  return 0;
}
