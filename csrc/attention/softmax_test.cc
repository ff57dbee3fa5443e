// The softmax over a catalogue against its definition in double.
#include "softmax.h"

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
  Problem(std::size_t rows, std::size_t items, std::size_t dim, float scale) : vectors(rows * dim), table(items * dim) {
    std::mt19937 random(static_cast<unsigned>(rows + items + dim));
    for (std::vector<float>* array : {&vectors, &table}) softmax_test::draw(random, *array);
    for (std::size_t r = 0; r < rows; ++r) wanted.push_back(static_cast<std::int64_t>(random() % items));
    in.rows = rows, in.items = items, in.dim = dim, in.scale = scale;
    in.vectors = vectors.data(), in.item_vectors = table.data(), in.wanted = wanted.data();
  }
  Problem(const Problem&) = delete;
  Problem& operator=(const Problem&) = delete;

  std::vector<float> vectors, table;
  std::vector<std::int64_t> wanted;
  Softmax in;
};

Result run(const Problem& p, std::size_t threads) {
  Result out{0, std::vector<float>(p.vectors.size()), std::vector<float>(p.table.size())};
  out.loss = catalogue_softmax(p.in, {out.vectors.data(), out.table.data()}, threads);
  return out;
}

double definition(const Problem& p, Doubles& by_vectors, Doubles& by_table) {
  const Softmax& in = p.in;
  double loss = 0;
  for (std::size_t r = 0; r < in.rows; ++r) {
    Doubles weights(in.items);
    double sum = 0;
    for (std::size_t v = 0; v < in.items; ++v) {
      double score = 0;
      for (std::size_t d = 0; d < in.dim; ++d) {
        score += static_cast<double>(in.scale) * p.vectors[r * in.dim + d] * p.table[v * in.dim + d];
      }
      sum += weights[v] = std::exp(score);
    }
    const auto own = static_cast<std::size_t>(p.wanted[r]);
    loss -= std::log(weights[own] / sum) / static_cast<double>(in.rows);
    for (std::size_t v = 0; v < in.items; ++v) {
      const double share = weights[v] / sum - (v == own ? 1 : 0);
      const double slope = share * static_cast<double>(in.scale) / static_cast<double>(in.rows);
      for (std::size_t d = 0; d < in.dim; ++d) {
        by_vectors[r * in.dim + d] += slope * p.table[v * in.dim + d];
        by_table[v * in.dim + d] += slope * p.vectors[r * in.dim + d];
      }
    }
  }
  return loss;
}

void equals_the_definition(const std::string& isa) {
  for (const std::size_t rows : {1, 47, 48, 49, 200}) {
    for (const std::size_t items : {1, 63, 64, 65, 300}) {
      for (const std::size_t dim : {1, 5, 16, 50}) {
        const Problem p(rows, items, dim, 1.5f);
        const std::string name = isa + " softmax, " + std::to_string(rows) + " rows, " + std::to_string(items) +
                                 " items, " + std::to_string(dim) + " numbers: ";
        Doubles by_vectors(p.vectors.size()), by_table(p.table.size());
        const double want = definition(p, by_vectors, by_table);
        const Result got = run(p, 1);
        expect(std::abs(got.loss - want) <= 1e-6 * (1 + want), name + "loss " + std::to_string(got.loss));
        if (items > 1) {  // with one item all gradients are zero
          expect_near(got.vectors, by_vectors, name + "gradient by the vectors");
          expect_near(got.table, by_table, name + "gradient by the items");
        }
        expect(catalogue_softmax(p.in, {}, 1) == got.loss, name + "the loss alone has other bits");
      }
    }
  }
}

void extreme_scores(const std::string& isa) {
  Problem p(2, 3, 1, 1);
  p.vectors = {1e4f, -1e4f}, p.table = {1, 1, -1}, p.wanted = {0, 2};
  p.in.vectors = p.vectors.data(), p.in.item_vectors = p.table.data(), p.in.wanted = p.wanted.data();
  const Result got = run(p, 1);
  expect(std::abs(got.loss - std::log(2.0) / 2) < 1e-6, isa + " softmax of large scores: " + std::to_string(got.loss));
  p.vectors[1] = std::nanf("");
  expect(std::isnan(run(p, 1).loss), isa + " softmax: a NaN is lost");
}

// All scores are far below zero, and one of them far above the others.
void one_item_stands_out(const std::string& isa) {
  for (std::size_t place = 0; place < 65; ++place) {
    Problem p(1, 65, 1, 1000);
    std::fill(p.table.begin(), p.table.end(), -2.0f);
    p.vectors[0] = 1, p.table[place] = -1, p.wanted[0] = static_cast<std::int64_t>(place);
    const double loss = run(p, 1).loss;
    expect(std::abs(loss) < 1e-6, isa + " softmax, item " + std::to_string(place) + ": " + std::to_string(loss));
  }
}

void an_empty_softmax_is_refused() {
  for (std::size_t Softmax::*const size : {&Softmax::rows, &Softmax::items, &Softmax::dim}) {
    Problem p(2, 3, 4, 1);
    p.in.*size = 0;
    try {
      run(p, 1);
      expect(false, "softmax: nothing to do is not refused");
    } catch (const std::invalid_argument&) {
    }
  }
}

void bad_items_are_refused() {
  for (const std::int64_t wanted : {-1, 3}) {
    Problem p(2, 3, 4, 1);
    p.wanted[1] = wanted;
    try {
      run(p, 1);
      expect(false, "softmax: wanted item " + std::to_string(wanted) + " of 3 is not refused");
    } catch (const std::invalid_argument&) {
    }
  }
}

}  // namespace

void test_softmax(const std::string& isa) {
  equals_the_definition(isa);
  softmax_test::no_thread_changes_a_bit(Problem(500, 400, 33, 2), run, isa + " softmax");
  extreme_scores(isa);
  one_item_stands_out(isa);
  an_empty_softmax_is_refused();
  bad_items_are_refused();
}
