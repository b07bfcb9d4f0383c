// token_relevance: checks, and the order of matrix products and kernels, which is the same on every
// device. A Device gives the kernels between the products; matrices have a row per token.
#pragma once

#include "dispatch.h"
#include "matmul.h"

#include <algorithm>
#include <tuple>
#include <vector>

namespace spot {

using Maybe = std::optional<Tensor>;

struct RelevanceInputs {
  Maybe tokens, features, keep;                            // [B, N, D], [B, N, F], [B, N]
  Maybe norm_weight, norm_bias, remap_weight, remap_bias;  // [D], [D], [R, D], [R]
  Tensor fc1_weight, fc1_bias, fc2_weight, fc2_bias;       // [H1, R+F], [H1], [H2, H1], [H2]
  Tensor fc3_weight, fc3_bias;                             // [2, H2], [2]
  double eps;

  const Tensor& like() const { return tokens ? *tokens : *features; }
};

struct RelevanceShape {
  bool embeddings;
  int64_t batch, num_tokens, channels, half, features, hidden1, hidden2;  // B N D R/2 F H1 H2

  int64_t rows() const { return batch * num_tokens; }
  int64_t remap() const { return 2 * half; }
};

inline void check_relevance_like(const char* op, const char* name, const Tensor& t,
                                 const Tensor& like, const char* like_name, int64_t rank) {
  check_rank(op, name, t, rank);
  check_dtype(op, name, t, like.scalar_type());
  check_same_device(op, name, t, like_name, like);
}

// A parameter of one or two dimensions.
inline void check_parameter(const char* op, const char* name, const Tensor& t, const Tensor& like,
                            const char* like_name, int64_t rows, const char* rows_meaning,
                            int64_t columns = -1, const char* columns_meaning = "") {
  check_relevance_like(op, name, t, like, like_name, columns < 0 ? 1 : 2);
  check_size(op, name, t, 0, rows, rows_meaning);
  if (columns >= 0) check_size(op, name, t, 1, columns, columns_meaning);
}

inline RelevanceShape check_relevance(const char* op, const RelevanceInputs& in) {
  SPOT_CHECK(in.tokens || in.features, op, "tokens and features must not both be None");
  const Tensor& like = in.like();
  const char* like_name = in.tokens ? "tokens" : "features";
  check_rank(op, like_name, like, 3);
  dtype_slot(op, like_name, like);
  RelevanceShape s{in.tokens.has_value(), like.size(0), like.size(1), 0, 0, 0, 0, 0};
  if (in.features) {
    check_relevance_like(op, "features", *in.features, like, like_name, 3);
    check_size(op, "features", *in.features, 0, s.batch, "the batch");
    check_size(op, "features", *in.features, 1, s.num_tokens, "the tokens");
    s.features = in.features->size(2);
  }
  if (in.keep) {
    check_rank(op, "keep", *in.keep, 2);
    dtype_slot(op, "keep", *in.keep);
    check_same_device(op, "keep", *in.keep, like_name, like);
    check_size(op, "keep", *in.keep, 0, s.batch, "the batch");
    check_size(op, "keep", *in.keep, 1, s.num_tokens, "the tokens");
  }
  const auto embedding = [&](const char* name, const Maybe& t) {
    SPOT_CHECK(
        t.has_value() == s.embeddings, op, name,
        s.embeddings ? " must be given with tokens, got None" : " must be None without tokens");
  };
  embedding("norm_weight", in.norm_weight);
  embedding("norm_bias", in.norm_bias);
  embedding("remap_weight", in.remap_weight);
  embedding("remap_bias", in.remap_bias);
  if (s.embeddings) {
    s.channels = like.size(2);
    const char* meaning = "the channels of tokens";
    check_parameter(op, "norm_weight", *in.norm_weight, like, like_name, s.channels, meaning);
    check_parameter(op, "norm_bias", *in.norm_bias, like, like_name, s.channels, meaning);
    check_relevance_like(op, "remap_weight", *in.remap_weight, like, like_name, 2);
    const int64_t remap = in.remap_weight->size(0);
    SPOT_CHECK(remap % 2 == 0, op, "remap_weight must have an even number of rows, got shape ",
               shape_of(*in.remap_weight));
    check_size(op, "remap_weight", *in.remap_weight, 1, s.channels, meaning);
    check_parameter(op, "remap_bias", *in.remap_bias, like, like_name, remap,
                    "rows of remap_weight");
    s.half = remap / 2;
  }
  check_relevance_like(op, "fc1_weight", in.fc1_weight, like, like_name, 2);
  check_size(op, "fc1_weight", in.fc1_weight, 1, s.remap() + s.features,
             "rows of remap_weight and features");
  s.hidden1 = in.fc1_weight.size(0);
  check_parameter(op, "fc1_bias", in.fc1_bias, like, like_name, s.hidden1, "rows of fc1_weight");
  check_relevance_like(op, "fc2_weight", in.fc2_weight, like, like_name, 2);
  check_size(op, "fc2_weight", in.fc2_weight, 1, s.hidden1, "rows of fc1_weight");
  s.hidden2 = in.fc2_weight.size(0);
  check_parameter(op, "fc2_bias", in.fc2_bias, like, like_name, s.hidden2, "rows of fc2_weight");
  check_parameter(op, "fc3_weight", in.fc3_weight, like, like_name, 2, "keep and drop", s.hidden2,
                  "rows of fc2_weight");
  check_parameter(op, "fc3_bias", in.fc3_bias, like, like_name, 2, "keep and drop");
  return s;
}

// [B, N, X] as a matrix: a view where strides allow.
inline Tensor as_matrix(const Tensor& t) {
  return torch::stable::reshape(t, {t.size(0) * t.size(1), t.size(2)});
}

// A matrix of tokens as [B, N, X].
inline Tensor as_images(const Tensor& matrix, const RelevanceShape& s) {
  return torch::stable::view(matrix, {s.batch, s.num_tokens, matrix.size(1)});
}

inline Maybe wide_keep(const Maybe& keep, const Tensor& like) {
  if (!keep) return keep;
  const ScalarType wide = wide_type(like);
  return dense(keep->scalar_type() == wide ? *keep : torch::stable::to(*keep, wide));
}

// Columns of fc1_weight, or of its gradient: local half, shared half, features.
struct FirstLayer {
  Tensor local, shared, features;
  FirstLayer(const Tensor& weight, const RelevanceShape& s)
      : local(columns(weight, 0, s.half)),
        shared(columns(weight, s.half, s.half)),
        features(columns(weight, s.remap(), s.features)) {}
};

// What the forward pass leaves for the backward pass. Products are without biases, and hidden1
// without the shared half; empty without embeddings: remapped and shared.
struct RelevanceResults {
  Tensor logits;            // [B, N, 2] of the wide type
  Tensor remapped, shared;  // [B, N, R], [B, R/2]
  Tensor hidden1, hidden2;  // [B, N, H1], [B, N, H2]
};

template <typename Device>
RelevanceResults relevance_forward(const char* op, const RelevanceInputs& in) {
  const RelevanceShape s = check_relevance(op, in);
  const Device device(op, in, s);
  const Tensor& like = in.like();
  const ScalarType dtype = like.scalar_type(), wide = wide_type(like);
  const FirstLayer first(in.fc1_weight, s);
  RelevanceResults out{empty_on(like, {s.batch, s.num_tokens, 2}, wide), empty_on(like, {0}, dtype),
                       empty_on(like, {0}, dtype), like, like};
  if (is_empty(out.logits)) {  // no tokens: their mean counts as zero
    if (s.embeddings) {
      out.remapped = empty_on(like, {s.batch, s.num_tokens, s.remap()}, dtype);
      out.shared = empty_on(like, {s.batch, s.half}, dtype);
      torch::stable::zero_(out.shared);
    }
    out.hidden1 = empty_on(like, {s.batch, s.num_tokens, s.hidden1}, dtype);
    out.hidden2 = empty_on(like, {s.batch, s.num_tokens, s.hidden2}, dtype);
    return out;
  }
  // One after the other: normalised tokens, their local halves, activations of the first layer.
  Tensor work = empty_on(like, {s.rows(), std::max({s.channels, s.half, s.hidden1})}, dtype);
  const auto room = [&](int64_t width) {
    const Tensor flat = torch::stable::view(work, {work.numel()});
    Tensor part = flat;
    part = torch::stable::narrow(part, 0, 0, s.rows() * width);
    return torch::stable::view(part, {s.rows(), width});
  };
  Maybe once;
  Tensor hidden1 = like;
  if (s.embeddings) {
    const Tensor normed = room(s.channels);
    device.normalize(normed);
    const Tensor remapped = product(normed, transposed(*in.remap_weight));
    const Tensor local = room(s.half);
    out.shared = empty_on(like, {s.batch, s.half}, dtype);
    device.remap(remapped, local, out.shared);
    once = product(out.shared, transposed(first.shared));
    if (s.features > 0) {
      hidden1 = empty_on(like, {s.rows(), s.hidden1}, dtype);
      products_into(hidden1, local, transposed(first.local), as_matrix(*in.features),
                    transposed(first.features));
    } else {
      hidden1 = product(local, transposed(first.local));
    }
    out.remapped = as_images(remapped, s);
  } else {
    hidden1 = product(as_matrix(*in.features), transposed(first.features));
  }
  const Tensor active = room(s.hidden1);
  device.hidden(hidden1, once, active);
  const Tensor hidden2 = product(active, transposed(in.fc2_weight));
  device.score(hidden2, out.logits);
  out.hidden1 = as_images(hidden1, s);
  out.hidden2 = as_images(hidden2, s);
  return out;
}

struct RelevanceWanted {
  bool tokens, features, keep, weights;
};

struct RelevanceGrads {
  Tensor tokens, features, keep;  // that of keep is of the wide type
  Tensor norm_weight, norm_bias, remap_weight, remap_bias;
  Tensor fc1_weight, fc1_bias, fc2_weight, fc2_bias, fc3_weight, fc3_bias;
};

inline void check_relevance_results(const char* op, const RelevanceShape& s, const Tensor& like,
                                    const Tensor& grad, const RelevanceResults& saved) {
  const auto check = [&](const char* name, const Tensor& t, ScalarType dtype,
                         const std::vector<int64_t>& sizes) {
    check_rank(op, name, t, static_cast<int64_t>(sizes.size()));
    check_dtype(op, name, t, dtype);
    check_same_device(op, name, t, "the inputs", like);
    for (std::size_t d = 0; d < sizes.size(); ++d)
      check_size(op, name, t, static_cast<int64_t>(d), sizes[d], "as the forward pass has");
  };
  const ScalarType dtype = like.scalar_type(), wide = wide_type(like);
  check("grad", grad, wide, {s.batch, s.num_tokens, 2});
  check("logits", saved.logits, wide, {s.batch, s.num_tokens, 2});
  check("hidden1", saved.hidden1, dtype, {s.batch, s.num_tokens, s.hidden1});
  check("hidden2", saved.hidden2, dtype, {s.batch, s.num_tokens, s.hidden2});
  if (!s.embeddings) return;
  check("remapped", saved.remapped, dtype, {s.batch, s.num_tokens, s.remap()});
  check("shared", saved.shared, dtype, {s.batch, s.half});
}

template <typename Device>
RelevanceGrads relevance_backward(const char* op, const Tensor& grad, const RelevanceInputs& in,
                                  const RelevanceResults& saved, RelevanceWanted wanted) {
  const RelevanceShape s = check_relevance(op, in);
  const Tensor& like = in.like();
  check_relevance_results(op, s, like, grad, saved);
  const Device device(op, in, s);
  const ScalarType dtype = like.scalar_type();
  wanted.tokens = wanted.tokens && in.tokens;
  wanted.features = wanted.features && in.features;
  wanted.keep = wanted.keep && in.keep && s.embeddings;
  const auto like_if = [&](bool condition, const Maybe& t) {
    return empty_on(like, condition && t ? sizes_of(*t) : std::vector<int64_t>{0}, dtype);
  };
  const auto weight = [&](const Maybe& t) { return like_if(wanted.weights, t); };
  RelevanceGrads out{
      like_if(wanted.tokens, in.tokens),
      like_if(wanted.features, in.features),
      empty_on(like, wanted.keep ? sizes_of(*in.keep) : std::vector<int64_t>{0}, wide_type(like)),
      weight(in.norm_weight),
      weight(in.norm_bias),
      weight(in.remap_weight),
      weight(in.remap_bias),
      weight(in.fc1_weight),
      weight(in.fc1_bias),
      weight(in.fc2_weight),
      weight(in.fc2_bias),
      weight(in.fc3_weight),
      weight(in.fc3_bias)};
  if (is_empty(saved.logits)) {
    for (Tensor* t : {&out.tokens, &out.features, &out.keep, &out.norm_weight, &out.norm_bias,
                      &out.remap_weight, &out.remap_bias, &out.fc1_weight, &out.fc1_bias,
                      &out.fc2_weight, &out.fc2_bias, &out.fc3_weight, &out.fc3_bias})
      torch::stable::zero_(*t);
    return out;
  }
  const FirstLayer first(in.fc1_weight, s);

  const Tensor hidden2_grad = empty_on(like, {s.rows(), s.hidden2}, dtype);
  device.score_backward(dense(saved.hidden2), dense(saved.logits), dense(grad), hidden2_grad, out,
                        wanted);

  // Gradient of the activations, which hidden_backward turns into that of what is below them.
  const Tensor hidden1_grad = product(hidden2_grad, in.fc2_weight);
  const Tensor shared = s.embeddings ? dense(saved.shared) : like;
  Maybe once;
  if (s.embeddings) once = product(shared, transposed(first.shared));
  const Tensor active = empty_on(like, {wanted.weights ? s.rows() : 0, s.hidden1}, dtype);
  const Tensor once_grad = empty_on(like, {s.batch, s.hidden1}, dtype);
  device.hidden_backward(dense(saved.hidden1), once, hidden1_grad, active, once_grad, out, wanted);
  if (wanted.weights) product_into(out.fc2_weight, transposed(hidden2_grad), active);
  if (wanted.features) out.features = as_images(product(hidden1_grad, first.features), s);
  if (wanted.weights && in.features)
    product_into(FirstLayer(out.fc1_weight, s).features, transposed(hidden1_grad),
                 as_matrix(*in.features));
  if (!s.embeddings || !(wanted.tokens || wanted.keep || wanted.weights)) return out;

  const Tensor local = empty_on(like, {s.rows(), s.half}, dtype);
  const Tensor remapped_grad = empty_on(like, {s.rows(), s.remap()}, dtype);
  device.remap_backward(dense(saved.remapped), shared, product(hidden1_grad, first.local),
                        product(once_grad, first.shared), local, remapped_grad, out, wanted);
  if (!wanted.tokens && !wanted.weights) return out;
  if (wanted.weights) {
    const FirstLayer first_grad(out.fc1_weight, s);
    product_into(first_grad.local, transposed(hidden1_grad), local);
    product_into(first_grad.shared, transposed(once_grad), shared);
    const Tensor normed = empty_on(like, {s.rows(), s.channels}, dtype);
    device.normalize(normed);
    product_into(out.remap_weight, transposed(remapped_grad), normed);
  }
  device.normalize_backward(product(remapped_grad, *in.remap_weight), out, wanted);
  return out;
}

// ---- the ops -----------------------------------------------------------------------------------

template <typename Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> token_relevance(
    Maybe tokens, Maybe features, Maybe keep, Maybe norm_weight, Maybe norm_bias,
    Maybe remap_weight, Maybe remap_bias, const Tensor& fc1_weight, const Tensor& fc1_bias,
    const Tensor& fc2_weight, const Tensor& fc2_bias, const Tensor& fc3_weight,
    const Tensor& fc3_bias, double eps) {
  const RelevanceResults r = relevance_forward<Device>(
      "token_relevance", {tokens, features, keep, norm_weight, norm_bias, remap_weight, remap_bias,
                          fc1_weight, fc1_bias, fc2_weight, fc2_bias, fc3_weight, fc3_bias, eps});
  return {r.logits, r.remapped, r.shared, r.hidden1, r.hidden2};
}

using RelevanceGradTuple = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                                      Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename Device>
RelevanceGradTuple token_relevance_backward(
    const Tensor& grad, Maybe tokens, Maybe features, Maybe keep, Maybe norm_weight,
    Maybe norm_bias, Maybe remap_weight, Maybe remap_bias, const Tensor& fc1_weight,
    const Tensor& fc1_bias, const Tensor& fc2_weight, const Tensor& fc2_bias,
    const Tensor& fc3_weight, const Tensor& fc3_bias, const Tensor& logits, const Tensor& remapped,
    const Tensor& shared, const Tensor& hidden1, const Tensor& hidden2, double eps,
    bool tokens_grad, bool features_grad, bool keep_grad, bool weights_grad) {
  const RelevanceGrads g = relevance_backward<Device>(
      "token_relevance_backward", grad,
      {tokens, features, keep, norm_weight, norm_bias, remap_weight, remap_bias, fc1_weight,
       fc1_bias, fc2_weight, fc2_bias, fc3_weight, fc3_bias, eps},
      {logits, remapped, shared, hidden1, hidden2},
      {tokens_grad, features_grad, keep_grad, weights_grad});
  return {g.tokens,       g.features,   g.keep,       g.norm_weight, g.norm_bias,
          g.remap_weight, g.remap_bias, g.fc1_weight, g.fc1_bias,    g.fc2_weight,
          g.fc2_bias,     g.fc3_weight, g.fc3_bias};
}

}  // namespace spot
