// Tests of the embedding table, one statement each; run by `make -C csrc test`, `asan` and `tsan`.
#include "embedding_table.h"

#include <cmath>

#include "initializer.h"
#include "snapshot_scan.h"
#include "table_test.h"

namespace {

using namespace freshet::testing;
using freshet::Admission;
using freshet::Delta;
using freshet::EmbeddingTable;
using freshet::Missing;
using freshet::OptimizerKind;
using freshet::Pooling;
using freshet::TableConfig;
using freshet::WhenFull;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The paper's point: an id has its own row, whatever its bits.
void test_every_id_has_its_own_row() {
  for (const unsigned shards : {1U, 16U, 256U}) {
    EmbeddingTable table(table_config(OptimizerKind::kSgd, 1, shards));
    Ids ids{0, -1, 1, kMin, kMin + 1, kMax, kMax - 1};
    for (std::int64_t i = 2; i < 30000; ++i) ids.push_back(i << 32);
    Floats weights(ids.size());
    for (std::size_t i = 0; i < ids.size(); ++i) weights[i] = static_cast<float>(i);
    CHECK(upsert(table, ids, weights) == ids.size());
    CHECK(table.size() == ids.size());
    CHECK(lookup(table, ids) == weights);
    CHECK(lookup(table, ids, Missing::kZeros, 4) == weights);
  }
}

// Replicas and replays on other machines rely on these very bits.
void test_fresh_rows_are_the_published_function_of_seed_slot_and_id() {
  const EmbeddingTable table(table_config(OptimizerKind::kSgd, 2));
  const Floats rows = lookup(table, {5, kMin}, Missing::kInitial);
  CHECK(same_bits(rows, {0x1.6b79260000000p-5F, 0x1.64f2020000000p-5F, 0x1.722ebe0000000p-6F, 0x1.37af960000000p-6F}));
  TableConfig other = table_config(OptimizerKind::kSgd, 2);
  other.slot_hash = 12;
  CHECK(!same_bits(lookup(EmbeddingTable(other), {5, kMin}, Missing::kInitial), rows));
}

void test_lookup_inserts_nothing_and_gives_what_training_starts_from() {
  EmbeddingTable table(table_config());
  const Ids ids{5, kMin, 5};
  CHECK(lookup(table, ids) == Floats(9, 0.0F));
  const Floats served = lookup(table, ids, Missing::kInitial);
  CHECK(table.size() == 0 && table.stats().missed == 6);
  CHECK(same_bits(find_or_insert(table, ids), served));
  CHECK(table.size() == 2 && table.stats().inserted == 2);
  CHECK(same_bits(lookup(table, ids), served));
}

void test_empty_batches_do_nothing() {
  EmbeddingTable table(table_config());
  const std::int64_t offset = 0;
  CHECK(table.lookup(nullptr, 0, nullptr, Missing::kZeros, 4) == 0);
  CHECK(table.lookup_pooled(nullptr, 0, &offset, 0, Pooling::kSum, nullptr, Missing::kZeros, 4) == 0);
  CHECK(table.find_or_insert(nullptr, 0, nullptr, 4) == 0);
  CHECK(train(table, {}, Floats{}) == 0 && upsert(table, {}, {}) == 0 && erase(table, {}) == 0);
  CHECK(table.expire(kHour) == 0 && table.size() == 0);
  CHECK(same(table.export_all(), Delta{}));
}

// The formulas of optimizer.h, in double precision, over three steps of one weight each.
double expected_weight(OptimizerKind kind, double w, const Floats& gradients, double lr) {
  double s = 0, m = 0, z = 0, r = 0;
  for (std::size_t t = 1; t <= gradients.size(); ++t) {
    const double g = gradients[t - 1], step = static_cast<double>(t);
    switch (kind) {
      case OptimizerKind::kSgd: w -= lr * g; break;
      case OptimizerKind::kAdagrad:
      case OptimizerKind::kRowwiseAdagrad:
        s += g * g;
        w -= lr * g / (std::sqrt(s) + 1e-10);
        break;
      case OptimizerKind::kAdam:
        m = 0.9 * m + 0.1 * g;
        s = 0.999 * s + 0.001 * g * g;
        w -= lr * m / (1 - std::pow(0.9, step)) / (std::sqrt(s / (1 - std::pow(0.999, step))) + 1e-10);
        break;
      case OptimizerKind::kFtrl:
        s += g * g;
        z += g - ((1 + std::sqrt(s)) / lr - r) * w;
        r = (1 + std::sqrt(s)) / lr;
        w = std::fabs(z) <= 0.01 ? 0 : -(z - std::copysign(0.01, z)) / (r + 0.02);
        break;
    }
  }
  return w;
}

void test_optimisers_follow_their_formulas() {
  for (const OptimizerKind kind : kOptimizers) {
    TableConfig config = table_config(kind, 1);
    config.optimizer.l1 = 0.01F;
    config.optimizer.l2 = 0.02F;
    EmbeddingTable table(config);
    upsert(table, {3}, {0.5F});
    for (const float g : {0.3F, -0.7F, 1.1F}) train(table, {3}, Floats{g});
    CHECK(std::fabs(lookup(table, {3})[0] - expected_weight(kind, 0.5, {0.3F, -0.7F, 1.1F}, 0.1)) < 1e-6);
  }
}

void test_duplicates_are_one_update_of_the_summed_gradient() {
  for (const OptimizerKind kind : kOptimizers) {
    EmbeddingTable many(table_config(kind)), once(table_config(kind));
    CHECK(train(many, {4, 9, 4}, {1, 2, 3, 4, 5, 6, 7, 8, 9}) == 2);
    CHECK(train(once, {4, 9}, {8, 10, 12, 4, 5, 6}) == 2);
    CHECK(same_bits(many.export_all().weights, once.export_all().weights));
    CHECK(same_bits(many.export_all().state, once.export_all().state));
    CHECK((many.export_all().counts == std::vector<std::uint16_t>{2, 1}));
  }
  EmbeddingTable many(table_config(OptimizerKind::kSgd, 1)), once(table_config(OptimizerKind::kSgd, 1));
  for (EmbeddingTable* table : {&many, &once}) upsert(*table, {4}, {-0.0F});
  train(many, {4, 4}, {-0.0F, -0.0F});  // a sum of which the sign counts
  train(once, {4}, Floats{-0.0F});
  CHECK(same_bits(lookup(many, {4}), lookup(once, {4})));
}

void test_gradients_may_be_shared_and_scaled() {
  EmbeddingTable shared(table_config()), plain(table_config());
  const Ids ids{1, 2, 1};
  const Floats grads{1, 2, 3, 4, 5, 6}, scale{0.5F, 2.0F, -1.0F};
  const std::uint32_t row[] = {1, 1, 0};
  shared.apply_gradients(ids.data(), 3, {grads.data(), 2, row, scale.data()}, 0.1F, 0, 1);
  train(plain, {1, 2}, {1, 0.5F, 0, 8, 10, 12});
  CHECK(same_bits(shared.export_all().weights, plain.export_all().weights));
}

void test_refused_input_changes_nothing_and_is_counted() {
  EmbeddingTable table(table_config());
  const Ids ids{1, 8, 1};
  const Floats good(9, 0.5F);
  train(table, {1, 2}, Floats(6, 1.0F), 5);
  const Delta before = table.export_delta(0);
  Floats scale(3, 1.0F);
  const EmbeddingTable::Gradients scaled{good.data(), 3, nullptr, scale.data()};
  std::uint64_t refusals = 0;
  for (const float bad : {kNan, kInfinity, -kInfinity, 1e30F}) {
    Floats grads = good;
    grads[8] = bad;
    CHECK(refused([&] { train(table, ids, grads); }));
    scale[1] = bad;
    CHECK(refused([&] { table.apply_gradients(ids.data(), 3, scaled, 0.1F, 0, 1); }));
    refusals += 2;
    CHECK(table.stats().refused_batches == refusals);
  }
  CHECK(refused([&] { train(table, ids, Floats(9, 8e14F)); }));  // each is allowed, their sum is not
  for (const float lr : {kNan, -0.1F, kInfinity, 2e6F}) CHECK(refused([&] { train(table, ids, good, 0, lr); }));
  CHECK(refused([&] { train(table, ids, good, -1); }));
  for (const float bad : {kNan, kInfinity}) CHECK(refused([&] { upsert(table, {1, 9}, {1, 1, 1, 1, 1, bad}); }));
  const Floats state{1, 1, -1};
  CHECK(refused([&] { table.upsert(ids.data(), 1, {good.data(), state.data()}, 1); }));
  const std::int64_t early = -1;
  CHECK(refused([&] { table.upsert(ids.data(), 1, {good.data(), nullptr, &early}, 1); }));
  CHECK(same(table.export_delta(0), before) && table.stats().updated == 2);
}

void test_the_largest_gradients_and_rates_keep_rows_finite() {
  for (const OptimizerKind kind : kOptimizers) {
    for (const float lr : {0.0F, 1e-30F, 1e-6F, 1.0F, EmbeddingTable::kMaxLearningRate}) {
      for (const float g : {1e-38F, 1e-20F, 1.0F, EmbeddingTable::kMaxGradient}) {
        EmbeddingTable table(table_config(kind));
        for (const float sign : {1.0F, 1.0F, -1.0F}) train(table, {1}, Floats(3, sign * g), 0, lr);
        const Delta all = table.export_all();
        for (const float x : all.weights) CHECK(std::isfinite(x));
        for (const float x : all.state) CHECK(std::isfinite(x));
      }
    }
  }
}

void test_a_rate_of_zero_moves_no_weight() {
  for (const OptimizerKind kind : kOptimizers) {
    EmbeddingTable table(table_config(kind));
    const Floats before = find_or_insert(table, {1, 2});
    train(table, {1, 2}, Floats(6, 1.0F), 0, 0.0F);
    CHECK(same_bits(lookup(table, {1, 2}), before));
  }
}

void test_of_a_repeated_id_upsert_keeps_the_last() {
  EmbeddingTable table(table_config(OptimizerKind::kAdagrad, 1));
  CHECK(upsert(table, {5, 6, 5, 7, 5}, {1, 2, 3, 4, 5}) == 3);
  CHECK(lookup(table, {5, 6, 7}) == (Floats{5, 2, 4}));
  CHECK(upsert(table, {6, 8}, {9, 10}) == 1);
  CHECK(lookup(table, {6, 8}) == (Floats{9, 10}) && table.stats().upserted == 7);
}

void test_an_erased_id_leaves_a_tombstone_and_starts_afresh() {
  EmbeddingTable table(table_config());
  const Floats fresh = lookup(table, {1, 2, 3}, Missing::kInitial);
  train(table, {3, 1, 2}, 10);
  const freshet::Epoch closed = table.advance_epoch();
  CHECK(erase(table, {3, 2, 3, 99}) == 2 && table.stats().erased == 2);
  CHECK(table.export_delta(closed).keys.empty() && (table.export_delta(closed).tombstones == Ids{2, 3}));
  CHECK(same_bits(find_or_insert(table, {2, 3}), Floats(fresh.begin() + 3, fresh.end())));
  const Delta again = table.export_delta(closed);
  CHECK((again.keys == Ids{2, 3}) && again.tombstones.empty());
  CHECK(again.state == Floats(6, 0.0F) && (again.last_update_us == Ids{0, 0}));
  CHECK((again.counts == std::vector<std::uint16_t>{0, 0}));
}

void test_ids_are_candidates_until_the_threshold() {
  TableConfig config = table_config();
  config.admission = Admission::kThreshold;
  config.threshold = 3;
  EmbeddingTable table(config);
  CHECK(train(table, {1, 1, 2}) == 0);
  CHECK(table.size() == 0 && table.stats().candidates == 2 && table.stats().refused_admission == 2);
  CHECK(lookup(table, {1, 2}) == Floats(6, 0.0F));
  CHECK(train(table, {1, 2}) == 1);
  CHECK((table.export_all().keys == Ids{1}) && table.export_all().counts[0] == 3);
  CHECK((table.export_all().candidate_keys == Ids{2}) && table.export_all().candidates[0] == 2);
  find_or_insert(table, {2});  // whatever the admission
  CHECK(table.size() == 2 && table.stats().candidates == 0);
}

// A consumer has the row; it has to forget it although the key is not gone.
void test_a_row_that_is_a_candidate_again_is_in_the_delta_as_erased_too() {
  TableConfig config = table_config();
  config.admission = Admission::kThreshold;
  config.threshold = 2;
  EmbeddingTable table(config), copy(config);
  train(table, {1, 1});
  replay(table.export_delta(0), copy);
  CHECK(copy.size() == 1);
  const freshet::Epoch closed = table.advance_epoch();
  erase(table, {1});
  train(table, {1});
  CHECK((table.export_delta(closed).tombstones == Ids{1}) && (table.export_delta(closed).candidate_keys == Ids{1}));
  replay(table.export_delta(closed), copy);
  CHECK(same(copy.export_all(), table.export_all()));
}

void test_incomplete_deltas_are_refused() {
  EmbeddingTable table(table_config());
  CHECK(refused([&] { table.export_delta(1); }));  // the open epoch
  CHECK(refused([&] { table.drop_tombstones(1); }));
  find_or_insert(table, {1});
  erase(table, {1});
  CHECK(table.advance_epoch() == 1);
  CHECK(table.drop_tombstones(1) == 1);
  CHECK(refused([&] { table.export_delta(0); }));
  CHECK(table.export_delta(1).tombstones.empty());
}

// Blocks of a snapshot are used again for rows that training changes meanwhile, in batches of any size.
void test_kept_rows_fill_few_blocks_that_say_where_their_rows_belong() {
  TableConfig config = table_config();
  config.dim = 64;
  EmbeddingTable table(config);
  const Ids ids = ids_from(0, 40000);
  train(table, ids);
  freshet::SnapshotScan scan(table);
  std::vector<freshet::Block> blocks;
  std::size_t trained = 0;
  const auto in_small_batches = [&](std::size_t batches) {
    for (const std::size_t end = trained + batches; trained < end; ++trained) train(table, {ids[trained * 37 % ids.size()]});
  };
  freshet::Block block;
  in_small_batches(500);
  for (int step = 0; scan.next(&block); ++step) {
    blocks.push_back(block);
    in_small_batches(500);
    if (step == 2) train(table, ids_from(10000, 20000));
  }
  CHECK(trained >= 3000 && blocks.size() < 20);
  EmbeddingTable restored(config);
  restore(scan, blocks, restored);  // checks each row's bucket
  CHECK(restored.size() == ids.size());
}

void test_a_snapshot_rests_while_the_table_is_changed_and_only_then() {
  CHECK(freshet::SnapshotScan::rest_after(0.01, false) == 0.0);
  CHECK(freshet::SnapshotScan::rest_after(0.01, true) == 0.04);
  CHECK(freshet::SnapshotScan::rest_after(60.0, true) == 0.25);  // a slow disk leaves training enough by itself
}

}  // namespace

int main() {
  test_every_id_has_its_own_row();
  test_fresh_rows_are_the_published_function_of_seed_slot_and_id();
  test_lookup_inserts_nothing_and_gives_what_training_starts_from();
  test_empty_batches_do_nothing();
  test_optimisers_follow_their_formulas();
  test_duplicates_are_one_update_of_the_summed_gradient();
  test_gradients_may_be_shared_and_scaled();
  test_refused_input_changes_nothing_and_is_counted();
  test_the_largest_gradients_and_rates_keep_rows_finite();
  test_a_rate_of_zero_moves_no_weight();
  test_of_a_repeated_id_upsert_keeps_the_last();
  test_an_erased_id_leaves_a_tombstone_and_starts_afresh();
  test_ids_are_candidates_until_the_threshold();
  test_a_row_that_is_a_candidate_again_is_in_the_delta_as_erased_too();
  test_incomplete_deltas_are_refused();
  test_kept_rows_fill_few_blocks_that_say_where_their_rows_belong();
  test_a_snapshot_rests_while_the_table_is_changed_and_only_then();
  std::puts("embedding_table_test: all passed");
  return 0;
}
