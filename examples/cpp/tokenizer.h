// SPDX-License-Identifier: Apache-2.0
// Text to token ids and back, through the tokenizer of onnxruntime-genai, which reads tokenizer.json. Without
// -DTOKENIZER_LIBRARY=... there is none, and prompts are given as ids. A product puts its own tokenizer here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef SHADOWC_TOKENIZER

// The part of ort_genai_c.h that is used here; the Python package of onnxruntime-genai carries no header.
extern "C" {
struct OgaResult;
struct OgaTokenizer;
struct OgaTokenizerStream;
struct OgaSequences;
const char* OgaResultGetError(const OgaResult*);
OgaResult* OgaCreateTokenizerFromPath(const char* folder, OgaTokenizer**);  // 0.16 and newer
OgaResult* OgaUpdateTokenizerOptions(OgaTokenizer*, const char* const* keys, const char* const* values,
                                     size_t count);
OgaResult* OgaCreateSequences(OgaSequences**);
OgaResult* OgaTokenizerEncode(const OgaTokenizer*, const char* text, OgaSequences*);
size_t OgaSequencesGetSequenceCount(const OgaSequences*, size_t row);  // tokens of the row
const int32_t* OgaSequencesGetSequenceData(const OgaSequences*, size_t row);
void OgaDestroySequences(OgaSequences*);
OgaResult* OgaCreateTokenizerStream(const OgaTokenizer*, OgaTokenizerStream**);
OgaResult* OgaTokenizerStreamDecode(OgaTokenizerStream*, int32_t token, const char** text);
}

class Tokenizer {  // lives as long as the process: nothing of it is freed
 public:
  explicit Tokenizer(const std::string& folder) {
    const char *key = "add_special_tokens",
               *value = "true";  // OPT was trained with </s> in front of every text
    Check(OgaCreateTokenizerFromPath(folder.c_str(), &tokenizer_));
    Check(OgaUpdateTokenizerOptions(tokenizer_, &key, &value, 1));
    Check(OgaCreateTokenizerStream(tokenizer_, &stream_));
  }

  std::vector<int64_t> Encode(const std::string& text) const {
    OgaSequences* rows = nullptr;
    Check(OgaCreateSequences(&rows));
    Check(OgaTokenizerEncode(tokenizer_, text.c_str(), rows));
    const int32_t* first = OgaSequencesGetSequenceData(rows, 0);
    const std::vector<int64_t> ids(first, first + OgaSequencesGetSequenceCount(rows, 0));
    OgaDestroySequences(rows);
    return ids;
  }

  // The text that one more token completes; empty while a character is unfinished.
  std::string Next(int64_t id) {
    const char* text = nullptr;
    Check(OgaTokenizerStreamDecode(stream_, static_cast<int32_t>(id), &text));
    return text;
  }

 private:
  static void Check(OgaResult* failure) {
    if (failure) throw std::runtime_error(std::string("tokenizer: ") + OgaResultGetError(failure));
  }

  OgaTokenizer* tokenizer_ = nullptr;
  OgaTokenizerStream* stream_ = nullptr;
};

#else

class Tokenizer {
 public:
  explicit Tokenizer(const std::string&) {
    throw std::runtime_error(
        "this build has no tokenizer: give --ids, or build with -DTOKENIZER_LIBRARY=...");
  }
  std::vector<int64_t> Encode(const std::string&) const { return {}; }
  std::string Next(int64_t) { return {}; }
};

#endif
