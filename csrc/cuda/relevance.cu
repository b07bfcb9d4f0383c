// CUDA kernels of token_relevance. The order of things, and the matrix products between the
// kernels, are in common/relevance.h.
//
// Where a row is reduced, a warp has it. Where a column is, a block has a span of an image's tokens
// and each thread whole columns of it, row by row: neighbouring threads read neighbouring elements,
// and sums need no exchange. Sums over spans and images are added up in order afterwards.
#include "../common/relevance.h"
#include "block.cuh"
#include "device.h"

#include <algorithm>

namespace spot {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kSpanRows = 32;

__device__ inline float exponential(float x) { return expf(x); }
__device__ inline double exponential(double x) { return exp(x); }
__device__ inline float log_of_one_plus(float x) { return log1pf(x); }
__device__ inline double log_of_one_plus(double x) { return log1p(x); }
__device__ inline float inverse_root(float x) { return __frsqrt_rn(x); }
__device__ inline double inverse_root(double x) { return rsqrt(x); }

// The standard normal distribution at x: P(X <= x), and the density.
template <typename A>
struct Normal {
  A below, density;
};
__device__ inline Normal<float> normal(float x) {
  return {0.5f * erfcf(-0.70710678f * x), 0.39894228f * expf(-0.5f * x * x)};
}
__device__ inline Normal<double> normal(double x) {
  return {0.5 * erfc(-0.70710678118654752 * x), 0.39894228040143268 * exp(-0.5 * x * x)};
}

template <typename A>
__device__ inline A gelu(A x) {
  return x * normal(x).below;
}
template <typename A>
__device__ inline A gelu_slope(A x, Normal<A> p) {
  return p.below + x * p.density;
}

// log(1 + e^x)
template <typename A>
__device__ inline A soft_plus(A x) {
  return (x < 0 ? A(0) : x) + log_of_one_plus(exponential(x < 0 ? x : -x));
}

struct TokenSpans {
  int64_t num_tokens, count;  // N, spans per image
};

// The span of this block: rows are counted over all images.
struct Span {
  int64_t image, first, last;
  __device__ explicit Span(const TokenSpans& s) {
    image = blockIdx.x / s.count;
    const int64_t start = (blockIdx.x - image * s.count) * kSpanRows;
    const int64_t stop = start + kSpanRows < s.num_tokens ? start + kSpanRows : s.num_tokens;
    first = image * s.num_tokens + start;
    last = image * s.num_tokens + stop;
  }
};

// ---- layer normalisation -----------------------------------------------------------------------

struct TokenRows {
  int64_t batch_stride, row_stride, num_tokens, rows, channels;

  __device__ int64_t at(int64_t row) const {
    const int64_t image = row / num_tokens;
    return image * batch_stride + (row - image * num_tokens) * row_stride;
  }
};

template <typename A>
struct Moments {
  A mean, scale;  // scale: 1 / sqrt(variance + eps)
};

// By a warp.
template <typename T>
__device__ inline Moments<Acc<T>> moments(const T* x, int64_t n, Acc<T> eps) {
  using A = Acc<T>;
  const int lane = threadIdx.x % kWarp;
  const A share = A(1) / static_cast<A>(n);
  A sum = 0, squares = 0;
  for (int64_t i = lane; i < n; i += kWarp) sum += load(x[i]);
  const A mean = warp_sum(sum) * share;
  for (int64_t i = lane; i < n; i += kWarp) {
    const A away = load(x[i]) - mean;
    squares += away * away;
  }
  return {mean, inverse_root(warp_sum(squares) * share + eps)};
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    normalize_kernel(const T* __restrict__ tokens, TokenRows rows, const T* __restrict__ weight,
                     const T* __restrict__ bias, Acc<T> eps, T* __restrict__ out) {
  using A = Acc<T>;
  const int64_t step = static_cast<int64_t>(gridDim.x) * (kThreads / kWarp), n = rows.channels;
  for (int64_t r = blockIdx.x * static_cast<int64_t>(kThreads / kWarp) + threadIdx.x / kWarp;
       r < rows.rows; r += step) {
    const T* x = tokens + rows.at(r);
    const Moments<A> m = moments(x, n, eps);
    for (int64_t i = threadIdx.x % kWarp; i < n; i += kWarp)
      out[r * n + i] = store<T>((load(x[i]) - m.mean) * m.scale * load(weight[i]) + load(bias[i]));
  }
}

// With y = (x - mean) scale and h = weight g:  dx = scale (h - mean(h) - y mean(h y)). Leaves the
// moments for normalize_sums_kernel. tokens_grad may be null.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    normalize_backward_kernel(const T* __restrict__ tokens, TokenRows rows,
                              const T* __restrict__ weight, Acc<T> eps, const T* __restrict__ grad,
                              T* __restrict__ tokens_grad, Acc<T>* __restrict__ row_moments) {
  using A = Acc<T>;
  const int lane = threadIdx.x % kWarp;
  const int64_t step = static_cast<int64_t>(gridDim.x) * (kThreads / kWarp), n = rows.channels;
  for (int64_t r = blockIdx.x * static_cast<int64_t>(kThreads / kWarp) + threadIdx.x / kWarp;
       r < rows.rows; r += step) {
    const T *x = tokens + rows.at(r), *g = grad + r * n;
    const Moments<A> m = moments(x, n, eps);
    if (lane == 0) {
      row_moments[2 * r] = m.mean;
      row_moments[2 * r + 1] = m.scale;
    }
    if (tokens_grad == nullptr) continue;
    A sum = 0, along = 0;
    for (int64_t i = lane; i < n; i += kWarp) {
      const A h = load(g[i]) * load(weight[i]);
      sum += h;
      along += h * (load(x[i]) - m.mean) * m.scale;
    }
    const A share = A(1) / static_cast<A>(n);
    const A mean = warp_sum(sum) * share, slope = warp_sum(along) * share;
    for (int64_t i = lane; i < n; i += kWarp) {
      const A y = (load(x[i]) - m.mean) * m.scale;
      tokens_grad[r * n + i] =
          store<T>((load(g[i]) * load(weight[i]) - mean - y * slope) * m.scale);
    }
  }
}

// Gradients of weight and bias, per span: sums [B, spans, 2, D].
template <typename T>
__global__ void __launch_bounds__(kThreads)
    normalize_sums_kernel(TokenSpans spans, const T* __restrict__ tokens, TokenRows rows,
                          const T* __restrict__ grad, const Acc<T>* __restrict__ row_moments,
                          Acc<T>* __restrict__ sums) {
  using A = Acc<T>;
  const Span span(spans);
  const int64_t n = rows.channels;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) {
    A weight = 0, bias = 0;
    for (int64_t r = span.first; r < span.last; ++r) {
      const A g = load(grad[r * n + i]);
      weight += g * (load(tokens[rows.at(r) + i]) - row_moments[2 * r]) * row_moments[2 * r + 1];
      bias += g;
    }
    sums[2 * blockIdx.x * n + i] = weight;
    sums[(2 * blockIdx.x + 1) * n + i] = bias;
  }
}

// ---- remap: GELU, split, sum over kept tokens --------------------------------------------------

// One block per image.
template <typename A>
__global__ void __launch_bounds__(kThreads)
    mass_kernel(const A* __restrict__ keep, int64_t num_tokens, A* __restrict__ mass) {
  __shared__ A partial[kThreads / kWarp];
  A sum = 0;
  for (int64_t t = threadIdx.x; t < num_tokens; t += kThreads)
    sum += keep ? keep[blockIdx.x * num_tokens + t] : A(1);
  sum = block_sum(sum, partial);
  if (threadIdx.x == 0) mass[blockIdx.x] = sum;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    remap_kernel(TokenSpans spans, const T* __restrict__ remapped, const T* __restrict__ bias,
                 const Acc<T>* __restrict__ keep, int64_t half, T* __restrict__ local,
                 Acc<T>* __restrict__ sums) {
  using A = Acc<T>;
  const Span span(spans);
  for (int64_t i = threadIdx.x; i < half; i += kThreads) {
    const A local_bias = load(bias[i]), shared_bias = load(bias[half + i]);
    A sum = 0;
    for (int64_t r = span.first; r < span.last; ++r) {
      const T* z = remapped + r * 2 * half;
      local[r * half + i] = store<T>(gelu(load(z[i]) + local_bias));
      sum += gelu(load(z[half + i]) + shared_bias) * (keep ? keep[r] : A(1));
    }
    sums[blockIdx.x * half + i] = sum;
  }
}

template <typename T>
struct RemapGrad {
  const T *remapped, *bias;
  const Acc<T>*keep, *mass;
  const T *shared, *local_grad, *shared_grad;
  int64_t half;
  T *local, *remapped_grad;
  Acc<T>*keep_grad, *sums;
};

// With s = sum_t w_t g_t / m, m = max(sum_t w_t, 1):
// dg_t = w_t ds / m  and  dw_t = ds . (g_t - [sum_t w_t >= 1] s) / m.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    remap_backward_kernel(TokenSpans spans, RemapGrad<T> a) {
  using A = Acc<T>;
  const Span span(spans);
  const int64_t half = a.half;
  const A mass = a.mass[span.image], share = A(1) / (mass > 1 ? mass : A(1));
  A* sums = a.sums + blockIdx.x * 2 * half;
  for (int64_t i = threadIdx.x; i < half; i += kThreads) {
    const A bias = load(a.bias[i]);
    A sum = 0;
    for (int64_t r = span.first; r < span.last; ++r) {
      const A x = load(a.remapped[2 * r * half + i]) + bias;
      const Normal<A> p = normal(x);
      a.local[r * half + i] = store<T>(x * p.below);
      const A grad = load(a.local_grad[r * half + i]) * gelu_slope(x, p);
      a.remapped_grad[2 * r * half + i] = store<T>(grad);
      sum += grad;
    }
    sums[i] = sum;
  }
  for (int64_t i = threadIdx.x; i < half; i += kThreads) {
    const A bias = load(a.bias[half + i]);
    const A pulled = load(a.shared_grad[span.image * half + i]) * share;
    A sum = 0;
    for (int64_t r = span.first; r < span.last; ++r) {
      const A x = load(a.remapped[(2 * r + 1) * half + i]) + bias;
      const A grad = pulled * (a.keep ? a.keep[r] : A(1)) * gelu_slope(x, normal(x));
      a.remapped_grad[(2 * r + 1) * half + i] = store<T>(grad);
      sum += grad;
    }
    sums[half + i] = sum;
  }
}

// The gradient of keep, which remap_backward_kernel leaves out.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    keep_backward_kernel(int64_t rows, int64_t num_tokens, RemapGrad<T> a) {
  using A = Acc<T>;
  const int64_t step = static_cast<int64_t>(gridDim.x) * (kThreads / kWarp), half = a.half;
  for (int64_t r = blockIdx.x * static_cast<int64_t>(kThreads / kWarp) + threadIdx.x / kWarp;
       r < rows; r += step) {
    const int64_t image = r / num_tokens;
    const A mass = a.mass[image], pull = mass >= 1 ? A(1) : A(0);
    const T *z = a.remapped + (2 * r + 1) * half, *shared = a.shared + image * half;
    A along = 0;
    for (int64_t i = threadIdx.x % kWarp; i < half; i += kWarp) {
      const A g = gelu(load(z[i]) + load(a.bias[half + i]));
      along += load(a.shared_grad[image * half + i]) * (g - pull * load(shared[i]));
    }
    along = warp_sum(along);
    if (threadIdx.x % kWarp == 0) a.keep_grad[r] = along / (mass > 1 ? mass : A(1));
  }
}

// ---- first layer of the MLP --------------------------------------------------------------------

// once may be null.
template <typename T>
__device__ inline Acc<T> once_and_bias(const T* once, const T* bias, int64_t image, int64_t width,
                                       int64_t i) {
  return load(bias[i]) + (once ? load(once[image * width + i]) : Acc<T>(0));
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    hidden_kernel(TokenSpans spans, const T* __restrict__ hidden, const T* __restrict__ once,
                  const T* __restrict__ bias, int64_t width, T* __restrict__ active) {
  const Span span(spans);
  for (int64_t i = threadIdx.x; i < width; i += kThreads) {
    const Acc<T> shift = once_and_bias(once, bias, span.image, width, i);
    for (int64_t r = span.first; r < span.last; ++r)
      active[r * width + i] = store<T>(gelu(load(hidden[r * width + i]) + shift));
  }
}

// grad: of `active` before, of `hidden` after. active may be null.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    hidden_backward_kernel(TokenSpans spans, const T* __restrict__ hidden,
                           const T* __restrict__ once, const T* __restrict__ bias, int64_t width,
                           T* __restrict__ active, T* __restrict__ grad,
                           Acc<T>* __restrict__ sums) {
  using A = Acc<T>;
  const Span span(spans);
  for (int64_t i = threadIdx.x; i < width; i += kThreads) {
    const A shift = once_and_bias(once, bias, span.image, width, i);
    A sum = 0;
    for (int64_t r = span.first; r < span.last; ++r) {
      const A x = load(hidden[r * width + i]) + shift;
      const Normal<A> p = normal(x);
      if (active) active[r * width + i] = store<T>(x * p.below);
      const A back = load(grad[r * width + i]) * gelu_slope(x, p);
      grad[r * width + i] = store<T>(back);
      sum += back;
    }
    sums[blockIdx.x * width + i] = sum;
  }
}

// ---- last layer, with log-softmax --------------------------------------------------------------

template <typename T>
__global__ void __launch_bounds__(kThreads)
    score_kernel(const T* __restrict__ hidden, const T* __restrict__ bias, int64_t rows,
                 int64_t width, const T* __restrict__ weight, const T* __restrict__ weight_bias,
                 Acc<T>* __restrict__ logits) {
  using A = Acc<T>;
  const int lane = threadIdx.x % kWarp;
  const int64_t step = static_cast<int64_t>(gridDim.x) * (kThreads / kWarp);
  for (int64_t r = blockIdx.x * static_cast<int64_t>(kThreads / kWarp) + threadIdx.x / kWarp;
       r < rows; r += step) {
    A keep = 0, drop = 0;
    for (int64_t i = lane; i < width; i += kWarp) {
      const A x = gelu(load(hidden[r * width + i]) + load(bias[i]));
      keep += x * load(weight[i]);
      drop += x * load(weight[width + i]);
    }
    const A ahead =
        (warp_sum(keep) + load(weight_bias[0])) - (warp_sum(drop) + load(weight_bias[1]));
    if (lane == 0) {
      logits[2 * r] = -soft_plus(-ahead);
      logits[2 * r + 1] = -soft_plus(ahead);
    }
  }
}

// sums [B, spans, 3 width + 2]: gradients of bias, weight and weight_bias.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    score_backward_kernel(TokenSpans spans, const T* __restrict__ hidden,
                          const T* __restrict__ bias, int64_t width, const T* __restrict__ weight,
                          const Acc<T>* __restrict__ logits, const Acc<T>* __restrict__ grad,
                          T* __restrict__ hidden_grad, Acc<T>* __restrict__ sums) {
  using A = Acc<T>;
  __shared__ A keep[kSpanRows], drop[kSpanRows];  // gradients before the log-softmax
  const Span span(spans);
  const int64_t count = span.last - span.first;
  sums += blockIdx.x * (3 * width + 2);
  if (threadIdx.x < count) {
    const int64_t at = 2 * (span.first + threadIdx.x);
    const A total = grad[at] + grad[at + 1];
    keep[threadIdx.x] = grad[at] - exponential(logits[at]) * total;
    drop[threadIdx.x] = grad[at + 1] - exponential(logits[at + 1]) * total;
  }
  __syncthreads();
  for (int64_t i = threadIdx.x; i < width; i += kThreads) {
    const A shift = load(bias[i]), to_keep = load(weight[i]), to_drop = load(weight[width + i]);
    A sum = 0, keep_sum = 0, drop_sum = 0;
    for (int64_t t = 0; t < count; ++t) {
      const int64_t at = (span.first + t) * width + i;
      const A x = load(hidden[at]) + shift;
      const Normal<A> p = normal(x);
      const A back = (keep[t] * to_keep + drop[t] * to_drop) * gelu_slope(x, p);
      hidden_grad[at] = store<T>(back);
      sum += back;
      keep_sum += keep[t] * x * p.below;
      drop_sum += drop[t] * x * p.below;
    }
    sums[i] = sum;
    sums[width + i] = keep_sum;
    sums[2 * width + i] = drop_sum;
  }
  if (threadIdx.x == 0) {
    A keep_sum = 0, drop_sum = 0;
    for (int64_t t = 0; t < count; ++t) {
      keep_sum += keep[t];
      drop_sum += drop[t];
    }
    sums[3 * width] = keep_sum;
    sums[3 * width + 1] = drop_sum;
  }
}

// ---- sums of sums ------------------------------------------------------------------------------

struct SumSizes {
  int64_t groups, count, columns;  // of the result: groups, columns
  int64_t row, stride;             // of the parts, in elements
};

// out[g] = sum over p of parts[g, p], in order; with `mass` divided by max(mass[g], 1).
template <typename A, typename Out>
__global__ void __launch_bounds__(kThreads)
    sum_kernel(const A* __restrict__ parts, SumSizes s, const A* __restrict__ mass,
               Out* __restrict__ out) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
       i < s.groups * s.columns; i += step) {
    const int64_t g = i / s.columns;
    const A* from = parts + g * s.stride + (i - g * s.columns);
    A sum = 0;
    for (int64_t p = 0; p < s.count; ++p) sum += from[p * s.row];
    out[i] = store<Out>(sum / (mass && mass[g] > 1 ? mass[g] : A(1)));
  }
}

// ---- the device --------------------------------------------------------------------------------

template <typename T>
T* if_wanted(bool wanted, const Tensor& t) {
  return wanted ? mutable_data<T>(t) : nullptr;
}

class Cuda {
 public:
  Cuda(const char* op, const RelevanceInputs& in, const RelevanceShape& shape)
      : op_(op),
        in_(in),
        s_(shape),
        wide_(wide_type(in.like())),
        dtype_(dtype_slot(op, in.tokens ? "tokens" : "features", in.like())),
        guard_(checked_index(op, in)),
        stream_(current_stream(in.like())),
        keep_(wide_keep(in.keep, in.like())),
        spans_{shape.num_tokens, (shape.num_tokens + kSpanRows - 1) / kSpanRows} {}

  void normalize(const Tensor& out) const {
    const Tensor tokens = dense_rows(*in_.tokens);
    const Tensor weight = dense(*in_.norm_weight), bias = dense(*in_.norm_bias);
    dispatch(dtype_, [&](auto zero) {
      using T = decltype(zero);
      launch(op_, normalize_kernel<T>, warp_blocks(), kThreads, 0, stream_, data<T>(tokens),
             token_rows(tokens), data<T>(weight), data<T>(bias), static_cast<Acc<T>>(in_.eps),
             mutable_data<T>(out));
    });
  }

  void normalize_backward(const Tensor& grad, RelevanceGrads& out, RelevanceWanted wanted) const {
    const Tensor tokens = dense_rows(*in_.tokens), weight = dense(*in_.norm_weight);
    const Tensor row_moments = empty_on(tokens, {s_.rows(), 2}, wide_);
    const Tensor sums = span_sums(2 * s_.channels);
    dispatch(dtype_, [&](auto zero) {
      using T = decltype(zero);
      launch(op_, normalize_backward_kernel<T>, warp_blocks(), kThreads, 0, stream_,
             data<T>(tokens), token_rows(tokens), data<T>(weight), static_cast<Acc<T>>(in_.eps),
             data<T>(grad), if_wanted<T>(wanted.tokens, out.tokens),
             mutable_data<Acc<T>>(row_moments));
      if (!wanted.weights) return;
      launch(op_, normalize_sums_kernel<T>, span_blocks(), kThreads, 0, stream_, spans_,
             data<T>(tokens), token_rows(tokens), data<T>(grad), data<Acc<T>>(row_moments),
             mutable_data<Acc<T>>(sums));
    });
    if (!wanted.weights) return;
    const Tensor images = image_sums(sums);
    sum_images(images, 0, out.norm_weight);
    sum_images(images, s_.channels, out.norm_bias);
  }

  void remap(const Tensor& remapped, const Tensor& local, const Tensor& shared) const {
    const Tensor bias = dense(*in_.remap_bias), sums = span_sums(s_.half), mass = kept_mass();
    dispatch(dtype_, [&](auto zero) {
      using T = decltype(zero);
      launch(op_, remap_kernel<T>, span_blocks(), kThreads, 0, stream_, spans_, data<T>(remapped),
             data<T>(bias), keep<Acc<T>>(), s_.half, mutable_data<T>(local),
             mutable_data<Acc<T>>(sums));
    });
    sum(sums, 0, {s_.batch, spans_.count, s_.half, s_.half, spans_.count * s_.half}, &mass, shared);
  }

  void remap_backward(const Tensor& remapped, const Tensor& shared, const Tensor& local_grad,
                      const Tensor& shared_grad, const Tensor& local, const Tensor& remapped_grad,
                      RelevanceGrads& out, RelevanceWanted wanted) const {
    const Tensor bias = dense(*in_.remap_bias), mass = kept_mass();
    const Tensor sums = span_sums(s_.remap());
    dispatch(dtype_, [&](auto zero) {
      using T = decltype(zero);
      const RemapGrad<T> args{data<T>(remapped),
                              data<T>(bias),
                              keep<Acc<T>>(),
                              data<Acc<T>>(mass),
                              data<T>(shared),
                              data<T>(local_grad),
                              data<T>(shared_grad),
                              s_.half,
                              mutable_data<T>(local),
                              mutable_data<T>(remapped_grad),
                              if_wanted<Acc<T>>(wanted.keep, out.keep),
                              mutable_data<Acc<T>>(sums)};
      launch(op_, remap_backward_kernel<T>, span_blocks(), kThreads, 0, stream_, spans_, args);
      if (wanted.keep)
        launch(op_, keep_backward_kernel<T>, warp_blocks(), kThreads, 0, stream_, s_.rows(),
               s_.num_tokens, args);
    });
    if (wanted.weights) sum_images(image_sums(sums), 0, out.remap_bias);
  }

  void hidden(const Tensor& hidden, const Maybe& once, const Tensor& active) const {
    const Tensor bias = dense(in_.fc1_bias);
    dispatch(dtype_, [&](auto zero) {
      using T = decltype(zero);
      launch(op_, hidden_kernel<T>, span_blocks(), kThreads, 0, stream_, spans_, data<T>(hidden),
             once ? data<T>(*once) : nullptr, data<T>(bias), s_.hidden1, mutable_data<T>(active));
    });
  }

  void hidden_backward(const Tensor& hidden, const Maybe& once, const Tensor& grad,
                       const Tensor& active, const Tensor& once_grad, RelevanceGrads& out,
                       RelevanceWanted wanted) const {
    const Tensor bias = dense(in_.fc1_bias), sums = span_sums(s_.hidden1);
    dispatch(dtype_, [&](auto zero) {
      using T = decltype(zero);
      launch(op_, hidden_backward_kernel<T>, span_blocks(), kThreads, 0, stream_, spans_,
             data<T>(hidden), once ? data<T>(*once) : nullptr, data<T>(bias), s_.hidden1,
             if_wanted<T>(wanted.weights, active), mutable_data<T>(grad),
             mutable_data<Acc<T>>(sums));
    });
    if (once)
      sum(sums, 0, {s_.batch, spans_.count, s_.hidden1, s_.hidden1, spans_.count * s_.hidden1},
          nullptr, once_grad);
    if (wanted.weights) sum_images(image_sums(sums), 0, out.fc1_bias);
  }

  void score(const Tensor& hidden, const Tensor& logits) const {
    const Tensor bias = dense(in_.fc2_bias), weight = dense(in_.fc3_weight);
    const Tensor weight_bias = dense(in_.fc3_bias);
    dispatch(dtype_, [&](auto zero) {
      using T = decltype(zero);
      launch(op_, score_kernel<T>, warp_blocks(), kThreads, 0, stream_, data<T>(hidden),
             data<T>(bias), s_.rows(), s_.hidden2, data<T>(weight), data<T>(weight_bias),
             mutable_data<Acc<T>>(logits));
    });
  }

  void score_backward(const Tensor& hidden, const Tensor& logits, const Tensor& grad,
                      const Tensor& hidden_grad, RelevanceGrads& out,
                      RelevanceWanted wanted) const {
    const Tensor bias = dense(in_.fc2_bias), weight = dense(in_.fc3_weight);
    const Tensor sums = span_sums(3 * s_.hidden2 + 2);
    dispatch(dtype_, [&](auto zero) {
      using T = decltype(zero);
      launch(op_, score_backward_kernel<T>, span_blocks(), kThreads, 0, stream_, spans_,
             data<T>(hidden), data<T>(bias), s_.hidden2, data<T>(weight), data<Acc<T>>(logits),
             data<Acc<T>>(grad), mutable_data<T>(hidden_grad), mutable_data<Acc<T>>(sums));
    });
    if (!wanted.weights) return;
    const Tensor images = image_sums(sums);
    sum_images(images, 0, out.fc2_bias);
    sum_images(images, s_.hidden2, out.fc3_weight);
    sum_images(images, 3 * s_.hidden2, out.fc3_bias);
  }

 private:
  static int32_t checked_index(const char* op, const RelevanceInputs& in) {
    check_cuda(op, in.tokens ? "tokens" : "features", in.like());
    return in.like().get_device_index();
  }

  TokenRows token_rows(const Tensor& tokens) const {
    return {tokens.stride(0), tokens.stride(1), s_.num_tokens, s_.rows(), s_.channels};
  }

  template <typename A>
  const A* keep() const {
    return keep_ ? data<A>(*keep_) : nullptr;
  }

  int64_t span_blocks() const { return s_.batch * spans_.count; }
  int64_t warp_blocks() const {
    constexpr int64_t kWarps = kThreads / kWarp, kMost = 65536;
    return std::min<int64_t>((s_.rows() + kWarps - 1) / kWarps, kMost);
  }

  Tensor span_sums(int64_t columns) const {
    return empty_on(in_.like(), {s_.batch, spans_.count, columns}, wide_);
  }

  // [B]: sums of keep.
  Tensor kept_mass() const {
    const Tensor mass = empty_on(in_.like(), {s_.batch}, wide_);
    const auto run = [&](auto zero) {
      using A = decltype(zero);
      launch(op_, mass_kernel<A>, s_.batch, kThreads, 0, stream_, keep<A>(), s_.num_tokens,
             mutable_data<A>(mass));
    };
    wide_ == ScalarType::Double ? run(double{}) : run(float{});
    return mass;
  }

  // Adds up `parts`, from column `first` on.
  void sum(const Tensor& parts, int64_t first, SumSizes sizes, const Tensor* mass,
           const Tensor& out) const {
    constexpr int64_t kMost = 65536;
    const int64_t blocks =
        std::min<int64_t>((sizes.groups * sizes.columns + kThreads - 1) / kThreads, kMost);
    dispatch(dtype_, [&](auto zero) {
      using T = decltype(zero);
      using A = Acc<T>;
      const A *from = data<A>(parts) + first, *by = mass ? data<A>(*mass) : nullptr;
      if (out.scalar_type() == wide_)
        launch(op_, sum_kernel<A, A>, blocks, kThreads, 0, stream_, from, sizes, by,
               mutable_data<A>(out));
      else
        launch(op_, sum_kernel<A, T>, blocks, kThreads, 0, stream_, from, sizes, by,
               mutable_data<T>(out));
    });
  }

  Tensor image_sums(const Tensor& spans) const {
    const int64_t columns = spans.size(2);
    const Tensor out = empty_on(spans, {s_.batch, columns}, wide_);
    sum(spans, 0, {s_.batch, spans_.count, columns, columns, spans_.count * columns}, nullptr, out);
    return out;
  }

  void sum_images(const Tensor& images, int64_t first, const Tensor& out) const {
    sum(images, first, {1, s_.batch, out.numel(), images.size(1), 0}, nullptr, out);
  }

  const char* const op_;
  const RelevanceInputs& in_;
  const RelevanceShape& s_;
  const ScalarType wide_;
  const Dtype dtype_;
  const DeviceGuard guard_;
  const cudaStream_t stream_;
  const Maybe keep_;
  const TokenSpans spans_;
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spot, CUDA, m) {
  m.impl("token_relevance", TORCH_BOX(&token_relevance<Cuda>));
  m.impl("token_relevance_backward", TORCH_BOX(&token_relevance_backward<Cuda>));
}

}  // namespace spot
