// Rows of the peers: fixed blocks behind 4-byte handles, as in Monolith's packed layout. To be generous the blocks are
// aligned to huge pages and ask for them, as ours do; initialiser and optimiser are our own code.
#pragma once

#include <stdlib.h>
#include <sys/mman.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

#include "../../common/parallel.h"
#include "../../common/platform.h"
#include "../initializer.h"
#include "../optimizer.h"

namespace bench {

inline constexpr std::uint64_t kInitKey = 7;
inline constexpr float kInitScale = 0.05F;

FRESHET_CLONES inline void peer_init(std::int64_t key, std::size_t dim, float* row) {
  freshet::init_weights(kInitKey, key, kInitScale, dim, row);
}

FRESHET_CLONES inline void peer_adagrad(std::size_t dim, float lr, const float* gradient, float* row) {
  const freshet::OptimizerConfig config;
  freshet::adagrad(config, dim, lr, gradient, row, row + dim);
}

inline char* allocate_huge(std::size_t bytes) {
  constexpr std::size_t kHugePage = std::size_t{2} << 20;
  const std::size_t rounded = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  void* memory = nullptr;
  if (posix_memalign(&memory, kHugePage, rounded) != 0) throw std::bad_alloc();
  madvise(memory, rounded, MADV_HUGEPAGE);
  return static_cast<char*>(memory);
}

// Rows are taken, never given back. Any thread may take or look.
class PeerSlab {
 public:
  PeerSlab(std::size_t dim, std::size_t state_dim) : dim_(dim), row_floats_(dim + state_dim), blocks_(kBlocks) {
    while ((row_floats_ * sizeof(float) << shift_) < (std::size_t{2} << 20)) ++shift_;
  }
  ~PeerSlab() {
    for (const std::atomic<float*>& block : blocks_) std::free(block.load());
  }
  PeerSlab(const PeerSlab&) = delete;
  PeerSlab& operator=(const PeerSlab&) = delete;

  std::size_t dim() const { return dim_; }
  std::size_t weight_bytes() const { return dim_ * sizeof(float); }

  float* row(std::uint32_t handle) const {
    return blocks_[handle >> shift_].load(std::memory_order_relaxed) +
           (handle & ((std::size_t{1} << shift_) - 1)) * row_floats_;
  }

  // A fresh row for `key`; its state is zero.
  std::uint32_t take(std::int64_t key) {
    const std::uint32_t handle = next_.fetch_add(1, std::memory_order_relaxed);
    std::atomic<float*>& block = blocks_[handle >> shift_];
    if (block.load(std::memory_order_acquire) == nullptr) add(&block);
    float* const fresh = row(handle);
    peer_init(key, dim_, fresh);
    std::fill(fresh + dim_, fresh + row_floats_, 0.0F);
    return handle;
  }

 private:
  static constexpr std::size_t kBlocks = std::size_t{1} << 17;

  void add(std::atomic<float*>* block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (block->load(std::memory_order_relaxed) != nullptr) return;
    block->store(reinterpret_cast<float*>(allocate_huge(row_floats_ * sizeof(float) << shift_)),
                 std::memory_order_release);
  }

  const std::size_t dim_;
  const std::size_t row_floats_;
  unsigned shift_ = 12;  // at least 4,096 rows
  std::vector<std::atomic<float*>> blocks_;
  std::atomic<std::uint32_t> next_{0};
  std::mutex mutex_;
};

// f(i) for all i in [0, n), a contiguous part for each thread.
template <typename F>
void split(std::size_t n, std::size_t threads, const F& f) {
  freshet::parallel_for(threads, threads, [&](std::size_t part) {
    const std::size_t end = n * (part + 1) / threads;
    for (std::size_t i = n * part / threads; i < end; ++i) f(i);
  });
}

}  // namespace bench
