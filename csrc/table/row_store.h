// Rows of bytes in slabs: stable addresses, a free list, no allocator call per row.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <vector>

#include "bucket.h"
#include "reclaimer.h"

namespace freshet {

// Where the bytes of a row lie, by its number: the same for all stores of rows of that size.
//
// Rows come in groups of 32, headers first: [32 headers][32 rows]. So rows of whole cache lines begin on an even one: the
// processor fetches lines in pairs, and half a pair before and after each row would cost a third of the bandwidth. Other
// rows lie close: what would fill their last line costs more memory than the line it would save costs time.
//
// The first slab has 64 rows and each next one doubles the store, until a slab has about 2 MB and all have that size:
// tiny tables stay tiny, and the address of a row in a large one costs a shift and one load.
struct RowLayout {
  static constexpr std::size_t kGroup = 32;
  static constexpr unsigned kFirstShift = 6;
  static constexpr Handle kFirstRows = Handle{1} << kFirstShift;

  std::size_t header_bytes;
  std::size_t stride;
  std::size_t rows_at;  // in a group
  std::size_t group_bytes;
  unsigned shift;           // a full slab has 2^shift rows
  std::size_t small_slabs;  // slab number of the first row whose number is 2^shift, less one

  RowLayout(std::size_t header, std::size_t row_bytes) noexcept
      : header_bytes(header),
        stride((row_bytes + 3) / 4 * 4),
        rows_at((kGroup * header + kLinePair - 1) / kLinePair * kLinePair),
        group_bytes(rows_at + kGroup * stride),
        shift(choose_shift(group_bytes / kGroup)),
        small_slabs(shift - kFirstShift) {}

  struct Place {
    char* group;
    std::size_t lane;
  };
  FRESHET_INLINE Place place_in(char* const* slabs, Handle handle) const noexcept {
    if ((handle >> shift) != 0) {
      const std::size_t i = handle & ((Handle{1} << shift) - 1);
      return {slab_at(slabs, small_slabs + (handle >> shift)) + i / kGroup * group_bytes, i % kGroup};
    }
    const unsigned level = handle < kFirstRows ? 0 : 32 - kFirstShift - static_cast<unsigned>(__builtin_clz(handle));
    const std::size_t i = level == 0 ? handle : handle - (kFirstRows << (level - 1));
    return {slab_at(slabs, level) + i / kGroup * group_bytes, i % kGroup};
  }
  // The place n < 32 rows on, if the slab goes on so far.
  FRESHET_INLINE Place after(Place place, std::size_t n) const noexcept {
    const std::size_t lane = place.lane + n;
    return lane < kGroup ? Place{place.group, lane} : Place{place.group + group_bytes, lane - kGroup};
  }
  FRESHET_INLINE char* header(Place place) const noexcept { return place.group + place.lane * header_bytes; }
  FRESHET_INLINE char* row(Place place) const noexcept { return place.group + rows_at + place.lane * stride; }

  std::size_t rows_in(std::size_t slab) const noexcept {
    if (slab > small_slabs) return std::size_t{1} << shift;
    return std::size_t{kFirstRows} << (slab == 0 ? 0 : slab - 1);
  }
  std::size_t slab_bytes(std::size_t slab) const noexcept { return rows_in(slab) / kGroup * group_bytes; }

 private:
  // Atomic, because a reader that knows of no row asks for the address of row 0 (flight.h) while the first slab comes.
  FRESHET_INLINE static char* slab_at(char* const* slabs, std::size_t i) noexcept {
    return __atomic_load_n(slabs + i, __ATOMIC_RELAXED);
  }
  static unsigned choose_shift(std::size_t bytes_per_row) noexcept {
    unsigned shift = kFirstShift;
    while (shift < 16 && (bytes_per_row << shift) < kHugePage) ++shift;
    return shift;
  }
};

// Invariants:
//  * a row's address never changes while the store lives: growing adds a slab and copies no row;
//  * every row number below end() is either taken or on the free list; a freed row is used again before a new one;
//  * `reserve(n)` makes n calls of `take` safe, `reserve_back(n)` n calls of `give_back`; neither then allocates.
// One writer; any thread may ask for the address of a row that it has the number of, under a Reclaimer::Guard.
class RowStore {
 public:
  RowStore(Reclaimer* reclaimer, std::size_t header_bytes, std::size_t row_bytes)
      : reclaimer_(reclaimer), layout_(header_bytes, row_bytes) {}
  ~RowStore() {
    char** const slabs = slabs_.load();
    for (std::size_t i = 0; i < count_; ++i) {
      if (layout_.slab_bytes(i) < kHugePage) std::free(slabs[i]);
    }
    if (room_ != 0) reclaimer_->arena().free(slabs, room_ * sizeof(char*));
  }
  RowStore(const RowStore&) = delete;
  RowStore& operator=(const RowStore&) = delete;

  const RowLayout& layout() const noexcept { return layout_; }
  // With the store's layout, which may be a copy of it in registers.
  FRESHET_INLINE RowLayout::Place place_of(const RowLayout& layout, Handle handle) const noexcept {
    return layout.place_in(slabs_.load(std::memory_order_acquire), handle);
  }
  char* header(Handle handle) const noexcept { return layout_.header(place_of(layout_, handle)); }
  char* row(Handle handle) const noexcept { return layout_.row(place_of(layout_, handle)); }

  std::size_t bytes_per_row() const noexcept { return layout_.group_bytes / RowLayout::kGroup; }
  std::size_t capacity() const noexcept { return capacity_shown_.load(std::memory_order_relaxed); }  // rows in slabs

  // std::bad_alloc, or std::length_error beyond 2^31 - 1 rows: nothing has changed.
  void reserve(std::size_t rows) {
    reserve_back(rows);  // what was taken can be given back, when a later step fails
    while (free_.size() + (capacity_ - end_) < rows) add_slab();
  }
  void reserve_back(std::size_t rows) {
    if (free_.capacity() < free_.size() + rows) free_.reserve(2 * (free_.size() + rows));
  }

  Handle take() noexcept {
    if (free_.empty()) return end_++;
    const Handle handle = free_.back();
    free_.pop_back();
    return handle;
  }
  void give_back(Handle handle) noexcept { free_.push_back(handle); }

  // While the row at `taken` is written, sends for one that a later call of `take` will give: some rows on, or, used
  // again, anywhere.
  FRESHET_INLINE void prefetch_after(RowLayout::Place taken) const noexcept {
    constexpr std::size_t kAhead = 2, kFreeAhead = 8;
    if (free_.size() > kFreeAhead) {
      taken = place_of(layout_, free_[free_.size() - 1 - kFreeAhead]);
    } else {
      taken = layout_.after(taken, kAhead);
    }
    prefetch<Intent::kWrite>(layout_.header(taken));
    prefetch_row(layout_.row(taken), layout_.stride);
  }

 private:
  void add_slab() {
    const std::size_t rows = layout_.rows_in(count_);
    if (capacity_ + rows > kCandidateBit) throw std::length_error("a shard of the table cannot have more than 2^31 rows");
    grow_directory();
    const std::size_t bytes = layout_.slab_bytes(count_);
    void* const slab =
        bytes < kHugePage ? allocate_aligned(bytes, kLinePair) : reclaimer_->regions().allocate(bytes);
    // Relaxed: no reader has the number of one of its rows yet.
    __atomic_store_n(slabs_.load(std::memory_order_relaxed) + count_++, static_cast<char*>(slab), __ATOMIC_RELAXED);
    capacity_ += rows;
    capacity_shown_.store(capacity_, std::memory_order_relaxed);
  }

  void grow_directory() {
    if (count_ < room_) return;
    const std::size_t room = room_ == 0 ? 8 : 2 * room_;
    reclaimer_->reserve();
    auto** const grown = static_cast<char**>(reclaimer_->arena().allocate(room * sizeof(char*)));
    char** const old = slabs_.load(std::memory_order_relaxed);
    if (count_ != 0) std::memcpy(grown, old, count_ * sizeof(char*));
    slabs_.store(grown, std::memory_order_release);
    if (room_ != 0) reclaimer_->retire(old, room_ * sizeof(char*));
    room_ = room;
  }

  Reclaimer* const reclaimer_;
  const RowLayout layout_;
  static inline char* no_slab_ = nullptr;
  std::atomic<char**> slabs_{&no_slab_};  // so that row 0 has an address, if no memory, in an empty store too
  std::size_t count_ = 0;
  std::size_t room_ = 0;  // of slabs_
  std::size_t capacity_ = 0;
  Handle end_ = 0;
  std::vector<Handle> free_;
  std::atomic<std::size_t> capacity_shown_{0};  // capacity_, for other threads
};

}  // namespace freshet
