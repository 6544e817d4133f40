// The operators of cross_entropy.py on CUDA tensors, through LibTorch's stable ABI: what is built for a version of
// PyTorch is loaded by later ones too. Their schemas, and what they say of fake tensors, are in cross_entropy.py.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "cross_entropy.h"

// A PyTorch for CPUs does not have it; this library can be loaded there all the same.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream) __attribute__((weak));

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

deepy::Element element_of(const Tensor& logits) {
  switch (logits.scalar_type()) {
    case ScalarType::Float: return deepy::Element::fp32;
    case ScalarType::BFloat16: return deepy::Element::bf16;
    case ScalarType::Half: return deepy::Element::fp16;
    default: break;
  }
  throw std::runtime_error("the cross entropy kernel takes logits in fp32, bf16 and fp16");
}

void* stream_of(int32_t device) {
  if (aoti_torch_get_current_cuda_stream == nullptr) throw std::runtime_error("this PyTorch has no CUDA streams");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
}

// The rows of logits, as cross_entropy.py has prepared them.
deepy::Request request_of(const Tensor& logits, const Tensor& labels) {
  STD_TORCH_CHECK(logits.dim() == 2 && (logits.stride(1) == 1 || logits.size(1) == 1), "rows must be contiguous");
  STD_TORCH_CHECK(logits.size(1) < (int64_t{1} << 30), "a row has too many columns");
  STD_TORCH_CHECK(labels.scalar_type() == ScalarType::Long && labels.is_contiguous(), "labels must be int64, contiguous");
  STD_TORCH_CHECK(labels.numel() == logits.size(0), "each row needs a label");
  deepy::Request request{};
  request.logits = logits.data_ptr();
  request.labels = static_cast<const int64_t*>(labels.data_ptr());
  request.stride = logits.stride(0);
  request.rows = logits.size(0);
  request.columns = logits.size(1);
  return request;
}

void start(deepy::Kind kind, const Tensor& logits, const deepy::Request& request) {
  const deepy::Element element = element_of(logits);
  const int32_t device = logits.get_device_index();
  void* const stream = stream_of(device);
  const torch::stable::accelerator::DeviceGuard guard(device);
  deepy::start(kind, element, request, device, stream);
}

float* results_of(const Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); }

Tensor losses(Tensor logits, Tensor labels, double scale) {
  Tensor results = torch::stable::new_empty(logits, {logits.size(0)}, ScalarType::Float);
  deepy::Request request = request_of(logits, labels);
  request.results = results_of(results);
  request.scale = static_cast<float>(scale);
  start(deepy::Kind::losses, logits, request);
  return results;
}

Tensor statistics(Tensor logits, Tensor labels, int64_t first) {
  Tensor results = torch::stable::new_empty(logits, {3, logits.size(0)}, ScalarType::Float);
  deepy::Request request = request_of(logits, labels);
  request.results = results_of(results);
  request.first = first;
  start(deepy::Kind::statistics, logits, request);
  return results;
}

void gradient(Tensor logits, Tensor labels, int64_t first, Tensor maximum, Tensor total, double scale) {
  for (const Tensor& given : {maximum, total}) {
    STD_TORCH_CHECK(given.scalar_type() == ScalarType::Float && given.is_contiguous(), "statistics must be fp32");
    STD_TORCH_CHECK(given.numel() == logits.size(0), "each row needs its statistics");
  }
  deepy::Request request = request_of(logits, labels);
  request.maxima = results_of(maximum);
  request.totals = results_of(total);
  request.first = first;
  request.scale = static_cast<float>(scale);
  start(deepy::Kind::gradient, logits, request);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deepy_cuda, CUDA, library) {
  library.impl("cross_entropy_losses_", TORCH_BOX(&losses));
  library.impl("logits_statistics", TORCH_BOX(&statistics));
  library.impl("logits_gradient_", TORCH_BOX(&gradient));
}
