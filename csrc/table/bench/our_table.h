// The table under test, with the peers' interface.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "../embedding_table.h"
#include "workload.h"

namespace bench {

inline freshet::TableConfig config_of(std::size_t dim, freshet::OptimizerKind kind) {
  freshet::TableConfig config;
  config.dim = dim;
  config.optimizer.kind = kind;
  config.seed = 7;
  config.slot_hash = 7;
  return config;
}

class OurTable {
 public:
  static constexpr const char* kName = "freshet";

  OurTable(std::size_t dim, freshet::OptimizerKind kind) : table_(config_of(dim, kind)) {}

  freshet::EmbeddingTable& table() { return table_; }

  std::size_t lookup(const std::int64_t* keys, std::size_t n, float* out, std::size_t threads) const {
    return table_.lookup(keys, n, out, freshet::Missing::kZeros, threads);
  }
  void find_or_insert(const std::int64_t* keys, std::size_t n, float* out, std::size_t threads) {
    table_.find_or_insert(keys, n, out, threads);
  }
  void upsert(const std::int64_t* keys, std::size_t n, const float* weights, std::size_t threads) {
    table_.upsert(keys, n, {weights}, threads);
  }
  void apply_gradients(const std::int64_t* keys, std::size_t n, const float* gradients, float lr, std::size_t threads) {
    freshet::EmbeddingTable::Gradients all{};
    all.grads = gradients;
    all.grad_rows = n;
    table_.apply_gradients(keys, n, all, lr, 0, threads);
  }

 private:
  freshet::EmbeddingTable table_;
};

// All of key_at(0 .. rows - 1), in batches.
template <typename Table>
void fill(Table& table, std::size_t rows, std::size_t batch, std::size_t dim) {
  std::vector<float> out(batch * dim);
  for (std::size_t at = 0; at < rows; at += batch) {
    const std::vector<std::int64_t> keys = keys_from(at, std::min(batch, rows - at));
    table.find_or_insert(keys.data(), keys.size(), out.data(), 1);
  }
}

}  // namespace bench
