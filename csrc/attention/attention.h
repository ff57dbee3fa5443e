// Fused pointwise attention over jagged sequences (HSTU, arXiv 2402.17152, equation 2), forward and backward.
//
//   y_i = sum_j SiLU(alpha q_i.k_j + bias_ij) / normaliser * v_j
//
// over the keys j of the row's own sequence in [0, prefix_i) and [begin_i, end_i), and the row itself, once. Nothing of
// size keys x keys is ever in memory: scores exist for one tile at a time and are computed again in the backward pass.
//
// Promises:
//  * a row of y, and a row of the gradients of q, k and v, depend on their own sequence alone, to the bit;
//  * no result depends on the number of threads, to the bit;
//  * y of a row is the same whether its sequence has all its rows or only its last ones (cached keys).
// Results of different instruction sets differ by rounding.
#pragma once

#include <cstddef>
#include <cstdint>

namespace freshet::attention {

enum class Storage { kFloat32, kBfloat16 };

// What a call reads. All arrays but q, k and v are contiguous; a null pointer means "absent" where the comment says so.
struct Inputs {
  Storage storage = Storage::kFloat32;  // of q, k, v, y and their gradients
  std::size_t sequences = 0, rows = 0, keys = 0, heads = 0, dqk = 0, dv = 0;
  const void* q = nullptr;  // [rows][heads][dqk], a row every q_stride numbers
  const void* k = nullptr;  // [keys][heads][dqk]
  const void* v = nullptr;  // [keys][heads][dv]
  std::size_t q_stride = 0, k_stride = 0, v_stride = 0;
  const std::int64_t* offsets = nullptr;      // [sequences + 1], keys of each sequence
  const std::int64_t* row_offsets = nullptr;  // [sequences + 1], rows of each sequence: its last keys
  const std::int64_t* begin = nullptr;        // [rows], relative to the sequence's first key, as are end and prefix
  const std::int64_t* end = nullptr;          // [rows]
  const std::int64_t* prefix = nullptr;       // [rows], or absent
  float alpha = 1, normaliser = 1;
  const float* position_weights = nullptr;  // [positions] at clamp(end_i - j), or absent
  std::size_t positions = 0;
  const float* time_weights = nullptr;       // [129] at bucket(query_time_i - key_time_j), or absent
  const std::int64_t* boundaries = nullptr;  // [128] ascending: bucket = how many are <= |gap|; with time weights
  const std::int64_t* query_time = nullptr;  // [rows] seconds; with time weights
  const std::int64_t* key_time = nullptr;    // [keys] seconds; with time weights
  const std::int64_t* self_gap = nullptr;    // [rows] seconds, or absent: 0
};

// Where a backward call writes. The weights' gradients are written when the weights are there.
struct Gradients {
  const void* y = nullptr;  // read: [rows][heads][dv]
  void* q = nullptr;
  void* k = nullptr;
  void* v = nullptr;
  float* position_weights = nullptr;
  float* time_weights = nullptr;
};

// Both throw std::invalid_argument for offsets or intervals that leave their arrays.
void forward(const Inputs& in, void* y, std::size_t threads);
void backward(const Inputs& in, const Gradients& gradients, std::size_t threads);

// Instruction sets this machine can run, best first: "avx512", "avx2", "portable". The first one is used, unless the
// environment variable FRESHET_ISA names another; an unknown or unavailable name throws std::invalid_argument.
const char* instruction_set();

}  // namespace freshet::attention
