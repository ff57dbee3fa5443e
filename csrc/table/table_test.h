// What the tests of the embedding table share.
#pragma once

#include <functional>
#include <memory>
#include <stdexcept>

#include "embedding_table.h"
#include "serving_test.h"
#include "snapshot_scan.h"

namespace freshet::testing {

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
inline constexpr bool kSanitized = true;  // slow: the long tests are shorter then
#else
inline constexpr bool kSanitized = false;
#endif

inline constexpr std::int64_t kHour = 3600 * kMicroseconds;
inline constexpr OptimizerKind kOptimizers[] = {OptimizerKind::kSgd, OptimizerKind::kAdagrad,
                                                OptimizerKind::kRowwiseAdagrad, OptimizerKind::kAdam,
                                                OptimizerKind::kFtrl};

inline TableConfig table_config(OptimizerKind kind = OptimizerKind::kAdagrad, std::size_t dim = 3,
                                unsigned shards = 4) {
  TableConfig config;
  config.dim = dim;
  config.optimizer.kind = kind;
  config.seed = 7;
  config.slot_hash = 11;
  config.shards = shards;
  return config;
}

// The id with that hash: both steps of the hash can be undone.
inline std::int64_t id_of_hash(std::uint64_t hash) {
  std::uint64_t x = hash ^ (hash >> 31) ^ (hash >> 62);
  x *= 0x319642b2d24d8ec3ULL;
  x ^= (x >> 27) ^ (x >> 54);
  x *= 0x96de1b173f119089ULL;
  x ^= (x >> 30) ^ (x >> 60);
  return static_cast<std::int64_t>(x - kGolden);
}

inline Ids ids_from(std::int64_t first, std::size_t n) {
  Ids ids(n);
  for (std::size_t i = 0; i < n; ++i) ids[i] = first + static_cast<std::int64_t>(i);
  return ids;
}

inline Floats lookup(const EmbeddingTable& table, const Ids& ids, Missing missing = Missing::kZeros,
                     std::size_t threads = 1) {
  Floats out(ids.size() * table.dim(), 99.0F);
  table.lookup(ids.data(), ids.size(), out.data(), missing, threads);
  return out;
}

inline Floats find_or_insert(EmbeddingTable& table, const Ids& ids, std::size_t threads = 1) {
  Floats out(ids.size() * table.dim(), 99.0F);
  table.find_or_insert(ids.data(), ids.size(), out.data(), threads);
  return out;
}

inline std::size_t train(EmbeddingTable& table, const Ids& ids, const Floats& grads, std::int64_t now_us = 0,
                         float lr = 0.1F, std::size_t threads = 1) {
  CHECK(grads.size() == ids.size() * table.dim());
  return table.apply_gradients(ids.data(), ids.size(), {grads.data(), ids.size()}, lr, now_us, threads);
}
inline std::size_t train(EmbeddingTable& table, const Ids& ids, std::int64_t now_us = 0) {
  return train(table, ids, Floats(ids.size() * table.dim(), 1.0F), now_us);
}

inline std::size_t upsert(EmbeddingTable& table, const Ids& ids, const Floats& weights, std::size_t threads = 1) {
  CHECK(weights.size() == ids.size() * table.dim());
  return table.upsert(ids.data(), ids.size(), {weights.data()}, threads);
}

inline std::size_t erase(EmbeddingTable& table, const Ids& ids) { return table.erase(ids.data(), ids.size()); }

inline bool same_rows(const Delta& a, const Delta& b) {
  return a.keys == b.keys && same_bits(a.weights, b.weights) && same_bits(a.state, b.state) && a.counts == b.counts;
}
inline bool same(const Delta& a, const Delta& b) {
  return same_rows(a, b) && a.last_update_us == b.last_update_us && a.candidate_keys == b.candidate_keys &&
         a.candidates == b.candidates && a.tombstones == b.tombstones;
}

// Whether the call is refused with the exception; any other one ends the test.
template <typename Exception = std::invalid_argument, typename Call>
bool refused(const Call& call) {
  try {
    call();
  } catch (const Exception&) {
    return true;
  }
  return false;
}

// Brings a consumer up to date.
inline void replay(const Delta& delta, EmbeddingTable& table) {
  erase(table, delta.tombstones);
  const EmbeddingTable::Rows rows{delta.weights.data(), delta.state.data(), delta.last_update_us.data(),
                                  delta.counts.data()};
  table.upsert(delta.keys.data(), delta.keys.size(), rows, 1);
  table.put_candidates(delta.candidate_keys.data(), delta.candidate_keys.size(), delta.candidates.data());
}

// Reads what is left of a snapshot into an empty table. `blocks`: what was read before.
inline void restore(SnapshotScan& scan, std::vector<Block> blocks, EmbeddingTable& table) {
  for (Block block; scan.next(&block);) blocks.push_back(block);
  table.begin_restore(scan.progress(), scan.dropped_to(), scan.tombstone_keys().data(), scan.tombstone_epochs().data(),
                      scan.tombstone_keys().size());
  for (const Block& block : blocks) {
    Ids seen;
    for (const Seconds s : block.last_seen) seen.push_back(to_microseconds(s));
    const EmbeddingTable::Rows rows{block.weights.data(), block.state.data(), seen.data(), block.counts.data(),
                                    block.dirty_epoch.data()};
    CHECK(table.upsert(block.keys.data(), block.keys.size(), rows, 1) == block.keys.size());  // none comes twice
    table.put_candidates(block.candidate_keys.data(), block.candidate_keys.size(), block.candidates.data());
    for (const std::int64_t key : block.keys) {
      CHECK(virtual_bucket(hash_id(key)) >= block.first_bucket && virtual_bucket(hash_id(key)) <= block.last_bucket);
    }
  }
  CHECK(table.size() == scan.rows());
}

}  // namespace freshet::testing
