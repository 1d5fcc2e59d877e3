// Attention of rows in progress, one token each, in float32. They see pages of PAGE tokens, which several rows may
// share, and tokens of their own. Heads have SIZE numbers. Both are defined by who compiles this.

#include <torch/csrc/inductor/cpp_prefix.h>
#include <ATen/cpu/vec/functional.h>
#include <c10/util/Unroll.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

// What is called with; `kernels.py` has the same. G queries share the keys of each of K heads.
struct Call {
  const float* query;                     // [n, K, G, SIZE]
  const float *keys, *values;             // [n, K, T, SIZE], from row to row and from head to head in steps of:
  int64_t row_step, head_step;
  const float *page_keys, *page_values;   // [pages, K, SIZE, PAGE] and [pages, K, PAGE, SIZE]
  const float* bias;                      // [n, columns]: added to the scores of pages and, from `longest` on, of own
  int64_t columns, longest;
  const int32_t* own;                     // [n]: how many tokens of its own each row has
  const int32_t *rows, *row_starts;       // which rows each group has, and where they begin; [groups + 1]
  const int32_t *pages, *page_starts;     // which pages they see, the same
  int64_t groups, heads, queries;         // how many groups, K, G
  int64_t threads;
  double scale;
  float* out;                             // [n, K, G, SIZE]
};

using Vec = at::vec::Vectorized<float>;
constexpr int ALL = Vec::size();

// What N numbers are computed by: as many at a time as the processor can, or one by one.
template <int N>
using Unit = std::conditional_t<N % ALL == 0, Vec, float>;

inline void load(Vec& x, const float* from) { x = Vec::loadu(from); }
inline void load(float& x, const float* from) { x = *from; }
inline void store(const Vec& x, float* to) { x.store(to); }
inline void store(float x, float* to) { *to = x; }
inline Vec fused(const Vec& a, const Vec& b, const Vec& c) { return at::vec::fmadd(a, b, c); }
inline float fused(float a, float b, float c) { return std::fma(a, b, c); }
inline float sum(const Vec& x) {
  return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return a + b; }, x);
}
inline float sum(float x) { return x; }

// The next multiple of what the processor takes at a time.
inline int64_t filled(int64_t n) { return (n + ALL - 1) / ALL * ALL; }

// Has memory bring n numbers that are wanted soon: it reads ahead within a page of its own alone, of 4 KB.
inline void fetch(const float* x, int n) {
  for (int i = 0; i < n; i += 16) __builtin_prefetch(x + i, 0, 2);
}

// Not the constructor of an array, from which GCC concludes that it must be in memory.
template <typename U, int... I>
inline auto zeros(std::integer_sequence<int, I...>) {
  return std::array<U, sizeof...(I)>{(void(I), U(0))...};
}

// c += a b of R rows: a [R, M] and c [R, N] with so many numbers from row to row, b [M, N].
template <int R, int M, int N>
inline void add_product(const float* a, int64_t a_step, const float* b, float* c, int64_t c_step) {
  using U = Unit<N>;
  constexpr int WIDTH = sizeof(U) / sizeof(float);
  constexpr int COUNT = N % (4 * WIDTH) == 0 && R == 1 ? 4 : N % (2 * WIDTH) == 0 ? 2 : 1;
  const c10::ForcedUnroll<R> each_row;
  const c10::ForcedUnroll<COUNT> each_unit;
  for (int n = 0; n < N; n += COUNT * WIDTH) {
    auto sums = zeros<U>(std::make_integer_sequence<int, R * COUNT>{});
    auto x = zeros<U>(std::make_integer_sequence<int, COUNT>{});
    float* to = c + n;
    each_row([&](auto r) { each_unit([&](auto i) { load(sums[r * COUNT + i], to + r * c_step + i * WIDTH); }); });
    for (int m = 0; m < M; ++m) {
      each_unit([&](auto i) { load(x[i], b + m * N + n + i * WIDTH); });
      each_row([&](auto r) {
        const U number(a[r * a_step + m]);
        each_unit([&](auto i) { sums[r * COUNT + i] = fused(number, x[i], sums[r * COUNT + i]); });
      });
    }
    each_row([&](auto r) { each_unit([&](auto i) { store(sums[r * COUNT + i], to + r * c_step + i * WIDTH); }); });
  }
}

template <int M, int N>
inline void add_products(int64_t rows, const float* a, int64_t a_step, const float* b, float* c, int64_t c_step) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) add_product<4, M, N>(a + r * a_step, a_step, b, c + r * c_step, c_step);
  for (; r < rows; ++r) add_product<1, M, N>(a + r * a_step, a_step, b, c + r * c_step, c_step);
}

inline float dot(const float* a, const float* b) {
  using U = Unit<SIZE>;
  U total(0), x(0), y(0);
  for (int i = 0; i < SIZE; i += sizeof(U) / sizeof(float)) {
    load(x, a + i);
    load(y, b + i);
    total = fused(x, y, total);
  }
  return sum(total);
}

// Scores [n] become weights; behind them is room for a multiple of ALL.
inline void softmax(float* x, int64_t n) {
  const int64_t end = filled(n);
  std::fill(x + n, x + end, -std::numeric_limits<float>::infinity());
  Vec most = Vec::loadu(x), total(0);
  for (int64_t i = ALL; i < end; i += ALL) most = at::vec::maximum(most, Vec::loadu(x + i));
  const Vec top(at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return at::vec::maximum(a, b); }, most));
  for (int64_t i = 0; i < end; i += ALL) {
    const Vec each = (Vec::loadu(x + i) - top).exp();
    total = total + each;
    each.store(x + i);
  }
  const Vec share(1 / sum(total));
  for (int64_t i = 0; i < end; i += ALL) (Vec::loadu(x + i) * share).store(x + i);
}

// One head of a group of rows. A page is read once for all of them.
class Work {
 public:
  Work(const Call& call, int64_t group, int64_t head, std::vector<float>& room)
      : call(call), head(head), rows(call.rows + call.row_starts[group]), pages(call.pages + call.page_starts[group]),
        count(call.row_starts[group + 1] - call.row_starts[group]), asked(count * call.queries),
        seen(call.page_starts[group + 1] - call.page_starts[group]),
        width(filled(seen * PAGE + call.columns - call.longest)) {
    room.assign(asked * (2 * SIZE + width), 0);
    query = room.data(), found = query + asked * SIZE, weights = found + asked * SIZE;
  }

  void run() {
    for (int64_t i = 0; i < asked; ++i)
      for (int d = 0; d < SIZE; ++d) query[i * SIZE + d] = call.query[place(i) + d] * float(call.scale);
    for (int64_t i = 0; i < seen; ++i) {
      fetch(i + 1 < seen ? page(call.page_keys, i + 1) : page(call.page_values, 0), PAGE * SIZE);
      add_products<SIZE, PAGE>(asked, query, SIZE, page(call.page_keys, i), weights + i * PAGE, width);
    }
    for (int64_t i = 0; i < asked; ++i) add_own(i);
    for (int64_t i = 0; i < seen; ++i) {
      if (i + 1 < seen) fetch(page(call.page_values, i + 1), PAGE * SIZE);
      add_products<PAGE, SIZE>(asked, weights + i * PAGE, width, page(call.page_values, i), found, SIZE);
    }
    for (int64_t i = 0; i < asked; ++i) std::copy_n(found + i * SIZE, SIZE, call.out + place(i));
  }

 private:
  // Makes the scores of a query whole, then weights, and adds what its row has of its own.
  void add_own(int64_t i) {
    const int64_t row = i / call.queries, before = seen * PAGE, own = call.own[rows[row]];
    const float *k = part(call.keys, row), *v = part(call.values, row);
    const float *next = part(call.keys, std::min(row + 1, count - 1)), *bias = call.bias + rows[row] * call.columns;
    float *w = weights + i * width, *after = w + before;
    for (int64_t t = 0; t < own; ++t) {
      fetch(v + t * SIZE, SIZE);
      fetch(next + t * SIZE, SIZE);
      after[t] = dot(query + i * SIZE, k + t * SIZE);
    }
    for (int64_t t = 0; t < before; ++t) w[t] += bias[t];
    for (int64_t t = 0; t < own; ++t) after[t] += bias[call.longest + t];
    softmax(w, before + own);
    for (int64_t t = 0; t < own; ++t) add_product<1, 1, SIZE>(after + t, 1, v + t * SIZE, found + i * SIZE, SIZE);
  }

  int64_t place(int64_t i) const {
    return ((rows[i / call.queries] * call.heads + head) * call.queries + i % call.queries) * SIZE;
  }
  const float* part(const float* x, int64_t i) const { return x + rows[i] * call.row_step + head * call.head_step; }
  const float* page(const float* x, int64_t i) const { return x + (pages[i] * call.heads + head) * PAGE * SIZE; }

  const Call& call;
  const int64_t head;
  const int32_t *rows, *pages;
  const int64_t count, asked, seen, width;
  float *query, *found, *weights;
};

extern "C" void attend(const Call* call) {
#pragma omp parallel num_threads(call->threads)
  {
    std::vector<float> room;
#pragma omp for collapse(2) schedule(dynamic)
    for (int64_t group = 0; group < call->groups; ++group)
      for (int64_t head = 0; head < call->heads; ++head) Work(*call, group, head, room).run();
  }
}
