// SPDX-License-Identifier: Apache-2.0
// Runs a shadowc engine folder for TensorRT: token ids in, greedily generated token ids out.
//   generate FOLDER [--density 0.5] [--tokens 32] ID ID ID ...
// The prompt goes through prefill.plan, each further token through decode.plan, as a CUDA graph but for RTX.
// Both plans read one copy of weights.bin. Tensors are bound by name; engine.json says where weights are.
#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <regex>
#include <stdexcept>
#include <string>
#include <vector>

namespace {
namespace fs = std::filesystem;
using Addresses = std::map<std::string, char*>;

struct Logger final : nvinfer1::ILogger {
  void log(Severity severity, const char* text) noexcept override {
    if (severity <= Severity::kERROR && text) std::fprintf(stderr, "TensorRT: %s\n", text);
  }
} logger;

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

void require(bool fine, const std::string& sentence) {
  if (!fine) throw std::runtime_error(sentence);
}

char* allocate(size_t bytes) {  // lives until the process ends
  void* address = nullptr;
  check(cudaMalloc(&address, std::max<size_t>(bytes, 1)), "device memory");
  return static_cast<char*>(address);
}

std::string read(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  require(file.good(), "cannot read " + path.string());
  return {std::istreambuf_iterator<char>(file), {}};
}

// engine.json is written with sorted keys, so that two patterns are enough.
long long number(const std::string& json, const std::string& key) {
  std::smatch found;
  const std::regex entry("\"" + key + "\": (-?[0-9]+)");
  require(std::regex_search(json, found, entry), "engine.json has no " + key);
  return std::stoll(found[1]);
}

Addresses load_weights(const fs::path& folder, const std::string& json) {
  const std::string content = read(folder / "weights.bin");
  char* base = allocate(content.size());
  check(cudaMemcpy(base, content.data(), content.size(), cudaMemcpyHostToDevice), "weights.bin");
  check(cudaDeviceSynchronize(), "weights.bin");  // the copy may be on its way, and streams do not wait
  Addresses weights;
  const std::regex entry("\"name\": \"([^\"]+)\",\\s*\"offset\": ([0-9]+)");
  for (std::sregex_iterator it(json.begin(), json.end(), entry), end; it != end; ++it)
    weights[(*it)[1]] = base + std::stoull((*it)[2]);
  return weights;
}

size_t element_bytes(nvinfer1::DataType type) {
  using enum nvinfer1::DataType;
  if (type == kINT64) return 8;
  return type == kFLOAT || type == kINT32 ? 4 : type == kHALF || type == kBF16 ? 2 : 1;
}

std::string past(const std::string& present) { return "past_key_values" + present.substr(7); }

// One plan with a context; `bind` gives every tensor an address: a known one, or new memory of its size.
struct Plan {
  std::unique_ptr<nvinfer1::ICudaEngine> engine;
  std::unique_ptr<nvinfer1::IExecutionContext> context;

  Plan(nvinfer1::IRuntime& runtime, const fs::path& path) {
    const std::string content = read(path);
    engine.reset(runtime.deserializeCudaEngine(content.data(), content.size()));
    require(engine != nullptr, "TensorRT refuses " + path.string() + ": built for another version or GPU?");
    context.reset(engine->createExecutionContext());
    require(context != nullptr, "no execution context for " + path.string());
  }

  // One row, S tokens, T slots of the cache. In place, present.N.* is bound where past_key_values.N.* is.
  void bind(Addresses& known, int64_t S, int64_t T, bool in_place) {
    for (int i = 0; i < engine->getNbIOTensors(); ++i) {
      const std::string name = engine->getIOTensorName(i);
      nvinfer1::Dims shape = engine->getTensorShape(name.c_str());
      const bool is_cache = name.starts_with("present.") || name.starts_with("past_key_values.");
      size_t elements = 1;
      for (int axis = 0; axis < shape.nbDims; ++axis) {
        if (shape.d[axis] < 0) shape.d[axis] = axis == 0 ? 1 : is_cache ? T : S;
        elements *= static_cast<size_t>(shape.d[axis]);
      }
      if (engine->getTensorIOMode(name.c_str()) == nvinfer1::TensorIOMode::kINPUT)
        require(context->setInputShape(name.c_str(), shape), name + ": size outside the plan's profile");
      char*& address = known[in_place && name.starts_with("present.") ? past(name) : name];
      if (!address) address = allocate(elements * element_bytes(engine->getTensorDataType(name.c_str())));
      require(context->setTensorAddress(name.c_str(), address), "cannot bind " + name);
    }
  }

  void enqueue(cudaStream_t stream) { require(context->enqueueV3(stream), "the plan did not run"); }
};

int64_t largest(const char* logits, int64_t vocab, cudaStream_t stream) {
  std::vector<float> values(vocab);
  check(cudaMemcpyAsync(values.data(), logits, 4 * vocab, cudaMemcpyDeviceToHost, stream), "logits");
  check(cudaStreamSynchronize(stream), "run");
  return std::max_element(values.begin(), values.end()) - values.begin();
}

void set(char* address, const void* value, size_t bytes, cudaStream_t stream) {
  if (address) check(cudaMemcpyAsync(address, value, bytes, cudaMemcpyHostToDevice, stream), "input");
}

int run(const fs::path& folder, float density, int64_t tokens, const std::vector<int64_t>& prompt) {
  const std::string json = read(folder / "engine.json");
  const int64_t S = static_cast<int64_t>(prompt.size()), T = number(json, "max_context");
  require(S > 0 && S < T && tokens > 0, "expected 1 to " + std::to_string(T - 1) + " ids and some --tokens");
  cudaStream_t stream;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "no usable GPU");
  std::unique_ptr<nvinfer1::IRuntime> runtime(nvinfer1::createInferRuntime(logger));
  require(runtime != nullptr, "TensorRT cannot start");
  std::smatch plugin;  // the one without _auto: its twin registers itself, and must not be given to TensorRT
  const std::regex listed("\"file\": \"(libshadowc_[a-z0-9]+\\.so)\"");
  require(std::regex_search(json, plugin, listed), "engine.json lists no plugin");
  const std::string library = fs::absolute(folder / plugin[1].str()).string();
  require(runtime->getPluginRegistry().loadLibrary(library.c_str()), "TensorRT refuses " + library);
  const Addresses weights = load_weights(folder, json);
  Plan prefill(*runtime, folder / "prefill.plan"), decode(*runtime, folder / "decode.plan");
  Addresses fresh = weights, step = weights;
  prefill.bind(fresh, S, S, false);
  decode.bind(step, 1, T, true);
  const std::vector<int64_t> ones(S, 1);
  set(fresh["input_ids"], prompt.data(), S * sizeof(int64_t), stream);
  set(fresh["attention_mask"], ones.data(), S * sizeof(int64_t), stream);
  prefill.enqueue(stream);
  for (const auto& [name, source] : fresh) {  // keys and values [1,H,S,D] into the first slots of [1,H,T,D]
    if (!name.starts_with("present.")) continue;
    const nvinfer1::Dims shape = prefill.engine->getTensorShape(name.c_str());
    const size_t row = shape.d[3] * element_bytes(prefill.engine->getTensorDataType(name.c_str()));
    const auto way = cudaMemcpyDeviceToDevice;
    char* to = step[past(name)];
    check(cudaMemcpy2DAsync(to, T * row, source, S * row, S * row, shape.d[1], way, stream), "cache");
  }
  const int64_t start = 0, eos = number(json, "eos"), vocab = number(json, "vocab");
  for (const char* name : {"density_heads", "density_neurons"})
    if (step.contains(name)) set(step[name], &density, sizeof density, stream);
  set(step["start"], &start, sizeof start, stream);
  const bool records = json.find("\"rtx1\"") == std::string::npos;  // RTX exchanges kernels between runs
  cudaGraphExec_t graph = nullptr;
  const int64_t last = S + std::min(tokens, T - S) - 1;
  int64_t token = largest(fresh["logits"], vocab, stream);
  for (int64_t filled = S;; ++filled) {
    const bool done = token == eos || filled == last;
    std::printf("%lld%c", static_cast<long long>(token), done ? '\n' : ' ');
    std::fflush(stdout);
    if (done) return 0;
    set(step["input_ids"], &token, sizeof token, stream);
    set(step["past"], &filled, sizeof filled, stream);
    graph ? check(cudaGraphLaunch(graph, stream), "graph") : decode.enqueue(stream);
    if (!graph && records) {
      check(cudaStreamSynchronize(stream), "first step");  // settles what TensorRT does only once
      cudaGraph_t recorded;
      check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
      decode.enqueue(stream);
      check(cudaStreamEndCapture(stream, &recorded), "capture");
      check(cudaGraphInstantiateWithFlags(&graph, recorded, 0), "graph");
    }
    token = largest(step["logits"], vocab, stream);
  }
}
}  // namespace

int main(int argc, char** argv) try {
  std::map<std::string, double> options{{"--density", 1}, {"--tokens", 32}};
  std::vector<int64_t> prompt;
  for (int i = 2; i < argc; ++i) {
    const auto option = options.find(argv[i]);
    if (option == options.end()) prompt.push_back(std::stoll(argv[i]));
    if (option != options.end() && ++i < argc) option->second = std::stod(argv[i]);
  }
  if (argc > 2) return run(argv[1], options["--density"], options["--tokens"], prompt);
  std::fputs("usage: generate FOLDER [--density 0.5] [--tokens 32] ID ID ID ...\n", stderr);
  return 2;
} catch (const std::exception& error) {
  std::fprintf(stderr, "error: %s\n", error.what());
  return 1;
}
