// Plans the softmax over a catalogue: some tiles of rows at a time, first each for its rows, then all for each tile of
// items, whose gradient so has one writer and one order of additions, whatever the number of threads.
#include "softmax.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "../common/parallel.h"
#include "scratch_pool.h"
#include "task.h"

namespace freshet::attention {
namespace {

constexpr std::size_t kMostFloats = std::size_t{1} << 28;  // of weights at hand (1 GiB), unless one tile has more

void check(const Softmax& in) {
  if (in.rows == 0 || in.items == 0 || in.dim == 0) {
    throw std::invalid_argument("a softmax needs rows, items and numbers in their vectors");
  }
  for (std::size_t r = 0; r < in.rows; ++r) {
    if (in.wanted[r] < 0 || static_cast<std::size_t>(in.wanted[r]) >= in.items) {
      throw std::invalid_argument("wanted item " + std::to_string(in.wanted[r]) + " of row " + std::to_string(r) +
                                  " is none of the " + std::to_string(in.items));
    }
  }
}

// The turned sums of all rows, and from each wanted item its rows' share.
void store_item_gradients(const Softmax& in, const float* sums_t, float* to) {
  for (std::size_t v = 0; v < in.items; ++v) {
    const float* from = sums_t + v / kSoftmaxItems * in.dim * kSoftmaxItems + v % kSoftmaxItems;
    for (std::size_t d = 0; d < in.dim; ++d) to[v * in.dim + d] = from[d * kSoftmaxItems];
  }
  const float share = in.scale / static_cast<float>(in.rows);
  for (std::size_t r = 0; r < in.rows; ++r) {
    float* const item = to + static_cast<std::size_t>(in.wanted[r]) * in.dim;
    for (std::size_t d = 0; d < in.dim; ++d) item[d] -= in.vectors[r * in.dim + d] * share;
  }
}

}  // namespace

double catalogue_softmax(const Softmax& in, const SoftmaxGradients& out, std::size_t threads) {
  check(in);
  const SoftmaxKernels& isa = *kernels().softmax;
  const std::size_t row_tiles = (in.rows + kSoftmaxRows - 1) / kSoftmaxRows, floats = isa.tile_floats(in);
  const std::size_t at_once = std::max<std::size_t>(1, std::min({threads, row_tiles, kMostFloats / floats}));
  ScratchPool items(isa.packed_floats(in)), scratch(at_once * floats);
  const ScratchPool::Lease packed(items), tiles(scratch);
  isa.pack(in, packed.data());
  std::vector<float> sums_t(out.vectors != nullptr ? in.tiles() * in.dim * kSoftmaxItems : 0);
  std::vector<double> loss(in.rows);
  const auto count = [&](std::size_t tile) { return std::min(kSoftmaxRows, in.rows - tile * kSoftmaxRows); };
  for (std::size_t start = 0; start < row_tiles; start += at_once) {
    const std::size_t now = std::min(at_once, row_tiles - start);
    parallel_for(now, threads, [&](std::size_t i) {
      const std::size_t first = (start + i) * kSoftmaxRows;
      isa.rows(in, packed.data(), first, count(start + i), tiles.data() + i * floats, &loss[first],
               out.vectors != nullptr ? out.vectors + first * in.dim : nullptr);
    });
    if (out.vectors == nullptr) continue;
    const std::size_t parts = std::min(in.tiles(), 4 * threads);
    parallel_for(parts, threads, [&](std::size_t part) {
      for (std::size_t tile = in.tiles() * part / parts; tile < in.tiles() * (part + 1) / parts; ++tile) {
        for (std::size_t i = 0; i < now; ++i) {
          isa.item_gradients(in, tile, count(start + i), tiles.data() + i * floats, sums_t.data());
        }
      }
    });
  }
  if (out.vectors != nullptr) store_item_gradients(in, sums_t.data(), out.item_vectors);
  double total = 0;
  for (const double one : loss) total += one;
  return total / static_cast<double>(in.rows);
}

}  // namespace freshet::attention
