// Cross-entropy over a whole catalogue, and its gradients (float32): of row r with score s_v = scale x_r . e_v for each
// item v, the loss is log sum_v exp(s_v) - s_wanted. The gradients are taken while a tile's weights exp(s_v) are at
// hand; there are never more than those of kSoftmaxRows rows for each thread.
// Promises: a row's loss and gradient depend on that row and the items alone, to the bit; no result depends on the
// number of threads. A NaN among the scores of a row makes its loss NaN.
#pragma once

#include <cstddef>
#include <cstdint>

namespace freshet::attention {

constexpr std::size_t kSoftmaxRows = 48;   // rows of a tile
constexpr std::size_t kSoftmaxItems = 64;  // items of a tile

struct Softmax {
  std::size_t rows = 0, items = 0, dim = 0;
  const float* vectors = nullptr;        // [rows][dim]
  const float* item_vectors = nullptr;   // [items][dim]
  const std::int64_t* wanted = nullptr;  // [rows], each in [0, items)
  float scale = 1;
  std::size_t tiles() const { return (items + kSoftmaxItems - 1) / kSoftmaxItems; }
};

// Of the mean loss.
struct SoftmaxGradients {
  float* vectors = nullptr;  // both or none
  float* item_vectors = nullptr;
};

// The mean loss of the rows, of which there must be some. Throws std::invalid_argument for a wanted item that is none.
double catalogue_softmax(const Softmax& in, const SoftmaxGradients& out, std::size_t threads);

// The kernels of one instruction set. `packed` holds all items, `tile` what is kept of a tile of rows from `rows` to
// `item_gradients`; both aligned to 64 bytes. `sums_t` is [tiles()][dim][kSoftmaxItems].
struct SoftmaxKernels {
  std::size_t (*packed_floats)(const Softmax& in);
  std::size_t (*tile_floats)(const Softmax& in);
  void (*pack)(const Softmax& in, float* packed);
  // Rows [first, first + count): the loss of each and, unless null, the gradient by their vectors.
  void (*rows)(const Softmax& in, const float* packed, std::size_t first, std::size_t count, float* tile, double* loss,
               float* gradient);
  // Adds what those rows give to the gradient of one tile of items, but for the rows' wanted items.
  void (*item_gradients)(const Softmax& in, std::size_t item_tile, std::size_t count, float* tile, float* sums_t);
};

}  // namespace freshet::attention
