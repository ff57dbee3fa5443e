// What an insertion that runs out of memory leaves behind: nothing; run by `make -C csrc test` and `asan`.
#include "failing_memory.h"
#include "table_test.h"

namespace {

using namespace freshet::testing;
using freshet::Admission;
using freshet::Delta;
using freshet::EmbeddingTable;
using freshet::Index;
using freshet::OptimizerKind;
using freshet::Reclaimer;
using freshet::RowStore;
using freshet::Shard;
using freshet::TableConfig;

TableConfig config() {
  TableConfig config = table_config(OptimizerKind::kAdagrad, 3, 1);
  config.admission = Admission::kThreshold;
  config.threshold = 2;
  return config;
}

// 62 rows and 9 candidates: the first slab has room for two rows more, and the index for no other id.
void test_a_batch_that_failed_keeps_no_row() {
  for (long allocation = 0;; ++allocation) {
    EmbeddingTable table(config());
    train(table, ids_from(0, 62));
    train(table, ids_from(0, 62));
    train(table, ids_from(100, 9));
    const std::uint64_t bytes = table.stats().row_bytes;
    bool failed = false;
    {
      const FailingMemory memory(allocation, Outage::kOnce);
      failed = refused<std::bad_alloc>([&] { find_or_insert(table, {100, 200}); });
    }
    find_or_insert(table, {100, 200});
    CHECK(table.size() == 64 && table.stats().row_bytes == bytes);
    if (!failed) return;
  }
}

// 64 candidates, which fill their slab, and 6 rows. Of the batch ten ids get rows, the next takes the place of one of them
// among the candidates (if it comes after them: not all are taken in order), and the last needs a larger index.
bool fails_and_gives_places_back(std::int64_t new_id, long allocation) {
  EmbeddingTable table(config());
  train(table, ids_from(0, 6));
  train(table, ids_from(0, 6));
  train(table, ids_from(100, 64));
  const Delta before = table.export_all();
  Ids batch = ids_from(100, 10);
  batch.insert(batch.end(), {new_id, new_id + 1});
  {
    const FailingMemory memory(allocation, Outage::kOnce);
    if (!refused<std::bad_alloc>([&] { train(table, batch); })) return false;
  }
  CHECK(same(table.export_all(), before) && same_bits(lookup(table, before.keys), before.weights));
  return true;
}

void test_a_batch_that_failed_gives_candidates_their_places_back() {
  for (std::int64_t new_id = 200; new_id < 220; new_id += 2) {
    for (long allocation = 0; fails_and_gives_places_back(new_id, allocation); ++allocation) continue;
  }
}

// An index of 33 keys is full.
void test_a_candidate_that_finds_no_memory_keeps_no_record() {
  Reclaimer reclaimer;
  Shard shard(&reclaimer, 0, 3);
  const auto put = [&](std::int64_t key) { shard.put_candidate({nullptr, 0}, key, freshet::hash_id(key), 1); };
  shard.reserve_changes(1, 64);
  for (std::int64_t key = 0; key < 33; ++key) put(key);
  for (int i = 0; i < 100; ++i) {
    const FailingMemory memory(0, Outage::kForGood);
    CHECK(refused<std::bad_alloc>([&] { put(33); }));
  }
  put(33);
  CHECK(shard.candidates() == 34 && shard.candidate_memory_bytes() == 64 * sizeof(freshet::CandidateRecord));
}

// The first thing that is retired, too, needs memory to be noted in.
void test_the_first_growth_of_an_index_fails_before_it_begins() {
  for (long allocation = 0;; ++allocation) {
    Reclaimer reclaimer;
    Index index(&reclaimer, 0);
    const auto insert = [&](std::int64_t key) { index.insert(key, freshet::hash_id(key), static_cast<freshet::Handle>(key)); };
    for (std::int64_t key = 0; key < 4; ++key) insert(key);
    bool failed = false;
    {
      const FailingMemory memory(allocation, Outage::kOnce);
      failed = refused<std::bad_alloc>([&] { insert(4); });
    }
    CHECK(index.size() == (failed ? 4 : 5) && index.growths() == (failed ? 0 : 1));
    if (!failed) return;
  }
}

// With the ninth slab their list grows.
void test_a_store_that_finds_no_memory_for_rows_stays_as_it_is() {
  constexpr std::size_t kRows = 8192;
  for (long allocation = 0;; ++allocation) {
    Reclaimer reclaimer;
    RowStore rows(&reclaimer, 4, 4);
    rows.reserve(kRows);
    for (std::size_t i = 0; i < kRows; ++i) rows.take();
    const char* const first = rows.row(0);
    bool failed = false;
    {
      const FailingMemory memory(allocation, Outage::kOnce);
      failed = refused<std::bad_alloc>([&] { rows.reserve(1); });
    }
    CHECK(rows.row(0) == first && rows.capacity() == (failed ? kRows : 2 * kRows));
    if (!failed) return;
  }
}

}  // namespace

int main() {
  test_a_batch_that_failed_keeps_no_row();
  test_a_batch_that_failed_gives_candidates_their_places_back();
  test_a_candidate_that_finds_no_memory_keeps_no_record();
  test_the_first_growth_of_an_index_fails_before_it_begins();
  test_a_store_that_finds_no_memory_for_rows_stays_as_it_is();
  std::puts("insertion_memory_test: all passed");
  return 0;
}
