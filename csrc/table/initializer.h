// Weights of fresh rows: a pure function of (seed, slot, id), so replays and replicas agree to the bit.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/platform.h"
#include "hash.h"

namespace freshet {

// Weight j is draw j of splitmix64 seeded by hash(table_key, id): its top 24 bits k give (2k + 1 - 2^24) / 2^24, exact
// in float, uniform and symmetric about 0; times scale, the only rounding.
FRESHET_INLINE void init_weights(std::uint64_t table_key, std::int64_t id, float scale, std::size_t dim,
                                 float* weights) noexcept {
  const std::uint64_t row_key = mix64(table_key ^ hash_id(id));
  for (std::size_t j = 0; j < dim; ++j) {
    const auto k = static_cast<std::int32_t>(mix64(row_key + (j + 1) * kGolden) >> 40);
    weights[j] = static_cast<float>(2 * k + 1 - (1 << 24)) * 0x1p-24F * scale;
  }
}

}  // namespace freshet
