// The kernels of every instruction set this machine has, against the definition in double.
#include "attention.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

int failures = 0;

void expect(bool condition, const std::string& what) {
  if (condition) return;
  ++failures;
  std::fprintf(stderr, "FAILED: %s\n", what.c_str());
}

std::vector<std::int64_t> boundaries() {
  std::vector<std::int64_t> out;
  for (int b = 1; b <= 128; ++b) out.push_back(static_cast<std::int64_t>(std::ceil(std::exp(0.301 * b))));
  return out;
}

void test_vectors();                        // simd_test.cc
void test_layers(const std::string& isa);   // layer_test.cc
void test_softmax(const std::string& isa);  // softmax_test.cc

namespace {

using freshet::attention::Gradients;
using freshet::attention::Inputs;
using freshet::attention::Storage;

// One random call and its arrays.
struct Call {
  std::vector<std::int64_t> offsets{0}, row_offsets{0}, begin, end, prefix, query_time, key_time, self_gap,
      bounds = boundaries();
  std::vector<float> q, k, v, y_gradient, position, time;
  Inputs in;

  Call(const std::vector<std::size_t>& keys, const std::vector<std::size_t>& rows, std::size_t heads, std::size_t dqk,
       std::size_t dv, std::int64_t time_range, unsigned seed) {
    std::mt19937_64 random(seed);
    const auto below = [&](std::int64_t n) {
      return static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(n));
    };
    const auto fill = [&](std::vector<float>& to, std::size_t n, float scale) {
      to.resize(n);
      for (float& x : to) x = scale * (static_cast<float>(below(20001)) / 10000 - 1);
    };
    for (std::size_t s = 0; s < keys.size(); ++s) {
      offsets.push_back(offsets.back() + static_cast<std::int64_t>(keys[s]));
      row_offsets.push_back(row_offsets.back() + static_cast<std::int64_t>(rows[s]));
      const auto n = static_cast<std::int64_t>(keys[s]);
      for (std::size_t r = 0; r < rows[s]; ++r) {
        const std::int64_t a = below(n + 1), b = below(n + 1);
        begin.push_back(std::min(a, b)), end.push_back(std::max(a, b)), prefix.push_back(below(4) ? 0 : below(n + 1));
        query_time.push_back(below(time_range)), self_gap.push_back(below(1000));
      }
      for (std::size_t j = 0; j < keys[s]; ++j) key_time.push_back(below(time_range));
    }
    in.sequences = keys.size(), in.heads = heads, in.dqk = dqk, in.dv = dv;
    in.keys = key_time.size(), in.rows = query_time.size();
    fill(q, in.rows * heads * dqk, 1), fill(k, in.keys * heads * dqk, 1), fill(v, in.keys * heads * dv, 1);
    fill(y_gradient, in.rows * heads * dv, 1), fill(position, 37, 2), fill(time, 129, 2);
    in.q = q.data(), in.k = k.data(), in.v = v.data();
    in.q_stride = in.k_stride = heads * dqk, in.v_stride = heads * dv;
    in.offsets = offsets.data(), in.row_offsets = row_offsets.data();
    in.begin = begin.data(), in.end = end.data(), in.prefix = prefix.data();
    in.alpha = 0.7f, in.normaliser = 9;
    in.position_weights = position.data(), in.positions = position.size(), in.time_weights = time.data();
    in.boundaries = bounds.data();
    in.query_time = query_time.data(), in.key_time = key_time.data(), in.self_gap = self_gap.data();
  }
};

struct Result {
  std::vector<float> y, q, k, v, position, time;
};

Result run(const Call& call, std::size_t threads) {
  Result out;
  out.y.assign(call.y_gradient.size(), NAN), out.q.assign(call.q.size(), NAN), out.k.assign(call.k.size(), NAN);
  out.v.assign(call.v.size(), NAN), out.position.assign(call.position.size(), NAN), out.time.assign(129, NAN);
  freshet::attention::forward(call.in, out.y.data(), threads);
  const Gradients gradients{call.y_gradient.data(), out.q.data(),        out.k.data(),
                            out.v.data(),           out.position.data(), out.time.data()};
  freshet::attention::backward(call.in, gradients, threads);
  return out;
}

struct Expected {
  std::vector<double> y, q, k, v, position, time;
};

// One pair (row i, key j of the whole batch) of the definition.
void add_pair(const Call& c, std::size_t i, std::size_t j, std::size_t distance, std::int64_t gap, Expected& out) {
  const Inputs& in = c.in;
  const std::size_t p = std::min(distance, in.positions - 1);
  const auto b =
      static_cast<std::size_t>(std::upper_bound(c.bounds.begin(), c.bounds.end(), std::abs(gap)) - c.bounds.begin());
  for (std::size_t h = 0; h < in.heads; ++h) {
    const std::size_t qi = (i * in.heads + h) * in.dqk, kj = (j * in.heads + h) * in.dqk;
    const std::size_t yi = (i * in.heads + h) * in.dv, vj = (j * in.heads + h) * in.dv;
    double score = static_cast<double>(c.position[p]) + c.time[b], back = 0;
    for (std::size_t d = 0; d < in.dqk; ++d) score += static_cast<double>(in.alpha) * c.q[qi + d] * c.k[kj + d];
    const double part = 1 / (1 + std::exp(-score)), weight = score * part / in.normaliser;
    for (std::size_t e = 0; e < in.dv; ++e) {
      out.y[yi + e] += weight * c.v[vj + e];
      out.v[vj + e] += weight * c.y_gradient[yi + e];
      back += static_cast<double>(c.v[vj + e]) * c.y_gradient[yi + e];
    }
    back *= part * (1 + score * (1 - part)) / in.normaliser;
    for (std::size_t d = 0; d < in.dqk; ++d) {
      out.q[qi + d] += static_cast<double>(in.alpha) * back * c.k[kj + d];
      out.k[kj + d] += static_cast<double>(in.alpha) * back * c.q[qi + d];
    }
    out.position[p] += back, out.time[b] += back;
  }
}

Expected definition(const Call& c) {
  Expected out;
  out.y.resize(c.y_gradient.size()), out.q.resize(c.q.size()), out.k.resize(c.k.size()), out.v.resize(c.v.size());
  out.position.resize(c.position.size()), out.time.resize(129);
  for (std::size_t s = 0; s < c.in.sequences; ++s) {
    for (std::int64_t i = c.row_offsets[s]; i < c.row_offsets[s + 1]; ++i) {
      const auto row = static_cast<std::size_t>(i);
      const std::int64_t self = c.offsets[s + 1] - (c.row_offsets[s + 1] - i);
      add_pair(c, row, static_cast<std::size_t>(self), 0, c.self_gap[row], out);
      for (std::int64_t j = c.offsets[s]; j < c.offsets[s + 1]; ++j) {
        const std::int64_t local = j - c.offsets[s];
        if (j == self || !(local < c.prefix[row] || (c.begin[row] <= local && local < c.end[row]))) continue;
        const std::int64_t distance = std::max<std::int64_t>(c.end[row] - local, 0);
        add_pair(c, row, static_cast<std::size_t>(j), static_cast<std::size_t>(distance),
                 c.query_time[row] - c.key_time[static_cast<std::size_t>(j)], out);
      }
    }
  }
  return out;
}

void expect_near(const std::vector<float>& got, const std::vector<double>& want, const std::string& what) {
  double scale = 1e-3, error = 0;
  for (std::size_t i = 0; i < want.size(); ++i) {
    scale = std::max(scale, std::abs(want[i]));
    const double off = std::abs(static_cast<double>(got[i]) - want[i]);
    error = off <= error ? error : off;  // NaN counts
  }
  expect(error <= 1e-5 * scale, what + " is off by " + std::to_string(error / scale));
}

bool same(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

void kernels_equal_the_definition(const std::string& isa) {
  unsigned seed = 0;
  for (const std::size_t width : {1, 8, 25, 50}) {
    for (const std::int64_t range : {std::int64_t{1}, std::int64_t{1} << 20, std::int64_t{1} << 60}) {
      ++seed;
      const Call call({3, 0, 1, 64, 65, 130, 40}, {3, 0, 1, 64, 20, 130, 0}, 1 + seed % 3, width, 51 - width, range,
                      seed);
      const Result got = run(call, 1);
      const Expected want = definition(call);
      const std::string name = isa + " width " + std::to_string(width) + ": ";
      expect_near(got.y, want.y, name + "y"), expect_near(got.q, want.q, name + "grad q");
      expect_near(got.k, want.k, name + "grad k"), expect_near(got.v, want.v, name + "grad v");
      expect_near(got.position, want.position, name + "grad position"),
          expect_near(got.time, want.time, name + "grad time");
    }
  }
}

// 1,100 rows are two tasks, whose gradients of keys are added up.
void threads_change_no_bit(const std::string& isa) {
  const Call call({1100, 70, 5, 0, 33}, {1100, 70, 2, 0, 33}, 1, 9, 10, 1 << 20, 77);
  const Result one = run(call, 1);
  for (const std::size_t threads : {2, 5}) {
    const Result many = run(call, threads);
    expect(same(one.y, many.y) && same(one.q, many.q) && same(one.k, many.k) && same(one.v, many.v) &&
               same(one.position, many.position) && same(one.time, many.time),
           isa + ": " + std::to_string(threads) + " threads give other bits");
  }
  expect_near(one.k, definition(call).k, isa + " two tasks: grad k");
}

// `change` makes a good call a bad one.
template <typename F>
void expect_refused(const std::string& why, const F& change) {
  Call call({5}, {3}, 1, 4, 4, 100, 1);
  change(call);
  std::vector<float> y(call.y_gradient.size());
  try {
    freshet::attention::forward(call.in, y.data(), 1);
    expect(false, "not refused, though " + why);
  } catch (const std::invalid_argument& error) {
    expect(error.what() == why, "refused for '" + std::string(error.what()) + "', not for '" + why + "'");
  }
}

void set_offsets(Call& call, std::vector<std::int64_t> keys, std::vector<std::int64_t> rows) {
  call.in.sequences = keys.size() - 1;
  call.offsets = std::move(keys), call.row_offsets = std::move(rows);
  call.in.offsets = call.offsets.data(), call.in.row_offsets = call.row_offsets.data();
  for (auto* const rows : {&call.begin, &call.end, &call.prefix}) std::fill(rows->begin(), rows->end(), 0);
}

void bad_input_is_refused() {
  expect_refused("an interval leaves its sequence", [](Call& call) { call.end[2] = 6; });
  expect_refused("an interval leaves its sequence", [](Call& call) { call.begin[2] = -1; });
  expect_refused("an interval leaves its sequence", [](Call& call) { call.begin[2] = 4, call.end[2] = 3; });
  expect_refused("a prefix leaves its sequence", [](Call& call) { call.prefix[0] = 6; });
  expect_refused("a prefix leaves its sequence", [](Call& call) { call.prefix[0] = -1; });
  expect_refused("offsets must begin with 0", [](Call& call) { call.offsets[0] = 1; });
  expect_refused("offsets must begin with 0", [](Call& call) { call.row_offsets[0] = 1; });
  expect_refused("offsets must end with the number of keys", [](Call& call) { call.offsets[1] = 6; });
  expect_refused("row_offsets must end with the number of rows", [](Call& call) { call.row_offsets[1] = 2; });
  expect_refused("row_offsets must ascend", [](Call& call) { set_offsets(call, {0, 1000, 5}, {0, 1000, 3}); });
  expect_refused("row_offsets must ascend", [](Call& call) { set_offsets(call, {0, 2, 2, 5}, {0, 2, 0, 3}); });
  expect_refused("a sequence needs as many keys as rows at least",
                 [](Call& call) { set_offsets(call, {0, 2, 5}, {0, 3, 3}); });
  expect_refused("attention needs at least one head and one number per head", [](Call& call) { call.in.dqk = 0; });
  expect_refused("a row of q, k or v overlaps the next one", [](Call& call) { call.in.v_stride = 3; });
  expect_refused("the attention normaliser must be positive", [](Call& call) { call.in.normaliser = NAN; });
  expect_refused("position weights must not be empty", [](Call& call) { call.in.positions = 0; });
  expect_refused("time boundaries must ascend", [](Call& call) { std::swap(call.bounds[100], call.bounds[101]); });
  expect_refused("two time boundaries lie closer together than a quarter of a power of two",
                 [](Call& call) { call.bounds[30] = call.bounds[31] - 1; });
  setenv("FRESHET_ISA", "abacus", 1);
  try {
    freshet::attention::instruction_set();
    expect(false, "an unknown instruction set is not refused");
  } catch (const std::invalid_argument&) {
  }
  unsetenv("FRESHET_ISA");
}

}  // namespace

int main() {
  test_vectors();
  for (const char* isa : {"portable", "avx2", "avx512"}) {
    setenv("FRESHET_ISA", isa, 1);
    try {
      freshet::attention::instruction_set();
    } catch (const std::invalid_argument&) {
      std::printf("not on this machine: %s\n", isa);
      continue;
    }
    kernels_equal_the_definition(isa);
    threads_change_no_bit(isa);
    test_layers(isa);
    test_softmax(isa);
  }
  bad_input_is_refused();
  if (failures != 0) return EXIT_FAILURE;
  std::printf("attention_test: all passed\n");
  return EXIT_SUCCESS;
}
