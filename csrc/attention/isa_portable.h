// Four floats: vectors of the compiler's own, which become SSE2 or NEON.
#pragma once

#include <cstddef>
#include <cstdint>

namespace freshet::attention {
namespace {

struct Isa {
  static constexpr std::size_t kLanes = 4;
  static constexpr std::size_t kBlockRows = 6;
  typedef float Floats __attribute__((vector_size(16)));
  typedef std::int32_t Ints __attribute__((vector_size(16)));
  static Floats lookup(const float* table, Ints index) {
    return Floats{table[index[0]], table[index[1]], table[index[2]], table[index[3]]};
  }
  static Ints lookup(const std::int32_t* table, Ints index) {
    return Ints{table[index[0]], table[index[1]], table[index[2]], table[index[3]]};
  }
  static bool all_equal(Ints v) { return v[0] == v[1] && v[0] == v[2] && v[0] == v[3]; }
};

}  // namespace
}  // namespace freshet::attention
