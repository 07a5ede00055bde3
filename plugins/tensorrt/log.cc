// SPDX-License-Identifier: Apache-2.0
#include "log.h"

#include <cstdio>
#include <mutex>

namespace shadowc::trt {
namespace {

std::mutex guard;
nvinfer1::ILoggerFinder* finder = nullptr;
bool allowed = false;

using Severity = nvinfer1::ILogger::Severity;

void Write(Severity severity, const char* word, const std::string& sentence) {
  const std::lock_guard<std::mutex> lock(guard);
  nvinfer1::ILogger* logger = allowed && finder != nullptr ? finder->findLogger() : nullptr;
  if (logger != nullptr) {
    logger->log(severity, ("shadowc: " + sentence).c_str());
  } else {
    std::fprintf(stderr, "shadowc: %s: %s\n", word, sentence.c_str());
  }
}

}  // namespace

void SetLoggerFinder(nvinfer1::ILoggerFinder* given) {
  const std::lock_guard<std::mutex> lock(guard);
  finder = given;
}

void AllowLogger(bool same_tables) {
  const std::lock_guard<std::mutex> lock(guard);
  allowed = same_tables;
}

void Error(const std::string& sentence) { Write(Severity::kERROR, "error", sentence); }

void Warn(const std::string& sentence) { Write(Severity::kWARNING, "warning", sentence); }

}  // namespace shadowc::trt
