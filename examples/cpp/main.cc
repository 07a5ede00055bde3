// SPDX-License-Identifier: Apache-2.0
// Runs an engine folder of target cpu with ONNX Runtime's C++ API: greedy text generation for one prompt.
// README.md beside this file says how to build it. What the graph's inputs mean is in docs/ops.md.
#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <optional>
#include <regex>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "tokenizer.h"

namespace {

using Ids = std::vector<int64_t>;

constexpr char kUsage[] =
    "usage: shadowc_generate ENGINE (PROMPT | --ids 2,1715,668) [--max-new-tokens N] [--threads N]\n"
    "       [--density D | --head-density D --neuron-density D]     D: the share to compute, 0 to 1";
constexpr int64_t kChunk = 512;  // tokens per run of the prompt: bounds the memory of its activations
constexpr int64_t kDense = 0, kAutomatic = -1;  // sparse_tail: no masks; one for a token that comes alone
constexpr int64_t kLast = -1;                   // logits_from: those of the last token are enough

using InputError = std::invalid_argument;  // what is given cannot be used: exit code 2

struct UsageError : InputError {
  explicit UsageError(const std::string& what) : InputError(what + "\n" + kUsage) {}
};

struct Options {
  std::filesystem::path engine;
  std::string prompt;
  Ids ids;
  std::optional<float> heads, neurons;  // empty: the engine's own density
  int64_t max_new_tokens = 64;
  int threads = 0;  // 0: ONNX Runtime decides
};

double Number(const std::string& flag, const std::string& text, double low, double high) {
  char* rest = nullptr;
  const double value = std::strtod(text.c_str(), &rest);
  const bool whole = high > 1;  // only shares have decimals
  if (text.empty() || *rest || !(value >= low && value <= high) || (whole && value != std::floor(value))) {
    std::ostringstream message;
    message << flag << " takes a " << (whole ? "whole number" : "number") << " from " << low << " to " << high
            << ", found '" << text << "'";
    throw UsageError(message.str());
  }
  return value;
}

Options Parse(int argc, char** argv) {
  Options options;
  std::vector<std::string> words;
  for (int i = 1; i < argc; ++i) {
    const std::string flag = argv[i];
    if (flag.rfind("--", 0) != 0) {
      words.push_back(flag);
      continue;
    }
    if (++i == argc) throw UsageError(flag + " needs a value");
    const std::string value = argv[i];
    if (flag == "--ids") {
      std::istringstream list(value);
      for (std::string id; std::getline(list, id, ',');)
        options.ids.push_back(static_cast<int64_t>(Number(flag, id, 0, 1e9)));
    } else if (flag == "--density") {
      options.heads = options.neurons = Number(flag, value, 0, 1);
    } else if (flag == "--head-density") {
      options.heads = Number(flag, value, 0, 1);
    } else if (flag == "--neuron-density") {
      options.neurons = Number(flag, value, 0, 1);
    } else if (flag == "--max-new-tokens") {
      options.max_new_tokens = static_cast<int64_t>(Number(flag, value, 1, 1e9));
    } else if (flag == "--threads") {
      options.threads = static_cast<int>(Number(flag, value, 1, 4096));
    } else {
      throw UsageError("unknown flag " + flag);
    }
  }
  if (words.size() + !options.ids.empty() != 2) throw UsageError("expected an engine and a prompt, or --ids");
  options.engine = words[0];
  if (words.size() == 2) options.prompt = words[1];
  return options;
}

// genai_config.json states each of these numbers once. A host with a JSON library reads engine.json instead.
int64_t ConfigNumber(const std::filesystem::path& folder, const std::string& key) {
  std::ifstream file(folder / "genai_config.json");
  const std::string text{std::istreambuf_iterator<char>(file), {}};
  std::smatch found;
  if (!std::regex_search(text, found, std::regex("\"" + key + "\"\\s*:\\s*(\\d+)")))
    throw InputError(folder.string() + " is no engine folder of target cpu: genai_config.json has no " + key);
  return std::stoll(found[1]);
}

// One sequence moving through the graph. The cache is one buffer per layer and part, bound as past and as
// present: the operators write the new slots in place.
class Decoder {
 public:
  Decoder(const Options& options, const Ort::Env& env)
      : session_(env, (options.engine / "model.onnx").c_str(), SessionOptions(options)), binding_(session_) {
    for (size_t i = 0; i < session_.GetInputCount(); ++i)
      inputs_[session_.GetInputNameAllocated(i, allocator_).get()] = i;
    for (size_t i = 0; i < session_.GetOverridableInitializerCount(); ++i)  // the inputs that have defaults
      dials_.insert(session_.GetOverridableInitializerNameAllocated(i, allocator_).get());
    for (size_t i = 0; i < session_.GetOutputCount(); ++i)
      outputs_[session_.GetOutputNameAllocated(i, allocator_).get()] = Shape(session_.GetOutputTypeInfo(i));
    if ((options.heads || options.neurons) && !dials_.count("density_heads"))
      throw InputError("this engine is dense: it has no masks and takes no density");
    if (!dials_.count("logits_from"))
      throw InputError("this engine is of an older shadowc: compile it again");
    Dial("logits_from", kLast);
    logits_.resize(vocabulary());
    binding_.BindOutput("logits", Tensor(logits_.data(), logits_.size(), {1, 1, vocabulary()}));
  }

  int64_t vocabulary() const { return outputs_.at("logits")[2]; }

  // Makes room for so many tokens.
  void Reserve(int64_t slots) {
    ones_.assign(slots, 1);
    for (const auto& [name, index] : inputs_) {
      if (name.rfind("past_key_values.", 0) != 0) continue;
      const Ort::TypeInfo type = session_.GetInputTypeInfo(index);
      const auto info = type.GetTensorTypeAndShapeInfo();  // [rows, heads, slots, head size]
      const int64_t sizes[] = {1, info.GetShape()[1], slots, info.GetShape()[3]};
      // float16 or float32; the binding keeps it alive
      auto buffer = Ort::Value::CreateTensor(allocator_, sizes, 4, info.GetElementType());
      binding_.BindInput(name.c_str(), buffer);
      binding_.BindOutput(("present." + name.substr(sizeof("past_key_values.") - 1)).c_str(), buffer);
    }
  }

  // Reads the prompt without masks; returns the token that follows it.
  int64_t Prefill(Ids& ids) {
    Dial("sparse_tail", kDense);
    const int64_t count = static_cast<int64_t>(ids.size());
    for (int64_t at = 0; at < count; at += kChunk) Feed(&ids[at], std::min(kChunk, count - at));
    return Best();
  }

  // From here on every token has its own masks, and what attention and FFN read is counted.
  void StartSteps(const Options& options) {
    Dial("sparse_tail", kAutomatic);
    if (options.heads) Dial("density_heads", *options.heads);
    if (options.neurons) Dial("density_neurons", *options.neurons);
    read_.resize(outputs_.at("read")[0] * 4);  // [layers, 2, 2]: attention and FFN, records and bytes
    binding_.BindOutput("read", Tensor(read_.data(), read_.size(), outputs_.at("read")));
  }

  int64_t Step(int64_t id) {
    Feed(&id, 1);
    for (size_t i = 1; i < read_.size(); i += 2) bytes_ += read_[i];
    return Best();
  }

  int64_t bytes() const { return bytes_; }

 private:
  static Ort::SessionOptions SessionOptions(const Options& options) {
    Ort::SessionOptions made;
    made.RegisterCustomOpsLibrary((options.engine / "libshadowc_ort.so").c_str());
    made.DisableMemPattern();  // shapes change from run to run
    made.SetIntraOpNumThreads(options.threads);
    made.AddConfigEntry("session.intra_op.spin_duration_us",
                        "1000");  // idle threads leave their cores to others
    return made;
  }

  static std::vector<int64_t> Shape(const Ort::TypeInfo& info) {
    return info.GetTensorTypeAndShapeInfo().GetShape();
  }

  template <typename T>
  Ort::Value Tensor(T* data, size_t count, const std::vector<int64_t>& shape) const {
    return Ort::Value::CreateTensor<T>(memory_, data, count, shape.data(), shape.size());
  }

  template <typename T>
  void Dial(const char* name, T number) {
    if (!dials_.count(name)) return;  // a dense engine has none
    const int64_t one = 1;
    auto value = Ort::Value::CreateTensor<T>(allocator_, &one, 1);
    *value.template GetTensorMutableData<T>() = number;
    binding_.BindInput(name, value);
  }

  void Feed(int64_t* ids, int64_t count) {
    filled_ += count;
    binding_.BindInput("input_ids", Tensor(ids, count, {1, count}));
    binding_.BindInput("attention_mask", Tensor(ones_.data(), filled_, {1, filled_}));
    session_.Run(Ort::RunOptions{nullptr}, binding_);
  }

  int64_t Best() const { return std::max_element(logits_.begin(), logits_.end()) - logits_.begin(); }

  Ort::MemoryInfo memory_ = Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeDefault);
  Ort::AllocatorWithDefaultOptions allocator_;
  Ort::Session session_;
  Ort::IoBinding binding_;
  std::map<std::string, size_t> inputs_;                 // name -> index
  std::map<std::string, std::vector<int64_t>> outputs_;  // name -> shape
  std::set<std::string> dials_;
  Ids ones_, read_;
  std::vector<float> logits_;
  int64_t filled_ = 0, bytes_ = 0;
};

void Generate(Options options) {
  int major = 0, minor = 0;
  const char* version = OrtGetApiBase()->GetVersionString();
  std::sscanf(version, "%d.%d", &major, &minor);
  if (major == 1 && minor < 23)
    throw std::runtime_error(std::string("ONNX Runtime 1.23 or newer is needed, this is ") + version);
  const int64_t positions = ConfigNumber(options.engine, "context_length");
  const int64_t end = ConfigNumber(options.engine, "eos_token_id");
  Ort::Env env(ORT_LOGGING_LEVEL_ERROR, "shadowc_generate");
  Decoder decoder(options, env);
  std::optional<Tokenizer> tokenizer;
  if (options.ids.empty()) options.ids = tokenizer.emplace(options.engine.string()).Encode(options.prompt);
  const int64_t prompt = static_cast<int64_t>(options.ids.size());
  if (prompt >= positions)
    throw InputError("the prompt has " + std::to_string(prompt) +
                     " tokens and leaves no room in a context of " + std::to_string(positions));
  for (const int64_t id : options.ids)
    if (id >= decoder.vocabulary()) throw InputError("no token has the id " + std::to_string(id));
  const int64_t room = std::min(options.max_new_tokens, positions - prompt);
  decoder.Reserve(prompt + room);

  const auto begin = std::chrono::steady_clock::now();
  int64_t id = decoder.Prefill(options.ids), count = 1;
  const auto start = std::chrono::steady_clock::now();
  decoder.StartSteps(options);
  for (;; ++count) {
    if (!tokenizer) std::cout << id << ' ' << std::flush;
    if (tokenizer && id != end) std::cout << tokenizer->Next(id) << std::flush;
    if (id == end || count == room) break;
    id = decoder.Step(id);
  }
  std::cout << std::endl;
  const std::chrono::duration<double> reading = start - begin;
  std::cerr << prompt << " tokens of prompt, the next one after " << reading.count() << " s\n";
  if (count == 1) return;
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  const double steps = static_cast<double>(count - 1);
  std::cerr << count << " tokens, " << steps / seconds.count() << " tokens/s after the first; "
            << decoder.bytes() / steps / 1e6 << " MB per token read by attention and FFN\n";
}

}  // namespace

int main(int argc, char** argv) {
  try {
    Generate(Parse(argc, argv));
    return EXIT_SUCCESS;
  } catch (const InputError& error) {
    std::cerr << "shadowc_generate: " << error.what() << "\n";
    return 2;
  } catch (const std::exception& error) {
    std::cerr << "shadowc_generate: " << error.what() << "\n";
    return EXIT_FAILURE;
  }
}
