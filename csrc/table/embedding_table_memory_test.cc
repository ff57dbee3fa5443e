// A table that runs out of memory, at every allocation in turn; run by `make -C csrc test`, `asan` and `tsan`.
#include <functional>

#include "failing_memory.h"
#include "table_test.h"

namespace {

using namespace freshet::testing;
using freshet::Admission;
using freshet::Block;
using freshet::Delta;
using freshet::EmbeddingTable;
using freshet::Missing;
using freshet::OptimizerKind;
using freshet::SnapshotScan;
using freshet::TableConfig;
using freshet::WhenFull;

constexpr long kStep = kSanitized ? 7 : 1;  // every allocation, or a part of them

// What a call may leave behind when it throws.
enum class Promise {
  kNothing,   // the table is as it was
  kRowsThere, // rows that were there may have changed, and none came or went
  kSome,      // it was carried out for some of the ids
};

struct Call {
  const char* name;
  Promise promise;
  std::function<void(EmbeddingTable&)> run;
};

// Ids -7 to 2493 in a batch of 3,000 (so that it is split among threads), of which 20 have rows and 10 are candidates.
const Ids kBatch = [] {
  Ids ids(3000);
  for (std::size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<std::int64_t>(i * 7 % 2500) - 7;
  return ids;
}();
const Ids kRead = ids_from(5000, 20);
const Floats kValues(9000, 0.25F);
const std::vector<std::uint32_t> kWords(3000, 1);

TableConfig config_of(unsigned shards, Admission admission) {
  TableConfig config = table_config(OptimizerKind::kAdagrad, 3, shards);
  config.admission = admission;
  config.threshold = 2;
  return config;
}

void fill(EmbeddingTable& table) {
  for (int i = 0; i < 2; ++i) {
    train(table, ids_from(-7, 20), kHour);
    train(table, kRead, kHour);
  }
  train(table, ids_from(40, 10), kHour);
  table.advance_epoch();
}

// Rows of ids that are not in the batch are read an hour after it.
void train_and_read(EmbeddingTable& table, std::size_t threads) {
  const Ids times(kRead.size(), 3 * kHour);
  EmbeddingTable::Gradients gradients{kValues.data(), kBatch.size()};
  gradients.read_ids = kRead.data();
  gradients.read_us = times.data();
  gradients.reads = kRead.size();
  table.apply_gradients(kBatch.data(), kBatch.size(), gradients, 0.1F, 2 * kHour, threads);
}

std::vector<Call> calls(std::size_t threads) {
  static Floats out(9000);
  return {
      {"find_or_insert", Promise::kNothing,
       [=](EmbeddingTable& t) { t.find_or_insert(kBatch.data(), kBatch.size(), out.data(), threads); }},
      {"apply_gradients", Promise::kRowsThere,
       [=](EmbeddingTable& t) { train(t, kBatch, kValues, 2 * kHour, 0.1F, threads); }},
      {"apply_gradients that reads besides", Promise::kRowsThere, [=](EmbeddingTable& t) { train_and_read(t, threads); }},
      {"upsert", Promise::kRowsThere, [=](EmbeddingTable& t) { upsert(t, kBatch, kValues, threads); }},
      {"put_candidates", Promise::kSome,
       [=](EmbeddingTable& t) { t.put_candidates(kBatch.data(), kBatch.size(), kWords.data()); }},
      {"erase", Promise::kNothing, [](EmbeddingTable& t) { erase(t, kBatch); }},
      {"expire", Promise::kNothing, [](EmbeddingTable& t) { t.expire(9 * kHour); }},
      {"touch", Promise::kNothing,
       [](EmbeddingTable& t) { t.touch(kBatch.data(), kBatch.size(), Ids(kBatch.size(), 2 * kHour).data()); }},
  };
}

// Every key once and whole: each is found, and the counts agree with the export.
void check_sound(const EmbeddingTable& table) {
  const Delta all = table.export_all();
  CHECK(std::is_sorted(all.keys.begin(), all.keys.end()));
  CHECK(std::adjacent_find(all.keys.begin(), all.keys.end()) == all.keys.end());
  CHECK(table.size() == all.keys.size());
  CHECK(table.stats().candidates == all.candidate_keys.size());
  CHECK(same_bits(lookup(table, all.keys), all.weights));
  for (const std::int64_t key : all.candidate_keys) CHECK(lookup(table, {key}) == Floats(3, 0.0F));
}

void check_promise(Promise promise, const Delta& now, const Delta& before) {
  if (promise == Promise::kNothing) CHECK(same(now, before));
  if (promise == Promise::kRowsThere) {
    CHECK(now.keys == before.keys);
    CHECK(now.candidate_keys == before.candidate_keys && now.candidates == before.candidates);
  }
}

// Whether the call failed at that allocation.
bool fail_at(long allocation, Outage outage, const TableConfig& config, const Call& call) {
  EmbeddingTable table(config), untouched(config);
  fill(table);
  fill(untouched);
  const Delta before = table.export_all();
  bool failed = false;
  {
    const FailingMemory memory(allocation, outage);
    failed = refused<std::bad_alloc>([&] { call.run(table); });
    CHECK(failed || !FailingMemory::has_failed() || table.stats().postponed_sweeps != 0);
  }
  if (!failed) return false;
  check_sound(table);
  check_promise(call.promise, table.export_all(), before);
  CHECK(table.stats().tombstones == 0);
  call.run(table);  // and the same succeeds when there is memory
  check_sound(table);
  call.run(untouched);
  CHECK(table.export_all().keys == untouched.export_all().keys);
  CHECK(table.export_all().candidate_keys == untouched.export_all().candidate_keys);
  return true;
}

void test_a_failed_allocation_leaves_the_table_sound() {
  for (const auto& [threads, admission, outage] :
       {std::tuple{1UL, Admission::kAll, Outage::kForGood}, std::tuple{1UL, Admission::kThreshold, Outage::kOnce},
        std::tuple{2UL, Admission::kThreshold, Outage::kForGood}}) {
    TableConfig config = config_of(4, admission);
    config.ttl_on_access = true;
    for (const Call& call : calls(threads)) {
      if (admission == Admission::kAll && call.promise == Promise::kSome) continue;
      long allocation = 0;
      while (fail_at(allocation, outage, config, call)) allocation += kStep;
      CHECK(allocation >= 1);
    }
  }
}

// Sweeping and eviction wait for better times; what they would have done is done then.
void test_a_sweep_without_memory_is_postponed() {
  TableConfig config = table_config();
  config.ttl_us = kHour;
  config.sweep_steps = 1;
  config.max_rows = 300;
  config.when_full = WhenFull::kEvictStalest;
  std::uint64_t postponed = 0;
  for (long allocation = 0; allocation < 60; ++allocation) {
    EmbeddingTable table(config);
    find_or_insert(table, ids_from(0, 400));
    train(table, ids_from(0, 250), 1000 * kHour);
    {
      const FailingMemory memory(allocation, Outage::kForGood);
      refused<std::bad_alloc>([&] { train(table, ids_from(200, 50), 1003 * kHour); });
    }
    check_sound(table);
    postponed += table.stats().postponed_sweeps;
    train(table, ids_from(200, 50), 1003 * kHour);
    CHECK(table.size() <= 300 && lookup(table, {0}) == Floats(3, 0.0F));
  }
  CHECK(postponed != 0);
}

void test_a_reading_call_without_memory_leaves_the_table_alone() {
  EmbeddingTable table(config_of(4, Admission::kAll));
  train(table, ids_from(0, 2000));
  const Delta before = table.export_all();
  for (long allocation = 0;; allocation += kStep) {
    bool failed = false;
    {
      const FailingMemory memory(allocation, Outage::kForGood);
      failed = refused<std::bad_alloc>([&] {
        table.export_delta(0);
        SnapshotScan scan(table);
        for (Block block; scan.next(&block);) continue;
      });
    }
    CHECK(same(table.export_all(), before));
    if (!failed) break;
  }
}

// Training goes on, and the snapshot says that it was given up: never a snapshot with a row missing.
void test_a_snapshot_is_given_up_when_old_rows_cannot_be_kept() {
  EmbeddingTable table(table_config());
  train(table, ids_from(0, 1000));
  train(table, ids_from(0, 1000));  // from here on a batch of these allocates nothing
  std::size_t given_up = 0;
  for (long allocation = 0; allocation < 12; ++allocation) {
    SnapshotScan scan(table);
    bool trained = false;
    {
      const FailingMemory memory(allocation, Outage::kOnce);
      trained = !refused<std::bad_alloc>([&] { train(table, ids_from(0, 1000)); });
    }
    Block block;
    std::size_t rows = 0;
    const auto read = [&] {
      while (scan.next(&block)) rows += block.keys.size();
    };
    if (trained && refused<std::runtime_error>(read)) {
      ++given_up;
    } else {
      if (!trained) read();
      CHECK(rows == 1000);
    }
  }
  CHECK(given_up != 0);
}

void test_a_restore_that_cannot_begin_leaves_the_table_empty() {
  const Ids gone = ids_from(0, 40);
  std::vector<freshet::Epoch> epochs(gone.size());
  for (std::size_t i = 0; i < epochs.size(); ++i) epochs[i] = static_cast<freshet::Epoch>(1 + i % 3);
  for (long allocation = 0;; ++allocation) {
    EmbeddingTable table(table_config());
    bool failed = false;
    {
      const FailingMemory memory(allocation, Outage::kForGood);
      failed = refused<std::bad_alloc>([&] { table.begin_restore({5}, 0, gone.data(), epochs.data(), gone.size()); });
    }
    CHECK(table.stats().tombstones == (failed ? 0 : gone.size()) && table.epoch() == (failed ? 1 : 5));
    CHECK(table.export_delta(0).tombstones.size() == (failed ? 0 : gone.size()));
    if (!failed) return;
  }
}

// The number of a snapshot has 16 bits; where it begins anew, rows forget the numbers of before.
void test_a_snapshot_is_whole_after_one_that_had_no_memory_to_begin() {
  EmbeddingTable table(table_config());
  train(table, ids_from(0, 1000));
  const auto rows_of_snapshot = [&] {
    SnapshotScan scan(table);
    std::size_t rows = 0;
    for (Block block; scan.next(&block);) rows += block.keys.size();
    return rows;
  };
  const auto can_begin = [&](long allocations) {
    const FailingMemory memory(allocations, Outage::kForGood);
    return !refused<std::bad_alloc>([&] { const SnapshotScan given_up(table); });
  };
  CHECK(rows_of_snapshot() == 1000);
  long needed = 0;
  while (!can_begin(needed)) ++needed;
  std::size_t begun = 2;
  while (can_begin(needed)) CHECK(++begun < 0x10000);
  CHECK(rows_of_snapshot() == 1000);
}

void test_a_table_that_cannot_be_made_leaks_nothing() {
  const TableConfig config = config_of(16, Admission::kAll);
  for (long allocation = 0;; ++allocation) {
    const FailingMemory memory(allocation, Outage::kForGood);
    if (!refused<std::bad_alloc>([&] { EmbeddingTable table(config); })) return;
  }
}

}  // namespace

int main() {
  test_a_failed_allocation_leaves_the_table_sound();
  test_a_sweep_without_memory_is_postponed();
  test_a_reading_call_without_memory_leaves_the_table_alone();
  test_a_snapshot_is_given_up_when_old_rows_cannot_be_kept();
  test_a_restore_that_cannot_begin_leaves_the_table_empty();
  test_a_snapshot_is_whole_after_one_that_had_no_memory_to_begin();
  test_a_table_that_cannot_be_made_leaks_nothing();
  std::puts("embedding_table_memory_test: all passed");
  return 0;
}
