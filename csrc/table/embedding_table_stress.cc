// Readers, snapshots and a consumer of deltas beside the writer of an embedding table; run by `make -C csrc test`,
// `asan` and `tsan`.
#include <atomic>
#include <map>
#include <random>
#include <set>
#include <thread>

#include "table_test.h"

namespace {

using namespace freshet::testing;
using freshet::Admission;
using freshet::Block;
using freshet::Candidate;
using freshet::Delta;
using freshet::EmbeddingTable;
using freshet::Epoch;
using freshet::Missing;
using freshet::OptimizerKind;
using freshet::Pooling;
using freshet::SnapshotScan;
using freshet::TableConfig;
using freshet::TableStats;

// Every row says of which key and version it is (see exact_row); the version is that of the round that wrote it. In a
// round: a batch of gradients takes all steady rows to the next version, and counts all waiting ids (candidates, for
// good) once more; an upsert makes grown ids (which stay), fleeting ids (which expire) and those coming ids whose
// turn it is; an erasure takes the other coming ids away.
constexpr std::int64_t kSteady = 2100, kWaiting = 2300, kComing = 2600, kGrown = 10000, kFleeting = 10000000;
constexpr int kRounds = FRESHET_TSAN ? 80 : kSanitized ? 300 : 1200, kNewKeys = kSanitized ? 150 : 60;

int version(int round) { return round % 16 + 1; }
bool is_turn(std::int64_t key, int round) { return freshet::hash_id(key + round * kGrown) % 2 == 0; }
Ids grown_in(int round) { return ids_from(kGrown + round * kNewKeys, static_cast<std::size_t>(kNewKeys)); }

TableConfig stress_config() {
  TableConfig config = table_config(OptimizerKind::kSgd, kRowDim, 4);
  config.admission = Admission::kThreshold;
  config.threshold = Candidate::kMaxCount;
  config.ttl_us = 3 * kHour;
  config.sweep_steps = 4;
  return config;
}

class Stress {
 public:
  Stress() { run_round(0); }

  void write() {
    for (int round = 1; round < kRounds; ++round) run_round(round);
    CHECK(table_.stats().expired > std::uint64_t{kRounds} / 2 * kNewKeys);
  }

  void read(std::uint64_t seed, std::size_t threads) const {
    std::mt19937_64 random(seed);
    while (finished_ < kRounds - 1) {
      const int after = finished_;
      Ids ids;
      for (int i = 0; i < 500; ++i) ids.push_back(draw(random(), after));
      const Floats rows = seed % 2 == 0 ? lookup(table_, ids, Missing::kZeros, threads) : pooled(ids);
      const int before = begun_;
      for (std::size_t i = 0; i < ids.size(); ++i) {
        check_read(ids[i], version_of(ids[i], rows.data() + i * kRowDim), after, before);
      }
      const TableStats stats = table_.stats();
      CHECK(stats.rows >= kSteady && stats.candidates < kGrown);
      std::this_thread::yield();
    }
  }

  void take_snapshots() {
    int taken = 0;
    while (finished_ < kRounds - 1) {
      SnapshotScan scan(table_);
      check_snapshot(&scan);
      ++taken;
    }
    CHECK(taken >= 3);
  }

  void follow() {
    TableConfig config = stress_config();
    config.ttl_us = 0;
    config.shards = 2;
    EmbeddingTable copy(config);
    for (Epoch since = 0;;) {
      const bool last = finished_ == kRounds - 1;
      const Epoch closed = table_.advance_epoch();
      replay(table_.export_delta(since), copy);
      table_.drop_tombstones(closed);
      since = closed;
      if (last) break;
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    CHECK(same(copy.export_all(), table_.export_all()));
  }

 private:
  void run_round(int round) {
    begun_ = round;
    train_all(round);
    Ids keys = grown_in(round), gone;
    for (std::int64_t key = kWaiting; key < kComing; ++key) (is_turn(key, round) ? keys : gone).push_back(key);
    Ids times(keys.size(), 0);  // unknown: they never expire
    for (int i = 0; i < kNewKeys; ++i) {
      keys.push_back(kFleeting + round * kNewKeys + i);
      times.push_back(hour(round));
    }
    const Floats rows = exact_rows(keys, version(round));
    table_.upsert(keys.data(), keys.size(), {rows.data(), nullptr, times.data()}, 2);
    erase(table_, gone);
    finished_ = round;
  }

  // Large enough to be split among threads. The gradient is the difference of two versions, so the result is exact.
  void train_all(int round) {
    const Ids ids = ids_from(0, kWaiting), steady = ids_from(0, kSteady);
    if (round == 0) {
      upsert(table_, steady, exact_rows(steady, version(0)), 2);
      train(table_, ids, Floats(ids.size() * kRowDim, 0.0F), hour(0), 1.0F, 2);
      return;
    }
    Floats gradients = exact_rows(steady, version(round - 1));
    const Floats to = exact_rows(steady, version(round));
    for (std::size_t i = 0; i < to.size(); ++i) gradients[i] -= to[i];
    gradients.resize(ids.size() * kRowDim, 0.0F);
    CHECK(train(table_, ids, gradients, hour(round), 1.0F, 2) == kSteady);
  }

  static std::int64_t hour(int round) { return (1000 + round) * kHour; }

  static std::int64_t draw(std::uint64_t random, int round) {
    const auto number = static_cast<std::int64_t>(random >> 8);
    const std::int64_t made = (round + 1) * std::int64_t{kNewKeys};
    switch (random % 4) {
      case 0: return kGrown + number % made;
      case 1: return kFleeting + number % made;
      case 2: return kGrown + std::max<std::int64_t>(0, made - 1 - number % 100);  // those that came last
      default: return number % kComing;
    }
  }

  Floats pooled(const Ids& ids) const {  // bags of one
    const Ids offsets = ids_from(0, ids.size() + 1);
    Floats out(ids.size() * kRowDim);
    table_.lookup_pooled(ids.data(), ids.size(), offsets.data(), ids.size(), Pooling::kSum, out.data(), Missing::kZeros,
                         2);
    return out;
  }

  // Seen while rounds `after` to `before` were the last finished and the last begun.
  static void check_read(std::int64_t id, int seen, int after, int before) {
    if (id < kSteady) {
      CHECK(seen != 0);
      CHECK(before - after >= 15 || (seen - version(after) + 16) % 16 <= before - after);
    } else if (id < kWaiting) {
      CHECK(seen == 0);
    } else if (id >= kFleeting) {
      CHECK(seen == 0 || seen == version(static_cast<int>(id - kFleeting) / kNewKeys));
    } else if (id >= kGrown) {
      CHECK(seen == version(static_cast<int>(id - kGrown) / kNewKeys));
    }
  }

  // The whole table as it was between two calls of the writer.
  static void check_snapshot(SnapshotScan* scan) {
    std::map<std::int64_t, int> rows;  // versions
    std::map<std::int64_t, std::uint32_t> counts;
    for (Block block; scan->next(&block);) {
      for (std::size_t i = 0; i < block.keys.size(); ++i) {
        const int seen = version_of(block.keys[i], block.weights.data() + i * kRowDim);
        CHECK(seen != 0 && rows.emplace(block.keys[i], seen).second);
      }
      for (std::size_t i = 0; i < block.candidates.size(); ++i) {
        const std::uint32_t count = Candidate::from(block.candidates[i]).count;
        CHECK(counts.emplace(block.candidate_keys[i], count).first->second == count);
      }
    }
    CHECK(rows.size() == scan->rows());
    const int round = static_cast<int>(scan->progress().updates) - 1;
    for (std::int64_t key = 0; key < kSteady; ++key) CHECK(rows.at(key) == version(round));
    CHECK(counts.size() == kWaiting - kSteady);
    for (const auto& [key, count] : counts) CHECK(key >= kSteady && count == static_cast<std::uint32_t>(round) + 1);
    check_new_keys(rows, round);
  }

  // The upsert of the round, and the erasure after it, are in the snapshot as a whole or not at all.
  static void check_new_keys(const std::map<std::int64_t, int>& rows, int round) {
    const bool upserted = rows.count(grown_in(round)[0]) != 0;
    const int last = upserted ? round : round - 1;
    std::int64_t grown = 0;
    std::set<std::int64_t> coming, before, both;
    for (const auto& [key, seen] : rows) {
      grown += key >= kGrown && key < kFleeting ? 1 : 0;
      if (key >= kWaiting && key < kComing) coming.insert(key);
    }
    CHECK(grown == (last + 1) * std::int64_t{kNewKeys});
    for (std::int64_t key = kWaiting; key < kComing; ++key) {
      if (last >= 0 && is_turn(key, last)) before.insert(key), both.insert(key);
      if (last >= 1 && is_turn(key, last - 1)) both.insert(key);
    }
    CHECK(coming == before || (upserted && coming == both));
    for (const std::int64_t key : grown_in(last)) CHECK(rows.at(key) == version(last));
    for (const std::int64_t key : before) CHECK(rows.at(key) == version(last));
  }

  EmbeddingTable table_{stress_config()};
  std::atomic<int> begun_{0}, finished_{0};
};

void test_readers_snapshots_and_consumers_beside_a_writer() {
  Stress stress;
  std::thread writer([&] { stress.write(); });
  std::thread snapshots([&] { stress.take_snapshots(); });
  std::thread consumer([&] { stress.follow(); });
  std::thread other([&] { stress.read(1, 1); });
  stress.read(2, 2);
  for (std::thread* thread : {&writer, &snapshots, &consumer, &other}) thread->join();
}

// Eight rows that are read while they are written all the time; four of them take each other's places. All floats of a
// row are equal, and say whose they are.
void test_rows_under_the_hottest_fire_are_whole_and_of_their_keys() {
  constexpr std::size_t kDim = 2000, kKeys = 8, kStay = 4;
  constexpr int kTimes = FRESHET_TSAN ? 500 : 15000;
  EmbeddingTable table(table_config(OptimizerKind::kSgd, kDim));
  const auto write = [&](int time, std::size_t key) {
    upsert(table, {static_cast<std::int64_t>(key)}, Floats(kDim, static_cast<float>(time * 8 + static_cast<int>(key))));
  };
  for (std::size_t key = 0; key < kKeys; ++key) write(1, key);
  std::atomic<bool> done{false};
  std::thread writer([&] {
    for (int time = 2; time < kTimes; ++time) {
      for (std::size_t key = 0; key < kStay; ++key) write(time, key);
      const auto turn = static_cast<std::size_t>(time);
      const std::size_t comes = kStay + turn % kStay, goes = kStay + (turn + 2) % kStay;
      erase(table, {static_cast<std::int64_t>(goes)});
      write(time, comes);
    }
    done = true;
  });
  const auto check_row = [](std::int64_t key, const float* row) {
    CHECK(std::count(row, row + kDim, *row) == kDim);
    CHECK(static_cast<std::int64_t>(*row) % 8 == key);
  };
  std::thread snapshots([&] {
    while (!done) {
      SnapshotScan scan(table);
      for (Block block; scan.next(&block);) {
        for (std::size_t i = 0; i < block.keys.size(); ++i) check_row(block.keys[i], block.weights.data() + i * kDim);
      }
    }
  });
  const Ids ids = ids_from(0, kKeys);
  Floats rows(kKeys * kDim), last(kKeys, 0.0F);
  while (!done) {
    table.lookup(ids.data(), kKeys, rows.data(), Missing::kZeros, 1);
    for (std::size_t key = 0; key < kKeys; ++key) {
      const float* const row = rows.data() + key * kDim;
      if (key >= kStay && std::count(row, row + kDim, 0.0F) == kDim) continue;
      check_row(ids[key], row);
      CHECK(*row >= last[key]);  // never back to an older version
      last[key] = *row;
    }
  }
  writer.join();
  snapshots.join();
}

}  // namespace

int main() {
  test_rows_under_the_hottest_fire_are_whole_and_of_their_keys();
  test_readers_snapshots_and_consumers_beside_a_writer();
  std::puts("embedding_table_stress: all passed");
  return 0;
}
