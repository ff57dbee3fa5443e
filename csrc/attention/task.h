// What the planner (attention.cc) hands to the kernels: plain data, the same for every instruction set.
#pragma once

#include <cstddef>

#include "attention.h"
#include "layer.h"
#include "sampled_softmax.h"
#include "softmax.h"
#include "time_table.h"

namespace freshet::attention {

constexpr std::size_t kKeyTile = 64;     // keys of a score tile
constexpr std::size_t kMaxRowTile = 48;  // rows of a score tile, at most

// Some consecutive rows of one sequence.
struct Task {
  const Inputs* in;
  const TimeTable* times;
  std::size_t first_key, keys;  // of the sequence
  std::size_t first_row, rows;  // of the task
  std::size_t own;              // key position, within the sequence, of the task's first row
  std::size_t row_tile;         // rows of a tile, a multiple of 4
  std::size_t seen, seen_end;   // its rows see no keys of the sequence but some of [seen, seen_end); seen begins a tile
};

// Where one task puts its share of the gradients. k and v are [end - first][heads][d]: of the keys [first, end) of the
// task's sequence, among which are all that it sees; first begins a tile.
struct TaskGradients {
  const void* y;
  void* q;
  void* k;
  void* v;
  std::size_t first, end;
  Storage key_storage;       // float32 where several tasks share a sequence and their parts are added up later
  double* position_weights;  // [min(positions, keys + 1)], or null
  double* time_weights;      // [kTimeBuckets], or null
};

// The kernels of one instruction set. `scratch` has scratch_floats(task, backward) floats, aligned to 64 bytes.
struct Kernels {
  const char* name;
  std::size_t (*scratch_floats)(const Task& task, bool backward);
  void (*forward)(const Task& task, void* y, float* scratch);
  void (*backward)(const Task& task, const TaskGradients& gradients, float* scratch);
  const LayerKernels* layer;
  const SoftmaxKernels* softmax;
  const SampledSoftmaxKernels* sampled_softmax;
};

// The best ones this machine runs, or those of FRESHET_ISA; throws std::invalid_argument as instruction_set() does.
const Kernels& kernels();

extern const Kernels kPortableKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

}  // namespace freshet::attention
