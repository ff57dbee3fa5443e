// The softmax over each row's own candidates against its definition in double.
#include "sampled_softmax.h"

#include <algorithm>
#include <cmath>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "softmax_test.h"

namespace {

using namespace freshet::attention;
using softmax_test::Doubles, softmax_test::Result, softmax_test::expect_near;

struct Problem {
  Problem(std::size_t rows, std::size_t items, std::size_t dim, std::size_t samples)
      : vectors(rows * dim), table(items * dim) {
    std::mt19937 random(static_cast<unsigned>(rows + items + dim + samples));
    for (std::vector<float>* array : {&vectors, &table}) softmax_test::draw(random, *array);
    for (std::size_t r = 0; r < rows; ++r) wanted.push_back(static_cast<std::int64_t>(random() % items));
    for (std::size_t i = 0; i < rows * samples; ++i) drawn.push_back(static_cast<std::int64_t>(random() % items));
    in.rows = rows, in.items = items, in.dim = dim, in.samples = samples, in.scale = 1.5F;
    in.vectors = vectors.data(), in.item_vectors = table.data(), in.wanted = wanted.data(), in.drawn = drawn.data();
  }
  Problem(const Problem&) = delete;
  Problem& operator=(const Problem&) = delete;

  std::vector<float> vectors, table;
  std::vector<std::int64_t> wanted, drawn;
  SampledSoftmax in;
};

Result run(const Problem& p, std::size_t threads) {
  Result out{0, std::vector<float>(p.vectors.size()), std::vector<float>(p.table.size())};
  out.loss = sampled_softmax(p.in, {out.vectors.data(), out.table.data()}, threads);
  return out;
}

double definition(const Problem& p, Doubles& by_vectors, Doubles& by_table) {
  const SampledSoftmax& in = p.in;
  double loss = 0;
  for (std::size_t r = 0; r < in.rows; ++r) {
    std::vector<std::size_t> items = {static_cast<std::size_t>(p.wanted[r])};
    for (std::size_t i = 0; i < in.samples; ++i) {
      const std::int64_t item = p.drawn[r * in.samples + i];
      if (item != p.wanted[r]) items.push_back(static_cast<std::size_t>(item));
    }
    Doubles weights;
    double sum = 0;
    for (const std::size_t v : items) {
      double score = 0;
      for (std::size_t d = 0; d < in.dim; ++d) {
        score += static_cast<double>(in.scale) * p.vectors[r * in.dim + d] * p.table[v * in.dim + d];
      }
      weights.push_back(std::exp(score));
      sum += weights.back();
    }
    loss -= std::log(weights[0] / sum) / static_cast<double>(in.rows);
    for (std::size_t i = 0; i < items.size(); ++i) {
      const double share = weights[i] / sum - (i == 0 ? 1 : 0);
      const double slope = share * static_cast<double>(in.scale) / static_cast<double>(in.rows);
      for (std::size_t d = 0; d < in.dim; ++d) {
        by_vectors[r * in.dim + d] += slope * p.table[items[i] * in.dim + d];
        by_table[items[i] * in.dim + d] += slope * p.vectors[r * in.dim + d];
      }
    }
  }
  return loss;
}

void equals_the_definition(const std::string& isa) {
  for (const std::size_t rows : {1, 63, 64, 65, 200}) {
    for (const std::size_t samples : {0, 1, 3, 15, 128}) {
      for (const std::size_t dim : {1, 16, 50, 130}) {
        const Problem p(rows, 40, dim, samples);
        const std::string name = isa + " sampled softmax, " + std::to_string(rows) + " rows, " +
                                 std::to_string(samples) + " samples, " + std::to_string(dim) + " numbers: ";
        Doubles by_vectors(p.vectors.size()), by_table(p.table.size());
        const double want = definition(p, by_vectors, by_table);
        const Result got = run(p, 1);
        expect(std::abs(got.loss - want) <= 1e-6 * (1 + want), name + "loss " + std::to_string(got.loss));
        expect_near(got.vectors, by_vectors, name + "gradient by the vectors");
        expect_near(got.table, by_table, name + "gradient by the items");
        expect(sampled_softmax(p.in, {}, 1) == got.loss, name + "the loss alone has other bits");
      }
    }
  }
}

template <typename Spoil>
void is_refused(const Spoil& spoil, const std::string& what) {
  Problem p(2, 3, 4, 2);
  spoil(p);
  try {
    run(p, 1);
    expect(false, "sampled softmax: " + what + " is not refused");
  } catch (const std::invalid_argument&) {
  }
}

}  // namespace

void test_sampled_softmax(const std::string& isa) {
  equals_the_definition(isa);
  softmax_test::no_thread_changes_a_bit(Problem(500, 400, 33, 20), run, isa + " sampled softmax");
  is_refused([](Problem& p) { p.in.rows = 0; }, "no row");
  is_refused([](Problem& p) { p.in.items = 0; }, "no item");
  is_refused([](Problem& p) { p.in.dim = 0; }, "no number");
  for (const std::int64_t item : {-1, 3}) {
    is_refused([&](Problem& p) { p.wanted[1] = item; }, "a wanted item that is none");
    is_refused([&](Problem& p) { p.drawn[3] = item; }, "a drawn item that is none");
  }
}
