// The settings of one slot's table.
#pragma once

#include <cstddef>
#include <cstdint>

#include "optimizer.h"
#include "row_meta.h"

namespace freshet {

// Which ids get a row when gradients arrive for them.
enum class Admission {
  kAll,
  kThreshold,    // from the threshold-th occurrence on, counted exactly; before that an id is a candidate
  kProbability,  // each occurrence with a fixed probability, drawn from hash(seed, slot, id, update number)
};

// What happens to a new id when max_rows is reached.
enum class WhenFull {
  kRefuse,         // it gets no row; counted in refused_full
  kEvictStalest,   // of each neighbourhood in hash order, the rows not seen for longest go
  kEvictRarest,    // the same by occurrences
};

struct TableConfig {
  std::size_t dim = 0;
  OptimizerConfig optimizer;
  float init_scale = 0.05F;     // new weights are uniform in (-init_scale, init_scale)
  std::uint64_t seed = 0;
  std::uint64_t slot_hash = 0;  // a stable 64-bit hash of the slot's name

  Admission admission = Admission::kAll;
  std::uint32_t threshold = 1;  // 1 to Candidate::kMaxCount
  double probability = 1.0;     // above 0, at most 1

  std::int64_t ttl_us = 0;       // rows (and candidates) not seen for this long expire; 0 = never
  bool ttl_on_access = false;    // touch() counts as seeing, not updates alone
  std::size_t min_rows = 0;      // expiry never goes below this
  std::size_t sweep_steps = 1024; // updates in which the whole table is looked at once for what has expired

  std::size_t max_rows = 0;  // 0 = no bound
  WhenFull when_full = WhenFull::kRefuse;

  unsigned shards = 16;  // a power of two up to 256: how many threads can write. Results do not depend on it
};

}  // namespace freshet
