// One cache line of the index: twelve tags, what each stands for, and the sequence lock that guards them.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "../common/parallel.h"
#include "../common/platform.h"

namespace freshet {

// What a key stands for: a row, numbered below 2^31, or with the top bit set a candidate: an id that was seen but has no
// row yet.
using Handle = std::uint32_t;
inline constexpr Handle kAbsent = 0xffffffffU;  // the answer for a key that stands for nothing
inline constexpr Handle kCandidateBit = 0x80000000U;
inline constexpr bool is_row(Handle handle) noexcept { return (handle & kCandidateBit) == 0; }
inline constexpr bool is_candidate(Handle handle) noexcept { return !is_row(handle) && handle != kAbsent; }

// Eight bits of the hash, never 0. A tag only says which rows are worth a look: identity is the full key in the row.
using Tag = std::uint8_t;
inline constexpr Tag tag_of(std::uint64_t hash) noexcept {
  return static_cast<Tag>(1 + ((hash & 0xff) * 255 >> 8));
}

// Slots of a bucket, a bit each.
class SlotSet {
 public:
  SlotSet() = default;
  explicit SlotSet(std::uint32_t slots) noexcept : slots_(slots) {}
  bool empty() const noexcept { return slots_ == 0; }
  std::size_t first() const noexcept { return static_cast<std::size_t>(__builtin_ctz(slots_)); }
  void remove_first() noexcept { slots_ &= slots_ - 1; }

 private:
  std::uint32_t slots_ = 0;
};

// Invariants:
//  * a slot is empty exactly when its tag is 0; the handle of an empty slot means nothing;
//  * `control` = version (27 bits) | retired | overflow (4 bits). The version is odd while the one writer changes the
//    bucket, or any byte of a row that one of its slots stands for. So a reader that finds the same even version before
//    and after has seen one state of the slots and of their rows;
//  * overflow counts the keys that found this bucket full and went on to a later one; 15 means 15 or more, for good;
//  * retired: the segment was replaced. Its rows now change under the locks of the new buckets: go back to the directory.
struct alignas(kCacheLine) Bucket {
  static constexpr std::size_t kSlots = 12;
  static constexpr std::uint32_t kOverflowMax = 15;
  static constexpr std::uint32_t kRetired = 1U << 4;
  static constexpr std::uint32_t kVersion = 1U << 5;

  std::atomic<std::uint64_t> tags_low;   // slots 0 to 7, a byte each
  std::atomic<std::uint32_t> tags_high;  // slots 8 to 11
  std::atomic<std::uint32_t> control;
  std::atomic<Handle> handle[kSlots];

  void clear() noexcept {
    tags_low.store(0, std::memory_order_relaxed);
    tags_high.store(0, std::memory_order_relaxed);
    control.store(0, std::memory_order_relaxed);
    for (std::atomic<Handle>& h : handle) h.store(0, std::memory_order_relaxed);
  }

  // Slots with this tag; with tag 0, the empty ones.
  SlotSet slots_with(Tag tag) const noexcept {
    constexpr std::uint64_t kOnes = 0x0101010101010101ULL;
    const std::uint64_t low = tags_low.load(std::memory_order_relaxed) ^ kOnes * tag;
    const std::uint64_t high = tags_high.load(std::memory_order_relaxed) ^ (kOnes * tag & 0xffffffffU);
    return SlotSet(zero_bytes(low) | (zero_bytes(high) & 0xfU) << 8);
  }
  // acquire: the row of a handle that is seen, proven or not, exists.
  Handle at(std::size_t slot) const noexcept { return handle[slot].load(std::memory_order_acquire); }

  // The one writer of the shard, under a BucketLock.
  void set(std::size_t slot, Tag tag, Handle to) noexcept {
    handle[slot].store(to, std::memory_order_release);
    if (slot < 8) {
      const std::uint64_t rest = tags_low.load(std::memory_order_relaxed) & ~(std::uint64_t{0xff} << 8 * slot);
      tags_low.store(rest | std::uint64_t{tag} << 8 * slot, std::memory_order_relaxed);
    } else {
      const std::uint32_t rest = tags_high.load(std::memory_order_relaxed) & ~(0xffU << 8 * (slot - 8));
      tags_high.store(rest | std::uint32_t{tag} << 8 * (slot - 8), std::memory_order_relaxed);
    }
  }

  static bool changing(std::uint32_t control) noexcept { return (control & kVersion) != 0; }
  static bool retired(std::uint32_t control) noexcept { return (control & kRetired) != 0; }
  static std::uint32_t overflow(std::uint32_t control) noexcept { return control & kOverflowMax; }

  // Readers: begin_read, read, and believe it only if end_read says so.
  std::uint32_t begin_read() const noexcept {
    std::uint32_t seen = control.load(std::memory_order_acquire);
    while (changing(seen)) {
      cpu_pause();
      seen = control.load(std::memory_order_acquire);
    }
    return seen;
  }
  bool end_read(std::uint32_t seen) const noexcept {
    std::atomic_thread_fence(std::memory_order_acquire);
    return control.load(std::memory_order_relaxed) == seen;
  }

  void begin_change() noexcept {
    control.store(control.load(std::memory_order_relaxed) + kVersion, std::memory_order_relaxed);
    std::atomic_thread_fence(std::memory_order_release);
  }
  void end_change() noexcept {
    control.store(control.load(std::memory_order_relaxed) + kVersion, std::memory_order_release);
  }
  void retire() noexcept { control.store(control.load(std::memory_order_relaxed) | kRetired, std::memory_order_release); }
  void count_overflow() noexcept {
    const std::uint32_t now = control.load(std::memory_order_relaxed);
    if (overflow(now) < kOverflowMax) control.store(now + 1, std::memory_order_relaxed);
  }
  void uncount_overflow() noexcept {
    const std::uint32_t now = control.load(std::memory_order_relaxed);
    if (overflow(now) < kOverflowMax) control.store(now - 1, std::memory_order_relaxed);
  }

 private:
  // Bit k is set if byte k is zero.
  static std::uint32_t zero_bytes(std::uint64_t x) noexcept {
    constexpr std::uint64_t kLow7 = 0x7f7f7f7f7f7f7f7fULL, kGather = 0x0102040810204080ULL;
    const std::uint64_t marks = ~(((x & kLow7) + kLow7) | x | kLow7);  // 0x80 in each byte that is zero
    return static_cast<std::uint32_t>((marks >> 7) * kGather >> 56);
  }
};
static_assert(sizeof(Bucket) == kCacheLine, "a probe should cost one cache line");

// Scope of a change.
class BucketLock {
 public:
  explicit BucketLock(Bucket& bucket) noexcept : bucket_(bucket) { bucket_.begin_change(); }
  ~BucketLock() { bucket_.end_change(); }
  BucketLock(const BucketLock&) = delete;
  BucketLock& operator=(const BucketLock&) = delete;

 private:
  Bucket& bucket_;
};

}  // namespace freshet
