// SPDX-License-Identifier: Apache-2.0
// Generates text from an engine folder of target cpu through the C API of onnxruntime-genai.
//   generate ENGINE PROMPT [NEW_TOKENS [DENSITY.onnx_adapter]]
// The text goes to standard output, the token ids of prompt and text to standard error.
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#if __has_include(<ort_genai_c.h>)
#include <ort_genai_c.h>
#else  // The Python package of onnxruntime-genai has the library, but no header: this is what is used of it
       // here.
typedef struct OgaResult OgaResult;
typedef struct OgaModel OgaModel;
typedef struct OgaTokenizer OgaTokenizer;
typedef struct OgaTokenizerStream OgaTokenizerStream;
typedef struct OgaSequences OgaSequences;
typedef struct OgaGeneratorParams OgaGeneratorParams;
typedef struct OgaGenerator OgaGenerator;
typedef struct OgaAdapters OgaAdapters;
const char* OgaResultGetError(const OgaResult*);
OgaResult* OgaCreateModel(const char* folder, OgaModel**);
OgaResult* OgaCreateTokenizer(const OgaModel*, OgaTokenizer**);
OgaResult* OgaUpdateTokenizerOptions(OgaTokenizer*, const char* const* keys, const char* const* values,
                                     size_t count);
OgaResult* OgaCreateTokenizerStream(const OgaTokenizer*, OgaTokenizerStream**);
OgaResult* OgaTokenizerStreamDecode(OgaTokenizerStream*, int32_t token, const char** text);
OgaResult* OgaCreateSequences(OgaSequences**);
OgaResult* OgaTokenizerEncode(const OgaTokenizer*, const char* text, OgaSequences*);
size_t OgaSequencesGetSequenceCount(const OgaSequences*, size_t row);
OgaResult* OgaCreateGeneratorParams(const OgaModel*, OgaGeneratorParams**);
OgaResult* OgaGeneratorParamsSetSearchNumber(OgaGeneratorParams*, const char* name, double value);
OgaResult* OgaCreateGenerator(const OgaModel*, const OgaGeneratorParams*, OgaGenerator**);
OgaResult* OgaCreateAdapters(const OgaModel*, OgaAdapters**);
OgaResult* OgaLoadAdapter(OgaAdapters*, const char* file, const char* name);
OgaResult* OgaSetActiveAdapter(OgaGenerator*, OgaAdapters*, const char* name);
OgaResult* OgaGenerator_AppendTokenSequences(OgaGenerator*, const OgaSequences*);
bool OgaGenerator_IsDone(OgaGenerator*);
OgaResult* OgaGenerator_GenerateNextToken(OgaGenerator*);
size_t OgaGenerator_GetSequenceCount(const OgaGenerator*, size_t row);
const int32_t* OgaGenerator_GetSequenceData(const OgaGenerator*, size_t row);
void OgaDestroyTokenizerStream(OgaTokenizerStream*);
void OgaDestroySequences(OgaSequences*);
void OgaDestroyGenerator(OgaGenerator*);
void OgaDestroyGeneratorParams(OgaGeneratorParams*);
void OgaDestroyAdapters(OgaAdapters*);
void OgaDestroyTokenizer(OgaTokenizer*);
void OgaDestroyModel(OgaModel*);
void OgaShutdown(void);
#endif

static void check(OgaResult* failure) {
  if (failure == NULL) return;
  fprintf(stderr, "generate: %s\n", OgaResultGetError(failure));
  exit(EXIT_FAILURE);
}

int main(int argc, char** argv) {
  if (argc < 3 || argc > 5) {
    fprintf(stderr, "usage: generate ENGINE PROMPT [NEW_TOKENS [DENSITY.onnx_adapter]]\n");
    return 2;
  }
  OgaModel* model = NULL;
  OgaTokenizer* tokenizer = NULL;
  OgaTokenizerStream* stream = NULL;
  OgaSequences* prompt = NULL;
  OgaGeneratorParams* parameters = NULL;
  OgaGenerator* generator = NULL;
  OgaAdapters* adapters = NULL;

  check(OgaCreateModel(argv[1], &model));  // finds the op library inside the folder
  check(OgaCreateTokenizer(model, &tokenizer));
  const char* key = "add_special_tokens";  // OPT was trained with </s> in front of every text
  const char* value = "true";
  check(OgaUpdateTokenizerOptions(tokenizer, &key, &value, 1));
  check(OgaCreateTokenizerStream(tokenizer, &stream));
  check(OgaCreateSequences(&prompt));
  check(OgaTokenizerEncode(tokenizer, argv[2], prompt));

  const size_t given = OgaSequencesGetSequenceCount(prompt, 0);
  const long most = argc > 3 ? strtol(argv[3], NULL, 10) : 64;
  check(OgaCreateGeneratorParams(model, &parameters));
  check(OgaGeneratorParamsSetSearchNumber(parameters, "max_length", (double)given + (double)most));
  check(OgaCreateGenerator(model, parameters, &generator));
  check(OgaCreateAdapters(model, &adapters));
  if (argc == 5) {  // written by density.py
    check(OgaLoadAdapter(adapters, argv[4], "density"));
    check(OgaSetActiveAdapter(generator, adapters, "density"));
  }
  check(OgaGenerator_AppendTokenSequences(generator, prompt));
  while (!OgaGenerator_IsDone(generator)) {
    const char* text = NULL;
    check(OgaGenerator_GenerateNextToken(generator));
    const size_t count = OgaGenerator_GetSequenceCount(generator, 0);
    check(OgaTokenizerStreamDecode(stream, OgaGenerator_GetSequenceData(generator, 0)[count - 1], &text));
    fputs(text, stdout);
    fflush(stdout);
  }
  putchar('\n');
  for (size_t i = 0; i < OgaGenerator_GetSequenceCount(generator, 0); ++i)
    fprintf(stderr, "%d ", OgaGenerator_GetSequenceData(generator, 0)[i]);
  fputc('\n', stderr);

  OgaDestroyGenerator(generator);
  OgaDestroyAdapters(adapters);
  OgaDestroyGeneratorParams(parameters);
  OgaDestroySequences(prompt);
  OgaDestroyTokenizerStream(stream);
  OgaDestroyTokenizer(tokenizer);
  OgaDestroyModel(model);
  OgaShutdown();
  return EXIT_SUCCESS;
}
