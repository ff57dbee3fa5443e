// Vectors of four: the accuracy of exp, and time buckets against their definition.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "isa_portable.h"
#include "task.h"

#include "simd.h"

void expect(bool condition, const std::string& what);  // attention_test.cc
std::vector<std::int64_t> boundaries();                // attention_test.cc

namespace {

using namespace freshet::attention;

void exp_is_accurate() {
  double worst = 0;
  for (int i = -870000; i <= 870000; i += 4) {
    float x[kLanes], out[kLanes];
    for (std::size_t lane = 0; lane < kLanes; ++lane)
      x[lane] = static_cast<float>(i + static_cast<int>(lane)) * 1e-4f;
    store(out, exp(load(x)));
    for (std::size_t lane = 0; lane < kLanes; ++lane) {
      if (std::abs(x[lane]) > 87.0f) continue;
      const double want = std::exp(static_cast<double>(x[lane]));
      worst = std::max(worst, std::abs(static_cast<double>(out[lane]) - want) / want);
    }
  }
  expect(worst < 1.2e-7, "exp is off by " + std::to_string(worst * 1e9) + "e-9");
  std::printf("exp: largest relative error %.2e\n", worst);
}

void time_buckets_are_exact() {
  const std::vector<std::int64_t> bounds = boundaries();
  const TimeTable table = make_time_table(bounds.data());
  std::vector<std::int32_t> gaps;
  for (std::int32_t gap = 0; gap < 100000; ++gap) gaps.push_back(gap);
  for (const std::int64_t bound : bounds) {
    for (std::int64_t gap = bound - 300; gap <= bound + 300; ++gap) {
      if (std::abs(gap) < (std::int64_t{1} << 31)) gaps.push_back(static_cast<std::int32_t>(gap));
    }
  }
  for (int bit = 24; bit < 31; ++bit) {
    for (int off = -300; off <= 300; ++off) gaps.push_back((1 << bit) + off);
  }
  gaps.push_back(2147483647);
  while (gaps.size() % kLanes != 0) gaps.push_back(0);
  for (std::size_t i = 0; i < gaps.size(); i += kLanes) {
    std::int32_t got[kLanes];
    store(got, time_buckets(table, load(&gaps[i])));
    for (std::size_t lane = 0; lane < kLanes; ++lane) {
      const auto gap = static_cast<std::int64_t>(gaps[i + lane]);
      const auto want = std::upper_bound(bounds.begin(), bounds.end(), std::abs(gap)) - bounds.begin();
      expect(got[lane] == want && time_bucket(table, -gap) == want,
             "bucket of " + std::to_string(gap));
    }
  }
}

}  // namespace

void test_vectors() {
  exp_is_accurate();
  time_buckets_are_exact();
}
