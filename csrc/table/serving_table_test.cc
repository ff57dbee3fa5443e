// Tests of the serving table; run by `make -C csrc test` and `asan`.
#include "serving_table.h"

#include <cerrno>
#include <map>
#include <new>
#include <random>
#include <stdexcept>

#include "initializer.h"
#include "serving_test.h"

namespace {

// Allocation failure injection: when armed, the allocation after `allocations_left` more throws std::bad_alloc.
thread_local long allocations_left = -1;  // -1 = never fail

void* allocate(std::size_t bytes, std::size_t alignment) {
  if (allocations_left == 0) throw std::bad_alloc();
  if (allocations_left > 0) --allocations_left;
  void* p = alignment == 0 ? std::malloc(bytes == 0 ? 1 : bytes)
                           : std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
  if (p == nullptr) throw std::bad_alloc();
  return p;
}

}  // namespace

// Not inlined: GCC would otherwise see malloc and delete (or new and free) and warn of a mismatch.
[[gnu::noinline]] void* operator new(std::size_t n) { return allocate(n, 0); }
[[gnu::noinline]] void* operator new[](std::size_t n) { return allocate(n, 0); }
[[gnu::noinline]] void* operator new(std::size_t n, std::align_val_t a) {
  return allocate(n, static_cast<std::size_t>(a));
}
extern "C" int posix_memalign(void** memory, std::size_t alignment, std::size_t bytes) noexcept {
  try {
    *memory = allocate(bytes, alignment);
  } catch (const std::bad_alloc&) {
    return ENOMEM;
  }
  return 0;
}
[[gnu::noinline]] void operator delete(void* p) noexcept { std::free(p); }
[[gnu::noinline]] void operator delete[](void* p) noexcept { std::free(p); }
[[gnu::noinline]] void operator delete(void* p, std::size_t) noexcept { std::free(p); }
[[gnu::noinline]] void operator delete[](void* p, std::size_t) noexcept { std::free(p); }
[[gnu::noinline]] void operator delete(void* p, std::align_val_t) noexcept { std::free(p); }
[[gnu::noinline]] void operator delete(void* p, std::size_t, std::align_val_t) noexcept { std::free(p); }

namespace {

using namespace freshet::testing;
using freshet::Missing;
using freshet::Pooling;
using freshet::Precision;
using freshet::RowCodec;
using freshet::ServingConfig;
using freshet::ServingTable;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

void test_it_agrees_with_a_map_through_growth_and_churn() {
  for (const Precision precision : kPrecisions) {
    std::mt19937_64 random(3);
    ServingTable table(config_of(kRowDim, precision));
    std::map<std::int64_t, int> expected;
    const Ids extremes{0, -1, 1, kMin, kMin + 1, kMax, kMax - 1};
    for (int round = 0; round < 60; ++round) {
      Ids keys = round % 7 == 0 ? extremes : Ids{}, gone;
      const std::size_t size = random() % 700;
      for (std::size_t i = 0; i < size; ++i) keys.push_back(static_cast<std::int64_t>(random() % 20000) - 10000);
      for (std::size_t i = 0; i < size / 2; ++i) gone.push_back(static_cast<std::int64_t>(random() % 20000) - 10000);
      if (round % 11 == 0) gone.insert(gone.end(), extremes.begin(), extremes.end());
      const int version = round % 16 + 1;
      const std::size_t before = expected.size();
      for (const std::int64_t key : keys) expected[key] = version;
      const ServingTable::Applied applied = apply(table, keys, exact_rows(keys, version), gone);
      CHECK(applied.inserted == expected.size() - before);
      std::size_t erased = 0;
      for (const std::int64_t key : gone) erased += expected.erase(key);
      CHECK(applied.erased == erased);
      CHECK(table.size() == expected.size());
    }
    Ids ids = extremes;
    for (std::int64_t id = -10001; id <= 10001; ++id) ids.push_back(id);
    Floats rows(ids.size() * kRowDim);
    const std::size_t absent = table.lookup(ids.data(), ids.size(), rows.data(), Missing::kZeros, 2);
    std::size_t missing = 0;
    for (std::size_t i = 0; i < ids.size(); ++i) {
      const auto found = expected.find(ids[i]);
      missing += found == expected.end() ? 1 : 0;
      CHECK(version_of(ids[i], rows.data() + i * kRowDim) == (found == expected.end() ? 0 : found->second));
    }
    CHECK(absent == missing);
    CHECK(table.stats().looked_up == ids.size() && table.stats().missed == missing);
  }
}

void test_of_a_repeated_key_the_last_stays_and_a_tombstone_wins() {
  ServingTable table(config_of(1, Precision::kFp32));
  CHECK(apply(table, {5, 6, 5, 7, 5}, {1, 2, 3, 4, 5}).inserted == 3);
  CHECK(lookup(table, {5, 6, 7}) == (Floats{5, 2, 4}));
  const ServingTable::Applied applied = apply(table, {8, 6, 6}, {6, 7, 8}, {8, 5, 5, 100});
  CHECK(applied.inserted == 1 && applied.erased == 2);
  CHECK(lookup(table, {5, 6, 7, 8}) == (Floats{0, 8, 4, 0}));
  CHECK(table.stats().upserted == 8 && table.stats().erased == 2 && table.stats().rows == 2);
}

void test_an_absent_id_is_served_what_it_would_start_from() {
  for (const Precision precision : kPrecisions) {
    const ServingConfig config = config_of(70, precision);
    const ServingTable table(config);
    const RowCodec codec(precision, config.dim);
    for (const std::int64_t id : {kMin, std::int64_t{0}, kMax}) {
      Floats expected(config.dim);
      freshet::init_weights(freshet::table_key(config.seed, config.slot_hash), id, config.init_scale, config.dim,
                            expected.data());
      codec.round(expected.data());
      CHECK(same_bits(lookup(table, {id}, Missing::kInitial), expected));
    }
  }
}

void test_bags_are_summed_in_order() {
  std::mt19937_64 random(4);
  ServingTable table(config_of(kRowDim, Precision::kFp16));
  Ids keys(500);
  for (std::size_t i = 0; i < keys.size(); ++i) keys[i] = static_cast<std::int64_t>(i);
  apply(table, keys, exact_rows(keys, 3));
  Ids ids, offsets{0};
  for (int bag = 0; bag < 700; ++bag) {  // empty, short and longer than a block
    const std::size_t size = bag % 50 == 7 ? 150 : random() % 4;
    for (std::size_t i = 0; i < size; ++i) ids.push_back(static_cast<std::int64_t>(random() % 600));
    offsets.push_back(static_cast<std::int64_t>(ids.size()));
  }
  const std::size_t bags = offsets.size() - 1;
  const Floats rows = lookup(table, ids, Missing::kInitial);
  for (const Pooling pooling : {Pooling::kSum, Pooling::kMean}) {
    Floats expected(bags * kRowDim), pooled(bags * kRowDim, 99.0F);
    for (std::size_t b = 0; b < bags; ++b) {
      const auto first = static_cast<std::size_t>(offsets[b]), last = static_cast<std::size_t>(offsets[b + 1]);
      for (std::size_t j = 0; j < kRowDim; ++j) {
        float sum = 0.0F;
        for (std::size_t i = first; i < last; ++i) sum += rows[i * kRowDim + j];
        const bool divide = pooling == Pooling::kMean && last > first;
        expected[b * kRowDim + j] = divide ? sum / static_cast<float>(last - first) : sum;
      }
    }
    table.lookup_pooled(ids.data(), ids.size(), offsets.data(), bags, pooling, pooled.data(), Missing::kInitial, 2);
    CHECK(same_bits(pooled, expected));
  }
  Floats pooled(2 * kRowDim);
  for (const Ids& bad : {Ids{0, 2, 1}, Ids{1, 1, 2}, Ids{0, 1, 3}, Ids{0, -1, 2}}) {
    bool refused = false;
    try {
      table.lookup_pooled(ids.data(), 2, bad.data(), 2, Pooling::kSum, pooled.data(), Missing::kZeros, 1);
    } catch (const std::invalid_argument&) {
      refused = true;
    }
    CHECK(refused);
  }
}

void test_refused_weights_change_nothing() {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (const Precision precision : kPrecisions) {
    ServingTable table(config_of(2, precision));
    apply(table, {1, 2}, {1, -1, 2, -2});
    Floats bad_values{nan, kInfinity, -kInfinity};
    if (precision == Precision::kFp16) bad_values.insert(bad_values.end(), {65520.0F, -1e30F});
    for (const float bad : bad_values) {
      bool refused = false;
      try {
        apply(table, {1, 3}, {5, 5, 5, bad}, {2});
      } catch (const std::invalid_argument&) {
        refused = true;
      }
      CHECK(refused);
    }
    CHECK(table.size() == 2 && table.stats().upserted == 2 && table.stats().erased == 0);
    CHECK(lookup(table, {1, 2, 3}) == (Floats{1, -1, 2, -2, 0, 0}));
  }
}

void test_a_failed_allocation_changes_nothing() {
  Ids present(5), batch(3000);
  for (std::size_t i = 0; i < present.size(); ++i) present[i] = static_cast<std::int64_t>(i);
  for (std::size_t i = 0; i < batch.size(); ++i) batch[i] = static_cast<std::int64_t>(i * 7 % 2500);  // with repeats
  const Floats weights = exact_rows(batch, 2);
  const Ids gone{1, 2, 3, 9999};
  for (long failing = 0;; ++failing) {
    ServingTable table(config_of(kRowDim, Precision::kInt8));
    apply(table, present, exact_rows(present, 1));
    allocations_left = failing;
    bool failed = false;
    try {
      table.apply(batch.data(), batch.size(), weights.data(), gone.data(), gone.size());
    } catch (const std::bad_alloc&) {
      failed = true;
    }
    allocations_left = -1;
    if (!failed) {
      CHECK(failing > 10);  // index and row store have grown many times
      return;
    }
    CHECK(table.size() == present.size());
    CHECK(same_bits(lookup(table, present), exact_rows(present, 1)));
    apply(table, batch, weights, gone);
    CHECK(table.size() == 2497);
  }
}

void test_memory_of_erased_rows_is_used_again() {
  ServingTable table(config_of(kRowDim, Precision::kFp16));
  std::uint64_t row_bytes = 0, overhead = 0;
  for (int round = 0; round < 40; ++round) {
    Ids keys(2000);
    for (std::size_t i = 0; i < keys.size(); ++i) keys[i] = round * 2000 + static_cast<std::int64_t>(i);
    apply(table, keys, exact_rows(keys, 1));
    apply(table, {}, {}, keys);
    CHECK(table.size() == 0);
    if (round == 9) row_bytes = table.stats().row_bytes, overhead = table.stats().overhead_bytes;
  }
  CHECK(table.stats().row_bytes == row_bytes);
  CHECK(table.stats().overhead_bytes <= overhead * 3 / 2);
}

}  // namespace

int main() {
  test_it_agrees_with_a_map_through_growth_and_churn();
  test_of_a_repeated_key_the_last_stays_and_a_tombstone_wins();
  test_an_absent_id_is_served_what_it_would_start_from();
  test_bags_are_summed_in_order();
  test_refused_weights_change_nothing();
  test_a_failed_allocation_changes_nothing();
  test_memory_of_erased_rows_is_used_again();
  std::puts("serving_table_test: all passed");
  return 0;
}
