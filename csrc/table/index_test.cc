// Tests of the index; run by `make -C csrc test`, `asan` and `tsan`.
#include "index.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <new>
#include <random>
#include <set>
#include <thread>
#include <unordered_map>

#include "table_test.h"

namespace {

using namespace freshet::testing;
using freshet::Bucket;
using freshet::Handle;
using freshet::Index;
using freshet::kAbsent;
using freshet::kCandidateBit;
using freshet::KeyHandle;
using freshet::Reclaimer;

constexpr std::size_t kMany = kSanitized ? 60000 : 300000;

// An index beside a map that says what must be in it.
struct Fixture {
  Reclaimer own;
  Reclaimer* memory;
  Index index;
  Handle next = 0;
  std::unordered_map<std::int64_t, Handle> expected;

  explicit Fixture(unsigned bits = 0, Reclaimer* shared = nullptr)
      : memory(shared != nullptr ? shared : &own), index(memory, bits) {}

  // Odd numbers become candidates.
  void insert(std::int64_t key) {
    const Handle handle = next % 2 == 1 ? next | kCandidateBit : next;
    index.insert(key, freshet::hash_id(key), handle);
    expected[key] = handle;
    ++next;
  }

  void erase(std::int64_t key) {
    const std::uint64_t hash = freshet::hash_id(key);
    index.erase(index.locate(key, hash), hash);
    expected.erase(key);
  }

  void check_key(std::int64_t key) const {
    const auto entry = expected.find(key);
    const Handle handle = entry == expected.end() ? kAbsent : entry->second;
    const std::uint64_t hash = freshet::hash_id(key);
    CHECK(index.find(key, hash).handle == handle);
    const Index::Place place = index.locate(key, hash);
    CHECK((place.bucket == nullptr ? kAbsent : place.bucket->at(place.slot)) == handle);
  }

  // prefix, bits: of all hashes.
  void check_all(std::uint64_t prefix = 0, unsigned bits = 0) const {
    CHECK(index.size() == expected.size());
    for (const auto& [key, handle] : expected) check_key(key);
    std::vector<KeyHandle> listed;
    const std::uint64_t end = prefix | (bits == 0 ? ~std::uint64_t{0} : ~std::uint64_t{0} >> bits);
    for (std::uint64_t at = prefix;;) {
      const std::size_t before = listed.size();
      const std::uint64_t last = index.list_segment(at, &listed);
      CHECK(last >= at && last <= end);
      for (std::size_t i = before; i < listed.size(); ++i) {
        const std::uint64_t hash = freshet::hash_id(listed[i].key);
        CHECK(hash >= at && hash <= last);
      }
      CHECK((listed.size() - before) * 20 <= index.span(at).buckets * Bucket::kSlots * 19);
      if (last == end) break;
      at = last + 1;
    }
    std::unordered_map<std::int64_t, Handle> all;
    for (const KeyHandle& entry : listed) all[entry.key] = entry.handle;
    CHECK(listed.size() == all.size() && all == expected);
  }
};

void test_it_agrees_with_a_map_through_growth_and_churn() {
  std::mt19937_64 random(1);
  Fixture map;
  for (const std::int64_t key : {std::int64_t{0}, std::int64_t{-1}, kMin, kMin + 1, kMax, kMax - 1}) map.insert(key);
  map.check_all();
  for (int i = 0; i < 60000; ++i) {
    const std::int64_t key = static_cast<std::int64_t>(random() % 30000) - 15000;
    map.check_key(key);
    if (map.expected.count(key) == 0) {
      map.insert(key);
    } else {
      map.erase(key);
    }
    map.check_key(key);
    if (i < 50 || i % 6000 == 0) map.check_all();
  }
  const auto all = map.expected;
  for (const auto& entry : all) map.erase(entry.first);
  map.check_all();
}

std::size_t slots_in(const Index& index) {
  std::vector<KeyHandle> entries;
  std::size_t slots = 0;
  for (std::uint64_t at = 0, last = 0; last != ~std::uint64_t{0}; at = last + 1) {
    slots += std::size_t{index.span(at).buckets} * Bucket::kSlots;
    last = index.list_segment(at, &entries);
  }
  return slots;
}

void test_growth_finds_every_key_and_keeps_the_load() {
  Fixture map;
  for (std::size_t i = 0; i < kMany; ++i) {
    const auto key = static_cast<std::int64_t>(i);
    map.insert(key);
    map.check_key(key);
    map.check_key(-key - 1);
    map.check_key(key / 2);
    if (i < 3000 && i % 100 == 0) map.check_all();
    if (i >= 10000 && i % 5000 == 0) CHECK(slots_in(map.index) * 63 <= i * 100);
  }
  map.check_all();
  CHECK(slots_in(map.index) * 66 <= kMany * 102);
}

// The hash is a public bijection: anyone can choose ids whose hashes look like this.
void test_hashes_chosen_by_an_adversary_are_kept_apart() {
  std::mt19937_64 random(2);
  const std::function<std::uint64_t(std::uint64_t)> kFamilies[] = {
      [](std::uint64_t i) { return i << 46; },                                   // one home
      [&](std::uint64_t i) { return i << 46 | (random() & 0xffffffff); },        // in order of hash
      [&](std::uint64_t i) { return ~(i << 46) ^ (random() & 0xffffffff); },     // from the end
      [&](std::uint64_t) { return random() & ~std::uint64_t{0xff}; },            // close homes
      [&](std::uint64_t) { return random() | 0xfffff000U; },                     // the last bucket: chains go round
      [&](std::uint64_t) { return random() >> 9; },                              // one side of nine splits
      [&](std::uint64_t) { return random() | ~std::uint64_t{0} << 55; },         // the other side
  };
  for (const auto& hash_of : kFamilies) {
    Fixture map;
    for (std::uint64_t i = 0; i < (kSanitized ? 6000U : 12000U); ++i) {
      const std::int64_t key = id_of_hash(hash_of(i));
      if (map.expected.count(key) == 0) map.insert(key);
      map.check_key(id_of_hash(hash_of(i) ^ 1U << 20));
    }
    map.check_all();
    const auto all = map.expected;
    for (const auto& entry : all) {
      if (entry.first % 3 != 0) map.erase(entry.first);
    }
    map.check_all();
    for (const auto& entry : all) {
      if (entry.first % 3 == 1) map.insert(entry.first);
    }
    map.check_all();
  }
}

void test_a_shard_tells_keys_apart_by_the_bits_after_its_own() {
  std::mt19937_64 random(3);
  const std::uint64_t prefix = std::uint64_t{0x2b} << 58;
  Fixture map(6);
  for (int i = 0; i < 20000; ++i) map.insert(id_of_hash(prefix | random() >> 6));
  map.check_all(prefix, 6);
}

// 4,000 hashes that agree in their first 50 bits would need a directory of petabytes.
void test_what_no_directory_can_tell_apart_is_refused_and_the_rest_goes_on() {
  Fixture map;
  std::size_t refusals = 0;
  for (std::uint64_t i = 0; i < 4000; ++i) {
    refusals += refused<std::bad_alloc>([&] { map.insert(id_of_hash(std::uint64_t{7} << 50 | i << 2)); }) ? 1 : 0;
  }
  CHECK(refusals != 0 && map.expected.size() + refusals == 4000);
  for (std::int64_t key = 0; key < 5000; ++key) map.insert(key);
  map.check_all();
}

// Keys whose home is that one of the buckets of a small segment.
std::int64_t key_at(std::uint64_t bucket, std::uint64_t i, std::uint64_t buckets) {
  return id_of_hash(i << 40 | (bucket * ((std::uint64_t{1} << 32) / buckets + 1) + i * 4096));
}

void test_a_bucket_counts_the_keys_that_went_past_it() {
  Fixture map;
  for (std::uint64_t i = 1; i <= 12; ++i) map.insert(key_at(0, i, 3));
  const Index::Span home = map.index.span(0);
  CHECK(home.buckets == 3 && Bucket::overflow(home.first[0].control.load()) == 7);
  for (std::uint64_t i = 1; i <= 12; ++i) map.erase(key_at(0, i, 3));
  for (int b = 0; b < 3; ++b) CHECK(Bucket::overflow(home.first[b].control.load()) == 0);
}

void test_a_search_ends_where_every_bucket_has_lost_count() {
  Fixture map;
  for (std::uint64_t i = 1; i <= 28; ++i) map.insert(key_at(3, i, 7));
  const Index::Span start = map.index.span(0);
  CHECK(start.buckets == 7);
  for (int b = 0; b < 7; ++b) {
    while (Bucket::overflow(start.first[b].control.load()) != Bucket::kOverflowMax) start.first[b].count_overflow();
  }
  Index::Span at = start;
  std::set<const Bucket*> seen;
  do seen.insert(&at.bucket());
  while (at.step());
  CHECK(seen.size() == 7 && !at.step());
  const std::int64_t absent = key_at(1, 99, 7);
  map.check_key(absent);
  CHECK(map.index.locate_from(start, absent).bucket == nullptr);
  for (std::uint64_t i = 1; i <= 100; ++i) map.insert(key_at(2, i, 7));
  map.check_all();
}

// At constant sizes, the fullest and the emptiest of a segment among them.
void test_searches_stay_short_while_keys_come_and_go() {
  for (const std::size_t size : {1700U, 1830U, 2100U, 2300U, 2420U, 2450U}) {
    Fixture map;
    std::mt19937_64 random(5);
    Ids keys = ids_from(0, size);
    for (const std::int64_t key : keys) map.insert(key);
    const auto churn_end = static_cast<std::int64_t>(kSanitized ? 40000 : 200000);
    for (auto next = static_cast<std::int64_t>(size); next < churn_end; ++next) {
      std::int64_t& key = keys[random() % size];
      map.erase(key);
      map.insert(key = next);
    }
    map.check_all();
    std::size_t buckets = 0;
    constexpr std::size_t kAbsentKeys = 10000;
    for (std::size_t i = 1; i <= kAbsentKeys; ++i) {
      Index::Span at = map.index.span(freshet::hash_id(-static_cast<std::int64_t>(i)));
      do ++buckets;
      while (Bucket::overflow(at.bucket().control.load()) != 0 && at.step());
    }
    CHECK(buckets < 12 * kAbsentKeys);
  }
}

// In how many buckets a search looks, at any load.
void test_all_but_few_keys_are_in_one_of_two_buckets() {
  Fixture map;
  for (std::int64_t key = 0; key < 60000; ++key) {
    map.insert(key);
    if (key % 5000 != 4999) continue;
    std::size_t further = 0, guests = 0;
    for (std::int64_t known = 0; known <= key; ++known) {
      Index::Span at = map.index.span(freshet::hash_id(known));
      while (at.bucket().find(known) == kAbsent) CHECK(at.step());
      guests += at.steps == 1 ? 1 : 0;
      further += at.steps > 1 ? 1 : 0;
    }
    CHECK(guests * 4 < static_cast<std::size_t>(key) && further * 50 < static_cast<std::size_t>(key));
  }
}

// Readers believe what they read between two looks at the version of a bucket.
void test_no_slot_changes_without_the_version_of_its_bucket() {
  using Slots = std::array<std::pair<std::int64_t, Handle>, Bucket::kSlots>;
  const auto slots_of = [](const Bucket& bucket) {
    Slots slots;
    for (std::size_t i = 0; i < Bucket::kSlots; ++i) slots[i] = {bucket.key[i].load(), bucket.at(i)};
    return slots;
  };
  Fixture map;
  std::mt19937_64 random(6);
  std::vector<std::pair<std::uint32_t, Slots>> before;
  std::size_t moved = 0;  // to its second choice, when another key came
  for (int i = 0; i < 6000; ++i) {
    const auto key = static_cast<std::int64_t>(random() % (i < 3000 ? 2400 : 1200));
    const Index::Span segment = map.index.span(0);
    before.clear();
    for (std::uint32_t b = 0; b < segment.buckets; ++b) {
      before.emplace_back(segment.first[b].control.load(), slots_of(segment.first[b]));
    }
    map.expected.count(key) == 0 ? map.insert(key) : map.erase(key);
    if (map.index.span(0).first != segment.first) continue;  // replaced: nobody has seen its successor before
    std::size_t changed = 0;
    for (std::uint32_t b = 0; b < segment.buckets; ++b) {
      const std::uint32_t control = segment.first[b].control.load();
      CHECK(!Bucket::changing(control));
      if (slots_of(segment.first[b]) == before[b].second) continue;
      CHECK(control / Bucket::kVersion != before[b].first / Bucket::kVersion);
      ++changed;
    }
    moved += changed > 1 ? 1 : 0;
  }
  CHECK(moved != 0);
}

// Guests move while others look: no key may seem absent, and none may be listed twice or not at all.
void test_readers_find_every_key_while_keys_move() {
  Fixture map;
  constexpr std::int64_t kOld = 2000, kNew = kSanitized ? 20000 : 100000;
  for (std::int64_t key = 0; key < kOld; ++key) map.insert(key);
  std::atomic<bool> done{false};
  std::thread reader([&] {
    std::vector<KeyHandle> listed;
    for (std::uint64_t round = 0; !done; ++round) {
      const Reclaimer::Guard guard(*map.memory);
      for (std::int64_t key = 0; key < kOld; ++key) CHECK(map.index.find(key, freshet::hash_id(key)).handle != kAbsent);
      listed.clear();
      for (std::uint64_t at = 0, last = 0; last != ~std::uint64_t{0}; at = last + 1) last = map.index.list_segment(at, &listed);
      std::set<std::int64_t> keys;
      for (const KeyHandle& entry : listed) CHECK(keys.insert(entry.key).second);
      for (std::int64_t key = 0; key < kOld; ++key) CHECK(keys.count(key) == 1);
    }
  });
  for (std::int64_t key = kOld; key < kNew; ++key) map.insert(key);
  done = true;
  reader.join();
  map.check_all();
}

// Small indices, one after the other, in which a reader is nearly always in the segment that is replaced.
void test_a_listing_is_whole_although_its_segment_is_replaced() {
  constexpr std::size_t kIndices = kSanitized ? 10 : 60, kKeys = 3000;
  std::vector<std::unique_ptr<Fixture>> maps;
  for (std::size_t i = 0; i < kIndices; ++i) maps.push_back(std::make_unique<Fixture>());
  std::atomic<std::size_t> inserted{0};  // in all of them
  std::thread reader([&] {
    std::vector<KeyHandle> listed;
    for (std::size_t before = 0; before < kIndices * kKeys; before = inserted) {
      const Fixture& map = *maps[before / kKeys];
      const Reclaimer::Guard guard(*map.memory);
      listed.clear();
      for (std::uint64_t at = 0, last = 0; last != ~std::uint64_t{0}; at = last + 1) last = map.index.list_segment(at, &listed);
      CHECK(listed.size() >= before % kKeys);
      if (listed.size() > 150) continue;  // telling them apart takes longer than the listing
      const auto is_less = [](const KeyHandle& a, const KeyHandle& b) { return a.key < b.key; };
      std::sort(listed.begin(), listed.end(), is_less);
      const auto is_same = [](const KeyHandle& a, const KeyHandle& b) { return a.key == b.key; };
      CHECK(std::adjacent_find(listed.begin(), listed.end(), is_same) == listed.end());
    }
  });
  for (const auto& map : maps) {
    for (std::size_t key = 0; key < kKeys; ++key) {
      map->insert(static_cast<std::int64_t>(key));
      ++inserted;
    }
  }
  reader.join();
}

void test_memory_of_replaced_segments_is_used_again() {
  Reclaimer memory;
  std::size_t held = 0;
  for (int round = 0; round < 12; ++round) {
    Fixture map(0, &memory);
    for (std::int64_t key = 0; key < 40000; ++key) map.insert(key);
    if (round == 0) held = memory.arena().held_bytes();
  }
  CHECK(memory.arena().held_bytes() <= held);
  CHECK(held <= 40000 * 22 + freshet::kHugePage);
}

void test_churn_needs_no_more_memory() {
  Fixture map;
  std::mt19937_64 random(4);
  Ids keys = ids_from(0, 50000);
  for (const std::int64_t key : keys) map.insert(key);
  const std::size_t held = map.memory->arena().held_bytes();
  for (std::int64_t next = 50000; next < (kSanitized ? 100000 : 500000); ++next) {
    std::int64_t& key = keys[random() % keys.size()];
    map.erase(key);
    map.insert(key = next);
  }
  map.check_all();
  CHECK(map.memory->arena().held_bytes() == held);
}

void test_a_segment_that_a_reader_looks_at_stays_as_it_was() {
  Fixture map;
  for (std::int64_t key = 0; key < 2000; ++key) map.insert(key);
  {
    const Reclaimer::Guard guard(*map.memory);
    Index::Span at = map.index.span(freshet::hash_id(5));
    CHECK(!Bucket::retired(at.bucket().control.load()));
    for (std::int64_t key = 2000; key < 60000; ++key) map.insert(key);
    std::size_t keys = 0;
    do {
      CHECK(Bucket::retired(at.bucket().control.load()));
      for (std::size_t slot = 0; slot < Bucket::kSlots; ++slot) {
        const Handle handle = at.bucket().at(slot);
        if (handle == kAbsent) continue;
        const std::int64_t key = at.bucket().key[slot].load();
        CHECK(map.expected.at(key) == handle);
        keys += key < 2000 ? 1 : 0;
      }
    } while (at.step());
    CHECK(keys >= 1999);
  }
  map.check_all();
}

}  // namespace

int main() {
  test_it_agrees_with_a_map_through_growth_and_churn();
  test_growth_finds_every_key_and_keeps_the_load();
  test_hashes_chosen_by_an_adversary_are_kept_apart();
  test_a_shard_tells_keys_apart_by_the_bits_after_its_own();
  test_what_no_directory_can_tell_apart_is_refused_and_the_rest_goes_on();
  test_a_bucket_counts_the_keys_that_went_past_it();
  test_a_search_ends_where_every_bucket_has_lost_count();
  test_searches_stay_short_while_keys_come_and_go();
  test_all_but_few_keys_are_in_one_of_two_buckets();
  test_no_slot_changes_without_the_version_of_its_bucket();
  test_readers_find_every_key_while_keys_move();
  test_a_listing_is_whole_although_its_segment_is_replaced();
  test_memory_of_replaced_segments_is_used_again();
  test_churn_needs_no_more_memory();
  test_a_segment_that_a_reader_looks_at_stays_as_it_was();
  std::puts("index_test: all passed");
  return 0;
}
