// Plans the softmax over each row's own candidates: first the rows, then the items, of which each adds up what the rows
// gave to it, in the order of the rows. So it has one writer, and no result depends on the number of threads.
#include "sampled_softmax.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "../common/parallel.h"
#include "scratch_pool.h"
#include "task.h"

namespace freshet::attention {
namespace {

constexpr std::size_t kTaskRows = 64;

void check_items(const SampledSoftmax& in, const char* what, const std::int64_t* chosen, std::size_t each) {
  for (std::size_t i = 0; i < in.rows * each; ++i) {
    if (chosen[i] < 0 || static_cast<std::size_t>(chosen[i]) >= in.items) {
      throw std::invalid_argument(std::string(what) + " item " + std::to_string(chosen[i]) + " of row " +
                                  std::to_string(i / each) + " is none of the " + std::to_string(in.items));
    }
  }
}

void check(const SampledSoftmax& in) {
  if (in.rows == 0 || in.items == 0 || in.dim == 0) {
    throw std::invalid_argument("a softmax needs rows, items and numbers in their vectors");
  }
  if (in.rows > std::numeric_limits<std::uint32_t>::max()) throw std::invalid_argument("a batch has at most 2^32 rows");
  check_items(in, "wanted", in.wanted, 1);
  check_items(in, "drawn", in.drawn, in.samples);
}

// [count][dim] -> [count][wide], zeros behind.
void pad(const float* from, std::size_t count, std::size_t dim, std::size_t wide, std::size_t threads, float* to) {
  const std::size_t parts = std::min(count, threads);
  parallel_for(parts, threads, [&](std::size_t part) {
    for (std::size_t i = count * part / parts; i < count * (part + 1) / parts; ++i) {
      std::memcpy(to + i * wide, from + i * dim, dim * sizeof(float));
      std::fill(to + i * wide + dim, to + (i + 1) * wide, 0.0F);
    }
  });
}

// The slopes by item: those of item v are [starts[v], starts[v + 1]) of `slopes`, rows ascending.
struct ByItem {
  std::vector<std::size_t> starts;
  std::vector<Slope> slopes;
};

ByItem by_item(const SampledSoftmax& in, const std::vector<float>& slopes) {
  ByItem out{std::vector<std::size_t>(in.items + 1), {}};
  const auto for_each = [&](const auto& visit) {
    for (std::size_t r = 0; r < in.rows; ++r) {
      const float* const own = &slopes[r * in.candidates()];
      visit(static_cast<std::size_t>(in.wanted[r]), r, own[0]);
      for (std::size_t i = 0; i < in.samples; ++i) {
        visit(static_cast<std::size_t>(in.drawn[r * in.samples + i]), r, own[i + 1]);
      }
    }
  };
  for_each([&](std::size_t item, std::size_t, float) { ++out.starts[item + 1]; });
  for (std::size_t v = 0; v < in.items; ++v) out.starts[v + 1] += out.starts[v];
  out.slopes.resize(out.starts.back());
  std::vector<std::size_t> next(out.starts.begin(), out.starts.end() - 1);
  for_each([&](std::size_t item, std::size_t row, float slope) {
    out.slopes[next[item]++] = {static_cast<std::uint32_t>(row), slope};
  });
  return out;
}

}  // namespace

double sampled_softmax(const SampledSoftmax& in, const SoftmaxGradients& out, std::size_t threads) {
  check(in);
  const SampledSoftmaxKernels& isa = *kernels().sampled_softmax;
  const std::size_t wide = isa.wide(in.dim);
  ScratchPool inputs((in.rows + in.items) * wide), scratch(isa.row_floats(in));
  const ScratchPool::Lease padded(inputs);
  float* const vectors = padded.data();
  float* const items = vectors + in.rows * wide;
  pad(in.vectors, in.rows, in.dim, wide, threads, vectors);
  pad(in.item_vectors, in.items, in.dim, wide, threads, items);
  const bool gradients = out.vectors != nullptr;
  std::vector<double> loss(in.rows);
  std::vector<float> slopes(gradients ? in.rows * in.candidates() : 0);
  parallel_for((in.rows + kTaskRows - 1) / kTaskRows, threads, [&](std::size_t task) {
    const std::size_t first = task * kTaskRows, count = std::min(kTaskRows, in.rows - first);
    const ScratchPool::Lease own(scratch);
    isa.rows(in, vectors, items, first, count, own.data(), &loss[first],
             gradients ? out.vectors + first * in.dim : nullptr,
             gradients ? &slopes[first * in.candidates()] : nullptr);
  });
  if (gradients) {
    const ByItem sorted = by_item(in, slopes);
    const std::size_t parts = std::min(in.items, 4 * threads);
    parallel_for(parts, threads, [&](std::size_t part) {
      for (std::size_t v = in.items * part / parts; v < in.items * (part + 1) / parts; ++v) {
        isa.item_gradient(in, vectors, sorted.slopes.data() + sorted.starts[v], sorted.starts[v + 1] - sorted.starts[v],
                          out.item_vectors + v * in.dim);
      }
    });
  }
  double total = 0;
  for (const double one : loss) total += one;
  return total / static_cast<double>(in.rows);
}

}  // namespace freshet::attention
