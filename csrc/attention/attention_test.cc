// The kernels of every instruction set this machine has, against the definition in double.
#include "attention_call.h"

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
void test_sampled_softmax(const std::string& isa);  // sampled_softmax_test.cc

namespace {

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
      expect_definition(call, isa + " width " + std::to_string(width));
    }
  }
}

// What one row of a sequence sees, by its own position among the keys.
struct Seen {
  std::int64_t begin, end, prefix;
};

void set_seen(Call& call, Seen (*seen)(std::int64_t self)) {
  for (std::size_t s = 0; s < call.in.sequences; ++s) {
    for (std::int64_t i = call.row_offsets[s]; i < call.row_offsets[s + 1]; ++i) {
      const auto row = static_cast<std::size_t>(i);
      const Seen one = seen(call.offsets[s + 1] - call.offsets[s] - (call.row_offsets[s + 1] - i));
      call.begin[row] = one.begin, call.end[row] = one.end, call.prefix[row] = one.prefix;
    }
  }
}

void patterns_equal_the_definition(const std::string& isa) {
  using Self = std::int64_t;
  const auto check = [&](const char* name, std::size_t keys, std::size_t rows, Seen (*seen)(Self)) {
    Call call({keys}, {rows}, 2, 5, 3, 1 << 20, 7);
    set_seen(call, seen);
    expect_definition(call, isa + " " + name);
  };
  check("candidates behind 37 keys", 130, 40, [](Self) { return Seen{0, 37, 0}; });
  check("a last candidate that sees less", 130, 40, [](Self self) { return Seen{0, self == 129 ? 20 : 48, 0}; });
  check("candidates behind a prefix", 130, 40, [](Self) { return Seen{0, 0, 37}; });
  check("a prefix beyond the rows", 130, 130, [](Self) { return Seen{0, 0, 130}; });
  check("a prefix over the window", 130, 130, [](Self self) { return Seen{self / 2, self, self / 4 + 20}; });
  check("a window", 200, 200, [](Self self) { return Seen{std::max<Self>(0, self - 7), self, 0}; });
  check("rows in falling order of what they see", 200, 200, [](Self self) { return Seen{199 - self, 200 - self, 0}; });
  check("keys that no row sees", 200, 10, [](Self) { return Seen{70, 80, 0}; });
}

// More than 1,024 rows are several tasks, each of which keeps the gradients of the keys that it sees.
void tasks_that_share_a_sequence_equal_the_definition(const std::string& isa) {
  using Self = std::int64_t;
  const auto check = [&](const char* name, Seen (*seen)(Self)) {
    Call call({1200}, {1200}, 1, 3, 2, 1 << 20, 8);
    set_seen(call, seen);
    expect_definition(call, isa + " tasks: " + name);
  };
  check("only themselves", [](Self) { return Seen{0, 0, 0}; });
  check("a window", [](Self self) { return Seen{std::max<Self>(0, self - 50), self, 0}; });
  check("a key behind the task", [](Self self) { return Seen{self, self == 5 ? 1150 : self, 0}; });
  check("a prefix behind the task", [](Self self) { return Seen{self, self, self == 5 ? 1150 : 0}; });
  check("a prefix before the task", [](Self self) { return Seen{self, self, self == 1150 ? 20 : 0}; });
}

// One clock far from the others makes gaps of more than 31 bits, whichever it is.
void far_times_equal_the_definition(const std::string& isa) {
  const auto check = [&](const char* name, void (*change)(Call&, std::int64_t), std::int64_t shift) {
    Call call({1, 70}, {1, 70}, 1, 4, 4, 1 << 20, 9);
    call.in.self_gap = nullptr;
    std::fill(call.self_gap.begin(), call.self_gap.end(), 0);
    change(call, shift);
    expect_definition(call, isa + " " + name + " " + std::to_string(shift) + " s away");
  };
  for (const std::int64_t shift : {std::int64_t{0}, std::int64_t{3} << 30, std::int64_t{1} << 40}) {
    for (const std::int64_t there : {shift, -shift}) {
      check("all queries", [](Call& c, std::int64_t by) { for (auto& time : c.query_time) time += by; }, there);
      check("one query", [](Call& c, std::int64_t by) { c.query_time.back() += by; }, there);
      check("one key", [](Call& c, std::int64_t by) { c.key_time.back() += by; }, there);
    }
  }
  Call call({1, 2}, {1, 2}, 1, 4, 4, 1, 10);
  call.query_time = {0, 0, std::int64_t{1} << 31}, call.begin[2] = 0, call.end[2] = 1;
  call.in.query_time = call.query_time.data();
  expect_definition(call, isa + " a gap of 2^31 s");
}

std::uint16_t rounded(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<std::uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);  // to nearest, ties to even
}

// Makes numbers that bfloat16 has of them, and returns these in that storage.
std::vector<std::uint16_t> to_bfloat16(std::vector<float>& numbers) {
  std::vector<std::uint16_t> halves;
  for (float& number : numbers) {
    halves.push_back(rounded(number));
    const std::uint32_t bits = static_cast<std::uint32_t>(halves.back()) << 16;
    std::memcpy(&number, &bits, sizeof bits);
  }
  return halves;
}

// Sums are float32, whatever the storage; a sequence of two tasks is among them.
void bfloat16_is_float32_rounded(const std::string& isa) {
  Call call({1100, 20}, {1100, 20}, 2, 5, 3, 1 << 20, 11);
  const auto q = to_bfloat16(call.q), k = to_bfloat16(call.k), v = to_bfloat16(call.v);
  const auto y_gradient = to_bfloat16(call.y_gradient);
  const Result want = run(call, 1);
  call.in.storage = freshet::attention::Storage::kBfloat16;
  call.in.q = q.data(), call.in.k = k.data(), call.in.v = v.data();
  std::vector<std::uint16_t> y(want.y.size()), of_q(q.size()), of_k(k.size()), of_v(v.size());
  std::vector<float> position(want.position.size()), time(129);
  freshet::attention::forward(call.in, y.data(), 1);
  freshet::attention::backward(
      call.in, {y_gradient.data(), of_q.data(), of_k.data(), of_v.data(), position.data(), time.data()}, 1);
  const auto check = [&](const std::vector<std::uint16_t>& got, const std::vector<float>& exact, const char* what) {
    const auto equal = [](std::uint16_t half, float number) { return half == rounded(number); };
    expect(std::equal(got.begin(), got.end(), exact.begin(), equal), isa + " bfloat16: " + what + " is not rounded");
  };
  check(y, want.y, "y"), check(of_q, want.q, "grad q"), check(of_k, want.k, "grad k"), check(of_v, want.v, "grad v");
  expect(same(position, want.position) && same(time, want.time), isa + " bfloat16: the bias's gradient differs");
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
    patterns_equal_the_definition(isa);
    tasks_that_share_a_sequence_equal_the_definition(isa);
    far_times_equal_the_definition(isa);
    bfloat16_is_float32_rounded(isa);
    threads_change_no_bit(isa);
    test_layers(isa);
    test_softmax(isa);
    test_sampled_softmax(isa);
  }
  bad_input_is_refused();
  if (failures != 0) return EXIT_FAILURE;
  std::printf("attention_test: all passed\n");
  return EXIT_SUCCESS;
}
