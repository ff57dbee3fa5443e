// What depends on the compiler or the CPU: runtime dispatch, prefetching, and copies that may race.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__SANITIZE_THREAD__)
#define FRESHET_TSAN 1
#else
#define FRESHET_TSAN 0
#endif

// Compiles the function for AVX-512, AVX2 and the base architecture; the loader picks by CPU. All results are equal to
// the bit: nothing is built with floating-point contraction. Sanitizers run before the loader's pick, so not there.
// noexcept, all of them: GCC 12 takes calls of such functions for calls that never throw, and what they throw past a
// `try` or a destructor ends the process.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_THREAD__) && \
    !defined(__SANITIZE_ADDRESS__)
#define FRESHET_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FRESHET_CLONES
#endif

// For the body of a loop that runs inside a FRESHET_CLONES function: it takes on the caller's instructions.
#define FRESHET_INLINE inline __attribute__((always_inline))

namespace freshet {

inline constexpr std::size_t kCacheLine = 64;
inline constexpr std::size_t kLinePair = 2 * kCacheLine;  // what the L2 prefetchers of x86 fetch together

enum class Intent { kRead, kWrite };

// Always inlined: GCC takes a function that only prefetches for one without effect, and drops calls of it.
template <Intent intent>
FRESHET_INLINE void prefetch(const void* p) noexcept {
  __builtin_prefetch(p, intent == Intent::kWrite ? 1 : 0, 3);
}

// Sends for the cache line at p into L2: on its way to L1 it would hold one of that cache's few fill buffers until it
// comes, and L2 has several times as many (docs/experiments.md). Good for what will be written, too: a line that no other
// core has comes for this one alone.
FRESHET_INLINE void prefetch_line(const void* p) noexcept { __builtin_prefetch(p, 0, 2); }

// The same for every line of the row [p, p + bytes), each once.
FRESHET_INLINE void prefetch_row(const void* p, std::size_t bytes) noexcept {
  const char* const end = static_cast<const char*>(p) + bytes;
  const char* line = static_cast<const char*>(p) - reinterpret_cast<std::uintptr_t>(p) % kCacheLine;
  for (; line < end; line += kCacheLine) prefetch_line(line);
}

// Calls part(from, count) for all of [0, n), elements of which a cache line has kLine: of every four lines the upper two
// first. Lines of rows that lie anywhere, taken in rising order, make the processor send for what lies behind each row,
// and that takes the place of rows that are really wanted (docs/experiments.md).
template <std::size_t kLine, typename Part>
FRESHET_INLINE void upper_lines_first(std::size_t n, const Part& part) {
  const auto in_place = [&](std::size_t from, std::size_t count) __attribute__((always_inline)) {
    part(from, count);
    std::atomic_signal_fence(std::memory_order_seq_cst);  // compilers may not change the order
  };
  std::size_t at = 0;
  for (; at + 4 * kLine <= n; at += 4 * kLine) {
    in_place(at + 2 * kLine, 2 * kLine);
    in_place(at, 2 * kLine);
  }
  if (at < n) part(at, n - at);
}

// Copies whole rows: vectors of the caller's width, then words. bytes must be a multiple of 4.
FRESHET_INLINE void copy_words(const void* from, std::size_t bytes, void* to) noexcept {
  // GCC takes a vector wider than the registers through the stack, so not wider than AVX2's.
  typedef std::uint32_t Vector __attribute__((vector_size(32), aligned(4), may_alias));
  const char* const source = static_cast<const char*>(from);
  char* const target = static_cast<char*>(to);
  upper_lines_first<kCacheLine>(bytes, [=](std::size_t at, std::size_t count) __attribute__((always_inline)) {
    const std::size_t end = at + count;
#pragma GCC unroll 2
    for (; at + kCacheLine <= end; at += kCacheLine) {
      const Vector first = *reinterpret_cast<const Vector*>(source + at);
      const Vector second = *reinterpret_cast<const Vector*>(source + at + sizeof(Vector));
      *reinterpret_cast<Vector*>(target + at) = first;
      *reinterpret_cast<Vector*>(target + at + sizeof(Vector)) = second;
    }
    for (; at < end; at += 4) std::memcpy(target + at, source + at, 4);
  });
}

// Copies a row that a writer may be changing; the caller validates the copy afterwards (sequence lock) and throws a torn
// one away. Rows are multiples of 4 bytes. ThreadSanitizer sees atomic words; the release build copies in vectors.
FRESHET_INLINE void copy_racy(const void* from, std::size_t bytes, void* to) noexcept {
#if FRESHET_TSAN
  for (std::size_t at = 0; at < bytes; at += 4) {
    const std::uint32_t word =
        __atomic_load_n(reinterpret_cast<const std::uint32_t*>(static_cast<const char*>(from) + at), __ATOMIC_RELAXED);
    std::memcpy(static_cast<char*>(to) + at, &word, 4);
  }
#else
  copy_words(from, bytes, to);
#endif
}

// Lets f(row) change a row that readers may be copying.
template <typename F>
FRESHET_INLINE void change_racy(void* row, std::size_t bytes, const F& f) {
#if FRESHET_TSAN
  static thread_local std::vector<char> memory;
  memory.resize(bytes);
  char* const scratch = memory.data();
  std::memcpy(scratch, row, bytes);
  f(static_cast<void*>(scratch));
  for (std::size_t at = 0; at < bytes; at += 4) {
    std::uint32_t word;
    std::memcpy(&word, scratch + at, 4);
    __atomic_store_n(reinterpret_cast<std::uint32_t*>(static_cast<char*>(row) + at), word, __ATOMIC_RELAXED);
  }
#else
  (void)bytes;
  f(row);
#endif
}

}  // namespace freshet
