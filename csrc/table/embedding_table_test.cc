// Tests of the embedding table; run by `make -C csrc test`, `asan` and `tsan`.
#include "embedding_table.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <limits>
#include <map>
#include <new>
#include <stdexcept>
#include <thread>
#include <vector>

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
[[gnu::noinline]] void* operator new[](std::size_t n, std::align_val_t a) {
  return allocate(n, static_cast<std::size_t>(a));
}
[[gnu::noinline]] void operator delete(void* p) noexcept { std::free(p); }
[[gnu::noinline]] void operator delete[](void* p) noexcept { std::free(p); }
[[gnu::noinline]] void operator delete(void* p, std::size_t) noexcept { std::free(p); }
[[gnu::noinline]] void operator delete[](void* p, std::size_t) noexcept { std::free(p); }
[[gnu::noinline]] void operator delete[](void* p, std::align_val_t) noexcept { std::free(p); }

namespace {

using freshet::Delta;
using freshet::EmbeddingTable;
using freshet::IdMap;
using freshet::Missing;
using freshet::OptimizerKind;
using freshet::TableConfig;
using Ids = std::vector<std::int64_t>;
using Floats = std::vector<float>;

#define CHECK(condition)                                                        \
  do {                                                                          \
    if (!(condition)) {                                                         \
      std::fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                             \
    }                                                                           \
  } while (false)

constexpr std::int64_t kMin = std::numeric_limits<std::int64_t>::min();
constexpr std::int64_t kMax = std::numeric_limits<std::int64_t>::max();

TableConfig config(OptimizerKind kind = OptimizerKind::kAdagrad, std::size_t dim = 3) {
  TableConfig c;
  c.dim = dim;
  c.optimizer.kind = kind;
  c.seed = 7;
  c.slot_hash = 11;
  return c;
}

bool equal(const Delta& a, const Delta& b) {
  return a.keys == b.keys && a.weights == b.weights && a.state == b.state && a.last_update_us == b.last_update_us &&
         a.tombstones == b.tombstones;
}

bool refused(const std::function<void()>& call) {
  try {
    call();
  } catch (const std::invalid_argument&) {
    return true;
  }
  return false;
}

Floats lookup(const EmbeddingTable& table, const Ids& ids, Missing missing = Missing::kInitial) {
  Floats out(ids.size() * table.dim());
  table.lookup(ids.data(), ids.size(), out.data(), missing);
  return out;
}

void test_id_map_agrees_with_std_map() {
  IdMap map(3);
  std::map<std::int64_t, std::uint64_t> reference;
  std::uint64_t random = 1;
  for (int i = 0; i < 20000; ++i) {
    random = freshet::mix64(random + 0x9e3779b97f4a7c15ULL);
    const auto key = static_cast<std::int64_t>(random % 512) - 256;
    if ((random >> 32) % 2 == 0) {
      map.reserve(map.size() + 1);
      CHECK(map.set(key, random >> 8) == (reference.count(key) == 0));
      reference[key] = random >> 8;
    } else {
      const auto it = reference.find(key);
      CHECK(map.erase(key) == (it == reference.end() ? IdMap::kNone : it->second));
      reference.erase(key);
    }
    CHECK(map.size() == reference.size());
    if (i % 100 != 0) continue;
    for (std::int64_t k = -256; k < 256; ++k) {
      const auto it = reference.find(k);
      CHECK(map.find(k) == (it == reference.end() ? IdMap::kNone : it->second));
    }
  }
}

void test_every_id_has_its_own_row_through_growth() {
  EmbeddingTable table(config(OptimizerKind::kSgd, 1));
  Ids ids = {0, -1, kMin, kMax, 1};
  for (std::int64_t i = 2; i < 100000; ++i) ids.push_back(i * 4096);  // equal low bits
  Floats weights(ids.size());
  for (std::size_t i = 0; i < ids.size(); ++i) weights[i] = static_cast<float>(i);
  CHECK(table.upsert(ids.data(), ids.size(), weights.data(), nullptr, nullptr) == ids.size());
  CHECK(table.size() == ids.size());
  CHECK(lookup(table, ids) == weights);
}

void test_lookup_inserts_nothing_and_gives_the_weights_of_a_fresh_row() {
  EmbeddingTable table(config());
  const Ids ids = {5, kMin, 5};
  CHECK(lookup(table, ids, Missing::kZeros) == Floats(9, 0.0F));
  const Floats served = lookup(table, ids);
  CHECK(table.size() == 0);
  Floats trained(9);
  CHECK(table.find_or_insert(ids.data(), 3, trained.data()) == 2);
  CHECK(trained == served);
  for (const float w : served) CHECK(w > -0.05F && w < 0.05F && w != 0.0F);
  CHECK(table.stats().looked_up == 6 && table.stats().missed == 6);
}

void test_duplicates_are_one_update_of_the_summed_gradient() {
  for (const auto kind : {OptimizerKind::kSgd, OptimizerKind::kAdagrad, OptimizerKind::kRowwiseAdagrad,
                          OptimizerKind::kAdam}) {
    EmbeddingTable many(config(kind));
    EmbeddingTable once(config(kind));
    const Ids ids = {4, 9, 4};
    const Floats grads = {1, 2, 3, 4, 5, 6, 7, 8, 9};
    const Ids distinct = {4, 9};
    const Floats summed = {8, 10, 12, 4, 5, 6};
    CHECK(many.apply_gradients(ids.data(), 3, grads.data(), 0.1F, 0) == 2);
    CHECK(once.apply_gradients(distinct.data(), 2, summed.data(), 0.1F, 0) == 2);
    CHECK(equal(many.export_all(), once.export_all()));
  }
}

void test_refused_input_changes_nothing() {
  EmbeddingTable table(config());
  const Ids ids = {1, 2, 1};
  const Floats good(9, 0.5F);
  table.apply_gradients(ids.data(), 3, good.data(), 0.1F, 5);
  const Delta before = table.export_delta(0);
  const Ids others = {7, 8, 7};
  for (const float bad : {std::nanf(""), std::numeric_limits<float>::infinity(), 1e30F}) {
    Floats grads = good;
    grads[8] = bad;
    CHECK(refused([&] { table.apply_gradients(others.data(), 3, grads.data(), 0.1F, 0); }));
  }
  const Floats huge(9, 8e14F);  // each is allowed, the sum over the repeated id is not
  CHECK(refused([&] { table.apply_gradients(others.data(), 3, huge.data(), 0.1F, 0); }));
  CHECK(refused([&] { table.apply_gradients(others.data(), 3, good.data(), std::nanf(""), 0); }));
  CHECK(refused([&] { table.apply_gradients(others.data(), 3, good.data(), 0.1F, -1); }));
  Floats weights = good;
  weights[4] = -std::numeric_limits<float>::infinity();
  CHECK(refused([&] { table.upsert(others.data(), 3, weights.data(), nullptr, nullptr); }));
  const Floats state(9, -1.0F);
  CHECK(refused([&] { table.upsert(others.data(), 3, good.data(), state.data(), nullptr); }));
  CHECK(equal(table.export_delta(0), before));
}

void test_an_erased_id_leaves_a_tombstone_and_starts_afresh() {
  EmbeddingTable table(config());
  const Ids ids = {3, 1, 2};
  const Floats grads(9, 1.0F);
  const Floats fresh = lookup(table, ids);
  table.apply_gradients(ids.data(), 3, grads.data(), 0.1F, 10);
  const std::uint64_t closed = table.advance_epoch();
  const Ids gone = {3, 2, 3, 99};
  CHECK(table.erase(gone.data(), gone.size()) == 2);
  const Delta delta = table.export_delta(closed);
  CHECK(delta.keys.empty());
  CHECK((delta.tombstones == Ids{2, 3}));
  Floats out(9);
  CHECK(table.find_or_insert(ids.data(), 3, out.data()) == 2);
  CHECK(std::equal(out.begin(), out.begin() + 3, fresh.begin()));
  const Delta again = table.export_delta(closed);
  CHECK((again.keys == Ids{2, 3}) && again.tombstones.empty());
  CHECK(again.state == Floats(6, 0.0F) && (again.last_update_us == Ids{0, 0}));
}

void test_expiry_takes_stale_rows_of_known_time_only() {
  EmbeddingTable table(config());
  const Ids ids = {1, 2, 3};
  const Floats grads(9, 1.0F);
  Floats out(3);
  table.apply_gradients(ids.data(), 1, grads.data(), 0.1F, 100);
  table.apply_gradients(ids.data() + 1, 1, grads.data(), 0.1F, 200);
  table.apply_gradients(ids.data() + 1, 1, grads.data(), 0.1F, 50);  // late: the newest time stays
  table.find_or_insert(ids.data() + 2, 1, out.data());
  CHECK(table.expire(100) == 0);
  CHECK(table.expire(200) == 1);
  CHECK((table.export_all().keys == Ids{2, 3}));
  CHECK((table.export_delta(0).tombstones == Ids{1}));
}

void test_incomplete_deltas_are_refused() {
  EmbeddingTable table(config());
  CHECK(refused([&] { table.export_delta(1); }));  // the open epoch
  CHECK(refused([&] { table.drop_tombstones(1); }));
  const std::int64_t id = 1;
  Floats out(3);
  table.find_or_insert(&id, 1, out.data());
  table.erase(&id, 1);
  CHECK(table.advance_epoch() == 1);
  CHECK(table.drop_tombstones(1) == 1);
  CHECK(refused([&] { table.export_delta(0); }));
  CHECK(table.export_delta(1).tombstones.empty());
}

void test_a_failed_allocation_changes_nothing() {
  const Floats values(9000, 0.25F);
  Ids ids(3000);
  for (std::size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<std::int64_t>(i % 2000) - 7;
  Floats out(9000);
  const std::vector<std::function<void(EmbeddingTable&)>> calls = {
      [&](EmbeddingTable& t) { t.find_or_insert(ids.data(), ids.size(), out.data()); },
      [&](EmbeddingTable& t) { t.apply_gradients(ids.data(), ids.size(), values.data(), 0.1F, 300); },
      [&](EmbeddingTable& t) { t.upsert(ids.data(), ids.size(), values.data(), nullptr, nullptr); },
      [&](EmbeddingTable& t) { t.erase(ids.data(), ids.size()); },
      [&](EmbeddingTable& t) { t.expire(200); },
  };
  for (const auto& call : calls) {
    int failures = 0;
    for (long fail_at = 0;; ++fail_at) {
      EmbeddingTable table(config());
      table.apply_gradients(ids.data(), 100, values.data(), 0.1F, 100);
      const Delta before = table.export_delta(0);
      allocations_left = fail_at;
      bool failed = false;
      try {
        call(table);
      } catch (const std::bad_alloc&) {
        failed = true;
      }
      allocations_left = -1;
      if (!failed) break;
      ++failures;
      CHECK(equal(table.export_delta(0), before));
      call(table);  // and the table still works
      CHECK(!equal(table.export_delta(0), before));
    }
    CHECK(failures > 0);
  }
}

void test_readers_never_see_half_a_batch() {
  EmbeddingTable table(config(OptimizerKind::kSgd, 8));
  const Ids ids = {1, 2, 3, 4};
  const Floats zeros(32, 0.0F);
  table.upsert(ids.data(), 4, zeros.data(), nullptr, nullptr);
  std::atomic<bool> done{false};
  std::thread writer([&] {
    for (int i = 1; i <= 300; ++i) {
      const Floats all(32, static_cast<float>(i));
      table.upsert(ids.data(), 4, all.data(), nullptr, nullptr);
      Ids more(50);
      for (std::size_t j = 0; j < more.size(); ++j) more[j] = 1000 + i * 50 + static_cast<std::int64_t>(j);
      Floats out(400);
      table.find_or_insert(more.data(), more.size(), out.data());
      std::this_thread::yield();
    }
    done = true;
  });
  float last = 0.0F;
  while (!done) {
    const Floats seen = lookup(table, ids);
    CHECK(std::count(seen.begin(), seen.end(), seen[0]) == 32);
    CHECK(seen[0] >= last);
    last = seen[0];
    std::this_thread::yield();
  }
  writer.join();
  CHECK(lookup(table, ids) == Floats(32, 300.0F));
}

}  // namespace

int main() {
  test_id_map_agrees_with_std_map();
  test_every_id_has_its_own_row_through_growth();
  test_lookup_inserts_nothing_and_gives_the_weights_of_a_fresh_row();
  test_duplicates_are_one_update_of_the_summed_gradient();
  test_refused_input_changes_nothing();
  test_an_erased_id_leaves_a_tombstone_and_starts_afresh();
  test_expiry_takes_stale_rows_of_known_time_only();
  test_incomplete_deltas_are_refused();
  test_a_failed_allocation_changes_nothing();
  test_readers_never_see_half_a_batch();
  std::puts("embedding_table_test: all passed");
  return 0;
}
