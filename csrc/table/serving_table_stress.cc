// Readers beside the writer of a serving table; run by `make -C csrc test`, `asan` and `tsan`.
#include <atomic>
#include <random>
#include <thread>

#include "serving_table.h"
#include "serving_test.h"

namespace {

using namespace freshet::testing;
using freshet::Missing;
using freshet::Precision;
using freshet::ServingTable;

// The writer of the stress test. Key k < kSteady always has a row, of version round % 16 + 1 or the one before; keys in
// the next range come and go; keys from kGrown on appear once, and stay.
struct Stress {
  static constexpr std::int64_t kSteady = 300, kComing = 600, kGrown = 1000;
  static constexpr int kRounds = FRESHET_TSAN ? 300 : 3000, kNewKeys = 10;
  static int version(int round) { return round % 16 + 1; }

  ServingTable table;
  std::atomic<int> begun{0}, finished{0};

  explicit Stress(Precision precision) : table(config_of(kRowDim, precision)) { run_round(0); }

  void run_round(int round) {
    begun = round;
    Ids keys, gone;
    for (std::int64_t k = 0; k < kSteady; ++k) keys.push_back(k);
    for (std::int64_t k = kSteady; k < kComing; ++k) {
      (freshet::hash_id(k + round * kComing) % 2 == 0 ? keys : gone).push_back(k);
    }
    for (int i = 0; i < kNewKeys; ++i) keys.push_back(kGrown + round * kNewKeys + i);
    apply(table, keys, exact_rows(keys, version(round)), gone);
    finished = round;
  }

  void read(int seed, std::size_t threads) const {
    std::mt19937_64 random(static_cast<std::uint64_t>(seed));
    while (finished < kRounds) {
      const int after = finished;
      Ids ids;
      for (int i = 0; i < 500; ++i) {
        const auto draw = static_cast<std::int64_t>(random() >> 1);
        ids.push_back(i % 3 == 0 ? kGrown + draw % ((after + 1) * kNewKeys) : draw % kComing);
      }
      Floats rows(ids.size() * kRowDim);
      table.lookup(ids.data(), ids.size(), rows.data(), Missing::kZeros, threads);
      const int before = begun;
      for (std::size_t i = 0; i < ids.size(); ++i) {
        check(ids[i], version_of(ids[i], rows.data() + i * kRowDim), after, before);
      }
      std::this_thread::yield();
    }
  }

  static void check(std::int64_t id, int seen, int after, int before) {
    if (id >= kGrown) {
      CHECK(seen == version(static_cast<int>(id - kGrown) / kNewKeys));
    } else if (id < kSteady) {
      CHECK(seen != 0);
      CHECK(before - after >= 15 || (seen - version(after) + 16) % 16 <= before - after);
    }
  }
};

void test_readers_miss_no_key_and_see_no_half_row_beside_a_writer() {
  for (const Precision precision : kPrecisions) {
    Stress stress(precision);
    std::thread writer([&] {
      for (int round = 1; round <= Stress::kRounds; ++round) stress.run_round(round);
    });
    std::thread other([&] { stress.read(1, 1); });
    stress.read(2, 2);
    writer.join();
    other.join();
  }
}

}  // namespace

int main() {
  test_readers_miss_no_key_and_see_no_half_row_beside_a_writer();
  std::puts("serving_table_stress: all passed");
  return 0;
}
