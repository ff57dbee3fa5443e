// Memory of the table that readers may still look at.
#include "reclaimer.h"

#include <array>

#include "failing_memory.h"
#include "table_test.h"

namespace freshet::testing {
namespace {

constexpr std::size_t kBytes = 1024;

void test_retired_memory_is_given_back_once_no_reader_can_see_it() {
  Reclaimer reclaimer;
  const auto retire_one = [&] {
    void* const memory = reclaimer.arena().allocate(kBytes);
    reclaimer.reserve();
    reclaimer.retire(memory, kBytes);  // whoever retires collects
  };
  {
    const Reclaimer::Guard reader(reclaimer);
    for (int i = 0; i < 3; ++i) retire_one();
    CHECK(reclaimer.arena().held_bytes() == 3 * kBytes);
  }
  retire_one();
  CHECK(reclaimer.arena().held_bytes() == 0);
}

// All writers of a table of 256 shards have reserved, and then there is no memory left.
void test_what_one_writer_was_promised_no_other_takes() {
  Reclaimer reclaimer;
  std::array<void*, 512> memory;
  for (void*& piece : memory) piece = reclaimer.arena().allocate(kBytes);
  const Reclaimer::Guard reader(reclaimer);
  for (std::size_t writer = 0; writer < memory.size() / 2; ++writer) reclaimer.reserve();
  const FailingMemory none(0, Outage::kForGood);
  for (void* const piece : memory) reclaimer.retire(piece, kBytes);  // std::terminate if it needed memory
  CHECK(!FailingMemory::has_failed());
}

}  // namespace
}  // namespace freshet::testing

int main() {
  freshet::testing::test_retired_memory_is_given_back_once_no_reader_can_see_it();
  freshet::testing::test_what_one_writer_was_promised_no_other_takes();
  std::puts("reclaimer_test: all passed");
  return 0;
}
