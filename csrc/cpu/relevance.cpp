// CPU kernels of token_relevance, run in parallel. The order of things is in common/relevance.h.
#include "../common/relevance.h"

#include "isa.h"

#include <algorithm>

namespace spot {
namespace {

constexpr int64_t kSpanRows = 32;
constexpr int64_t kLeastElements = 16384;  // per task

class Cpu {
 public:
  Cpu(const char* op, const RelevanceInputs& in, const RelevanceShape& shape)
      : in_(in),
        s_(shape),
        wide_(wide_type(in.like())),
        dtype_(dtype_slot(op, in.tokens ? "tokens" : "features", in.like())),
        keep_(wide_keep(in.keep, in.like())),
        spans_{shape.num_tokens, kSpanRows, (shape.num_tokens + kSpanRows - 1) / kSpanRows} {
    SPOT_CHECK(in.like().is_cpu(), op, in.tokens ? "tokens" : "features", " must be on the CPU");
  }

  void normalize(Tensor out) const {
    NormInputs inputs(*this);
    inputs.args.out = writable(out);
    run(kernels().normalize, inputs.args, s_.channels);
  }

  void normalize_backward(const Tensor& grad, RelevanceGrads& out, RelevanceWanted wanted) const {
    NormInputs inputs(*this);
    Tensor sums = span_sums(2 * s_.channels);
    inputs.args.grad = readable(grad);
    inputs.args.tokens_grad = wanted.tokens ? writable(out.tokens) : nullptr;
    inputs.args.sums = writable(sums);
    run(kernels().normalize_backward, inputs.args, s_.channels);
    if (!wanted.weights) return;
    const Tensor images = image_sums(sums);
    sum_images(images, 0, out.norm_weight);
    sum_images(images, s_.channels, out.norm_bias);
  }

  void remap(const Tensor& remapped, Tensor local, Tensor shared) const {
    const Tensor bias = dense(*in_.remap_bias);
    Tensor sums = span_sums(s_.half);
    RemapArgs args = remap_args(remapped, bias, local);
    args.sums = writable(sums);
    run(kernels().remap, args, s_.remap());
    const Tensor mass = kept_mass();
    sum(sums, 0, {s_.batch, spans_.count, s_.half}, &mass, shared);
  }

  void remap_backward(const Tensor& remapped, const Tensor& shared, const Tensor& local_grad,
                      const Tensor& shared_grad, Tensor local, Tensor remapped_grad,
                      RelevanceGrads& out, RelevanceWanted wanted) const {
    const Tensor bias = dense(*in_.remap_bias), mass = kept_mass();
    Tensor sums = span_sums(s_.remap());
    RemapArgs args = remap_args(remapped, bias, local);
    args.sums = writable(sums);
    args.mass = readable(mass);
    args.shared = readable(shared);
    args.local_grad = readable(local_grad);
    args.shared_grad = readable(shared_grad);
    args.remapped_grad = writable(remapped_grad);
    args.keep_grad = wanted.keep ? writable(out.keep) : nullptr;
    run(kernels().remap_backward, args, s_.remap());
    if (wanted.weights) sum_images(image_sums(sums), 0, out.remap_bias);
  }

  void hidden(const Tensor& hidden, const Maybe& once, Tensor active) const {
    const Tensor bias = dense(in_.fc1_bias);
    HiddenArgs args = hidden_args(hidden, once, bias);
    args.active = writable(active);
    run(kernels().hidden, args, s_.hidden1);
  }

  void hidden_backward(const Tensor& hidden, const Maybe& once, Tensor grad, Tensor active,
                       Tensor once_grad, RelevanceGrads& out, RelevanceWanted wanted) const {
    const Tensor bias = dense(in_.fc1_bias);
    Tensor sums = span_sums(s_.hidden1);
    HiddenArgs args = hidden_args(hidden, once, bias);
    args.active = wanted.weights ? writable(active) : nullptr;
    args.grad = writable(grad);
    args.sums = writable(sums);
    run(kernels().hidden_backward, args, s_.hidden1);
    if (once) sum(sums, 0, {s_.batch, spans_.count, s_.hidden1}, nullptr, once_grad);
    if (wanted.weights) sum_images(image_sums(sums), 0, out.fc1_bias);
  }

  void score(const Tensor& hidden, Tensor logits) const {
    ScoreInputs inputs(*this, hidden);
    inputs.args.logits = writable(logits);
    run(kernels().score, inputs.args, s_.hidden2);
  }

  void score_backward(const Tensor& hidden, const Tensor& logits, const Tensor& grad,
                      Tensor hidden_grad, RelevanceGrads& out, RelevanceWanted wanted) const {
    ScoreInputs inputs(*this, hidden);
    Tensor sums = span_sums(3 * s_.hidden2 + 2);
    inputs.args.logits = const_cast<void*>(readable(logits));
    inputs.args.grad = readable(grad);
    inputs.args.hidden_grad = writable(hidden_grad);
    inputs.args.sums = writable(sums);
    run(kernels().score_backward, inputs.args, s_.hidden2);
    if (!wanted.weights) return;
    const Tensor images = image_sums(sums);
    sum_images(images, 0, out.fc2_bias);
    sum_images(images, s_.hidden2, out.fc3_weight);
    sum_images(images, 3 * s_.hidden2, out.fc3_bias);
  }

 private:
  struct NormInputs {
    const Tensor tokens, weight, bias;  // keep the memory alive
    NormArgs args{};
    explicit NormInputs(const Cpu& cpu)
        : tokens(dense_rows(*cpu.in_.tokens)),
          weight(dense(*cpu.in_.norm_weight)),
          bias(dense(*cpu.in_.norm_bias)) {
      args.spans = cpu.spans_;
      args.tokens = readable(tokens);
      args.tokens_batch = tokens.stride(0);
      args.tokens_row = tokens.stride(1);
      args.weight = readable(weight);
      args.bias = readable(bias);
      args.channels = cpu.s_.channels;
      args.eps = cpu.in_.eps;
    }
  };

  struct ScoreInputs {
    const Tensor bias, weight, weight_bias;
    ScoreArgs args{};
    ScoreInputs(const Cpu& cpu, const Tensor& hidden)
        : bias(dense(cpu.in_.fc2_bias)),
          weight(dense(cpu.in_.fc3_weight)),
          weight_bias(dense(cpu.in_.fc3_bias)) {
      args.spans = cpu.spans_;
      args.hidden = readable(hidden);
      args.bias = readable(bias);
      args.width = cpu.s_.hidden2;
      args.weight = readable(weight);
      args.weight_bias = readable(weight_bias);
    }
  };

  RemapArgs remap_args(const Tensor& remapped, const Tensor& bias, Tensor& local) const {
    RemapArgs args{};
    args.spans = spans_;
    args.remapped = readable(remapped);
    args.bias = readable(bias);
    args.keep = keep_ ? readable(*keep_) : nullptr;
    args.half = s_.half;
    args.local = writable(local);
    return args;
  }

  HiddenArgs hidden_args(const Tensor& hidden, const Maybe& once, const Tensor& bias) const {
    HiddenArgs args{};
    args.spans = spans_;
    args.hidden = readable(hidden);
    args.once = once ? readable(*once) : nullptr;
    args.bias = readable(bias);
    args.width = s_.hidden1;
    return args;
  }

  Tensor span_sums(int64_t columns) const {
    return empty_on(in_.like(), {s_.batch, spans_.count, columns}, wide_);
  }

  // Spans of all images; `width` elements per token.
  template <typename Args>
  void run(void (*const (&kernel)[4])(const Args&, int64_t, int64_t), const Args& args,
           int64_t width) const {
    const int64_t grain = std::max<int64_t>(1, kLeastElements / (kSpanRows * (width + 1)));
    torch::stable::parallel_for(0, s_.batch * spans_.count, grain, [&](int64_t begin, int64_t end) {
      kernel[dtype_](args, begin, end);
    });
  }

  struct Parts {
    int64_t groups, count, columns;
  };

  // Adds up `parts`, from column `first` of [groups, count, columns] on, as many as `out` has.
  void sum(const Tensor& parts, int64_t first, Parts of, const Tensor* mass, Tensor out) const {
    if (of.groups == 0) return;
    SumArgs args{};
    args.parts = static_cast<const char*>(readable(parts)) +
                 first * static_cast<int64_t>(parts.element_size());
    args.count = of.count;
    args.columns = out.numel() / of.groups;
    args.row = of.columns;
    args.stride = of.count * of.columns;
    args.mass = mass ? readable(*mass) : nullptr;
    args.out = writable(out);
    args.wide = out.scalar_type() == wide_;
    const int64_t grain = std::max<int64_t>(1, kLeastElements / (of.count * args.columns + 1));
    const KernelTable& table = kernels();
    torch::stable::parallel_for(0, of.groups, grain, [&](int64_t begin, int64_t end) {
      table.sum_parts[dtype_](args, begin, end);
    });
  }

  Tensor image_sums(const Tensor& spans) const {
    const int64_t columns = spans.size(2);
    const Tensor out = empty_on(spans, {s_.batch, columns}, wide_);
    sum(spans, 0, {s_.batch, spans_.count, columns}, nullptr, out);
    return out;
  }

  void sum_images(const Tensor& images, int64_t first, const Tensor& out) const {
    sum(images, first, {1, s_.batch, images.size(1)}, nullptr, out);
  }

  // [B]: sums of keep.
  Tensor kept_mass() const {
    Tensor mass = empty_on(in_.like(), {s_.batch}, wide_);
    if (wide_ == ScalarType::Double)
      add_keep<double>(mass);
    else
      add_keep<float>(mass);
    return mass;
  }

  template <typename A>
  void add_keep(Tensor& mass) const {
    A* out = static_cast<A*>(writable(mass));
    const A* keep = keep_ ? static_cast<const A*>(readable(*keep_)) : nullptr;
    for (int64_t b = 0; b < s_.batch; ++b) {
      A sum = keep ? A(0) : static_cast<A>(s_.num_tokens);
      for (int64_t t = 0; keep && t < s_.num_tokens; ++t) sum += keep[b * s_.num_tokens + t];
      out[b] = sum;
    }
  }

  const RelevanceInputs& in_;
  const RelevanceShape& s_;
  const ScalarType wide_;
  const Dtype dtype_;
  const Maybe keep_;
  const Spans spans_;
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spot, CPU, m) {
  m.impl("token_relevance", TORCH_BOX(&token_relevance<Cpu>));
  m.impl("token_relevance_backward", TORCH_BOX(&token_relevance_backward<Cpu>));
}

}  // namespace spot
