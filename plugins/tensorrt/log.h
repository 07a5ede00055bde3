// SPDX-License-Identifier: Apache-2.0
// Sentences for the user. They go to TensorRT's logger where its table is the one these headers describe,
// else to stderr, each line starting with "shadowc: ".
#pragma once

#include <NvInferRuntime.h>

#include <string>

namespace shadowc::trt {

// The two together decide where Error() writes; both may come in any order, or never.
void SetLoggerFinder(nvinfer1::ILoggerFinder* finder);
void AllowLogger(bool same_tables);

void Error(const std::string& sentence);
void Warn(const std::string& sentence);

}  // namespace shadowc::trt
