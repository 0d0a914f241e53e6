// Tensors that lie so that what comes next is fast. The numbers are the same.
//
// A mask whose structure is noted is not read where what it shows is faster (`notes.cpp`).
//
// A mask whose keys do not lie side by side sends PyTorch's attention to its slowest kernel, which writes all scores out.
// Such a mask is laid out first; one that is the same for all keys of a row is none at all, but for rows without keys,
// whose result is 0.
//
// Gradients of q, k and v that were cut from one tensor are put together by a copy, and copied once more by the linear
// layer that gave the tensor, if they were put one behind the other. They are put side by side, as they came. Stacks
// that a program makes, in a backward pass too, lie as PyTorch's do.
//
// A sum of two large tensors that differ in dtype or in their order in memory takes PyTorch two to three times as long as
// its bytes: it may be a kernel of ours.

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/scaled_dot_product_attention_native.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/where.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <optional>
#include <vector>

#include "shared.h"

namespace layouts {
namespace {

using at::Tensor;
using c10::DispatchKey;
using c10::DispatchKeySet;

const DispatchKeySet kBelow(DispatchKeySet::FULL_AFTER, DispatchKey::BackendSelect);

std::atomic<bool> laying{false};

int64_t known(const c10::SymInt& number) { return number.maybe_as_int().value_or(-1); }

// May a kernel serve that wants keys side by side?
bool fused_allowed() {
  const auto& context = at::globalContext();
  return context.userEnabledFlashSDP() || context.userEnabledMemEfficientSDP() || context.userEnabledCuDNNSDP();
}

// Can these rows be taken out of such a result without changing its shape?
bool rows_of(const Tensor& rows, const Tensor& whole) {
  if (rows.dim() > whole.dim()) return false;
  for (int64_t axis = 1; axis <= rows.dim(); ++axis) {
    const int64_t size = known(rows.sym_size(-axis));
    if (size != 1 && (size < 0 || size != known(whole.sym_size(-axis)))) return false;
  }
  return true;
}

// The mask with its keys side by side; axes along which it is the same stay so.
Tensor laid(const Tensor& mask) {
  Tensor core = mask;
  for (int64_t axis = 0; axis < mask.dim() - 2; ++axis) {
    if (known(mask.sym_stride(axis)) == 0 && known(mask.sym_size(axis)) > 1) core = core.narrow(axis, 0, 1);
  }
  return core.contiguous().expand_symint(mask.sym_sizes());
}

Tensor attend(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& mask, double dropout,
              bool causal, std::optional<double> scale, bool grouped) {
  const auto plain = [&](const std::optional<Tensor>& given) {
    return at::native::scaled_dot_product_attention(q, k, v, given, dropout, causal, scale, grouped);
  };
  if (!laying.load(std::memory_order_relaxed) || !mask || !mask->defined()) return plain(mask);
  if (mask->dim() == 4 && q.dim() == 4 && k.dim() == 4 && dropout == 0 && !causal) {
    Tensor found = by_note(q, k, v, *mask, scale, grouped);
    if (found.defined()) return found;
  }
  const bool strided = mask->layout() == at::kStrided && q.layout() == at::kStrided && mask->dim() >= 2 && q.dim() == 4;
  if (!strided || k.dim() != 4 || causal || mask->requires_grad() || !fused_allowed()) return plain(mask);
  const int64_t step = known(mask->sym_stride(-1)), keys = known(mask->sym_size(-1));
  if (step < 0 || step == 1 || keys <= 1 || keys != known(k.sym_size(-2))) return plain(mask);
  if (step == 0 && mask->scalar_type() == at::kBool) {
    const Tensor rows = mask->select(-1, 0).unsqueeze(-1);
    if (rows_of(rows, q)) return at::where(rows, plain(std::nullopt), 0);
  }
  return plain(laid(*mask));
}

// (B, S, H, D) in memory, seen as (B, H, S, D)?
bool heads_inside(const Tensor& tensor) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  return strides[3] == 1 && strides[1] == sizes[3] && strides[2] == sizes[1] * sizes[3] &&
         strides[0] == sizes[2] * strides[2];
}

// Does autograd put together what `unbind` took apart?
bool unbound() {
  const auto node = torch::autograd::get_current_node();
  return node && node->name() == "UnbindBackward0";
}

Tensor stack(DispatchKeySet keys, at::TensorList tensors, int64_t dim) {
  static const auto theirs = c10::Dispatcher::singleton().findSchemaOrThrow("aten::stack", "").typed<decltype(at::stack)>();
  const auto kind = served_kind();
  const auto alike = [&](const Tensor& each) {
    return each.defined() && ordinary(each, kind) && each.dim() == 4 && each.device() == tensors[0].device() &&
           each.sizes() == tensors[0].sizes() && each.scalar_type() == tensors[0].scalar_type() && heads_inside(each);
  };
  const bool gradients = laying.load(std::memory_order_relaxed) && dim == 0 && tensors.size() > 1 &&
                         !c10::GradMode::is_enabled() && torch::autograd::get_current_graph_task_id() >= 0;
  const bool laid = gradients && std::all_of(tensors.begin(), tensors.end(), alike) && !tensors[0].is_contiguous();
  if (!laid || !unbound()) {
    return theirs.redispatch(keys & kBelow, tensors, dim);
  }
  std::vector<Tensor> dense;
  dense.reserve(tensors.size());
  for (const auto& each : tensors) dense.push_back(each.transpose(1, 2));
  const auto sizes = dense[0].sizes();
  return at::cat(dense, 2)
      .view({sizes[0], sizes[1], static_cast<int64_t>(tensors.size()), sizes[2], sizes[3]})
      .permute({2, 0, 3, 1, 4});
}

constexpr int64_t kLarge = 1 << 20;  // numbers: below, the host's time is longer

bool wide(at::ScalarType dtype) { return dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf; }

// Is it a sum that is asked about?
bool slow(const Tensor& x, const Tensor& y, const at::Scalar& alpha) {
  if (!laying.load(std::memory_order_relaxed)) return false;
  const auto kind = served_kind();
  if (!ordinary(x, kind) || !ordinary(y, kind) || x.numel() < kLarge || x.sizes() != y.sizes()) return false;
  const auto dtype = x.scalar_type(), other = y.scalar_type();
  if (!wide(dtype) || !wide(other) || x.device() != y.device() || !alpha.equal(1)) return false;
  return dtype == other ? x.strides() != y.strides() : dtype == at::kFloat || other == at::kFloat;
}

const auto& pytorchs_add() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("aten::add", "Tensor")
                             .typed<Tensor(const Tensor&, const Tensor&, const at::Scalar&)>();
  return op;
}

Tensor pytorchs_sum(const Tensor& x, const Tensor& y) {
  return pytorchs_add().redispatch((x.key_set() | y.key_set()) & kBelow, x, y, 1);
}

Tensor add(DispatchKeySet keys, const Tensor& x, const Tensor& y, const at::Scalar& alpha) {
  if (!slow(x, y, alpha)) return pytorchs_add().redispatch(keys & kBelow, x, y, alpha);
  static const auto ours = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("tilebook_native::add", "")
                               .typed<Tensor(const Tensor&, const Tensor&)>();
  return ours.call(x, y);
}

void put(bool cpu) {
  static std::vector<std::unique_ptr<torch::Library>> installed;
  static bool there[2];
  if (there[cpu]) return;
  const auto library = [](DispatchKey key) -> torch::Library& {
    installed.push_back(std::make_unique<torch::Library>(torch::Library::IMPL, "aten", key, "tilebook/native", __LINE__));
    return *installed.back();
  };
  library(cpu ? DispatchKey::AutogradCPU : DispatchKey::AutogradCUDA).impl("scaled_dot_product_attention", &attend);
  library(cpu ? DispatchKey::CPU : DispatchKey::CUDA).impl("scaled_dot_product_attention", &attend);
  if (!there[!cpu]) {
    library(DispatchKey::BackendSelect).impl("stack", &stack);
    library(DispatchKey::BackendSelect).impl("add.Tensor", &add);
  }
  there[cpu] = true;
}

}  // namespace
}  // namespace layouts

using namespace layouts;

void define_additions(torch::Library& library) {
  library.def("add(Tensor x, Tensor y) -> Tensor");
  library.impl("add", torch::dispatch(DispatchKey::CompositeExplicitAutograd, TORCH_FN(pytorchs_sum)));
}

void layouts_on(bool on, bool cpu) {
  laying = on;
  try {
    if (on) put(cpu);
  } catch (const std::exception&) {
    laying = false;  // a PyTorch that takes no kernels there
  }
}
