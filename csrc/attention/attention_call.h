// A random call of attention, its results, and the definition of them in double.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "attention.h"

void expect(bool condition, const std::string& what);  // attention_test.cc
std::vector<std::int64_t> boundaries();                // attention_test.cc

namespace {

using freshet::attention::Gradients;
using freshet::attention::Inputs;

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

void expect_definition(const Call& call, const std::string& name) {
  const Result got = run(call, 1);
  const Expected want = definition(call);
  expect_near(got.y, want.y, name + ": y"), expect_near(got.q, want.q, name + ": grad q");
  expect_near(got.k, want.k, name + ": grad k"), expect_near(got.v, want.v, name + ": grad v");
  expect_near(got.position, want.position, name + ": grad position");
  expect_near(got.time, want.time, name + ": grad time");
}

}  // namespace
