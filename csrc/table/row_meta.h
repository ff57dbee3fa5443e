// The header of every row, and the records of candidates.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "bucket.h"
#include "epoch_log.h"

namespace freshet {

// Event times are kept in whole seconds: 0 = unknown. A time is rounded up, so that nothing expires too early.
using Seconds = std::uint32_t;
inline constexpr std::int64_t kMicroseconds = 1000000;
inline constexpr std::int64_t kMaxTimeUs = std::int64_t{0xffffffff} * kMicroseconds;  // in the year 2106

inline Seconds to_seconds(std::int64_t us) noexcept {
  return static_cast<Seconds>((std::min(us, kMaxTimeUs) + kMicroseconds - 1) / kMicroseconds);
}
// std::invalid_argument: a clock that such a time has set would make everything else look stale.
inline void check_time(const char* what, std::int64_t us) {
  if (us >= 0 && us <= kMaxTimeUs) return;
  throw std::invalid_argument(std::string(what) + " must be microseconds from 0 (unknown) to " + std::to_string(kMaxTimeUs) +
                              " (the year 2106), got " + std::to_string(us) + "; nothing was changed");
}
inline std::int64_t to_microseconds(Seconds s) noexcept { return std::int64_t{s} * kMicroseconds; }

// Changed by the writer under the lock of the row's bucket, read by others under the same rule as the floats.
struct RowMeta {
  std::atomic<Epoch> dirty_epoch;    // of the last change
  std::atomic<Seconds> last_seen;    // newest event that updated (or, by setting, read) the row
  std::atomic<std::uint16_t> count;  // events in updates; stays at its largest value
  std::atomic<std::uint16_t> saved;  // number of the last snapshot that has the row (or that is older than the row)

  void add(std::uint32_t events) noexcept {
    const std::uint32_t sum = count.load(std::memory_order_relaxed) + events;
    count.store(static_cast<std::uint16_t>(std::min<std::uint32_t>(sum, 0xffff)), std::memory_order_relaxed);
  }
  void see(Seconds now) noexcept {
    if (now > last_seen.load(std::memory_order_relaxed)) last_seen.store(now, std::memory_order_relaxed);
  }
};
static_assert(sizeof(RowMeta) == 12, "bookkeeping is a promise: see TableStats::overhead_bytes");

// An id that was seen but not admitted: how often, and in which hour (mod 2^16) last; hour 0 = unknown.
struct Candidate {
  static constexpr std::uint32_t kMaxCount = 0xffff;
  static constexpr std::int64_t kMaxTtlUs = std::int64_t{1000} * 86400 * kMicroseconds;  // below half of 2^16 hours, with room

  std::uint32_t count;
  std::uint32_t hour;

  static Candidate from(std::uint32_t word) noexcept { return {word & 0xffffU, word >> 16}; }
  std::uint32_t word() const noexcept { return hour << 16 | count; }
  static std::uint32_t hour_of(Seconds s) noexcept {
    const std::uint32_t hour = s / 3600 & 0xffffU;
    return hour == 0 && s != 0 ? 1 : hour;
  }
  // Whether it was last seen later than at `now`: its hour, of which the upper bits are lost, is less than half of all before.
  bool is_after(Seconds now) const noexcept { return hour != 0 && ((hour_of(now) - hour) & 0xffffU) >= 0x8000U; }
  // Whole hours from its last event to `now`; 0 if that is unknown, or later.
  std::uint32_t age_hours(Seconds now) const noexcept {
    return hour == 0 || is_after(now) ? 0 : (hour_of(now) - hour) & 0xffffU;
  }
};

// The 4 bytes that a candidate takes instead of a row.
struct CandidateRecord {
  std::atomic<std::uint32_t> word;
};

}  // namespace freshet
