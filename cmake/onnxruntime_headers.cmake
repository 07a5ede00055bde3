# SPDX-License-Identifier: Apache-2.0
# shadowc::onnxruntime_headers: the ONNX Runtime C and C++ headers of API 21. Nothing is linked: the host hands its
# function table to RegisterCustomOps. The API level is fixed, because a library built against newer headers is
# refused by older runtimes.
set(SHADOWC_ORT_API 21)

find_path(SHADOWC_ORT_INCLUDE onnxruntime_cxx_api.h
          PATH_SUFFIXES onnxruntime onnxruntime/core/session
          DOC "Folder of onnxruntime_cxx_api.h, API ${SHADOWC_ORT_API}")
set(ort_api "none")
if(SHADOWC_ORT_INCLUDE)
  file(STRINGS "${SHADOWC_ORT_INCLUDE}/onnxruntime_c_api.h" ort_api REGEX "^#define ORT_API_VERSION [0-9]+")
  string(REGEX REPLACE "[^0-9]" "" ort_api "${ort_api}")
endif()

if(ort_api STREQUAL SHADOWC_ORT_API)
  set(ort_include "${SHADOWC_ORT_INCLUDE}")
else()
  if(CMAKE_SYSTEM_NAME STREQUAL "Linux" AND CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$")
    set(ort_platform linux-x64)
    set(ort_sha256 7485c7e7aac6501b27e353dcbe068e45c61ab51fbaf598d13970dfae669d20bf)
  elseif(CMAKE_SYSTEM_NAME STREQUAL "Linux" AND CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64)$")
    set(ort_platform linux-aarch64)
    set(ort_sha256 4508084bde1232ee1ab4b6fad2155be0ea2ccab1c1aae9910ddb3fb68a60805e)
  else()
    message(FATAL_ERROR "ONNX Runtime headers of API ${SHADOWC_ORT_API}: expected installed, found ${ort_api}, and "
                        "there is no archive to fetch for ${CMAKE_SYSTEM_NAME} ${CMAKE_SYSTEM_PROCESSOR}. "
                        "Unpack a 1.21 release and pass -DSHADOWC_ORT_INCLUDE=<folder>/include")
  endif()
  message(STATUS "ONNX Runtime headers of API ${SHADOWC_ORT_API} not installed (found: ${ort_api}); fetching 1.21.0")
  include(FetchContent)
  FetchContent_Declare(
    onnxruntime_release
    URL "https://github.com/microsoft/onnxruntime/releases/download/v1.21.0/onnxruntime-${ort_platform}-1.21.0.tgz"
    URL_HASH SHA256=${ort_sha256}
    DOWNLOAD_EXTRACT_TIMESTAMP OFF)
  FetchContent_MakeAvailable(onnxruntime_release)
  set(ort_include "${onnxruntime_release_SOURCE_DIR}/include")
endif()
message(STATUS "ONNX Runtime headers: ${ort_include}")

add_library(shadowc_onnxruntime_headers INTERFACE)
add_library(shadowc::onnxruntime_headers ALIAS shadowc_onnxruntime_headers)
target_include_directories(shadowc_onnxruntime_headers SYSTEM INTERFACE "${ort_include}")
target_compile_definitions(shadowc_onnxruntime_headers INTERFACE ORT_API_MANUAL_INIT)
