// Products of rows with a large matrix, in float32. The matrix lies in panels: [panels, M, PANEL], which are its
// outputs in pieces of PANEL, the last one filled with 0. So memory gives it in one stream, and few rows wait for it.

#include <torch/csrc/inductor/cpp_prefix.h>
#include <ATen/cpu/vec/functional.h>
#include <c10/util/Unroll.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>

using Vec = at::vec::Vectorized<float>;
// MOST rows at a time have all their sums in registers; BLOCK rows of a panel stay near for the next ones.
constexpr int64_t ALL = Vec::size(), PANEL = 2 * ALL, MOST = ALL == 16 ? 12 : 6, BLOCK = 1024, LINE = 16;

// Not the constructor of an array, from which GCC concludes that it must be in memory.
template <int... I>
inline auto zeros(std::integer_sequence<int, I...>) {
  return std::array<Vec, sizeof...(I)>{(void(I), Vec(0))...};
}

inline Vec get(const float* from, int64_t count) {
  return count >= ALL ? Vec::loadu(from) : count > 0 ? Vec::loadu(from, count) : Vec(0);
}
inline void put(const Vec& x, float* to, int64_t count) {
  if (count >= ALL)
    x.store(to);
  else if (count > 0)
    x.store(to, count);
}

// A block of a panel, [k, PANEL], of which `count` outputs are wanted.
struct Block {
  const float* panel;
  int64_t k, count;
  bool first;
};

// out [R, count] = x [R, k] times the block; added to it unless the block is the first one of its panel.
template <int R>
inline void multiply(const Block& block, const float* x, int64_t x_step, float* out, int64_t out_step) {
  const c10::ForcedUnroll<R> each_row;
  auto sums = zeros(std::make_integer_sequence<int, 2 * R>{});
  if (!block.first)
    each_row([&](auto r) {
      sums[2 * r] = get(out + r * out_step, block.count);
      sums[2 * r + 1] = get(out + r * out_step + ALL, block.count - ALL);
    });
  for (int64_t i = 0; i < block.k; ++i) {
    const float* from = block.panel + i * PANEL;
    const Vec a = Vec::loadu(from), b = Vec::loadu(from + ALL);
    if constexpr (R > 8)  // with fewer it is memory that is waited for
      for (int64_t j = 0; j < PANEL; j += LINE) __builtin_prefetch(from + block.k * PANEL + j, 0, 2);
    each_row([&](auto r) {
      const Vec number(x[r * x_step + i]);
      sums[2 * r] = at::vec::fmadd(number, a, sums[2 * r]);
      sums[2 * r + 1] = at::vec::fmadd(number, b, sums[2 * r + 1]);
    });
  }
  each_row([&](auto r) {
    put(sums[2 * r], out + r * out_step, block.count);
    put(sums[2 * r + 1], out + r * out_step + ALL, block.count - ALL);
  });
}

// The same for any number of rows up to R.
template <int R>
inline void multiply_some(
    int64_t rows, const Block& block, const float* x, int64_t x_step, float* out, int64_t out_step) {
  if (rows == R)
    multiply<R>(block, x, x_step, out, out_step);
  else if constexpr (R > 1)
    multiply_some<R - 1>(rows, block, x, x_step, out, out_step);
}

extern "C" int64_t panel() { return PANEL; }

// matrix [n, m] in panels.
extern "C" void pack(const float* matrix, float* panels, int64_t m, int64_t n, int64_t threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t first = 0; first < (n + PANEL - 1) / PANEL * PANEL; first += ALL)
    for (int64_t i = 0; i < m; i += ALL) {
      const float* from = matrix + first * m + i;
      float* to = panels + first / PANEL * PANEL * m + first % PANEL + i * PANEL;
      if (first + ALL <= n && i + ALL <= m)
        at::vec::transpose_mxn<float, ALL, ALL>(from, m, to, PANEL);
      else
        for (int64_t k = 0; k < std::min(ALL, m - i); ++k)
          for (int64_t j = 0; j < ALL; ++j) to[k * PANEL + j] = first + j < n ? from[j * m + k] : 0;
    }
}

// out [rows, n] = x [rows, m] times the transpose of the matrix [n, m] in panels.
extern "C" void product(
    const float* x, const float* panels, float* out, int64_t rows, int64_t m, int64_t n, int64_t threads) {
  const int64_t passes = (rows + MOST - 1) / MOST, each = passes ? (rows + passes - 1) / passes : 0;
#pragma omp parallel for num_threads(threads)
  for (int64_t first = 0; first < n; first += PANEL)
    for (int64_t i = 0; i < m; i += BLOCK) {
      const Block block{panels + first * m + i * PANEL, std::min(BLOCK, m - i), n - first, i == 0};
      for (int64_t r = 0; r < rows; r += each)
        multiply_some<MOST>(std::min(each, rows - r), block, x + r * m + i, m, out + r * n + first, n);
    }
}
