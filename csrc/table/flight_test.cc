// Ids on the way to their rows: what an arrival proves, and that nobody gets lost.
#include "flight.h"

#include "table_test.h"

namespace freshet::testing {
namespace {

struct Fixture {
  Reclaimer reclaimer;
  Shard shard{&reclaimer, 0, 1};

  // A row whose one float is its handle.
  Handle add_row(std::int64_t id) {
    const std::uint64_t hash = hash_id(id);
    const Shard::FreshRow row = shard.take_row();
    *row.floats = static_cast<float>(row.handle);
    shard.publish_row({nullptr, 0}, shard.index().span(hash), id, hash, row.handle);
    return row.handle;
  }
  void add_candidate(std::int64_t id) { shard.put_candidate({nullptr, 0}, id, hash_id(id), 1); }

  Arrival<Shard> look(std::int64_t id) {
    Arrival<Shard> at{};
    at.shelf = &shard;
    at.bucket = shard.index().places(hash_id(id)).home;
    at.look(shard.rows().layout(), id);
    return at;
  }
};

void test_an_id_is_proven_absent_only_while_its_bucket_stays_as_it_was() {
  Fixture table;
  const Arrival<Shard> at = table.look(1);
  CHECK(at.row == nullptr && at.handle == kAbsent && at.settled());
  { const BucketLock another_id_moves_in(*at.bucket); }
  CHECK(!at.settled());
}

void test_an_id_is_not_absent_where_others_have_gone_on_from_its_bucket() {
  Fixture table;
  Bucket& home = *table.look(1).bucket;
  CHECK(home.count_overflow());
  CHECK(!table.look(1).settled());
  home.uncount_overflow();
  CHECK(table.look(1).settled());
}

void test_a_row_is_believed_only_between_changes_of_its_bucket() {
  Fixture table;
  const Handle handle = table.add_row(1);
  const auto sees_row = [&] {
    const Arrival<Shard> at = table.look(1);
    CHECK(at.handle == handle && at.settled() == (at.row != nullptr));
    return at.row != nullptr;
  };
  CHECK(sees_row() && table.look(1).floats() == table.shard.floats(handle));
  CHECK(&table.look(1).meta() == &table.shard.meta(handle));
  Bucket& home = *table.look(1).bucket;
  home.begin_change();
  CHECK(!sees_row());
  home.end_change();
  CHECK(sees_row());
  home.retire();  // its rows change under the locks of other buckets now
  CHECK(!sees_row());
}

void test_a_candidate_has_no_row_and_needs_no_further_search() {
  Fixture table;
  table.add_candidate(1);
  const Arrival<Shard> at = table.look(1);
  CHECK(at.row == nullptr && is_candidate(at.handle) && at.settled());
}

// Every third id has a row, every third is a candidate; of the rows some are guests.
void test_all_arrive_once_and_in_order(std::size_t n) {
  constexpr Handle kCandidate = kCandidateBit;
  Fixture table;
  const Ids ids = ids_from(-static_cast<std::int64_t>(n) / 2, n);
  std::vector<Handle> expected(n, kAbsent);
  for (std::size_t i = 0; i < n; ++i) {
    if (i % 3 == 0) expected[i] = table.add_row(ids[i]);
    if (i % 3 == 1) table.add_candidate(ids[i]), expected[i] = kCandidate;
  }
  std::size_t arrived = 0, landed = 0, guests = 0;
  fly<Intent::kWrite>(
      n, sizeof(float), table.shard.rows().layout(), [&ids](std::size_t i) { return ids[i]; },
      [&table](std::uint64_t) -> Shard& { return table.shard; },
      [&](std::size_t i, const Arrival<Shard>& at) {
        CHECK(i == arrived++);
        CHECK(is_candidate(at.handle) ? expected[i] == kCandidate : expected[i] == at.handle);
        CHECK((at.row != nullptr) == (i % 3 == 0));
        if (at.row == nullptr) return;
        CHECK(*at.floats() == static_cast<float>(at.handle) && &at.meta() == &table.shard.meta(at.handle));
        CHECK(at.bucket->find(ids[i]) == at.handle && at.control == at.bucket->control.load());
        guests += at.bucket != table.shard.index().places(hash_id(ids[i])).home ? 1 : 0;
      },
      [&](std::size_t start, std::size_t count, const Arrival<Shard>* arrivals) {
        CHECK(start == landed && count != 0 && count <= kFlight);
        landed += count;
        CHECK(arrived == landed);
        for (std::size_t i = start; i < landed; ++i) CHECK((arrivals[i - start].row != nullptr) == (i % 3 == 0));
      });
  CHECK(arrived == n && landed == n);
  CHECK(n < 2 * kFlight || guests > 0);
}

}  // namespace
}  // namespace freshet::testing

int main() {
  using namespace freshet::testing;
  test_an_id_is_proven_absent_only_while_its_bucket_stays_as_it_was();
  test_an_id_is_not_absent_where_others_have_gone_on_from_its_bucket();
  test_a_row_is_believed_only_between_changes_of_its_bucket();
  test_a_candidate_has_no_row_and_needs_no_further_search();
  for (const std::size_t blocks : {0, 1, 2, 7}) {
    for (const std::size_t more : {0, 1, 17}) test_all_arrive_once_and_in_order(blocks * freshet::kFlight + more);
    if (blocks != 0) test_all_arrive_once_and_in_order(blocks * freshet::kFlight - 1);
  }
  std::puts("flight_test: all passed");
  return 0;
}
