# SPDX-License-Identifier: Apache-2.0
# shadowc::highway: Google Highway, the SIMD layer. A static library is preferred. A distribution that ships only a
# shared one (Debian) is fine too: SHADOWC_HWY_RUNTIME is then the file to put beside our library.
option(SHADOWC_FETCH_HIGHWAY "Fetch and link Highway statically even if it is installed" OFF)
find_path(SHADOWC_HWY_INCLUDE hwy/highway.h DOC "Folder that holds hwy/highway.h, 1.2 or newer")
find_library(SHADOWC_HWY_LIBRARY NAMES libhwy.a hwy DOC "Highway's library")

set(hwy_usable OFF)
if(SHADOWC_HWY_INCLUDE AND SHADOWC_HWY_LIBRARY AND NOT SHADOWC_FETCH_HIGHWAY)
  file(STRINGS "${SHADOWC_HWY_INCLUDE}/hwy/base.h" hwy_version REGEX "^#define HWY_(MAJOR|MINOR) ")
  list(TRANSFORM hwy_version REPLACE "[^0-9]" "")
  list(JOIN hwy_version "." hwy_version)
  if(hwy_version VERSION_GREATER_EQUAL 1.2)
    set(hwy_usable ON)
  endif()
endif()

set(SHADOWC_HWY_RUNTIME "")
add_library(shadowc_highway INTERFACE)
add_library(shadowc::highway ALIAS shadowc_highway)
if(hwy_usable)
  target_include_directories(shadowc_highway SYSTEM INTERFACE "${SHADOWC_HWY_INCLUDE}")
  target_link_libraries(shadowc_highway INTERFACE "${SHADOWC_HWY_LIBRARY}")
  if(NOT SHADOWC_HWY_LIBRARY MATCHES "\\.a$")
    target_compile_definitions(shadowc_highway INTERFACE HWY_SHARED_DEFINE)
    get_filename_component(hwy_folder "${SHADOWC_HWY_LIBRARY}" DIRECTORY)
    set(SHADOWC_HWY_RUNTIME "${hwy_folder}/libhwy.so.1")
    if(NOT EXISTS "${SHADOWC_HWY_RUNTIME}")
      message(FATAL_ERROR "Highway: expected ${SHADOWC_HWY_RUNTIME} beside ${SHADOWC_HWY_LIBRARY}, found none")
    endif()
  endif()
  message(STATUS "Highway ${hwy_version}: ${SHADOWC_HWY_LIBRARY}")
else()
  message(STATUS "Highway: fetching 1.2.0, to be linked statically")
  include(FetchContent)
  set(BUILD_TESTING OFF CACHE BOOL "" FORCE)
  set(HWY_ENABLE_TESTS OFF CACHE BOOL "" FORCE)
  set(HWY_ENABLE_EXAMPLES OFF CACHE BOOL "" FORCE)
  set(HWY_ENABLE_CONTRIB OFF CACHE BOOL "" FORCE)
  set(HWY_ENABLE_INSTALL OFF CACHE BOOL "" FORCE)
  set(HWY_FORCE_STATIC_LIBS ON CACHE BOOL "" FORCE)
  FetchContent_Declare(
    highway
    URL "https://github.com/google/highway/archive/refs/tags/1.2.0.tar.gz"
    URL_HASH SHA256=7e0be78b8318e8bdbf6fa545d2ecb4c90f947df03f7aadc42c1967f019e63343
    DOWNLOAD_EXTRACT_TIMESTAMP OFF)
  FetchContent_MakeAvailable(highway)
  target_link_libraries(shadowc_highway INTERFACE hwy)
endif()
# One target less to compile: Sapphire Rapids' extra instructions (fp16) serve none of our kernels. Ice Lake's do
# (8-bit dot products), and Highway leaves that target out unless it is asked for.
target_compile_definitions(shadowc_highway INTERFACE HWY_DISABLED_TARGETS=HWY_AVX3_SPR HWY_WANT_AVX3_DL)
