// Cross-entropy of each row's wanted item among that one and the row's own drawn items, and its gradients (float32): of
// row r with scores s_v = scale x_r . e_v, the loss is log sum_v exp(s_v) - s_wanted, over the wanted item and each of
// the drawn ones, as often as it was drawn; a drawn item that is the wanted one is out. The rows' [rows][samples][dim]
// vectors never exist.
// Promises: as softmax.h.
#pragma once

#include <cstddef>
#include <cstdint>

#include "softmax.h"

namespace freshet::attention {

struct SampledSoftmax {
  std::size_t rows = 0, items = 0, dim = 0, samples = 0;
  const float* vectors = nullptr;        // [rows][dim]
  const float* item_vectors = nullptr;   // [items][dim]
  const std::int64_t* wanted = nullptr;  // [rows], each in [0, items)
  const std::int64_t* drawn = nullptr;   // [rows][samples], the same
  float scale = 1;
  std::size_t candidates() const { return samples + 1; }  // of a row: the wanted item, then the drawn ones
};

// The mean loss of the rows, of which there must be some. Throws std::invalid_argument for an item that is none.
double sampled_softmax(const SampledSoftmax& in, const SoftmaxGradients& out, std::size_t threads);

// d loss / d score of one of a row's candidates.
struct Slope {
  std::uint32_t row;
  float value;
};

// The kernels of one instruction set. `vectors` and `items` are those of the call, padded with zeros to rows of
// wide(dim) floats on 64 bytes.
struct SampledSoftmaxKernels {
  std::size_t (*wide)(std::size_t dim);
  std::size_t (*row_floats)(const SampledSoftmax& in);  // of `scratch`, which is aligned to 64 bytes
  // Rows [first, first + count): the loss of each; unless null, the gradient by their vectors, and into slopes
  // [count][candidates] d loss / d score.
  void (*rows)(const SampledSoftmax& in, const float* vectors, const float* items, std::size_t first, std::size_t count,
               float* scratch, double* loss, float* gradient, float* slopes);
  // The gradient of one item: sum of slope x vector, in this order.
  void (*item_gradient)(const SampledSoftmax& in, const float* vectors, const Slope* slopes, std::size_t count,
                        float* gradient);
};

}  // namespace freshet::attention
