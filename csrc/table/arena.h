// Memory for the index and the bookkeeping: runs of 4 KB pages out of huge pages, so that a random access costs one
// cache miss and not a second one for the address translation.
#pragma once

#include <stdlib.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <unordered_map>
#include <vector>

#include "../common/platform.h"

namespace freshet {

inline constexpr std::size_t kHugePage = std::size_t{2} << 20;

// More was asked for than a table can ever need; memory may be free.
class TooManyPages : public std::bad_alloc {
 public:
  const char* what() const noexcept override {
    return "too many ids agree in the upper bits of their hashes, or a shard holds some 200 M ids; give the table more "
           "shards, or keep out ids that were made to collide";
  }
};

// bytes on a boundary of `align`; asks for huge pages where it is large enough for one. std::bad_alloc.
inline void* allocate_aligned(std::size_t bytes, std::size_t align) {
  void* memory = nullptr;
  if (posix_memalign(&memory, align, std::max(bytes, kCacheLine)) != 0) throw std::bad_alloc();
#if defined(__linux__)
  if (align >= kHugePage) madvise(memory, bytes / kHugePage * kHugePage, MADV_HUGEPAGE);  // only a wish
#endif
  return memory;
}

// Memory that is kept until the end, one piece after the other out of large regions, so that all of it lies in huge pages.
// What is not used yet of a region is address space alone. Any thread.
class RegionArena {
 public:
  RegionArena() = default;
  ~RegionArena() {
    for (void* const region : regions_) std::free(region);
  }
  RegionArena(const RegionArena&) = delete;
  RegionArena& operator=(const RegionArena&) = delete;

  // bytes on a pair of cache lines. std::bad_alloc.
  void* allocate(std::size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    bytes = (bytes + kLinePair - 1) / kLinePair * kLinePair;
    if (bytes > left_) add_region(bytes);
    left_ -= bytes;
    next_ += bytes;
    return next_ - bytes;
  }

 private:
  static constexpr std::size_t kRegion = 8 * kHugePage;

  void add_region(std::size_t bytes) {
    const std::size_t size = std::max(kRegion, (bytes + kHugePage - 1) / kHugePage * kHugePage);
    regions_.reserve(regions_.size() + 1);
    next_ = static_cast<char*>(allocate_aligned(size, kHugePage));
    left_ = size;
    regions_.push_back(next_);
  }

  std::mutex mutex_;
  std::vector<void*> regions_;
  char* next_ = nullptr;
  std::size_t left_ = 0;
};

// Invariants: a page of a chunk is taken exactly when its bit is set; what is given back merges with free neighbours by
// itself. What is small comes from the heap, so that a small table holds no huge page. Any thread.
class PageArena {
 public:
  PageArena() = default;
  ~PageArena() {
    for (const auto& chunk : chunks_) std::free(chunk->memory);
  }
  PageArena(const PageArena&) = delete;
  PageArena& operator=(const PageArena&) = delete;

  std::size_t held_bytes() const noexcept { return held_.load(std::memory_order_relaxed); }

  // bytes on a cache line. std::bad_alloc.
  void* allocate(std::size_t bytes) {
    if (bytes < kSmall) {
      void* const memory = allocate_aligned(bytes, kCacheLine);
      held_.fetch_add(bytes, std::memory_order_relaxed);
      return memory;
    }
    const std::size_t pages = pages_of(bytes);
    if (pages > kPages) throw TooManyPages();  // a directory that deep is the work of ids chosen to collide
    const std::lock_guard<std::mutex> lock(mutex_);
    for (std::size_t tried = 0; tried < chunks_.size(); ++tried) {
      Chunk& chunk = *chunks_[next_];
      if (chunk.free >= pages) {
        const std::size_t first = chunk.find(pages);
        if (first != kPages) return chunk.take(first, pages);
      }
      next_ = next_ + 1 == chunks_.size() ? 0 : next_ + 1;
    }
    return add_chunk().take(0, pages);
  }

  void free(void* memory, std::size_t bytes) noexcept {
    if (bytes < kSmall) {
      std::free(memory);
      held_.fetch_sub(bytes, std::memory_order_relaxed);
      return;
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto address = reinterpret_cast<std::uintptr_t>(memory);
    const std::size_t number = by_address_.find(address / kHugePage)->second;
    chunks_[number]->give_back(address % kHugePage / kPage, pages_of(bytes));
    next_ = std::min(next_, number);  // fill what is half empty before the rest
  }

 private:
  static constexpr std::size_t kPage = 4096;
  static constexpr std::size_t kPages = kHugePage / kPage;
  static constexpr std::size_t kSmall = 2 * kPage;

  struct Chunk {
    char* memory;
    std::size_t free = kPages;
    std::vector<bool> taken = std::vector<bool>(kPages, false);

    // The first run of free pages, kPages if there is none.
    std::size_t find(std::size_t pages) const noexcept {
      std::size_t run = 0;
      for (std::size_t page = 0; page < kPages; ++page) {
        run = taken[page] ? 0 : run + 1;
        if (run == pages) return page + 1 - pages;
      }
      return kPages;
    }
    void* take(std::size_t first, std::size_t pages) noexcept {
      std::fill_n(taken.begin() + static_cast<std::ptrdiff_t>(first), pages, true);
      free -= pages;
      return memory + first * kPage;
    }
    void give_back(std::size_t first, std::size_t pages) noexcept {
      std::fill_n(taken.begin() + static_cast<std::ptrdiff_t>(first), pages, false);
      free += pages;
    }
  };

  static std::size_t pages_of(std::size_t bytes) noexcept { return (bytes + kPage - 1) / kPage; }

  Chunk& add_chunk() {
    auto chunk = std::make_unique<Chunk>();
    chunks_.reserve(chunks_.size() + 1);
    void* const memory = allocate_aligned(kHugePage, kHugePage);
    chunk->memory = static_cast<char*>(memory);
    try {
      by_address_.emplace(reinterpret_cast<std::uintptr_t>(memory) / kHugePage, chunks_.size());
    } catch (...) {
      std::free(memory);
      throw;
    }
    next_ = chunks_.size();
    chunks_.push_back(std::move(chunk));
    held_.fetch_add(kHugePage, std::memory_order_relaxed);
    return *chunks_.back();
  }

  std::mutex mutex_;
  std::vector<std::unique_ptr<Chunk>> chunks_;
  std::unordered_map<std::uintptr_t, std::size_t> by_address_;
  std::size_t next_ = 0;
  std::atomic<std::size_t> held_{0};
};

}  // namespace freshet
