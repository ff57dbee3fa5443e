// project and finish against their definition in double: values, and the slope along a random direction.
#include "layer.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

void expect(bool condition, const std::string& what);  // attention_test.cc

namespace {

using namespace freshet::attention;
using Doubles = std::vector<double>;

std::vector<float> random_floats(std::size_t n, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<float> out(n);
  for (float& x : out) x = static_cast<float>(static_cast<int>(random() % 2001) - 1000) / 1000;
  return out;
}

double dot(const std::vector<float>& a, const std::vector<float>& b) {
  double sum = 0;
  for (std::size_t i = 0; i < a.size(); ++i) sum += static_cast<double>(a[i]) * b[i];
  return sum;
}

void expect_near(double got, double want, double scale, const std::string& what) {
  expect(std::abs(got - want) <= 1e-4 * scale,
         what + ": " + std::to_string(got) + " instead of " + std::to_string(want));
}

Doubles normed(const double* row, std::size_t width, const Doubles& weight, const Doubles& bias) {
  double mean = 0, square = 0;
  for (std::size_t i = 0; i < width; ++i) mean += row[i] / static_cast<double>(width);
  for (std::size_t i = 0; i < width; ++i) square += (row[i] - mean) * (row[i] - mean) / static_cast<double>(width);
  Doubles out(width);
  for (std::size_t i = 0; i < width; ++i) out[i] = (row[i] - mean) / std::sqrt(square + 1e-6) * weight[i] + bias[i];
  return out;
}

// All inputs of a call, so that they can be moved along a direction together.
struct Values {
  std::vector<std::vector<float>> arrays;
  Doubles at(std::size_t array, double step, const Values& direction) const {
    Doubles out(arrays[array].begin(), arrays[array].end());
    for (std::size_t i = 0; i < out.size(); ++i) out[i] += step * direction.arrays[array][i];
    return out;
  }
};

Values random_values(const std::vector<std::size_t>& sizes, unsigned seed) {
  Values out;
  for (const std::size_t size : sizes) out.arrays.push_back(random_floats(size, ++seed));
  return out;
}

// The slope of f at 0, f being smooth.
template <typename F>
double slope(const F& f) {
  const double step = 1e-4;
  return (f(step) - f(-step)) / (2 * step);
}

constexpr std::size_t kRows = 1100, kDim = 13, kColumns = 3 + 18 + 1 + 9, kSilu = 20;

// sum of outputs times y_gradient; arrays: x, weight, bias, norm weight, norm bias.
double project_definition(const Values& v, const Values& d, double step, const std::vector<float>& gradient,
                          Doubles* values) {
  const Doubles x = v.at(0, step, d), w = v.at(1, step, d), b = v.at(2, step, d), nw = v.at(3, step, d),
                nb = v.at(4, step, d);
  double total = 0;
  for (std::size_t r = 0; r < kRows; ++r) {
    const Doubles n = normed(&x[r * kDim], kDim, nw, nb);
    for (std::size_t c = 0; c < kColumns; ++c) {
      double z = b[c];
      for (std::size_t k = 0; k < kDim; ++k) z += n[k] * w[k * kColumns + c];
      if (c < kSilu) z /= 1 + std::exp(-z);
      total += z * gradient[r * kColumns + c];
      if (values != nullptr) values->push_back(z);
    }
  }
  return total;
}

// Splits [rows][columns] into the parts, or joins them.
void move_parts(const Project& in, std::vector<float>& whole, std::vector<std::vector<float>>& parts, bool split) {
  for (std::size_t p = 0, at = 0; p < kParts; at += in.parts[p], ++p) {
    parts[p].resize(in.rows * in.parts[p]);
    for (std::size_t r = 0; r < in.rows; ++r) {
      for (std::size_t c = 0; c < in.parts[p]; ++c) {
        float &one = parts[p][r * in.parts[p] + c], &other = whole[r * in.columns + at + c];
        (split ? one : other) = split ? other : one;
      }
    }
  }
}

std::vector<std::vector<float>> run_project(const Values& v, const std::vector<float>& gradient, std::size_t threads) {
  Project in;
  in.rows = kRows, in.dim = kDim, in.columns = kColumns, in.silu_columns = kSilu;
  const std::size_t sizes[kParts] = {3, 18, 1, 9};
  std::copy(sizes, sizes + kParts, in.parts);
  in.x = v.arrays[0].data(), in.weight = v.arrays[1].data(), in.bias = v.arrays[2].data();
  in.norm = {v.arrays[3].data(), v.arrays[4].data(), 1e-6f};
  std::vector<std::vector<float>> parts(kParts), gradients(kParts), out(6);
  std::vector<float> copy = gradient;
  out[0].resize(kRows * kColumns);
  move_parts(in, out[0], parts, true), move_parts(in, copy, gradients, true);
  float* const to[kParts] = {parts[0].data(), parts[1].data(), parts[2].data(), parts[3].data()};
  project_forward(in, to, threads);
  move_parts(in, out[0], parts, false);
  for (std::size_t i = 0; i < 5; ++i) out[i + 1].resize(v.arrays[i].size());
  ProjectGradients result;
  for (std::size_t p = 0; p < kParts; ++p) result.parts[p] = gradients[p].data();
  result.x = out[1].data(), result.weight = out[2].data(), result.bias = out[3].data();
  result.norm_weight = out[4].data(), result.norm_bias = out[5].data();
  project_backward(in, result, threads);
  return out;
}

void check_slope(const std::vector<std::vector<float>>& out, const Values& direction, double want,
                 const std::string& what) {
  double got = 0, scale = 1;
  for (std::size_t i = 0; i < direction.arrays.size(); ++i) {
    const double part = dot(out[i + 1], direction.arrays[i]);
    got += part, scale += std::abs(part);
  }
  expect_near(got, want, scale, what + " slope");
}

void check_values(const std::vector<float>& got, const Doubles& want, const std::string& what) {
  for (std::size_t i = 0; i < want.size(); ++i) expect_near(got[i], want[i], 1, what + " value");
}

void projection(const std::string& isa) {
  const std::vector<std::size_t> sizes = {kRows * kDim, kDim * kColumns, kColumns, kDim, kDim};
  const Values values = random_values(sizes, 10), direction = random_values(sizes, 20);
  const std::vector<float> gradient = random_floats(kRows * kColumns, 30);
  const auto out = run_project(values, gradient, 1);
  Doubles want;
  project_definition(values, direction, 0, gradient, &want);
  check_values(out[0], want, isa + " project");
  const auto along = [&](double step) { return project_definition(values, direction, step, gradient, nullptr); };
  check_slope(out, direction, slope(along), isa + " project");
  expect(out == run_project(values, gradient, 3), isa + " project: 3 threads give other bits");
}

constexpr std::size_t kWidth = 21;

// arrays: x, u, a, weight, bias, norm weight, norm bias. Without dropout.
double finish_definition(Gate gate, const Values& v, const Values& d, double step, const std::vector<float>& gradient,
                         Doubles* values) {
  const Doubles x = v.at(0, step, d), u = v.at(1, step, d), a = v.at(2, step, d), w = v.at(3, step, d);
  const Doubles b = v.at(4, step, d), nw = v.at(5, step, d), nb = v.at(6, step, d);
  double total = 0;
  for (std::size_t r = 0; r < kRows; ++r) {
    const Doubles n = normed(&a[r * kWidth], kWidth, nw, nb);
    Doubles gated;
    if (gate != Gate::kProduct) {
      for (std::size_t i = 0; i < kWidth; ++i) gated.push_back(u[r * kWidth + i]);
      for (std::size_t i = 0; i < kWidth; ++i) gated.push_back(gate == Gate::kConcat ? n[i] : a[r * kWidth + i]);
    }
    for (std::size_t i = 0; i < kWidth; ++i) gated.push_back(u[r * kWidth + i] * n[i]);
    for (std::size_t c = 0; c < kDim; ++c) {
      double y = x[r * kDim + c] + b[c];
      for (std::size_t i = 0; i < gated.size(); ++i) y += gated[i] * w[c * gated.size() + i];
      total += y * gradient[r * kDim + c];
      if (values != nullptr) values->push_back(y);
    }
  }
  return total;
}

std::vector<std::vector<float>> run_finish(Gate gate, const Values& v, const std::vector<float>& gradient,
                                           float dropout, std::size_t threads) {
  Finish in;
  in.rows = kRows, in.dim = kDim, in.width = kWidth, in.gate = gate, in.dropout = dropout, in.seed = 5;
  in.x = v.arrays[0].data(), in.u = v.arrays[1].data(), in.a = v.arrays[2].data(), in.weight = v.arrays[3].data();
  in.bias = v.arrays[4].data(), in.norm = {v.arrays[5].data(), v.arrays[6].data(), 1e-6f};
  std::vector<std::vector<float>> out(8);
  out[0].resize(kRows * kDim), out[1] = gradient;
  for (std::size_t i = 1; i < 7; ++i) out[i + 1].resize(v.arrays[i].size());
  finish_forward(in, out[0].data(), threads);
  finish_backward(
      in, {gradient.data(), out[2].data(), out[3].data(), out[4].data(), out[5].data(), out[6].data(), out[7].data()},
      threads);
  return out;
}

void end_of_layer(const std::string& isa) {
  for (const Gate gate : {Gate::kProduct, Gate::kConcat, Gate::kConcatRaw}) {
    const std::size_t inputs = gate == Gate::kProduct ? kWidth : 3 * kWidth;
    const std::vector<std::size_t> sizes = {kRows * kDim, kRows * kWidth, kRows * kWidth, kDim * inputs,
                                            kDim,         kWidth,         kWidth};
    const Values values = random_values(sizes, 40), direction = random_values(sizes, 50);
    const std::vector<float> gradient = random_floats(kRows * kDim, 60);
    const std::string name = isa + " finish, gate " + std::to_string(static_cast<int>(gate));
    const auto out = run_finish(gate, values, gradient, 0, 1);
    Doubles want;
    finish_definition(gate, values, direction, 0, gradient, &want);
    check_values(out[0], want, name);
    const auto along = [&](double step) { return finish_definition(gate, values, direction, step, gradient, nullptr); };
    check_slope(out, direction, slope(along), name);
    expect(run_finish(gate, values, gradient, 0.3f, 1) == run_finish(gate, values, gradient, 0.3f, 4),
           name + ": 4 threads give other bits");
  }
}

// `change` makes a good call a bad one.
template <typename In, typename F>
void expect_refused(In in, const F& run, const std::string& why, void (*change)(In&)) {
  change(in);
  try {
    run(in);
    expect(false, "not refused, though " + why);
  } catch (const std::invalid_argument& error) {
    expect(std::string(error.what()).find(why) == 0, "refused for '" + std::string(error.what()) + "', not for " + why);
  }
}

void bad_input_is_refused() {
  const std::vector<float> numbers(16, 1.0f);
  std::vector<float> out(16);
  Project project;
  project.rows = 1, project.dim = 2, project.columns = project.silu_columns = 4;
  std::fill(project.parts, project.parts + kParts, 1);
  project.x = project.weight = numbers.data();
  float* const parts[kParts] = {&out[0], &out[1], &out[2], &out[3]};
  const auto begin = [&](const Project& in) { project_forward(in, parts, 1); };
  begin(project);
  expect_refused<Project>(project, begin, "a projection needs numbers in", [](Project& in) { in.dim = 0; });
  expect_refused<Project>(project, begin, "a projection needs numbers in", [](Project& in) { in.parts[1] = 2; });
  expect_refused<Project>(project, begin, "SiLU on more columns", [](Project& in) { in.silu_columns = 5; });
  expect_refused<Project>(project, begin, "a layer norm needs", [](Project& in) { in.norm.weight = in.x; });
  Finish finish;
  finish.rows = 1, finish.dim = finish.width = 2;
  finish.x = finish.u = finish.a = finish.weight = numbers.data();
  const auto end = [&](const Finish& in) { finish_forward(in, out.data(), 1); };
  end(finish);
  expect_refused<Finish>(finish, end, "the end of a layer needs", [](Finish& in) { in.width = 0; });
  expect_refused<Finish>(finish, end, "dropout must be", [](Finish& in) { in.dropout = 1; });
  expect_refused<Finish>(finish, end, "dropout must be", [](Finish& in) { in.dropout = -0.1f; });
  expect_refused<Finish>(finish, end, "a layer norm needs", [](Finish& in) { in.norm.bias = in.x; });
}

}  // namespace

void test_layers(const std::string& isa) {
  projection(isa);
  end_of_layer(isa);
  bad_input_is_refused();
}
