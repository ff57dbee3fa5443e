// Monolith's structure: libcuckoo from 64-bit keys to 4-byte handles of rows in a slab. Rows are read and changed under
// the map's locks, as Monolith does; its indirect calls, timestamps and row decoding are left out.
#pragma once

#include <absl/hash/hash.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <libcuckoo/cuckoohash_map.hh>

#include "peer_slab.h"

namespace bench {

class CuckooTable {
 public:
  static constexpr const char* kName = "monolith";

  // reserved: keys that fit without growing; 4 = grows from empty, which is Monolith's default.
  CuckooTable(std::size_t dim, std::size_t state_dim, std::size_t reserved) : slab_(dim, state_dim), map_(reserved) {}

  std::size_t lookup(const std::int64_t* keys, std::size_t n, float* out, std::size_t threads) const {
    std::atomic<std::size_t> missing{0};
    split(n, threads, [&](std::size_t i) {
      float* const to = out + i * slab_.dim();
      const auto copy = [&](const Cell& cell) { std::memcpy(to, slab_.row(cell.handle), slab_.weight_bytes()); };
      if (map_.find_fn(keys[i], copy)) return;
      std::memset(to, 0, slab_.weight_bytes());
      missing.fetch_add(1, std::memory_order_relaxed);
    });
    return missing.load();
  }

  void find_or_insert(const std::int64_t* keys, std::size_t n, float* out, std::size_t threads) {
    change(keys, n, threads, [&](std::size_t i, const float* row) {
      std::memcpy(out + i * slab_.dim(), row, slab_.weight_bytes());
    });
  }

  void upsert(const std::int64_t* keys, std::size_t n, const float* weights, std::size_t threads) {
    change(keys, n, threads, [&](std::size_t i, float* row) {
      std::memcpy(row, weights + i * slab_.dim(), slab_.weight_bytes());
    });
  }

  void apply_gradients(const std::int64_t* keys, std::size_t n, const float* gradients, float lr, std::size_t threads) {
    change(keys, n, threads,
           [&](std::size_t i, float* row) { peer_adagrad(slab_.dim(), lr, gradients + i * slab_.dim(), row); });
  }

 private:
  // Made under the map's locks, only when the key is new; `make` takes a row and changes it.
  struct Cell {
    template <typename Make>
    explicit Cell(const Make& make) : handle(make()) {}
    std::uint32_t handle;
  };

  template <typename F>
  void change(const std::int64_t* keys, std::size_t n, std::size_t threads, const F& f) {
    split(n, threads, [&](std::size_t i) {
      const auto insert = [&] {
        const std::uint32_t handle = slab_.take(keys[i]);
        f(i, slab_.row(handle));
        return handle;
      };
      map_.upsert(keys[i], [&](Cell& cell) { f(i, slab_.row(cell.handle)); }, insert);
    });
  }

  PeerSlab slab_;
  libcuckoo::cuckoohash_map<std::int64_t, Cell, absl::Hash<std::int64_t>> map_;
};

}  // namespace bench
