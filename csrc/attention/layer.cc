// Plans the calls of layer.h: cuts the rows into tasks, runs them on threads, adds up the gradients of the weights.
#include "layer.h"

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "../common/parallel.h"
#include "scratch_pool.h"
#include "task.h"

namespace freshet::attention {
namespace {

// At most 16 tasks (each has sums of its own), of at least 1,008 rows: a function of the number of rows alone.
std::size_t rows_per_task(std::size_t rows) {
  return std::max<std::size_t>(1008, (rows + 16 * 48 - 1) / (16 * 48) * 48);
}

std::size_t tasks(std::size_t rows) { return (rows + rows_per_task(rows) - 1) / rows_per_task(rows); }

// Calls f(task, first row, last row, scratch) for all tasks.
template <typename F>
void run(std::size_t rows, std::size_t threads, std::size_t floats, const F& f) {
  ScratchPool pool(floats);
  const std::size_t step = rows_per_task(rows);
  parallel_for(tasks(rows), threads, [&](std::size_t task) {
    const ScratchPool::Lease scratch(pool);
    f(task, task * step, std::min(rows, (task + 1) * step), scratch.data());
  });
}

struct Part {
  float* to;  // null: there is no such weight
  std::size_t count;
};

// sums: for each task, the parts one after the other.
void add_up(const std::vector<float>& sums, std::size_t stride, std::initializer_list<Part> parts) {
  std::size_t at = 0;
  for (const Part& part : parts) {
    if (part.to == nullptr) continue;
    for (std::size_t i = 0; i < part.count; ++i) {
      double sum = 0;
      for (std::size_t from = at + i; from < sums.size(); from += stride) sum += static_cast<double>(sums[from]);
      part.to[i] = static_cast<float>(sum);
    }
    at += part.count;
  }
}

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

void check(const LayerNorm& norm) {
  require((norm.weight == nullptr) == (norm.bias == nullptr),
          "a layer norm needs weight and bias or neither: give nn.LayerNorm bias=True or elementwise_affine=False");
}

void check(const Project& in) {
  check(in.norm);
  std::size_t columns = 0;
  for (const std::size_t part : in.parts) columns += part;
  require(in.dim > 0 && columns > 0 && columns == in.columns,
          "a projection needs numbers in, and as many out as its parts");
  require(in.silu_columns <= columns, "SiLU on more columns than there are");
}

void check(const Finish& in) {
  check(in.norm);
  require(in.dim > 0 && in.width > 0, "the end of a layer needs numbers in and out");
  require(in.dropout >= 0 && in.dropout < 1, "dropout must be at least 0 and below 1");
}

}  // namespace

void project_forward(const Project& in, float* const parts[kParts], std::size_t threads) {
  check(in);
  const LayerKernels& isa = *kernels().layer;
  ScratchPool weights(isa.project_packed(in));
  const ScratchPool::Lease packed(weights);
  isa.pack_project(in, packed.data());
  run(in.rows, threads, isa.project_floats(in, false),
      [&](std::size_t, std::size_t first, std::size_t last, float* scratch) {
        isa.project_forward(in, packed.data(), first, last, parts, scratch);
      });
}

void project_backward(const Project& in, const ProjectGradients& out, std::size_t threads) {
  check(in);
  const LayerKernels& isa = *kernels().layer;
  ScratchPool weights(isa.project_packed(in));
  const ScratchPool::Lease packed(weights);
  isa.pack_project(in, packed.data());
  const std::size_t stride =
      in.dim * in.columns + (in.bias != nullptr ? in.columns : 0) + (in.norm.weight != nullptr ? 2 * in.dim : 0);
  std::vector<float> sums(tasks(in.rows) * stride);
  run(in.rows, threads, isa.project_floats(in, true),
      [&](std::size_t task, std::size_t first, std::size_t last, float* scratch) {
        isa.project_backward(in, packed.data(), first, last, out, sums.data() + task * stride, scratch);
      });
  add_up(sums, stride,
         {{out.weight, in.dim * in.columns},
          {in.bias != nullptr ? out.bias : nullptr, in.columns},
          {in.norm.weight != nullptr ? out.norm_weight : nullptr, in.dim},
          {in.norm.weight != nullptr ? out.norm_bias : nullptr, in.dim}});
}

void finish_forward(const Finish& in, float* y, std::size_t threads) {
  check(in);
  const LayerKernels& isa = *kernels().layer;
  ScratchPool weights(isa.finish_packed(in));
  const ScratchPool::Lease packed(weights);
  isa.pack_finish(in, packed.data());
  run(in.rows, threads, isa.finish_floats(in, false),
      [&](std::size_t, std::size_t first, std::size_t last, float* scratch) {
        isa.finish_forward(in, packed.data(), first, last, y, scratch);
      });
}

void finish_backward(const Finish& in, const FinishGradients& out, std::size_t threads) {
  check(in);
  const LayerKernels& isa = *kernels().layer;
  ScratchPool weights(isa.finish_packed(in));
  const ScratchPool::Lease packed(weights);
  isa.pack_finish(in, packed.data());
  const std::size_t stride =
      in.dim * in.inputs() + (in.bias != nullptr ? in.dim : 0) + (in.norm.weight != nullptr ? 2 * in.width : 0);
  std::vector<float> sums(tasks(in.rows) * stride);
  run(in.rows, threads, isa.finish_floats(in, true),
      [&](std::size_t task, std::size_t first, std::size_t last, float* scratch) {
        isa.finish_backward(in, packed.data(), first, last, out, sums.data() + task * stride, scratch);
      });
  add_up(sums, stride,
         {{out.weight, in.dim * in.inputs()},
          {in.bias != nullptr ? out.bias : nullptr, in.dim},
          {in.norm.weight != nullptr ? out.norm_weight : nullptr, in.width},
          {in.norm.weight != nullptr ? out.norm_bias : nullptr, in.width}});
}

}  // namespace freshet::attention
