# SPDX-License-Identifier: Apache-2.0
# SHADOWC_TENSORRT_HEADERS: folders of TensorRT headers to build the plugin against, one per family (trt10, trt11,
# rtx1). Looked for in this order: TENSORRT_INCLUDE_DIR (CMake or environment variable; several folders separated by
# ; or :), the usual places, the Apache-2.0 headers of NVIDIA/TensorRT at the tag of the installed version (network),
# build/tensorrt_headers (scripts/tensorrt_headers.sh). Nothing of TensorRT is linked.
include(cmake/tensorrt_header_hashes.cmake)
set(SHADOWC_TENSORRT_URL "https://raw.githubusercontent.com/NVIDIA/TensorRT" CACHE STRING
    "Where <tag>/include/<file> of TensorRT's headers is fetched from; empty: nothing is fetched")

# The family and version of the headers in `folder`; an empty family if they are none, or too old.
function(shadowc_tensorrt_version folder family_variable version_variable)
  set(family "")
  set(parts "")
  set(file "${folder}/NvInferVersion.h")
  if(EXISTS "${file}" AND EXISTS "${folder}/NvInferRuntime.h")
    foreach(part MAJOR MINOR PATCH) # the numbers are behind TRT_MAJOR_ENTERPRISE, TRT_MAJOR_RTX or NV_TENSORRT_MAJOR
      file(STRINGS "${file}" lines REGEX "^#define +(TRT_${part}_[A-Z]+|NV_TENSORRT_${part}) +[0-9]+")
      string(REGEX MATCH " ([0-9]+)" line "${lines}")
      list(APPEND parts "${CMAKE_MATCH_1}")
    endforeach()
  endif()
  list(JOIN parts "." version)
  if(version MATCHES "^1\\.")
    set(family rtx1)
  elseif(version MATCHES "^(10|11)\\." AND version VERSION_GREATER_EQUAL 10.3)
    set(family "trt${CMAKE_MATCH_1}")
  endif()
  set(${family_variable} "${family}" PARENT_SCOPE)
  set(${version_variable} "${version}" PARENT_SCOPE)
endfunction()

# Version of the TensorRT that is installed here, as Python package or as library; empty if there is none.
function(shadowc_installed_tensorrt version_variable)
  set(version "")
  if(Python3_EXECUTABLE) # from the build of a Python package
    set(SHADOWC_PYTHON "${Python3_EXECUTABLE}" CACHE FILEPATH "Python whose packages tell which TensorRT is installed")
  endif()
  find_program(SHADOWC_PYTHON NAMES python3 HINTS ENV VIRTUAL_ENV PATH_SUFFIXES bin)
  if(SHADOWC_PYTHON)
    execute_process(
      COMMAND "${SHADOWC_PYTHON}" -c
              "import importlib.metadata as m; print(next(d.version for d in m.distributions() if (d.metadata['Name'] or '').lower().replace('_', '-') in ('tensorrt', 'tensorrt-cu12', 'tensorrt-cu13')))"
      OUTPUT_VARIABLE version ERROR_QUIET OUTPUT_STRIP_TRAILING_WHITESPACE)
  endif()
  if(version STREQUAL "")
    find_library(library NAMES libnvinfer.so.11 libnvinfer.so.10 NO_CACHE)
    if(library)
      file(REAL_PATH "${library}" library)
      string(REGEX MATCH "[0-9]+\\.[0-9]+(\\.[0-9]+)*$" version "${library}")
    endif()
  endif()
  set(${version_variable} "${version}" PARENT_SCOPE)
endfunction()

# Fetches the headers of the newest known tag that is not newer than `version` (of the same major); any, if empty.
function(shadowc_fetch_tensorrt version folder_variable)
  set(${folder_variable} "" PARENT_SCOPE)
  string(REGEX MATCH "^[0-9]+" major "${version}")
  foreach(tag IN LISTS SHADOWC_TENSORRT_TAGS)
    string(SUBSTRING "${tag}" 1 -1 number)
    if(version STREQUAL "" OR (tag MATCHES "^v${major}\\." AND number VERSION_LESS_EQUAL version))
      set(chosen "${tag}")
    endif()
  endforeach()
  if(NOT chosen OR SHADOWC_TENSORRT_URL STREQUAL "")
    return()
  endif()
  set(folder "${CMAKE_BINARY_DIR}/tensorrt_headers/${chosen}")
  set(list "")
  foreach(file IN LISTS SHADOWC_TENSORRT_FILES)
    if(file STREQUAL "NvInferPluginBase.h" AND chosen MATCHES "^v10\\.[345]\\.")
      continue() # not there yet
    endif()
    if(NOT EXISTS "${folder}/${file}")
      file(DOWNLOAD "${SHADOWC_TENSORRT_URL}/${chosen}/include/${file}" "${folder}/${file}.part"
           TIMEOUT 20 INACTIVITY_TIMEOUT 5 STATUS status)
      list(GET status 0 code)
      if(NOT code EQUAL 0)
        return()
      endif()
      file(RENAME "${folder}/${file}.part" "${folder}/${file}")
    endif()
    file(SHA256 "${folder}/${file}" digest)
    string(APPEND list "${digest}  ${file}\n")
  endforeach()
  string(SHA256 digest "${list}")
  if(NOT digest STREQUAL "${SHADOWC_TENSORRT_SHA256_${chosen}}")
    file(REMOVE_RECURSE "${folder}")
    message(WARNING "TensorRT headers ${chosen} from ${SHADOWC_TENSORRT_URL}: expected SHA-256 "
                    "${SHADOWC_TENSORRT_SHA256_${chosen}} over all files, found ${digest}; not used")
    return()
  endif()
  set(${folder_variable} "${folder}" PARENT_SCOPE)
endfunction()

# --- the search -----------------------------------------------------------------------------------------------------
set(TENSORRT_INCLUDE_DIR "$ENV{TENSORRT_INCLUDE_DIR}" CACHE STRING "Folders of NvInferRuntime.h, separated by ; or :")
string(REPLACE ":" ";" candidates "${TENSORRT_INCLUDE_DIR}")
if(candidates)
  foreach(folder IN LISTS candidates)
    shadowc_tensorrt_version("${folder}" family version)
    if(family STREQUAL "")
      message(FATAL_ERROR "TENSORRT_INCLUDE_DIR: expected NvInferRuntime.h of TensorRT 10.3 to 11.x in ${folder}, "
                          "found version '${version}'")
    endif()
  endforeach()
else()
  find_path(SHADOWC_SYSTEM_TENSORRT NvInferRuntime.h
            HINTS ENV TRT_ROOT ENV TENSORRT_ROOT
            PATHS /usr/include/x86_64-linux-gnu /usr/include/aarch64-linux-gnu /usr/local/tensorrt /opt/tensorrt
                  /usr/local/TensorRT /opt/TensorRT ${CUDAToolkit_INCLUDE_DIRS}
            PATH_SUFFIXES include DOC "Folder of an installed NvInferRuntime.h")
  if(SHADOWC_SYSTEM_TENSORRT)
    set(candidates "${SHADOWC_SYSTEM_TENSORRT}")
  else()
    shadowc_installed_tensorrt(installed)
    shadowc_fetch_tensorrt("${installed}" candidates)
    if(NOT candidates)
      file(GLOB candidates "${CMAKE_CURRENT_SOURCE_DIR}/build/tensorrt_headers/*")
    endif()
  endif()
endif()

set(SHADOWC_TENSORRT_HEADERS "")
foreach(folder IN LISTS candidates)
  shadowc_tensorrt_version("${folder}" family version)
  if(family STREQUAL "" OR DEFINED SHADOWC_TENSORRT_${family})
    continue() # too old, or the second of its family
  endif()
  set(SHADOWC_TENSORRT_${family} "${folder}")
  list(APPEND SHADOWC_TENSORRT_HEADERS "${family}")
  message(STATUS "TensorRT ${version} headers (${family}): ${folder}")
endforeach()
if(NOT SHADOWC_TENSORRT_HEADERS)
  message(STATUS "TensorRT plugin: not built; set TENSORRT_INCLUDE_DIR to the folder of NvInferRuntime.h, 10.3 or newer")
endif()
