// What token_relevance does between its matrix products. Torch-free; one copy per ISA.
//
// Each kernel is one pass over its tensors, in the order of memory; the backward ones compute an
// activation and its derivative together, from the same exponential. A work item is a span of the
// tokens of an image; sums over tokens are written per span and added up by sum_parts.
#pragma once

#include "isa.h"
#include "scratch.h"
#include "vector.h"

namespace spot {
namespace SPOT_ISA {

inline float square_root(float x) { return __builtin_sqrtf(x); }
inline double square_root(double x) { return __builtin_sqrt(x); }
inline float exponential(float x) { return __builtin_expf(x); }
inline double exponential(double x) { return __builtin_exp(x); }
inline float log_of_one_plus(float x) { return __builtin_log1pf(x); }
inline double log_of_one_plus(double x) { return __builtin_log1p(x); }

// span(item, image, first row, last row) for spans [begin, end); rows are counted over all images.
template <typename F>
inline void for_spans(const Spans& s, int64_t begin, int64_t end, F&& span) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t image = item / s.count, start = item % s.count * s.rows;
    const int64_t stop = start + s.rows < s.num_tokens ? start + s.rows : s.num_tokens;
    span(item, image, image * s.num_tokens + start, image * s.num_tokens + stop);
  }
}

template <typename A>
inline A* zeros(A* sums, int64_t n) {
  std::memset(sums, 0, static_cast<std::size_t>(n) * sizeof(A));
  return sums;
}

template <typename A, typename Count>
inline void add_to(A* sums, Count count, Vec<A> x) {
  store_lanes(sums, count, load_lanes(sums, count) + x);
}

// ---- layer normalisation -----------------------------------------------------------------------

// A row as numbers of A: the row itself, or a copy in `room`.
template <typename T>
inline const Acc<T>* widened(const T* row, int64_t n, Acc<T>* room) {
  if constexpr (std::is_same_v<T, Acc<T>>) {
    return row;
  } else {
    for (int64_t i = 0; i < n; ++i) room[i] = load(row[i]);
    return room;
  }
}

template <typename A>
struct Moments {
  A mean, scale;  // scale: 1 / sqrt(variance + eps)
};

template <typename A>
inline Moments<A> moments(const A* x, int64_t n, double eps) {
  const A share = A(1) / static_cast<A>(n);
  Vec<A> sum = {}, squares = {};
  for_vectors<A>(n, [&](int64_t i, auto count) { sum += load_lanes(x + i, count); });
  const A mean = reduce_add<A>(sum) * share;
  for_vectors<A>(n, [&](int64_t i, auto count) {
    const Vec<A> away = load_lanes(x + i, count, mean) - mean;
    squares += away * away;
  });
  return {mean, A(1) / square_root(reduce_add<A>(squares) * share + static_cast<A>(eps))};
}

template <typename T>
inline const T* token_row(const NormArgs& a, int64_t image, int64_t row) {
  return static_cast<const T*>(a.tokens) + image * a.tokens_batch +
         (row - image * a.spans.num_tokens) * a.tokens_row;
}

template <typename T>
void normalize(const NormArgs& a, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const int64_t n = a.channels;
  A* room = static_cast<A*>(thread_scratch(static_cast<std::size_t>(n) * sizeof(A)));
  const T *weight = static_cast<const T*>(a.weight), *bias = static_cast<const T*>(a.bias);
  for_spans(a.spans, begin, end, [&](int64_t, int64_t image, int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      const A* x = widened(token_row<T>(a, image, r), n, room);
      T* out = static_cast<T*>(a.out) + r * n;
      const Moments<A> m = moments(x, n, a.eps);
      for_vectors<A>(n, [&](int64_t i, auto count) {
        const Vec<A> y = (load_lanes(x + i, count) - m.mean) * m.scale;
        store_lanes(out + i, count,
                    y * load_lanes(weight + i, count) + load_lanes(bias + i, count));
      });
    }
  });
}

// With y = (x - mean) scale and h = weight g:  dx = scale (h - mean(h) - y mean(h y)).
template <typename T>
void normalize_backward(const NormArgs& a, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const int64_t n = a.channels;
  A* room = static_cast<A*>(thread_scratch(static_cast<std::size_t>(2 * n) * sizeof(A)));
  const T* weight = static_cast<const T*>(a.weight);
  for_spans(a.spans, begin, end, [&](int64_t item, int64_t image, int64_t first, int64_t last) {
    A* weight_sums = zeros(static_cast<A*>(a.sums) + item * 2 * n, 2 * n);
    A* bias_sums = weight_sums + n;
    for (int64_t r = first; r < last; ++r) {
      const A* x = widened(token_row<T>(a, image, r), n, room);
      const A* g = widened(static_cast<const T*>(a.grad) + r * n, n, room + n);
      const Moments<A> m = moments(x, n, a.eps);
      Vec<A> sum = {}, along = {};
      for_vectors<A>(n, [&](int64_t i, auto count) {
        const Vec<A> y = (load_lanes(x + i, count) - m.mean) * m.scale,
                     c = load_lanes(g + i, count);
        const Vec<A> h = c * load_lanes(weight + i, count);
        sum += h;
        along += h * y;
        add_to(weight_sums + i, count, c * y);
        add_to(bias_sums + i, count, c);
      });
      if (!a.tokens_grad) continue;
      T* out = static_cast<T*>(a.tokens_grad) + r * n;
      const A share = A(1) / static_cast<A>(n);
      const A mean = reduce_add<A>(sum) * share, slope = reduce_add<A>(along) * share;
      for_vectors<A>(n, [&](int64_t i, auto count) {
        const Vec<A> y = (load_lanes(x + i, count) - m.mean) * m.scale;
        const Vec<A> h = load_lanes(g + i, count) * load_lanes(weight + i, count);
        store_lanes(out + i, count, (h - mean - y * slope) * m.scale);
      });
    }
  });
}

// ---- remap: GELU, split, sum over kept tokens --------------------------------------------------

template <typename T>
void remap(const RemapArgs& a, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const int64_t half = a.half;
  const T* bias = static_cast<const T*>(a.bias);
  const A* keep = static_cast<const A*>(a.keep);
  for_spans(a.spans, begin, end, [&](int64_t item, int64_t, int64_t first, int64_t last) {
    A* sums = zeros(static_cast<A*>(a.sums) + item * half, half);
    for (int64_t r = first; r < last; ++r) {
      const T* z = static_cast<const T*>(a.remapped) + r * 2 * half;
      T* local = static_cast<T*>(a.local) + r * half;
      const A weight = keep ? keep[r] : A(1);
      for_vectors<A>(half, [&](int64_t i, auto count) {
        store_lanes(local + i, count,
                    gelu<A>(load_lanes(z + i, count) + load_lanes(bias + i, count)));
      });
      for_vectors<A>(half, [&](int64_t i, auto count) {
        const Vec<A> x = load_lanes(z + half + i, count) + load_lanes(bias + half + i, count);
        add_to(sums + i, count, gelu<A>(x) * weight);
      });
    }
  });
}

// With s = sum_t w_t g_t / m, m = max(sum_t w_t, 1):
// dg_t = w_t ds / m  and  dw_t = ds . (g_t - [sum_t w_t >= 1] s) / m.
template <typename T>
void remap_backward(const RemapArgs& a, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const int64_t half = a.half;
  const T* bias = static_cast<const T*>(a.bias);
  const A* keep = static_cast<const A*>(a.keep);
  A* keep_grad = static_cast<A*>(a.keep_grad);
  for_spans(a.spans, begin, end, [&](int64_t item, int64_t image, int64_t first, int64_t last) {
    A* sums = zeros(static_cast<A*>(a.sums) + item * 2 * half, 2 * half);
    const T* shared = static_cast<const T*>(a.shared) + image * half;
    const T* shared_grad = static_cast<const T*>(a.shared_grad) + image * half;
    const A mass = static_cast<const A*>(a.mass)[image];
    const A share = A(1) / (mass > 1 ? mass : A(1)), pull = mass >= 1 ? A(1) : A(0);
    for (int64_t r = first; r < last; ++r) {
      const T* z = static_cast<const T*>(a.remapped) + r * 2 * half;
      const T* local_grad = static_cast<const T*>(a.local_grad) + r * half;
      T* local = static_cast<T*>(a.local) + r * half;
      T* out = static_cast<T*>(a.remapped_grad) + r * 2 * half;
      for_vectors<A>(half, [&](int64_t i, auto count) {
        const Vec<A> x = load_lanes(z + i, count) + load_lanes(bias + i, count);
        const Normal<A> p = normal(x);
        store_lanes(local + i, count, x * p.below);
        const Vec<A> grad = load_lanes(local_grad + i, count) * (p.below + x * p.density);
        store_lanes(out + i, count, grad);
        add_to(sums + i, count, grad);
      });
      const A weight = (keep ? keep[r] : A(1)) * share;
      Vec<A> along = {};
      for_vectors<A>(half, [&](int64_t i, auto count) {
        const Vec<A> x = load_lanes(z + half + i, count) + load_lanes(bias + half + i, count);
        const Normal<A> p = normal(x);
        const Vec<A> pulled = load_lanes(shared_grad + i, count);
        along += pulled * (x * p.below - pull * load_lanes(shared + i, count));
        const Vec<A> grad = pulled * weight * (p.below + x * p.density);
        store_lanes(out + half + i, count, grad);
        add_to(sums + half + i, count, grad);
      });
      if (keep_grad) keep_grad[r] = reduce_add<A>(along) * share;
    }
  });
}

// ---- first layer of the MLP --------------------------------------------------------------------

template <typename T>
inline Vec<Acc<T>> once_and_bias(const HiddenArgs& a, int64_t image, int64_t i, int64_t count) {
  const Vec<Acc<T>> bias = load_lanes(static_cast<const T*>(a.bias) + i, count);
  if (!a.once) return bias;
  return bias + load_lanes(static_cast<const T*>(a.once) + image * a.width + i, count);
}

template <typename T>
void hidden(const HiddenArgs& a, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const int64_t n = a.width;
  for_spans(a.spans, begin, end, [&](int64_t, int64_t image, int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      const T* h = static_cast<const T*>(a.hidden) + r * n;
      T* out = static_cast<T*>(a.active) + r * n;
      for_vectors<A>(n, [&](int64_t i, auto count) {
        store_lanes(out + i, count,
                    gelu<A>(load_lanes(h + i, count) + once_and_bias<T>(a, image, i, count)));
      });
    }
  });
}

template <typename T>
void hidden_backward(const HiddenArgs& a, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const int64_t n = a.width;
  for_spans(a.spans, begin, end, [&](int64_t item, int64_t image, int64_t first, int64_t last) {
    A* sums = zeros(static_cast<A*>(a.sums) + item * n, n);
    for (int64_t r = first; r < last; ++r) {
      const T* h = static_cast<const T*>(a.hidden) + r * n;
      T* active = a.active ? static_cast<T*>(a.active) + r * n : nullptr;
      T* out = static_cast<T*>(a.grad) + r * n;
      for_vectors<A>(n, [&](int64_t i, auto count) {
        const Vec<A> x = load_lanes(h + i, count) + once_and_bias<T>(a, image, i, count);
        const Normal<A> p = normal(x);
        if (active) store_lanes(active + i, count, x * p.below);
        const Vec<A> grad = load_lanes(out + i, count) * (p.below + x * p.density);
        store_lanes(out + i, count, grad);
        add_to(sums + i, count, grad);
      });
    }
  });
}

// ---- last layer, with log-softmax --------------------------------------------------------------

// log(1 + e^x)
template <typename A>
inline A soft_plus(A x) {
  return (x < 0 ? A(0) : x) + log_of_one_plus(exponential(x < 0 ? x : -x));
}

template <typename T>
void score(const ScoreArgs& a, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const int64_t n = a.width;
  const T *bias = static_cast<const T*>(a.bias), *weight = static_cast<const T*>(a.weight);
  const T* weight_bias = static_cast<const T*>(a.weight_bias);
  for_spans(a.spans, begin, end, [&](int64_t, int64_t, int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      const T* h = static_cast<const T*>(a.hidden) + r * n;
      Vec<A> keep = {}, drop = {};
      for_vectors<A>(n, [&](int64_t i, auto count) {
        const Vec<A> x = gelu<A>(load_lanes(h + i, count) + load_lanes(bias + i, count));
        keep += x * load_lanes(weight + i, count);
        drop += x * load_lanes(weight + n + i, count);
      });
      const A ahead = (reduce_add<A>(keep) + load(weight_bias[0])) -
                      (reduce_add<A>(drop) + load(weight_bias[1]));
      A* logits = static_cast<A*>(a.logits) + 2 * r;
      logits[0] = -soft_plus(-ahead);
      logits[1] = -soft_plus(ahead);
    }
  });
}

template <typename T>
void score_backward(const ScoreArgs& a, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const int64_t n = a.width;
  const T *bias = static_cast<const T*>(a.bias), *weight = static_cast<const T*>(a.weight);
  for_spans(a.spans, begin, end, [&](int64_t item, int64_t, int64_t first, int64_t last) {
    A* sums = zeros(static_cast<A*>(a.sums) + item * (3 * n + 2), 3 * n + 2);
    for (int64_t r = first; r < last; ++r) {
      const T* h = static_cast<const T*>(a.hidden) + r * n;
      T* out = static_cast<T*>(a.hidden_grad) + r * n;
      const A *logits = static_cast<const A*>(a.logits) + 2 * r,
              *grad = static_cast<const A*>(a.grad) + 2 * r;
      const A total = grad[0] + grad[1];
      const A keep = grad[0] - exponential(logits[0]) * total;
      const A drop = grad[1] - exponential(logits[1]) * total;
      for_vectors<A>(n, [&](int64_t i, auto count) {
        const Vec<A> x = load_lanes(h + i, count) + load_lanes(bias + i, count);
        const Normal<A> p = normal(x);
        const Vec<A> active = x * p.below;
        const Vec<A> pulled =
            keep * load_lanes(weight + i, count) + drop * load_lanes(weight + n + i, count);
        const Vec<A> back = pulled * (p.below + x * p.density);
        store_lanes(out + i, count, back);
        add_to(sums + i, count, back);
        add_to(sums + n + i, count, keep * active);
        add_to(sums + 2 * n + i, count, drop * active);
      });
      sums[3 * n] += keep;
      sums[3 * n + 1] += drop;
    }
  });
}

// ---- sums of sums ------------------------------------------------------------------------------

template <typename T>
void sum_parts(const SumArgs& a, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const A* mass = static_cast<const A*>(a.mass);
  for (int64_t g = begin; g < end; ++g) {
    const A* parts = static_cast<const A*>(a.parts) + g * a.stride;
    const A share = mass && mass[g] > 1 ? mass[g] : A(1);
    for_vectors<A>(a.columns, [&](int64_t i, auto count) {
      Vec<A> sum = {};
      for (int64_t p = 0; p < a.count; ++p) sum += load_lanes(parts + p * a.row + i, count);
      sum /= share;
      const int64_t at = g * a.columns + i;
      if (a.wide)
        store_lanes(static_cast<A*>(a.out) + at, count, sum);
      else
        store_lanes(static_cast<T*>(a.out) + at, count, sum);
    });
  }
}

}  // namespace SPOT_ISA
}  // namespace spot
