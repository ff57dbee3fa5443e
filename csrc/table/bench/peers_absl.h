// absl::flat_hash_map from keys to rows in a slab. Several threads may read it while none writes.
#pragma once

#include <absl/container/flat_hash_map.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "peer_slab.h"

namespace bench {

class AbslTable {
 public:
  static constexpr const char* kName = "absl";

  AbslTable(std::size_t dim, std::size_t state_dim, std::size_t reserved) : slab_(dim, state_dim) {
    map_.reserve(reserved);
  }

  std::size_t lookup(const std::int64_t* keys, std::size_t n, float* out, std::size_t threads) const {
    std::atomic<std::size_t> missing{0};
    split(n, threads, [&](std::size_t i) {
      float* const to = out + i * slab_.dim();
      const auto found = map_.find(keys[i]);
      if (found != map_.end()) {
        std::memcpy(to, slab_.row(found->second), slab_.weight_bytes());
        return;
      }
      std::memset(to, 0, slab_.weight_bytes());
      missing.fetch_add(1, std::memory_order_relaxed);
    });
    return missing.load();
  }

  void find_or_insert(const std::int64_t* keys, std::size_t n, float* out) {
    for (std::size_t i = 0; i < n; ++i) std::memcpy(out + i * slab_.dim(), row(keys[i]), slab_.weight_bytes());
  }

  void apply_gradients(const std::int64_t* keys, std::size_t n, const float* gradients, float lr) {
    for (std::size_t i = 0; i < n; ++i) peer_adagrad(slab_.dim(), lr, gradients + i * slab_.dim(), row(keys[i]));
  }

 private:
  float* row(std::int64_t key) {
    const auto [place, is_new] = map_.try_emplace(key, 0U);
    if (is_new) place->second = slab_.take(key);
    return slab_.row(place->second);
  }

  PeerSlab slab_;
  absl::flat_hash_map<std::int64_t, std::uint32_t> map_;
};

}  // namespace bench
