// The memory of a table that readers look at without a lock: it is freed once they no longer can (epoch-based
// reclamation).
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "../common/parallel.h"
#include "../common/platform.h"
#include "arena.h"

namespace freshet {

// Invariant: memory given to `retire` after it was unlinked is freed only when every Guard that existed at that moment
// has ended. A Guard costs one compare-and-swap; it never waits for a writer.
class Reclaimer {
 public:
  class Guard {
   public:
    explicit Guard(Reclaimer& reclaimer) noexcept : slot_(reclaimer.enter()) {}
    ~Guard() { slot_.store(0, std::memory_order_release); }
    Guard(const Guard&) = delete;
    Guard& operator=(const Guard&) = delete;

   private:
    std::atomic<std::uint64_t>& slot_;
  };

  PageArena& arena() noexcept { return arena_; }
  RegionArena& regions() noexcept { return regions_; }  // for what lives as long as the table

  Reclaimer() = default;
  ~Reclaimer() {
    for (const Retired& retired : retired_) arena_.free(retired.memory, retired.bytes);
  }
  Reclaimer(const Reclaimer&) = delete;
  Reclaimer& operator=(const Reclaimer&) = delete;

  // Room for kPromised calls of retire by this thread; std::bad_alloc if there is none. There is always room for what
  // all other writers were promised, too: what one of them takes must not be what another relies on.
  void reserve() {
    const std::lock_guard<std::mutex> lock(mutex_);
    const std::size_t wanted = retired_.size() + kPromised * kWriters;
    if (wanted > retired_.capacity()) retired_.reserve(wanted + retired_.size());
  }

  // Takes over memory of the arena that no new reader can reach. Needs reserve before.
  void retire(void* memory, std::size_t bytes) noexcept {
    const std::lock_guard<std::mutex> lock(mutex_);
    retired_.push_back({memory, bytes, epoch_.fetch_add(1, std::memory_order_seq_cst)});
    collect();
  }

 private:
  static constexpr std::size_t kReaders = 128;
  static constexpr std::size_t kWriters = 256;  // as many as a table has shards at most
  static constexpr std::size_t kPromised = 2;

  struct Retired {
    void* memory;
    std::size_t bytes;
    std::uint64_t epoch;
  };
  struct alignas(kCacheLine) Slot {
    std::atomic<std::uint64_t> entered{0};  // 0 = free, else the epoch at which its reader entered
  };

  std::atomic<std::uint64_t>& enter() noexcept {
    static thread_local const std::size_t start = std::hash<std::thread::id>{}(std::this_thread::get_id());
    for (std::size_t i = mix(start);; ++i) {
      std::atomic<std::uint64_t>& slot = slots_[i % kReaders].entered;
      std::uint64_t expected = 0;
      const std::uint64_t now = epoch_.load(std::memory_order_seq_cst);
      if (slot.compare_exchange_strong(expected, now, std::memory_order_seq_cst)) {
        std::atomic_thread_fence(std::memory_order_seq_cst);  // pairs with collect's
        return slot;
      }
      if (i % kReaders == kReaders - 1) cpu_pause();
    }
  }

  static std::size_t mix(std::size_t x) noexcept { return x ^ (x >> 12) ^ (x >> 24); }

  // A reader whose slot still looks free sees, behind its own fence, what was unlinked before this one. Without the two, a
  // processor may let it read the old pointer before its slot is taken for others: the loads that follow are not seq_cst.
  void collect() noexcept {
    std::atomic_thread_fence(std::memory_order_seq_cst);
    std::uint64_t oldest = epoch_.load(std::memory_order_seq_cst);
    for (const Slot& slot : slots_) {
      const std::uint64_t entered = slot.entered.load(std::memory_order_seq_cst);
      if (entered != 0) oldest = std::min(oldest, entered);
    }
    const auto kept = std::partition(retired_.begin(), retired_.end(),
                                     [oldest](const Retired& retired) { return retired.epoch >= oldest; });
    for (auto retired = kept; retired != retired_.end(); ++retired) arena_.free(retired->memory, retired->bytes);
    retired_.erase(kept, retired_.end());
  }

  PageArena arena_;
  RegionArena regions_;
  std::array<Slot, kReaders> slots_;
  std::atomic<std::uint64_t> epoch_{1};
  std::mutex mutex_;
  std::vector<Retired> retired_;
};

}  // namespace freshet
