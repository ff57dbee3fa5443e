// One cache line of the index: five keys, what each stands for, and the sequence lock that guards them.
#pragma once

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>

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

struct KeyHandle {
  std::int64_t key;
  Handle handle;
};

// Bit i says that lane i of a comparison is true.
typedef std::int32_t Lanes4 __attribute__((vector_size(16)));
typedef std::int64_t Lanes2 __attribute__((vector_size(16)));
FRESHET_INLINE unsigned lanes_of(Lanes4 equal) noexcept {
#if defined(__SSE2__)
  return static_cast<unsigned>(_mm_movemask_ps(reinterpret_cast<__m128>(equal)));
#else
  equal &= Lanes4{1, 2, 4, 8};
  return static_cast<unsigned>(equal[0] | equal[1] | equal[2] | equal[3]);
#endif
}
FRESHET_INLINE unsigned lanes_of(Lanes2 equal) noexcept {
#if defined(__SSE2__)
  return static_cast<unsigned>(_mm_movemask_pd(reinterpret_cast<__m128d>(equal)));
#else
  equal &= Lanes2{1, 2};
  return static_cast<unsigned>(equal[0] | equal[1]);
#endif
}

// Invariants:
//  * a slot is empty exactly when its handle is kAbsent; the key of an empty slot means nothing;
//  * no two slots that are taken have the same key;
//  * `control` = version (27 bits) | retired | overflow (4 bits). The version is odd while the one writer changes the
//    bucket, or any byte of a row that one of its slots stands for. So a reader that finds the same even version before
//    and after has seen one state of the slots and of their rows;
//  * overflow counts the keys that found this bucket full and went on to a later one; 15 means 15 or more, for good:
//    then the segment is replaced at the next insertion;
//  * retired: the segment was replaced. Its rows now change under the locks of the new buckets: go back to the directory.
struct alignas(kCacheLine) Bucket {
  static constexpr std::size_t kSlots = 5;
  static constexpr std::uint32_t kOverflowMax = 15;
  static constexpr std::uint32_t kRetired = 1U << 4;
  static constexpr std::uint32_t kVersion = 1U << 5;

  std::atomic<std::uint32_t> control;
  std::atomic<Handle> handle[kSlots];
  std::atomic<std::int64_t> key[kSlots];

  // Before anyone else sees it.
  void clear() noexcept {
    std::memset(static_cast<void*>(this), 0xff, sizeof(Bucket));  // all handles kAbsent
    control.store(0, std::memory_order_relaxed);
  }

  // What the key stands for here. An empty slot may still have the key; it says kAbsent, as if it had not.
  // acquire: the row of a handle that is seen, proven or not, exists.
  FRESHET_INLINE Handle find(std::int64_t wanted) const noexcept {
    Handle found = kAbsent;
    for (unsigned equal = slots_with(wanted); equal != 0 && found == kAbsent; equal &= equal - 1) {
      found = at(static_cast<std::size_t>(__builtin_ctz(equal)));
    }
    return found;
  }
  // The slot of a handle that is here; with kAbsent the first that is empty, kSlots if none is. For the writer.
  FRESHET_INLINE std::size_t slot_of(Handle wanted) const noexcept {
    return static_cast<std::size_t>(__builtin_ctz(slots_of(wanted) | 1U << kSlots));
  }
  Handle at(std::size_t slot) const noexcept { return handle[slot].load(std::memory_order_acquire); }

  // The one writer of the shard, under a BucketLock.
  void set(std::size_t slot, std::int64_t of, Handle to) noexcept {
    key[slot].store(of, std::memory_order_relaxed);
    handle[slot].store(to, std::memory_order_release);
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

  // Bit i says that slot i has this key. All keys but the first are two vectors.
  FRESHET_INLINE unsigned slots_with(std::int64_t wanted) const noexcept {
#if FRESHET_TSAN
    unsigned equal = 0;
    for (unsigned slot = 0; slot < kSlots; ++slot) {
      equal |= unsigned{key[slot].load(std::memory_order_relaxed) == wanted} << slot;
    }
    return equal;
#else
    typedef std::int64_t Keys __attribute__((vector_size(16), may_alias));
    const auto* const keys = reinterpret_cast<const Keys*>(&key[1]);
    return unsigned{key[0].load(std::memory_order_relaxed) == wanted} | lanes_of(keys[0] == wanted) << 1 |
           lanes_of(keys[1] == wanted) << 3;
#endif
  }
  // Bit i says that slot i has this handle. The first half of the bucket is two vectors, of which five words count.
  FRESHET_INLINE unsigned slots_of(Handle wanted) const noexcept {
#if FRESHET_TSAN
    unsigned equal = 0;
    for (unsigned slot = 0; slot < kSlots; ++slot) {
      equal |= unsigned{handle[slot].load(std::memory_order_relaxed) == wanted} << slot;
    }
    return equal;
#else
    typedef Handle Words __attribute__((vector_size(16), may_alias));
    const auto* const words = reinterpret_cast<const Words*>(this);
    return (lanes_of(words[0] == wanted) >> 1 | lanes_of(words[1] == wanted) << 3) & ((1U << kSlots) - 1);
#endif
  }
  // False when it has just lost count.
  bool count_overflow() noexcept {
    const std::uint32_t now = control.load(std::memory_order_relaxed);
    if (overflow(now) < kOverflowMax) control.store(now + 1, std::memory_order_relaxed);
    return overflow(now) + 1 != kOverflowMax;
  }
  void uncount_overflow() noexcept {
    const std::uint32_t now = control.load(std::memory_order_relaxed);
    if (overflow(now) < kOverflowMax) control.store(now - 1, std::memory_order_relaxed);
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
