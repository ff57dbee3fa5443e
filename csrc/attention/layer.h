// The rest of an HSTU layer around attention, fused (float32):
//   project:  [u | v | q | k] = SiLU(norm(x) W + b)                    (arXiv 2402.17152, equation 1)
//   finish:   y = x + dropout(gate(u, norm(a))) W' + b'                (equation 3)
// Nothing between input and output is kept for the backward pass; it is computed again, row tile by row tile.
// Promises: a row of an output, and of a gradient by x, u or a, depends on that row alone, to the bit; no result
// depends on the number of threads.
#pragma once

#include <cstddef>
#include <cstdint>

namespace freshet::attention {

constexpr std::size_t kParts = 4;

struct LayerNorm {
  const float* weight = nullptr;  // both or none
  const float* bias = nullptr;
  float epsilon = 1e-6f;
};

struct Project {
  std::size_t rows = 0, dim = 0;
  std::size_t parts[kParts] = {};             // columns of each part; their sum is `columns`
  std::size_t columns = 0, silu_columns = 0;  // SiLU on the first silu_columns of them
  const float* x = nullptr;                   // [rows][dim]
  const float* weight = nullptr;              // [dim][columns]
  const float* bias = nullptr;                // [columns], or absent
  LayerNorm norm;
};

struct ProjectGradients {
  const float* parts[kParts] = {};  // read: [rows][parts[i]]
  float* x = nullptr;
  float* weight = nullptr;
  float* bias = nullptr;  // where there is one, as below
  float* norm_weight = nullptr;
  float* norm_bias = nullptr;
};

enum class Gate { kProduct, kConcat, kConcatRaw };  // u*n, [u, n, u*n] or [u, a, u*n], with n = norm(a)

struct Finish {
  std::size_t rows = 0, dim = 0, width = 0;
  Gate gate = Gate::kProduct;
  const float* x = nullptr;       // [rows][dim]
  const float* u = nullptr;       // [rows][width]
  const float* a = nullptr;       // [rows][width]
  const float* weight = nullptr;  // [dim][inputs()]
  const float* bias = nullptr;    // [dim], or absent
  LayerNorm norm;
  float dropout = 0;  // probability of a zero; the others are divided by 1 - dropout
  std::uint64_t seed = 0;
  std::size_t inputs() const { return gate == Gate::kProduct ? width : 3 * width; }
};

// The gradient by x is that of y.
struct FinishGradients {
  const float* y = nullptr;  // read
  float* u = nullptr;
  float* a = nullptr;
  float* weight = nullptr;
  float* bias = nullptr;
  float* norm_weight = nullptr;
  float* norm_bias = nullptr;
};

void project_forward(const Project& in, float* const parts[kParts], std::size_t threads);
void project_backward(const Project& in, const ProjectGradients& out, std::size_t threads);
void finish_forward(const Finish& in, float* y, std::size_t threads);
void finish_backward(const Finish& in, const FinishGradients& out, std::size_t threads);

// The kernels of one instruction set: rows [first, last) of a call. `weights` are those packed by pack_*; `sums`
// (zeroed by the caller) takes the task's share of the gradients of weight, bias, norm_weight and norm_bias, in this
// order.
struct LayerKernels {
  std::size_t (*project_floats)(const Project& in, bool backward);  // scratch
  std::size_t (*finish_floats)(const Finish& in, bool backward);
  std::size_t (*project_packed)(const Project& in);  // floats of the packed weights
  std::size_t (*finish_packed)(const Finish& in);
  void (*pack_project)(const Project& in, float* packed);
  void (*pack_finish)(const Finish& in, float* packed);
  void (*project_forward)(const Project& in, const float* packed, std::size_t first, std::size_t last,
                          float* const parts[kParts], float* scratch);
  void (*project_backward)(const Project& in, const float* packed, std::size_t first, std::size_t last,
                           const ProjectGradients& out, float* sums, float* scratch);
  void (*finish_forward)(const Finish& in, const float* packed, std::size_t first, std::size_t last, float* y,
                         float* scratch);
  void (*finish_backward)(const Finish& in, const float* packed, std::size_t first, std::size_t last,
                          const FinishGradients& out, float* sums, float* scratch);
};

}  // namespace freshet::attention
