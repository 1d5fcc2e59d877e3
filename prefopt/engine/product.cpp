// Products of very few rows with a large matrix, in float32: as fast as memory gives the matrix.

#include <torch/csrc/inductor/cpp_prefix.h>
#include <ATen/cpu/vec/functional.h>

#include <cstdint>

using Vec = at::vec::Vectorized<float>;
constexpr int ALL = Vec::size(), LINE = 16;

inline float sum(const Vec& x) {
  return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return a + b; }, x);
}

// out[r, o] = rows[r] times matrix[o], for R rows and O outputs of [M] numbers each; a row of `out` has N.
template <int R, int O>
inline void block(const float* rows, const float* matrix, float* out, int64_t m, int64_t n) {
  Vec total[R][O], row[R];
  for (int r = 0; r < R; ++r)
    for (int o = 0; o < O; ++o) total[r][o] = Vec(0);
  for (int64_t i = 0; i < m; i += ALL) {
    const int64_t count = std::min<int64_t>(ALL, m - i);
    for (int r = 0; r < R; ++r) row[r] = Vec::loadu(rows + r * m + i, count);
    for (int o = 0; o < O; ++o) {
      const float* from = matrix + o * m + i;
      if (i % LINE == 0) __builtin_prefetch(from + O * m, 0, 2);  // of the next block
      const Vec each = Vec::loadu(from, count);
      for (int r = 0; r < R; ++r) total[r][o] = at::vec::fmadd(row[r], each, total[r][o]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int o = 0; o < O; ++o) out[r * n + o] = sum(total[r][o]);
}

template <int R>
void all(const float* rows, const float* matrix, float* out, int64_t m, int64_t outputs, int64_t n) {
  constexpr int O = 4;
#pragma omp parallel for schedule(static)
  for (int64_t o = 0; o < outputs; o += O) {
    if (o + O <= outputs)
      block<R, O>(rows, matrix + o * m, out + o, m, n);
    else
      for (int64_t last = o; last < outputs; ++last) block<R, 1>(rows, matrix + last * m, out + last, m, n);
  }
}

// rows [count, m] times the transpose of matrix [outputs, m], into the first columns of `out` [count, n]; count <= 4.
extern "C" void product(
    const float* rows, const float* matrix, float* out, int64_t count, int64_t m, int64_t outputs, int64_t n) {
  switch (count) {
    case 1: return all<1>(rows, matrix, out, m, outputs, n);
    case 2: return all<2>(rows, matrix, out, m, outputs, n);
    case 3: return all<3>(rows, matrix, out, m, outputs, n);
    default: return all<4>(rows, matrix, out, m, outputs, n);
  }
}
