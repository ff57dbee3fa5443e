// Plans a call: checks it, cuts it into tasks, runs them on threads, and adds up what several tasks share.
#include "attention.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "../common/parallel.h"
#include "scratch_pool.h"
#include "task.h"

namespace freshet::attention {
namespace {

// Rows of a task. A longer sequence is cut, so that threads can share it; where it is cut depends on nothing else.
constexpr std::size_t kTaskRows = 1024;
// Tasks of a sequence in the backward pass, at most: each keeps its share of the gradients of the keys that it sees until
// all are added up, so their memory is at most so many times that of these gradients, however long the sequence.
constexpr std::size_t kBackwardTasks = 8;

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

void check(const Inputs& in) {
  require(in.heads > 0 && in.dqk > 0 && in.dv > 0, "attention needs at least one head and one number per head");
  require(in.q_stride >= in.heads * in.dqk && in.k_stride >= in.heads * in.dqk && in.v_stride >= in.heads * in.dv,
          "a row of q, k or v overlaps the next one");
  require(in.normaliser > 0, "the attention normaliser must be positive");
  require(in.offsets[0] == 0 && in.row_offsets[0] == 0, "offsets must begin with 0");
  require(in.offsets[in.sequences] == static_cast<std::int64_t>(in.keys), "offsets must end with the number of keys");
  require(in.row_offsets[in.sequences] == static_cast<std::int64_t>(in.rows),
          "row_offsets must end with the number of rows");
  require(in.position_weights == nullptr || in.positions > 0, "position weights must not be empty");
  for (std::size_t s = 0; s < in.sequences; ++s) {
    const std::int64_t keys = in.offsets[s + 1] - in.offsets[s], rows = in.row_offsets[s + 1] - in.row_offsets[s];
    require(rows >= 0 && in.row_offsets[s + 1] <= in.row_offsets[in.sequences], "row_offsets must ascend");
    require(rows <= keys, "a sequence needs as many keys as rows at least");
    for (std::int64_t i = in.row_offsets[s]; i < in.row_offsets[s + 1]; ++i) {
      require(0 <= in.begin[i] && in.begin[i] <= in.end[i] && in.end[i] <= keys, "an interval leaves its sequence");
      require(in.prefix == nullptr || (0 <= in.prefix[i] && in.prefix[i] <= keys), "a prefix leaves its sequence");
    }
  }
}

std::size_t row_tile(std::size_t keys) { return keys <= 256 ? 24 : 48; }

struct Plan {
  std::vector<Task> tasks;         // in the order of their rows
  std::vector<std::size_t> order;  // the most work first, so that threads end together
  std::vector<std::size_t> first;  // [sequences + 1]: the tasks of each sequence
};

std::size_t rows_of_a_task(std::size_t rows, bool backward) {
  if (!backward || rows <= kTaskRows * kBackwardTasks) return kTaskRows;
  return ((rows + kBackwardTasks - 1) / kBackwardTasks + kMaxRowTile - 1) / kMaxRowTile * kMaxRowTile;
}

// The keys that some row of the task may see, from the beginning of a tile on.
void set_seen(Task& task) {
  const Inputs& in = *task.in;
  std::size_t seen = task.own, end = task.own + task.rows;  // each row sees itself
  for (std::size_t i = task.first_row; i < task.first_row + task.rows; ++i) {
    const bool has_prefix = in.prefix != nullptr && in.prefix[i] > 0;
    if (in.begin[i] < in.end[i]) seen = std::min(seen, static_cast<std::size_t>(in.begin[i]));
    if (has_prefix) seen = 0, end = std::max(end, static_cast<std::size_t>(in.prefix[i]));
    end = std::max(end, static_cast<std::size_t>(in.end[i]));
  }
  task.seen = seen / kKeyTile * kKeyTile;
  task.seen_end = end;
}

Plan make_plan(const Inputs& in, const TimeTable& times, bool backward) {
  Plan plan;
  std::vector<std::int64_t> work;
  for (std::size_t s = 0; s < in.sequences; ++s) {
    plan.first.push_back(plan.tasks.size());
    const auto first_key = static_cast<std::size_t>(in.offsets[s]),
               first_row = static_cast<std::size_t>(in.row_offsets[s]);
    const std::size_t keys = static_cast<std::size_t>(in.offsets[s + 1]) - first_key;
    const std::size_t rows = static_cast<std::size_t>(in.row_offsets[s + 1]) - first_row;
    const std::size_t most = rows_of_a_task(rows, backward);
    for (std::size_t from = 0; from < rows; from += most) {
      const std::size_t count = std::min(most, rows - from);
      plan.tasks.push_back(
          {&in, &times, first_key, keys, first_row + from, count, keys - rows + from, row_tile(keys), 0, keys});
      set_seen(plan.tasks.back());
      std::int64_t pairs = static_cast<std::int64_t>(count) * 32;
      for (std::size_t i = first_row + from; i < first_row + from + count; ++i) {
        pairs += in.end[i] - in.begin[i] + (in.prefix != nullptr ? in.prefix[i] : 0);
      }
      work.push_back(pairs);
    }
  }
  plan.first.push_back(plan.tasks.size());
  plan.order.resize(plan.tasks.size());
  std::iota(plan.order.begin(), plan.order.end(), std::size_t{0});
  std::stable_sort(plan.order.begin(), plan.order.end(),
                   [&](std::size_t a, std::size_t b) { return work[a] > work[b]; });
  return plan;
}

// Runs f(task number, scratch) for every task of the plan.
template <typename F>
void run(const Plan& plan, const Kernels& isa, bool backward, std::size_t threads, const F& f) {
  std::size_t floats = 1;
  for (const Task& task : plan.tasks) floats = std::max(floats, isa.scratch_floats(task, backward));
  ScratchPool pool(floats);
  parallel_for(plan.tasks.size(), threads, [&](std::size_t i) {
    const ScratchPool::Lease scratch(pool);
    f(plan.order[i], scratch.data());
  });
}

TimeTable time_table(const Inputs& in) {
  return in.time_weights != nullptr ? make_time_table(in.boundaries) : TimeTable{};
}

std::size_t storage_bytes(Storage storage) { return storage == Storage::kFloat32 ? 4 : 2; }

void store(double value, void* to, Storage storage, std::size_t at) {
  const auto rounded = static_cast<float>(value);
  if (storage == Storage::kFloat32) {
    static_cast<float*>(to)[at] = rounded;
    return;
  }
  std::uint32_t bits;
  std::memcpy(&bits, &rounded, sizeof bits);
  bits = rounded != rounded ? bits | 0x400000 : bits + 0x7fff + ((bits >> 16) & 1);
  static_cast<std::uint16_t*>(to)[at] = static_cast<std::uint16_t>(bits >> 16);
}

// The gradient of the keys (or values) of sequences that several tasks share.
struct SharedKeys {
  std::vector<std::vector<float>> parts;  // per task: of what it sees; empty for a task that has its sequence alone

  SharedKeys(const Plan& plan, std::size_t width) : parts(plan.tasks.size()) {
    for (std::size_t s = 0; s + 1 < plan.first.size(); ++s) {
      if (plan.first[s + 1] - plan.first[s] < 2) continue;
      for (std::size_t t = plan.first[s]; t < plan.first[s + 1]; ++t) {
        parts[t].resize((plan.tasks[t].seen_end - plan.tasks[t].seen) * width);
      }
    }
  }

  void add_up(const Plan& plan, const Inputs& in, std::size_t width, void* out, std::size_t threads) const {
    parallel_for(in.sequences, threads, [&](std::size_t s) {
      if (plan.first[s + 1] - plan.first[s] < 2) return;
      const auto first = static_cast<std::size_t>(in.offsets[s]), end = static_cast<std::size_t>(in.offsets[s + 1]);
      std::vector<double> sums(width);
      for (std::size_t key = 0; key < end - first; ++key) {
        std::fill(sums.begin(), sums.end(), 0.0);
        for (std::size_t t = plan.first[s]; t < plan.first[s + 1]; ++t) {
          if (key < plan.tasks[t].seen || key >= plan.tasks[t].seen_end) continue;
          const float* const part = parts[t].data() + (key - plan.tasks[t].seen) * width;
          for (std::size_t i = 0; i < width; ++i) sums[i] += static_cast<double>(part[i]);
        }
        for (std::size_t i = 0; i < width; ++i) store(sums[i], out, in.storage, (first + key) * width + i);
      }
    });
  }
};

// The gradient of the bias weights: a sum per task, added up in the order of the tasks.
struct WeightSums {
  std::vector<std::size_t> first;
  std::vector<double> sums;

  explicit WeightSums(const Plan& plan, std::size_t positions) {
    first.push_back(0);
    for (const Task& task : plan.tasks) {
      first.push_back(first.back() + (positions != 0 ? std::min(positions, task.keys + 1) : 0));
    }
    sums.resize(first.back());
  }

  void add_up(std::size_t count, float* out) const {
    std::vector<double> total(count, 0.0);
    for (std::size_t t = 0; t + 1 < first.size(); ++t) {
      for (std::size_t i = first[t]; i < first[t + 1]; ++i) total[i - first[t]] += sums[i];
    }
    std::transform(total.begin(), total.end(), out, [](double value) { return static_cast<float>(value); });
  }
};

// Keys of a sequence without rows have no task: their gradient is zero.
void clear_keys_without_rows(const Plan& plan, const Inputs& in, const Gradients& out) {
  const std::size_t bytes = in.heads * storage_bytes(in.storage);
  for (std::size_t s = 0; s < in.sequences; ++s) {
    if (plan.first[s + 1] != plan.first[s]) continue;
    const auto first = static_cast<std::size_t>(in.offsets[s]),
               count = static_cast<std::size_t>(in.offsets[s + 1]) - first;
    if (count == 0) continue;
    std::memset(static_cast<char*>(out.k) + first * in.dqk * bytes, 0, count * in.dqk * bytes);
    std::memset(static_cast<char*>(out.v) + first * in.dv * bytes, 0, count * in.dv * bytes);
  }
}

}  // namespace

void forward(const Inputs& in, void* y, std::size_t threads) {
  check(in);
  const Kernels& isa = kernels();
  const TimeTable times = time_table(in);
  const Plan plan = make_plan(in, times, false);
  run(plan, isa, false, threads, [&](std::size_t t, float* scratch) { isa.forward(plan.tasks[t], y, scratch); });
}

void backward(const Inputs& in, const Gradients& out, std::size_t threads) {
  check(in);
  const Kernels& isa = kernels();
  const TimeTable times = time_table(in);
  const Plan plan = make_plan(in, times, true);
  clear_keys_without_rows(plan, in, out);
  SharedKeys shared_k(plan, in.heads * in.dqk), shared_v(plan, in.heads * in.dv);
  WeightSums positions(plan, in.position_weights != nullptr ? in.positions : 0);
  std::vector<double> times_sums(plan.tasks.size() * kTimeBuckets);
  run(plan, isa, true, threads, [&](std::size_t t, float* scratch) {
    const Task& task = plan.tasks[t];
    TaskGradients part{out.y,
                       out.q,
                       nullptr,
                       nullptr,
                       0,
                       task.keys,
                       in.storage,
                       positions.sums.data() + positions.first[t],
                       &times_sums[t * kTimeBuckets]};
    if (shared_k.parts[t].empty()) {
      const std::size_t bytes = task.first_key * in.heads * storage_bytes(in.storage);
      part.k = static_cast<char*>(out.k) + bytes * in.dqk;
      part.v = static_cast<char*>(out.v) + bytes * in.dv;
    } else {
      part.k = shared_k.parts[t].data();
      part.v = shared_v.parts[t].data();
      part.first = task.seen;
      part.end = task.seen_end;
      part.key_storage = Storage::kFloat32;
    }
    isa.backward(task, part, scratch);
  });
  shared_k.add_up(plan, in, in.heads * in.dqk, out.k, threads);
  shared_v.add_up(plan, in, in.heads * in.dv, out.v, threads);
  if (in.position_weights != nullptr) positions.add_up(in.positions, out.position_weights);
  if (in.time_weights == nullptr) return;
  for (std::size_t b = 0; b < kTimeBuckets; ++b) {
    double sum = 0;
    for (std::size_t t = 0; t < plan.tasks.size(); ++t) sum += times_sums[t * kTimeBuckets + b];
    out.time_weights[b] = static_cast<float>(sum);
  }
}

}  // namespace freshet::attention
