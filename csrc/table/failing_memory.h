// Memory that runs out when a test says so. Include it in one source of a program: it replaces the allocator.
#pragma once

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdlib>
#include <new>

namespace freshet::testing {

enum class Outage { kOnce, kForGood };

// Makes the allocation after `successes` more fail, in any thread: alone, or with all after it.
class FailingMemory {
 public:
  FailingMemory(long successes, Outage outage) {
    once().store(outage == Outage::kOnce);
    failed().store(false);
    left().store(successes);
  }
  ~FailingMemory() { left().store(kNever); }
  FailingMemory(const FailingMemory&) = delete;
  FailingMemory& operator=(const FailingMemory&) = delete;

  static bool has_failed() { return failed().load(); }

  static void* allocate(std::size_t bytes, std::size_t alignment) {
    if (left().load(std::memory_order_relaxed) != kNever && left().fetch_sub(1) <= 0) {
      if (!once().load() || !failed().load()) {
        failed().store(true);
        throw std::bad_alloc();
      }
    }
    void* const memory = alignment == 0
                             ? std::malloc(bytes == 0 ? 1 : bytes)
                             : std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
    if (memory == nullptr) throw std::bad_alloc();
    return memory;
  }

 private:
  static constexpr long kNever = 1L << 60;
  static std::atomic<long>& left() {
    static std::atomic<long> value{kNever};
    return value;
  }
  static std::atomic<bool>& once() {
    static std::atomic<bool> value{false};
    return value;
  }
  static std::atomic<bool>& failed() {
    static std::atomic<bool> value{false};
    return value;
  }
};

}  // namespace freshet::testing

// Not inlined: GCC would otherwise see malloc and delete (or new and free) and warn of a mismatch.
[[gnu::noinline]] void* operator new(std::size_t n) { return freshet::testing::FailingMemory::allocate(n, 0); }
[[gnu::noinline]] void* operator new[](std::size_t n) { return freshet::testing::FailingMemory::allocate(n, 0); }
[[gnu::noinline]] void* operator new(std::size_t n, std::align_val_t a) {
  return freshet::testing::FailingMemory::allocate(n, static_cast<std::size_t>(a));
}
[[gnu::noinline]] void* operator new(std::size_t n, const std::nothrow_t&) noexcept {
  try {
    return freshet::testing::FailingMemory::allocate(n, 0);
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}
extern "C" int posix_memalign(void** memory, std::size_t alignment, std::size_t bytes) noexcept {
  try {
    *memory = freshet::testing::FailingMemory::allocate(bytes, alignment);
  } catch (const std::bad_alloc&) {
    return ENOMEM;
  }
  return 0;
}
[[gnu::noinline]] void operator delete(void* p) noexcept { std::free(p); }
[[gnu::noinline]] void operator delete[](void* p) noexcept { std::free(p); }
[[gnu::noinline]] void operator delete(void* p, std::size_t) noexcept { std::free(p); }
[[gnu::noinline]] void operator delete[](void* p, std::size_t) noexcept { std::free(p); }
[[gnu::noinline]] void operator delete(void* p, std::align_val_t) noexcept { std::free(p); }
[[gnu::noinline]] void operator delete(void* p, std::size_t, std::align_val_t) noexcept { std::free(p); }
