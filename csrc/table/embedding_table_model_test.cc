// Random programs of all operations: the table against its model, for several numbers of shards and threads, with
// snapshots and restores in between; run by `make -C csrc test`, `asan` and `tsan`.
#include <map>

#include "table_model.h"
#include "table_program.h"

namespace {

using namespace freshet::testing;
using freshet::Admission;
using freshet::Block;
using freshet::Delta;
using freshet::EmbeddingTable;
using freshet::SnapshotScan;
using freshet::TableConfig;
using freshet::TableStats;
using freshet::WhenFull;

constexpr int kOperations = kSanitized ? 100 : 160;
constexpr std::uint64_t kPrograms = kSanitized ? 10 : 30;

// All combinations that matter meet within a few seeds.
TableConfig config_of_program(std::uint64_t seed) {
  TableConfig config = table_config(kOptimizers[seed % 5], 1 + seed % 9);
  config.admission = static_cast<Admission>(seed % 3);
  config.threshold = 3;
  config.probability = 0.3;
  config.max_rows = seed % 4 == 0 ? 0 : 400 + seed % 7 * 400;
  config.when_full = static_cast<WhenFull>(seed / 4 % 3);
  config.ttl_us = seed % 2 == 0 ? 6 * kHour : 0;
  config.ttl_on_access = seed % 4 == 2;
  config.sweep_steps = seed % 8 < 4 ? 16 : 3;
  config.min_rows = seed % 3 == 0 ? 1200 : 0;
  config.optimizer.initial_accumulator = seed % 3 == 1 ? 0.1F : 0.0F;
  config.optimizer.l1 = 0.01F;
  config.optimizer.l2 = 0.001F;
  return config;
}

// Candidates may be named that did not change, as long as they are what they are said to be.
bool has_changed_candidates(const Delta& got, const Delta& changed, const Delta& all) {
  std::map<std::int64_t, std::uint32_t> words, named;
  for (std::size_t i = 0; i < all.candidates.size(); ++i) words[all.candidate_keys[i]] = all.candidates[i];
  for (std::size_t i = 0; i < got.candidates.size(); ++i) {
    named[got.candidate_keys[i]] = got.candidates[i];
    if (words.count(got.candidate_keys[i]) == 0 || words[got.candidate_keys[i]] != got.candidates[i]) return false;
  }
  for (std::size_t i = 0; i < changed.candidates.size(); ++i) {
    if (named.count(changed.candidate_keys[i]) == 0) return false;
  }
  return std::is_sorted(got.candidate_keys.begin(), got.candidate_keys.end());
}

void check_answer(const Answer& got, const Answer& expected, const Delta& all) {
  CHECK(got.refused == expected.refused);
  CHECK(got.number == expected.number);
  CHECK(same_bits(got.floats, expected.floats));
  CHECK(same_rows(got.delta, expected.delta));
  CHECK(got.delta.last_update_us == expected.delta.last_update_us);
  CHECK(got.delta.tombstones == expected.delta.tombstones);
  CHECK(has_changed_candidates(got.delta, expected.delta, all));
}

void check_content(const TableStats& a, const TableStats& b) {
  CHECK(a.rows == b.rows && a.candidates == b.candidates && a.tombstones == b.tombstones && a.epoch == b.epoch);
}

void check_counters(const TableStats& a, const TableStats& b) {
  CHECK(a.looked_up == b.looked_up && a.missed == b.missed);
  CHECK(a.inserted == b.inserted && a.updated == b.updated && a.upserted == b.upserted);
  CHECK(a.erased == b.erased && a.expired == b.expired && a.expired_candidates == b.expired_candidates);
  CHECK(a.evicted == b.evicted && a.refused_admission == b.refused_admission && a.refused_full == b.refused_full);
  CHECK(a.refused_batches == b.refused_batches && a.postponed_sweeps == 0);
}

// One table under test. It may be replaced by one that is restored from its snapshot, with another number of shards;
// that one is then told what happened since the moment of the snapshot, and has to be equal from there on.
class Subject {
 public:
  Subject(const TableConfig& config, unsigned shards, std::size_t threads) : config_(config) {
    config_.shards = shards;
    execution_.table = (table_ = std::make_unique<EmbeddingTable>(config_)).get();
    execution_.threads = threads;
  }

  Answer run(const Operation& op) {
    if (scan_ != nullptr) since_snapshot_.push_back(op);
    Answer answer = execution_.run(op);
    if (scan_ != nullptr && blocks_.size() < 3) read_block();
    return answer;
  }

  void begin_snapshot() {
    at_snapshot_ = execution_.since;
    scan_ = std::make_unique<SnapshotScan>(*table_);
    CHECK(refused<std::runtime_error>([&] { SnapshotScan second(*table_); }));
  }

  void restore_snapshot() {
    config_.shards = config_.shards >= 64 ? 1 : config_.shards * 4;
    auto restored = std::make_unique<EmbeddingTable>(config_);
    restore(*scan_, std::move(blocks_), *restored);
    scan_.reset();
    blocks_.clear();
    execution_.table = restored.get();
    execution_.since = at_snapshot_;
    for (const Operation& op : std::exchange(since_snapshot_, {})) execution_.run(op);
    CHECK(same(restored->export_all(), table_->export_all()));
    table_ = std::move(restored);
    restored_ = true;
  }

  void check(const TableModel& model) const {
    CHECK(same(table_->export_all(), model.export_all()));
    check_content(table_->stats(), model.stats());
    if (!restored_) check_counters(table_->stats(), model.stats());
  }

 private:
  void read_block() {
    Block block;
    if (scan_->next(&block)) blocks_.push_back(std::move(block));
  }

  TableConfig config_;
  std::unique_ptr<EmbeddingTable> table_;
  Execution<EmbeddingTable> execution_{nullptr};
  std::array<freshet::Epoch, Execution<EmbeddingTable>::kConsumers> at_snapshot_{};
  std::unique_ptr<SnapshotScan> scan_;
  std::vector<Block> blocks_;
  std::vector<Operation> since_snapshot_;
  bool restored_ = false;
};

void run_program(std::uint64_t seed) {
  const TableConfig config = config_of_program(seed);
  ProgramGenerator generator(seed, config.dim);
  TableModel model(config);
  Execution<TableModel> expected{&model};
  std::vector<std::unique_ptr<Subject>> subjects;
  for (const auto& [shards, threads] : {std::pair{1U, 1U}, std::pair{2U, 3U}, std::pair{16U, 4U}, std::pair{64U, 2U}}) {
    subjects.push_back(std::make_unique<Subject>(config, shards, threads));
  }
  for (int i = 0; i < kOperations; ++i) {
    const int phase = i % 50;
    const Operation op = generator.next();
    const Answer answer = expected.run(op);
    const Delta all = op.kind == Operation::Kind::kExport ? model.export_all() : Delta{};
    for (const auto& subject : subjects) {
      check_answer(subject->run(op), answer, all);
      if (phase == 20) subject->begin_snapshot();
      if (phase == 20 + static_cast<int>(seed % 25)) subject->restore_snapshot();
      if (i % 10 == 0) subject->check(model);
    }
  }
  for (const auto& subject : subjects) subject->check(model);
}

void test_the_table_agrees_with_its_model_whatever_its_shards_and_threads() {
  for (std::uint64_t seed = 0; seed < kPrograms; ++seed) run_program(seed);
}

// Each consumer is brought up to date by deltas alone, at its own pace, and fails at times.
void test_consumers_of_deltas_end_with_the_same_table() {
  for (std::uint64_t seed = 0; seed < kPrograms / 2; ++seed) {
    TableConfig config = config_of_program(seed);
    EmbeddingTable table(config);
    Execution<EmbeddingTable> execution{&table};
    config.shards = 2;
    config.ttl_us = 0;  // the trainer alone decides what goes
    config.max_rows = 0;
    std::vector<std::unique_ptr<EmbeddingTable>> copies;
    for (std::size_t c = 0; c < execution.since.size(); ++c) copies.push_back(std::make_unique<EmbeddingTable>(config));
    ProgramGenerator generator(seed, config.dim);
    for (int i = 0; i < kOperations; ++i) {
      const Operation op = generator.next();
      const Answer answer = execution.run(op);
      if (op.kind != Operation::Kind::kExport || !op.choice) continue;
      EmbeddingTable& copy = *copies[op.consumer];
      replay(answer.delta, copy);
      CHECK(same(copy.export_all(), table.export_all()));
    }
  }
}

}  // namespace

int main() {
  test_the_table_agrees_with_its_model_whatever_its_shards_and_threads();
  test_consumers_of_deltas_end_with_the_same_table();
  std::puts("embedding_table_model_test: all passed");
  return 0;
}
