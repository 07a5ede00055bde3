# SPDX-License-Identifier: Apache-2.0
# Toolchain file: cross-compiles for 64-bit Arm on another Linux, with GCC's cross compiler (Debian: g++-aarch64-linux-gnu).
# Libraries and headers come from SHADOWC_AARCH64_ROOT (see scripts/aarch64.sh), or are fetched.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_LIBRARY_ARCHITECTURE aarch64-linux-gnu)

set(SHADOWC_AARCH64_ROOT "${CMAKE_CURRENT_LIST_DIR}/../build/aarch64/root" CACHE PATH "Unpacked packages of arm64")
list(APPEND CMAKE_TRY_COMPILE_PLATFORM_VARIABLES SHADOWC_AARCH64_ROOT)
set(CMAKE_FIND_ROOT_PATH "${SHADOWC_AARCH64_ROOT}")
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_PACKAGE ONLY)
