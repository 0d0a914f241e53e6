// How calls of public functions are read, and made by PyTorch's own.

#include "autocast.h"
#include "forms.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/add.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/cross_entropy_loss.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/layer_norm.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/log.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/neg.h>
#include <ATen/ops/rms_norm.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/stack.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cmath>
#include <initializer_list>
#include <iterator>

namespace gating {

PyTypeObject* parameter_type = nullptr;

namespace {

using at::Tensor;

// A tensor that is nothing but its memory: others may not have sizes or strides, and would throw where they are asked.
bool tensor(Call& call, int index) {
  PyObject* given = call.given[index];
  if (reinterpret_cast<PyObject*>(Py_TYPE(given)) != THPVariableClass && Py_TYPE(given) != parameter_type) return false;
  const Tensor& there = THPVariable_Unpack(given);
  const auto kind = served_kind();
  if (there.device().type() != kind || !ordinary(there, kind)) return false;
  call.objects[call.count] = given;
  call.tensors[call.count++] = there;
  return true;
}

bool tensor_or_none(Call& call, int index) {
  if (call.given[index] != Py_None) return tensor(call, index);
  call.objects[call.count++] = nullptr;
  return true;
}

// The first of the arguments, all of them tensors.
bool tensors(Call& call, int count) {
  for (int i = 0; i < count; ++i) {
    if (!tensor(call, i)) return false;
  }
  return true;
}

// A tensor as PyTorch's functions take one that may be None.
std::optional<Tensor> there(const Tensor& given) {
  return given.defined() ? std::optional<Tensor>(given) : std::nullopt;
}

bool flag(PyObject* given, bool& into) {
  into = given == Py_True;
  return into || given == Py_False;
}

bool zero(PyObject* given) { return PyFloat_CheckExact(given) && PyFloat_AS_DOUBLE(given) == 0.0; }

bool positive_or_none(PyObject* given, std::optional<double>& into) {
  if (given == Py_None) return true;
  if (!PyFloat_CheckExact(given) || !(PyFloat_AS_DOUBLE(given) > 0.0)) return false;
  into = PyFloat_AS_DOUBLE(given);
  return true;
}

bool real(PyObject* given, double& into) {
  if (!PyFloat_CheckExact(given)) return false;
  into = PyFloat_AS_DOUBLE(given);
  return true;
}

// Which of these words it is, or -1.
int word(PyObject* given, std::initializer_list<const char*> words) {
  if (!PyUnicode_CheckExact(given)) return -1;
  int index = 0;
  for (const char* each : words) {
    if (PyUnicode_CompareWithASCIIString(given, each) == 0) return index;
    ++index;
  }
  return -1;
}

// ---- Forms

Tensor sdpa(const Call& call, const std::optional<Tensor>& mask, bool causal, std::optional<double> scale, bool grouped) {
  return at::scaled_dot_product_attention(call[0], call[1], call[2], mask, 0.0, causal, scale, grouped);
}

bool four_axes(const Call& call) {
  return call[0].dim() == 4 && call[1].dim() == 4 && call[2].dim() == 4;
}

constexpr int64_t kCausal = 1, kMasked = 2, kLearns = 4;
constexpr int64_t kPiece = 8;  // bytes: of so many each row of a mask has some, as PyTorch's kernels load it

// Does a mask or bias lie as they load it, but for being broadcast, with a column for each key? Of booleans that is what is
// made of them.
bool lies_whole(const Tensor& mask, const Tensor& q, int64_t columns) {
  if (mask.dim() != 4 || mask.size(3) != columns || columns * q.element_size() % kPiece) return false;
  int64_t step = 1;
  for (int64_t axis = 3; axis >= 0; --axis) {
    const int64_t size = mask.stride(axis) ? mask.size(axis) : 1;
    if (size != 1 && mask.stride(axis) != step) return false;
    step *= size;
  }
  return mask.stride(3) == 1;
}

// Is a mask or bias beside q, k and v one that is loaded as it lies, or that learns by kernels which have gradients of it?
// No numbers in booleans' place.
bool takes_mask(Call& call, bool booleans) {
  const auto &q = call[0], &mask = call[3];
  const auto device = q.device().type();
  const bool cast = at::autocast::is_autocast_enabled(device) && at::autocast::get_autocast_dtype(device) != q.scalar_type();
  if (cast) return false;
  if (mask.requires_grad()) {
    call.told |= kLearns;
    if (at::GradMode::is_enabled()) return efficient(q, call[1], call[2], mask, call.scale);
  }
  if (mask.scalar_type() != q.scalar_type() && !(booleans && mask.scalar_type() == at::kBool)) return false;
  return lies_whole(mask, q, call[1].size(2));
}

// What it adds to the scores, where all see the same as one. Of booleans cuDNN makes a mean where a row sees nothing.
Tensor added(const Tensor& mask, const Tensor& q) {
  Tensor seen = differing(mask);
  if (mask.scalar_type() == at::kBool && !q.is_cpu()) {
    Tensor scores = at::empty(seen.sizes(), q.options());
    at::log_out(scores, seen);
    seen = scores;
  }
  return seen.sizes() == mask.sizes() ? seen : seen.expand(mask.sizes());
}

bool takes_attention(Call& call) {
  const auto* given = call.given;  // q, k, v, causal, scale, window, softcap, slopes, bias, mask, dropout, lse, …
  bool causal;
  if (!flag(given[3], causal) || !positive_or_none(given[4], call.scale)) return false;
  if (given[5] != Py_None || !zero(given[6]) || given[7] != Py_None) return false;
  if (!zero(given[10]) || given[11] != Py_False || given[12] != Py_False || given[13] != Py_None) return false;
  if (!tensors(call, 3) || !four_axes(call)) return false;
  call.told = causal ? kCausal : 0;
  const bool biased = given[8] != Py_None, masked = given[9] != Py_None;
  if (!biased && !masked) return true;
  if ((biased && masked) || causal || !tensor(call, masked ? 9 : 8)) return false;
  call.told |= kMasked;
  return takes_mask(call, masked);
}

std::pair<Tensor, Tensor> attention(const Call& call) {
  if (call.told & kLearns && call.recorded) return {learned(call[0], call[1], call[2], call[3], call.scale), {}};
  const auto mask = call.told & kMasked ? std::optional<Tensor>(added(call[3], call[0])) : std::nullopt;
  return {sdpa(call, mask, call.told & kCausal, call.scale, call[0].size(1) != call[1].size(1)), {}};
}

bool takes_drop_in(Call& call) {
  const auto* given = call.given;  // query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
  bool causal, grouped;
  if (!flag(given[5], causal) || !flag(given[7], grouped) || !zero(given[4])) return false;
  call.told = causal | grouped << 1;
  if (!positive_or_none(given[6], call.scale)) return false;
  if (!tensors(call, 3) || !tensor_or_none(call, 3)) return false;
  return four_axes(call) && !(call.objects[3] && noted(call.objects[3], call[0], call[1]));
}

std::pair<Tensor, Tensor> drop_in(const Call& call) {
  return {sdpa(call, there(call[3]), call.told & 1, call.scale, call.told & 2), {}};
}

bool takes_decode(Call& call) {
  const auto* given = call.given;  // q, k, v, seq_lens, block_table, causal, scale, softcap, window, return_lse
  bool causal;
  if (given[3] != Py_None || given[4] != Py_None || !flag(given[5], causal) || !zero(given[7])) return false;
  if (given[8] != Py_None || given[9] != Py_False || !positive_or_none(given[6], call.scale)) return false;
  call.told = causal;
  return tensors(call, 3) && four_axes(call) && call[0].size(2) == 1;
}

std::pair<Tensor, Tensor> decode(const Call& call) {
  const auto& q = call[0];
  const double scale = call.scale.value_or(std::pow(static_cast<double>(q.size(-1)), -0.5));
  return {sdpa(call, {}, false, scale, q.size(1) != call[1].size(1)), {}};
}

// x, perhaps what is added to it, then vectors of its dtype or None; the last argument is eps.
template <int addends, int vectors>
bool takes_norm(Call& call) {
  if (!tensors(call, addends)) return false;
  for (int i = addends; i < addends + vectors; ++i) {
    if (!tensor_or_none(call, i)) return false;
  }
  const auto& x = call[0];
  for (int i = 1; i < addends + vectors; ++i) {
    if (call[i].defined() && call[i].scalar_type() != x.scalar_type()) return false;
  }
  return x.dim() > 0 && real(call.given[addends + vectors], call.number);
}

template <int addends, int vectors>
std::pair<Tensor, Tensor> norm(const Call& call) {
  const Tensor sum = addends > 1 ? at::add(call[0], call[1]) : Tensor();
  const auto& x = addends > 1 ? sum : call[0];
  const auto vector = [&](int index) { return there(call[addends + index]); };
  const int64_t shape[] = {x.size(-1)};
  Tensor y;
  if constexpr (vectors == 1) {
    y = at::rms_norm(x, shape, vector(0), call.number);
  } else {
    y = at::layer_norm(x, shape, vector(0), vector(1), call.number);
  }
  if (y.scalar_type() != x.scalar_type()) y = y.to(x.scalar_type());  // autocast would have it in fp32
  return {y, sum};
}

bool takes_mlp(Call& call) {
  const int which = word(call.given[5], {"gelu", "gelu_tanh", "relu"});
  call.told = which;
  return which >= 0 && tensors(call, 5);
}

std::pair<Tensor, Tensor> block(const Call& call) {
  return {mlp(call[0], call[1], call[2], call[3], call[4], static_cast<Activation>(call.told)), {}};
}

constexpr std::initializer_list<const char*> kGates = {"silu", "gelu", "gelu_tanh"};

// act(gate) · up; both are in `gate` where up is undefined.
Tensor gated(const Tensor& gate, const Tensor& up, int64_t activation) {
  if (!up.defined()) {
    const auto halves = gate.chunk(2, -1);
    return gated(halves[0], halves[1], activation);
  }
  return at::mul(activation ? at::gelu(gate, activation > 1 ? "tanh" : "none") : at::silu(gate), up);
}

bool takes_glu(Call& call) {
  call.told = word(call.given[2], kGates);
  return call.told >= 0 && tensor(call, 0) && tensor_or_none(call, 1);
}

std::pair<Tensor, Tensor> glu(const Call& call) { return {gated(call[0], call[1], call.told), {}}; }

// x, weights of gate, up and down, their biases; what may be None is up's weight and biases.
bool takes_gated_block(Call& call) {
  for (int i = 0; i < 7; ++i) {
    const bool there = i < 4 && i != 2;
    if (!(there ? tensor(call, i) : tensor_or_none(call, i))) return false;
  }
  return true;
}

bool takes_swiglu(Call& call) { return call.given[7] == Py_False && takes_gated_block(call); }

bool takes_geglu(Call& call) {
  const int which = word(call.given[7], {"none", "tanh"});
  call.told = 1 + which;
  return which >= 0 && call.given[8] == Py_False && takes_gated_block(call);
}

std::pair<Tensor, Tensor> gated_block(const Call& call) {
  const auto product = [&](const Tensor& x, int weight, int bias) {
    return at::linear(x, call[weight], there(call[bias]));
  };
  const Tensor gate = product(call[0], 1, 4), up = call[2].defined() ? product(call[0], 2, 5) : Tensor();
  return {product(gated(gate, up, call.told), 3, 6), {}};
}

bool takes_rope(Call& call) {
  bool interleaved;
  if (!flag(call.given[4], interleaved)) return false;
  call.told = interleaved;
  return tensors(call, 4);
}

// x · cos + turned(x) · sin of the first numbers of a head, as many as there are angles.
Tensor rotated(const Tensor& x, const Tensor& cos, const Tensor& sin, bool interleaved) {
  const int64_t width = cos.size(-1), half = width / 2;
  const bool whole = width == x.size(-1);
  const Tensor part = whole ? x : x.slice(-1, 0, width);
  Tensor turned;  // of parts whose gradients are put together by one kernel, as those of slices are not
  if (interleaved) {
    const auto pairs = part.unflatten(-1, {half, 2}).unbind(-1);
    turned = at::stack({pairs[1].neg(), pairs[0]}, -1).flatten(-2);
  } else {
    const auto halves = part.chunk(2, -1);
    turned = at::cat({halves[1].neg(), halves[0]}, -1);
  }
  Tensor made = at::add(at::mul(part, cos), at::mul(turned, sin));
  if (made.scalar_type() != x.scalar_type()) made = made.to(x.scalar_type());
  return whole ? made : at::cat({made, x.slice(-1, width)}, -1);
}

std::pair<Tensor, Tensor> rope(const Call& call) {
  const Tensor cos = call[2].unsqueeze(-3), sin = call[3].unsqueeze(-3);
  return {rotated(call[0], cos, sin, call.told), rotated(call[1], cos, sin, call.told)};
}

constexpr int64_t kReductions = 3;

bool takes_loss(Call& call) {
  const auto* given = call.given;  // input, target, weight, ignore_index, reduction, smoothing, softcap, z_loss
  const int reduction = word(given[4], {"none", "mean", "sum"});  // in PyTorch's order
  int beyond = 1;
  if (PyLong_CheckExact(given[3])) call.index = PyLong_AsLongLongAndOverflow(given[3], &beyond);
  if (given[2] != Py_None || reduction < 0 || beyond || !zero(given[6]) || !zero(given[7])) return false;
  if (!real(given[5], call.number)) return false;
  call.told = reduction + kReductions * (call.number != 0);
  return tensor(call, 0) && tensor(call, 1);
}

std::pair<Tensor, Tensor> loss(const Call& call) {
  return {at::cross_entropy_loss(call[0], call[1], {}, call.told % kReductions, call.index, call.number), {}};
}

// input, linear_weight, target, linear_bias, weight, reduction, ignore_index, label_smoothing, options, softcap, z_loss
bool takes_head(Call& call) {
  const auto* given = call.given;
  const int reduction = word(given[5], {"none", "mean", "sum"});
  int beyond = 1;
  call.index = -100;
  if (PyLong_CheckExact(given[6])) call.index = PyLong_AsLongLongAndOverflow(given[6], &beyond);
  if (given[6] != Py_None && beyond) return false;
  if (given[4] != Py_None || reduction < 1 || given[8] != Py_None || !zero(given[9]) || !zero(given[10])) return false;
  if (!real(given[7], call.number)) return false;
  call.told = reduction + kReductions * (call.number != 0);
  return tensors(call, 3) && tensor_or_none(call, 3);
}

std::pair<Tensor, Tensor> head(const Call& call) {
  Tensor logits = at::linear(call[0], call[1], there(call[3]));
  if (logits.dim() > 2) logits = logits.flatten(0, -2);
  const Tensor target = call[2].dim() > 1 ? call[2].flatten() : call[2];
  return {at::cross_entropy_loss(logits, target, {}, call.told % kReductions, call.index, call.number), {}};
}

constexpr Form known_forms[] = {
    {"attention",
     "q k v causal scale window softcap alibi_slopes bias attn_mask dropout_p return_lse deterministic approx",
     takes_attention, attention},
    {"scaled_dot_product_attention", "query key value attn_mask dropout_p is_causal scale enable_gqa", takes_drop_in,
     drop_in},
    {"attention_decode", "q k v seq_lens block_table causal scale softcap window return_lse", takes_decode, decode},
    {"rms_norm", "x weight eps", takes_norm<1, 1>, norm<1, 1>},
    {"layer_norm", "x weight bias eps", takes_norm<1, 2>, norm<1, 2>},
    {"add_rms_norm", "x residual weight eps", takes_norm<2, 1>, norm<2, 1>},
    {"add_layer_norm", "x residual weight bias eps", takes_norm<2, 2>, norm<2, 2>},
    {"mlp", "x w1 b1 w2 b2 activation", takes_mlp, block},
    {"glu", "gate up activation", takes_glu, glu},
    {"swiglu", "x gate_weight up_weight down_weight gate_bias up_bias down_bias recompute", takes_swiglu, gated_block},
    {"geglu", "x gate_weight up_weight down_weight gate_bias up_bias down_bias approximate recompute", takes_geglu,
     gated_block},
    {"apply_rope", "q k cos sin interleaved", takes_rope, rope},
    {"linear_cross_entropy",
     "input linear_weight target linear_bias weight reduction ignore_index label_smoothing options softcap z_loss",
     takes_head, head},
    {"cross_entropy", "input target weight ignore_index reduction label_smoothing softcap z_loss", takes_loss, loss},
};

}  // namespace

Forms forms() { return {std::begin(known_forms), std::end(known_forms)}; }

}  // namespace gating
