// What the tests of the two softmaxes share.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <random>
#include <string>
#include <vector>

void expect(bool condition, const std::string& what);  // attention_test.cc

namespace softmax_test {

using Doubles = std::vector<double>;

struct Result {
  double loss = 0;
  std::vector<float> vectors, table;
};

// From -1 to 1.
inline void draw(std::mt19937& random, std::vector<float>& to) {
  for (float& x : to) x = static_cast<float>(static_cast<int>(random() % 2001) - 1000) / 1000;
}

inline void expect_near(const std::vector<float>& got, const Doubles& want, const std::string& what) {
  double largest = 0, error = 0;
  for (std::size_t i = 0; i < want.size(); ++i) {
    largest = std::max(largest, std::abs(want[i]));
    error = std::max(error, std::abs(static_cast<double>(got[i]) - want[i]));
  }
  expect(error <= 1e-5 * largest, what + " is off by " + std::to_string(error) + " of " + std::to_string(largest));
}

// run(problem, threads) gives a Result.
template <typename Problem, typename Run>
void no_thread_changes_a_bit(const Problem& p, const Run& run, const std::string& name) {
  const Result one = run(p, 1);
  for (const std::size_t threads : {2, 3, 16}) {
    const Result more = run(p, threads);
    expect(more.loss == one.loss && more.vectors == one.vectors && more.table == one.table,
           name + ": " + std::to_string(threads) + " threads give other bits");
  }
}

}  // namespace softmax_test
