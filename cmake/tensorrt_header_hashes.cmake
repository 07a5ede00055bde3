# SPDX-License-Identifier: Apache-2.0
# What the plugin needs of https://github.com/NVIDIA/TensorRT, include/ (Apache-2.0), at each release's tag: SHA-256
# of the list of "<sha256 of the file>  <file>\n", one line per file in the order below. Oldest tag first.
set(SHADOWC_TENSORRT_FILES
    NvInferImpl.h NvInferLegacyDims.h NvInferPluginBase.h NvInferRuntime.h NvInferRuntimeBase.h NvInferRuntimeCommon.h
    NvInferRuntimePlugin.h NvInferVersion.h)
set(SHADOWC_TENSORRT_TAGS "")
macro(shadowc_tensorrt_tag tag digest)
  list(APPEND SHADOWC_TENSORRT_TAGS ${tag})
  set(SHADOWC_TENSORRT_SHA256_${tag} ${digest})
endmacro()
shadowc_tensorrt_tag(v10.3.0 7a36caf2e0d852356adaaade5e84fb03e3589aebfe70624cce3d576c67f6aeea)
shadowc_tensorrt_tag(v10.4.0 dfb5ced7d6f650ea93a25b6da79893abc0200c5e3ebe173f0f737166439e8a03)
shadowc_tensorrt_tag(v10.5.0 fc0ccd2de4b938ed1af2fbc952ce70bafa49e53586d454d0422620e8a7e49882)
shadowc_tensorrt_tag(v10.6.0 2f01668228fdc8e0e3dbbe0b5e7719dbbae3e895a0a2bec6222c02620b8abeab)
shadowc_tensorrt_tag(v10.7.0 2ba89820fe74647bbf398b1c5bdc8852d0b544537abb25833f251ff5cef818ca)
shadowc_tensorrt_tag(v10.8.0 0d5d3a0d183aaf43c1a2cd24568dcecfb866211baae837df009216978f245eb1)
shadowc_tensorrt_tag(v10.9.0 81fa83e20d365b78985f035d69cc1582aaa7b3a7d8d6bd3e59e483046f95e62a)
shadowc_tensorrt_tag(v10.10.0 0fe2d7b29ae52a37bed83953bd04dc369c6a3eadce992dee0b49775e27b1267c)
shadowc_tensorrt_tag(v10.11 67881939aac51e4616e06c546ce3d7157a53a263c896cf50d36e4538b0bda003)
shadowc_tensorrt_tag(v10.12.0 457966a95d4adcdc62bc92b97fb5ec0b2b7fff79c1b61e44739b51c75f4ea7d6)
shadowc_tensorrt_tag(v10.13.0 b465b03d1d86041cc90cddbb4820b1ac0d27e7ffdbe4dc5cbad206d3f8435c0b)
shadowc_tensorrt_tag(v10.13.2 ebe695010cd3f5c645f9731b97dd33fd67c316f9b12eed7b75b21accc5fd912e)
shadowc_tensorrt_tag(v10.13.3 ade3764f6ef512d4a9089d21b99e210d6c5ad7a51ab5d711d70cd8e70d27b2b9)
shadowc_tensorrt_tag(v10.14 edf49dc8e927099ce94e509d7fec34f4e9bc0642e92157db07246f40a71b4c6e)
shadowc_tensorrt_tag(v10.15 dc5c4bbc4fdf817a81d3e48ddec0526900d9384bfa48583133d3f51f33c4a672)
shadowc_tensorrt_tag(v10.16 45ec53c4a018a2efd7220ea0895122f197ca43922884d42c519a3de8c8e21a4d)
shadowc_tensorrt_tag(v11.0 a6f9ee57ff2a27d17a3bce1a7f6534f2ddb987491801412a4d5cb4eb700b17a2)
shadowc_tensorrt_tag(v11.1 2f706ad9ee1dc1389c5152bf45c4263aa34e1b1e8e23beb659df60d3ee5d0356)
