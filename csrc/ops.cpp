// Every schema of the `spot` namespace. Kernels register themselves in cpu/<op>.cpp and
// cuda/<op>.cu; fakes, autograd, autocast and FLOP formulas are in spot_ext/<op>.py. Nothing else
// belongs here. Schemas are frozen once released (tests/ext/test_schemas.py).
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(spot, m) {
  // scores [B, N] floating -> ascending positions [B, num_keep] int64 of the largest scores.
  m.def("select_tokens(Tensor scores, SymInt num_keep) -> Tensor");

  // tokens [B, P+N, ...], index [B, M] int64, extra [B, E, ...] -> [B, P+E+M, ...]
  m.def(
      "compact_tokens(Tensor tokens, Tensor index, SymInt num_prefix=1, Tensor? extra=None) -> "
      "Tensor");
  // grad [B, P+E+M, ...] -> gradient of tokens [B, P+num_tokens, ...]
  m.def(
      "compact_tokens_backward(Tensor grad, Tensor index, SymInt num_tokens, SymInt num_prefix=1, "
      "SymInt num_extra=0) -> Tensor");

  // tokens [B, P+M, ...], index [B, M] int64, background and result [B, P+num_tokens, ...]
  m.def(
      "scatter_tokens(Tensor tokens, Tensor index, SymInt num_tokens, SymInt num_prefix=1, "
      "Tensor? background=None) -> Tensor");

  // tokens [B, P+N, C], weights [B, N], index [B, M] int64 -> [B, C]
  m.def(
      "fuse_tokens(Tensor tokens, Tensor weights, Tensor index, SymInt num_prefix=1, "
      "bool normalize=True) -> Tensor");
  // grad [B, C] -> gradients of tokens [B, P+N, C] and weights [B, N]
  m.def(
      "fuse_tokens_backward(Tensor grad, Tensor tokens, Tensor weights, Tensor index, "
      "SymInt num_prefix=1, bool normalize=True) -> (Tensor, Tensor)");

  // q, k, v [B, N, H, D], keep [B, N-P], bias [1|B, H, N, N]
  // -> out [B, N, H, D], stats [B, N, H, 6] (empty without need_stats), lse [B, N, H]
  m.def(
      "attention_stats(Tensor q, Tensor k, Tensor v, Tensor? keep=None, Tensor? bias=None, "
      "float? scale=None, SymInt num_prefix=1, bool class_token=True, bool need_stats=True) "
      "-> (Tensor out, Tensor stats, Tensor lse)");
  // grad_out [B, N, H, D], grad_stats [B, N, H, 6], arguments and results of the forward pass
  // -> gradients of q, k, v; of keep [B, N-P] and bias [1|B, H, N, N] (float32, or float64 for
  // float64; empty unless asked for)
  m.def(
      "attention_stats_backward(Tensor grad_out, Tensor? grad_stats, Tensor q, Tensor k, Tensor v, "
      "Tensor? keep, Tensor? bias, Tensor out, Tensor stats, Tensor lse, float? scale=None, "
      "SymInt num_prefix=1, bool class_token=True, bool keep_grad=False, bool bias_grad=False) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");

  // tokens [B, N, D], features [B, N, F], keep [B, N], norm [D], remap [R, D] and [R], fc1
  // [H1, R+F] and [H1], fc2 [H2, H1] and [H2], fc3 [2, H2] and [2]
  // -> logits [B, N, 2], and for the backward pass remapped [B, N, R], shared [B, R/2] (both empty
  // without tokens), hidden1 [B, N, H1], hidden2 [B, N, H2]
  m.def(
      "token_relevance(Tensor? tokens, Tensor? features, Tensor? keep, Tensor? norm_weight, "
      "Tensor? norm_bias, Tensor? remap_weight, Tensor? remap_bias, Tensor fc1_weight, "
      "Tensor fc1_bias, Tensor fc2_weight, Tensor fc2_bias, Tensor fc3_weight, Tensor fc3_bias, "
      "float eps=1e-5) "
      "-> (Tensor logits, Tensor remapped, Tensor shared, Tensor hidden1, Tensor hidden2)");
  // grad [B, N, 2], arguments and results of the forward pass -> gradients of tokens, features,
  // keep (float32, or float64 for float64) and of the ten parameters; empty where absent or not
  // asked for
  m.def(
      "token_relevance_backward(Tensor grad, Tensor? tokens, Tensor? features, Tensor? keep, "
      "Tensor? norm_weight, Tensor? norm_bias, Tensor? remap_weight, Tensor? remap_bias, "
      "Tensor fc1_weight, Tensor fc1_bias, Tensor fc2_weight, Tensor fc2_bias, Tensor fc3_weight, "
      "Tensor fc3_bias, Tensor logits, Tensor remapped, Tensor shared, Tensor hidden1, "
      "Tensor hidden2, float eps=1e-5, bool tokens_grad=True, bool features_grad=True, "
      "bool keep_grad=True, bool weights_grad=True) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, "
      "Tensor, Tensor)");

  // coefficients [B, H, N-P, R], basis [R, columns], columns [B, N] int64 (those in play; all
  // without), keep [B, N-P] -> index [B, H, N-P, budget] int32, ascending, -1 behind the last
  m.def(
      "connectivity(Tensor coefficients, Tensor basis, SymInt budget, Tensor? columns=None, "
      "Tensor? keep=None, SymInt? coef_topk=None, float? threshold=None) -> Tensor");
  // q [B, N-P, H, D], k [B, N, H, D], down and up [n, R], weights [c, D] and biases [c] (all or
  // none), columns in [0, n] -> the same, of the coefficients softmax(scale q' (down^T k')^T), '
  // being the projections, and of the basis up^T, or |up|^T where it exceeds basis_threshold
  m.def(
      "predict_connectivity(Tensor q, Tensor k, Tensor down, Tensor? query_weight, "
      "Tensor? query_bias, Tensor? key_weight, Tensor? key_bias, Tensor up, SymInt budget, "
      "Tensor? columns=None, Tensor? keep=None, float? scale=None, SymInt? coef_topk=None, "
      "float? basis_threshold=None, float? threshold=None) -> Tensor");

  // q, k, v [B, N, H, D], index [B, H, N-P, K] int32 (-1 behind the last), keep [B, N-P]
  // -> out [B, N, H, D], stats [B, N, H, 6] (empty without need_stats), lse [B, N, H]
  m.def(
      "sparse_attention(Tensor q, Tensor k, Tensor v, Tensor index, Tensor? keep=None, "
      "float? scale=None, SymInt num_prefix=1, bool class_token=True, bool need_stats=False) "
      "-> (Tensor out, Tensor stats, Tensor lse)");
  // grad_out [B, N, H, D], grad_stats [B, N, H, 6], arguments and results of the forward pass
  // -> gradients of q, k, v and of keep [B, N-P] (float32, or float64 for float64; empty unless
  // asked for)
  m.def(
      "sparse_attention_backward(Tensor grad_out, Tensor? grad_stats, Tensor q, Tensor k, Tensor "
      "v, "
      "Tensor index, Tensor? keep, Tensor out, Tensor stats, Tensor lse, float? scale=None, "
      "SymInt num_prefix=1, bool class_token=True, bool keep_grad=False) "
      "-> (Tensor, Tensor, Tensor, Tensor)");

  // weight [out, in] -> panels [ceil(out / 32), in, 32], padded with zeros
  m.def("pack_linear(Tensor weight) -> Tensor");
  // input [..., in], packed [ceil(out / 32), in, 32], bias [out], residual and result [..., out];
  // activation "none", "gelu" or "gelu_tanh"; the residual is added last
  m.def(
      "packed_linear(Tensor input, Tensor packed, SymInt out_features, Tensor? bias=None, "
      "Tensor? residual=None, str activation='none') -> Tensor");

  // stats: L of [B, P+N, H, 6], of whose rows the last `counts` are patch tokens; followed: how
  // many cuts came before each; cuts: K of [B, kept] int64, each among those left before
  // -> [B, M, F]: columns [latest_first, latest_last) of the last block, then mean and variance
  m.def(
      "token_evidence(Tensor[] stats, SymInt[] counts, int[] followed, Tensor[] cuts, "
      "str scaling='log1p', bool mean_heads=False, int latest_first=0, int latest_last=6, "
      "bool moments=True) -> Tensor");
}
